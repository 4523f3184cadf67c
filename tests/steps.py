"""Single training steps for tests: a stepper of a tiny recipe, its batches, and the gradients that it makes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from geopose_dist.data import manifest
from geopose_dist.data.batch import Batch
from geopose_dist.data.loader import train_loader
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.runtime import World
from geopose_dist.train import recompute
from geopose_dist.train.optim import make_optimizer
from geopose_dist.train.recipe import TrainRecipe
from geopose_dist.train.step import Stepper

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
FOUR = ("--data.global-batch=4", "--data.micro-batch=2")


def stepper_of(recipe: TrainRecipe, world: World = ALONE, *, norms: bool = True) -> Stepper:
    """A network with the recipe's own seed, and what it takes to step."""
    torch.manual_seed(recipe.seed)
    net = GeoposeNet(recipe.model)
    if not norms:
        without_batch_norm(net)
    if recipe.checkpoint_activations:
        recompute.recompute_blocks(net)
    net.to(world.device).train()
    return Stepper(recipe, net, make_optimizer(recipe.optim, net, world.device), world)


def steps_of(shards: Path, recipe: TrainRecipe, count: int = 1) -> list[list[Batch]]:
    """The micro-batches of the first `count` steps."""
    return list(train_loader(manifest.open_split(shards, "train"), recipe.data, 0, 0, 1, 0, count))


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
