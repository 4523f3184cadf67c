"""Ranks agree before there is a process group: real threads over torch's own in-memory store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from geopose_dist import meeting
from geopose_dist.errors import FinishedWithFailures, LostPeer, Preempted, UserError
from geopose_dist.meeting import Meeting


@pytest.fixture(autouse=True)
def no_long_goodbyes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "READ_BY_SOME_S", 0.1)


def meet(size: int, work: Callable[[Meeting], Any], silent_s: float = 20.0) -> list[Any]:
    """What `work` gives on each rank: its value, or its exception."""
    store = dist.HashStore()

    def one(rank: int) -> Any:
        here = Meeting(rank, size, dist.PrefixStore("meeting", store), silent_s)
        here.host = f"host{rank}"
        store.set(f"meeting/host/{rank}", here.host)
        try:
            return work(here)
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(one, range(size)))


def test_rank_0_judges_for_all() -> None:
    assert meet(3, lambda m: m.agree("sum", lambda: m.rank + 1, sum)) == [6, 6, 6]


def test_alone_there_is_nothing_to_exchange() -> None:
    assert Meeting(0, 1).agree("x", lambda: {"a": 1}, lambda said: said[0]) == {"a": 1}
    with pytest.raises(UserError, match="mine"):
        Meeting(0, 1).agree("x", lambda: raise_(UserError("mine")), lambda said: said[0])


def raise_(error: Exception) -> Any:
    raise error


def test_one_ranks_mistake_is_everybodys_and_names_it() -> None:
    def work(meeting: Meeting) -> Any:
        return meeting.agree(
            "x", lambda: raise_(UserError("no disk")) if meeting.rank == 2 else 1, lambda said: said
        )

    ends = meet(3, work)
    assert [type(end) for end in ends] == [UserError] * 3
    assert {str(end) for end in ends} == {"rank 2 on host2: no disk"}
    assert [end.said for end in ends] == [False, True, True]  # rank 0 says it once for all


def test_everybodys_mistake_needs_no_names() -> None:
    ends = meet(2, lambda m: m.agree("x", lambda: raise_(UserError("no shards")), lambda said: said))
    assert {str(end) for end in ends} == {"no shards"}


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (Preempted("stopped"), Preempted, "rank 1 on host1: stopped"),
        (ZeroDivisionError("of this test"), FinishedWithFailures, "rank 1 on host1: ZeroDivisionError"),
    ],
)
def test_an_end_for_another_reason_ends_all(error: Exception, kind: type, told: str) -> None:
    ends = meet(2, lambda m: m.agree("x", lambda: raise_(error) if m.rank else 0, lambda said: said))
    assert ends[1] is error
    assert type(ends[0]) is kind
    assert str(ends[0]) == told


@pytest.mark.parametrize("slow", [0, 1])
def test_who_works_for_long_is_not_lost(slow: int) -> None:
    """More than twice the silence that is allowed, but with signs of life."""

    def work(meeting: Meeting) -> Any:
        return meeting.agree(
            "staging", lambda: time.sleep(1.5 * (meeting.rank == slow)) or meeting.rank, lambda said: said
        )

    assert meet(2, work, silent_s=0.6) == [[0, 1], [0, 1]]


@pytest.mark.parametrize("gone", [0, 1])
def test_who_gives_no_sign_is_named(gone: int) -> None:
    def work(meeting: Meeting) -> Any:
        return None if meeting.rank == gone else meeting.agree("staging", lambda: 0, lambda said: said)

    ends = meet(3, work, silent_s=0.6)
    for rank in {0, 1, 2} - {gone}:
        assert isinstance(ends[rank], LostPeer)
        assert f"rank {gone} on host{gone} has given no sign" in str(ends[rank])
        assert "at: staging" in str(ends[rank])


def test_who_is_asked_to_stop_leaves_the_wait() -> None:
    store = dist.HashStore()
    asked = threading.Event()
    here = Meeting(0, 2, store, 60.0, stopped=lambda: "SIGTERM" if asked.is_set() else "")
    threading.Timer(0.2, asked.set).start()
    with pytest.raises(Preempted, match="stopped by SIGTERM"):
        here.agree("x", lambda: 0, lambda said: said)
