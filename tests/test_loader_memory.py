"""What a loader worker holds: one thread, flat memory, and nothing that grows with the data set."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tars import write_shards

from geopose_dist.augment import Augmenter, AugmentRecipe
from geopose_dist.bench.loader_baselines import write_members
from geopose_dist.data import codecs, manifest
from geopose_dist.data.loader import TrainLoader, train_loader
from geopose_dist.data.manifest import open_split
from geopose_dist.data.reader import Reader
from geopose_dist.data.recipe import DataRecipe


def loader_of(folder: Path, stop: int, batch: int = 10, crop: int | None = None) -> TrainLoader:
    recipe = DataRecipe(shards=str(folder), global_batch=batch, micro_batch=batch, workers=1, crop_px=crop)
    augmenter = Augmenter(AugmentRecipe("strong"), crop)
    return train_loader(open_split(folder, "train"), recipe, 0, 0, 1, 0, stop, augmenter)


def status(loader: TrainLoader, field: str) -> int:
    """A number from the status of the only worker."""
    text = Path(f"/proc/{loader.worker_pids()[0]}/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", text)[1])


@pytest.mark.slow
def test_a_worker_decodes_every_codec_on_one_thread(tmp_path: Path):
    """Libraries that decode, warp or sum on threads of their own would take the cores of other workers."""
    write_shards(tmp_path / "plain", [2], (256, 256))
    reader = Reader(open_split(tmp_path / "plain", "train"))
    views = [reader.view(index) for index in range(2)]
    threads = {}
    pairs = [(rgb, "lerc") for rgb in codecs.names(codecs.RGB_CODECS)]
    pairs += [("qoi", agl) for agl in codecs.names(codecs.AGL_CODECS) if agl != "lerc"]
    for rgb, agl in pairs:
        folder = tmp_path / f"{rgb}-{agl}"
        write_members(folder, views, rgb, agl)
        loader = loader_of(folder, 6, batch=2)
        steps = iter(loader)
        for _ in range(3):
            next(steps)
        threads[rgb, agl] = status(loader, "Threads")
        steps.close()
    # The interpreter's own, torch's watcher of the queue, and the feeder of the queue.
    assert max(threads.values()) <= 3, threads
    assert len(set(threads.values())) == 1, threads


@pytest.mark.slow
def test_memory_of_a_worker_does_not_grow_with_the_data_set(tmp_path: Path):
    """10^4 and 10^7 samples: the index is mapped, not read, and is never sent to a worker."""
    write_shards(tmp_path / "small", [20], (24, 24))
    few = manifest.open_split(tmp_path / "small", "train")
    sizes = {}
    for rows in (10**4, 10**7):
        folder = tmp_path / str(rows)
        folder.mkdir()
        (folder / "train-000000.tar").symlink_to(tmp_path / "small" / "train-000000.tar")
        np.save(folder / "index.npy", np.tile(np.asarray(few.index), rows // 20))
        facts = json.loads((tmp_path / "small" / "manifest.json").read_text())
        facts["shards"][0]["samples"] = rows
        (folder / "manifest.json").write_text(json.dumps(facts))
        loader = loader_of(folder, 30)
        steps = iter(loader)
        for _ in range(20):
            next(steps)
        sizes[rows] = status(loader, "RssAnon")
        steps.close()
    assert abs(sizes[10**7] - sizes[10**4]) < 4000, sizes  # kB; the index of 10^7 samples has 220,000


def growth_kb(folder: Path, samples: int) -> tuple[int, int]:
    """Private memory of a worker after a tenth of the samples, and what it grew by until the last."""
    loader = loader_of(folder, samples // 10)
    sizes = [
        status(loader, "RssAnon")
        for step, _ in enumerate(loader)
        if step in (samples // 100, samples // 10 - 5)
    ]
    return sizes[0], sizes[1] - sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["png", "gpz"])
def test_memory_of_a_worker_is_flat(tmp_path: Path, codec: str):
    write_shards(tmp_path / "plain", [20], (48, 48))
    reader = Reader(open_split(tmp_path / "plain", "train"))
    agl = {"gpz": "gpz"}.get(codec, "lerc")
    write_members(tmp_path / codec, [reader.view(index) for index in range(20)], codec, agl)
    _, grown = growth_kb(tmp_path / codec, 2000)
    assert grown < 3000


@pytest.mark.soak
@pytest.mark.parametrize(
    ("rgb", "agl"), [("qoi", "lerc"), ("gpz", "gpz"), ("tiled", "tif"), ("htj2k", "htj2k")]
)
def test_memory_of_a_worker_is_flat_over_ten_thousand_samples(tmp_path: Path, rgb: str, agl: str):
    """Augmented tiles of 256 px, of which each visit reads other windows."""
    write_shards(tmp_path / "plain", [20], (256, 256))
    reader = Reader(open_split(tmp_path / "plain", "train"))
    write_members(tmp_path / rgb, [reader.view(index) for index in range(20)], rgb, agl)
    size, grown = growth_kb(tmp_path / rgb, 10_000)
    print(f"{rgb}+{agl}: {size / 1024:.0f} MiB after 1,000 samples, {grown / 1024:+.1f} MiB over 9,000 more")
    assert grown < 4000
