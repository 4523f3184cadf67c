"""The compiled kernels against their slow twins, on every shape, stride and gap that hypothesis thinks of."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopose_dist import kernels
from geopose_dist.kernels import Raised, reference

SAME = np.array([[1.0, 0, 0], [0, 1.0, 0]])
ANGLES = st.one_of(st.floats(0, 2 * math.pi), st.sampled_from([k * math.pi / 4 for k in range(8)]))
ORIGINS = st.one_of(st.just((0, 0)), st.tuples(st.integers(0, 300), st.integers(0, 300)))
quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def tiles(draw, most=40):
    """(rgb, agl_m): blocks of buildings, slopes, unknown patches and speckle, contiguous or not."""
    rows, cols = draw(st.integers(1, most)), draw(st.integers(1, most))
    rng = np.random.Generator(np.random.Philox(draw(st.integers(0, 2**32))))
    step = draw(st.sampled_from([1, 2]))
    agl = np.zeros((rows * step, cols * step), np.float32)
    for _ in range(draw(st.integers(0, 4))):
        top, left = rng.integers(0, agl.shape[0]), rng.integers(0, agl.shape[1])
        agl[top : top + 9, left : left + 12] = rng.uniform(1, 30)
    agl += rng.uniform(-0.2, 1, agl.shape).astype(np.float32) * draw(st.sampled_from([0, 1]))
    gaps = draw(st.sampled_from(["none", "speckle", "patch", "all", "infinite"]))
    if gaps == "speckle":
        agl[rng.random(agl.shape) < 0.2] = np.nan
    elif gaps == "patch":
        agl[agl.shape[0] // 3 :, : agl.shape[1] // 2 + 1] = np.nan
    elif gaps == "all":
        agl[:] = np.nan
    elif gaps == "infinite":
        agl[0, 0], agl[-1, -1] = np.inf, -np.inf
    rgb = rng.integers(0, 256, (*agl.shape, 3), dtype=np.uint8)
    return rgb[::step, ::step], agl[::step, ::step]


@quick
@given(tiles(), st.floats(0, 3), ANGLES, st.sampled_from([None, 0.3, 1.0]), ORIGINS)
def test_invert_flow_is_its_twin(tile, per_m, angle, drop, origin):
    found = kernels.invert_flow(tile[1], per_m, angle, facade_px_per_px=drop, origin=origin)
    wanted = reference.invert_flow(tile[1], per_m, angle, facade_px_per_px=drop, origin=origin)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@quick
@given(tiles(), st.floats(0.01, 3), ANGLES)
def test_rectify_is_its_twin(tile, scale, angle):
    found, wanted = kernels.rectify(*tile, scale, angle), reference.rectify(*tile, scale, angle)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@quick
@given(
    tiles(),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.lists(st.floats(-1.5, 1.5), min_size=4, max_size=4),
    st.tuples(st.floats(-60, 60), st.floats(-60, 60)),
    st.one_of(st.none(), ANGLES),
    st.booleans(),
    st.one_of(st.none(), st.tuples(*[st.integers(0, 30)] * 4)),
)
def test_gather_is_its_twin(tile, size, linear, offset, raised_angle, with_heights, around):
    """Also with maps that miss the tile altogether, and with a part of a tile that lacks what they read."""
    rgb, agl = tile
    matrix = np.array([[linear[0], linear[1], offset[0]], [linear[2], linear[3], offset[1]]])
    raised = None
    if raised_angle is not None:
        raised = Raised(kernels.invert_flow(agl, 0.5, raised_angle), raised_angle, 2.0)
    arguments = (rgb, agl if with_heights else None, matrix, size, raised, (9, 8, 7))
    part = {}
    if around is not None:
        whole = agl.shape[0] + around[0] + around[2], agl.shape[1] + around[1] + around[3]
        part = {"origin": around[:2], "tile_size": whole}
    found, wanted = kernels.gather(*arguments, **part), reference.gather(*arguments, **part)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("step", [-4.4e-271, 4.4e-271, -1e-17, 1e-17, -1e-12, 1e-12, -1e-7, 1e-7])
@pytest.mark.parametrize("start", [-0.5, 2.5, -0.5000001, 2.4999999])
def test_steps_that_vanish_when_added_lose_no_column(step, start):
    rgb = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    for matrix in ([[0, 0, 1], [0, step, start]], [[0, step, start], [0, 0, 1]]):
        arguments = (rgb, None, np.array(matrix), (2, 9), None, (9, 8, 7))
        for one, other in zip(kernels.gather(*arguments), reference.gather(*arguments), strict=True):
            np.testing.assert_array_equal(one, other)


def test_gather_in_strips_is_the_gather_of_each_part(rng):
    """Wide turned outputs go by strips of columns; a part asked for alone is the same part."""
    rgb = rng.integers(0, 256, (300, 1500, 3), dtype=np.uint8)
    agl = rng.uniform(0, 9, (300, 1500)).astype(np.float32)
    for linear in ([[0.75, 0.125], [-0.125, 0.75]], [[1, 0], [0, 1]]):  # dyadic: exact in any order
        matrix = np.column_stack([np.array(linear, float), [3.5, 40.25]])
        whole = kernels.gather(rgb, agl, matrix, (40, 1300))
        shifted = matrix + np.array([[0, 0, matrix[0, 1] * 1000], [0, 0, matrix[1, 1] * 1000]])
        part = kernels.gather(rgb, agl, shifted, (40, 300))
        np.testing.assert_array_equal(whole[0][:, 1000:], part[0])
        np.testing.assert_array_equal(whole[1][:, 1000:], part[1])


@quick
@given(st.integers(0, 10**6), st.sampled_from([1, 0.5, 0.8]), st.sampled_from([0, 90, 30, 17]), st.booleans())
def test_a_part_gives_the_bytes_of_the_whole(seed, zoom, degrees, lifted):
    """Also where places fall half-way between pixels, which a shifted origin would round the other way."""
    rng = np.random.Generator(np.random.Philox(seed))
    rgb = rng.integers(0, 256, (120, 140, 3), dtype=np.uint8)
    agl = np.where(rng.random((120, 140)) < 0.02, rng.uniform(0, 8, (120, 140)), 0).astype(np.float32)
    cos, sin = math.cos(math.radians(degrees)) / zoom, math.sin(math.radians(degrees)) / zoom
    row, col = rng.integers(45, 75), rng.integers(45, 95)
    matrix = np.array([[cos, sin, row - 10 * (cos + sin) + 0.5], [-sin, cos, col - 10 * (cos - sin)]])
    top, left = row - 40, col - 40
    cut = np.s_[top : top + 80, left : left + 80]
    angle = float(rng.uniform(0, 6))
    whole, part = None, None
    if lifted:
        whole = Raised(kernels.invert_flow(agl, 1.0, angle), angle, 2.0)
        shift = kernels.invert_flow(np.ascontiguousarray(agl[cut]), 1.0, angle, origin=(top, left))
        np.testing.assert_array_equal(shift[12:-12, 12:-12], whole.shift_px[cut][12:-12, 12:-12])
        part = Raised(shift, angle, 2.0)
    wanted = kernels.gather(rgb, agl, matrix, (21, 21), whole)
    found = kernels.gather(
        rgb[cut],
        np.ascontiguousarray(agl[cut]),
        matrix,
        (21, 21),
        part,
        origin=(top, left),
        tile_size=(120, 140),
    )
    assert wanted[2] is None
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_gather_by_itself_changes_nothing(rng):
    rgb = rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    agl = rng.uniform(0, 9, (37, 53)).astype(np.float32)
    agl[3, 4] = np.nan
    out_rgb, out_agl, inside = kernels.gather(rgb, agl, SAME, (37, 53))
    np.testing.assert_array_equal(out_rgb, rgb)
    np.testing.assert_array_equal(out_agl, agl)
    assert inside is None


def test_inverted_flow_of_a_block_is_what_geometry_says():
    """A roof of 10 px shift on columns 40..59, seen along +x: it comes to lie on columns 30..49."""
    agl = np.zeros((20, 100), np.float32)
    agl[:, 40:60] = 10
    shift = kernels.invert_flow(agl, 1.0, math.pi / 2)[10]
    np.testing.assert_array_equal(shift[31:50], 10)  # the roof keeps its size and hides what it covers
    np.testing.assert_array_equal(shift[:29], 0)
    np.testing.assert_array_equal(shift[60:], 0)
    assert (np.diff(shift[50:60]) < 0).all()  # between roof and ground the wall, stretched; no hole
    columns = np.arange(50, 60)
    np.testing.assert_allclose(columns + shift[50:60], 59 + (columns - 49) / 11, atol=1e-4)


def test_holes_are_filled_by_facade_and_ground():
    """After a roof an unknown stretch comes down like a wall; before a roof's far edge it is ground."""
    agl = np.zeros((1, 60), np.float32)
    agl[0, 10:20] = 8
    agl[0, 20:40] = np.nan  # roof, unknown, ground
    agl[0, 50:60] = 8
    agl[0, 45:50] = np.nan  # ground, unknown, roof
    filled = reference._filled(agl.copy(), np.isfinite(agl), 0.0, 1.0, np.float32(1.0))[0]
    np.testing.assert_array_equal(filled[20:28], np.arange(7, -1, -1))
    np.testing.assert_array_equal(filled[28:50], 0)


