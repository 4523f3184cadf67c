"""Augmentation done on the device gives the bytes that a loader worker would have made of the same draw."""

from __future__ import annotations

import dataclasses
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiles import make_dataset

from geopose_dist import cli, kernels
from geopose_dist.augment import Augmenter, AugmentRecipe, Deferrer, Draw, Tone, apply, defer, draw
from geopose_dist.data.batch import OUTSIDE_CM, UNKNOWN_CM, Batch, pack, to_device
from geopose_dist.data.sample import View
from geopose_dist.errors import UserError
from geopose_dist.model import device_augment
from geopose_dist.model.line_of_sight import invert_flow
from shards.pack import PackRecipe
from shards.pack import run as run_pack

quick = settings(max_examples=40, deadline=None, derandomize=True)
ALL_AT_ONCE = AugmentRecipe("strong", heights_p=1.0, rotate_p=1.0, zoom_p=1.0, tone_p=1.0, noise=0.0)
ANGLES = st.one_of(st.floats(0, 2 * math.pi), st.sampled_from([k * math.pi / 4 for k in range(8)]))


def keyed(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[*key, 0][:2]))


def view(seed: int = 0, rows: int = 90, cols: int = 110, gaps: float = 0.02, **changes: object) -> View:
    """Blocks with unknown speckle and patches; heights are whole centimetres, as in shards."""
    rng = keyed(seed)
    agl = np.zeros((rows, cols), np.float32)
    for _ in range(6):
        top, left = rng.integers(0, rows), rng.integers(0, cols)
        agl[top : top + 25, left : left + 20] = rng.uniform(2, 30)
    agl += rng.uniform(0, 0.5, agl.shape).astype(np.float32)
    agl = np.rint(agl * 100).astype(np.float32) / np.float32(100)
    agl[rng.random(agl.shape) < gaps] = np.nan
    if gaps:
        agl[rows // 3 : rows // 2, cols // 4 : cols // 2] = np.nan
    rgb = rng.integers(0, 256, (rows, cols, 3), dtype=np.uint8)
    made = View(f"JAX_{seed}", "JAX", rgb, agl, 0.5, 0.6, 0.3 + 1.1 * seed)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def packed(views: list[View]) -> Batch:
    return pack(views, ["JAX"], range(len(views)), [0] * len(views))


def both(views: list[View], draws: list[Draw]) -> tuple[Batch, Batch]:
    """The batch as workers make it, and as they leave it to the device."""
    here = packed([apply(one, drawn) for one, drawn in zip(views, draws, strict=True)])
    return here, packed([defer(one, drawn) for one, drawn in zip(views, draws, strict=True)])


def assert_same(done: Batch, wanted: Batch) -> None:
    """Everything equal to the bit."""
    assert done.deferred is None
    for name in ("gsd_m", "scale_px_per_m", "direction", "city"):
        torch.testing.assert_close(
            getattr(done, name), getattr(wanted, name), rtol=0, atol=0, equal_nan=True, check_device=False
        )
    assert torch.equal(done.agl_cm.cpu(), wanted.agl_cm.to(torch.int32))
    assert torch.equal(done.rgb.cpu(), wanted.rgb)


@pytest.mark.parametrize("crop_px", [None, 48])
@pytest.mark.parametrize(
    "recipe", [AugmentRecipe("strong", noise=0.0), AugmentRecipe("benchmark"), ALL_AT_ONCE]
)
def test_a_mixed_batch_is_the_workers_to_the_byte(recipe: AugmentRecipe, crop_px: int | None) -> None:
    for round_ in range(4):
        views = [view(i, rows=96, cols=96, gaps=0.02 * (i % 2)) for i in range(4)]
        draws = [draw(recipe, keyed(round_, i), one, crop_px) for i, one in enumerate(views)]
        wanted, left = both(views, draws)
        done = device_augment.finish(left)
        assert_same(done, wanted)
        assert done.rgb.is_contiguous(memory_format=torch.channels_last)
        if crop_px is not None:
            assert done.rgb.shape == (4, 3, 48, 48)


@quick
@given(
    st.integers(0, 10**6),
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
    st.floats(0.05, 3),
    ANGLES,
    st.floats(0.1, 2),
    st.sampled_from([0.0, 0.05, 0.6, 1.0]),
)
def test_lines_of_sight_are_the_kernels(
    seed: int, size: tuple[int, int], per_m: float, angle: float, facade: float, gaps: float
) -> None:
    agl = view(seed, *size, gaps=gaps).agl_m
    assert agl is not None
    wanted = kernels.invert_flow(agl, per_m, angle, facade_px_per_px=facade)
    tallest = 0.0 if np.isnan(agl).all() else float(np.nanmax(agl))
    found = invert_flow(torch.from_numpy(agl), per_m, angle, facade, tallest).numpy()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    # Along a hidden facade the kernel subtracts step by step, which rounds otherwise than a product.
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@quick
@given(st.integers(0, 10**6), st.sampled_from([None, (5, -3, 40, 20), (-30, 60, 33, 64)]))
def test_tiles_that_are_not_square_and_windows_beyond_the_tile(
    seed: int, window: tuple[int, int, int, int] | None
) -> None:
    original = view(seed % 5, 61, 83)
    drawn = draw(ALL_AT_ONCE, keyed(seed), original)
    drawn = dataclasses.replace(drawn, window=window)
    wanted, left = both([original], [drawn])
    assert_same(device_augment.finish(left), wanted)


@pytest.mark.parametrize("name", ["flip_x", "flip_y", "transpose", "quarter", "crop"])
def test_exact_operations_move_bytes_and_change_none(name: str) -> None:
    original = view(1, 60, 60)
    operations: tuple[tuple[str, float], ...] = ((name, 1.0),)
    if name in ("quarter", "crop"):
        operations = (("rotate", 270.0),) if name == "quarter" else ()
    drawn = Draw(operations=operations, window=(10, 5, 30, 40) if name == "crop" else None)
    done = device_augment.finish(both([original], [drawn])[1])
    rgb, agl = original.rgb, original.agl_m
    assert agl is not None
    turn = {
        "flip_x": lambda a: a[:, ::-1],
        "flip_y": lambda a: a[::-1],
        "transpose": lambda a: a.swapaxes(0, 1),
        "quarter": lambda a: np.rot90(a, 3),
        "crop": lambda a: a[10:40, 5:45],
    }[name]
    np.testing.assert_array_equal(done.rgb[0].permute(1, 2, 0).numpy(), turn(rgb))
    cm = np.where(np.isnan(agl), UNKNOWN_CM, np.rint(agl * 100))
    np.testing.assert_array_equal(done.agl_cm[0, 0].numpy(), turn(cm))


def test_samples_without_heights_or_pose_keep_what_they_have() -> None:
    views = [
        view(0, 64, 64),
        view(1, 64, 64, agl_m=None),
        view(2, 64, 64, scale_px_per_m=None, angle_rad=None),
        view(3, 64, 64, gsd_m=None, gaps=0.0),
    ]
    draws = [draw(ALL_AT_ONCE, keyed(5, i), one) for i, one in enumerate(views)]
    assert [one.heights is None for one in draws] == [False, True, True, False]
    wanted, left = both(views, draws)
    assert_same(device_augment.finish(left), wanted)


def test_only_the_part_that_a_crop_can_show_is_shipped_and_no_more_than_was_announced() -> None:
    recipe = AugmentRecipe("strong", heights_p=0.0)
    ships = Deferrer(recipe, 32).ships_px(400, 400)
    assert ships < (100, 100)
    for i in range(60):
        part = Deferrer(recipe, 32)(view(i % 5, 400, 400), keyed(6, i))
        assert part.deferred is not None
        assert part.rgb.shape[:2] == part.deferred.part <= ships
    raised = Deferrer(ALL_AT_ONCE, 32)
    parts = [raised(view(i % 5, 400, 400, gaps=0.0), keyed(7, i)) for i in range(8)]
    assert max(max(one.rgb.shape[:2]) for one in parts) < 150, (
        "30 m at .6 px/m: at most 18 px more on one side"
    )
    batch = packed(parts)
    assert batch.rgb.shape[2] % 32 == 0
    for i, one in enumerate(parts):
        rows, cols = one.rgb.shape[:2]
        assert (batch.agl_cm[i, 0].numpy()[rows:] == OUTSIDE_CM).all()
        assert (batch.agl_cm[i, 0].numpy()[:, cols:] == OUTSIDE_CM).all()
    assert Deferrer(recipe).ships_px(400, 300) == (400, 300)
    assert Deferrer(ALL_AT_ONCE, 32).ships_px(400, 300) == (400, 300)


def test_what_is_left_survives_the_trip_from_a_worker() -> None:
    views = [view(i, 64, 64) for i in range(2)]
    draws = [draw(ALL_AT_ONCE, keyed(8, i), one, 40) for i, one in enumerate(views)]
    wanted, left = both(views, draws)
    rebuild, arguments = left.__reduce__()
    arguments = (*arguments[:-1], pickle.loads(pickle.dumps(arguments[-1])))  # pixels go by shared memory
    there = rebuild(*arguments)
    assert_same(device_augment.finish(to_device(there, torch.device("cpu"))), wanted)


def test_a_batch_with_nothing_left_is_itself() -> None:
    batch = packed([view(0)])
    assert device_augment.finish(batch) is batch


def test_noise_is_keyed_and_of_the_same_distribution() -> None:
    flat = view(0, 200, 200)
    flat.rgb[:] = 128
    tone = Tone(1, 1, 0, (1, 1, 1), 0, 6.0, 2**62 + 11)
    worker = apply(flat, Draw(tone=tone)).rgb.astype(int) - 128
    batch = packed(
        [defer(flat, Draw(tone=tone)), defer(flat, Draw(tone=dataclasses.replace(tone, noise_seed=5)))]
    )
    done, again = device_augment.finish(batch), device_augment.finish(batch)
    assert torch.equal(done.rgb, again.rgb)
    assert not torch.equal(done.rgb[0], done.rgb[1])
    device = done.rgb[0].numpy().astype(int) - 128
    levels = np.arange(-20, 21)
    shares = [np.array([(noise == level).mean() for level in levels]) for noise in (device, worker)]
    np.testing.assert_allclose(*shares, atol=0.004)
    assert device.std() == pytest.approx(worker.std(), rel=0.01)


def test_what_cannot_be_is_refused_in_a_sentence() -> None:
    with pytest.raises(
        ValueError, match="where is device with preset faithful, whose faults only the workers"
    ):
        AugmentRecipe("faithful", where="device")
    with pytest.raises(ValueError, match="where is 'gpu'; wanted workers or device"):
        AugmentRecipe(where="gpu")  # type: ignore[arg-type]
    left = Deferrer(AugmentRecipe("none"))
    with pytest.raises(
        UserError, match=r"JAX_1 has 50x64 px, but JAX_0 of the same batch has 64x64; set data\.crop_px"
    ):
        packed([left(view(0, 64, 64), keyed(0)), left(view(1, 50, 64), keyed(1))])
    with pytest.raises(UserError, match="JAX_1 has 64x50 px, but JAX_0 of the same batch has 50x64"):
        packed(
            [defer(view(0, 50, 64), Draw()), defer(view(1, 50, 64), Draw(operations=(("transpose", 1.0),)))]
        )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device-augment")
    make_dataset(folder / "tiles", 6)
    run_pack(PackRecipe(source=str(folder / "tiles"), out=str(folder / "shards"), reduce=1))
    return folder / "shards"


@pytest.mark.slow
def test_training_is_the_same_wherever_samples_are_augmented(shards: Path, tmp_path: Path) -> None:
    """Two steps by real loader workers: losses and weights agree to the bit."""
    options = [
        "--length=2 steps", "--augment.preset=strong", "--augment.noise=0", "--data.crop-px=48", "--data.workers=1",
        "--augment.heights-p=0.7", "--data.global-batch=6", "--data.micro-batch=3",
    ]  # fmt: skip
    for where in ("workers", "device"):
        words = runs.words(shards, tmp_path / where, *options, f"--augment.where={where}")
        assert cli.main(words) == 0
    assert runs.numbers(tmp_path / "device") == runs.numbers(tmp_path / "workers")
    ours, theirs = (runs.final_weights(tmp_path / where) for where in ("device", "workers"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.gpu
def test_on_a_gpu_too_and_without_waiting_for_it() -> None:
    """Stated tolerance: at most 1 of 1000 heights and colours may round apart where heights are raised."""
    device = torch.device("cuda")
    for crop_px in (None, 48):
        views = [view(i, rows=96, cols=96) for i in range(4)]
        draws = [draw(ALL_AT_ONCE, keyed(9, i), one, crop_px) for i, one in enumerate(views)]
        wanted, left = both(views, draws)
        there = to_device(left.pin_memory(), device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            done = device_augment.finish(there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert (done.agl_cm.cpu() != wanted.agl_cm.to(torch.int32)).float().mean() <= 1e-3
        assert (done.rgb.cpu() != wanted.rgb).float().mean() <= 1e-3
        still = [dataclasses.replace(one, heights=None) for one in draws]
        wanted, left = both(views, still)
        assert_same(device_augment.finish(to_device(left, device)), wanted)


@pytest.mark.gpu
def test_noise_on_a_gpu_is_keyed() -> None:
    flat = view(0, 200, 200)
    flat.rgb[:] = 128
    left = packed([defer(flat, Draw(tone=Tone(1, 1, 0, (1, 1, 1), 0, 6.0, 7)))])
    first, second = (device_augment.finish(to_device(left, torch.device("cuda"))).rgb.cpu() for _ in range(2))
    assert torch.equal(first, second)
    assert first.float().std() == pytest.approx(6, rel=0.05)


def test_a_worker_spends_less_where_the_device_augments() -> None:
    """The reason for it all, without a clock: nothing is resampled, what is shipped is a cut of the tile."""
    original = view(0, 96, 96)
    part = Deferrer(ALL_AT_ONCE, 48)(original, keyed(3))
    assert np.shares_memory(part.rgb, original.rgb)
    assert part.agl_m is not None
    assert np.shares_memory(part.agl_m, original.agl_m)
    whole = Augmenter(ALL_AT_ONCE, 48)(original, keyed(3))
    assert (part.scale_px_per_m, part.angle_rad) == (whole.scale_px_per_m, whole.angle_rad)


@pytest.mark.slow
def test_one_sample_takes_less_than_40_mb() -> None:
    """Read, decoded, augmented with everything on and packed: 1024 x 1024, in a process of its own."""
    from geopose_dist.bench import cases_device

    (row,) = cases_device.bench_memory()
    assert row["batch_mb"] == pytest.approx(1024 * 1024 * 5 / 1e6)
    assert row["arrays_mb"] > row["batch_mb"], "or nothing was measured"
    assert row["arrays_mb"] <= cases_device.LIMIT_MB
    assert math.isnan(row["resident_mb"]) or row["batch_mb"] < row["resident_mb"] <= cases_device.LIMIT_MB
