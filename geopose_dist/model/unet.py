"""The network: a segmentation-models-pytorch U-Net with heads for height, magnitude, direction, scale.

Bytes go in: normalisation is part of the network and of its saved form, so no caller can get it wrong.
The heads are assembled from the recipe; with `magnitude: separate, direction: pooled, scale:
least_squares, height: linear` they are the benchmark's four (DOMAIN section 4).
"""

from __future__ import annotations

import difflib

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from geopose_dist.errors import UserError
from geopose_dist.model import heads
from geopose_dist.model.heads import Prediction
from geopose_dist.model.inputs import TYPICAL_GSD_M, TileInputs
from geopose_dist.model.recipe import ModelRecipe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class GeoposeNet(nn.Module):
    """U-Net with the heads of `recipe`; the encoder's weights are random (see `pretrained.load_encoder`).

    Attributes:
        recipe: what it was built from.
        size_multiple: rows and columns of an input must be multiples of this.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, recipe: ModelRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.size_multiple = 32
        self.height_unit_m = recipe.height_unit_m or 1.0
        self.unet = build_unet(recipe)
        mean, std = normalisation(recipe.encoder)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)
        deepest = self.unet.encoder.out_channels[-1]
        if recipe.direction == "pooled":
            self.direction = nn.Linear(deepest, 2)
        start = recipe.scale_mean_px_per_m or 0.5
        if recipe.scale == "pooled":
            self.scale: heads.PooledScale | heads.ZenithScale = heads.PooledScale(deepest, start)
        if recipe.scale == "zenith":
            self.scale = heads.ZenithScale(deepest, start, TYPICAL_GSD_M, recipe.input_dropout)
        if recipe.full_resolution_skip:
            width = recipe.decoder_channels[-1]
            self.full_resolution = heads.FullResolutionSkip(recipe.full_resolution_skip, width)
        cities = len(recipe.cities) if recipe.city_input else 0
        if recipe.gsd_input or cities:
            self.inputs = TileInputs(
                deepest, gsd=recipe.gsd_input, cities=cities, dropout=recipe.input_dropout
            )
        if recipe.height == "softplus":
            bias = self.unet.segmentation_head[0].bias
            mean_m = recipe.height_mean_m or 4.0
            with torch.no_grad():
                bias[0] = heads.inverse_softplus(mean_m / self.height_unit_m)
                if recipe.magnitude == "separate":
                    bias[1] = mean_m * start

    def forward(
        self, rgb_u8: Tensor, gsd_m: Tensor, inside: Tensor | None = None, city: Tensor | None = None
    ) -> Prediction:
        """Predict a batch.

        Args:
            rgb_u8: uint8 [B, 3, H, W]; H and W multiples of `size_multiple`.
            gsd_m: float32 [B], NaN where unknown.
            inside: bool [B, 1, H, W], False on padding; None = all inside.
            city: int64 [B], position in `recipe.cities`, anything else = unknown; None = all unknown.
        """
        image = (rgb_u8.float() - self.mean) / self.std
        features = self.unet.encoder(image)
        if hasattr(self, "inputs"):
            with torch.autocast(rgb_u8.device.type, enabled=False):
                known = self.inputs(gsd_m, city)[:, :, None, None]
            features = [*features[:-1], features[-1] + known.to(features[-1].dtype)]
        decoded = self.unet.decoder(features)
        if hasattr(self, "full_resolution"):
            decoded = self.full_resolution(image, decoded)
        maps = self.unet.segmentation_head(decoded)
        with torch.autocast(rgb_u8.device.type, enabled=False):
            return self._heads(maps.float(), features[-1].float(), gsd_m, inside)

    def _heads(self, maps: Tensor, deepest: Tensor, gsd_m: Tensor, inside: Tensor | None) -> Prediction:
        recipe = self.recipe
        parts = list(torch.split(maps, self.map_channels(), dim=1))
        agl_m = parts.pop(0)
        if recipe.height == "softplus":
            agl_m = functional.softplus(agl_m) * self.height_unit_m
        magnitude_px = parts.pop(0) if recipe.magnitude == "separate" else None
        direction_map = parts.pop(0) if recipe.direction == "edges" else None
        pooled = deepest.mean(dim=(2, 3))
        if direction_map is None:
            direction = self.direction(functional.dropout(pooled, recipe.dropout, self.training))
        else:
            weight = heads.edge_weights(agl_m)
            if recipe.direction_confidence:
                weight = weight * functional.softplus(parts.pop(0))
                weight = weight / weight.sum(dim=(2, 3), keepdim=True).clamp(min=1e-12)
            direction = (direction_map * weight).sum(dim=(2, 3))
        if recipe.scale == "pooled":
            scale = self.scale(pooled)
        elif recipe.scale == "zenith":
            scale = self.scale(pooled, gsd_m)
        else:
            assert magnitude_px is not None
            scale = heads.least_squares_scale(agl_m, magnitude_px, inside, heads.LEAST_SQUARES_RIDGE)
        if magnitude_px is None:
            magnitude_px = agl_m * scale[:, None, None, None]
        return Prediction(agl_m, magnitude_px, direction, scale, direction_map)

    def map_channels(self) -> list[int]:
        """Channels of each output map, in order."""
        return map_channels(self.recipe)


def map_channels(recipe: ModelRecipe) -> list[int]:
    """Channels of a recipe's output maps: height, magnitude if separate, direction if per pixel, its confidence."""
    separate, edges = recipe.magnitude == "separate", recipe.direction == "edges"
    return [1] + [1] * separate + [2] * edges + [1] * (edges and recipe.direction_confidence)


