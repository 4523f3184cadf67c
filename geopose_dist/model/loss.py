"""The loss as sums over exact global counts.

Every term is `numerator / denominator`: the numerator is a sum over this micro-batch's labels and
predictions, the denominator a sum over the whole global batch's labels alone. Denominators are known
before the forward pass, so ranks agree on them once a step and then no cut of the batch over ranks and
micro-batches changes a term (a mean of means would). A term without any label has denominator 0 and
gives exactly 0, with zero gradients, instead of the benchmark's NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from geopose_dist.model import loss_terms
from geopose_dist.model.heads import Prediction
from geopose_dist.model.loss_terms import Answer, Labels, Targets
from geopose_dist.model.recipe import LossRecipe

__all__ = ["TERMS", "Targets", "combine", "denominators", "numerators", "per_tile", "weights"]

_NUMERATORS: dict[str, Callable[[LossRecipe, Answer, Labels], Tensor]] = {
    "agl": loss_terms.agl,
    "mag": loss_terms.magnitude,
    "angle": loss_terms.angle,
    "unit": loss_terms.unit,
    "pixel_angle": loss_terms.pixel_angle,
    "scale": loss_terms.scale,
    "flow": loss_terms.flow,
    "focal": loss_terms.focal,
    "focal_mag": loss_terms.focal_magnitude,
    "normal": loss_terms.normal,
    "gradient": loss_terms.gradient,
}

TERMS = tuple(_NUMERATORS)
"""Names of the terms, in the order of the vectors below; metrics call them loss_agl, loss_mag, ..."""


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
        "focal": recipe.focal_weight,
        "focal_mag": recipe.focal_magnitude_weight,
        "normal": recipe.normal_weight,
        "gradient": recipe.gradient_weight,
    }


def denominators(recipe: LossRecipe, targets: Targets) -> Tensor:
    """float64 [len(TERMS)]: this micro-batch's share of each term's global denominator."""
    labels = Labels.of(recipe, targets)
    pixels, flows = labels.height_weight.double().sum(), labels.flow_weight.double().sum()
    poses, edges = labels.posed.double().sum(), labels.edge.double().sum()
    heights, magnitudes = pixels, flows
    if recipe.agl == "batch_r2":
        heights = (labels.height_weight * (labels.agl_m - labels.mean_m).square()).double().sum()
    if recipe.magnitude == "batch_r2":
        magnitudes = (labels.flow_weight * (labels.magnitude_px - labels.mean_px).square()).double().sum()
    slopes = labels.slope_weight.double().sum()
    table = {
        "agl": heights,
        "mag": magnitudes,
        "angle": 2 * labels.leaning.double().sum(),
        "unit": poses,
        "pixel_angle": edges,
        "scale": poses,
        "flow": flows,
        "focal": pixels,
        "focal_mag": flows,
        "normal": slopes,
        "gradient": slopes,
    }
    return torch.stack([table[name] for name in TERMS])


def numerators(recipe: LossRecipe, prediction: Prediction, targets: Targets) -> Tensor:
    """float32 [len(TERMS)]: this micro-batch's share of each term's numerator, differentiable.

    The functions of `loss_terms` have the formulas. A term of weight 0 is left out and stands as 0, but
    every output keeps its place in the graph: DDP waits for the gradient of every parameter.
    """
    labels, answer, table = Labels.of(recipe, targets), Answer.of(prediction), weights(recipe)
    zero = 0.0 * (answer.agl_m[:, :, :1, :1].sum() + answer.vector.sum() + answer.scale.sum())
    return torch.stack(
        [
            function(recipe, answer, labels) if table[name] > 0 else zero
            for name, function in _NUMERATORS.items()
        ]
    )


def per_tile(recipe: LossRecipe, prediction: Prediction, targets: Targets) -> Tensor:
    """float32 [B, len(TERMS)]: each tile's numerators, for finding the tile that spoils a batch."""
    with torch.no_grad():
        rows = []
        for i in range(len(targets.agl_m)):
            one = slice(i, i + 1)
            alone = Prediction(*(None if part is None else part[one] for part in prediction))  # type: ignore[arg-type]
            rows.append(numerators(recipe, alone, targets.rows(one)))
        return torch.stack(rows)


def combine(recipe: LossRecipe, numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    """This micro-batch's share of the weighted loss, and of each term, given the global denominators.

    Summing the shares of all micro-batches gives the loss. A denominator of 0 makes its term 0.
    """
    there = denominator > 0
    terms = numerator * torch.where(there, 1 / torch.where(there, denominator, 1.0), 0.0).to(numerator.dtype)
    weight = _on_device(tuple(weights(recipe).values()), terms.device)
    return (weight * terms).sum(), terms.detach()


@functools.lru_cache(maxsize=16)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """`values` as float32; made once, because copying them to a GPU waits for all that it has to do."""
    return torch.tensor(values, dtype=torch.float32, device=device)
