"""Where the bytes of shards come from: a range of a named shard, and nothing else.

`LocalSource` reads files of a folder with pread. Another kind of store is another class with the same
`read`; until one exists, `check_place` refuses its URLs by name.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from geopose_dist.data import manifest
from geopose_dist.data.manifest import ShardSet
from geopose_dist.errors import UserError

MAX_OPEN_SHARDS = 32

HINT = "run `geopose verify --deep` to find all damage, then copy or pack that shard again"


class ByteSource(Protocol):
    """Where the bytes of shards come from."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes at `offset` of the shard `name` (UserError if they cannot be had)."""
        ...


class LocalSource:
    """Shards in a local folder, read with pread; safe in threads, forks, and pickled to other processes.

    Files are opened at first use and at most `MAX_OPEN_SHARDS` stay open.
    """

    def __init__(self, root: Path, sizes: dict[str, int]) -> None:
        self.root, self.sizes = root, sizes
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _File] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalSource, (self.root, self.sizes)

    def read(self, name: str, offset: int, length: int) -> bytes:
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
        path = self.root / name
        if PurePosixPath(name).name != name or name in ("", ".", ".."):
            raise UserError(
                f"{self.root}: the manifest names a shard {name!r}, which is no plain file name; pack again"
            )
        try:
            file = _File(path)
        except FileNotFoundError as error:
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


def check_place(shards: str) -> None:
    """Refuse what is not a local folder, before anything tries to open it (UserError)."""
    if not shards:
        raise UserError("no shards are named; give the folder that `geopose pack` made, as --data.shards DIR")
    scheme, colon, _ = shards.partition(":")
    if colon and scheme.isalnum() and (shards.startswith(f"{scheme}://") or scheme == "pipe"):
        raise UserError(
            f"{shards}: shards are read from local folders only, not from {scheme}:; copy them to a local "
            "disk and name that folder"
        )


def open_shards(shards: str, split: str) -> ShardSet:
    """One split of the shards at `shards`, which must be a local folder (UserError)."""
    check_place(shards)
    return manifest.open_split(shards, split)