def build_unet(recipe: ModelRecipe) -> smp.Unet:
    """The smp U-Net of a recipe, without pretrained weights; unknown encoders are UserErrors with close names."""
    norms = {"batchnorm": "batchnorm", "groupnorm": "identity", "none": "identity"}
    name = recipe.encoder
    known = smp.encoders.get_encoder_names()
    timm_name = name.removeprefix("tu-").split(".")[0]
    if not (name in known or (name.startswith("tu-") and timm.is_model(timm_name))):
        names = [*known, *(f"tu-{model}" for model in timm.list_models())]
        near = difflib.get_close_matches(name, names, n=4, cutoff=0.4)
        raise UserError(
            f"model.encoder {name!r} is not an encoder of smp or timm; close: {', '.join(near) or 'none'}"
        )
    try:
        unet = smp.Unet(
            name,
            encoder_weights=None,
            decoder_use_norm=norms[recipe.decoder_norm],
            decoder_channels=tuple(recipe.decoder_channels),
            classes=sum(map_channels(recipe)),
        )
    except (RuntimeError, ValueError, AssertionError) as error:
        tags = timm.list_pretrained(f"{timm_name}.*")
        raise UserError(
            f"model.encoder {name!r} cannot be built as the encoder of a U-Net ({str(error)[:150]}); published "
            f"variants of it: {', '.join(f'tu-{tag}' for tag in tags[:6]) or 'none'}"
        ) from error
    if recipe.decoder_norm == "groupnorm":
        _put_group_norm(unet.decoder)
    return unet


def _put_group_norm(decoder: nn.Module) -> None:
    """Replace each convolution's identity normalisation by GroupNorm, which no cut of a batch can change."""
    for module in decoder.modules():
        if isinstance(module, nn.Sequential) and len(module) >= 2 and isinstance(module[0], nn.Conv2d):
            channels = module[0].out_channels
            groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
            if isinstance(module[1], nn.Identity):
                module[1] = nn.GroupNorm(groups, channels)


def normalisation(encoder: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of RGB in 0..1 that the encoder's published weights were trained with."""
    if encoder.startswith("tu-"):
        published = timm.models.get_pretrained_cfg(encoder.removeprefix("tu-"), allow_unregistered=True)
        if published is not None and published.mean:
            return tuple(published.mean), tuple(published.std)
    return IMAGENET_MEAN, IMAGENET_STD
