"""The loader: one order whatever the ranks, workers and cuts; damage and deaths told in one sentence."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tars import sample_spans, tile, write_shards

from geopose_dist.augment import Augmenter, AugmentRecipe
from geopose_dist.data import batch as batches
from geopose_dist.data import loader as loaders
from geopose_dist.data import workers as worker_processes
from geopose_dist.data.loader import evaluation_indices, evaluation_loader, train_loader, with_later
from geopose_dist.data.manifest import open_split
from geopose_dist.data.plan import Plan, ends_epoch
from geopose_dist.data.reader import Reader
from geopose_dist.data.recipe import DataRecipe
from geopose_dist.data.sample import View
from geopose_dist.data.samples import generator_for
from geopose_dist.errors import FinishedWithFailures, UserError

SIZE = (8, 12)
GLOBAL = 12
STEPS = 6  # 72 positions of 20 samples: three visits and a bit
RESUMED_AT = (0, 1, 3, 4, 5)


def stamp(view: View, rng: np.random.Generator) -> View:
    """An augmentation that shows its draws."""
    return dataclasses.replace(view, rgb=rng.integers(0, 256, view.rgb.shape, np.uint8))


def fail_on_third(view: View, rng: np.random.Generator) -> View:
    if view.key.endswith("_00003"):
        raise ZeroDivisionError("a bug")
    return view


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [7, 7, 6], SIZE)
    return folder


def recipe_of(folder: Path, **fields: object) -> DataRecipe:
    usual = {"shards": str(folder), "global_batch": GLOBAL, "micro_batch": 3, "workers": 0}
    return DataRecipe(**(usual | fields))


def stream(folder: Path, world: int, recipe: DataRecipe, start: int, stop: int, order: str = "full") -> dict:
    """What all ranks together read: position -> (visit, key, draws)."""
    shard_set = open_split(folder, "train")
    read = {}
    for rank in range(world):
        loader = train_loader(shard_set, recipe, 5, rank, world, start, stop, stamp)
        steps = list(loader)
        assert len(steps) == stop - start
        for step, micro_batches in enumerate(steps, start):
            for batch in micro_batches:
                assert len(batch) == recipe.micro_batch
                for i, position in enumerate(batch.positions):
                    assert position // GLOBAL == step
                    assert position not in read
                    read[position] = (batch.visits[i], batch.keys[i], batch.rgb[i].numpy().tobytes())
    return read


@pytest.fixture(scope="module")
def reference(shards: Path) -> dict:
    """The whole stream, straight from plan and reader."""
    shard_set = open_split(shards, "train")
    reader, plan = Reader(shard_set), Plan.of(shard_set, seed=5, global_batch=GLOBAL, micro_batch=3)
    read = {}
    for position in range(STEPS * GLOBAL):
        slot = plan.sample_at(position)
        view = stamp(reader.view(slot.index), generator_for(5, slot.visit, slot.index))
        read[position] = (slot.visit, view.key, view.rgb.transpose(2, 0, 1).tobytes())
    return read


# (ranks, loader workers, micro-batch): accumulation is what is left, GLOBAL / micro / ranks, even or not.
CUTS = [
    (1, 0, 12),
    pytest.param(1, 1, 3, marks=pytest.mark.slow),
    pytest.param(1, 2, 2, marks=pytest.mark.slow),
    pytest.param(1, 2, 4, marks=pytest.mark.slow),
    (2, 0, 6),
    pytest.param(2, 1, 2, marks=pytest.mark.slow),
    pytest.param(2, 2, 3, marks=pytest.mark.slow),  # quick: the next test
    (3, 0, 4),
    (3, 0, 1),
    (5, 0, 2),
    pytest.param(4, 1, 6, marks=pytest.mark.slow),
    (8, 0, 12),
]


@pytest.mark.parametrize(("world", "workers", "micro"), CUTS)
def test_every_cut_reads_the_same_global_batches_from_every_resume_point(
    shards: Path, reference: dict, world: int, workers: int, micro: int
):
    recipe = recipe_of(shards, workers=workers, micro_batch=micro)
    for start in RESUMED_AT:
        stop = STEPS if start in (0, 4) else start + 1
        expected = {p: reference[p] for p in range(start * GLOBAL, stop * GLOBAL)}
        assert stream(shards, world, recipe, start, stop) == expected


@pytest.mark.parametrize(("world", "workers", "micro"), [(1, 0, 12), (2, 2, 3), (3, 0, 4), (8, 0, 12)])
def test_every_cut_augments_alike(shards: Path, world: int, workers: int, micro: int):
    """The real augmentation: what is drawn, and which window of a tile is decoded for it, is the position's own."""
    augmenter = Augmenter(AugmentRecipe("strong"), 8)
    shard_set = open_split(shards, "train")
    reader, plan = Reader(shard_set), Plan.of(shard_set, seed=5, global_batch=GLOBAL, micro_batch=micro)
    recipe = recipe_of(shards, workers=workers, micro_batch=micro, crop_px=8)
    seen = 0
    for start, stop in ((0, 1), (2, 3), (5, 6)):
        for rank in range(world):
            for batch in itertools.chain(
                *train_loader(shard_set, recipe, 5, rank, world, start, stop, augmenter)
            ):
                for i, position in enumerate(batch.positions):
                    slot = plan.sample_at(position)
                    view = augmenter(reader.view(slot.index), generator_for(5, slot.visit, slot.index))
                    wanted = batches.pack([view], ["ARG", "JAX", "OMA"], [position], [slot.visit])
                    assert (batch.keys[i], batch.visits[i]) == (view.key, slot.visit)
                    for name in ("rgb", "agl_cm", "scale_px_per_m", "direction", "gsd_m"):
                        assert torch.equal(getattr(batch, name)[i], getattr(wanted, name)[0]), (
                            position,
                            name,
                        )
                    seen += 1
    assert seen == 3 * GLOBAL


