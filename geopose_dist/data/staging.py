"""The shards of a run on a disk of this machine, fetched before training, once for all processes here.

`staged/SHA256.tar` below the cache's folder is a whole shard under the name of its content: another shard of the
same name is another file, and data sets share what they have in common. One process of a machine fetches at a
time, the others wait for its lock, which a killed one lets go; its `.SHA256.part` is gone on with. What was
received is checked against its sha256, fsynced and renamed. Space is bounded: what no living process has
claimed in a `.user-*` file goes, least recently used first. Sources are URLs and folders (a shared disk).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from geopose_dist import files
from geopose_dist.data import catalogue, stores, urls
from geopose_dist.data.manifest import Shard, ShardSet
from geopose_dist.data.source import LocalSource, check_plain
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.errors import Preempted, UserError
from geopose_dist.metrics_log import Progress

FOLDER = "staged"
FULL = (errno.ENOSPC, errno.EDQUOT)
WAIT_S = 0.2
_CLAIMS = itertools.count()


def shards_of(shard_set: ShardSet) -> list[Shard]:
    """The shards that hold a split's samples (UserError: one whose name or sha256 cannot be)."""
    of_split = [shard for shard in shard_set.manifest.shards if shard.split == shard_set.split]
    used = of_split[: len(shard_set.shard_sizes())]
    for shard in used:
        check_plain(shard.name, shard_set.root)
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise UserError(
                f"{shard_set.root}: the manifest gives {shard.name} the sha256 {shard.sha256[:80]!r}, which is none; "
                "pack again"
            )
    return used


def folder_of(store: StoreRecipe) -> Path:
    """Where this machine keeps staged shards."""
    return catalogue.cache_root(store) / FOLDER


def source_of(shard_set: ShardSet) -> LocalSource | None:
    """Where a split is read if all its shards are staged here; None if they are not."""
    folder, shards = folder_of(shard_set.store), shards_of(shard_set)
    if not all(_is_whole(folder, shard) for shard in shards):
        return None
    return LocalSource(
        folder,
        {shard.name: shard.bytes for shard in shards},
        {shard.name: f"{shard.sha256}.tar" for shard in shards},
    )


def stage(
    sets: Sequence[ShardSet], stopped: Callable[[], str] = lambda: "", *, silent: bool = False
) -> Claim:
    """Fetch what is not here yet of splits of one data set; they stay here while the claim lives.

    Raises UserError (no room, another shard than the manifest says), StoreFailure, or Preempted.
    """
    place, store = sets[0].root, sets[0].store
    folder = folder_of(store)
    wanted = list({shard.sha256: shard for shard_set in sets for shard in shards_of(shard_set)}.values())
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(folder / "room", stopped):  # between two looks of who makes room
            claim = Claim(folder, [shard.sha256 for shard in wanted])
            missing = [shard for shard in wanted if not _is_whole(folder, shard)]
    except OSError as error:
        raise UserError(
            f"{folder} on {platform.node()}: cannot be written ({error.strerror}); name a folder on a disk of this "
            "machine as store.cache_dir"
        ) from error
    if missing:
        with _alone(folder / "lock", stopped):
            missing = [shard for shard in missing if not _is_whole(folder, shard)]
            with _alone(folder / "room", stopped):
                make_room(folder, place, missing, int(store.stage_gb * 1e9))
            _Fetch(folder, place, store, stopped).all_of(missing, silent)
    for shard in wanted:
        os.utime(folder / f"{shard.sha256}.tar")
    return claim


