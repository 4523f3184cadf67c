"""The terms of the loss: one function each, with its formula and where it comes from.

In every formula p is predicted and t true height in metres; w is the weight of a pixel: 1 where the height is
known and 0 elsewhere, over the tile's known pixels under `reduction: per_image`. A function gives the sum
over this micro-batch that stands above the bar; what stands below it is a sum over labels alone
(`denominators`), so both add up over micro-batches and ranks. All of it is float32 outside autocast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from geopose_dist.model.heads import Prediction
from geopose_dist.model.recipe import LossRecipe

STEEPEST_EDGE_M = 3.0
"""Steps of true heights count for the direction up to this size: a tower's edge is one edge."""


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
        city_mean_m: float32 [B], mean height of each tile's city; None = 0 m.
        city_mean_px: float32 [B], mean flow magnitude of each tile's city; None = 0 px.
        gsd_m: float32 [B], NaN where unknown; None = unknown everywhere.
    """

    agl_m: Tensor
    known: Tensor
    direction: Tensor
    scale_px_per_m: Tensor
    inside: Tensor | None = None
    magnitude_px: Tensor | None = None
    city_std_m: Tensor | None = None
    city_mean_m: Tensor | None = None
    city_mean_px: Tensor | None = None
    gsd_m: Tensor | None = None

    def posed(self) -> Tensor:
        """bool [B]: which tiles have angle and scale."""
        return torch.isfinite(self.scale_px_per_m) & torch.isfinite(self.direction).all(dim=1)

    def rows(self, which: slice) -> Targets:
        """The labels of some of the tiles."""
        return Targets(*(None if part is None else part[which] for part in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Labels:
    """What numerators and denominators share: labels without NaN, and the weight of each pixel.

    Attributes:
        agl_m: [B, 1, H, W], 0 where unknown.
        magnitude_px: [B, 1, H, W], 0 where unknown or without pose.
        height_weight: [B, 1, H, W], 0 where unknown.
        flow_weight: [B, 1, H, W], 0 where unknown or without pose.
        slope_weight: [B, 1, H-1, W-1], `height_weight` where the neighbours below and right are known, too.
        per_variance: [B, 1, 1, 1], one over the variance of the city's heights.
        mean_m: [B, 1, 1, 1], mean height of the city.
        mean_px: [B, 1, 1, 1], mean magnitude of the city.
        edge: [B, 1, H, W], size of the true height's step, 0 beside unknown heights.
        posed: float [B], 1 with a pose label.
        leaning: float [B], 0 without a pose label, less than 1 where little lean can be seen.
        direction: [B, 2], 0 without pose.
        scale: [B], 0 without pose.
        spacing_m: [B, 1, 1, 1], metres of ground from pixel to pixel.
    """

    agl_m: Tensor
    magnitude_px: Tensor
    height_weight: Tensor
    flow_weight: Tensor
    slope_weight: Tensor
    per_variance: Tensor
    mean_m: Tensor
    mean_px: Tensor
    edge: Tensor
    posed: Tensor
    leaning: Tensor
    direction: Tensor
    scale: Tensor
    spacing_m: Tensor

    @classmethod
    def of(cls, recipe: LossRecipe, targets: Targets) -> Labels:
        """Of the targets of a micro-batch."""
        known = targets.known
        agl_m = torch.where(known, targets.agl_m.float(), 0.0)
        posed = targets.posed()
        scale = torch.where(posed, targets.scale_px_per_m.float(), 0.0)
        direction = torch.where(posed[:, None], targets.direction.float(), 0.0)
        weight = known.float()
        if recipe.reduction == "per_image":
            weight = weight / weight.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
        both_down, both_right = known[:, :, 1:] & known[:, :, :-1], known[..., 1:] & known[..., :-1]
        down = (agl_m[:, :, 1:] - agl_m[:, :, :-1]).abs() * both_down
        right = (agl_m[..., 1:] - agl_m[..., :-1]).abs() * both_right
        edge = functional.pad(down, (0, 0, 0, 1)) + functional.pad(right, (0, 1))
        std = torch.ones_like(scale) if targets.city_std_m is None else targets.city_std_m.float()
        leaning = posed.float()
        if recipe.lean_px > 0:
            leaning = leaning * (std * scale / recipe.lean_px).clamp(max=1.0)
        magnitude = agl_m * _maps(scale)
        if targets.magnitude_px is not None:
            magnitude = torch.where(known & _maps(posed), targets.magnitude_px.float(), 0.0)
        gsd_m = torch.full_like(scale, torch.nan) if targets.gsd_m is None else targets.gsd_m.float()
        nothing = torch.zeros_like(scale)
        return cls(
            agl_m=agl_m,
            magnitude_px=magnitude,
            height_weight=weight,
            flow_weight=weight * _maps(posed.float()),
            slope_weight=weight[:, :, :-1, :-1] * (both_down[..., :-1] & both_right[:, :, :-1]),
            per_variance=_maps(std.square().reciprocal()),
            mean_m=_maps(nothing if targets.city_mean_m is None else targets.city_mean_m.float()),
            mean_px=_maps(nothing if targets.city_mean_px is None else targets.city_mean_px.float()),
            edge=edge.clamp(max=STEEPEST_EDGE_M) * _maps(leaning),
            posed=posed.float(),
            leaning=leaning,
            direction=direction,
            scale=scale,
            spacing_m=_maps(torch.where(torch.isfinite(gsd_m), gsd_m, recipe.spacing_m)),
        )


def _maps(values: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1]."""
    return values[:, None, None, None]


