"""A run in a store (`--out s3://bucket/run`): worked on in a folder of this machine, uploaded at every save.

A store cannot rename, so nothing is made whole by a rename there. Each object appears whole by itself; of a
checkpoint's objects `state.json` goes up last and is removed first, so a checkpoint without one does not exist,
and half an upload is seen by nobody. The newest is found by listing, which stores answer with all that was written
before; no pointer names it. The store alone is believed: what the folder here holds beside it is thrown away
at a start. Logs go up before the checkpoint whose steps they tell.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from geopose_dist import files
from geopose_dist.data import catalogue, stores, urls
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.errors import UserError
from geopose_dist.model import weights

CHECKPOINTS = "checkpoints"
LOGS = ("metrics.jsonl", "validation.jsonl", "damage.jsonl")
"""What a run that goes on writes on; each line has its step, and those of steps to come are dropped."""
MAX_LOG_BYTES = 1 << 30
MAX_STATE_BYTES = 1 << 24
LARGE = 32 << 20
"""Logs above this go up in parts."""


def working_copy(url: str, store: StoreRecipe) -> Path:
    """Where this machine works on a run behind a URL; beside the cached shards (store.cache_dir)."""
    parsed = urls.parse(url)
    name = f"{PurePosixPath(parsed.path).name or parsed.host}-{hashlib.sha256(str(parsed).encode()).hexdigest()[:12]}"
    return catalogue.cache_root(store) / "runs" / name


class RunStore:
    """One run below a URL.

    Attributes:
        url: of the run. folder: its working copy here.
    """

    def __init__(self, url: str, store: StoreRecipe, folder: Path) -> None:
        if urls.parse(url).scheme in ("http", "https"):
            raise UserError(
                f"{urls.shown(url)}: web servers cannot be written to or listed; keep a run in a folder, at s3://, "
                "gs:// or az://"
            )
        self.url, self.folder = str(urls.parse(url)), folder
        self._store = stores.open_store(url, store)
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._scores: dict[str, float | None] = {}

    def steps(self) -> list[str]:
        """Names of the complete checkpoints, oldest first."""
        return sorted(step for step, names in self._objects().items() if weights.STATE_NAME in names)

    def _objects(self) -> dict[str, dict[str, int]]:
        """Names and bytes of the objects of each step's folder, whether complete or not."""
        found: dict[str, dict[str, int]] = {}
        for path, size in self._store.tree(CHECKPOINTS):
            parts = PurePosixPath(path).parts
            if len(parts) == 3 and parts[1].startswith("step-"):
                found.setdefault(parts[1], {})[parts[2]] = size
        return found

    def bring(self, step: str) -> Path | None:
        """Make the working copy what the store has at a complete step; "" = a run that has none yet.

        Alone among the processes of this machine; a checkpoint that is here already is not fetched again.
        """
        root = self.folder / CHECKPOINTS
        root.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / ".lock"):
            for other in root.iterdir():
                if other.name != step:
                    shutil.rmtree(other, ignore_errors=True)
            if not step:
                self._forget()
                return None
            self._fetch(step, self._objects()[step], root / step)
        return root / step

    def _forget(self) -> None:
        """Leave nothing here of a run that the store has no checkpoint of; torchrun may be writing to `logs`."""
        for path in self.folder.iterdir():
            if path.name in (CHECKPOINTS, "logs", ".lock"):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _fetch(self, step: str, sizes: dict[str, int], final: Path) -> None:
        state = stores.read_small(self._store, f"{CHECKPOINTS}/{step}/{weights.STATE_NAME}", MAX_STATE_BYTES)
        if final.is_dir():
            here = {file.name: file.stat().st_size for file in final.iterdir()}
            if here == sizes and (final / weights.STATE_NAME).read_bytes() == state:
                return
            shutil.rmtree(final)
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name in sizes.keys() - {weights.STATE_NAME}:
            with files.atomic_write(temporary / name) as file:
                for piece in self._store.stream(f"{CHECKPOINTS}/{step}/{name}"):
                    file.write(piece)
        files.write_bytes(temporary / weights.STATE_NAME, state)
        temporary.rename(final)
        files.fsync_folder(final.parent)

    def bring_logs(self) -> None:
        """Make the logs here those of the store, for the rank that writes them."""
        for name in LOGS:
            try:
                files.write_bytes(self.folder / name, stores.read_small(self._store, name, MAX_LOG_BYTES))
            except stores.Missing:
                (self.folder / name).unlink(missing_ok=True)

    def put_logs(self, marks: tuple[str, ...] = ("",)) -> None:
        """Upload what changed outside of the checkpoints; of files whose names hold one of `marks`."""
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in name.parts)
            wanted = any(mark in path.name for mark in marks)
            if hidden or not wanted or name.parts[0] == CHECKPOINTS or not path.is_file():
                continue
            facts = path.stat()
            mark = (facts.st_size, facts.st_mtime_ns)
            if self._uploaded.get(str(name)) == mark:
                continue
            if facts.st_size > LARGE:
                self._store.put_file(name.as_posix(), path)
            else:
                self._store.put_bytes(name.as_posix(), path.read_bytes())
            self._uploaded[str(name)] = mark

    def save(self, folder: Path, keep: int) -> None:
        """Upload the checkpoint that is in `folder`, the logs before it, and remove those that are too old."""
        self.put_logs()
        step, state = folder.name, (folder / weights.STATE_NAME).read_bytes()
        place = f"{CHECKPOINTS}/{step}"
        if step not in self.steps():  # a step that is there is the same: only its score is new
            for path in sorted(folder.iterdir()):
                if path.name != weights.STATE_NAME:
                    self._store.put_file(f"{place}/{path.name}", path)
        self._store.put_bytes(f"{place}/{weights.STATE_NAME}", state)
        self._scores[step] = _score(state)
        self._prune(keep)

    def _prune(self, keep: int) -> None:
        """Remove all but the `keep` newest checkpoints and the best one, and halves that killed uploads left."""
        objects = self._objects()
        complete = sorted(step for step, names in objects.items() if weights.STATE_NAME in names)
        stay = {*complete[-keep:], self._best(complete)}
        for step in objects.keys() - stay:
            for name in sorted(objects[step], key=lambda name: name != weights.STATE_NAME):
                self._store.delete(f"{CHECKPOINTS}/{step}/{name}")

    def _best(self, complete: list[str]) -> str:
        for step in complete:
            if step not in self._scores:
                name = f"{CHECKPOINTS}/{step}/{weights.STATE_NAME}"
                self._scores[step] = _score(stores.read_small(self._store, name, MAX_STATE_BYTES))
        scored = {step: score for step in complete if (score := self._scores[step]) is not None}
        return max(scored, key=lambda step: scored[step]) if scored else ""

    def chosen(self) -> str:
        """The checkpoint that `--init-from` and `--checkpoint` mean: the best one, else the newest (UserError)."""
        complete = self.steps()
        if not complete:
            raise UserError(
                f"{self.url}: no complete checkpoint there; wanted a run that `geopose train --out` made and saved"
            )
        return self._best(complete) or complete[-1]


def fetched_weights(place: str | Path, store: StoreRecipe, root: Path | None = None) -> Path:
    """The checkpoint that a path or URL of a run means, as a path (UserError, StoreFailure).

    What comes from a store is kept below `root`, such as a folder that several machines share; None: on this one.
    """
    if isinstance(place, Path) or not urls.is_url(place):
        return Path(place)
    copy = working_copy(place, store)
    donor = RunStore(place, store, (root or copy.parent) / f"{copy.name}-read")
    return donor.bring(donor.chosen()) or donor.folder


def _score(state: bytes) -> float | None:
    facts: dict[str, Any] = json.loads(state)
    return facts.get("r2")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes of this machine; a killed holder lets go."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode=0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
