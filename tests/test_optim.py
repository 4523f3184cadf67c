"""Learning rates by schedule, stage and batch, weight decay, averaged weights, lengths."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from torch import nn

from geopose_dist.model.recipe import ModelRecipe
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.train.optim import (
    AveragedWeights,
    encoder_stages,
    lr_factor,
    make_optimizer,
    peak_lr,
    set_lr,
)
from geopose_dist.train.recipe import Length, OptimRecipe

CPU = torch.device("cpu")


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


def test_weight_decay_spares_norms_and_biases(train_shards: Path) -> None:
    recipe = runs.recipe(train_shards)
    net = GeoposeNet(recipe.model)
    optimizer = make_optimizer(
        OptimRecipe(weight_decay=0.1, encoder_lr_factor=0.5, lr=1.0), net, torch.device("cpu")
    )
    seen = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
        seen += len(group["params"])
    assert seen == len(list(net.parameters()))
    assert sorted({group["peak_lr"] for group in optimizer.param_groups}) == [0.5, 1.0]


def net_of(encoder: str) -> GeoposeNet:
    return GeoposeNet(ModelRecipe(encoder=encoder, decoder_channels=[16, 16, 8, 8, 8]))


def test_step_schedule_falls_at_its_milestones_after_the_warm_up() -> None:
    recipe = OptimRecipe(schedule="step", warmup_steps=10, milestones=[0.5, 0.75], step_factor=0.2)
    assert lr_factor(recipe, 4, 0.01) == pytest.approx(0.5)
    assert lr_factor(recipe, 100, 0.49) == pytest.approx(1.0)
    assert lr_factor(recipe, 100, 0.5) == pytest.approx(0.2)
    assert lr_factor(recipe, 100, 0.99) == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("rule", "batch", "wanted"),
    [("sqrt", 32, 2e-3), ("linear", 32, 4e-3), ("sqrt", 8, 1e-3), ("linear", 2, 2.5e-4)],
)
def test_rate_follows_the_batch_on_request(rule: Any, batch: int, wanted: float) -> None:
    recipe = OptimRecipe(lr=1e-3, lr_batch=8, lr_rule=rule)
    assert peak_lr(recipe, batch) == pytest.approx(wanted)
    assert peak_lr(OptimRecipe(lr=1e-3), batch) == 1e-3
    optimizer = make_optimizer(recipe, torch.nn.Linear(2, 2), CPU, batch)
    assert all(group["lr"] == pytest.approx(wanted) for group in optimizer.param_groups)


def test_stages_of_a_resnet_are_its_layers() -> None:
    net = net_of("resnet18")
    net.train()
    names = {parameter: name for name, parameter in net.unet.encoder.named_parameters()}
    found = {names[parameter]: stage for parameter, stage in encoder_stages(net.unet.encoder).items()}
    for name, stage in found.items():
        assert stage == (int(name[5]) if name.startswith("layer") else 0), name
    assert len(found) == len(names)
    assert net.unet.encoder.training
    assert net.unet.encoder.bn1.num_batches_tracked.item() == 0


@pytest.mark.parametrize("encoder", ["tu-mobilenetv3_small_050", "resnet18"])
def test_shallow_stages_learn_more_slowly(encoder: str) -> None:
    net = net_of(encoder)
    recipe = OptimRecipe(lr=1.0, encoder_lr_factor=0.5, layer_decay=0.7, weight_decay=0.1)
    optimizer = make_optimizer(recipe, net, CPU)
    stages = encoder_stages(net.unet.encoder)
    assert sorted(set(stages.values())) == [0, 1, 2, 3, 4]
    rates = {parameter: group["peak_lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(rates) == len(list(net.parameters()))
    for name, parameter in net.named_parameters():
        wanted = 0.5 * 0.7 ** (4 - stages[parameter]) if ".encoder." in name else 1.0
        assert rates[parameter] == pytest.approx(wanted), name
    for group in optimizer.param_groups:
        assert all(group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0) for p in group["params"])
    set_lr(optimizer, 0.5)
    assert all(group["lr"] == group["peak_lr"] / 2 for group in optimizer.param_groups)


def test_groups_without_layer_decay_are_the_same_as_ever() -> None:
    """Checkpoints hold the optimiser's state by group."""
    optimizer = make_optimizer(OptimRecipe(lr=1.0), net_of("resnet18"), CPU)
    assert len(optimizer.param_groups) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [("layer_decay", 0.0), ("layer_decay", 1.5), ("step_factor", 0.0), ("milestones", [0.5, 1.0]), ("lr_batch", -1),
     ("lr", math.nan)],
)  # fmt: skip
def test_impossible_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"optim.{field}"):
        OptimRecipe(**{field: value})
