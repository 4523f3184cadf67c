"""What was read from a store, kept on a disk of this machine: a sparse copy of the shards, bounded by size.

A data set is a folder. `samples/SHARD` is a sparse file in which every sample that was read stands at its own
offset, so the index's crc32 says whether it is there and whole: no bookkeeping, nothing to repair after a
crash, and processes that write one sample twice write the same bytes. Samples are kept until the cache is full and
then no more are taken in: every visit reads each sample once, in another order, so throwing one out for
another gains nothing. `whole/SHARD` are shards fetched whole, each checked by size and sha256, then renamed;
of these the least recently opened goes first. Files are cut to nothing before they are unlinked, so that no
open file keeps their space; who reads a cut file gets fewer bytes and asks again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from geopose_dist.data.stores import Store
from geopose_dist.errors import UserError

STEP_BYTES = 16 << 20
"""Written by a process between two looks at what all hold: the limit may be exceeded by this per process."""
PARTS = ("samples", "whole", "locks")
LOOK_AGAIN_S = 30.0
"""A full cache is looked at again after this time."""
FULL = (errno.ENOSPC, errno.EDQUOT)


def default_root() -> Path:
    """Where caches are if the recipe does not say."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "geopose-dist"


class ShardCache:
    """The cached shards of one data set; for several threads, and several processes at once."""

    def __init__(self, root: Path, data_set: str, limit_bytes: int) -> None:
        self.root, self.folder, self.limit_bytes = root, root / data_set, limit_bytes
        self._lock = threading.Lock()
        self._left, self._full_until = 0, 0.0
        try:
            self._used = _hold(self.folder)
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be made ({error.strerror}); name a folder on a disk of this machine as "
                "store.cache_dir"
            ) from error

    def __del__(self) -> None:
        if hasattr(self, "_used"):
            os.close(self._used)

    def sample(self, name: str, offset: int, length: int) -> bytes | None:
        """What stands there, to be checked by its crc32; None where nothing does."""
        try:
            descriptor = os.open(self.folder / "samples" / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            if os.lseek(descriptor, offset, os.SEEK_DATA) >= offset + length:
                return None
            data = os.pread(descriptor, length, offset)
            return data if len(data) == length else None
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole up to the end
                return None
            raise
        finally:
            os.close(descriptor)

    def keep(self, name: str, offset: int, data: bytes) -> None:
        """Keep a checked sample, if there is room."""
        if not self._has_room(len(data)):
            return
        descriptor = os.open(
            self.folder / "samples" / name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, mode=0o600
        )
        try:
            os.pwrite(descriptor, data, offset)
        except OSError as error:
            if error.errno not in FULL:
                raise
            self._full_until = time.monotonic() + LOOK_AGAIN_S  # a full disk is a full cache
        finally:
            os.close(descriptor)

    def _has_room(self, need: int) -> bool:
        with self._lock:
            if need > self._left:
                if time.monotonic() < self._full_until:
                    return False
                self._left = min(max(STEP_BYTES, need), self._room(need))
            if need > self._left:
                self._left, self._full_until = 0, time.monotonic() + LOOK_AGAIN_S
                return False
            self._left -= need
            return True

    def _room(self, need: int) -> int:
        """Bytes that may still be written, after other data sets that nobody uses made room for `need`."""
        room = self.limit_bytes - bytes_held(self.root)
        if room < need:
            with _locked(self.root / "lock"):
                for folder in self._others():
                    room = self.limit_bytes - bytes_held(self.root)
                    if room >= need:
                        break
                    _throw_out(folder)
            room = self.limit_bytes - bytes_held(self.root)
        return room

    def _others(self) -> list[Path]:
        """The other data sets, least recently opened first."""
        marks = [mark for mark in self.root.glob("*/used") if mark.parent != self.folder]
        return [mark.parent for mark in sorted(marks, key=lambda mark: mark.stat().st_mtime)]

    def whole(self, name: str, store: Store, size: int, sha256: str) -> Path:
        """The path of a shard that is here as a whole, fetched if it is not (UserError, StoreFailure).

        One process fetches it, others wait for that.
        """
        path = self.folder / "whole" / name
        with _locked(self.folder / "locks" / name):
            if not path.is_file():
                self._fetch(path, name, store, size, sha256)
            os.utime(path)
        return path

    def drop_whole(self, name: str) -> None:
        """Forget a shard whose copy turned out to be damaged."""
        _cut(self.folder / "whole" / name)

    def _fetch(self, path: Path, name: str, store: Store, size: int, sha256: str) -> None:
        for left in path.parent.glob(f".{glob.escape(name)}.*"):
            left.unlink()  # by who was killed while fetching it: this process alone may fetch it now
        temporary = path.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}")
        try:
            self._reserve(temporary, size)
            for last_try in (False, True):
                found = _receive(store, name, temporary, size)
                if found == sha256:
                    break
                if last_try:
                    raise UserError(
                        f"{store.url}/{name}: sha256 is {found[:16]}..., the manifest says {sha256[:16]}...: another "
                        "shard of that name, or damaged at its source; upload it again or pack again"
                    )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _reserve(self, temporary: Path, size: int) -> None:
        """Take the space of a shard at once, so that others see it as taken; old shards go first."""
        with _locked(self.root / "lock"):
            for last_try in (False, True):
                over = bytes_held(self.root) + size - self.limit_bytes
                for shard in _oldest(self.folder / "whole") if over > 0 else ():
                    over -= _held(shard)
                    _cut(shard)
                    if over <= 0:
                        break
                for folder in self._others() if over > 0 else ():
                    over -= _throw_out(folder)
                    if over <= 0:
                        break
                if over > 0:
                    raise UserError(
                        f"{self.root}: no room for a shard of {size / 1e9:.3f} GB in a cache of "
                        f"{self.limit_bytes / 1e9:.3f} GB; raise store.cache_gb"
                    )
                with temporary.open("wb") as file:
                    try:
                        os.posix_fallocate(file.fileno(), 0, size)
                        return
                    except OSError as error:
                        if error.errno not in FULL or last_try:
                            raise UserError(
                                f"{self.root}: the disk has no {size / 1e9:.3f} GB left for a shard "
                                f"({error.strerror}); free some space, or name another store.cache_dir"
                            ) from error
                for shard in _oldest(self.folder / "whole"):
                    _cut(shard)


