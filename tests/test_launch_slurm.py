"""launch/slurm.sbatch on a real Slurm: preempted, signalled, queued again, and the same weights in the end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import slurm as slurm_of_test
import torch
from slurm import Slurm

SBATCH = runs.ROOT / "launch" / "slurm.sbatch"
LENGTH = 16
pytestmark = pytest.mark.multihost
WORDS = (
    *(word for word in runs.TINY if not word.startswith("--data.workers")),
    "--data.workers=1",  # loader processes get Slurm's signals, too
    "--data.global-batch=4",
    "--data.micro-batch=2",
    "--data.crop-px=64",
    "--validation.every-epochs=0",
    f"--length={LENGTH} steps",
)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if reason := slurm_of_test.why_not():
        pytest.skip(reason)
    with slurm_of_test.local_slurm() as running:
        yield running


def tell_ranks(out: Path, number: signal.Signals) -> None:
    """Send a signal to the ranks of the run in `out`, wherever they were started."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # a process that has just ended
            is_run = f"--out={out}".encode() in (folder / "cmdline").read_bytes().split(b"\0")
            if is_run and b"\0RANK=" in (folder / "environ").read_bytes():
                pids.append(int(folder.name))
    assert len(pids) == 2, pids
    for pid in pids:
        os.kill(pid, number)


@pytest.mark.slow
def test_preempted_and_signalled_it_queues_itself_again_to_the_same_weights(
    slurm: Slurm, train_shards: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    words = [*WORDS, f"--data.shards={train_shards}"]
    variables = {"PYTHON": sys.executable, "NPROC": "2", "OMP_NUM_THREADS": "1"}
    # Submitted from another folder, as people do; Slurm runs a copy of the script.
    variables["CHECKOUT"] = str(runs.ROOT)
    place = ("--chdir", str(tmp_path), "--output", str(log), "--partition", "low")
    job = slurm.submit(*place, SBATCH, *words, f"--out={out}", **variables)

    def said() -> str:
        return log.read_text() if log.exists() else ""

    def stopped(times: int) -> bool:
        facts = slurm.job(job)
        assert facts["JobState"] != "COMPLETED", f"too fast to be stopped\n{said()}"
        assert facts["JobState"] != "FAILED", said()
        return facts["JobState"] == "PENDING" and facts["Restarts"] == str(times)

    # A job of a partition that preempts: SIGCONT and SIGTERM to all processes of the step.
    slurm.wait_for(lambda: runs.logged(out) >= 2, "the run takes steps")
    tell_ranks(out, signal.SIGSTOP)  # or they would be done before Slurm gets there
    urgent = slurm.submit("--partition", "high", "--output", "/dev/null", "--wrap", "true")
    slurm.wait_for(lambda: stopped(1), "the preempted job is queued again")
    slurm.wait_for(lambda: slurm.job(urgent)["JobState"] == "COMPLETED", "the urgent job is done")
    taken = runs.logged(out)
    assert 2 <= taken < LENGTH
    # What comes ahead of the time limit: USR2 to the batch script alone.
    slurm.start_soon(job)
    slurm.wait_for(lambda: runs.logged(out) >= taken + 2, "the run goes on")
    tell_ranks(out, signal.SIGSTOP)
    slurm.call("scancel", "--batch", "--signal=USR2", job)
    # As itself by way of srun, or as SIGTERM by way of the script: whichever is first.
    slurm.wait_for(
        lambda: said().count("death signal, shutting down") == 2, "the signal has reached torchrun"
    )
    tell_ranks(out, signal.SIGCONT)
    slurm.wait_for(lambda: stopped(2), "the signalled job is queued again")
    assert taken + 2 <= runs.logged(out) < LENGTH
    slurm.start_soon(job)
    slurm.wait_for(lambda: slurm.job(job)["JobState"] == "COMPLETED", "the run is done")
    assert slurm.job(job)["ExitCode"] == "0:0"
    assert said().count("preempted after saving in") == 2
    assert said().count("goes on after step") == 2
    assert "Traceback" not in said()

    whole = tmp_path / "whole"
    command = ["train", "--config=smoke", *words, f"--out={whole}"]  # what torchrun.sh would say
    code, told = runs.finish(runs.launch(command, 2))
    assert code == 0, told
    assert runs.numbers(out) == runs.numbers(whole)
    one, two = runs.final_weights(out), runs.final_weights(whole)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "words"),
    [(2, "a mistake to mend"), (75, "stopped after 0 requeues; submit the same command to go on")],
)
def test_what_is_not_queued_again(slurm: Slurm, tmp_path: Path, code: int, words: str) -> None:
    """A mistake would only be repeated; and somebody may have set a limit."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(f"#!/bin/sh\necho a mistake to mend\nexit {code}\n")  # in place of torchrun
    python.chmod(0o755)
    variables = {"PYTHON": str(python), "NPROC": "1", "CHECKOUT": str(runs.ROOT), "MAX_REQUEUES": "0"}
    train = ("--data.shards", "s", "--out", str(tmp_path / "run"))
    job = slurm.submit("--output", str(log), SBATCH, *train, **variables)
    slurm.wait_for(lambda: slurm.job(job)["JobState"] == "FAILED", "the job has failed")
    assert slurm.job(job)["ExitCode"] == f"{code}:0"
    assert slurm.job(job)["Restarts"] == "0"
    assert words in log.read_text()
