"""Labels after any augmentation are those that the warped image itself shows; each known fault has its test."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from views import POSE, keyed, view

from geopose_dist import geometry
from geopose_dist.augment import Augmenter, AugmentRecipe, Draw, Tone, apply, draw
from geopose_dist.data.sample import Part, View, Window

quick = settings(max_examples=80, deadline=None, derandomize=True)


OPERATION = st.one_of(
    st.tuples(st.just("rotate"), st.one_of(st.integers(0, 359), st.sampled_from([90, 180, 270])).map(float)),
    st.tuples(st.sampled_from(["flip_x", "flip_y", "transpose"]), st.just(1.0)),
    st.tuples(st.just("zoom"), st.floats(0.7, 1.4)),
)


def measured_map(original: View, drawn: Draw):
    """float64 [3, 2], source (x, y, 1) to output (x, y), measured: the source's coordinates are sent through as if
    they were heights, and a plane is fitted to where they arrive."""
    drawn = dataclasses.replace(drawn, heights=None)
    planes = np.mgrid[: original.rgb.shape[0], : original.rgb.shape[1]].astype(np.float32)
    out_row, out_col = (apply(dataclasses.replace(original, agl_m=plane), drawn).agl_m for plane in planes)
    seen = np.isfinite(out_row)
    rows, cols = np.nonzero(seen)
    known = np.column_stack([out_col[seen], out_row[seen], np.ones(seen.sum())])
    fit, *_ = np.linalg.lstsq(known, np.column_stack([cols, rows]), rcond=None)
    return fit


@quick
@given(st.lists(OPERATION, max_size=5), st.booleans())
def test_labels_are_those_of_the_warped_flow(operations, cropped):
    """Roof to ground in the source is the flow; roof to ground in the output must be what the new labels say."""
    zoom = math.prod(value for name, value in operations if name == "zoom")
    if not 0.5 < zoom < 2:
        operations = [operation for operation in operations if operation[0] != "zoom"]
        zoom = 1.0
    original = view(96, 120)
    drawn = Draw(operations=tuple(operations), window=(10, 20, 70, 70) if cropped else None)
    out = apply(original, drawn)
    flow = 10 * POSE["scale_px_per_m"] * np.array(geometry.direction(POSE["angle_rad"]))
    wanted = flow @ measured_map(original, drawn)[:2]
    found = 10 * out.scale_px_per_m * np.array(geometry.direction(out.angle_rad))
    np.testing.assert_allclose(found, wanted, atol=0.12)
    assert out.gsd_m == pytest.approx(POSE["gsd_m"] / zoom)
    assert 0 <= out.angle_rad < 2 * math.pi


@quick
@given(st.lists(OPERATION, max_size=4), st.floats(1, 2), st.sampled_from([None, (4, 6, 80, 100)]))
def test_labels_are_those_of_the_warped_flow_with_heights_raised(operations, factor, window):
    """Every pixel of the image tells, as its colour, where its surface stands on the ground; whatever is done then, an
    output pixel's flow is the way from it to that place on the ground of the output, and the labels must say so."""
    zoom = math.prod(value for name, value in operations if name == "zoom")
    if not 0.6 < zoom < 1.6:
        operations = [operation for operation in operations if operation[0] != "zoom"]
    # 12 m move by (6, 8) px: whole numbers, which colours can tell.
    original = view(96, 120, scale_px_per_m=10 / 12, angle_rad=math.atan2(3, 4))
    x, y = geometry.flow_xy(original.agl_m, original.scale_px_per_m, original.angle_rad)
    row, col = np.mgrid[:96, :120]
    told = np.stack([(col + x) * 2, (row + y) * 2, np.where(original.agl_m > 0, 255, 0)], axis=-1)
    original = dataclasses.replace(original, rgb=np.rint(told).astype(np.uint8))
    drawn = Draw(heights=factor, operations=tuple(operations), window=window)
    out = apply(original, drawn)
    roof = (out.rgb[..., 2] == 255) & np.isclose(out.agl_m, 12 * factor, rtol=1e-4)
    assume(roof.sum() >= 30)
    ground = np.column_stack([out.rgb[roof][:, :2] / 2, np.ones(roof.sum())]) @ measured_map(original, drawn)
    rows, cols = np.nonzero(roof)
    measured = (ground - np.column_stack([cols, rows])).mean(axis=0)
    labelled = 12 * factor * out.scale_px_per_m * np.array(geometry.direction(out.angle_rad))
    np.testing.assert_allclose(labelled, measured, atol=0.4)


