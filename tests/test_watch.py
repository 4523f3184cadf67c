"""What ranks tell each other when one of them is lost: two ranks of one process around one store."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from geopose_dist.errors import FinishedWithFailures, LostPeer, UserError
from geopose_dist.runtime import World
from geopose_dist.train.watch import Watch

HOSTS = ("a", "a", "b", "b", "c")


def ranks(count: int, timeout_s: float = 1.0) -> list[Watch]:
    """The watches of so many ranks."""
    store, device = dist.HashStore(), torch.device("cpu")
    worlds = [World(rank, count, 0, 1, device, store=store, hosts=HOSTS[:count]) for rank in range(count)]
    return [Watch(world, timeout_s, "runs/of-a-test") for world in worlds]


def test_ranks_are_named_with_their_machines_if_there_are_several() -> None:
    device = torch.device("cpu")
    here, there = World(0, 5, 0, 1, device, hosts=("a",) * 5), World(0, 5, 0, 1, device, hosts=HOSTS)
    assert here.names([3]) == "rank 3"
    assert here.names([0, 1, 2, 4]) == "ranks 0-2, 4"
    assert there.names([0, 1, 2, 4]) == "ranks 0-1 on a, 2 on b, 4 on c"
    assert World(0, 1, 0, 1, device).names([0]) == "rank 0"


def test_who_gives_no_answer_is_named_with_its_host() -> None:
    first, second, third = ranks(3)
    first.at("step 4: here")
    second.at("step 5: there")
    lost: list[Exception] = []
    thread = threading.Thread(target=lambda: lost.append(second._lost()))
    thread.start()
    error = first._lost()
    thread.join()
    assert isinstance(error, LostPeer)
    assert "rank 0 on a lost its peers after waiting 0 s (timeout_s 1): rank 2 on b gave no answer" in str(
        error
    )
    assert "rank 0 on a at step 4: here; rank 1 on a at step 5: there" in str(error)
    assert "rank 2 on b gave no answer" in str(lost[0])
    del third


def test_where_a_rank_was_slow_once_is_no_answer() -> None:
    """It published its place while it was slow, went on, and was killed: nobody says that it answers."""
    first, second = ranks(2, timeout_s=0.8)
    second.at("step 3: waiting for data")
    thread = threading.Thread(target=second._look, daemon=True)
    thread.start()
    assert second._heard("place/1", 10) == "step 3: waiting for data"
    second.at("step 4: agreeing to go on")
    second._end.set()
    thread.join()
    first.at("step 4: agreeing to go on")
    assert "rank 1 gave no answer; rank 0 at step 4" in str(first._lost()).replace(" on a", "")


def test_a_rank_that_ended_with_an_error_is_no_lost_one() -> None:
    first, second = ranks(2)
    second._say("ended/1", "ZeroDivisionError")
    error = first._lost()
    assert isinstance(error, FinishedWithFailures)
    assert "rank 1 (ZeroDivisionError) ended with an error of its own" in str(error)


def test_rank_0_keeps_the_store_until_its_mistake_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 has found the same mistake and not yet read that rank 0 said it: without the store, both would say it."""
    monkeypatch.setattr(dist, "destroy_process_group", lambda group: None)
    first, second = ranks(2)
    second._say("ended/1", "the mistake")
    first._thread = threading.Thread(target=lambda: None)
    first._thread.start()
    leaving = threading.Thread(target=first.__exit__, args=(UserError, UserError("the mistake"), None))
    leaving.start()
    time.sleep(0.3)  # it must not leave, so there is nothing to wait on
    assert leaving.is_alive()
    error = UserError("the mistake")
    second._say_once(error)
    assert error.said
    second._say("read/1", "yes")
    leaving.join(10)
    assert not leaving.is_alive()
