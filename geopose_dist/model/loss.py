"""The loss as sums over exact global counts.

Every term is `numerator / denominator`: the numerator is a sum over this micro-batch's labels and
predictions, the denominator a sum over the whole global batch's labels alone. Denominators are known
before the forward pass, so ranks agree on them once a step and then no cut of the batch over ranks and
micro-batches changes a term (a mean of means would). A term without any label has denominator 0 and
gives exactly 0, with zero gradients, instead of the benchmark's NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from geopose_dist.model.heads import Prediction
from geopose_dist.model.recipe import LossRecipe

TERMS = ("agl", "mag", "angle", "unit", "pixel_angle", "scale", "flow")
"""Names of the terms, in the order of the vectors below; metrics call them loss_agl, loss_mag, ..."""


class Targets(NamedTuple):
    """Labels of a micro-batch on the device.

    Attributes:
        agl_m: float32 [B, 1, H, W]; anything where unknown.
        known: bool [B, 1, H, W], where `agl_m` is a height.
        direction: float32 [B, 2], (sin, cos); NaN without a pose label.
        scale_px_per_m: float32 [B]; NaN without a pose label.
        inside: bool [B, 1, H, W], False on padding; None = all inside.
        magnitude_px: float32 [B, 1, H, W]; None = agl_m * scale_px_per_m, which it is by definition.
        city_std_m: float32 [B], standard deviation of the heights of each tile's city; None = 1 m.
    """

    agl_m: Tensor
    known: Tensor
    direction: Tensor
    scale_px_per_m: Tensor
    inside: Tensor | None = None
    magnitude_px: Tensor | None = None
    city_std_m: Tensor | None = None

    def posed(self) -> Tensor:
        """bool [B]: which tiles have angle and scale."""
        return torch.isfinite(self.scale_px_per_m) & torch.isfinite(self.direction).all(dim=1)


def weights(recipe: LossRecipe) -> dict[str, float]:
    """Weight of each term."""
    return {
        "agl": recipe.agl_weight,
        "mag": recipe.magnitude_weight,
        "angle": recipe.direction_weight,
        "unit": recipe.unit_weight,
        "pixel_angle": recipe.pixel_direction_weight,
        "scale": recipe.scale_weight,
        "flow": recipe.flow_weight,
    }


@dataclass(frozen=True)
class _Labels:
    """What numerators and denominators share: labels without NaN, and the weight of each pixel."""

    agl_m: Tensor  # [B, 1, H, W], 0 where unknown
    magnitude_px: Tensor  # [B, 1, H, W], 0 where unknown or without pose
    height_weight: Tensor  # [B, 1, H, W], 0 where unknown
    flow_weight: Tensor  # [B, 1, H, W], 0 where unknown or without pose
    per_variance: Tensor  # [B, 1, H, W], one over the variance of the city's heights
    edge: Tensor  # [B, 1, H, W], size of the height's step, 0 beside unknown heights
    posed: Tensor  # float [B], 1 with a pose label
    leaning: Tensor  # float [B], 0 without a pose label, less than 1 where little lean can be seen
    direction: Tensor  # [B, 2], 0 without pose
    scale: Tensor  # [B], 0 without pose


def _labels(recipe: LossRecipe, targets: Targets) -> _Labels:
    known = targets.known
    agl_m = torch.where(known, targets.agl_m.float(), 0.0)
    posed = targets.posed()
    scale = torch.where(posed, targets.scale_px_per_m.float(), 0.0)
    direction = torch.where(posed[:, None], targets.direction.float(), 0.0)
    weight = known.float()
    if recipe.reduction == "per_image":
        weight = weight / weight.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    with_pose = posed.float()[:, None, None, None]
    down = (agl_m[:, :, 1:] - agl_m[:, :, :-1]).abs() * (known[:, :, 1:] & known[:, :, :-1])
    right = (agl_m[..., 1:] - agl_m[..., :-1]).abs() * (known[..., 1:] & known[..., :-1])
    edge = functional.pad(down, (0, 0, 0, 1)) + functional.pad(right, (0, 1))
    std = torch.ones_like(scale) if targets.city_std_m is None else targets.city_std_m.float()
    leaning = posed.float()
    if recipe.lean_px > 0:
        leaning = leaning * (std * scale / recipe.lean_px).clamp(max=1.0)
    magnitude = agl_m * scale[:, None, None, None]
    if targets.magnitude_px is not None:
        magnitude = torch.where(known & posed[:, None, None, None], targets.magnitude_px.float(), 0.0)
    return _Labels(
        agl_m=agl_m,
        magnitude_px=magnitude,
        height_weight=weight,
        flow_weight=weight * with_pose,
        per_variance=std.square().reciprocal()[:, None, None, None],
        edge=edge.clamp(max=3.0) * leaning[:, None, None, None],
        posed=posed.float(),
        leaning=leaning,
        direction=direction,
        scale=scale,
    )


def denominators(recipe: LossRecipe, targets: Targets) -> Tensor:
    """float64 [len(TERMS)]: this micro-batch's share of each term's global denominator."""
    labels = _labels(recipe, targets)
    heights, flows = labels.height_weight.double().sum(), labels.flow_weight.double().sum()
    poses, edges = labels.posed.double().sum(), labels.edge.double().sum()
    return torch.stack([heights, flows, 2 * labels.leaning.double().sum(), poses, edges, poses, flows])


def numerators(recipe: LossRecipe, prediction: Prediction, targets: Targets) -> Tensor:
    """float32 [len(TERMS)]: this micro-batch's share of each term's numerator, differentiable.

    agl: (p - t)^2, the same over the city's variance (r2: for a large batch this is 1 - R2, as the sum
    over t of (t - p)^2 / (t - mean)^2 of the challenge's first place, but steady in a small one), or Huber,
    over known heights. mag: (p - t)^2 of magnitudes. angle: (p - t)^2 of both
    direction components, or 2 (1 - cos). unit: (|v| - 1)^2. pixel_angle: 1 - cos of each pixel's vector,
    weighted by the true height's step. scale: (p - t)^2, or log(p / t)^2. flow: squared length of the
    difference of the flows agl * scale * direction / |direction|, over the square of the true scale and
    the city's variance.
    """
    labels = _labels(recipe, targets)
    agl, magnitude = prediction.agl_m.float(), prediction.magnitude_px.float()
    vector, scale = prediction.direction.float(), prediction.scale_px_per_m.float()
    if recipe.agl == "huber":
        error = functional.huber_loss(agl, labels.agl_m, reduction="none", delta=recipe.huber_m)
    else:
        error = (agl - labels.agl_m).square()
    if recipe.agl == "r2":
        error = _bounded(error * labels.per_variance, recipe.tail_std)
    length = vector.norm(dim=1).clamp(min=1e-6)
    unit = vector / length[:, None]
    if recipe.direction == "mse":
        angle = (vector - labels.direction).square().sum(dim=1)
    else:
        angle = 2 * (1 - (unit * labels.direction).sum(dim=1))
    if recipe.scale == "mse":
        scale_error = (scale - labels.scale).square()
    else:
        ratio = scale.clamp(min=1e-6) / torch.where(labels.posed > 0, labels.scale, 1.0)
        scale_error = ratio.log().square()
    zero = error.new_zeros(())
    pixel_angle, flow = zero, zero
    if recipe.pixel_direction_weight > 0 and prediction.direction_map is not None:
        field = functional.normalize(prediction.direction_map.float(), dim=1, eps=1e-6)
        cosine = (field * labels.direction[:, :, None, None]).sum(dim=1, keepdim=True)
        pixel_angle = (labels.edge * (1 - cosine)).sum()
    if recipe.flow_weight > 0:
        ratio = scale / torch.where(labels.posed > 0, labels.scale, 1.0)
        predicted = (agl * ratio[:, None, None, None]) * unit[:, :, None, None]
        truth = labels.agl_m * labels.direction[:, :, None, None]
        squares = labels.per_variance * (predicted - truth).square().sum(dim=1, keepdim=True)
        flow = (labels.flow_weight * _bounded(squares, recipe.tail_std)).sum()
    return torch.stack(
        [
            (labels.height_weight * error).sum(),
            (labels.flow_weight * (magnitude - labels.magnitude_px).square()).sum(),
            (labels.leaning * angle).sum(),
            (labels.posed * (length - 1).square()).sum(),
            pixel_angle,
            (labels.posed * scale_error).sum(),
            flow,
        ]
    )


def _bounded(squares: Tensor, tail: float) -> Tensor:
    """Squares of relative errors e, but 2 tail |e| - tail^2 where |e| is beyond `tail` (0: nowhere)."""
    if tail == 0:
        return squares
    bound = squares.detach() > tail**2
    linear = 2 * tail * torch.where(bound, squares, 1.0).sqrt() - tail**2
    return torch.where(bound, linear, squares)


def combine(recipe: LossRecipe, numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    """This micro-batch's share of the weighted loss, and of each term, given the global denominators.

    Summing the shares of all micro-batches gives the loss. A denominator of 0 makes its term 0.
    """
    there = denominator > 0
    terms = numerator * torch.where(there, 1 / torch.where(there, denominator, 1.0), 0.0).to(numerator.dtype)
    table = weights(recipe)
    weight = torch.tensor([table[name] for name in TERMS], dtype=terms.dtype, device=terms.device)
    return (weight * terms).sum(), terms.detach()