@dataclass(frozen=True)
class Answer:
    """A prediction in float32, its direction split into unit vector and length, both finite at length 0.

    Attributes:
        agl_m: [B, 1, H, W].
        magnitude_px: [B, 1, H, W].
        vector: [B, 2], the direction as predicted.
        unit: [B, 2], of length 1.
        length: [B], of `vector`.
        scale: [B].
        field: [B, 2, H, W], the direction by pixel, or None.
    """

    agl_m: Tensor
    magnitude_px: Tensor
    vector: Tensor
    unit: Tensor
    length: Tensor
    scale: Tensor
    field: Tensor | None

    @classmethod
    def of(cls, prediction: Prediction) -> Answer:
        """Of the outputs for a micro-batch."""
        vector, field = prediction.direction.float(), prediction.direction_map
        length = vector.norm(dim=1).clamp(min=1e-6)
        return cls(
            agl_m=prediction.agl_m.float(),
            magnitude_px=prediction.magnitude_px.float(),
            vector=vector,
            unit=vector / length[:, None],
            length=length,
            scale=prediction.scale_px_per_m.float(),
            field=None if field is None else field.float(),
        )


def bounded(squares: Tensor, tail: float) -> Tensor:
    """Squares of relative errors e, but 2 tail |e| - tail^2 where |e| is beyond `tail` (0: nowhere)."""
    if tail == 0:
        return squares
    bound = squares.detach() > tail**2
    linear = 2 * tail * torch.where(bound, squares, 1.0).sqrt() - tail**2
    return torch.where(bound, linear, squares)


def agl(recipe: LossRecipe, answer: Answer, labels: Labels) -> Tensor:
    """Height, by `loss.agl`.

    mse: sum w (p - t)^2 / sum w. The benchmark's (Christie et al., CVPR 2020, section 4).
    r2: sum w (p - t)^2 / var_city / sum w, variances fixed or running: what 1 - R2 of the score is, steady in
    a small batch, where `batch_r2` explodes on flat ones (docs/decisions.md 8).
    batch_r2: sum w (p - t)^2 / sum w (t - mean_city)^2 over the global batch: the challenge's first place.
    huber: sum w H(p - t) / sum w, H(e) = e^2 / 2 up to `huber_m`, beyond it huber_m (|e| - huber_m / 2)
    (Huber, "Robust estimation of a location parameter", 1964).
    """
    if recipe.agl == "huber":
        error = functional.huber_loss(answer.agl_m, labels.agl_m, reduction="none", delta=recipe.huber_m)
    else:
        error = (answer.agl_m - labels.agl_m).square()
    if recipe.agl == "r2":
        error = bounded(error * labels.per_variance, recipe.tail_std)
    return (labels.height_weight * error).sum()


def magnitude(recipe: LossRecipe, answer: Answer, labels: Labels) -> Tensor:
    """Flow magnitude in pixels, m against n, by `loss.magnitude`, where height and pose are known.

    mse: sum w (m - n)^2 / sum w (benchmark).
    batch_r2: sum w (m - n)^2 / sum w (n - mean_city)^2 over the global batch (challenge's first place).
    """
    return (labels.flow_weight * (answer.magnitude_px - labels.magnitude_px).square()).sum()


def angle(recipe: LossRecipe, answer: Answer, labels: Labels) -> Tensor:
    """The tile's direction v against the true unit vector u, by `loss.direction`; l = 1, or less near nadir.

    mse: sum l |v - u|^2 / (2 sum l), over both components (benchmark).
    cosine: sum l (1 - v.u / |v|) / sum l, blind to the length of v.
    l = min(1, std_city * scale / lean_px): a tile that leans by less than `lean_px` shows little of its direction.
    """
    if recipe.direction == "mse":
        return (labels.leaning * (answer.vector - labels.direction).square().sum(dim=1)).sum()
    cosine = (answer.unit * labels.direction).sum(dim=1)
    return (labels.leaning * (2 * (1 - cosine))).sum()


def unit(recipe: LossRecipe, answer: Answer, labels: Labels) -> Tensor:
    """sum (|v| - 1)^2 / tiles: keeps v from shrinking or growing under the cosine term, which cannot see it."""
    return (labels.posed * (answer.length - 1).square()).sum()


