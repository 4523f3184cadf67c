"""Training on several ranks: real processes under torchrun, real signals."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import runs
import torch


@pytest.mark.slow
def test_two_ranks_are_one_rank_with_two_accumulations(train_shards: Path, tmp_path: Path) -> None:
    """20 steps; two of twelve tiles know no height, so some micro-batches know none at all."""
    options = ("--length=20 steps", "--data.global-batch=2", "--data.micro-batch=1")
    for name, ranks in (("one", 1), ("two", 2)):
        code, said = runs.finish(runs.launch(runs.words(train_shards, tmp_path / name, *options), ranks))
        assert code == 0, said
    one, two = runs.numbers(tmp_path / "one"), runs.numbers(tmp_path / "two")
    for alone, shared_out in zip(one, two, strict=True):
        assert shared_out["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    first, second = runs.final_weights(tmp_path / "one"), runs.final_weights(tmp_path / "two")
    parameters = [name for name in first if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(first[name], second[name]) for name in parameters)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_sigterm_to_torchrun_and_going_on(train_shards: Path, tmp_path: Path, ranks: int) -> None:
    """Global batch of two micro-batches: of three ranks, one always has none."""
    options = (
        "--length=14 steps",
        "--data.global-batch=2",
        "--data.micro-batch=1",
        "--augment.preset=benchmark",
    )
    code, said = runs.finish(runs.launch(runs.words(train_shards, tmp_path / "whole", *options), ranks))
    assert code == 0, said
    process = runs.launch(runs.words(train_shards, tmp_path / "cut", *options), ranks)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    runs.wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3, process)
    process.send_signal(signal.SIGTERM)
    runs.finish(process)
    state = json.loads((tmp_path / "cut" / "state.json").read_text())
    assert state["status"] == "preempted"
    assert state["step"] < 14
    code, said = runs.finish(runs.launch(runs.words(train_shards, tmp_path / "cut", *options), ranks))
    assert code == 0, said
    assert runs.numbers(tmp_path / "cut") == runs.numbers(tmp_path / "whole")
    whole, cut = runs.final_weights(tmp_path / "whole"), runs.final_weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert runs.lines(tmp_path / "cut", "validation") == runs.lines(tmp_path / "whole", "validation")
