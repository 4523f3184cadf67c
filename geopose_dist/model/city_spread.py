"""How heights and magnitudes spread in each city: what r2 terms divide by, fixed or running.

Fixed numbers come from the recipe. Running ones start there and become those of all labels seen before the
current step: the step's sums cross ranks together with the loss's denominators, and are added only after
the step's own targets are made. So every rank divides by the same numbers, at no exchange of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from geopose_dist.model.loss_terms import Targets
from geopose_dist.model.recipe import LossRecipe

START_PIXELS = 2.0**16
"""Known pixels that the recipe's numbers count for when running ones begin: one tile of 256 px."""
LEAST_STD_M = 0.1
"""A city of flat labels must not divide by nothing."""


class CitySpread:
    """Mean and standard deviation of heights (m) and mean magnitude (px) by city, on a device.

    Attributes:
        running: whether labels change them.
        sums: float64 [cities, 5] of the labels so far: known pixels, heights, squared heights, pixels with
            magnitude, magnitudes; the whole state.
    """

    def __init__(self, recipe: LossRecipe, cities: Sequence[str], device: torch.device) -> None:
        self.running = recipe.city_spread == "running"

        def column(known: Mapping[str, float], otherwise: float) -> Tensor:
            return torch.tensor([known.get(city, otherwise) for city in cities], dtype=torch.float64)

        std, mean = column(recipe.city_std_m, 1.0), column(recipe.city_mean_m, 0.0)
        mean_px = column(recipe.city_mean_px, 0.0)
        self._fixed = torch.stack([std, mean, mean_px]).float().to(device)
        start = torch.stack([torch.ones_like(std), mean, std**2 + mean**2, torch.ones_like(std), mean_px], 1)
        self.sums = (START_PIXELS * start).to(device)

    def describe(self, targets: Targets, city: Tensor) -> Targets:
        """The targets with the spread of each tile's `city`, int64 [B]; unchanged if no city is named."""
        if not len(self.sums):
            return targets
        std, mean, mean_px = self.table()[:, city]
        return targets._replace(city_std_m=std, city_mean_m=mean, city_mean_px=mean_px)

    def table(self) -> Tensor:
        """float32 [3, cities]: standard deviation, mean, mean magnitude."""
        if not self.running:
            return self._fixed
        pixels, height, square, posed, magnitude = self.sums.unbind(dim=1)
        mean = height / pixels
        std = (square / pixels - mean.square()).clamp(min=LEAST_STD_M**2).sqrt()
        return torch.stack([std, mean, magnitude / posed]).float()

    def shares(self, targets: Targets, city: Tensor) -> Tensor:
        """float64 [cities * 5]: what a micro-batch's labels add, [0] where nothing runs; sum it over ranks."""
        if not self.running:
            return self.sums.new_zeros(0)
        known = targets.known.double()
        height = torch.where(targets.known, targets.agl_m.double(), 0.0)
        posed = targets.posed().double()
        scale = torch.where(targets.posed(), targets.scale_px_per_m.double(), 0.0)
        maps = torch.stack([known, height, height.square()], 1).sum(dim=(2, 3, 4))
        by_tile = torch.cat([maps, (maps[:, 0] * posed)[:, None], (maps[:, 1] * scale)[:, None]], 1)
        return torch.zeros_like(self.sums).index_add_(0, city, by_tile).flatten()

    def add(self, total: Tensor) -> None:
        """Take in the sum of `shares` over the whole global batch."""
        if self.running:
            self.sums += total.view_as(self.sums)
