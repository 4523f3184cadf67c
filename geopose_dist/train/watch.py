"""Who waits where, told when a rank does not come.

Each rank notes where it is (`at`). When a collective fails, or nothing moves for `timeout_s`, every rank that
still can writes its place into the store of the rendezvous, reads those of the others, and says one sentence:
which ranks are where, and which gave no answer. A rank that ends with an error of its own writes that, so
that the others do not take it for lost and try again for ever.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch.distributed as dist

from geopose_dist.errors import FinishedWithFailures, LostPeer, Preempted, UserError
from geopose_dist.runtime import World

GRACE_S = 5.0
"""How long the ranks that are left wait for each other's places, at most."""
POLL_S = 0.05
SAME_S = 15.0
"""How long a rank that found a mistake waits for rank 0 to have found the same, and said it for all."""
COLLECTIVE = re.compile(r"gloo|Connection (closed|reset) by peer|NCCL|Broken pipe")
"""What the errors of failed collectives say; gloo raises plain RuntimeErrors."""


class Watch:
    """Context manager around the work of a rank; turns a failed collective into a sentence and `LostPeer`.

    Attributes:
        on_lost: called on the first of the ranks that are left, once a peer is known to be lost.
    """

    def __init__(self, world: World, timeout_s: float, out: str) -> None:
        self.world, self.timeout_s, self.out = world, timeout_s, out
        self.on_lost: Callable[[], None] = lambda: None
        self._place, self._since, self._told = "the start", time.monotonic(), ""
        self._store_gone = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, place: str) -> None:
        """Note where this rank is, for those who may come to wait for it."""
        self._place, self._since = place, time.monotonic()
        if self._told:  # it was slow, and is not stuck: should it die later, this would look like an answer
            self._told = ""
            self._say(f"place/{self.world.rank}", "")

    def __enter__(self) -> Watch:
        if self.world.size > 1:
            self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        self._end.set()
        self._thread.join()
        if error is None or isinstance(error, Preempted):
            return
        if isinstance(error, RuntimeError) and COLLECTIVE.search(str(error)):
            raise self._lost() from error
        if isinstance(error, UserError):
            self._say_once(error)
        else:
            self._say(f"ended/{self.world.rank}", type(error).__name__)
        dist.destroy_process_group(self.world.control)  # wakes those who wait for this rank
        if self.world.is_first:
            wait_s = SAME_S if isinstance(error, UserError) else self._grace_s()
            self._keep_store(set(range(1, self.world.size)), wait_s)
        else:
            self._say(f"read/{self.world.rank}", "yes")

    def _say_once(self, error: UserError) -> None:
        """Most mistakes are found by all ranks alike: rank 0 says them, at once, before a peer's end ends it."""
        if self.world.is_first:
            print(f"geopose train: {error}", file=sys.stderr, flush=True)
            error.said = True
            self._say("ended/0", str(error))
        else:
            self._say(f"ended/{self.world.rank}", str(error))
            error.said = self._heard("ended/0", SAME_S) == str(error)

    def _look(self) -> None:
        """The thread: publish where this rank is stuck, and say it where nothing else will.

        A host that waits for its GPU hears nothing of a collective that hangs there until NCCL's watchdog ends
        the process without naming a place. Nothing is ended here: a long validation is no hang.
        """
        while not self._end.wait(self.timeout_s / 8):
            stuck_s = time.monotonic() - self._since
            if stuck_s > self.timeout_s / 2 and self._told != self._place:
                self._told = told = self._place
                self._say(f"place/{self.world.rank}", told)
                if self._place != told:  # it went on in this very moment
                    self._say(f"place/{self.world.rank}", "")
                if self.world.device.type == "cuda":
                    text = f"{self.world.names([self.world.rank])} has been at {told} for {stuck_s:.0f} s"
                    print(
                        f"geopose train: {text} (timeout_s {self.timeout_s:g})", file=sys.stderr, flush=True
                    )

    def _lost(self) -> LostPeer | FinishedWithFailures:
        """What to end with: a sentence about where everybody is."""
        waited_s = time.monotonic() - self._since
        self._say(f"place/{self.world.rank}", self._place)
        places, ended = self._ask()
        present = [rank for rank in range(self.world.size) if rank in places]
        if ended:
            who = ", ".join(f"rank {rank} ({ended[rank]})" for rank in sorted(ended))
            return FinishedWithFailures(
                f"rank {self.world.rank} leaves: {who} ended with an error of its own"
            )
        if present[0] == self.world.rank:
            self.on_lost()
        told = "; ".join(
            f"{self.world.names([r for r in present if places[r] == place])} at {place}"
            for place in dict.fromkeys(places[r] for r in present)
        )
        absent = [rank for rank in range(self.world.size) if rank not in places]
        if self._store_gone:
            silent = f"{self.world.names([0])}, through which ranks tell where they are, gave no answer"
        else:
            silent = f"{self.world.names(absent)} gave no answer" if absent else "all answer, but do not meet"
        who = self.world.names([self.world.rank])
        return LostPeer(
            f"{who} lost its peers after waiting {waited_s:.0f} s (timeout_s {self.timeout_s:g}): "
            f"{silent}; {told}; run the same command to go on from the last checkpoint in {self.out}"
        )

    def _ask(self) -> tuple[dict[int, str], dict[int, str]]:
        """Places, and errors, by rank, of those that answer in time.

        In a thread of its own: the store lives in rank 0, and asking a stopped one never returns.
        """
        places, ended = {self.world.rank: self._place}, dict[int, str]()

        def ask() -> None:
            until = time.monotonic() + self._grace_s()
            for rank in set(range(self.world.size)) - {self.world.rank}:
                if why := self._heard(f"ended/{rank}", 0.0):
                    ended[rank] = why
                elif place := self._heard(f"place/{rank}", until - time.monotonic()):
                    places[rank] = place
            self._say(f"read/{self.world.rank}", "yes")
            if self.world.is_first:
                self._keep_store(set(places) - {0}, self._grace_s())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join((2 if self.world.is_first else 1) * self._grace_s() + 1)
        self._store_gone |= asking.is_alive()
        return dict(places), dict(ended)

    def _keep_store(self, readers: set[int], wait_s: float) -> None:
        """Rank 0 holds the store: let the others read before it goes, those that end with an error, too."""
        until = time.monotonic() + wait_s
        for rank in readers:
            self._heard(f"read/{rank}", until - time.monotonic())

    def _grace_s(self) -> float:
        return min(GRACE_S, self.timeout_s)

    def _say(self, name: str, value: str) -> None:
        try:
            if not self._store_gone:
                self.world.store.set(name, value)
        except dist.DistError:
            self._store_gone = True  # with rank 0, which is what there is to tell

    def _heard(self, name: str, wait_s: float) -> str:
        """What is in the store under `name`, now or within `wait_s`; empty if nothing is.

        Asked for again and again, because torch writes a warning for every wait that ends without an answer.
        """
        until, pause = time.monotonic() + wait_s, threading.Event()
        try:
            while not self._store_gone:
                if self.world.store.check([name]) and (value := self.world.store.get(name).decode()):
                    return str(value)
                if time.monotonic() >= until:
                    break
                pause.wait(POLL_S)
        except dist.DistError:
            self._store_gone = True
        return ""
