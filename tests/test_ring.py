"""Shared memory that is used again: never while anybody still holds a batch in it, and never forgotten."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tars import write_shards

from geopose_dist.data import ring as rings
from geopose_dist.data import workers as worker_processes
from geopose_dist.data.batch import Batch, pack, pixel_bytes, pixels_in
from geopose_dist.data.loader import TrainLoader, train_loader
from geopose_dist.data.manifest import open_split
from geopose_dist.data.recipe import DataRecipe
from geopose_dist.data.ring import Ring
from geopose_dist.data.sample import View
from geopose_dist.errors import UserError

SIZE = (8, 12)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [10, 10], SIZE)
    return folder


def loader_of(folder: Path, workers: int, stop: int, prefetch: int = 2) -> TrainLoader:
    recipe = DataRecipe(shards=str(folder), global_batch=4, micro_batch=4, workers=workers, prefetch=prefetch)
    return train_loader(open_split(folder, "train"), recipe, 3, 0, 1, 0, stop)


def contents(batch: Batch) -> tuple[object, ...]:
    return batch.keys, batch.rgb.numpy().tobytes(), batch.agl_cm.numpy().tobytes(), batch.city.tolist()


def view(seed: int, size: tuple[int, int] = SIZE) -> View:
    rng = np.random.Generator(np.random.Philox(seed))
    rgb = rng.integers(0, 256, (*size, 3), np.uint8)
    return View(f"K{seed}", "ARG", rgb, rng.random(size, np.float32) * 90, None, None, None)


def sent(ring: Ring, slot: int, batch: Batch) -> Batch:
    """What the training process makes of a batch that a worker sends."""
    call, arguments = ring.parked(slot, batch).__reduce__()
    return call(*arguments)


def test_kept_batches_stay_as_they_came_while_their_loader_goes_on(shards: Path):
    """Some are kept for ever, some for a few steps, some only as a slice or as an array."""
    wanted = [contents(step[0]) for step in loader_of(shards, 0, 40)]
    loader = loader_of(shards, 2, 40)
    kept: dict[int, Batch] = {}
    parts: dict[int, torch.Tensor] = {}
    arrays: dict[int, np.ndarray] = {}
    own_memory = 0
    for number, step in enumerate(loader):
        assert contents(step[0]) == wanted[number]
        own_memory += step[0].rgb.is_shared()  # ours is a file that torch knows nothing of
        if number % 8 == 0:
            kept[number] = step[0]
        elif number % 8 == 1:
            parts[number] = step[0].agl_cm[1, 0, 2:5]
        elif number % 8 == 2:
            arrays[number] = step[0].rgb.numpy()[2]
    assert own_memory > 0, "more were kept than there are slots, so some batches must bring their own memory"
    for number, batch in kept.items():
        assert contents(batch) == wanted[number]
    whole = [step[0] for step in loader_of(shards, 0, 40)]
    for number, part in parts.items():
        assert torch.equal(part, whole[number].agl_cm[1, 0, 2:5])
    for number, array in arrays.items():
        np.testing.assert_array_equal(array, whole[number].rgb.numpy()[2])


def test_who_keeps_nothing_uses_the_same_memory_again(shards: Path):
    loader = loader_of(shards, 1, 30)
    addresses = set()
    for step in loader:
        assert not step[0].rgb.is_shared()
        addresses.add(step[0].rgb.data_ptr())
    assert len(addresses) <= 5  # two prepared, one on its way, this step's and the last's
    again = [contents(step[0]) for step in loader]  # a second pass has memory and workers of its own
    assert again == [contents(step[0]) for step in loader_of(shards, 0, 30)]


def test_a_slot_is_free_when_the_last_tensor_over_it_is_gone():
    ring = Ring(2, pixel_bytes(2, *SIZE))
    slot = ring.lend()
    batch = sent(ring, slot, pack([view(1), view(2)], ["ARG"], [0, 1], [0, 0], room=ring.room(slot)))
    np.testing.assert_array_equal(batch.rgb[1].permute(1, 2, 0).numpy(), view(2).rgb)
    assert ring.free_slots() == 1
    row = batch.rgb[0, 0]
    del batch
    assert ring.free_slots() == 1
    array = row.numpy()
    del row
    assert ring.free_slots() == 1
    del array
    assert ring.free_slots() == 2
    assert ring.lend() == slot  # the one used last
    assert ring.lend() is not None
    assert ring.lend() is None


def test_a_batch_too_large_for_its_slot_brings_its_own_memory():
    ring = Ring(1, 100)
    slot = ring.lend()
    large = [view(1, (64, 64)), view(2, (64, 64))]
    batch = sent(ring, slot, pack(large, ["ARG"], [0, 1], [0, 0], room=ring.room(slot)))
    assert ring.free_slots() == 1
    np.testing.assert_array_equal(batch.rgb[1].permute(1, 2, 0).numpy(), large[1].rgb)


def test_slots_come_back_from_any_thread():
    ring = Ring(3, 4096)

    def work() -> None:
        for _ in range(300):
            slot = ring.lend()
            if slot is not None:
                rgb, _ = ring.batch_at(slot, (1, 3, 4, 4))
                rgb.add_(1)
                del rgb, _

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ring.lend() for _ in range(3)) == [0, 1, 2]


def test_pixels_lie_where_both_sides_look():
    for count, rows, columns in ((1, 1, 1), (3, 5, 7), (2, 8, 8)):
        memory = torch.arange(pixel_bytes(count, rows, columns), dtype=torch.int64).to(torch.uint8)
        rgb, agl_cm = pixels_in(memory, count, rows, columns)
        assert rgb.shape == (count, 3, rows, columns)
        assert agl_cm.shape == (count, 1, rows, columns)
        assert agl_cm.data_ptr() % 2 == 0
        assert agl_cm.data_ptr() >= rgb.data_ptr() + rgb.numel()
        assert agl_cm.data_ptr() + 2 * agl_cm.numel() == memory.data_ptr() + memory.numel()


def test_a_ring_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rings, "SHARED_MEMORY", str(tmp_path))
    descriptors = len(os.listdir("/proc/self/fd"))
    ring = Ring(3, 10_000)
    assert list(tmp_path.iterdir()) == []
    del ring
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_small_tmpfs_is_told_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: Path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        for module in (rings, worker_processes):
            monkeypatch.setattr(module, "SHARED_MEMORY", str(tmp_path))
        words = (
            r"has 0 MiB free, but 1 rank\(s\) x 43 micro-batches of 0\.0 MiB need 0 MiB; give the container"
        )
        with pytest.raises(UserError, match=words):
            loader_of(shards, 1, 2, prefetch=40)
        next(iter(loader_of(shards, 1, 2)))
        monkeypatch.setattr(worker_processes, "check_shared_memory", lambda *_: None)  # taken since then
        with pytest.raises(UserError, match=r"cannot be kept there \(No space left on device\)"):
            worker_processes.open_ring(64, 4096)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.gpu
def test_on_a_gpu_batches_arrive_pinned_and_their_slots_are_free_at_once(shards: Path):
    loader = loader_of(shards, 1, 12)
    wanted = [contents(step[0]) for step in loader_of(shards, 0, 12)]
    kept = []
    for number, step in enumerate(loader):
        assert step[0].rgb.is_pinned()
        assert step[0].agl_cm.is_pinned()
        kept.append(step[0])
        assert contents(step[0]) == wanted[number]
        if number == 6:  # seven are kept, more than there are slots
            assert loader._samples.ring.free_slots() >= 1
    assert [contents(batch) for batch in kept] == wanted
