"""Steps that are not finite: never applied, told by name, kept, and replayed; on the device and over ranks."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from torch import Tensor

from geopose_dist import cli
from geopose_dist.data import manifest
from geopose_dist.data.batch import Batch
from geopose_dist.data.loader import train_loader
from geopose_dist.errors import FinishedWithFailures
from geopose_dist.model import loss
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.runtime import World
from geopose_dist.train import guard
from geopose_dist.train.optim import make_optimizer
from geopose_dist.train.recipe import TrainRecipe
from geopose_dist.train.step import Stepper

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
TWO = ("--data.global-batch=2", "--data.micro-batch=2")


def stepper_and_batches(shards: Path, *options: str) -> tuple[Stepper, list[list[Batch]]]:
    recipe = runs.recipe(shards, *TWO, *options)
    torch.manual_seed(0)
    net = GeoposeNet(recipe.model)
    opened = manifest.open_split(shards, "train")
    stepper = Stepper(
        recipe, net, make_optimizer(recipe.optim, net, ALONE.device), ALONE, opened.manifest.cities
    )
    return stepper, list(train_loader(opened, recipe.data, 0, 0, 1, 0, 3))


def poisoned(batches: Sequence[Batch]) -> list[Batch]:
    """The batches with a scale so wrong that its square is infinite in float32."""
    scales = [torch.full_like(batch.scale_px_per_m, 3e38) for batch in batches]
    return [dataclasses.replace(b, scale_px_per_m=s) for b, s in zip(batches, scales, strict=True)]


def everything(stepper: Stepper) -> dict[str, Tensor]:
    """Weights, buffers that are not counts, and the optimiser's moments and steps."""
    state = {name: v for name, v in stepper.net.state_dict().items() if "num_batches" not in name}
    for number, slots in stepper.optimizer.state_dict()["state"].items():
        state |= {f"{number}.{name}": value for name, value in slots.items()}
    return copy.deepcopy(state)


def test_a_skipped_step_leaves_no_trace(
    shards_twice: Callable[[], tuple[Stepper, list[list[Batch]]]],
) -> None:
    """Good, bad, good is good, good: weights, running buffers and moments, bit for bit."""
    (with_bad, batches), (without, _) = shards_twice(), shards_twice()
    for number, step in enumerate([batches[0], poisoned(batches[1]), batches[2]]):
        before = everything(with_bad)
        with_bad.step(step, number, 0)
        assert with_bad.guard.verdict.item() == (number == 1)
        if number == 1:
            after = everything(with_bad)
            assert all(torch.equal(before[name], after[name]) for name in before)
    without.step(batches[0], 0, 0)
    without.step(batches[2], 2, 0)
    ours, theirs = everything(with_bad), everything(without)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def shards_twice(train_shards: Path) -> Callable[[], tuple[Stepper, list[list[Batch]]]]:
    return lambda: stepper_and_batches(train_shards, "--on-nonfinite=skip")


def test_under_stop_nothing_more_is_applied(train_shards: Path) -> None:
    """A GPU's verdict is read some steps late: until then the weights stay those that met the batch."""
    stepper, batches = stepper_and_batches(train_shards)
    stepper.step(batches[0], 0, 0)
    before = everything(stepper)
    stepper.step(poisoned(batches[1]), 1, 0)
    stepper.step(batches[2], 2, 0)
    assert stepper.guard.verdict.item() == 0
    after = everything(stepper)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_infinite_activations_do_not_reach_the_running_buffers(train_shards: Path) -> None:
    """The forward pass itself breaks: batch norm has seen infinity before anybody can look."""
    stepper, batches = stepper_and_batches(train_shards, "--on-nonfinite=skip")
    weight = next(iter(stepper.net.parameters()))
    good = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("inf"))
    stepper.step(batches[0], 0, 0)
    assert stepper.guard.verdict.item() == 1
    with torch.no_grad():
        weight.copy_(good)
    assert all(torch.isfinite(value.float()).all() for value in stepper.net.state_dict().values())


def recipe_of(train_shards: Path, out: Path, *options: str) -> TrainRecipe:
    return dataclasses.replace(runs.recipe(train_shards, *TWO, *options), out=str(out))


