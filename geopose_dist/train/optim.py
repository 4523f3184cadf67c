"""The optimiser's parameter groups, the learning-rate curve, and averaged weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from geopose_dist.train.recipe import OptimRecipe

EMA_WARMUP_STEPS = 10
"""Early averages forget the random start: the decay grows as (1 + step) / (EMA_WARMUP_STEPS + step)."""


PROBE_PX = 224
"""Side of the image that finds an encoder's stages; a size that encoders of fixed size take, too."""


def make_optimizer(
    recipe: OptimRecipe, net: nn.Module, device: torch.device, global_batch: int = 0
) -> torch.optim.Optimizer:
    """Adam or AdamW over groups of encoder and other weights, each with and without weight decay.

    One-dimensional parameters (normalisation, biases) are never decayed. Under `layer_decay` the encoder's
    stages are groups of their own. Each group keeps its own peak learning rate as `peak_lr`.
    """
    stages: dict[nn.Parameter, int] = {}
    if recipe.layer_decay < 1:
        stages = encoder_stages(net.unet.encoder)  # type: ignore[union-attr, arg-type]
    deepest = max(stages.values(), default=0)
    groups: dict[tuple[bool, int, bool], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            key = (".encoder." in name, stages.get(parameter, deepest), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    decay = recipe.weight_decay if recipe.name == "adamw" else 0.0
    options = []
    for (in_encoder, stage, decayed), parameters in sorted(groups.items()):
        peak = peak_lr(recipe, global_batch) * (recipe.encoder_lr_factor if in_encoder else 1.0)
        peak *= recipe.layer_decay ** (deepest - stage)
        group = {"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay if decayed else 0.0}
        options.append(group)
    kind = torch.optim.AdamW if recipe.name == "adamw" else torch.optim.Adam
    return kind(options, fused=device.type in ("cpu", "cuda"))


def peak_lr(recipe: OptimRecipe, global_batch: int) -> float:
    """`lr` for a global batch: as it stands, or scaled from the batch that it is meant for."""
    if not recipe.lr_batch:
        return recipe.lr
    ratio = global_batch / recipe.lr_batch
    return recipe.lr * (ratio if recipe.lr_rule == "linear" else math.sqrt(ratio))


def encoder_stages(encoder: nn.Module) -> dict[nn.Parameter, int]:
    """Of each parameter, the number of the first feature map that depends on it; 0 is the shallowest.

    Found by differentiating the maps of one blank image, so it holds for every encoder of smp and timm.
    """
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    was_training = encoder.training
    encoder.eval()
    try:
        maps = encoder(torch.zeros(1, 3, PROBE_PX, PROBE_PX, device=parameters[0].device))
    finally:
        encoder.train(was_training)
    stages: dict[nn.Parameter, int] = {}
    for number, features in enumerate(features for features in maps if features.requires_grad):
        found = torch.autograd.grad(features.sum(), parameters, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                stages.setdefault(parameter, number)
    return stages


def lr_factor(recipe: OptimRecipe, step: int, fraction: float) -> float:
    """Learning rate as a share of its peak at `step`, when `fraction` (0..1) of the run has passed."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps) if recipe.warmup_steps else 1.0
    if recipe.schedule == "constant":
        return warm
    if recipe.schedule == "step":
        return warm * recipe.step_factor ** sum(fraction >= share for share in recipe.milestones)
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
