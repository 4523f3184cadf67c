"""What bounds a prediction job: the networks, or the reading and writing around them.

Actors count the seconds of their network and of their hands (threads that decode, reduce, enlarge, encode and
write). Each report carries the counts so far with the actor's own clock, so the shares between an actor's first and
last report leave start, warm-up and the filling of the pipeline out, whatever the clocks of other machines say.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

BUSY = 0.85
"""What is busy for less of the time than this bounds nothing."""


@dataclass(frozen=True)
class Load:
    """An actor's counts at the end of an item.

    Attributes:
        actor: tells it from others.
        clock_s: of its machine.
        network_s: seconds in which its network was at work.
        hands_s: the same of its other threads, summed.
        hands: number of those.
    """

    actor: str
    clock_s: float
    network_s: float
    hands_s: float
    hands: int


class Stopwatch:
    """Counts one actor's seconds; threads may share it. A span counts in it while it still runs."""

    def __init__(self, hands: int) -> None:
        self._hands = hands
        self._actor = f"{socket.gethostname()}-{os.getpid()}-{id(self)}"
        self._lock = threading.Lock()
        self._done = {"network": 0.0, "hands": 0.0}
        self._running: dict[int, tuple[str, float]] = {}

    @contextlib.contextmanager
    def span(self, what: str) -> Iterator[None]:
        """Count the block as `network` or `hands`."""
        thread = threading.get_ident()
        with self._lock:
            self._running[thread] = what, time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                _, began = self._running.pop(thread)
                self._done[what] += time.monotonic() - began

    def load(self) -> Load:
        """The counts now."""
        with self._lock:
            now, counts = time.monotonic(), dict(self._done)
            for what, began in self._running.values():
                counts[what] += now - began
        return Load(self._actor, now, counts["network"], counts["hands"], self._hands)


class Loads:
    """First and last counts of every actor."""

    def __init__(self) -> None:
        self._first: dict[str, Load] = {}
        self._last: dict[str, Load] = {}

    def add(self, load: Load | None) -> None:
        """Take a report's counts in; reports may come out of order."""
        if load is None:
            return
        first, last = self._first.setdefault(load.actor, load), self._last.setdefault(load.actor, load)
        self._first[load.actor] = min(first, load, key=lambda one: one.clock_s)
        self._last[load.actor] = max(last, load, key=lambda one: one.clock_s)

    def shares(self) -> tuple[float, float] | None:
        """Shares of the time in which networks and hands were busy; None before any actor's second report."""
        pairs = [(self._first[actor], self._last[actor]) for actor in self._first]
        seconds = sum(last.clock_s - first.clock_s for first, last in pairs)
        hand_seconds = sum((last.clock_s - first.clock_s) * last.hands for first, last in pairs)
        if seconds <= 0:
            return None
        network = sum(last.network_s - first.network_s for first, last in pairs) / seconds
        hands = sum(last.hands_s - first.hands_s for first, last in pairs) / hand_seconds
        return min(network, 1.0), min(hands, 1.0)

    def bottleneck(self) -> tuple[str, float] | None:
        """What bounds the job, and the share of the time in which it was busy."""
        shares = self.shares()
        if shares is None:
            return None
        network, hands = shares
        if max(network, hands) < BUSY:
            return "neither network nor reading and writing", max(network, hands)
        return ("network", network) if network >= hands else ("reading and writing", hands)

    def facts(self) -> dict[str, object]:
        """The shares and the bottleneck for programs; None before there is anything to say."""
        network, hands = self.shares() or (None, None)
        found = self.bottleneck()
        return {
            "network_busy": network,
            "reading_and_writing_busy": hands,
            "bottleneck": found[0] if found else None,
        }

    def in_words(self) -> str:
        """One clause for people; empty before there is anything to say."""
        shares, found = self.shares(), self.bottleneck()
        if shares is None or found is None:
            return ""
        network, hands = shares
        said = f"network busy {network:.0%}, reading and writing {hands:.0%} of the time after warm-up: "
        if found[0] == "network":
            return said + "the network bounds this job"
        if found[0] == "reading and writing":
            return said + "reading and writing bound this job; more --threads (cores) would help"
        return said + "neither bounds this job; too few tiles to tell, a slow disk, or a busy machine"