@pytest.mark.parametrize("count", range(6))
def test_right_angles_flips_and_transposes_are_numpys(count):
    original = view(31, 44)
    chains = list(itertools.product([0.0, 90.0, 180.0, 270.0], [False, True], [False, True], [False, True]))
    for degrees, flip_x, flip_y, transpose in chains[count::6]:
        operations = [("rotate", degrees)] if degrees else []
        rgb, agl = np.rot90(original.rgb, degrees // 90), np.rot90(original.agl_m, degrees // 90)
        if flip_x:
            operations, rgb, agl = [*operations, ("flip_x", 1.0)], rgb[:, ::-1], agl[:, ::-1]
        if flip_y:
            operations, rgb, agl = [*operations, ("flip_y", 1.0)], rgb[::-1], agl[::-1]
        if transpose:
            operations, rgb, agl = [*operations, ("transpose", 1.0)], rgb.transpose(1, 0, 2), agl.T
        out = apply(original, Draw(operations=tuple(operations)))
        np.testing.assert_array_equal(out.rgb, rgb)
        np.testing.assert_array_equal(out.agl_m, agl)
        assert out.inside is None


@pytest.mark.parametrize(
    "operations",
    [
        [("rotate", 90.0)] * 4,
        [("rotate", 180.0)] * 2,
        [("flip_x", 1.0)] * 2,
        [("flip_y", 1.0)] * 2,
        [("transpose", 1.0)] * 2,
        [("zoom", 1.0)],
        [("rotate", 90.0), ("rotate", 270.0)],
        [],
    ],
)
def test_exact_identities(operations):
    original = view(31, 44)
    out = original
    for operation in operations:  # one by one, so that every step is resampled
        out = apply(out, Draw(operations=(operation,)))
    together = apply(original, Draw(operations=tuple(operations), heights=1.0))
    for result in (out, together):
        np.testing.assert_array_equal(result.rgb, original.rgb)
        np.testing.assert_array_equal(result.agl_m, original.agl_m)
        assert result.scale_px_per_m == original.scale_px_per_m
        assert result.angle_rad == pytest.approx(original.angle_rad, abs=1e-12)


def test_fault_1_zoom_multiplies_scale_and_divides_gsd():
    """A wall of 12 m at .6 px/m shows 7.2 px; shrunk to .7 it shows 5.04 px, and the label must say so."""
    out = apply(view(), Draw(operations=(("zoom", 0.7),)))
    assert out.scale_px_per_m == pytest.approx(0.6 * 0.7)
    assert out.gsd_m == pytest.approx(0.5 / 0.7)
    roof = (out.agl_m == 12).sum(axis=1).max()
    assert roof == pytest.approx(0.7 * (view().agl_m == 12).sum(axis=1).max(), abs=1)


def _first_draw(key: tuple[int, ...]) -> Draw:
    return draw(AugmentRecipe("strong"), keyed(*key), view(), 32)


def test_fault_2_draws_depend_on_the_key_and_on_nothing_else():
    keys = [(seed, sample) for seed in range(2) for sample in range(8)]
    here = [_first_draw(key) for key in keys]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_first_draw, keys) == here, "whichever worker it is"
    assert len(set(map(str, here))) == len(keys), "no two samples or visits alike"


def test_fault_3_corners_of_a_rotation_are_unknown():
    out = apply(view(), Draw(operations=(("rotate", 30.0),)))
    assert out.inside is not None
    assert not out.inside[0, 0]
    np.testing.assert_array_equal(np.isnan(out.agl_m), ~out.inside)
    assert (out.rgb[~out.inside] == 0).all()


def test_fault_4_one_unknown_height_does_not_switch_raising_off():
    recipe = AugmentRecipe("none", heights_p=1.0)
    agl = view().agl_m.copy()
    agl[0, 0] = np.nan
    drawn = draw(recipe, keyed(3), view(agl_m=agl))
    assert drawn.heights is not None
    out = apply(view(agl_m=agl), drawn)
    assert np.nanmax(out.agl_m) == pytest.approx(12 * drawn.heights, rel=1e-5)


def test_fault_5_raised_samples_have_no_tell_tale():
    """Where nothing tall is, a raised sample is the original to the byte: not blurred, no holes."""
    out = apply(view(), Draw(heights=1.5))
    far = np.s_[40:60, 60:85]
    np.testing.assert_array_equal(out.rgb[far], view().rgb[far])
    assert out.scale_px_per_m == POSE["scale_px_per_m"]


def test_fault_6_tiles_need_not_be_square():
    original = view(40, 100)
    for operation in (("rotate", 20.0), ("zoom", 0.8), ("flip_x", 1.0)):
        assert apply(original, Draw(operations=(operation,))).rgb.shape == (40, 100, 3)
    for operation in (("rotate", 90.0), ("rotate", 270.0), ("transpose", 1.0)):
        assert apply(original, Draw(operations=(operation,))).agl_m.shape == (100, 40)
    assert apply(original, Draw(heights=1.7)).rgb.shape == (40, 100, 3)


@quick
@given(
    st.integers(0, 10**6),
    st.sampled_from(["none", "dihedral", "benchmark", "strong", "faithful"]),
    st.sampled_from([None, 32]),
)
def test_draws_survive_a_json_file_and_can_be_applied_again(seed, preset, crop_px):
    drawn = draw(AugmentRecipe(preset), keyed(seed), view(), crop_px)
    again = Draw.from_json(json.loads(json.dumps(drawn.to_json())))
    assert again == drawn
    first, second = apply(view(), drawn), apply(view(), again)
    np.testing.assert_array_equal(first.rgb, second.rgb)
    np.testing.assert_array_equal(first.agl_m, second.agl_m)
    if crop_px is not None:
        assert first.rgb.shape == (32, 32, 3)