def _receive(store: Store, name: str, path: Path, size: int) -> str:
    """Write an object into a file; its sha256 (UserError if it is larger than the manifest says)."""
    digest, received = hashlib.sha256(), 0
    with path.open("r+b") as file:
        for piece in store.stream(name):
            received += len(piece)
            if received > size:
                raise UserError(
                    f"{store.url}/{name}: more than the {size} bytes that the manifest says; it is another shard of "
                    "that name: upload it again or pack again"
                )
            digest.update(piece)
            file.write(piece)
        file.truncate()
    return digest.hexdigest()


def bytes_held(root: Path) -> int:
    """What all data sets of a cache take on the disk; their manifests and indices are not counted."""
    total = 0
    for part in root.glob("*/*/"):
        if part.name != "locks":
            with contextlib.suppress(FileNotFoundError):  # thrown out meanwhile
                total += sum(_held(Path(entry)) for entry in os.scandir(part))
    return total


def _held(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:  # thrown out meanwhile
        return 0


def _oldest(folder: Path) -> list[Path]:
    """Whole shards, least recently opened first."""
    times = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            times.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(times) if not path.name.startswith(".")]


def _cut(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.truncate(path, 0)
        path.unlink()


def _throw_out(folder: Path) -> int:
    """Remove the samples and shards of a data set that nobody has open; the bytes that this freed.

    Manifest and index stay: they are small, and a run without a cache of samples may have them mapped.
    """
    used = _open_lock(folder / "used")
    try:
        fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    else:
        freed = 0
        for part in PARTS:
            with contextlib.suppress(FileNotFoundError):
                freed += sum(_held(Path(entry)) for entry in os.scandir(folder / part))
                shutil.rmtree(folder / part)
        return freed
    finally:
        os.close(used)


def _hold(folder: Path) -> int:
    """Make the folder of a data set; while the descriptor is open nobody throws out what is in it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    used = _open_lock(folder / "used")
    fcntl.flock(used, fcntl.LOCK_SH)
    for part in PARTS:
        (folder / part).mkdir(exist_ok=True, mode=0o700)
    os.utime(used)
    return used


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode=0o600)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among threads and processes of this machine; a killed holder lets go."""
    descriptor = _open_lock(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