def test_each_key_comes_once_per_visit_with_new_draws(reference: dict):
    for visit in range(3):
        keys = Counter(key for v, key, _ in reference.values() if v == visit)
        assert len(keys) == 20
        assert set(keys.values()) == {1}
    assert len({draws for _, _, draws in reference.values()}) == len(reference)
    assert [step for step in range(STEPS) if ends_epoch(step, 20, GLOBAL)] == [1, 3, 4]


def test_a_batch_holds_what_the_shards_hold(shards: Path):
    steps = train_loader(open_split(shards, "train"), recipe_of(shards), 0, 0, 1, 0, 2)
    for batch in itertools.chain.from_iterable(steps):
        assert (batch.rgb.dtype, batch.rgb.shape) == (torch.uint8, (3, 3, *SIZE))
        assert batch.rgb.is_contiguous(memory_format=torch.channels_last)
        assert (batch.agl_cm.dtype, batch.agl_cm.shape) == (torch.uint16, (3, 1, *SIZE))
        for i, key in enumerate(batch.keys):
            rgb, agl_cm, facts = tile(int(key.rsplit("_", 1)[1]), SIZE)
            assert np.array_equal(batch.rgb[i].permute(1, 2, 0).numpy(), rgb)
            assert np.array_equal(batch.agl_cm[i, 0].numpy(), agl_cm)
            assert batch.gsd_m[i] == np.float32(facts.gsd_m)
            assert batch.scale_px_per_m[i] == np.float32(facts.scale_px_per_m)
            direction = np.float32([np.sin(facts.angle_rad), np.cos(facts.angle_rad)])
            assert np.allclose(batch.direction[i].numpy(), direction, atol=1e-7)
            assert ["ARG", "JAX", "OMA"][int(batch.city[i])] == facts.city
        moved = loaders.to_device(batch, torch.device("cpu"))
        assert torch.equal(moved.rgb, batch.rgb)
        assert moved.keys == batch.keys