@quick
@given(st.integers(0, 10**6))
def test_a_crop_is_the_cut_of_the_whole(seed):
    """Only the crop's pixels are computed, yet they are those of the whole tile's augmentation."""
    original = view(80, 70)
    drawn = draw(AugmentRecipe("strong", tone_p=0.0, heights_p=0.7), keyed(seed), original, 32)
    row, col, rows, cols = drawn.window
    out = apply(original, drawn)
    # A window as large as the tile about the same centre holds the crop in its middle.
    wider = dataclasses.replace(drawn, window=(row - 10, col - 10, rows + 20, cols + 20))
    whole = apply(original, wider)
    close = (
        np.abs(whole.rgb[10:-10, 10:-10].astype(int) - out.rgb).max(-1) <= 2
    )  # weights of 1/128 may round apart
    assert close.mean() > 0.99
    np.testing.assert_allclose(
        np.nan_to_num(whole.agl_m[10:-10, 10:-10], nan=-9), np.nan_to_num(out.agl_m, nan=-9), atol=0.01
    ) if close.all() else None


def test_tone_changes_colours_and_nothing_else():
    tone = Tone(
        gamma=1.2, contrast=0.9, brightness=0.05, colour=(1.05, 1, 0.95), haze=0.1, noise=3, noise_seed=4
    )
    out = apply(view(), Draw(tone=tone))
    np.testing.assert_array_equal(out.agl_m, view().agl_m)
    assert out.pose == view().pose
    assert (out.rgb != view().rgb).mean() > 0.5
    np.testing.assert_array_equal(apply(view(), Draw(tone=tone)).rgb, out.rgb)
    flat = view(200, 200)
    flat.rgb[:] = 128
    noisy = apply(flat, Draw(tone=Tone(1, 1, 0, (1, 1, 1), 0, 6.0, 7))).rgb
    assert noisy.std() == pytest.approx(6, rel=0.05)
    assert noisy.mean() == pytest.approx(128, abs=0.2)


def test_padding_that_was_there_stays_padding():
    inside = np.ones((64, 90), bool)
    inside[:, :20] = False
    out = apply(view(inside=inside), Draw(operations=(("flip_x", 1.0),)))
    np.testing.assert_array_equal(out.inside, inside[:, ::-1])


def test_faithful_repeats_the_faults_it_names():
    out = apply(view(), Draw(operations=(("zoom", 0.7), ("rotate", 30.0)), faults=True))
    assert out.scale_px_per_m == pytest.approx(0.6 / 0.7)
    assert out.agl_m[0, 0] == 0
    agl = view().agl_m.copy()
    agl[0, 0] = np.nan
    drawn = [draw(AugmentRecipe("faithful", heights_p=1.0), keyed(i), view(agl_m=agl)) for i in range(3)]
    assert all(d.heights is None and d.faults for d in drawn)


def test_apply_leaves_its_view_alone():
    original = view()
    rgb, agl = original.rgb.copy(), original.agl_m.copy()
    for i in range(10):
        Augmenter(AugmentRecipe("strong"), 32)(original, keyed(i))
    np.testing.assert_array_equal(original.rgb, rgb)
    np.testing.assert_array_equal(original.agl_m, agl)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rgb": np.zeros((64, 90, 3), np.float32)},
            r"view.rgb is float32 \[64, 90, 3\]; wanted uint8 \[H, W, 3\]",
        ),
        ({"rgb": np.zeros((64, 90, 4), np.uint8)}, r"view.rgb is uint8 \[64, 90, 4\]; wanted uint8"),
        ({"rgb": None}, "view.rgb is a NoneType; wanted uint8"),
        (
            {"agl_m": np.zeros((64, 90))},
            r"view.agl_m is float64 \[64, 90\]; wanted float32 \[64, 90\] as rgb",
        ),
        (
            {"agl_m": np.zeros((64, 91), np.float32)},
            r"view.agl_m is float32 \[64, 91\]; wanted float32 \[64, 90\]",
        ),
        ({"inside": np.ones((3, 4), bool)}, r"view.inside is bool \[3, 4\]; wanted bool \[64, 90\]"),
        (
            {"part": Part(Window(0, 0, 64, 80), (64, 90), 1.0)},
            "view.part is Part.*; wanted the place of its pixels",
        ),
        (
            {"part": Part(Window(1, 0, 64, 90), (64, 90), 1.0)},
            "view.part is Part.*; wanted the place of its pixels",
        ),
    ],
)
def test_views_that_are_no_tiles_are_refused(changes, said):
    for drawn in (Draw(), Draw(operations=(("flip_x", 1.0),))):
        with pytest.raises(ValueError, match=said):
            apply(dataclasses.replace(view(), **changes), drawn)


@pytest.mark.parametrize(("missing", "said"), [("agl_m", "heights"), ("angle_rad", "pose")])
def test_raising_what_is_not_known_is_refused(missing, said):
    with pytest.raises(
        ValueError, match=rf"drawn.heights is 1.5; wanted None for JAX_a, which has no {said}"
    ):
        apply(view(**{missing: None}), Draw(heights=1.5))
