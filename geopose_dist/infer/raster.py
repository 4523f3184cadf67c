"""A georeferenced GeoTIFF of any size: its facts, and its pixels by window, never whole.

`look` reads the header and refuses, in one sentence, what is no image of RGB bytes. Pixels outside the image
(no-data, alpha, mask) are told apart from black ones. Only GDAL's GeoTIFF driver is used: others follow
names inside a file to other files and hosts. rasterio, the extra `scenes`, is imported when it is needed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from geopose_dist.data.sample import U8
from geopose_dist.errors import UserError

Bools = npt.NDArray[np.bool_]

TIFF_SUFFIXES = (".tif", ".tiff")
GEO_TAGS = (33550, 33922, 34264, 34735)
"""Pixel scale, tie points, transformation, and keys of a GeoTIFF."""
LARGEST_TILE_PX = 8192
"""A TIFF with a longer side is read by window even without a place on the earth."""
CACHE_MB = 128
"""GDAL's cache of decoded blocks, of which a default of 5 % of the machine would go to every worker."""
M_PER_DEGREE = 111_320.0
"""Of latitude, and of longitude at the equator."""


@dataclass(frozen=True)
class Scene:
    """What the header of a scene says.

    Attributes:
        path: the file.
        rows, columns: its size.
        bands: numbers of its red, green and blue band, from 1.
        crs_wkt: its coordinate system, empty if it has none.
        transform: six numbers from (column, row) to map coordinates, as GDAL orders them in rasterio.
        gsd_m: mean ground metres per pixel, None without a coordinate system.
        all_known: whether every pixel belongs to the image.
    """

    path: Path
    rows: int
    columns: int
    bands: tuple[int, int, int]
    crs_wkt: str
    transform: tuple[float, float, float, float, float, float]
    gsd_m: float | None
    all_known: bool


def is_scene(path: Path) -> bool:
    """Whether a file is a TIFF with a place on the earth, or one too large to be read whole."""
    if path.suffix.lower() not in TIFF_SUFFIXES or not path.is_file():
        return False
    import tifffile

    try:
        with tifffile.TiffFile(path) as tif:
            page = tif.pages.first
            return any(tag in page.tags for tag in GEO_TAGS) or max(page.shape[:2]) > LARGEST_TILE_PX
    except (
        OSError,
        ValueError,
        RuntimeError,
        IndexError,
        KeyError,
        TypeError,
    ):  # damaged in one of many ways
        return False  # the reader of tiles will say what is wrong with it


def look(path: Path) -> Scene:
    """Facts of a scene (UserError: no rasterio, unreadable, or not RGB bytes)."""
    if importlib.util.find_spec("rasterio") is None:
        raise UserError(
            f"--source {path}: a scene needs rasterio, which is not installed; pip install 'geopose-dist[scenes]'"
        )
    with _open(path) as dataset:
        bands = _rgb_bands(path, dataset)
        crs = dataset.crs
        if crs is None and dataset.gcps[0]:
            raise UserError(
                f"{path}: placed by ground control points only; wanted a transform; run gdalwarp on it first"
            )
        from rasterio.enums import MaskFlags

        flags = [MaskFlags.all_valid in dataset.mask_flag_enums[band - 1] for band in bands]
        return Scene(
            path.resolve(),
            dataset.height,
            dataset.width,
            bands,
            crs.to_wkt() if crs else "",
            tuple(dataset.transform)[:6],
            _gsd_m(dataset) if crs else None,
            all(flags),
        )


def _rgb_bands(path: Path, dataset: Any) -> tuple[int, int, int]:
    """Numbers of the red, green and blue band: by their marks, else the first three of three or four."""
    marks = [mark.name for mark in dataset.colorinterp]
    if {"red", "green", "blue"} <= set(marks):
        bands = marks.index("red") + 1, marks.index("green") + 1, marks.index("blue") + 1
    elif len(marks) == 3 or (len(marks) == 4 and marks[3] == "alpha"):
        bands = 1, 2, 3
    else:
        raise UserError(
            f"{path}: {len(marks)} band{'s' * (len(marks) != 1)} ({', '.join(marks)}); wanted red, green and "
            "blue; choose them with `gdal_translate -b R -b G -b B -colorinterp red,green,blue`"
        )
    kinds = {dataset.dtypes[band - 1] for band in bands}
    if kinds != {"uint8"}:
        raise UserError(
            f"{path}: pixels are {' and '.join(sorted(kinds))}; wanted uint8 as the network was trained on; "
            "stretch them with `gdal_translate -ot Byte -scale`"
        )
    return bands


def _gsd_m(dataset: Any) -> float:
    """Mean side of a pixel in metres; in degrees at the scene's own latitude."""
    transform = dataset.transform
    side = math.sqrt(abs(transform.a * transform.e - transform.b * transform.d))
    if dataset.crs.is_projected:
        return float(side * dataset.crs.linear_units_factor[1])
    latitude = transform.f + transform.d * dataset.width / 2 + transform.e * dataset.height / 2
    return side * M_PER_DEGREE * math.sqrt(max(math.cos(math.radians(latitude)), 1e-3))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """rasterio without its warning of files that have no place on the earth, which we tell once ourselves."""
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def _open(path: Path) -> Any:
    import rasterio
    from rasterio.errors import RasterioError

    with rasterio.Env(GDAL_CACHEMAX=CACHE_MB), quiet():
        try:
            return rasterio.open(path, driver="GTiff")
        except RasterioError as error:
            raise UserError(
                f"{path}: cannot be read as GeoTIFF ({error}); fetch it again, or convert it with gdal_translate"
            ) from error


class SceneReader:
    """Windows of a scene; may be shared by threads, which then wait for each other."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._lock = threading.Lock()
        self._dataset = _open(scene.path)

    def read(self, rows: slice, columns: slice) -> tuple[U8, Bools]:
        """(rgb uint8 [h, w, 3], known bool [h, w]) of a window inside the scene; unknown pixels are black."""
        import rasterio
        from rasterio.errors import RasterioError
        from rasterio.windows import Window

        window = Window(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
        with self._lock, rasterio.Env(GDAL_CACHEMAX=CACHE_MB), quiet():
            try:
                bands = self._dataset.read(list(self.scene.bands), window=window)
                known: Bools = (
                    np.ones(bands.shape[1:], np.bool_)
                    if self.scene.all_known
                    else self._dataset.dataset_mask(window=window) > 0
                )
            except RasterioError as error:
                raise UserError(
                    f"{self.scene.path}: rows {rows.start} to {rows.stop}, columns {columns.start} to "
                    f"{columns.stop} cannot be read ({error.__cause__ or error}); fetch the file again"
                ) from error
        rgb: U8 = np.ascontiguousarray(bands.transpose(1, 2, 0))
        if not known.all():
            rgb[~known] = 0
        return rgb, known
