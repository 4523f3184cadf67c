"""Training on two hosts that are disturbed: what a fixed and what an elastic number of nodes survives.

Hosts are network namespaces (tests/hosts.py), each with one core and one rank; the disturbances are real signals,
pulled cables and lost packets. One round of each kind is here, many of them in test_hosts_soak.py.
"""

from __future__ import annotations

import time
from pathlib import Path

import hosts
import nodes
import pytest
import runs

pytestmark = [pytest.mark.multihost, pytest.mark.slow]


def test_a_fixed_number_of_hosts_ends_with_75_and_goes_on(
    train_shards: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """A far and lossy link, a cable out for 5 s, a killed torchrun, a killed rank: the numbers of one quiet host."""
    out = tmp_path / "run"

    def job() -> nodes.Job:
        return nodes.Job(pair, train_shards, out, *runs.PLAIN, "--timeout-s=60")

    with hosts.two_far_hosts() as (first, second, cable):
        pair = (first, second)
        one = job()
        one.reach(1)
        cable.set(delay_ms=100, loss=0.01)
        one.reach(3)
        cable.set(delay_ms=0, loss=0)
        second.unplug()
        time.sleep(5)
        second.plug()
        one.reach(nodes.latest(out) + 2)
        one.nodes[1].kill_agent()
        assert [node.wait(60) for node in one.nodes] == [75, 75], one.said()
        assert (
            f"torchrun on {second.name} was ended by signal 9; its ranks save and leave" in one.nodes[1].said
        )
        assert f"stopped by a request to rank 1 on {second.name} after step" in one.nodes[0].said
        assert not second.processes()

        two = job()
        two.reach(nodes.latest(out) + 3)
        two.nodes[1].kill_rank()
        assert [node.wait(60) for node in two.nodes] == [75, 75], two.said()
        assert "goes on after step" in two.said()
        assert f"rank 1 on {second.name} gave no answer; rank 0 on {first.name} at step" in two.nodes[0].said
        assert f"torchrun on {second.name}: rank 1 was ended by SIGKILL" in two.nodes[1].said

        three = job()
        assert [node.wait(120) for node in three.nodes] == [0, 0], three.said()
    assert "Traceback" not in one.said() + two.said() + three.said()
    assert runs.numbers(out) == runs.numbers(undisturbed)
    runs.assert_same_weights(undisturbed, out)


def test_an_elastic_number_of_hosts_goes_on_without_a_lost_one(
    train_shards: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """A power cut: the other host goes on alone, with two micro-batches where each rank had one."""
    out, heard = tmp_path / "run", tmp_path / "heard.txt"
    with hosts.two_hosts() as pair:
        job = nodes.Job(
            pair,
            train_shards,
            out,
            *runs.PLAIN,
            "--timeout-s=8",
            NNODES="1:2",
            **nodes.heard_by(tmp_path, heard),
        )
        job.reach(7)
        pair[1].die()
        cut = time.monotonic()
        assert job.nodes[0].wait(90) == 0, job.said()
        said = job.nodes[0].said
    assert time.monotonic() - cut < 90
    assert f"rank 1 on {pair[1].name} gave no answer; rank 0 on {pair[0].name} at step" in said
    assert "1 rank(s) on cpu, fp32; goes on after step" in said
    assert "Traceback" not in said
    for alone, quiet in zip(runs.numbers(out), runs.numbers(undisturbed), strict=True):
        assert alone["loss"] == pytest.approx(quiet["loss"], rel=1e-6)
    runs.assert_same_weights(undisturbed, out, buffers=False)
    assert nodes.order(heard, 40) == nodes.expected_order(train_shards, 40)
    assert {line.split()[2] for line in heard.read_text().splitlines()} == {"0/2", "1/2", "0/1"}