def test_skipping_ends_at_its_limit(
    train_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(train_shards, tmp_path, "--on-nonfinite=skip", "--nonfinite-limit=1")
    verdicts, (stepper, batches) = guard.Verdicts(recipe, ALONE, ["ARG"]), stepper_and_batches(train_shards)
    verdicts.note(4, torch.tensor(1.0), batches[0])
    verdicts.read(stepper.net)
    assert "step 5: the gradient is not finite" in capsys.readouterr().err
    verdicts.note(5, torch.tensor(0.0), batches[1])
    verdicts.read(stepper.net)
    verdicts.note(6, torch.tensor(1.0), batches[2])
    with pytest.raises(FinishedWithFailures, match=r"step 7.*nonfinite_limit 1"):
        verdicts.read(stepper.net)
    assert sorted(p.name for p in (tmp_path / "nonfinite").iterdir()) == ["step-00000005", "step-00000007"]


def test_fp16_may_overflow_while_its_scaler_settles(train_shards: Path, tmp_path: Path) -> None:
    recipe = recipe_of(train_shards, tmp_path, "--precision=fp16")
    verdicts, (stepper, batches) = guard.Verdicts(recipe, ALONE, ["ARG"]), stepper_and_batches(train_shards)

    def overflow(times: int) -> None:
        for step in range(times):
            verdicts.note(step, torch.tensor(1.0), batches[0])
            verdicts.read(stepper.net)

    overflow(guard.FP16_PATIENCE - 1)
    verdicts.note(30, torch.tensor(0.0), batches[0])
    verdicts.read(stepper.net)
    overflow(guard.FP16_PATIENCE - 1)
    with pytest.raises(FinishedWithFailures, match="not finite"):
        overflow(1)


POISON = ("--optim.lr=1e30", "--optim.clip-norm=0", "--optim.warmup-steps=0", "--optim.schedule=constant")


def test_a_run_that_blows_up_stops_by_name_and_replay_shows_where(
    train_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert runs.train(train_shards, run, "--length=5 steps", *TWO, *POISON) == 1
    said = capsys.readouterr().err
    assert "the gradient is not finite; this rank's tiles: " in said
    assert "geopose replay" in said
    folder = guard_folder(run)
    told = json.loads((folder / "rank-0.json").read_text())
    assert told["step"] + 1 == int(folder.name.removeprefix("step-"))
    assert all(key in said for key in told["batches"][0]["keys"])
    assert cli.main(["replay", str(run)]) == 0
    shown = capsys.readouterr().out
    assert all(key in shown for key in told["batches"][0]["keys"])
    assert "weights that are not finite: none" in shown
    assert "<- not finite" in shown
    assert "outputs that are not finite, first to last: unet." in shown
    # A network that learned nothing from the exploding steps finds nothing wrong with the same batch.
    assert runs.train(train_shards, tmp_path / "sound", "--length=1 steps", *TWO) == 0
    sound = [
        "replay",
        str(folder),
        "--checkpoint",
        str(tmp_path / "sound"),
        "--precision",
        "fp32",
        "--rank",
        "0",
    ]
    assert cli.main(sound) == 0
    shown = capsys.readouterr().out
    assert "not finite, first to last: none" in shown
    assert "<- not finite" not in shown


def guard_folder(run: Path) -> Path:
    (folder,) = (run / guard.FOLDER).iterdir()
    return folder


def test_replay_names_the_tile_and_the_term(
    train_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(train_shards, tmp_path)
    stepper, batches = stepper_and_batches(train_shards)
    batch = batches[0][0]
    scales = batch.scale_px_per_m.clone()
    scales[1] = 3e38
    bad = dataclasses.replace(batch, scale_px_per_m=scales)
    cities = manifest.read_manifest(train_shards).cities
    guard.save(tmp_path / "nonfinite" / "step-00000001", recipe, 0, [bad], ALONE, stepper.net, cities)
    assert cli.main(["replay", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    first, second = (next(line for line in shown.splitlines() if line.startswith(key)) for key in batch.keys)
    assert "not finite" not in first
    assert "inf" in second
    assert "<- not finite" in second
    assert "outputs that are not finite, first to last: none" in shown
    assert "gradients of outputs that are not finite, from the loss back: " in shown


@pytest.mark.parametrize("what", ["absent", "empty", "damaged"])
def test_replay_of_what_is_no_batch_is_one_sentence(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "step-00000001"
    if what != "absent":
        folder.mkdir()
    if what == "damaged":
        (folder / "rank-0.json").write_text('{"batches": [{"keys": []}]}')
        (folder / "rank-0.safetensors").write_bytes(b"nothing")
    assert cli.main(["replay", str(folder)]) == 2
    said = capsys.readouterr().err
    assert str(folder) in said
    assert "Traceback" not in said


def test_metrics_of_a_skipped_step_are_null(
    train_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that skips goes on to its end; the line of the bad step says null, and JSON stays JSON."""
    numerators, calls = loss.numerators, [0]

    def third_is_poisoned(*arguments: Any) -> Tensor:
        calls[0] += 1
        found: Tensor = numerators(*arguments)
        return found * torch.nan if calls[0] == 3 else found

    monkeypatch.setattr(loss, "numerators", third_is_poisoned)
    assert runs.train(train_shards, tmp_path / "run", "--length=5 steps", *TWO, "--on-nonfinite=skip") == 0
    told = runs.lines(tmp_path / "run")
    assert [line["loss"] is None for line in told] == [False, False, True, False, False]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert all(torch.isfinite(v.float()).all() for v in runs.final_weights(tmp_path / "run").values())


def test_a_stopped_run_goes_on_under_skip(
    train_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the message says; the change needs no permission, and checkpoints hold only steps that were applied."""
    numerators, calls = loss.numerators, [0]

    def third_is_poisoned(*arguments: Any) -> Tensor:
        calls[0] += 1
        found: Tensor = numerators(*arguments)
        return found * torch.nan if calls[0] == 3 else found

    monkeypatch.setattr(loss, "numerators", third_is_poisoned)
    run, options = (
        tmp_path / "run",
        (*TWO, "--length=4 steps", "--checkpoint.every-steps=1", "--checkpoint.keep=9"),
    )
    assert runs.train(train_shards, run, *options) == 1
    assert "go on with --on-nonfinite skip" in capsys.readouterr().err
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-00000001", "step-00000002"]
    assert runs.train(train_shards, run, *options, "--on-nonfinite=skip") == 0
    assert [line["step"] for line in runs.lines(run)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_all_ranks_stop_at_the_same_step_and_keep_their_own_batch(train_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--length=6 steps", "--data.global-batch=2", "--data.micro-batch=1", *POISON)
    code, said = runs.finish(runs.launch(runs.words(train_shards, run, *options), 2))
    assert code == 1, said
    folder = guard_folder(run)
    told = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0]["step"] == told[1]["step"]
    keys = [one["batches"][0]["keys"] for one in told]
    assert keys[0] != keys[1]
    assert all(key in said for both in keys for key in both)
    assert cli.main(["replay", str(folder)]) == 0
