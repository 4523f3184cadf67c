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

    def __init__(self, total: int, label: str, unit: str = "tiles", start: int = 0) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done = self._start = start
        self._began = self._said = time.monotonic()
        self._note = ""
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
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
            self._task = self._bar.add_task(self.label, total=self.total, completed=self._start, rate="-", note="")
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more as done; `note` is shown behind the rate."""
        self.done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=f"{self.rate():.3g}", note=self._note)
        elif time.monotonic() - self._said >= PLAIN_LINE_EVERY_S:
            self._said = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def rate(self) -> float:
        """Items per second since the start."""
        return (self.done - self._start) / max(time.monotonic() - self._began, 1e-9)

    def _line(self) -> str:
        rate = self.rate()
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate > 0 and self.done < self.total else ""
        note = f"; {self._note}" if self._note else ""
        return f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.3g} {self.unit}/s{left}{note}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            print(self._line(), file=sys.stderr, flush=True)
