"""Training: exact over ranks and restarts, refusing by name what does not fit, on real shards and processes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from tiles import make_dataset
from torch import nn

from geopose_dist import cli, config
from geopose_dist.data import manifest
from geopose_dist.data.loader import train_loader
from geopose_dist.model import loss
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.runtime import World
from geopose_dist.train.optim import AveragedWeights, lr_factor, make_optimizer
from geopose_dist.train.recipe import Length, OptimRecipe, TrainRecipe
from geopose_dist.train.step import Stepper
from shards.pack import PackRecipe
from shards.pack import run as pack

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 tiles to learn from, of which two know no height, and 4 to validate on, in real shards."""
    folder = tmp_path_factory.mktemp("train-data")
    keys = make_dataset(folder / "tiles", 16)
    for key in keys[2:4]:
        (folder / "tiles" / "train" / f"{key}_AGL.tif").unlink()
    table = folder / "tiles" / "geopose_train.csv"
    text = table.read_text()
    for key in keys[2:4]:
        text = text.replace(f"{key}_AGL.tif", "")
    table.write_text(text)
    (folder / "split.json").write_text(json.dumps({"train": keys[:12], "val": keys[12:]}))
    pack(
        PackRecipe(
            source=str(folder / "tiles"),
            out=str(folder / "shards"),
            split=str(folder / "split.json"),
            reduce=1,
        )
    )
    return folder / "shards"


def train(shards: Path, out: Path, *options: str) -> int:
    return cli.main(runs.words(shards, out, *options))


def stop_after(run: Path, step: int) -> threading.Thread:
    """Send this process a real SIGTERM once the run has logged `step`."""

    def watch() -> None:
        for _ in range(6000):
            if (run / "metrics.jsonl").exists() and len(
                (run / "metrics.jsonl").read_text().splitlines()
            ) >= step:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


SIX = (
    "--length=6 steps",
    "--data.global-batch=4",
    "--data.micro-batch=2",
    "--ema-decay=0.9",
    "--model.dropout=0.2",
)


