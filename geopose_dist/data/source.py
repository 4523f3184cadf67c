"""Where the bytes of shards come from: a range of a named shard, and nothing else.

`LocalSource` reads files of a folder with pread; `remote.RemoteSource` reads stores through a cache.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import imagecodecs

from geopose_dist.errors import UserError

MAX_OPEN_SHARDS = 32

HINT = "run `geopose verify --deep` to find all damage, then copy or pack that shard again"


crc32: Callable[[bytes], int] = imagecodecs.deflate_crc32 if imagecodecs.DEFLATE.available else zlib.crc32
"""libdeflate's takes 0.04 ms for 2 MB, zlib's 0.47 ms."""

Span = tuple[str, int, int, int | None]
"""Shard, offset, length, and the crc32 of these bytes where it is known."""


class ByteSource(Protocol):
    """Where the bytes of shards come from."""

    def read(self, name: str, offset: int, length: int, crc: int | None = None) -> bytes:
        """`length` bytes at `offset` of the shard `name` (UserError if they cannot be had).

        `crc` is their crc32: a source that may do better the second time reads again if it differs. What it
        gives back then is what is there, right or wrong.
        """
        ...

    def prefetch(self, spans: Iterable[Span]) -> None:
        """Start reading what will be asked for next; what an earlier call named is forgotten."""
        ...


def check_plain(name: str, root: str) -> None:
    """A shard's name must not lead out of its folder (UserError)."""
    if PurePosixPath(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise UserError(
            f"{root}: the manifest names a shard {name!r}, which is no plain file name; pack again"
        )


class LocalSource:
    """Shards in a local folder, read with pread; safe in threads, forks, and pickled to other processes.

    Files are opened at first use and at most `MAX_OPEN_SHARDS` stay open. `stored_as` is what shards are
    called there, if that is not their name (see `staging`).
    """

    def __init__(self, root: Path, sizes: dict[str, int], stored_as: dict[str, str] | None = None) -> None:
        self.root, self.sizes, self.stored_as = root, sizes, stored_as or {}
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _File] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalSource, (self.root, self.sizes, self.stored_as)

    def prefetch(self, spans: Iterable[Span]) -> None:
        """A local disk answers at once."""

    def read(self, name: str, offset: int, length: int, crc: int | None = None) -> bytes:
        """See `ByteSource`."""
        file = self._file(name)  # held while it is read: another thread may push it out of the table
        data = os.pread(file.descriptor, length, offset)
        if len(data) != length:
            raise UserError(
                f"{self.root / name}: {len(data)} bytes at offset {offset}, wanted {length}: the file was "
                f"cut while in use; {HINT}"
            )
        return data

    def _file(self, name: str) -> _File:
        if self._process != os.getpid():  # a fork may have copied a lock that another thread held
            self._reset()
        with self._lock:
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = self._open(name)
                if len(self._files) > MAX_OPEN_SHARDS:
                    self._files.popitem(last=False)  # closed when its last reader lets go of it
            else:
                self._files.move_to_end(name)
            return file

    def _open(self, name: str) -> _File:
        check_plain(name, str(self.root))
        path = self.root / self.stored_as.get(name, name)
        try:
            file = _File(path)
        except FileNotFoundError as error:
            if name in self.stored_as:
                raise UserError(
                    f"{path}: the staged copy of {name} is gone; run the same command again to fetch it"
                ) from error
            raise UserError(
                f"{path}: the shard is missing though the manifest names it; copy it here, or pack again"
            ) from error
        except OSError as error:
            raise UserError(
                f"{path}: cannot be opened ({error.strerror}); make it readable for this user"
            ) from error
        size = os.fstat(file.descriptor).st_size
        if size != self.sizes[name]:
            what = "is truncated" if size < self.sizes[name] else "was replaced by another file"
            raise UserError(
                f"{path}: {size} bytes, but the manifest says {self.sizes[name]}: the shard {what}; copy "
                "it again or pack again"
            )
        return file


class _File:
    """An open descriptor that closes itself when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
