"""A work list over actors that may die: bounded in flight, tried again, and set aside by name in the end.

Ray Core actors and not Ray Data: one image in, two files out needs no data frame, and Ray Data would cost
two packages more, a quarter of a hand loop's speed, and per-file names that it deprecates (ray#64032, 44905).
Ray's own retries are not used: when a node dies they are spent within seconds, before the node is declared
dead. Here an item whose actor died or whose work raised is tried again alone on an actor; after `attempts`
tries its parts are tried alone, twice each, and what still fails is handed back as `SetAside`.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

from geopose_dist.errors import FinishedWithFailures
from geopose_dist.pool import Actor, Actors, Make, died

START_TIMEOUT_S = 300.0
"""If no actor is up for so long, the cluster has no place for one."""


@dataclass(frozen=True)
class SetAside:
    """An item that was tried often enough, and why it failed the last time."""

    item: Any
    reason: str


@dataclass
class _Entry:
    item: Any
    failed: int = 0
    is_part: bool = False


@dataclass
class _Slot:
    actor: Actor
    running: dict[Future[Any], tuple[_Entry, float]] = field(default_factory=dict)
    """Entries, and when each of them is overdue."""
    up: bool = False
    alone: bool = False


class Dispatch:
    """One run over a work list; iterate `results` once."""

    def __init__(
        self,
        actors: Actors,
        make: Make,
        *,
        count: int,
        cpus: int,
        gpus: int,
        in_flight: int,
        attempts: int,
        timeout_s: float,
        split: Callable[[Any], list[Any]],
    ) -> None:
        """Start `count` actors, each reserving `cpus` and `gpus` and given `in_flight` items at a time.

        Args:
            actors: where they start.
            make: makes an actor's worker.
            count: number of actors.
            cpus, gpus: what each reserves.
            in_flight: items per actor, so that some are read and written while the network works on another.
            attempts: how often an item is tried before its parts are.
            timeout_s: for an item; those before it on the same actor may take as long each.
            split: cuts an item into its parts.
        """
        self._actors, self._make, self._cpus, self._gpus = actors, make, cpus, gpus
        self._attempts, self._timeout_s, self._split = attempts, timeout_s, split
        self._in_flight = in_flight
        self._queue: deque[_Entry] = deque()
        self._suspects: deque[_Entry] = deque()
        self._numbers = itertools.count()
        self._failures_in_a_row = self._starts_failed = 0
        self._set_aside: list[SetAside] = []
        self._last_reason = ""
        self._waiting_since = time.monotonic()
        self._slots = [self._new_slot() for _ in range(count)]

    def _new_slot(self) -> _Slot:
        number = next(self._numbers)
        start, needs = self._actors.start, {"cpus": self._cpus, "gpus": self._gpus}
        return _Slot(start(self._make, number, **needs, in_flight=self._in_flight))

    def results(self, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """(item, answer) in the order of completion; the answer is a `SetAside` for what failed for good.

        Raises FinishedWithFailures if no actor can be started, or if nothing at all succeeds.
        """
        self._queue.extend(_Entry(item) for item in items)
        while self._queue or self._suspects or any(slot.running for slot in self._slots):
            for number, slot in enumerate(self._slots):
                self._feed(slot, draining=number < len(self._suspects))
            pending = [future for slot in self._slots for future in slot.running]
            pending += [slot.actor.ready for slot in self._slots if not slot.up]
            wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
            for number, slot in enumerate(self._slots):
                yield from self._collect(slot)
                if not self._alive(slot):
                    slot.actor.kill()
                    self._slots[number] = self._new_slot()
            for aside in self._set_aside:
                yield aside.item, aside
            self._set_aside.clear()
            self._check_progress()

    def _feed(self, slot: _Slot, *, draining: bool) -> None:
        """Give an actor what it may have: a suspect only alone, and nothing new while one waits for it."""
        if not slot.up or slot.alone:
            return
        if self._suspects and not slot.running:
            slot.alone = True
            self._submit(slot, self._suspects.popleft())
        while self._queue and not slot.alone and not draining and len(slot.running) < self._in_flight:
            self._submit(slot, self._queue.popleft())

    def _submit(self, slot: _Slot, entry: _Entry) -> None:
        overdue = time.monotonic() + self._timeout_s * (len(slot.running) + 1)
        slot.running[slot.actor.submit(entry.item)] = entry, overdue

    def _collect(self, slot: _Slot) -> Iterator[tuple[Any, Any]]:
        for future in [future for future in slot.running if future.done()]:
            error = future.exception()
            if error is not None and died(error):
                return  # `_alive` deals with the whole slot
            entry, _ = slot.running.pop(future)
            slot.alone = False
            if error is None:
                self._failures_in_a_row = 0
                yield entry.item, future.result()
            else:
                self._failures_in_a_row += 1
                self._failed(entry, f"{type(error).__name__}: {_last_line(error)}")

    def _alive(self, slot: _Slot) -> bool:
        """Whether to keep this actor; if not, what it was doing goes back to the list."""
        reason = ""
        if not slot.up and slot.actor.ready.done():
            error = slot.actor.ready.exception()
            slot.up = error is None
            if error is not None:
                reason = f"an actor could not start: {_last_line(error)}"
                self._starts_failed += 1
                if self._starts_failed >= self._attempts:
                    raise FinishedWithFailures(f"{reason}; nothing can be done without one") from error
            else:
                self._starts_failed = 0
        for future, (_, overdue) in slot.running.items():
            lost = future.exception() if future.done() else None
            if lost is not None and died(lost):
                reason = f"its actor died ({_last_line(lost)})"
            elif not future.done() and time.monotonic() > overdue:
                reason = f"its actor did not answer within {self._timeout_s:g} s"
        if not reason:
            return True
        self._failures_in_a_row += 1  # one, however many items it had
        for entry, _ in slot.running.values():
            self._failed(entry, reason)
        return False

    def _failed(self, entry: _Entry, reason: str) -> None:
        entry.failed += 1
        self._last_reason = reason
        if entry.failed < (min(2, self._attempts) if entry.is_part else self._attempts):
            self._suspects.append(entry)
            return
        parts = [] if entry.is_part else self._split(entry.item)
        if len(parts) > 1:
            self._suspects.extend(_Entry(part, is_part=True) for part in parts)
        else:
            self._set_aside.append(SetAside(entry.item, reason))

    def _check_progress(self) -> None:
        if any(slot.up for slot in self._slots):
            self._waiting_since = time.monotonic()
        elif time.monotonic() - self._waiting_since > START_TIMEOUT_S:
            raise FinishedWithFailures(
                f"no actor could be started within {START_TIMEOUT_S:.0f} s; the cluster has no room for "
                f"one with {self._cpus} CPUs and {self._gpus} GPUs; add nodes, or give fewer --threads"
            )
        if self._failures_in_a_row > 8 * self._attempts + 4 * len(self._slots):
            raise FinishedWithFailures(
                f"stopped after {self._failures_in_a_row} failures in a row, the last: {self._last_reason}; what is "
                "finished is kept; mend the cause and run the same command again"
            )


def _last_line(error: BaseException) -> str:
    """What an exception says, without the remote traceback that Ray puts before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    remote = type(error).__name__.startswith("RayTaskError") or "creation task" in lines[0]
    return lines[-1] if remote else lines[0]