def test_stopped_and_gone_on_is_never_stopped_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    assert train(shards, tmp_path / "whole", *SIX) == 0
    watcher = stop_after(tmp_path / "cut", 2)
    assert train(shards, tmp_path / "cut", *SIX) == 75
    watcher.join()
    state = json.loads((tmp_path / "cut" / "state.json").read_text())
    assert state["status"] == "preempted"
    assert 2 <= state["step"] < 6
    # What a killed run logged after its last checkpoint is written again, not twice.
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1}\n{"step": ')
    assert train(shards, tmp_path / "cut", *SIX) == 0
    assert runs.numbers(tmp_path / "cut") == runs.numbers(tmp_path / "whole")
    assert [line["step"] for line in runs.lines(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    assert runs.lines(tmp_path / "cut", "validation") == runs.lines(tmp_path / "whole", "validation")
    for name in ("model", "ema"):
        whole, cut = runs.final_weights(tmp_path / "whole", name), runs.final_weights(tmp_path / "cut", name)
        assert all(torch.equal(whole[tensor], cut[tensor]) for tensor in whole)


def test_finished_run_does_nothing_more(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ("--length=2 steps", "--data.global-batch=2", "--data.micro-batch=2")
    assert train(shards, tmp_path / "run", *two) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert train(shards, tmp_path / "run", *two) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "run" / "state.json").read_text()) == {"status": "done", "step": 2}


def test_changed_recipe_is_refused_with_both_sides(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ("--length=2 steps", "--data.global-batch=2", "--data.micro-batch=2")
    assert train(shards, tmp_path / "run", *two) == 0
    changed = ("--length=3 steps", "--optim.lr=0.5", *two[1:])
    assert train(shards, tmp_path / "run", *changed) == 2
    said = capsys.readouterr().err
    assert "optim.lr: the run has 0.001, the recipe says 0.5" in said
    assert "length: the run has '2 steps', the recipe says '3 steps'" in said
    assert train(shards, tmp_path / "run", *changed, "--allow-change", "optim.lr", "length") == 0
    assert len(runs.lines(tmp_path / "run")) == 3


def test_minutes_end_by_the_clock_and_go_on_where_they_were(shards: Path, tmp_path: Path) -> None:
    short = ("--length=0.06 minutes", "--data.global-batch=2", "--data.micro-batch=2")
    assert train(shards, tmp_path / "run", *short) == 0
    learned = runs.lines(tmp_path / "run")
    assert len(learned) >= 2
    assert learned[-1]["lr"] < learned[1]["lr"]
    assert train(shards, tmp_path / "run", *short) == 0
    assert len(runs.lines(tmp_path / "run")) <= len(learned) + 1


def test_init_from_takes_weights_alone(shards: Path, tmp_path: Path) -> None:
    two = ("--length=2 steps", "--data.global-batch=2", "--data.micro-batch=2")
    assert train(shards, tmp_path / "first", *two) == 0
    still = (
        *two,
        "--optim.lr=1e-30",
        "--optim.weight-decay=0",
        f"--init-from={tmp_path / 'first'}",
        "--seed=5",
    )
    assert train(shards, tmp_path / "second", *still) == 0
    first, second = runs.final_weights(tmp_path / "first"), runs.final_weights(tmp_path / "second")
    for name in first:
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-20)
    assert [line["step"] for line in runs.lines(tmp_path / "second")] == [1, 2]


def without_batch_norm(net: nn.Module) -> None:
    """Exchange BatchNorm for GroupNorm, which looks at one tile at a time."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                norm = nn.GroupNorm(1, child.num_features)
                activation = nn.Sequential(norm, child.act) if hasattr(child, "act") else norm
                setattr(module, name, activation)


def watch_gradients(net: nn.Module) -> dict[str, torch.Tensor]:
    """By name, the gradient that each parameter last had before the step cleared it."""
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str, parameter: nn.Parameter) -> None:
        def keep(p: torch.Tensor) -> None:
            assert p.grad is not None
            seen[name] = p.grad.clone()

        parameter.register_post_accumulate_grad_hook(keep)

    for name, parameter in net.named_parameters():
        watch(name, parameter)
    return seen


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_accumulation_is_the_whole_batch(shards: Path, micro_batch: int) -> None:
    """The same global batch in one forward pass and in pieces: equal loss and gradients to 1e-5."""
    opened = manifest.open_split(shards, "train")
    results = []
    for size in (4, micro_batch):
        argv = runs.words(shards, Path("unused"), "--data.global-batch=4", f"--data.micro-batch={size}")[1:]
        recipe = config.parse(TrainRecipe, argv, prog="test", description="")
        torch.manual_seed(0)
        net = GeoposeNet(recipe.model)
        without_batch_norm(net)
        gradients = watch_gradients(net)
        stepper = Stepper(recipe, net, make_optimizer(recipe.optim, net, ALONE.device), ALONE)
        loader = train_loader(opened, recipe.data, 0, 0, 1, 0, 1)
        (batches,) = list(loader)
        result = stepper.step(batches, 0, 0)
        results.append((result.loss.item(), result.grad_norm.item(), gradients))
    (value, norm, gradients), (cut_value, cut_norm, cut_gradients) = results
    assert cut_value == pytest.approx(value, rel=1e-5)
    assert cut_norm == pytest.approx(norm, rel=1e-5)
    scale = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(cut_gradients[name], gradient, rtol=1e-4, atol=1e-5 * scale)


def test_averaged_weights_follow_at_the_stated_pace() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 1.0)
    averaged = AveragedWeights(net, 0.9)
    nn.init.constant_(net.weight, 2.0)
    averaged.update(net, step=1000)
    assert averaged.state["weight"].item() == pytest.approx(1.1)
    averaged.update(net, step=0)  # early, the average forgets the start: decay 1/10
    assert averaged.state["weight"].item() == pytest.approx(1.1 * 0.1 + 2.0 * 0.9)


def test_learning_rate_follows_the_length() -> None:
    recipe = OptimRecipe(warmup_steps=10, final_lr_factor=0.1)
    assert lr_factor(recipe, 0, 0.0) == pytest.approx(0.1)
    assert lr_factor(recipe, 9, 0.0) == pytest.approx(1.0)
    assert lr_factor(recipe, 500, 0.5) == pytest.approx(0.55)
    assert lr_factor(recipe, 1000, 1.0) == pytest.approx(0.1)
    assert lr_factor(OptimRecipe(schedule="constant", warmup_steps=0), 7, 0.9) == 1.0


def test_lengths() -> None:
    assert Length.parse("40 epochs").steps(samples=10, global_batch=4) == 100
    assert Length.parse("1 epoch").steps(samples=10, global_batch=4) == 3
    assert Length.parse("3000 steps").steps(10, 4) == 3000
    assert Length.parse("5 minutes").steps(10, 4) is None
    for wrong in ("", "5", "0 steps", "-1 epochs", "3 parsecs", "1.5 steps"):
        with pytest.raises(ValueError, match="length is"):
            Length.parse(wrong)


def test_weight_decay_spares_norms_and_biases(shards: Path) -> None:
    recipe = config.parse(TrainRecipe, runs.words(shards, Path("x"))[1:], prog="test", description="")
    net = GeoposeNet(recipe.model)
    optimizer = make_optimizer(
        OptimRecipe(weight_decay=0.1, encoder_lr_factor=0.5, lr=1.0), net, ALONE.device
    )
    seen = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
        seen += len(group["params"])
    assert seen == len(list(net.parameters()))
    assert sorted({group["peak_lr"] for group in optimizer.param_groups}) == [0.5, 1.0]


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
    shards: Path, tmp_path: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--device=cuda" in options and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert train(shards, tmp_path / "run", "--length=2 steps", *options) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_loss_that_is_not_finite_ends_the_run_by_name(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    numerators = loss.numerators

    def poisoned(*arguments: Any) -> torch.Tensor:
        return numerators(*arguments) * torch.nan

    monkeypatch.setattr(loss, "numerators", poisoned)
    assert (
        train(shards, tmp_path / "run", "--length=2 steps", "--data.global-batch=2", "--data.micro-batch=2")
        == 1
    )
    said = capsys.readouterr().err
    assert "step 1: the loss is nan" in said
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
def test_every_recipe_trains_two_steps_and_reads_back(recipe: str, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert cli.main(["train", "--config", recipe, *SHRUNK, f"--data.shards={shards}", f"--out={out}"]) == 0
    again = config.parse(TrainRecipe, ["--config", str(out / "recipe.yaml")], prog="test", description="")
    assert config.dump(again) == (out / "recipe.yaml").read_text()
    assert all(line["loss"] == line["loss"] for line in runs.lines(out))


@pytest.mark.slow
def test_two_ranks_are_one_rank_with_two_accumulations(shards: Path, tmp_path: Path) -> None:
    """20 steps; two of twelve tiles know no height, so some micro-batches know none at all."""
    options = ("--length=20 steps", "--data.global-batch=2", "--data.micro-batch=1")
    for name, ranks in (("one", 1), ("two", 2)):
        code, said = runs.finish(runs.launch(runs.words(shards, tmp_path / name, *options), ranks))
        assert code == 0, said
    one, two = runs.numbers(tmp_path / "one"), runs.numbers(tmp_path / "two")
    for alone, shared_out in zip(one, two, strict=True):
        assert shared_out["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    first, second = runs.final_weights(tmp_path / "one"), runs.final_weights(tmp_path / "two")
    parameters = [name for name in first if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(first[name], second[name]) for name in parameters)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_sigterm_to_torchrun_and_going_on(shards: Path, tmp_path: Path, ranks: int) -> None:
    """Global batch of two micro-batches: of three ranks, one always has none."""
    options = (
        "--length=14 steps",
        "--data.global-batch=2",
        "--data.micro-batch=1",
        "--augment.preset=benchmark",
    )
    code, said = runs.finish(runs.launch(runs.words(shards, tmp_path / "whole", *options), ranks))
    assert code == 0, said
    process = runs.launch(runs.words(shards, tmp_path / "cut", *options), ranks)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3, process)
    process.send_signal(signal.SIGTERM)
    runs.finish(process)
    state = json.loads((tmp_path / "cut" / "state.json").read_text())
    assert state["status"] == "preempted"
    assert state["step"] < 14
    code, said = runs.finish(runs.launch(runs.words(shards, tmp_path / "cut", *options), ranks))
    assert code == 0, said
    assert runs.numbers(tmp_path / "cut") == runs.numbers(tmp_path / "whole")
    whole, cut = runs.final_weights(tmp_path / "whole"), runs.final_weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert runs.lines(tmp_path / "cut", "validation") == runs.lines(tmp_path / "whole", "validation")


def wait_until(ready: Callable[[], bool], process: Any, timeout_s: float = 240) -> None:
    """Poll until `ready`, or fail with the process's output if it ended first."""
    end = time.monotonic() + timeout_s
    while not ready():
        assert process.poll() is None, runs.finish(process)[1]
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)
