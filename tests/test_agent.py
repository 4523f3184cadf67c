"""torchrun with our agent: what it starts again, its exit codes, a rendezvous that is lost. Ranks are shell scripts."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousHandler
from torch.distributed.launcher import api as launcher

from geopose_dist import torchrun
from geopose_dist.agent import PatientRendezvous, is_mendable


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts back what torchrun changes of the process that it runs in."""
    monkeypatch.setattr(api, "_terminate_process_handler", api._terminate_process_handler)
    monkeypatch.setattr(launcher, "LocalElasticAgent", launcher.LocalElasticAgent)
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    kept = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def run(folder: Path, script: str, restarts: int = 1) -> tuple[int, int]:
    """Exit code of torchrun, and how often it started its only rank, which runs `script`."""
    path = folder / "rank.sh"
    path.write_text(f"#!/bin/sh\necho x >> {folder}/starts\n{script}\n")
    path.chmod(0o755)
    words = ["--standalone", "--nproc-per-node=1", f"--max-restarts={restarts}", "--no-python", str(path)]
    code = torchrun.main(words)
    return code, len((folder / "starts").read_text().split())


TRAINED = 'touch "$GEOPOSE_AGAIN_FILE"; '


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "code", "starts"),
    [
        ("exit 0", 0, 1),
        ("exit 1", 1, 1),  # an error comes again
        ("exit 2", 2, 1),
        (TRAINED + "exit 1", 1, 1),
        ("kill -SEGV $$", 1, 1),
        ("exit 75", 1, 2),  # nothing was trained in either start: no reason to queue it for ever
        (TRAINED + "exit 75", 75, 2),
        (TRAINED + "kill -KILL $$", 75, 2),
        (TRAINED + '[ "$(wc -l < starts)" = 2 ] || kill -KILL $$', 0, 2),
    ],
)
def test_what_is_started_again_and_the_exit_code(
    as_before: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, code: int, starts: int
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path, script) == (code, starts)
    assert "GEOPOSE_AGAIN_FILE" not in os.environ


def test_every_end_of_a_rank_is_worth_a_restart_or_not() -> None:
    assert [code for code in range(-20, 130) if is_mendable(code)] == [-15, -9, 75]


class Rendezvous:
    """Stands for torch's, behind a store that hangs, then fails."""

    def __init__(self) -> None:
        self.answers, self.asked, self.gone = 2, threading.Event(), threading.Event()

    def next_rendezvous(self) -> str:
        return "info"

    def num_nodes_waiting(self) -> int:
        self.asked.set()
        self.gone.wait(20)
        raise RendezvousConnectionError("cut")

    def shutdown(self) -> bool:
        self.gone.wait(20)
        return True


def test_a_lost_rendezvous_neither_stops_nor_hangs_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geopose_dist.agent.ASK_S", 0.01)
    monkeypatch.setattr("geopose_dist.agent.CLOSE_S", 0.2)
    monkeypatch.setattr("geopose_dist.agent.ANSWER_S", 0.2)
    inner: Any = Rendezvous()
    patient = PatientRendezvous(inner)
    assert isinstance(patient, RendezvousHandler)
    assert str(patient.next_rendezvous()) == "info"
    assert inner.asked.wait(10)
    began = time.monotonic()
    assert patient.num_nodes_waiting() == 0
    with pytest.raises(RendezvousConnectionError, match="no answer"):
        patient.next_rendezvous()
    assert not patient.shutdown()
    assert time.monotonic() - began < 5
    assert patient.lost
    inner.gone.set()
