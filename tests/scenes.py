"""Georeferenced scenes for tests, and a network small enough to be understood, without global pooling."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from geopose_dist import cli
from geopose_dist.infer import raster

NET = ("--net.window", "192", "--net.overlap", "96", "--device", "cpu", "--threads", "1", "--batch", "3")


class Pyramid(nn.Module):
    """Two halvings, convolutions on every level, back to full size: what it sees ends 24 pixels away.

    Direction and scale of an image are those of its mean colour: (red, green) - 127 and blue / 200.
    """

    size_multiple = 32
    SEES_PX = 24

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.levels = nn.ModuleList(
            [nn.Conv2d(3, 8, 5, padding=2), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)]
        )
        self.head = nn.Conv2d(8, 1, 3, padding=1)
        self.passes = 0

    def forward(self, rgb_u8: torch.Tensor, gsd_m: torch.Tensor) -> SimpleNamespace:
        self.passes += 1
        assert rgb_u8.shape[2] % 32 == rgb_u8.shape[3] % 32 == 0
        image = rgb_u8.float()
        maps = image / 64 - 2
        for number, level in enumerate(self.levels):
            maps = torch.tanh(level(functional.max_pool2d(maps, 2) if number else maps))
        heights = 30 * self.head(functional.interpolate(maps, scale_factor=4.0)).abs()
        mean = image.mean(dim=(2, 3))
        return SimpleNamespace(agl_m=heights, direction=mean[:, :2] - 127, scale_px_per_m=mean[:, 2] / 200)


def use_pyramid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reduction: int = 1) -> tuple[Path, Pyramid]:
    """Let `predict` find a Pyramid in the checkpoint that is returned."""
    net = Pyramid()
    path = tmp_path / "pyramid.safetensors"
    path.write_bytes(b"read by nobody")
    facts = {"reduction": reduction}
    monkeypatch.setattr("geopose_dist.infer.predictor.load_net", lambda _: (net, facts))
    monkeypatch.setattr("geopose_dist.model.weights.read_facts", lambda _: facts)
    return path, net


def pixels(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """uint8 [H, W, 3]: smooth patches and noise, brighter in red, so that the direction is to the right."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 200, (rows // 16 + 1, columns // 16 + 1, 3)).repeat(16, 0).repeat(16, 1)
    noisy = coarse[:rows, :columns] + rng.integers(-20, 20, (rows, columns, 3)) + [40, 0, 0]
    return noisy.clip(0, 255).astype(np.uint8)


def write_scene(path: Path, rgb: np.ndarray, **profile: Any) -> Path:
    """A tiled GeoTIFF in UTM 17 north with pixels of 0.5 m, unless `profile` says otherwise."""
    import rasterio

    from geopose_dist.infer.raster import quiet

    facts: dict[str, Any] = {
        "crs": "EPSG:32617",
        "transform": rasterio.Affine(0.5, 0, 436000, 0, -0.5, 3355000),
        "tiled": True,
        "blockxsize": 64,
        "blockysize": 64,
        "photometric": "rgb" if rgb.shape[2] >= 3 else "minisblack",
        **profile,
    }
    rows, columns, bands = rgb.shape
    with (
        quiet(),
        rasterio.open(
            path, "w", driver="GTiff", width=columns, height=rows, count=bands, dtype=rgb.dtype, **facts
        ) as file,
    ):
        file.write(rgb.transpose(2, 0, 1))
    return path


def write_large_scene(path: Path, side: int) -> None:
    """`side` x `side` pixels of repeated patches, written strip by strip."""
    import rasterio

    patch = pixels(512, 2048)
    strip = np.tile(patch, (1, side // 2048 + 1, 1))[:, :side].transpose(2, 0, 1)
    facts: dict[str, Any] = {"tiled": True, "blockxsize": 512, "blockysize": 512, "photometric": "rgb"}
    place = rasterio.Affine(0.5, 0, 436000, 0, -0.5, 3355000)
    with rasterio.open(
        path, "w", driver="GTiff", width=side, height=side, count=3, dtype="uint8", crs="EPSG:32617", transform=place,
        **facts,
    ) as file:  # fmt: skip
        for row in range(0, side, 512):
            rows = min(512, side - row)
            rolled = np.roll(strip, row, axis=2)[:, :rows]
            file.write(rolled, window=rasterio.windows.Window(0, row, side, rows))


def predict(source: Path, checkpoint: Path, out: Path, *options: str, dispatch: str = "inline") -> int:
    words = ["--source", str(source), "--checkpoint", str(checkpoint), "--out", str(out), *NET]
    return cli.main(["predict", *words, "--dispatch", dispatch, *options])


def read(path: Path) -> np.ndarray:
    import rasterio

    with raster.quiet(), rasterio.open(path) as file:
        bands = file.read()
    return bands[0] if len(bands) == 1 else bands.transpose(1, 2, 0)


def files_of(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and ".geopose" not in str(path)
    }
