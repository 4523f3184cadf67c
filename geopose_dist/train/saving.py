"""Writing checkpoints while training goes on.

A save copies everything to host memory first (page-locked beside a GPU, kept for the next save), which is all
that training waits for; a thread then writes, fsyncs and renames, and uploads if the run is kept in a store. One
save is in flight at most: the next one waits for it. What goes wrong in the thread is raised at the next step,
but for an outage of a store, which costs safety and no results: the next save tries again. Memory for it: the
size of a checkpoint.
"""

from __future__ import annotations

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geopose_dist.data.stores import StoreFailure
from geopose_dist.model.run_store import RunStore
from geopose_dist.train import checkpoint
from geopose_dist.train.checkpoint import Progress, Snapshot
from geopose_dist.train.recipe import TrainRecipe


class Writer:
    """Writes the checkpoints of a run into its folder, and removes those that are too old.

    Attributes:
        last_step: step of the newest save that was begun.
    """

    def __init__(self, run: Path, recipe: TrainRecipe, store: RunStore | None = None) -> None:
        self.run, self.recipe, self.store = run, recipe, store
        self.last_step: int | None = None
        self._host = HostCopy()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(self, progress: Progress, snapshot: Snapshot, *, wait: bool) -> None:
        """Begin to write a checkpoint of this moment; with `wait`, or if writing is not in the background, end it."""
        self.finish()
        held = self._host.take(snapshot)
        self.last_step = progress.step
        self._writing = self._thread.submit(self._write, progress, held, wait)
        if wait or not self.recipe.checkpoint.asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written, and raise what went wrong."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def check(self) -> None:
        """Raise what went wrong in the background since the last look; never waits."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def close(self) -> None:
        """Let the checkpoint in flight become whole, whatever ends the run."""
        self._thread.shutdown()

    def _write(self, progress: Progress, snapshot: Snapshot, is_wanted_now: bool) -> None:
        folder = checkpoint.save(self.run, self.recipe, progress, snapshot)
        keep = self.recipe.checkpoint.keep
        if self.store is None:
            checkpoint.prune(self.run, keep)
            return
        checkpoint.prune(self.run, 1)  # the store has the others
        try:
            self.store.save(folder, keep)
        except StoreFailure as error:
            if is_wanted_now:
                raise
            print(
                f"step {progress.step} is not saved: {error}; training goes on, and the next save tries again",
                file=sys.stderr,
                flush=True,
            )


class HostCopy:
    """Copies of a snapshot in host memory that no later step can change.

    The copy of a GPU's tensor goes to page-locked memory that the next snapshot uses again: its tensors must
    have been written by then.
    """

    def __init__(self) -> None:
        self._pinned: dict[str, Tensor] = {}

    def take(self, snapshot: Snapshot) -> Snapshot:
        """A copy of `snapshot`; waits until the device has computed it and it is here."""
        copied = Snapshot(**{name: self._copied(value, name) for name, value in vars(snapshot).items()})
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        return copied

    def _copied(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value.detach(), name)
        if isinstance(value, dict):
            return {key: self._copied(item, f"{name}/{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copied(item, f"{name}/{i}") for i, item in enumerate(value))
        return value

    def _tensor(self, value: Tensor, name: str) -> Tensor:
        if value.device.type != "cuda":
            return value.clone()
        host = self._pinned.get(name)
        if host is None or host.shape != value.shape or host.dtype != value.dtype:
            host = torch.empty_like(value, device="cpu", pin_memory=True)
            self._pinned[name] = host
        return host.copy_(value, non_blocking=True)
