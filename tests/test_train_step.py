"""A training step: exact over micro-batches, never waiting for its device, in every precision and layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import torch
from torch import nn

from geopose_dist import config
from geopose_dist.data import manifest
from geopose_dist.data.loader import train_loader
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.runtime import World
from geopose_dist.train.optim import make_optimizer
from geopose_dist.train.recipe import TrainRecipe
from geopose_dist.train.step import Stepper

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


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
def test_accumulation_is_the_whole_batch(train_shards: Path, micro_batch: int) -> None:
    """The same global batch in one forward pass and in pieces: equal loss and gradients to 1e-5."""
    opened = manifest.open_split(train_shards, "train")
    results = []
    for size in (4, micro_batch):
        argv = runs.words(
            train_shards, Path("unused"), "--data.global-batch=4", f"--data.micro-batch={size}"
        )[1:]
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
