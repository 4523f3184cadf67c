"""Samples per second out of a store: one read after another beside several under way, and beside the cache.

Without `--shards`, a web server on loopback answers after 30 ms, as a store in the same region does, with samples of
2.5 MB; with `--shards FOLDER`, with those; with `--shards URL`, that store is read (its first 64 samples), its
credentials from the environment. Only reading and checking is measured, no decoding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from geopose_dist.bench import loopback
from geopose_dist.bench.harness import Row, check, timing
from geopose_dist.data import manifest, urls
from geopose_dist.data.catalogue import open_shards, read_manifest
from geopose_dist.data.reader import Reader
from geopose_dist.data.source import crc32
from geopose_dist.data.store_recipe import StoreRecipe

SAMPLES, SAMPLE_BYTES, LATENCY_MS = 32, 2_500_000, 30.0
QUICK = {"SAMPLES": 12, "SAMPLE_BYTES": 4096}
MOST_SAMPLES = 64
MICRO_BATCH = 16
IN_FLIGHT = (4, 8, 16)
ALONE = "one read after another"


def store(repeats: int, shards: str | None = None) -> list[Row]:
    """Reads of whole samples by their number under way, in turn, so that a busy minute hits all alike."""
    with tempfile.TemporaryDirectory() as folder, _place(Path(folder), shards) as place:
        base = StoreRecipe(cache_dir=f"{folder}/cache", cache_gb=0)
        ways = {ALONE: dataclasses.replace(base, in_flight=1)}
        ways |= {f"{n} under way": dataclasses.replace(base, in_flight=n) for n in IN_FLIGHT}
        ways |= {"from the cache": dataclasses.replace(base, cache_gb=1e3)}
        split = next(iter(read_manifest(place, base).splits()))
        readers = {name: Reader(open_shards(place, split, recipe)) for name, recipe in ways.items()}
        for reader in readers.values():
            _read_all(reader)  # connections, threads and the cache are there when the clock starts
        check_equal(readers)
        wall: dict[str, list[float]] = {name: [] for name in ways}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, reader in readers.items():
                began, cpu_began = time.perf_counter(), time.process_time()
                read = _read_all(reader)
                wall[name].append((time.perf_counter() - began) / read)
                cpu[name].append((time.process_time() - cpu_began) / read)
        return [_row(name, wall, cpu, readers[name]) for name in ways]


def check_equal(readers: dict[str, Reader]) -> None:
    """Every way gives the bytes that reading one after another gives, and those are what the index says."""
    first = readers[ALONE]
    for name, reader in readers.items():
        indices = range(min(len(reader), MICRO_BATCH))
        reader.prefetch(indices)
        for index in indices:
            data = reader.raw(index)
            same = data == first.raw(index) and crc32(data) == int(first.shard_set.index["crc32"][index])
            check(same, f"{name}: sample {index} has other bytes")


def _row(name: str, wall: dict[str, list[float]], cpu: dict[str, list[float]], reader: Reader) -> Row:
    taken = timing(wall[name])
    size = int(np.mean(reader.shard_set.index["length"][:MOST_SAMPLES]))
    row: Row = {
        "name": name,
        "tiles_per_s": 1 / taken.median_s,
        "mb_per_s": size / 1e6 / taken.median_s,
        "cpu_ms": 1e3 * timing(cpu[name]).median_s,
        "spread": taken.spread,
    }
    if name != ALONE:
        row |= {"baseline": ALONE, "speedup": timing(wall[ALONE]).median_s / taken.median_s}
    return row


def _read_all(reader: Reader) -> int:
    """Read micro-batch by micro-batch, as a loader worker does; the number of samples."""
    count = min(len(reader), MOST_SAMPLES)
    for first in range(0, count, MICRO_BATCH):
        indices = range(first, min(first + MICRO_BATCH, count))
        reader.prefetch(indices)
        for index in indices:
            reader.raw(index)
    return count


@contextlib.contextmanager
def _place(work: Path, shards: str | None) -> Iterator[str]:
    """The URL to read."""
    if shards is not None and urls.is_url(shards):
        yield shards
        return
    folder = work / "shards"
    if shards is None:
        write_noise(folder)
    else:
        folder.symlink_to(Path(shards).resolve(), target_is_directory=True)
    with loopback.serving(work, LATENCY_MS) as address:
        yield f"{address}/shards"


def write_noise(folder: Path) -> None:
    """A shard whose samples are noise: enough for what only reads and checks."""
    folder.mkdir()
    data = np.random.default_rng(0).integers(0, 256, SAMPLES * SAMPLE_BYTES, np.uint8).tobytes()
    (folder / "train-000000.tar").write_bytes(data)
    rows = [
        (0, 0, at, SAMPLE_BYTES, crc32(data[at : at + SAMPLE_BYTES]))
        for at in range(0, len(data), SAMPLE_BYTES)
    ]
    digest = hashlib.sha256(data).hexdigest()
    shard = manifest.Shard("train-000000.tar", "train", SAMPLES, len(data), digest)
    manifest.write(folder, manifest.Manifest([shard], ["ARG"], {}, {}), np.array(rows, manifest.INDEX_DTYPE))


CASES = {"store": store}
