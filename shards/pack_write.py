"""What `geopose pack` writes: one shard from a stream of results, and the manifest when all shards are there."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from geopose_dist import files
from geopose_dist.data import manifest
from shards import tars
from shards.encode import Damaged, Job, Sample, encode
from shards.pack_place import Place
from shards.pack_plan import PlannedShard
from shards.pack_state import Record, Stored, keep
from shards.tallies import Tally, statistics


@dataclass(frozen=True)
class ShardJob:
    """A whole shard for one task of a cluster: where it goes, what goes into it, and its tiles' jobs."""

    place: Place
    shard: PlannedShard
    fingerprint: str
    jobs: tuple[Job, ...]


def pack_shard(job: ShardJob) -> list[Damaged]:
    """Encode and write one shard, one tile at a time; the tiles that cannot be packed."""
    return write_shard(job.place, job.shard, job.fingerprint, map(encode, job.jobs))


class _Incomplete(Exception):
    """A tile of the shard being written cannot be packed."""


def write_shard(
    place: Place, shard: PlannedShard, fingerprint: str, results: Iterator[Sample | Damaged]
) -> list[Damaged]:
    """Write one shard from the next results and remember it; or name the tiles that cannot be packed."""
    damaged: list[Damaged] = []
    cities: list[str] = []
    tallies: dict[str, Tally] = {}

    def members() -> Iterator[tuple[str, dict[str, bytes]]]:
        for _ in shard.tiles:
            result = next(results)
            if isinstance(result, Damaged):
                damaged.append(result)
            elif not damaged:
                cities.append(result.city)
                tallies[result.city] = tallies.get(result.city, Tally()) + result.tally
                yield result.key, result.members

    with place.building(shard.name) as path:
        with contextlib.suppress(_Incomplete), files.atomic_write(path) as file:
            tars.write_samples(file, members())
            if damaged:
                raise _Incomplete  # the temporary file goes; the rest of the tiles have been looked at
        if damaged:
            return damaged
        rows = [
            (span.key, city, span.offset, span.length, span.crc32)
            for span, city in zip(tars.spans(path), cities, strict=True)
        ]
        record = Record(fingerprint, path.stat().st_size, tars.sha256_of(path), rows, tallies)
        place.take(shard.name, path, rows)
    keep(place, shard.name, record)
    return []


def write_manifest(
    place: Place, about: dict[str, Any], shards: list[PlannedShard], records: list[Stored]
) -> None:
    """Write `index.npy`, then `manifest.json`, of finished shards, given in the manifest's order."""
    cities = sorted({city for record in records for city in record.cities})
    index = np.empty(sum(len(record.table) for record in records), manifest.INDEX_DTYPE)
    first = 0
    for number, record in enumerate(records):
        rows = index[first : first + len(record.table)]
        rows[:] = record.table
        rows["shard"] = number
        if record.cities:
            rows["city"] = np.array([cities.index(city) for city in record.cities])[record.table["city"]]
        first += len(rows)
    summary = statistics(
        (shard.split, city, tally)
        for shard, record in zip(shards, records, strict=True)
        for city, tally in record.tallies.items()
    )
    listed = [
        manifest.Shard(shard.name, shard.split, len(record.table), record.bytes, record.sha256)
        for shard, record in zip(shards, records, strict=True)
    ]
    facts = manifest.Manifest(listed, cities, summary, about)
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    place.write(manifest.INDEX_NAME, buffer.getvalue())
    place.write(manifest.MANIFEST_NAME, facts.to_json())  # last: without it the packing is unfinished
