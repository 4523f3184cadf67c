"""Training on several ranks: real processes under torchrun, real signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from runs import PLAIN, assert_same_weights

PER_RANK = ("--data.global-batch=2", "--data.micro-batch=1")
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""What launch/torchrun.sh sets: rank 0 keeps the store, and takes it along when it goes."""


def finished(shards: Path, out: Path, ranks: int, *options: str) -> Path:
    """A whole run on so many ranks, in peace."""
    code, said = runs.finish(runs.launch(runs.words(shards, out, *options), ranks))
    assert code == 0, said
    return out


@pytest.mark.slow
def test_two_ranks_are_one_rank_with_two_accumulations(
    train_shards: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """20 steps; two of twelve tiles know no height, so a rank often knows none at all where the other does."""
    alone = finished(train_shards, tmp_path / "one", 1, *PLAIN)
    for one, two in zip(runs.numbers(alone), runs.numbers(undisturbed), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert_same_weights(alone, undisturbed, buffers=False)


@pytest.mark.slow
def test_sigterm_to_torchrun_and_going_on(train_shards: Path, tmp_path: Path, undisturbed: Path) -> None:
    out = tmp_path / "cut"
    process = runs.launch(runs.words(train_shards, out, *PLAIN), 2)
    runs.wait_until(lambda: runs.logged(out) >= 3, process)
    process.send_signal(signal.SIGTERM)
    runs.finish(process)
    state = json.loads((out / "state.json").read_text())
    assert state["status"] == "preempted"
    assert state["step"] < 20
    finished(train_shards, out, 2, *PLAIN)
    assert runs.numbers(out) == runs.numbers(undisturbed)
    assert_same_weights(undisturbed, out)
    assert runs.lines(out, "validation") == runs.lines(undisturbed, "validation")


def cut_and_compare(shards: Path, folder: Path, ranks: int, steps: list[int], length: int) -> None:
    """Start again at each of `steps` and compare with the run that was never stopped, bit for bit."""
    options = (f"--length={length} steps", *PER_RANK, "--augment.preset=benchmark", "--ema-decay=0.9")
    every = ("--checkpoint.every-steps=1", f"--checkpoint.keep={length}", "--validation.every-epochs=0")
    whole = finished(shards, folder / "whole", ranks, *options, *every)
    for step in steps:
        cut = folder / f"from-{step}"
        cut.mkdir()
        (cut / "checkpoints").mkdir()
        os.symlink(whole / "checkpoints" / f"step-{step:08d}", cut / "checkpoints" / f"step-{step:08d}")
        finished(shards, cut, ranks, *options, *every)
        assert runs.numbers(cut) == runs.numbers(whole)[step:], step
        assert_same_weights(whole, cut)


@pytest.mark.extra
def test_going_on_with_three_ranks_is_never_stopped(train_shards: Path, tmp_path: Path) -> None:
    """Two micro-batches a step: one rank of the three never has any. Two ranks: see the tests above."""
    cut_and_compare(train_shards, tmp_path, 3, [4], length=7)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [2, 3])
def test_going_on_at_ten_random_steps(
    train_shards: Path, tmp_path: Path, ranks: int, rng: np.random.Generator
) -> None:
    steps = sorted(int(step) for step in rng.choice(range(1, 30), 10, replace=False))
    cut_and_compare(train_shards, tmp_path, ranks, steps, length=30)


@pytest.mark.slow
def test_a_killed_rank_is_started_again_to_the_same_end(
    train_shards: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """SIGKILL under torchrun with restarts: the last checkpoint's steps are taken again, and no number changes."""
    out = tmp_path / "cut"
    words = runs.words(train_shards, out, *PLAIN, "--timeout-s=30")
    process = runs.launch(words, 2, "--max-restarts=2", **OWN_STORE)
    runs.wait_until(lambda: runs.logged(out) >= 5, process)
    os.kill(runs.rank_processes(process)[1], signal.SIGKILL)
    code, said = runs.finish(process)
    assert code == 0, said
    assert "goes on after step" in said
    assert runs.numbers(out) == runs.numbers(undisturbed)
    assert_same_weights(undisturbed, out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stopped", "variables"), [pytest.param(1, {}, marks=pytest.mark.soak), (0, OWN_STORE)]
)
def test_a_rank_that_does_not_come_is_named(
    train_shards: Path, tmp_path: Path, stopped: int, variables: dict[str, str]
) -> None:
    """SIGSTOP, as a hung node is: the others say who gave no answer and where they wait, and leave with 75."""
    out = tmp_path / "run"
    words = runs.words(train_shards, out, "--length=2000 steps", *PER_RANK, "--timeout-s=12")
    process = runs.launch(words, 2, **variables)
    runs.wait_until(lambda: runs.logged(out) >= 3, process)
    ranks = runs.rank_processes(process)
    os.kill(ranks[stopped], signal.SIGSTOP)
    waits = 1 - stopped
    try:
        runs.wait_until(lambda: not Path(f"/proc/{ranks[waits]}").exists(), process)
    finally:
        os.kill(ranks[stopped], signal.SIGKILL)  # torchrun would give it half a minute to end
    _, said = runs.finish(process)
    assert f"rank {stopped} gave no answer" in said or f"rank {stopped}, through which ranks tell" in said
    assert f"rank {waits} at step" in said
    assert f"run the same command to go on from the last checkpoint in {out}" in said
    assert "exitcode  : 75" in said
    assert json.loads((out / "state.json").read_text())["status"] == "lost"


@pytest.mark.slow
def test_a_rank_that_fails_is_no_lost_peer(train_shards: Path, tmp_path: Path) -> None:
    """One rank's own error ends all with 1: trying again would fail again."""
    out = tmp_path / "run"
    script = tmp_path / "failing.py"
    script.write_text(
        "import os, sys\n"
        "from geopose_dist import cli\n"
        "from geopose_dist.train import loop\n"
        "write = loop.write_metrics\n"
        "def failing(session, *rest):\n"
        "    if session.progress.step == 3 and session.world.rank == 1:\n"
        "        raise ZeroDivisionError('of this test')\n"
        "    write(session, *rest)\n"
        "loop.write_metrics = failing\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    words = runs.words(train_shards, out, "--length=9 steps", *PER_RANK)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), *words]
    process = runs.python(*command)
    code, said = runs.finish(process)
    assert code == 1
    assert "ZeroDivisionError: of this test" in said
    assert "rank 0 leaves: rank 1 (ZeroDivisionError) ended with an error of its own" in said
    assert json.loads((out / "state.json").read_text())["status"] == "running"


@pytest.mark.extra
def test_the_order_of_samples_survives_other_numbers_of_ranks(train_shards: Path, tmp_path: Path) -> None:
    """2, then 1, then 3 ranks read what one rank reads, each tile once per visit."""
    options = ("--data.global-batch=4", "--data.micro-batch=1", "--validation.every-epochs=0")
    script = tmp_path / "listening.py"
    script.write_text(
        "import os, sys\n"
        "from geopose_dist import cli\n"
        "from geopose_dist.train.step import Stepper\n"
        "step = Stepper.step\n"
        "def listening(self, batches, number, *rest):\n"
        "    with open(os.environ['HEARD'], 'a') as file:\n"
        "        for batch in batches:\n"
        "            for position, key in zip(batch.positions, batch.keys):\n"
        "                file.write(f'{position} {key}\\n')\n"
        "    return step(self, batches, number, *rest)\n"
        "Stepper.step = listening\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )

    def heard(name: str, ranks: int, length: int) -> list[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        torchrun = torchrun if ranks > 1 else []
        words = runs.words(train_shards, tmp_path / name, *options, f"--length={length} steps")
        file = tmp_path / f"{name}.txt"
        allowed = ["--allow-change", "length"]
        process = runs.python(*torchrun, str(script), *words, *allowed, HEARD=str(file))
        code, said = runs.finish(process)
        assert code == 0, said
        return sorted(file.read_text().splitlines(), key=lambda line: int(line.split()[0]))

    alone = heard("alone", 1, 6)
    for ranks, length in ((2, 2), (1, 3), (3, 6)):
        mixed = heard("mixed", ranks, length)
    assert mixed == alone
    assert len({line.split()[1] for line in alone[:12]}) == 12  # a visit: each tile once


@pytest.mark.slow
def test_how_gradients_are_made_and_sent_changes_nothing(
    train_shards: Path, tmp_path: Path, undisturbed: Path
) -> None:
    options = ("--ddp.static-graph=true", "--ddp.bucket-mb=1", "--checkpoint-activations=true")
    other = finished(train_shards, tmp_path / "other", 2, *PLAIN, *options)
    assert runs.numbers(other) == runs.numbers(undisturbed)
    assert_same_weights(undisturbed, other)


@pytest.mark.extra
def test_compressed_gradients_are_half_the_bytes_and_nearly_the_same(
    train_shards: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """bfloat16 keeps 8 bits: each gradient moves by 2^-8 of itself at most, their norm by less."""
    script = tmp_path / "counting.py"
    script.write_text(
        "import os, sys, torch\n"
        "import torch.distributed as dist\n"
        "from geopose_dist import cli\n"
        "reduce = dist.all_reduce\n"
        "def counting(tensor, *rest, **named):\n"
        "    if tensor.dtype == torch.bfloat16:\n"
        "        os.write(2, f'<sent {tensor.nbytes}>'.encode())\n"
        "    return reduce(tensor, *rest, **named)\n"
        "dist.all_reduce = counting\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    words = runs.words(train_shards, tmp_path / "bf16", *PLAIN, "--ddp.compression=bf16")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    code, said = runs.finish(runs.python(*torchrun, str(script), *words))
    assert code == 0, said
    weights = runs.final_weights(undisturbed)
    parameters = sum(w.numel() for name, w in weights.items() if is_parameter(name))
    sent = [int(count) for count in re.findall(r"<sent (\d+)>", said)]
    assert sum(sent) == 2 * parameters * 2 * (
        2 + 20
    )  # two bytes, two ranks, two settling passes and 20 steps
    plain, rounded = runs.numbers(undisturbed)[0], runs.numbers(tmp_path / "bf16")[0]
    assert rounded["loss"] == plain["loss"]  # the first step's loss knows no gradient yet
    assert rounded["grad_norm"] != plain["grad_norm"]
    assert rounded["grad_norm"] == pytest.approx(plain["grad_norm"], rel=2**-8)


def is_parameter(name: str) -> bool:
    """Whether a tensor of a checkpoint is learned."""
    return not ("running" in name or "num_batches" in name or name in ("mean", "std"))


@pytest.mark.extra
def test_steps_left_out_in_fp16_are_the_same_on_all_ranks(train_shards: Path, tmp_path: Path) -> None:
    """The loss is scaled by 65536 at first, which overflows here: both ranks leave the step out, as one rank does."""
    options = ("--length=6 steps", *PER_RANK, "--precision=fp16", "--validation.every-epochs=0")
    for name, ranks in (("one", 1), ("two", 2)):
        finished(train_shards, tmp_path / name, ranks, *options)
    assert_same_weights(tmp_path / "one", tmp_path / "two", buffers=False)
    scales = []
    for name in ("one", "two"):
        (folder,) = (tmp_path / name / "checkpoints").glob("step-*")
        scales.append(torch.load(folder / "training.pt", weights_only=True)["scaler"]["scale"])
    assert scales[0] == scales[1] < 65536


@pytest.mark.slow
def test_a_mistake_is_said_once_and_keeps_its_exit_code(train_shards: Path, tmp_path: Path) -> None:
    """Two ranks find the same mistake: one sentence, one line of torchrun's, no traceback, exit code 2."""
    script = runs.ROOT / "launch" / "torchrun.sh"
    words = ["--data.shards", str(train_shards), "--out", str(tmp_path / "run")]  # smoke's crop is 128 px
    variables = {"PYTHON": sys.executable, "NPROC": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [script, *words],
        env={**os.environ, **variables},
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("data.crop_px is 128, larger than the tiles") == 1
    assert "left with exit code 2" in done.stderr
    assert "Traceback" not in done.stderr
