"""One sample of a folder of shards, by its row of the index: one range read, checked, parsed, decoded.

A range read returns the whole sample (its members stand together), its crc32 is checked every time, its
tar headers are parsed strictly (`members`), its members are decoded by extension (`tile`, `codecs`): nothing in a
shard is ever unpickled, followed or written. Every error names shard, offset, key and what to do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geopose_dist.data import catalogue, staging, urls
from geopose_dist.data.catalogue import open_shards
from geopose_dist.data.manifest import ShardSet
from geopose_dist.data.members import BLOCK, first_key, key_if_readable, parse_members
from geopose_dist.data.remote import RemoteSource
from geopose_dist.data.sample import TileFacts, View, Window
from geopose_dist.data.source import HINT, ByteSource, LocalSource, crc32
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.data.tile import Tile
from geopose_dist.errors import UserError

__all__ = ["Reader", "crc32", "open_shards"]

MAX_SAMPLE_BYTES = 1 << 30
"""A row of the index that claims more is refused before anything is read."""


class Reader:
    """Samples of one split by their row of its index; picklable, safe in threads and forks."""

    def __init__(self, shard_set: ShardSet, source: ByteSource | None = None) -> None:
        self.shard_set, self._given = shard_set, source
        catalogue.check_place(shard_set.root)
        if source is None:
            source, self.shard_set = _source_of(shard_set)
        self.source = source

    def __reduce__(self) -> tuple[Any, ...]:
        # The index is opened again, not sent: pickling a memory map would copy all of it.
        opened = self.shard_set
        where = (opened.folder, opened.root, opened.split, len(opened))
        return _reopen, (*where, opened.store, self._given)

    def __len__(self) -> int:
        return len(self.shard_set)

    def where(self, index: int) -> str:
        """Shard and offset of a sample, for messages."""
        name, offset, _, _ = self._span(index)
        return f"{urls.join(self.shard_set.root, name)}, offset {offset}"

    @property
    def is_far(self) -> bool:
        """Whether samples come over a network, so that it pays to ask for them early."""
        return isinstance(self.source, RemoteSource)

    def check_order(self, block: int) -> None:
        """Refuse an order that this source cannot be read in (UserError); block is K of block:K, 0 for full."""
        if isinstance(self.source, RemoteSource):
            self.source.check_order(block)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Start reading the samples that are asked for next, where that saves time."""
        self.source.prefetch(self._span(index) for index in indices)

    def keys(self, indices: Sequence[int]) -> list[str]:
        """Names of samples, their headers read at the same time where that saves time (UserError)."""
        self.source.prefetch(self._head(index) for index in indices)
        return [self.key(index) for index in indices]

    def key(self, index: int) -> str:
        """Name of a sample, from its first tar header (UserError if that is damaged)."""
        return first_key(self.source.read(*self._head(index)), self.where(index))

    def raw(self, index: int) -> bytes:
        """The bytes of a sample, tar headers included, after the check of their crc32 (UserError)."""
        name, offset, length, crc = self._span(index)
        data = self.source.read(name, offset, length, crc)
        found = crc32(data)
        if found != crc:
            raise UserError(
                f"{self.where(index)}{key_if_readable(data)}: crc32 is {found:08x}, the index says "
                f"{crc:08x}: the bytes are damaged or belong to another packing; {self._hint(name)}"
            )
        return data

    def _hint(self, name: str) -> str:
        staged = isinstance(self.source, LocalSource) and self.source.stored_as.get(name)
        return f"its staged copy is {staged}: remove that and run again, or {HINT}" if staged else HINT

    def members(self, index: int) -> tuple[str, dict[str, memoryview]]:
        """Key of a sample and its members by extension, such as `rgb.qoi` (UserError)."""
        return parse_members(self.raw(index), self.where(index))

    def tile(self, index: int) -> Tile:
        """A sample that is read and checked, not yet decoded (UserError)."""
        key, members = self.members(index)
        return Tile.of(key, members, self.where(index))

    def facts(self, index: int) -> TileFacts:
        """What is known of a tile besides its pixels (UserError)."""
        return self.tile(index).facts

    def view(self, index: int, window: Window | None = None) -> View:
        """The decoded sample, or a window of it; heights in metres, NaN where unknown (UserError)."""
        return self.tile(index).view(window)

    def _span(self, index: int) -> tuple[str, int, int, int]:
        number, _, offset, length, crc = self.shard_set.index[index].item()
        shards = self.shard_set.manifest.shards
        if number >= len(shards) or length > min(shards[number].bytes - offset, MAX_SAMPLE_BYTES):
            raise UserError(
                f"{self.shard_set.folder}/index.npy: row {index} of split {self.shard_set.split} names shard {number}, "
                f"offset {offset}, {length} bytes, which cannot be; it does not belong to its manifest: pack again"
            )
        return shards[number].name, offset, length, crc

    def _head(self, index: int) -> tuple[str, int, int, None]:
        name, offset, length, _ = self._span(index)
        return name, offset, min(length, 4 * BLOCK), None


def _source_of(shard_set: ShardSet) -> tuple[ByteSource, ShardSet]:
    """Where the shards of a set are read, and the set with its way of fetching settled."""
    staged = staging.source_of(shard_set) if shard_set.store.stage == "node" else None
    if staged is not None:
        return staged, shard_set
    if not urls.is_url(shard_set.root):
        sizes = {shard.name: shard.bytes for shard in shard_set.manifest.shards}
        return LocalSource(Path(shard_set.root), sizes), shard_set
    source = RemoteSource.of(shard_set)
    return source, dataclasses.replace(shard_set, store=source.recipe)


def _reopen(
    folder: str, root: str, split: str, rows: int, store: StoreRecipe, source: ByteSource | None
) -> Reader:
    opened = catalogue.reopen(Path(folder), root, split, store)
    return Reader(dataclasses.replace(opened, index=opened.index[:rows]), source)