def test_rectify_puts_a_leaning_block_on_its_ground(rng):
    """Known geometry: roof on columns 40..59 belongs on 50..69; its old place holds what it hid: unseen."""
    agl = np.zeros((20, 100), np.float32)
    agl[:, 40:60] = 10
    rgb = np.zeros((20, 100, 3), np.uint8)
    rgb[:, :] = 50
    rgb[:, 40:60] = 200
    out_rgb, out_agl, occluded = kernels.rectify(rgb, agl, 1.0, math.pi / 2)
    np.testing.assert_array_equal(out_agl[10, 50:70], 10)
    np.testing.assert_array_equal(out_rgb[10, 50:70], 200)
    assert occluded[:, 40:50].all()
    assert occluded.sum() == 200
    assert np.isnan(out_agl[occluded]).all()


def test_rectify_agrees_with_the_benchmark(shared: Path):
    """Loosely: the benchmark rounds with a bias and smooths heights and mask by four medians."""
    recorded = np.load(shared / "conformance/kernels.npz")
    for k in range(3):
        warp = {name: recorded[f"warp{k}_{name}"] for name in ("rgb", "agl", "scale_px_per_m", "angle")}
        _, agl, occluded = kernels.rectify(
            warp["rgb"], warp["agl"], float(warp["scale_px_per_m"]), float(warp["angle"])
        )
        wanted = recorded[f"rect{k}_out_occluded"] > 0
        assert (occluded == wanted).mean() > 0.93
        both = ~occluded & ~wanted
        close = np.abs(agl - recorded[f"rect{k}_out_agl"]) < 0.5
        assert close[both].mean() > 0.9


