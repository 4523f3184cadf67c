"""Training as its user sees it: runs that go on, end, and refuse by name, on real shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from geopose_dist import cli, config
from geopose_dist.model import loss
from geopose_dist.train.recipe import TrainRecipe

SIX = (
    "--length=6 steps",
    "--data.global-batch=4",
    "--data.micro-batch=2",
    "--ema-decay=0.9",
    "--model.dropout=0.2",
)


def test_stopped_and_gone_on_is_never_stopped_bit_for_bit(train_shards: Path, tmp_path: Path) -> None:
    assert runs.train(train_shards, tmp_path / "whole", *SIX) == 0
    watcher = runs.stop_after(tmp_path / "cut", 2)
    assert runs.train(train_shards, tmp_path / "cut", *SIX) == 75
    watcher.join()
    state = json.loads((tmp_path / "cut" / "state.json").read_text())
    assert state["status"] == "preempted"
    assert 2 <= state["step"] < 6
    # What a killed run logged after its last checkpoint is written again, not twice.
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1}\n{"step": ')
    assert runs.train(train_shards, tmp_path / "cut", *SIX) == 0
    assert runs.numbers(tmp_path / "cut") == runs.numbers(tmp_path / "whole")
    assert [line["step"] for line in runs.lines(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    assert runs.lines(tmp_path / "cut", "validation") == runs.lines(tmp_path / "whole", "validation")
    for name in ("model", "ema"):
        whole, cut = runs.final_weights(tmp_path / "whole", name), runs.final_weights(tmp_path / "cut", name)
        assert all(torch.equal(whole[tensor], cut[tensor]) for tensor in whole)


def test_finished_run_does_nothing_more(
    train_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ("--length=2 steps", "--data.global-batch=2", "--data.micro-batch=2")
    assert runs.train(train_shards, tmp_path / "run", *two) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert runs.train(train_shards, tmp_path / "run", *two) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "run" / "state.json").read_text()) == {"status": "done", "step": 2}


def test_changed_recipe_is_refused_with_both_sides(
    train_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ("--length=2 steps", "--data.global-batch=2", "--data.micro-batch=2")
    assert runs.train(train_shards, tmp_path / "run", *two) == 0
    changed = ("--length=3 steps", "--optim.lr=0.5", *two[1:])
    assert runs.train(train_shards, tmp_path / "run", *changed) == 2
    said = capsys.readouterr().err
    assert "optim.lr: the run has 0.001, the recipe says 0.5" in said
    assert "length: the run has '2 steps', the recipe says '3 steps'" in said
    assert runs.train(train_shards, tmp_path / "run", *changed, "--allow-change", "optim.lr", "length") == 0
    assert len(runs.lines(tmp_path / "run")) == 3


def test_minutes_end_by_the_clock_and_go_on_where_they_were(train_shards: Path, tmp_path: Path) -> None:
    short = ("--length=0.06 minutes", "--data.global-batch=2", "--data.micro-batch=2")
    assert runs.train(train_shards, tmp_path / "run", *short) == 0
    learned = runs.lines(tmp_path / "run")
    assert len(learned) >= 2
    assert learned[-1]["lr"] < learned[1]["lr"]
    assert runs.train(train_shards, tmp_path / "run", *short) == 0
    assert len(runs.lines(tmp_path / "run")) <= len(learned) + 1


def test_init_from_takes_weights_alone(train_shards: Path, tmp_path: Path) -> None:
    two = ("--length=2 steps", "--data.global-batch=2", "--data.micro-batch=2")
    assert runs.train(train_shards, tmp_path / "first", *two) == 0
    still = (
        *two,
        "--optim.lr=1e-30",
        "--optim.weight-decay=0",
        f"--init-from={tmp_path / 'first'}",
        "--seed=5",
    )
    assert runs.train(train_shards, tmp_path / "second", *still) == 0
    first, second = runs.final_weights(tmp_path / "first"), runs.final_weights(tmp_path / "second")
    for name in first:
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-20)
    assert [line["step"] for line in runs.lines(tmp_path / "second")] == [1, 2]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data.shards=nowhere"], "nowhere"),
        (["--data.global-batch=5", "--data.micro-batch=2"], "global_batch"),
        (["--data.crop-px=4096"], "4096"),
        (["--model.encoder=resnet43"], "resnet34"),
        (["--model.weights=absent.safetensors"], "absent.safetensors"),
        (["--model.scale=least_squares"], "separate"),
        (["--optim.lrr=3"], "optim.lr"),
        (["--length=soon"], "3000 steps"),
        (["--device=cuda"], "GPU"),
        (["--init-from=nowhere"], "nowhere"),
        (["--data.order=block:0"], "block"),
    ],
)
def test_mistakes_are_one_sentence_before_any_work(
    train_shards: Path, tmp_path: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--device=cuda" in options and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert runs.train(train_shards, tmp_path / "run", "--length=2 steps", *options) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_loss_that_is_not_finite_ends_the_run_by_name(
    train_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    numerators = loss.numerators

    def poisoned(*arguments: Any) -> torch.Tensor:
        return numerators(*arguments) * torch.nan

    monkeypatch.setattr(loss, "numerators", poisoned)
    assert (
        runs.train(
            train_shards,
            tmp_path / "run",
            "--length=2 steps",
            "--data.global-batch=2",
            "--data.micro-batch=2",
        )
        == 1
    )
    said = capsys.readouterr().err
    assert "step 1: the gradient is not finite" in said
    assert any(city in said for city in ("ARG_", "ATL_", "JAX_", "OMA_"))


RECIPES = sorted(p.relative_to(config.recipes_folder()) for p in config.recipes_folder().rglob("*.yaml"))
TRAINABLE = [
    str(name.with_suffix("")) for name in RECIPES if name.parts[0] in ("smoke.yaml", "demo.yaml", "train")
]
SHRUNK = (
    "--model.encoder=tu-mobilenetv3_small_050", "--model.weights=none", "--model.decoder-channels=[16,16,8,8,8]",
    "--data.crop-px=64", "--data.global-batch=2", "--data.micro-batch=1", "--data.workers=0", "--length=2 steps",
    "--device=cpu",
)  # fmt: skip


@pytest.mark.parametrize("recipe", TRAINABLE)
def test_every_recipe_trains_two_steps_and_reads_back(
    recipe: str, train_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert (
        cli.main(["train", "--config", recipe, *SHRUNK, f"--data.shards={train_shards}", f"--out={out}"]) == 0
    )
    again = config.parse(TrainRecipe, ["--config", str(out / "recipe.yaml")], prog="test", description="")
    assert config.dump(again) == (out / "recipe.yaml").read_text()
    assert all(line["loss"] == line["loss"] for line in runs.lines(out))
