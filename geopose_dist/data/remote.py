"""Shards in a store, read through the cache: sample by sample, or shard by shard where a server has no ranges.

Every sample is checked by its crc32 before it is kept and whenever it comes from the cache; one that differs
is fetched again once, so neither a bad copy nor a byte that flipped on the way is taken for damage.
`prefetch` starts the reads of a micro-batch at once, `in_flight` at a time: over a network the time of a read is
mostly waiting. Connections and threads belong to one process and are made at its first read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from geopose_dist.data import catalogue, stores
from geopose_dist.data.cache import ShardCache
from geopose_dist.data.manifest import ShardSet
from geopose_dist.data.source import Span, check_plain, crc32
from geopose_dist.data.stores import Store
from geopose_dist.errors import UserError

PROBE_BYTES = 512
Place = tuple[str, int, int]
"""Shard, offset and length."""


class RemoteSource:
    """Shards below a URL; safe in threads, and for web servers in forks (obstore refuses to work in a fork)."""

    def __init__(self, shard_set: ShardSet) -> None:
        self.url, self.recipe = shard_set.root, shard_set.store
        self.whole = self.recipe.fetch == "shards"
        self.shards = {shard.name: shard for shard in shard_set.manifest.shards}
        self.cache_folder = catalogue.cache_folder(shard_set)
        self._process = 0
        self._ahead: dict[Place, Future[bytes]] = {}
        self._later: dict[Place, int | None] = {}

    @classmethod
    def of(cls, shard_set: ShardSet) -> RemoteSource:
        """The source of a split's shards; asks a web server whether it honours ranges if that is not settled."""
        fetch = shard_set.store.fetch
        if fetch == "auto":
            fetch = "samples" if _honours_ranges(shard_set) else "shards"
        return cls(replace(shard_set, store=replace(shard_set.store, fetch=fetch)))

    def limit_bytes(self) -> int:
        """Most that the cache may hold."""
        return int(self.recipe.cache_gb * 1e9)

    def check_order(self, block: int) -> None:
        """Refuse an order that would fetch whole shards over and over (UserError); block 0 means `full`."""
        if not self.whole:
            return
        largest = max((shard.bytes for shard in self.shards.values()), default=0)
        fits = self.limit_bytes() // max(2 * largest, 1)
        if block and block <= fits:
            return
        what = f"block:{block}" if block else "full"
        why = "is fetched in whole shards (its server does not honour ranges, or store.fetch is shards)"
        if not fits:
            raise UserError(
                f"{self.url} {why}, and the cache cannot hold two blocks of one shard: store.cache_gb is "
                f"{self.recipe.cache_gb:g}, wanted {2 * largest / 1e9:.3g} at least, with data.order block:1"
            )
        raise UserError(
            f"data.order is {what}, but {self.url} {why}; set data.order to block:K with K up to {fits}, for which "
            f"store.cache_gb {self.recipe.cache_gb:g} holds the two blocks that are in use at once"
        )

    def read(self, name: str, offset: int, length: int, crc: int | None = None) -> bytes:
        """See `source.ByteSource`."""
        self._open()
        place = (name, offset, length)
        self._later.pop(place, None)
        future = self._ahead.pop(place, None)
        try:
            data = future.result() if future else self._read(*place, crc)
        except BaseException:
            self.prefetch(())  # what is still to come would only delay the end
            raise
        self._fill()
        return data

    def prefetch(self, spans: Iterable[Span]) -> None:
        """See `source.ByteSource`. `in_flight` samples at most are under way or wait to be asked for."""
        self._open()
        self._later = {(name, offset, length): crc for name, offset, length, crc in spans}
        for place in self._ahead.keys() - self._later.keys():
            self._ahead.pop(place).cancel()
        for place in self._ahead:
            del self._later[place]
        self._fill()

    def _fill(self) -> None:
        while self._later and len(self._ahead) < self.recipe.in_flight:
            place = next(iter(self._later))
            self._ahead[place] = self._threads.submit(self._read, *place, self._later.pop(place))

    def _open(self) -> None:
        if self._process == os.getpid():
            return
        self._store: Store = stores.open_store(self.url, self.recipe)
        limit, folder = self.limit_bytes(), self.cache_folder
        if self.whole and not limit:
            raise UserError(
                f"{self.url}: can only be fetched in whole shards, and store.cache_gb is 0; give it room for some"
            )
        self._cache = ShardCache(folder.parent, folder.name, limit) if limit else None
        self._threads = ThreadPoolExecutor(self.recipe.in_flight, thread_name_prefix="store")
        self._ahead, self._later = {}, {}
        self._process = os.getpid()  # last: another thread may be waiting for it

    def _read(self, name: str, offset: int, length: int, crc: int | None) -> bytes:
        """A range from wherever it is; if its crc32 differs it is read again once, from the store."""
        check_plain(name, self.url)
        if self.whole:
            return self._from_whole(name, offset, length, crc)
        if self._cache and crc is not None:
            data = self._cache.sample(name, offset, length)
            if data is not None and crc32(data) == crc:
                return data
        data = self._store.read(name, offset, length)
        if crc is not None and crc32(data) != crc:
            data = self._store.read(name, offset, length)
        if self._cache and crc is not None and crc32(data) == crc:
            self._cache.keep(name, offset, data)
        return data

    def _from_whole(self, name: str, offset: int, length: int, crc: int | None) -> bytes:
        assert self._cache is not None  # see `_open`
        shard, data = self.shards[name], b""
        for attempt in range(3):
            path = self._cache.whole(name, self._store, shard.bytes, shard.sha256)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # made room for another one meanwhile
            try:
                data = os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
            if len(data) == length and (crc is None or crc32(data) == crc):
                return data
            if len(data) == length and attempt == 0:
                self._cache.drop_whole(name)
        if len(data) == length:
            return data  # its sha256 is right and its crc32 is not: the reader names that
        raise UserError(
            f"{self.cache_folder.parent}: shards are thrown out as fast as they are fetched; raise store.cache_gb, or "
            "lower the K of data.order block:K"
        )


def _honours_ranges(shard_set: ShardSet) -> bool:
    """Whether a web server sends a part of the first shard; object stores all do."""
    if not shard_set.root.startswith("http") or not shard_set.manifest.shards:
        return True
    name = shard_set.manifest.shards[0].name
    try:
        stores.open_store(shard_set.root, shard_set.store).read(name, 0, PROBE_BYTES)
    except stores.NoRanges:
        return False
    except stores.Missing:
        return True  # told when that shard is really needed
    return True