def test_a_large_tile_is_quick():
    agl = np.zeros((2048, 2048), np.float32)
    agl[::64, ::64] = 30
    start = time.thread_time()
    kernels.rectify(np.zeros((2048, 2048, 3), np.uint8), agl, 0.5, 1.0)
    kernels.invert_flow(agl, 0.5, 1.0)
    assert time.thread_time() - start < 1.0


def test_absurd_heights_neither_crash_nor_take_forever():
    agl = np.full((64, 64), 3e38, np.float32)
    rgb = np.zeros((64, 64, 3), np.uint8)
    assert np.isnan(kernels.invert_flow(agl, 1.0, 0.3)).any()
    assert kernels.rectify(rgb, agl, 1.0, 0.3)[2].all()


def test_two_threads_do_the_same_and_let_each_other_run(rng):
    """The GIL is released: a pure Python thread gets on while a kernel works."""
    rgb = rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)
    agl = rng.uniform(0, 40, (512, 512)).astype(np.float32)
    wanted = kernels.rectify(rgb, agl, 0.7, 2.0), kernels.invert_flow(agl, 0.7, 2.0)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(10):
            found = kernels.rectify(rgb, agl, 0.7, 2.0), kernels.invert_flow(agl, 0.7, 2.0)
            same = all(
                np.array_equal(a, b, equal_nan=a.dtype != bool)
                for a, b in zip(found[0], wanted[0], strict=True)
            )
            if not (same and np.array_equal(found[1], wanted[1], equal_nan=True)):
                wrong.append(threading.current_thread().name)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


GOOD_RGB = np.zeros((4, 5, 3), np.uint8)
GOOD_AGL = np.zeros((4, 5), np.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rgb": GOOD_RGB.astype(np.float32)}, r"rgb is float32 \[4, 5, 3\]; wanted uint8 \[H, W, 3\]"),
        ({"rgb": GOOD_RGB[:, :, :2]}, r"rgb is uint8 \[4, 5, 2\]; wanted uint8"),
        ({"rgb": None}, "rgb is a NoneType; wanted uint8"),
        ({"agl_m": GOOD_AGL.astype(np.float64)}, r"agl_m is float64 \[4, 5\]; wanted float32"),
        (
            {"agl_m": np.zeros((4, 6), np.float32)},
            r"agl_m is float32 \[4, 6\]; wanted the size of rgb, \(4, 5\)",
        ),
        ({"rgb": np.zeros((0, 5, 3), np.uint8)}, r"rgb has size \(0, 5\); wanted sides of 1 to"),
        ({"scale_px_per_m": math.nan}, "scale_px_per_m is nan; wanted a finite number above 0"),
        ({"scale_px_per_m": 0.0}, "scale_px_per_m is 0.0; wanted"),
        ({"scale_px_per_m": -1.0}, "scale_px_per_m is -1.0; wanted"),
        ({"angle_rad": math.inf}, "angle_rad is inf; wanted a finite number of radians"),
    ],
)
def test_wrong_arguments_are_named(change, said):
    arguments = {"rgb": GOOD_RGB, "agl_m": GOOD_AGL, "scale_px_per_m": 0.5, "angle_rad": 1.0} | change
    with pytest.raises(ValueError, match=said):
        kernels.rectify(**arguments)


