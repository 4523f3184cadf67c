"""Learning rates, weight decay, averaged weights, lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import torch
from torch import nn

from geopose_dist.model.unet import GeoposeNet
from geopose_dist.train.optim import AveragedWeights, lr_factor, make_optimizer
from geopose_dist.train.recipe import Length, OptimRecipe


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
