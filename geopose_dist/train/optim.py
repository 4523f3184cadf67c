"""The optimiser's parameter groups, the learning-rate curve, and averaged weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from geopose_dist.train.recipe import OptimRecipe

EMA_WARMUP_STEPS = 10
"""Early averages forget the random start: the decay grows as (1 + step) / (EMA_WARMUP_STEPS + step)."""


def make_optimizer(recipe: OptimRecipe, net: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Adam or AdamW over groups of encoder and other weights, each with and without weight decay.

    One-dimensional parameters (normalisation, biases) are never decayed. Each group keeps its own peak
    learning rate as `peak_lr`.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((".encoder." in name, parameter.ndim > 1), []).append(parameter)
    decay = recipe.weight_decay if recipe.name == "adamw" else 0.0
    options = []
    for (in_encoder, decayed), parameters in sorted(groups.items()):
        peak = recipe.lr * (recipe.encoder_lr_factor if in_encoder else 1.0)
        group = {"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay if decayed else 0.0}
        options.append(group)
    kind = torch.optim.AdamW if recipe.name == "adamw" else torch.optim.Adam
    return kind(options, fused=device.type in ("cpu", "cuda"))


def lr_factor(recipe: OptimRecipe, step: int, fraction: float) -> float:
    """Learning rate as a share of its peak at `step`, when `fraction` (0..1) of the run has passed."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps) if recipe.warmup_steps else 1.0
    if recipe.schedule == "constant":
        return warm
    cosine = 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
    return warm * (recipe.final_lr_factor + (1 - recipe.final_lr_factor) * cosine)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


class AveragedWeights:
    """Exponential moving average of a network's floating-point state, running buffers included.

    Attributes:
        state: the averages by name, as in the network's state_dict.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Move the averages toward the weights after `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (EMA_WARMUP_STEPS + step))
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                averages.append(self.state[name])
                values.append(value)
            else:
                self.state[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)