def pixel_angle(recipe: LossRecipe, answer: Answer, labels: Labels) -> Tensor:
    """sum g (1 - v.u / |v|) / sum g over pixels: each pixel's own vector v, where true heights change.

    g = l min(3 m, |step of t down| + |step of t right|): roof and facade edges know the lean (FINDINGS.md).
    """
    if answer.field is None:
        return labels.edge.new_zeros(())
    field = functional.normalize(answer.field, dim=1, eps=1e-6)
    cosine = (field * labels.direction[:, :, None, None]).sum(dim=1, keepdim=True)
    return (labels.edge * (1 - cosine)).sum()


def scale(recipe: LossRecipe, answer: Answer, labels: Labels) -> Tensor:
    """The tile's scale s against the true r in px/m, by `loss.scale`.

    mse: sum (s - r)^2 / tiles (benchmark). log: sum log(s / r)^2 / tiles: the relative error, by which a wrong
    scale makes flow wrong.
    """
    if recipe.scale == "mse":
        error = (answer.scale - labels.scale).square()
    else:
        ratio = answer.scale.clamp(min=1e-6) / torch.where(labels.posed > 0, labels.scale, 1.0)
        error = ratio.log().square()
    return (labels.posed * error).sum()


def flow(recipe: LossRecipe, answer: Answer, labels: Labels) -> Tensor:
    """sum w |p (s / r) v / |v| - t u|^2 / var_city / sum w: the flow itself, which is what R2_VFLOW scores.

    In metres (pixels over the true scale r), so that cities seen at a low scale count alike.
    """
    ratio = answer.scale / torch.where(labels.posed > 0, labels.scale, 1.0)
    predicted = (answer.agl_m * _maps(ratio)) * answer.unit[:, :, None, None]
    truth = labels.agl_m * labels.direction[:, :, None, None]
    squares = labels.per_variance * (predicted - truth).square().sum(dim=1, keepdim=True)
    return (labels.flow_weight * bounded(squares, recipe.tail_std)).sum()


def focal(recipe: LossRecipe, answer: Answer, labels: Labels) -> Tensor:
    """sum w (2 sigmoid(beta |e|) - 1)^gamma e^2 / sum w, e = p - t: hard pixels count more.

    Focal-R of Yang et al., "Delving into Deep Imbalanced Regression", ICML 2021 (error-aware loss), as the
    challenge's first place added it. (2 sigmoid(x) - 1 = tanh(x / 2).)
    """
    return (labels.height_weight * _focal(recipe, answer.agl_m - labels.agl_m)).sum()


def focal_magnitude(recipe: LossRecipe, answer: Answer, labels: Labels) -> Tensor:
    """The focal term of magnitudes in pixels, with `focal_beta` per pixel."""
    error = answer.magnitude_px - labels.magnitude_px
    return (labels.flow_weight * _focal(recipe, error)).sum()


def _focal(recipe: LossRecipe, error: Tensor) -> Tensor:
    return torch.tanh(recipe.focal_beta / 2 * error.abs()).pow(recipe.focal_gamma) * error.square()


def normal(recipe: LossRecipe, answer: Answer, labels: Labels) -> Tensor:
    """sum w (1 - n.m) / sum w: predicted against true surface normals, unit vectors along (-dh/dx, -dh/dy, 1).

    Hu et al., "Revisiting Single Image Depth Estimation", WACV 2019, section 3.2 (l_normal); the public
    tutorial of the challenge names surface normals as a next step. Slopes are metres per metre: differences to
    the neighbours below and right over the GSD (`spacing_m` where that is unknown).
    """
    down, right = _slopes(answer.agl_m, labels.spacing_m)
    true_down, true_right = _slopes(labels.agl_m, labels.spacing_m)
    product = down * true_down + right * true_right + 1
    lengths = (down.square() + right.square() + 1) * (true_down.square() + true_right.square() + 1)
    return (labels.slope_weight * (1 - product * lengths.rsqrt())).sum()


def gradient(recipe: LossRecipe, answer: Answer, labels: Labels) -> Tensor:
    """sum w (ln(1 + |de/dx| / a) + ln(1 + |de/dy| / a)) / sum w, e = p - t: edges stand where they should.

    Hu et al., WACV 2019, section 3.2 (l_grad, F(x) = ln(x + a), less its value at 0), a = `gradient_m`: the
    tutorial's edge consistency. The logarithm forgives a tower's edge that is one pixel off.
    """
    down, right = _slopes(answer.agl_m - labels.agl_m, recipe.gradient_m)
    return (labels.slope_weight * (torch.log1p(down.abs()) + torch.log1p(right.abs()))).sum()


def _slopes(height: Tensor, spacing: Tensor | float) -> tuple[Tensor, Tensor]:
    """Differences to the neighbours below and right over `spacing`, each [B, 1, H-1, W-1]."""
    corner = height[:, :, :-1, :-1]
    return (height[:, :, 1:, :-1] - corner) / spacing, (height[:, :, :-1, 1:] - corner) / spacing