def test_wrong_arguments_of_the_other_doors_are_named():
    with pytest.raises(ValueError, match=r"px_per_m is -0\.1; wanted a finite number >= 0"):
        kernels.invert_flow(GOOD_AGL, -0.1, 0.0)
    with pytest.raises(ValueError, match="matrix is float64"):
        kernels.gather(GOOD_RGB, None, np.eye(3), (4, 5))
    with pytest.raises(ValueError, match="matrix is float64"):
        kernels.gather(GOOD_RGB, None, SAME * np.nan, (4, 5))
    with pytest.raises(ValueError, match=r"size is \(0, 5\); wanted"):
        kernels.gather(GOOD_RGB, None, SAME, (0, 5))
    with pytest.raises(
        ValueError, match=r"origin is \(0, 3\) with rgb of \(4, 5\); wanted a part of the tile of \(4, 7\)"
    ):
        kernels.gather(GOOD_RGB, None, SAME, (4, 5), origin=(0, 3), tile_size=(4, 7))
    with pytest.raises(ValueError, match=r"origin is \(-1, 0\) with agl_m"):
        kernels.invert_flow(GOOD_AGL, 1.0, 0.0, origin=(-1, 0))
    with pytest.raises(ValueError, match=r"tile_size is \(40000, 7\); wanted sides of at most"):
        kernels.gather(GOOD_RGB, None, SAME, (4, 5), tile_size=(40000, 7))
    with pytest.raises(ValueError, match=r"raised.shift_px is float32 \[2, 2\]; wanted the size of rgb"):
        kernels.gather(GOOD_RGB, GOOD_AGL, SAME, (4, 5), Raised(np.zeros((2, 2), np.float32), 0.0, 1.0))
    with pytest.raises(ValueError, match=r"table is uint8 \[3, 255\]"):
        kernels.tone(GOOD_RGB, np.zeros((3, 255), np.uint8))
    table = np.zeros((3, 256), np.uint8)
    with pytest.raises(ValueError, match=r"random is uint8 \[4\]; wanted uint8 \[60\]"):
        kernels.tone(GOOD_RGB, table, np.zeros(256, np.int8), np.zeros(4, np.uint8))


def test_tone_looks_up_and_clips(rng):
    rgb = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    table = rng.integers(0, 256, (3, 256), dtype=np.uint8)
    noise = rng.integers(-120, 120, 256).astype(np.int8)
    random = rng.integers(0, 256, rgb.size, dtype=np.uint8)
    wanted = np.stack([table[c][rgb[..., c]] for c in range(3)], axis=-1)
    np.testing.assert_array_equal(kernels.tone(rgb, table), wanted)
    noisy = np.clip(wanted.astype(int) + noise[random].reshape(rgb.shape), 0, 255)
    np.testing.assert_array_equal(kernels.tone(rgb, table, noise, random), noisy)


def test_the_bench_baseline_is_the_benchmark(shared: Path):
    """What we are compared with gives the benchmark's recorded outputs, faults included."""
    from geopose_dist.bench import baseline_kernels as baseline

    recorded = np.load(shared / "conformance/kernels.npz")
    for k in range(3):
        for fac in ("0.5", "0.25"):
            name = f"invert{k}_{fac}"
            flow, mask = baseline.invert_flow(recorded[f"{name}_flow"], recorded[f"{name}_mag"], float(fac))
            same = np.abs(flow - recorded[f"{name}_out"]).max(axis=-1) < 1e-3
            assert same.mean() > 0.997, "but for ties"
            np.testing.assert_array_equal(mask, recorded[f"{name}_mask"])
        rgb, agl = recorded[f"warp{k}_rgb"], recorded[f"warp{k}_agl"]
        pose = float(recorded[f"warp{k}_scale_px_per_m"]), float(recorded[f"warp{k}_angle"])
        warped = baseline.warp_heights(rgb, agl, *pose, float(recorded[f"warp{k}_factor"]))
        for found, name in zip(warped, ("rgb", "agl", "mag"), strict=True):
            wanted = recorded[f"warp{k}_out_{name}"].astype(float)
            assert np.abs(found - wanted).max() <= (1 if name == "rgb" else 1e-3)
        for degrees in (0, 37, 90, 211, 359):
            turned = baseline.rotate(rgb, agl, agl, degrees)
            assert np.abs(turned[0].astype(int) - recorded[f"rot{k}_{degrees}_rgb"]).max() <= 1
            np.testing.assert_allclose(turned[1], recorded[f"rot{k}_{degrees}_agl"], atol=1e-3)
        for factor in ("0.7", "0.83", "1.0"):
            small = baseline.zoom(rgb, agl, agl * np.float32(pose[0]), float(factor))
            np.testing.assert_array_equal(small[0], recorded[f"rescale{k}_{factor}_rgb"])
            np.testing.assert_allclose(small[1], recorded[f"rescale{k}_{factor}_agl"], atol=1e-3)
