"""Where a packing puts its shards: a local folder, or a prefix of an object store.

Both have the same files, `.pack/` for bookkeeping included. In a folder, finished shards wait in `.pack/shards`
until all are there. A store has no cheap rename: a shard is built as one local temporary file, uploaded whole
under its own name and looked at again; what makes a packing finished is the manifest, in both.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from geopose_dist import files
from geopose_dist.data import stores, urls
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.errors import FinishedWithFailures, UserError

FOLDER = ".pack"
MAX_SMALL_BYTES = 1 << 30
"""Bookkeeping and manifests are read whole, up to this."""
_LEFT_BEHIND = re.compile(r"geopose-pack-(?P<host>[\w.-]*)-(?P<process>\d+)-\w+")

Row = tuple[str, str, int, int, int]
"""Key, city, offset, length and crc32 of a sample."""


class Place(Protocol):
    """Files of one packing by name, such as `manifest.json` or `.pack/records/train-000000.tar.json`."""

    out: str
    is_store: bool

    def read(self, name: str) -> bytes | None:
        """A small file, or None."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, whole or not at all."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names of the files right in a folder."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file; one that is not there is fine."""
        ...

    def building(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """The local path at which the block writes a shard."""
        ...

    def take(self, name: str, path: Path, rows: list[Row]) -> None:
        """Take over the shard that was written at `path`."""
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of every finished shard, wherever it waits."""
        ...

    def publish(self, names: list[str]) -> None:
        """Put the finished shards in their places."""
        ...


class LocalPlace:
    """A folder of this machine, or one that machines share."""

    is_store = False

    def __init__(self, out: str) -> None:
        self.out, self.folder = out, Path(out)
        self.waiting = self.folder / FOLDER / "shards"

    def read(self, name: str) -> bytes | None:
        """See `Place`."""
        path = self.folder / name
        return path.read_bytes() if path.is_file() else None

    def write(self, name: str, data: bytes) -> None:
        """See `Place`."""
        files.write_bytes(self.folder / name, data)

    def names(self, folder: str) -> list[str]:
        """See `Place`."""
        return sorted(path.name for path in (self.folder / folder).glob("*") if path.is_file())

    def delete(self, name: str) -> None:
        """See `Place`."""
        (self.folder / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def building(self, name: str) -> Iterator[Path]:
        """See `Place`."""
        yield self.waiting / name

    def take(self, name: str, path: Path, rows: list[Row]) -> None:
        """See `Place`: it waits where it was written."""

    def path(self, name: str) -> Path | None:
        """Where a finished shard is."""
        return next((p for p in (self.waiting / name, self.folder / name) if p.is_file()), None)

    def sizes(self) -> dict[str, int]:
        """See `Place`."""
        found = [*self.folder.glob("*.tar"), *self.waiting.glob("*.tar")]
        return {path.name: path.stat().st_size for path in found}

    def publish(self, names: list[str]) -> None:
        """See `Place`."""
        for name in names:
            if (self.waiting / name).is_file():
                (self.waiting / name).replace(self.folder / name)
        files.fsync_folder(self.folder)
        shutil.rmtree(self.waiting, ignore_errors=True)
        # What processes that were killed left half-written: all shards are there, so nobody writes any more.
        for leftover in [*self.folder.glob(".*.tmp"), *(self.folder / FOLDER).rglob(".*.tmp")]:
            leftover.unlink(missing_ok=True)


class StorePlace:
    """A prefix of an object store; at most one shard of each writing process is on the local disk."""

    is_store = True

    def __init__(self, out: str, recipe: StoreRecipe, scratch: str = "") -> None:
        self.out, self.recipe, self.scratch = out.rstrip("/"), recipe, scratch
        self._stores: dict[str, stores.Store] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return StorePlace, (self.out, self.recipe, self.scratch)

    def _store(self, folder: str) -> stores.Store:
        if folder not in self._stores:
            url = urls.join(self.out, folder) if folder else self.out
            self._stores[folder] = stores.open_store(url, self.recipe)
        return self._stores[folder]

    def read(self, name: str) -> bytes | None:
        """See `Place`."""
        try:
            return stores.read_small(self._store(""), name, MAX_SMALL_BYTES)
        except stores.Missing:
            return None

    def write(self, name: str, data: bytes) -> None:
        """See `Place`."""
        self._store("").put_bytes(name, data)

    def names(self, folder: str) -> list[str]:
        """See `Place`."""
        return [name for name, _ in self._store(folder).list()]

    def delete(self, name: str) -> None:
        """See `Place`."""
        self._store("").delete(name)

    @contextlib.contextmanager
    def building(self, name: str) -> Iterator[Path]:
        """See `Place`; what runs that were killed left behind goes first."""
        parent = Path(self.scratch or tempfile.gettempdir())
        with contextlib.suppress(FileExistsError):
            parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        with tempfile.TemporaryDirectory(
            prefix=f"geopose-pack-{_host()}-{os.getpid()}-", dir=parent
        ) as folder:
            yield Path(folder) / name

    def take(self, name: str, path: Path, rows: list[Row]) -> None:
        """See `Place`: upload it whole, then compare its size and the checksum of its last sample."""
        store = self._store("")
        store.put_file(name, path)
        wanted, found = path.stat().st_size, store.size(name)
        _, _, offset, length, crc = rows[-1]
        if found != wanted or zlib.crc32(store.read(name, offset, length)) != crc:
            raise FinishedWithFailures(
                f"{urls.join(self.out, name)}: the store holds {found} bytes of it, {wanted} were sent, or its last "
                "sample is another one: does another packing write there? Run the same command again"
            )

    def sizes(self) -> dict[str, int]:
        """See `Place`."""
        return dict(self._store("").list(".tar"))

    def publish(self, names: list[str]) -> None:
        """See `Place`: they are there already."""


def _host() -> str:
    """Name of this machine, fit for a file name."""
    return re.sub(r"[^\w.]", "_", socket.gethostname())


def _sweep(parent: Path) -> None:
    """Remove the temporary folders of packings that were killed on this machine; others may share the folder."""
    for path in parent.glob(f"geopose-pack-{_host()}-*"):
        match = _LEFT_BEHIND.fullmatch(path.name)
        if match is None or path.is_symlink() or path.stat().st_uid != os.getuid():
            continue
        try:
            os.kill(int(match["process"]), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except PermissionError:  # a living process of somebody else
            continue


def open_place(out: str, recipe: StoreRecipe, scratch: str = "") -> Place:
    """The place that `--out` names; a folder is made if need be (UserError)."""
    from shards import tars

    if not urls.is_url(out):
        tars.make_folder(Path(out))
        return LocalPlace(out)
    if urls.parse(out).scheme in ("http", "https"):
        raise UserError(
            f"--out {urls.shown(out)}: a web server cannot be packed to; wanted a folder, s3://, gs:// or az://"
        )
    return StorePlace(out, recipe, scratch)
