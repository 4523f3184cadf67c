"""Tiles in, poses out: the networks and everything between pixels as read and pixels as written.

A tile is reduced by the filter of packing, continued by reflection to the network's size multiple, cut into
windows if it is large, predicted by every checkpoint under every symmetry, and averaged: heights by weighted
mean, directions as unit vectors, scales by the mean of their logarithms. Heights then return to full size by
the inverse of the reduction. A batch is always computed at its full size, so a tile's answer does not depend
on how many neighbours it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from geopose_dist import geometry
from geopose_dist.data import resample
from geopose_dist.data.sample import U8
from geopose_dist.errors import UserError
from geopose_dist.geometry import F32, F64
from geopose_dist.infer import calibration, tiles
from geopose_dist.infer.enlarge import enlarge
from geopose_dist.infer.recipe import NetRecipe
from geopose_dist.model.inputs import city_numbers
from geopose_dist.model.weights import find_checkpoint, load_net


@dataclass(frozen=True)
class TilePose:
    """The answer for one tile.

    Attributes:
        agl_m: float32 [H, W] metres in 0 .. net.agl_max_m, at the size of the tile at full resolution.
        scale_px_per_m: at full resolution, within the recipe's limits.
        angle_rad: in [0, 2 pi).
        clipped: pixels (of the reduced tile) whose height had to be clipped.
        scale_limited: whether the scale was outside its limits.
    """

    agl_m: F32
    scale_px_per_m: float
    angle_rad: float
    clipped: int
    scale_limited: bool


def common_reduction(facts: Sequence[dict[str, Any]], names: Sequence[object]) -> tuple[int, str]:
    """How far and by which filter the training tiles of all checkpoints were reduced (UserError if they differ)."""
    reductions = [int(fact.get("reduction", 1)) for fact in facts]
    if len(set(reductions)) != 1:
        told = ", ".join(f"{name}: {by}" for name, by in zip(names, reductions, strict=True))
        raise UserError(
            f"these checkpoints were trained at different reductions ({told}); predict them apart"
        )
    filters = [str(fact.get("reduce_by", "area")) for fact in facts]
    if len(set(filters)) != 1 and reductions[0] > 1:
        told = ", ".join(f"{name}: {by}" for name, by in zip(names, filters, strict=True))
        raise UserError(
            f"these checkpoints were trained on tiles reduced by different filters ({told}); predict them apart"
        )
    return reductions[0], filters[0] if reductions[0] > 1 else "area"


def remaining_factor(reduction: int, reduced_by: int) -> int:
    """How far tiles that were reduced by `reduced_by` are still to be reduced (UserError)."""
    if reduction % reduced_by:
        raise UserError(
            f"the tiles were reduced by {reduced_by}, the checkpoint wants {reduction}; predict the "
            "original tiles, or pack with the checkpoint's reduction"
        )
    return reduction // reduced_by


class Predictor:
    """Networks on a device; `predict` is the whole of it."""

    def __init__(
        self,
        checkpoints: Sequence[Path],
        recipe: NetRecipe,
        *,
        batch: int,
        device: str = "cpu",
    ) -> None:
        loaded = [load_net(Path(path)) for path in checkpoints]
        fitted = checkpoints if recipe.calibration != "none" else []
        self.calibrations = [calibration.load(find_checkpoint(Path(path))) for path in fitted]
        self._setup(
            [net for net, _ in loaded], [facts for _, facts in loaded], checkpoints, recipe, batch, device
        )

    @classmethod
    def of_nets(
        cls,
        nets: Sequence[nn.Module],
        facts: Sequence[dict[str, Any]],
        recipe: NetRecipe,
        *,
        batch: int,
        device: str = "cpu",
    ) -> Predictor:
        """A predictor of networks in memory, each with `size_multiple` and the forward of `GeoposeNet`."""
        predictor = cls.__new__(cls)
        predictor.calibrations = []
        predictor._setup(nets, facts, [f"network {i}" for i in range(len(nets))], recipe, batch, device)
        return predictor

    def _setup(
        self,
        nets: Sequence[nn.Module],
        facts: Sequence[dict[str, Any]],
        names: Sequence[object],
        recipe: NetRecipe,
        batch: int,
        device: str,
    ) -> None:
        self.recipe, self.batch, self.device = recipe, batch, torch.device(device)
        self.reduction, self.reduce_by = common_reduction(facts, names)
        self.nets = [net.eval().to(self.device) for net in nets]
        self.size_multiple = math.lcm(*(int(net.size_multiple) for net in self.nets))  # type: ignore[arg-type]
        if recipe.compile != "none":
            self.nets = [torch.compile(net, mode=recipe.compile) for net in self.nets]  # type: ignore[misc]
        self.gsd_known = [bool(fact.get("gsd_known", False)) for fact in facts]
        self.weights = np.array(recipe.weights or [1.0] * len(self.nets))
        self.weights = self.weights / self.weights.sum()

    def warm_up(self, rows: int, columns: int) -> None:
        """Compile, choose kernels and fill caches with a black batch of `rows` x `columns` reduced pixels."""
        names: list[str | None] = [None] * self.batch
        pixels = np.zeros((self.batch, 3, rows, columns), np.uint8)
        self._average(pixels, np.full(self.batch, np.nan, np.float32), names)

    def predict(
        self,
        rgbs: Sequence[U8],
        gsds_m: Sequence[float | None],
        *,
        slots: Sequence[int] | None = None,
        reduced_by: int = 1,
        size: tuple[int, int] | None = None,
        cities: Sequence[str | None] | None = None,
    ) -> list[TilePose | None]:
        """Poses of up to `batch` tiles of one size; None where the network answered NaN or infinity.

        Args:
            rgbs: uint8 [H, W, 3] each, of one size.
            gsds_m: ground metres per pixel of each, None if unknown.
            slots: position of each in the batch; arithmetic libraries may round by position.
            reduced_by: how far the tiles were reduced already (shards); answers are at full resolution.
            size: rows and columns of the answers, where they are no multiples of `reduced_by`.
            cities: name of each tile's city, None if unknown; networks that know no such city do without.

        Raises:
            UserError: the tiles were reduced further than the network wants, or by no divisor of it.
        """
        agl_m, vectors, log_scales = self.answers(
            rgbs, gsds_m, slots=slots, reduced_by=reduced_by, cities=cities
        )
        size = size or (rgbs[0].shape[0] * reduced_by, rgbs[0].shape[1] * reduced_by)
        return [
            self.finish(heights, vector, float(log_scale), size, rgb if reduced_by == 1 else None)
            for heights, vector, log_scale, rgb in zip(agl_m, vectors, log_scales, rgbs, strict=True)
        ]

    def answers(
        self,
        rgbs: Sequence[U8],
        gsds_m: Sequence[float | None],
        *,
        slots: Sequence[int] | None = None,
        reduced_by: int = 1,
        cities: Sequence[str | None] | None = None,
    ) -> tuple[F32, F64, F64]:
        """As `predict`, before anything is limited or enlarged.

        Returns:
            (heights [N, h, w] in metres at the network's reduction, direction vectors [N, 2], natural logarithms
            of px/m among its pixels [N]).
        """
        factor = remaining_factor(self.reduction, reduced_by)
        small = [self.reduced(rgb, reduced_by) for rgb in rgbs]
        gsds = [None if gsd is None else gsd * factor for gsd in gsds_m]
        places = list(range(len(rgbs)) if slots is None else slots)
        return self.answers_of_reduced(small, gsds, places, list(cities or [None] * len(rgbs)))

    def reduced(self, rgb: U8, reduced_by: int = 1) -> U8:
        """A tile [H, W, 3] as the network sees it, [3, h, w]; any thread may do this."""
        factor = remaining_factor(self.reduction, reduced_by)
        small = resample.reduce_rgb(resample.pad_rgb(rgb, factor), factor)
        return np.ascontiguousarray(small.transpose(2, 0, 1))

    def answers_of_reduced(
        self,
        tiles_u8: Sequence[U8],
        gsds_m: Sequence[float | None],
        slots: Sequence[int],
        cities: Sequence[str | None],
    ) -> tuple[F32, F64, F64]:
        """As `answers`, of tiles [3, h, w] that are reduced, with the ground metres of their reduced pixels."""
        count, shapes = len(tiles_u8), {tile.shape for tile in tiles_u8}
        if count != len(gsds_m) or not 0 < count <= self.batch or len(shapes) > 1:
            raise ValueError(f"{count} tiles of sizes {shapes}; wanted 1 to {self.batch} alike")
        pixels = np.zeros((self.batch, *tiles_u8[0].shape), np.uint8)
        gsds = np.full(self.batch, np.nan, np.float32)
        names: list[str | None] = [None] * self.batch
        for place, tile, gsd, city in zip(slots, tiles_u8, gsds_m, cities, strict=True):
            pixels[place], names[place] = tile, city
            gsds[place] = math.nan if gsd is None else gsd
        agl_m, vectors, log_scales = self._average(pixels, gsds, names)
        places = list(slots)
        return agl_m[places], vectors[places], log_scales[places]

    def windows(
        self, pixels: U8, slots: Sequence[int], gsd_m: float | None, city: str | None
    ) -> tuple[F32, F64, F64]:
        """Reduced windows of one scene as they are: no filter, no limit, nothing enlarged.

        Args:
            pixels: uint8 [N, 3, H, W], N <= batch; sides are multiples of `size_multiple`, at most `net.window`.
            slots: position of each in the batch, as in `predict`.
            gsd_m: ground metres of a pixel at full resolution, None if unknown.
            city: name of the scene's city, None if unknown.

        Returns:
            (heights [N, H, W] in metres, direction vectors [N, 2], natural logarithms of px/m among reduced
            pixels [N]).
        """
        batch = np.zeros((self.batch, *pixels.shape[1:]), np.uint8)
        batch[list(slots)] = pixels
        gsds = np.full(self.batch, math.nan if gsd_m is None else gsd_m * self.reduction, np.float32)
        agl_m, vectors, log_scales = self._average(batch, gsds, [city] * self.batch)
        return agl_m[list(slots)], vectors[list(slots)], log_scales[list(slots)]

    def finish(
        self, agl_m: F32, vector: F64, log_scale: float, size: tuple[int, int], rgb: U8 | None
    ) -> TilePose | None:
        """One answer limited and at full size, along the edges of `rgb` if it is given; any thread may do this.

        None where the network answered NaN or infinity.
        """
        scale = math.exp(log_scale) if log_scale < 700 else math.nan  # what no float holds is no scale
        if not (np.isfinite(agl_m).all() and np.isfinite(vector).all() and math.isfinite(scale)):
            return None
        recipe = self.recipe
        clipped = int(((agl_m < 0) | (agl_m > recipe.agl_max_m)).sum())
        inside = np.clip(agl_m, 0, np.float32(recipe.agl_max_m))
        full = enlarge(inside, self.reduction, size, recipe.enlarge, rgb)
        full = np.clip(full, 0, np.float32(recipe.agl_max_m))  # slopes may reach a little beyond
        wanted = scale * self.reduction
        limited = min(max(wanted, recipe.scale_min_px_per_m), recipe.scale_max_px_per_m)
        return TilePose(full, limited, geometry.angle_of(*map(float, vector)), clipped, limited != wanted)

    def _average(self, pixels: U8, gsds_m: F32, names: Sequence[str | None]) -> tuple[F32, F64, F64]:
        """Heights [B, H, W], direction vectors [B, 2] and log-scales [B] over checkpoints and symmetries."""
        vectors, log_scales = np.zeros((len(pixels), 2)), np.zeros(len(pixels))
        agl_m: F32 | None = None
        ways = tiles.symmetries(self.recipe.tta)
        for number, net in enumerate(self.nets):
            share = float(self.weights[number]) / len(ways)
            gsds = gsds_m if self.gsd_known[number] else np.full_like(gsds_m, np.nan)
            for way in ways:
                heights, xy, logs = self._whole(net, way.apply(pixels), gsds, names)
                if self.calibrations:
                    apply, method = self.calibrations[number].apply, self.recipe.calibration
                    pairs = zip(heights, names, strict=True)
                    heights = np.stack([apply(tile, method, city) for tile, city in pairs])
                vectors += share * way.undo_direction(xy)
                log_scales += share * logs
                part = way.undo(heights)
                if share != 1:  # a single answer need not be copied
                    part = np.float32(share) * part
                agl_m = part if agl_m is None else agl_m + part
        assert agl_m is not None
        return agl_m, vectors, log_scales

    def _whole(
        self, net: nn.Module, pixels: U8, gsds_m: F32, names: Sequence[str | None]
    ) -> tuple[F32, F64, F64]:
        """One network's answer for tiles [B, 3, H, W] of any size, by windows where they are large."""
        count, (rows, columns) = len(pixels), pixels.shape[2:]
        padded = tiles.pad_to_multiple(pixels, self.size_multiple)
        size = (padded.shape[2], padded.shape[3])
        if max(size) <= self.recipe.window:
            heights, xy, logs = self._network(net, padded, gsds_m, names)
            return heights[:, :rows, :columns], xy, logs
        agl_m = np.zeros((count, *size), np.float32)
        vectors, log_scales, area = np.zeros((count, 2)), np.zeros(count), 0.0
        for window in tiles.windows(size, self.recipe.window, self.recipe.overlap, self.size_multiple):
            heights, xy, logs = self._network(net, padded[:, :, window.rows, window.columns], gsds_m, names)
            agl_m[:, window.rows, window.columns] += window.weight * heights
            share = float(window.weight.sum(dtype=np.float64))
            area += share
            vectors += share * xy
            log_scales += share * logs
        return agl_m[:, :rows, :columns], vectors / area, log_scales / area

    def _network(
        self, net: nn.Module, pixels: U8, gsds_m: F32, names: Sequence[str | None]
    ) -> tuple[F32, F64, F64]:
        known = getattr(getattr(net, "recipe", None), "cities", [])
        city = {"city": city_numbers(known, names).to(self.device)} if known else {}
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"),
        ):
            gsd_m = torch.from_numpy(gsds_m).to(self.device)
            answer = net(torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device), gsd_m, **city)
        heights = answer.agl_m[:, 0].float().cpu().numpy()
        xy = answer.direction.double().cpu().numpy()
        # A vector of length 0 says nothing of the direction; a unit one each lets every answer count alike.
        xy = xy / np.maximum(np.linalg.norm(xy, axis=1, keepdims=True), 1e-12)
        scales = answer.scale_px_per_m.double().cpu().numpy()
        least = self.recipe.scale_min_px_per_m / self.reduction * 1e-3  # logarithm of what is not positive
        return heights, xy, np.log(np.maximum(scales, least))
