"""What a folder of shards says of itself: `manifest.json` for small facts, `index.npy` by sample.

The folder is flat: `train-000000.tar`, `val-000000.tar`, `test-000000.tar`, ..., `manifest.json`, `index.npy`.
The index is a memory-mapped table with one row per sample, sorted by split, then shard, then offset, so a
split is a contiguous range of rows. One range read of (shard, offset, length) is a whole sample, and its
crc32 is checked at every read: a tar has no checksum of its own data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from geopose_dist import files
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.errors import UserError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"

INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # position in Manifest.shards
        ("city", "<u2"),  # position in Manifest.cities
        ("offset", "<u8"),  # of the sample's first tar header in the shard
        ("length", "<u4"),  # bytes from that header to the end of the last member's padding
        ("crc32", "<u4"),  # of these bytes
    ]
)
Index = npt.NDArray[np.void]


@dataclass(frozen=True)
class Shard:
    """One tar: its name, split, number of samples, size in bytes and SHA-256 in hex."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The small facts of a folder of shards.

    Attributes:
        shards: the tars, sorted by split and name.
        cities: names that the index's `city` column numbers.
        statistics: by split, then city: tiles, mean and standard deviation of known heights (m), share of
            unknown pixels, mean scale (px/m); what head initialisation and reports start from.
        recipe: how the shards were packed (reduction, codecs, seed, ...).
        schema: version of this form.
    """

    shards: list[Shard]
    cities: list[str]
    statistics: dict[str, Any]
    recipe: dict[str, Any]
    schema: int = SCHEMA_VERSION

    def splits(self) -> dict[str, int]:
        """Number of samples by split."""
        counts: dict[str, int] = {}
        for shard in self.shards:
            counts[shard.split] = counts.get(shard.split, 0) + shard.samples
        return counts

    def to_json(self) -> bytes:
        """Sorted, indented JSON: the same shards give the same bytes."""
        facts = dict(
            dataclasses.asdict(self), samples=sum(s.samples for s in self.shards), splits=self.splits()
        )
        return (json.dumps(facts, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


@dataclass(frozen=True)
class ShardSet:
    """One split of an opened folder of shards.

    Attributes:
        root: the folder, or the URL of one.
        manifest: see `Manifest`.
        index: rows of this split only, memory-mapped.
        split: its name.
        folder: the local folder with manifest and index; for a URL a part of the cache.
        store: how a URL is reached.
    """

    root: str
    manifest: Manifest
    index: Index = field(repr=False)
    split: str
    folder: str = ""
    store: StoreRecipe = field(default_factory=StoreRecipe)

    def __len__(self) -> int:
        return len(self.index)

    def shard_sizes(self) -> list[int]:
        """Samples of each shard of this split, in order; of a part of it, those that the part begins with."""
        sizes = np.array([shard.samples for shard in self.manifest.shards if shard.split == self.split])
        before = np.cumsum(sizes) - sizes
        used = int((before < len(self.index)).sum())
        return [int(size) for size in np.minimum(sizes, len(self.index) - before)[:used]]

    def first(self, samples: int) -> ShardSet:
        """The first so many samples, which packing shuffled; 0 = all of them (UserError if there are fewer)."""
        if samples > len(self.index):
            raise UserError(
                f"data.samples is {samples}, but split {self.split!r} of {self.root} has {len(self.index)}; name at "
                "most so many, or 0 for all"
            )
        return dataclasses.replace(self, index=self.index[:samples]) if samples else self

    def fingerprint(self) -> str:
        """A short name for exactly these samples in exactly this order: what resuming must agree on."""
        rows = np.ascontiguousarray(self.index).view(np.uint8)  # no copy of what is mapped
        digest = hashlib.sha256(rows.data)
        for shard in self.manifest.shards:
            if shard.split == self.split:
                digest.update(f"{shard.name} {shard.sha256}\n".encode())
        return digest.hexdigest()[:16]


def write(folder: Path, manifest: Manifest, index: Index) -> None:
    """Write `index.npy`, then `manifest.json`: a folder without a manifest is unfinished."""
    assert index.dtype == INDEX_DTYPE
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    files.write_bytes(folder / INDEX_NAME, buffer.getvalue())
    files.write_bytes(folder / MANIFEST_NAME, manifest.to_json())


def read_manifest(folder: Path) -> Manifest:
    """Parse and check `manifest.json` of a folder of shards (UserError)."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise UserError(
            f"{path}: not found; wanted the manifest of a finished `geopose pack`; run it again to go on, or "
            "`geopose pack --index-only` for shards made elsewhere"
        )
    return parse(path.read_bytes(), str(path))


def parse(data: bytes, where: str) -> Manifest:
    """A manifest from its JSON, checked (UserError)."""
    try:
        facts = json.loads(data)
        if facts["schema"] != SCHEMA_VERSION:
            raise UserError(
                f"{where}: schema {facts['schema']}, this program reads {SCHEMA_VERSION}; pack again or use the "
                "version of geopose-dist that packed it"
            )
        shards = [Shard(**shard) for shard in facts["shards"]]
        _check(shards)
        if not isinstance(facts["recipe"], dict) or not isinstance(facts["statistics"], dict):
            raise TypeError("recipe and statistics are no tables")
        return Manifest(
            shards=shards,
            cities=[str(city) for city in facts["cities"]],
            statistics=facts["statistics"],
            recipe=facts["recipe"],
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: not a manifest of shards ({error}); pack again") from error


def _check(shards: list[Shard]) -> None:
    """Refuse fields of another kind than they should be (TypeError); by field, as there may be many shards."""
    texts, counts = ("name", "split", "sha256"), ("samples", "bytes")
    for field_name, kind in [*((name, str) for name in texts), *((name, int) for name in counts)]:
        values = [getattr(shard, field_name) for shard in shards]
        if {type(value) for value in values} - {kind}:
            raise TypeError(f"{field_name} of a shard is no {'text' if kind is str else 'whole number'}")
        if kind is int and not 0 <= min(values, default=0) <= max(values, default=0) < 1 << 62:
            raise TypeError(f"{field_name} of a shard cannot be")


def open_split(root: str | Path, split: str, known: Manifest | None = None) -> ShardSet:
    """Open one split of a folder of shards; the index is memory-mapped, not read (UserError).

    `known` is the folder's manifest if it was read already: that of 10 million samples takes most of a second.
    """
    folder = Path(root)
    manifest = known or read_manifest(folder)
    path = folder / INDEX_NAME
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); pack again, or `geopose pack --index-only`"
        ) from error
    rows = sum(shard.samples for shard in manifest.shards)
    if index.dtype != INDEX_DTYPE or index.shape != (rows,):
        raise UserError(
            f"{path}: {index.shape} of {index.dtype}, wanted ({rows},) of {INDEX_DTYPE}; it does not belong to the "
            "manifest beside it; pack again"
        )
    splits = manifest.splits()
    if split not in splits:
        raise UserError(f"{root} has no split {split!r}; it has: {', '.join(splits) or 'no samples'}")
    first = 0
    for shard in manifest.shards:
        if shard.split == split:
            break
        first += shard.samples
    return ShardSet(str(root), manifest, index[first : first + splits[split]], split, str(root))
