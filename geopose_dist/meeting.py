"""Ranks that have met, before there is a process group: small JSON through the rendezvous' store.

A collective has a clock: who downloads shards for an hour would be taken for dead. Here a rank that works
shows signs of life, and only one that shows none for `silent_s` is lost, named with its host. Nothing of NCCL or gloo
is touched, so ranks with different versions of them can still say so. `agree` is the one exchange: every rank
says what it has, rank 0 judges, and all get the judgement, or the same mistake.
"""

from __future__ import annotations

import contextlib
import json
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist

from geopose_dist.errors import FinishedWithFailures, LostPeer, Preempted, UserError

BEAT_S = 5.0
"""Longest pause between two signs of life."""
POLL_S = 0.5
"""Longest pause between two looks at the store."""
READ_S = 10.0
"""How long rank 0, with which the store may go, waits for the others to have read why it leaves."""
READ_BY_SOME_S = 1.0
"""The same where not all of them are there to read it."""


class Meeting:
    """The ranks of a job before their process group; a world of one meets nobody and needs no store.

    Attributes:
        host: name of this machine.
        stopped: why this process was asked to stop; empty if it was not.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Any = None,
        silent_s: float = 600.0,
        stopped: Callable[[], str] = lambda: "",
    ) -> None:
        self.rank, self.size, self.silent_s, self.stopped = rank, size, silent_s, stopped
        self.host = platform.node()
        self._store = store
        if size > 1:
            store.set(f"host/{rank}", self.host)

    def agree(self, topic: str, mine: Callable[[], Any], judge: Callable[[list[Any]], Any]) -> Any:
        """What rank 0's `judge` makes of the ranks' values, in the order of ranks; alike on all of them.

        A UserError of any rank, or of `judge`, is every rank's; so is the end of a rank for another reason.
        `mine` may take as long as it needs.
        """
        if self.size == 1:
            return judge([mine()])
        own: Exception | None = None
        try:
            with self._alive(topic):
                try:
                    said: dict[str, Any] = {"value": mine()}
                except Exception as error:
                    own, said = error, _reason(error)
                self._store.set(f"{topic}/{self.rank}", json.dumps(said))
                verdict = self._verdict(topic, judge)
        except dist.DistError as error:
            raise LostPeer(
                f"rank {self.rank} on {self.host}: rank 0, through which the ranks meet, is gone; run the same command "
                "again"
            ) from error
        if "value" in verdict:
            return verdict["value"]
        self._part(topic, READ_BY_SOME_S if verdict.keys() & {"lost", "stopped"} else READ_S)
        if own is not None and not isinstance(own, UserError):
            raise own
        raise self._error(verdict)

    def _verdict(self, topic: str, judge: Callable[[list[Any]], Any]) -> dict[str, Any]:
        key = f"{topic}/verdict"
        if self.rank != 0:
            self._wait(topic, 0, key)
            verdict: dict[str, Any] = json.loads(self._store.get(key))
            return verdict
        said = []
        try:
            for rank in range(self.size):
                self._wait(topic, rank, f"{topic}/{rank}")
                said.append(json.loads(self._store.get(f"{topic}/{rank}")))
        except Preempted as stop:
            verdict = {"lost" if isinstance(stop, LostPeer) else "stopped": str(stop)}
        else:
            verdict = self._judged(said, judge)
        self._store.set(key, json.dumps(verdict))
        return verdict

    def _judged(self, said: Sequence[dict[str, Any]], judge: Callable[[list[Any]], Any]) -> dict[str, Any]:
        for kind in ("wrong", "failed", "stopped"):
            told = {rank: one[kind] for rank, one in enumerate(said) if kind in one}
            if told:
                return {kind: self.told_by(told)}
        try:
            return {"value": judge([one["value"] for one in said])}
        except UserError as error:
            return {"wrong": str(error)}

    def told_by(self, told: dict[int, str]) -> str:
        """Sentences by rank as one text; what all ranks say needs no names."""
        by_sentence: dict[str, list[int]] = {}
        for rank, sentence in told.items():
            by_sentence.setdefault(sentence, []).append(rank)
        if len(by_sentence) == 1 and len(told) == self.size:
            return next(iter(by_sentence))
        return "\n  ".join(f"{self.names(ranks)}: {sentence}" for sentence, ranks in by_sentence.items())

    def names(self, ranks: Sequence[int]) -> str:
        """`rank 3 on host b`, or the first of several ranks and how many more."""
        more = f" (and {len(ranks) - 1} more)" if len(ranks) > 1 else ""
        return f"rank {ranks[0]} on {self.host_of(ranks[0])}{more}"

    def host_of(self, rank: int) -> str:
        """Name of a rank's machine, as far as it has said it."""
        if self.size == 1 or rank == self.rank:
            return self.host
        known = self._store.check([f"host/{rank}"])
        return self._store.get(f"host/{rank}").decode() if known else "a host that never came"

    def _wait(self, topic: str, rank: int, key: str) -> None:
        """Until `key` is there, which `rank` will write (LostPeer: it gives no sign; Preempted)."""
        pause_s, beat, since = 0.01, -1, time.monotonic()
        while not self._store.check([key]):
            if self.stopped():
                raise Preempted(
                    f"stopped by {self.stopped()} before the first step; run the same command again"
                )
            now = self._store.add(f"{topic}/beat/{rank}", 0)
            if now != beat:
                beat, since = now, time.monotonic()
            elif time.monotonic() - since > self.silent_s:
                raise LostPeer(
                    f"{self.names([rank])} has given no sign for {self.silent_s:g} s (timeout_s) before the first "
                    f"step, at: {topic}; look there, then run the same command again"
                )
            threading.Event().wait(pause_s)
            pause_s = min(2 * pause_s, POLL_S)

    @contextlib.contextmanager
    def _alive(self, topic: str) -> Iterator[None]:
        """Give signs of life while the block runs."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(min(BEAT_S, self.silent_s / 8)):
                try:
                    self._store.add(f"{topic}/beat/{self.rank}", 1)
                except dist.DistError:
                    return  # whoever waits hears of it

        thread = threading.Thread(target=beat, name="alive", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _part(self, topic: str, wait_s: float) -> None:
        """Leave together: rank 0, whose end may be the store's, goes last."""
        try:
            self._store.add(f"{topic}/read", 1)
            until = time.monotonic() + wait_s
            while self.rank == 0 and time.monotonic() < until:
                if self._store.add(f"{topic}/read", 0) >= self.size:
                    return
                threading.Event().wait(0.02)
        except dist.DistError:
            return

    def _error(self, verdict: dict[str, Any]) -> Exception:
        if "wrong" in verdict:
            error = UserError(verdict["wrong"])
            error.said = self.rank != 0
            return error
        if "failed" in verdict:
            return FinishedWithFailures(verdict["failed"])
        return LostPeer(verdict["lost"]) if "lost" in verdict else Preempted(verdict["stopped"])


def _reason(error: Exception) -> dict[str, str]:
    if isinstance(error, UserError):
        return {"wrong": str(error)}
    if isinstance(error, Preempted):
        return {"stopped": str(error)}
    return {"failed": str(error) if isinstance(error, FinishedWithFailures) else type(error).__name__}