class Claim:
    """What a living process uses: nobody throws it out before `close`, or before the process ends."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self._path = folder / f".user-{platform.node()}-{os.getpid()}-{next(_CLAIMS)}"
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode=0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)  # which ends with the process
        os.write(self._descriptor, json.dumps(names).encode())

    def close(self) -> None:
        """Let go."""
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()


def make_room(folder: Path, place: str, missing: Sequence[Shard], limit: int) -> None:
    """Throw out what nobody claims until what is missing fits into `limit` bytes and onto the disk (UserError)."""
    held = {path: path.stat() for path in folder.iterdir() if path.suffix in (".tar", ".part")}
    begun = {shard.sha256: folder / f".{shard.sha256}.part" for shard in missing}
    need = sum(shard.bytes for shard in missing)
    need -= sum(held[path].st_size for path in begun.values() if path in held)
    over_limit = sum(facts.st_size for facts in held.values()) + need - limit
    over_disk = need - shutil.disk_usage(folder).free
    claimed = _claimed(folder)
    # Halves that nobody goes on with first, then the least recently used.
    order = sorted(held, key=lambda path: (path.suffix == ".tar", held[path].st_mtime))
    for path in order:
        if max(over_limit, over_disk) <= 0:
            return
        if path.stem.removeprefix(".") not in claimed:
            path.unlink()
            over_limit, over_disk = over_limit - held[path].st_size, over_disk - held[path].st_size
    if max(over_limit, over_disk) <= 0:
        return
    what = f"{folder} on {platform.node()}: {len(missing)} shards of {urls.shown(place)} take {need / 1e9:.3f} GB more"
    if over_disk > 0:
        raise UserError(
            f"{what}, and the disk lacks {over_disk / 1e9:.3f} GB of that; free some space, name another "
            "store.cache_dir, or set store.stage none"
        )
    raise UserError(
        f"{what}, which is {over_limit / 1e9:.3f} GB above the limit of {limit / 1e9:g} GB (store.stage_gb; what other "
        "runs here use counts); raise it, or set store.stage none"
    )


def _claimed(folder: Path) -> set[str]:
    """What living processes use; the claims of dead ones are removed."""
    found: set[str] = set()
    for path in folder.glob(".user-*"):
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            except BlockingIOError:
                found |= set(json.loads(os.read(descriptor, os.fstat(descriptor).st_size) or "[]"))
            finally:
                os.close(descriptor)
    return found


@dataclass
class _Fetch:
    """One process that fetches shards, several at a time."""

    folder: Path
    place: str
    store: StoreRecipe
    stopped: Callable[[], str]
    _over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _bytes: int = 0

    def all_of(self, shards: Sequence[Shard], silent: bool) -> None:
        """Fetch them; what one of them ends with ends all, and their halves stay."""
        if not shards:
            return
        self._remote = stores.open_store(self.place, self.store) if urls.is_url(self.place) else None
        megabytes = -(-sum(shard.bytes for shard in shards) // 10**6)
        label = f"stage {len(shards)} shards on {platform.node()}"
        with (
            Progress(megabytes, label, "MB", silent=silent) as self._bar,
            ThreadPoolExecutor(min(self.store.in_flight, len(shards)), "stage") as threads,
        ):
            try:
                for _ in threads.map(self._one, shards):
                    pass
            except BaseException:
                self._over.set()
                threads.shutdown(wait=True, cancel_futures=True)
                raise
        files.fsync_folder(self.folder)

    def _one(self, shard: Shard) -> None:
        part = self.folder / f".{shard.sha256}.part"
        begun = _hash_of(part, shard.bytes)
        for resumed in (True, False) if begun[0] else (False, False):
            received, digest = begun if resumed else (0, hashlib.sha256())
            try:
                with part.open("ab" if resumed else "wb") as file:
                    self._count(received)
                    for piece in self._pieces(shard, received):
                        self._count(len(piece))
                        received += len(piece)
                        digest.update(piece)
                        file.write(piece)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise UserError(
                    f"{self.folder} on {platform.node()}: the disk is full while {shard.name} is staged; free some "
                    "space, name another store.cache_dir, or set store.stage none"
                ) from error
            if received == shard.bytes and digest.hexdigest() == shard.sha256:
                part.replace(self.folder / f"{shard.sha256}.tar")
                return
            self._count(-received)
        part.unlink()
        raise UserError(
            f"{urls.join(self.place, shard.name)}: {received} bytes of sha256 {digest.hexdigest()[:16]}..., the "
            f"manifest says {shard.bytes} of {shard.sha256[:16]}...: another shard of that name, or damaged at its "
            "source; copy it there again or pack again"
        )

    def _pieces(self, shard: Shard, offset: int) -> Iterator[bytes]:
        for piece in self._from_store(shard, offset) if self._remote else self._from_folder(shard, offset):
            if self._over.is_set() or self.stopped():
                raise Preempted(
                    f"stopped{' by ' + self.stopped() if self.stopped() else ''} while shards are staged; run the same "
                    "command to go on"
                )
            yield piece

    def _from_store(self, shard: Shard, offset: int) -> Iterator[bytes]:
        assert self._remote is not None
        try:
            while offset < shard.bytes:
                length = min(stores.PIECE, shard.bytes - offset)
                yield self._remote.read(shard.name, offset, length)
                offset += length
        except stores.NoRanges:  # a web server that sends whole files only: what is here already is skipped
            at = 0
            for piece in self._remote.stream(shard.name):
                yield piece[max(offset - at, 0) :]
                at += len(piece)

    def _from_folder(self, shard: Shard, offset: int) -> Iterator[bytes]:
        path = Path(self.place) / shard.name
        try:
            with path.open("rb") as file:
                file.seek(offset)
                while piece := file.read(stores.PIECE):
                    yield piece
        except FileNotFoundError as error:
            raise UserError(
                f"{path}: the shard is missing though the manifest names it; copy it here, or pack again"
            ) from error

    def _count(self, received: int) -> None:
        with self._lock:
            before = self._bytes // 10**6
            self._bytes += received
            self._bar.advance(self._bytes // 10**6 - before)


def _hash_of(part: Path, limit: int) -> tuple[int, hashlib._Hash]:
    """Bytes that a killed process left of a shard, and their sha256 so far; more than the shard has are nothing."""
    digest = hashlib.sha256()
    if not part.is_file() or part.stat().st_size > limit:
        return 0, digest
    size = 0
    with part.open("rb") as file:
        while piece := file.read(stores.PIECE):
            digest.update(piece)
            size += len(piece)
    return size, digest


def _is_whole(folder: Path, shard: Shard) -> bool:
    try:
        return (folder / f"{shard.sha256}.tar").stat().st_size == shard.bytes
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _alone(path: Path, stopped: Callable[[], str]) -> Iterator[None]:
    """Alone among the processes of this machine (Preempted while waiting for that)."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode=0o600)
    pause = threading.Event()
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stopped():
                    raise Preempted(
                        f"stopped by {stopped()} while another process stages shards; run the same command to go on"
                    ) from None
                pause.wait(WAIT_S)
        yield
    finally:
        os.close(descriptor)
