"""What a run tells: progress on the terminal, `metrics.jsonl`, TensorBoard.

Progress goes to stderr so that stdout stays for results: a live bar with rate and time left on a
terminal, a plain line now and then elsewhere (a batch system's log is no place for carriage returns).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")

PLAIN_LINE_EVERY_S = 10.0


def track(items: Iterable[Item], *, total: int, label: str, unit: str = "tiles") -> Iterator[Item]:
    """Pass `items` through while showing how many of `total` are done, how fast, and the time left."""
    with Progress(total, label, unit) as progress:
        for item in items:
            yield item
            progress.advance()


class Progress:
    """A progress display; see `track` for the usual way to use it."""

    def __init__(
        self, total: int, label: str, unit: str = "tiles", start: int = 0, silent: bool = False
    ) -> None:
        self.total, self.label, self.unit, self.silent = total, label, unit, silent
        self.done = self._start = start
        self._began = self._said = time.monotonic()
        self._note = ""
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and not self.silent:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(f"{{task.fields[rate]}} {self.unit}/s"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.label, total=self.total or None, completed=self._start, rate="-", note=""
            )
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more as done; `note` is shown behind the rate."""
        self.done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=f"{self.rate():.3g}", note=self._note)
        elif not self.silent and time.monotonic() - self._said >= PLAIN_LINE_EVERY_S:
            self._said = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def rate(self) -> float:
        """Items per second since the start."""
        return (self.done - self._start) / max(time.monotonic() - self._began, 1e-9)

    def _line(self) -> str:
        rate = self.rate()
        left = (
            f", {(self.total - self.done) / rate:.0f} s left" if rate > 0 and self.done < self.total else ""
        )
        note = f"; {self._note}" if self._note else ""
        count = f"{self.done}/{self.total}" if self.total else str(self.done)  # 0: the clock decides
        return f"{self.label}: {count} {self.unit}, {rate:.3g} {self.unit}/s{left}{note}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and not self.silent:
            print(self._line(), file=sys.stderr, flush=True)


class MetricsLog:
    """`metrics.jsonl` and `validation.jsonl` of a run folder, and TensorBoard beside them; rank 0 alone writes.

    Lines of steps after `step`, left by a run that was killed after its last checkpoint, are dropped at
    the start: going on writes them again.
    """

    def __init__(self, run: Path, step: int, tensorboard: bool) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self._files = {name: run / f"{name}.jsonl" for name in ("metrics", "validation")}
        for path in self._files.values():
            keep_until(path, step)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, line: dict[str, Any]) -> None:
        """Append one object, with `step` in it, to `metrics` or `validation`, and flush it."""
        with self._files[kind].open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(f"{kind}/{name}", value, line["step"])

    def picture(self, name: str, image: Any, step: int) -> None:
        """Show an image, uint8 [H, W, 3], in TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._board is not None:
            self._board.close()


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of a file of JSON objects that are of steps after `step`, or not whole."""
    if not path.exists():
        return
    lines = path.read_text().splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines):
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the half line of a killed run
