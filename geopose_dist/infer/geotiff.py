"""The outputs of a scene as cloud-optimised GeoTIFFs, filled block by block.

Blocks come in any order and go into a plain tiled file in the scratch folder; `finish` then copies it, with
overviews, through GDAL's COG driver, whose layout depends on the pixels alone, and renames it into place. Memory
stays at GDAL's cache, whatever the size of the scene.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from geopose_dist.infer.raster import CACHE_MB, Scene, quiet

TILE_PX = 512
"""Side of the tiles inside the files; blocks are multiples of it."""


class Canvas:
    """One output on its way.

    Args:
        scene: gives size, coordinate system and transform.
        scratch: folder of the file on its way.
        path: where the finished file goes.
        dtype: of its pixels.
        bands: 1, or 3 for RGB.
        no_data: number that means unknown, if any.
        resampling: of the overviews.
    """

    def __init__(
        self,
        scene: Scene,
        scratch: Path,
        path: Path,
        *,
        dtype: str,
        bands: int = 1,
        no_data: float | None = None,
        resampling: str = "average",
    ) -> None:
        import rasterio
        from rasterio.crs import CRS
        from rasterio.transform import Affine

        self.path, self.dtype, self.resampling = path, dtype, resampling
        self.temporary = scratch / f"{path.parent.name}-{path.name}"
        placed = {"crs": CRS.from_wkt(scene.crs_wkt)} if scene.crs_wkt else {}
        if Affine(*scene.transform) != Affine.identity():
            placed["transform"] = Affine(*scene.transform)
        with rasterio.Env(GDAL_CACHEMAX=CACHE_MB), quiet():
            self._file: Any = rasterio.open(
                self.temporary,
                "w",
                driver="GTiff",
                width=scene.columns,
                height=scene.rows,
                count=bands,
                dtype=dtype,
                nodata=no_data,
                tiled=True,
                blockxsize=TILE_PX,
                blockysize=TILE_PX,
                compress="deflate",
                zlevel=1,
                bigtiff="yes",
                photometric="rgb" if bands == 3 else "minisblack",
                **placed,
            )

    def write(self, rows: slice, columns: slice, pixels: npt.NDArray[Any]) -> None:
        """Put a block [h, w] or [h, w, bands] in its place."""
        import rasterio
        from rasterio.windows import Window

        window = Window(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
        bands = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        with rasterio.Env(GDAL_CACHEMAX=CACHE_MB), quiet():
            self._file.write(np.ascontiguousarray(bands), window=window)

    def finish(self) -> None:
        """Close, and make the file under its own name, whole or not at all."""
        import rasterio
        from rasterio import shutil

        self._file.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        predictor = "yes" if self.dtype != "uint8" else "no"
        with rasterio.Env(GDAL_CACHEMAX=CACHE_MB, GDAL_NUM_THREADS="ALL_CPUS"), quiet():
            shutil.copy(
                str(self.temporary),
                str(whole),
                driver="COG",
                compress="DEFLATE",
                predictor=predictor,
                blocksize=str(TILE_PX),
                overview_resampling=self.resampling,
                bigtiff="IF_SAFER",
            )
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        whole.replace(self.path)
        self.temporary.unlink()
