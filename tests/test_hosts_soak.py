"""Many rounds of what disturbs training on two hosts; one of each kind is in test_hosts_train.py."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import hosts
import nodes
import numpy as np
import pytest
import runs

pytestmark = [pytest.mark.multihost, pytest.mark.soak, pytest.mark.timeout(7200)]

ROUNDS = 10
LONG = ("--length=4000 steps", *runs.PLAIN[1:-1], "--checkpoint.every-steps=5", "--validation.every-epochs=0")
"""Longer than any of these tests lasts: they are stopped by a signal, and compared up to there."""


def quiet_run(shards: Path, folder: Path, steps: int) -> Path:
    """The same run on two ranks of one host up to a step, undisturbed."""
    words = runs.words(shards, folder / "quiet", *LONG)
    variables = nodes.heard_by(folder, folder / "quiet.txt", STOP_AT=str(steps))
    process = runs.launch(words, 2, **variables)
    runs.finish(process, timeout=3600)
    assert nodes.latest(folder / "quiet") == steps
    return folder / "quiet"


def end(job: nodes.Job) -> None:
    """Ask both launchers to stop, as batch systems do."""
    for node in job.nodes:
        node.process.send_signal(signal.SIGTERM)
    assert {node.wait(120) for node in job.nodes} == {75}, job.said()


@pytest.mark.parametrize("policy", ["2", "1:2"])
def test_ten_killed_ranks(train_shards: Path, tmp_path: Path, rng: np.random.Generator, policy: str) -> None:
    """Either rank, at a random step. Fixed: both leave with 75, and the same command goes on. Elastic: they go on."""
    out, heard = tmp_path / "run", tmp_path / "heard.txt"
    variables = {"NNODES": policy, **nodes.heard_by(tmp_path, heard, PAUSE_S="0.2")}
    with hosts.two_hosts() as pair:
        job = nodes.Job(pair, train_shards, out, *LONG, "--timeout-s=60", **variables)
        for turn in range(ROUNDS):
            job.reach(nodes.latest(out) + int(rng.integers(2, 12)))
            victim = job.nodes[int(rng.integers(2))]
            before = job.said().count("goes on after step")
            victim.kill_rank()
            if policy == "2":
                assert [node.wait(90) for node in job.nodes] == [75, 75], (turn, job.said())
                assert f"torchrun on {victim.host.name}: rank" in victim.said
                job = nodes.Job(pair, train_shards, out, *LONG, "--timeout-s=60", **variables)
                before = 0
            job.wait_for(
                lambda job=job, count=before: job.said().count("goes on after step") > count, f"round {turn}"
            )
        job.reach(nodes.latest(out) + 3)
        end(job)
        print(job.said())
    steps = nodes.latest(out)
    quiet = quiet_run(train_shards, tmp_path, steps)
    assert runs.numbers(out) == runs.numbers(quiet)
    runs.assert_same_weights(quiet, out)
    assert nodes.order(heard, 2 * steps) == nodes.expected_order(train_shards, 2 * steps)


def test_ten_power_cuts_and_returns(train_shards: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """Elastic: the second host dies, the first goes on alone, the second comes back, and both go on."""
    out, heard = tmp_path / "run", tmp_path / "heard.txt"
    variables = {"NNODES": "1:2", **nodes.heard_by(tmp_path, heard, PAUSE_S="0.2")}
    with hosts.two_hosts() as pair:
        job = nodes.Job(pair, train_shards, out, *LONG, "--timeout-s=20", **variables)
        for turn in range(ROUNDS):
            job.reach(nodes.latest(out) + int(rng.integers(2, 12)))
            alone = job.said().count("1 rank(s) on cpu, fp32; goes on after step")
            both = job.said().count("2 rank(s) on cpu, fp32; goes on after step")
            if rng.integers(2):
                pair[1].die()
            else:
                pair[1].kill()
            job.wait_for(
                lambda n=alone: job.said().count("1 rank(s) on cpu, fp32; goes") > n, f"round {turn}, alone"
            )
            job.reach(nodes.latest(out) + 2)
            pair[1].plug()
            job.nodes[1] = job.start(1)
            job.wait_for(
                lambda n=both: job.nodes[0].said.count("2 rank(s) on cpu, fp32; goes") > n, f"round {turn}"
            )
        job.reach(nodes.latest(out) + 3)
        end(job)
        print(job.nodes[0].said)
    steps = nodes.latest(out)
    quiet = quiet_run(train_shards, tmp_path, steps)
    for here, there in zip(runs.numbers(out), runs.numbers(quiet), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-6)
    runs.assert_same_weights(quiet, out, buffers=False)
    assert nodes.order(heard, 2 * steps) == nodes.expected_order(train_shards, 2 * steps)


@pytest.mark.parametrize("who", [0, 1])
def test_ten_power_cuts_of_fixed_hosts(
    train_shards: Path, tmp_path: Path, rng: np.random.Generator, who: int
) -> None:
    """Either host, the one that keeps the rendezvous and rank 0's store among them; then the same command again."""
    out, timeout_s = tmp_path / "run", 15
    slow = nodes.heard_by(tmp_path, tmp_path / "heard.txt", PAUSE_S="0.2")
    with hosts.two_hosts() as pair:
        for turn in range(ROUNDS // 2):
            job = nodes.Job(
                pair,
                train_shards,
                out,
                *LONG,
                f"--timeout-s={timeout_s}",
                **slow,
            )
            job.reach(nodes.latest(out) + int(rng.integers(2, 12)))
            pair[who].die()
            cut = time.monotonic()
            left = job.nodes[1 - who]
            assert left.wait(timeout_s + 60) == 75, (turn, job.said())
            print(f"round {turn}: host {who} cut, the other left with 75 after {left.ended_s - cut:.1f} s")
            assert f"rank {who} on {pair[who].name}" in left.said
            assert f"rank {1 - who} on {pair[1 - who].name} at step" in left.said
            pair[who].plug()
        job = nodes.Job(pair, train_shards, out, *LONG, "--timeout-s=60")
        job.reach(nodes.latest(out) + 3)
        end(job)
    quiet = quiet_run(train_shards, tmp_path, nodes.latest(out))
    assert runs.numbers(out) == runs.numbers(quiet)
    runs.assert_same_weights(quiet, out)


def test_a_cable_that_stays_out_ends_both_hosts_with_75(train_shards: Path, tmp_path: Path) -> None:
    """Both hosts live, and neither hears the other: each names the other's rank within the time-out and 20 s."""
    out, timeout_s = tmp_path / "run", 10
    variables = nodes.heard_by(tmp_path, tmp_path / "heard.txt", PAUSE_S="0.2")
    with hosts.two_hosts() as pair:
        job = nodes.Job(pair, train_shards, out, *LONG, f"--timeout-s={timeout_s}", **variables)
        job.reach(5)
        pair[1].unplug()
        cut = time.monotonic()
        assert [node.wait(timeout_s + 60) for node in job.nodes] == [75, 75], job.said()
        print([f"{node.ended_s - cut:.1f} s" for node in job.nodes], job.said())
        assert f"rank 1 on {pair[1].name} gave no answer" in job.nodes[0].said
        assert (
            f"rank 0 on {pair[0].name}, through which ranks tell where they are, gave no answer"
            in job.nodes[1].said
        )
        assert all(not host.processes() for host in pair)
        pair[1].plug()
        job = nodes.Job(pair, train_shards, out, *LONG, "--timeout-s=60")
        job.reach(12)
        end(job)
    quiet = quiet_run(train_shards, tmp_path, nodes.latest(out))
    assert runs.numbers(out) == runs.numbers(quiet)
    runs.assert_same_weights(quiet, out)


def test_a_node_that_is_asked_to_leave_loses_no_step(train_shards: Path, tmp_path: Path) -> None:
    """Elastic, notice of a preemption to one node: both save, it leaves with 75, the other goes on from that step."""
    out = tmp_path / "run"
    slow = nodes.heard_by(tmp_path, tmp_path / "heard.txt", PAUSE_S="0.2")
    with hosts.two_hosts() as pair:
        job = nodes.Job(pair, train_shards, out, *LONG, "--timeout-s=60", NNODES="1:2", **slow)
        job.reach(7)
        job.nodes[1].process.send_signal(signal.SIGTERM)
        assert job.nodes[1].wait(90) == 75, job.said()
        step = int(job.nodes[1].said.split("after step ")[1].split(",")[0])
        job.wait_for(lambda: f"goes on after step {step}" in job.nodes[0].said, "the other host alone")
        job.reach(step + 3)
        end(job)
    assert "1 rank(s) on cpu" in job.nodes[0].said
    quiet = quiet_run(train_shards, tmp_path, nodes.latest(out))
    runs.assert_same_weights(quiet, out, buffers=False)


def test_without_the_node_of_the_rendezvous_an_elastic_job_ends_with_75(
    train_shards: Path, tmp_path: Path
) -> None:
    """A power cut of node 0: the other leaves, and starts again as node 0 of a job of its own."""
    out = tmp_path / "run"
    slow = nodes.heard_by(tmp_path, tmp_path / "heard.txt", PAUSE_S="0.2")
    with hosts.two_hosts() as pair:
        job = nodes.Job(pair, train_shards, out, *LONG, "--timeout-s=15", NNODES="1:2", **slow)
        job.reach(5)
        pair[0].die()
        assert job.nodes[1].wait(15 + 90) == 75, job.said()
        assert (
            f"rank 0 on {pair[0].name}, through which ranks tell where they are, gave no answer"
            in job.nodes[1].said
        )
        assert "the node that keeps the rendezvous (node 0) is gone" in job.nodes[1].said
        job.variables |= {"MASTER_ADDR": pair[1].name, "NODE_RANK": "0"}
        job.nodes = [nodes.Node(pair[1], [nodes.SCRIPT, *job.words], job.variables)]
        job.reach(9)
        end(job)
    quiet = quiet_run(train_shards, tmp_path, nodes.latest(out))
    runs.assert_same_weights(quiet, out, buffers=False)


@pytest.mark.parametrize("mbit", [None, 50.0])
def test_a_slow_or_a_bad_link_changes_no_number(
    train_shards: Path, tmp_path: Path, undisturbed: Path, mbit: float | None
) -> None:
    """20 steps over 50 Mbit/s, and over 100 ms and 1 % loss in each direction."""
    out = tmp_path / "run"
    with hosts.two_far_hosts() as (first, second, cable):
        if mbit is None:
            cable.set(delay_ms=100, loss=0.01)
        else:
            for host in (first, second):
                hosts.limit(host, mbit)
        job = nodes.Job((first, second), train_shards, out, *runs.PLAIN, "--timeout-s=120")
        assert [node.wait(900) for node in job.nodes] == [0, 0], job.said()
    assert runs.numbers(out) == runs.numbers(undisturbed)
    runs.assert_same_weights(undisturbed, out)