def test_heights_become_centimetres_with_both_markers():
    agl_m = np.array([[np.nan, 0, -3, 0.014], [0.016, 655.33, 9999, 12.345]], np.float32)
    inside = np.ones((2, 4), bool)
    inside[1, 3] = False
    view = View("K", "ARG", np.zeros((2, 4, 3), np.uint8), agl_m, None, None, None, inside)
    out = np.empty((2, 4), np.uint16)
    batches.write_cm(view, out)
    assert out.tolist() == [[65535, 0, 0, 1], [2, 65533, 65533, 65534]]
    batches.write_cm(dataclasses.replace(view, agl_m=None), out)
    assert out.tolist() == [[65535] * 4, [65535, 65535, 65535, 65534]]
    centimetres = np.arange(65534, dtype=np.uint16).reshape(1, -1)
    every = dataclasses.replace(view, agl_m=centimetres / np.float32(100), inside=None)
    out = np.empty_like(centimetres)
    batches.write_cm(every, out)
    assert np.array_equal(out, centimetres)
    packed = batches.pack([view], ["ARG"], [0], [0])
    assert packed.gsd_m.isnan().all()
    assert packed.scale_px_per_m.isnan().all()
    assert packed.direction.isnan().all()


def damage(folder: Path, sample: int) -> str:
    """Flip a pixel's byte of a sample of the first shard; returns the key."""
    path = folder / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[sample_spans(path)[sample][1] - 400] ^= 255
    path.write_bytes(data)
    return Reader(open_split(folder, "train")).key(sample)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_stops_the_run_with_one_sentence(tmp_path: Path, workers: int):
    write_shards(tmp_path, [7, 5], SIZE)
    key = damage(tmp_path, 2)
    with pytest.raises(UserError) as caught:
        stream(tmp_path, 1, recipe_of(tmp_path, workers=workers), 0, 2)
    assert re.search(rf"train-000000\.tar, offset \d+, {key}: crc32 is .*position \d+", str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_substitution_changes_exactly_the_logged_positions(
    tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
):
    write_shards(tmp_path, [7, 7, 6], SIZE)
    recipe = recipe_of(tmp_path, on_damage="substitute", workers=workers, damage_limit=20)
    whole = stream(tmp_path, 1, recipe, 0, STEPS)
    bad = {damage(tmp_path, 2), damage(tmp_path, 4)}
    loader = train_loader(open_split(tmp_path, "train"), recipe, 5, 0, 1, 0, STEPS, stamp)
    steps = list(loader)
    now = stream(tmp_path, 1, recipe, 0, STEPS)
    assert stream(tmp_path, 3, recipe, 0, STEPS) == now
    changed = [p for p in whole if now[p] != whole[p]]
    assert changed == [p for p, (_, key, _) in sorted(whole.items()) if key in bad]
    assert [s.position for s in loader.substitutions] == changed
    assert [s for step in steps for b in step for s in b.substitutions] == loader.substitutions
    for one in loader.substitutions:
        assert now[one.position][1] == one.replaced_by
        assert one.key == whole[one.position][1]
        assert "crc32" in one.reason
    assert len({draws for _, _, draws in now.values()}) == len(now)  # draws of a replacement are its own
    assert f"position {changed[0]}:" in capsys.readouterr().err
    resumed = stream(tmp_path, 2, recipe, 0, 2) | stream(tmp_path, 2, recipe, 2, STEPS)
    assert resumed == now


def test_a_split_that_is_gone_ends_substitution(tmp_path: Path):
    write_shards(tmp_path, [4], SIZE)
    (tmp_path / "train-000000.tar").unlink()
    recipe = recipe_of(tmp_path, on_damage="substitute")
    with pytest.raises(UserError, match=r"shard is missing.*16 samples drawn to replace it cannot be read"):
        stream(tmp_path, 1, recipe, 0, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_in_a_worker_names_the_sample(shards: Path, workers: int, capsys: pytest.CaptureFixture[str]):
    recipe = recipe_of(shards, workers=workers)
    with pytest.raises(FinishedWithFailures) as caught:
        list(train_loader(open_split(shards, "train"), recipe, 0, 0, 1, 0, 9, fail_on_third))
    said = str(caught.value)
    assert re.search(r"loading JAX_00003|loading ARG_00003|loading OMA_00003", said)
    assert re.search(r"train-000000\.tar, offset \d+\), position \d+ failed: ZeroDivisionError: a bug$", said)
    assert "fail_on_third" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_worker_is_told_and_nothing_hangs(shards: Path):
    loader = train_loader(open_split(shards, "train"), recipe_of(shards, workers=2), 0, 0, 1, 0, 10**6)
    steps = iter(loader)
    next(steps)
    workers = loader._iterator._workers
    os.kill(workers[0].pid, signal.SIGKILL)
    words = (
        r"a loader worker died \(killed by SIGKILL\) while it made positions (\d+) to (\d+) of the stream: "
        r"(\w+ \(\S+train-00000\d\.tar, offset \d+\)(, )?){3}; nothing .*run the same command"
    )
    with pytest.raises(FinishedWithFailures, match=words) as caught:
        list(steps)
    said = re.search(words, str(caught.value))
    first, last = int(said[1]), int(said[2])
    assert (first % 3, last - first) == (0, 2)
    plan = loaders.plan_of(open_split(shards, "train"), recipe_of(shards), 0)
    reader = Reader(open_split(shards, "train"))
    for position in range(first, last + 1):
        assert f"{reader.key(plan.sample_at(position).index)} (" in str(caught.value)
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_workers_leave_signals_to_the_parent(shards: Path):
    """A batch system sends SIGTERM to every process of a job; the step under way needs its workers."""
    from multiprocessing import forkserver

    loader = train_loader(open_split(shards, "train"), recipe_of(shards, workers=1), 0, 0, 1, 0, 30)
    steps = iter(loader)
    next(steps)
    server = forkserver._forkserver._forkserver_pid
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        for pid in (server, loader._iterator._workers[0].pid):
            os.kill(pid, number)
    assert sum(1 for _ in steps) == 29
    began = time.monotonic()
    second = iter(train_loader(open_split(shards, "train"), recipe_of(shards, workers=1), 0, 0, 1, 0, 30))
    next(second)
    second.close()  # ends its worker, though that ignores SIGTERM
    assert time.monotonic() - began < 20


def test_too_little_shared_memory_is_told_before_the_start(shards: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=16, f_frsize=1 << 20))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    recipe = recipe_of(shards, workers=2, crop_px=1024, micro_batch=4)
    words = r"/dev/shm has 16 MiB free.*4 rank.s. x 11 micro-batches of 20\.0 MiB need 880 MiB.*--shm-size"
    with pytest.raises(UserError, match=words):
        train_loader(open_split(shards, "train"), recipe, 0, 0, 1, 0, 1)
    train_loader(open_split(shards, "train"), recipe_of(shards, workers=2), 0, 0, 1, 0, 1)  # small tiles fit


def test_worker_counts_follow_cores_and_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker_processes.pool, "usable_cores", lambda: 64)
    assert worker_processes.workers_for(DataRecipe(workers=3)) == 3
    for ranks, workers in ((1, 8), (8, 7), (64, 0), (16, 3)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert worker_processes.workers_for(DataRecipe()) == workers


def test_tiles_of_different_sizes_are_named(tmp_path: Path):
    write_shards(tmp_path, [3], SIZE)
    views = [View(f"K{n}", "ARG", np.zeros((n, 5, 3), np.uint8), None, None, None, None) for n in (4, 6)]
    with pytest.raises(
        UserError, match=r"K6 has 6x5 px, but K4 of the same batch has 4x5; set data\.crop_px"
    ):
        batches.pack(views, ["ARG"], [0, 1], [0, 0])


@pytest.mark.parametrize(("samples", "world"), [(20, 1), (20, 3), (2, 4), (7, 7)])
def test_evaluation_reads_everything_once(tmp_path: Path, samples: int, world: int):
    keys = write_shards(tmp_path, [samples], SIZE)
    shares = [evaluation_indices(samples, rank, world) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(samples))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    shard_set = open_split(tmp_path, "train")
    recipe = recipe_of(tmp_path)
    read = [
        key
        for r in range(world)
        for b in evaluation_loader(shard_set, recipe, r, world, batch_size=3)
        for key in b.keys
    ]
    assert sorted(read) == sorted(keys)


def test_a_loader_leaves_torchs_random_numbers_alone(shards: Path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(train_loader(open_split(shards, "train"), recipe_of(shards), 0, 0, 1, 0, 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("turn", [0, 1, 3])
def test_each_batch_is_told_the_next_of_its_worker(turn: int):
    pairs = list(with_later([[n] for n in range(5)], turn))
    assert [batch for batch, _ in pairs] == [[n] for n in range(5)]
    assert [later for _, later in pairs] == [[n + turn] if turn and n + turn < 5 else [] for n in range(5)]
