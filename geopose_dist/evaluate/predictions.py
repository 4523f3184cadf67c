"""Files of the challenge, one tile at a time: `KEY_AGL.tif` and `KEY_VFLOW.json`, read strictly and written.

A prediction is uint16 centimetres and px/cm, finite everywhere: the public scorer lets unknown values of a
prediction go unpunished, so here 65535, NaN, a float file, a wrong size or a missing file is an error by
name. Truth may be uint16 centimetres (65535 = unknown) or float metres (NaN = unknown) with px/m, the rule
of a plain folder. Files whose name starts with a dot are somebody's bookkeeping and are not looked at.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from geopose_dist import geometry
from geopose_dist.errors import UserError
from geopose_dist.geometry import F32, U16

_NAME = re.compile(r"(?P<key>[^.].*)_(?:(?P<agl>AGL\.tiff?)|(?P<vflow>VFLOW\.json))", re.IGNORECASE)

DEFLATE_LEVEL = 3
"""libdeflate level of written heights. Level 4 takes a sixth more time for 1 % fewer bytes, level 1 half the
time for 7 % more (2048x2048 synthetic city)."""
ROWS_PER_STRIP = 64
MAX_PIXELS = 2**30
"""A file that claims more is refused before anything is allocated for it."""
SIGNIFICANT_DIGITS = 9
"""Of numbers in VFLOW files: enough for float32, few enough that the last bits of a sum do not show."""


@dataclass
class TileFiles:
    """The two files of one tile, as far as they exist."""

    key: str
    agl: Path | None = None
    vflow: Path | None = None

    @property
    def city(self) -> str:
        """Text before the first underscore of the key."""
        return self.key.partition("_")[0]


@dataclass(frozen=True)
class Listing:
    """What a folder of challenge files holds.

    Attributes:
        tiles: by key, sorted.
        others: files and folders with other names, sorted; dot-names are left out.
        problems: two files for one thing, one sentence each.
    """

    tiles: dict[str, TileFiles]
    others: list[Path]
    problems: list[str]


def list_folder(folder: Path, option: str) -> Listing:
    """The tiles of `folder`; a folder that does not exist is a UserError naming `option`."""
    if not folder.is_dir():
        raise UserError(
            f"{option} {folder}: no such folder; wanted one with KEY_AGL.tif and KEY_VFLOW.json files"
        )
    tiles: dict[str, TileFiles] = {}
    others: list[Path] = []
    problems: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        match = _NAME.fullmatch(path.name)
        if match is None or not path.is_file():
            others.append(path)
            continue
        tile = tiles.setdefault(match["key"], TileFiles(match["key"]))
        kind = "agl" if match["agl"] else "vflow"
        if getattr(tile, kind) is not None:
            problems.append(f"{path}: a second file beside {getattr(tile, kind).name}; remove one of them")
        setattr(tile, kind, path)
    return Listing(dict(sorted(tiles.items())), others, problems)


def read_tiff(path: Path) -> npt.NDArray[Any]:
    """Pixels of a TIFF, whatever their shape and dtype; a damaged file is a UserError naming it."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            if len(tiff.pages) != 1:
                raise UserError(
                    f"{path}: {len(tiff.pages)} pages; wanted one page of heights; write it again"
                )
            page = tiff.pages.first
            _check_reach(page, path)
            pixels: npt.NDArray[Any] = page.asarray(maxworkers=1)
            return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    except UserError:
        raise
    # tifffile and its codecs tell of damaged bytes in many ways (TiffFileError and the codecs' errors are
    # ValueError or RuntimeError); a bug of ours would be none of these.
    except (OSError, ValueError, RuntimeError, IndexError, KeyError, TypeError, EOFError) as error:
        said = " ".join(str(error).split())[:150]
        raise UserError(
            f"{path}: cannot be read as TIFF ({type(error).__name__}: {said}); wanted heights; write it again"
        ) from error


def _check_reach(page: Any, path: Path) -> None:
    """ValueError if the file ends before its pixels do, which tifffile would fill, or claims too many."""
    if page.size > MAX_PIXELS:
        raise ValueError(f"it claims {page.size} values")
    reaches = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
    if not reaches or 0 in page.databytecounts or max(reaches) > path.stat().st_size:
        raise ValueError("the file is cut short")


def tiff_shape(path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of a TIFF's first page without decoding it (UserError if it is none)."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            _check_reach(page, path)
            return tuple(page.shape), np.dtype(page.dtype)
    except (OSError, ValueError, RuntimeError, IndexError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read as TIFF ({error}); wanted KEY_AGL.tif; restore the file"
        ) from error


def check_heights(heights: npt.NDArray[Any], path: Path, size: tuple[int, ...] | None) -> list[str]:
    """What is wrong with the heights of a prediction, one sentence each.

    Args:
        heights: pixels as read.
        path: the file that they came from.
        size: rows and columns wanted, or None if unknown.
    """
    problems = []
    if size is not None and heights.shape != size:
        problems.append(f"{path}: size {_size(heights.shape)}; wanted {_size(size)} as in the other folder")
    if heights.dtype != np.uint16:
        hint = "; `geopose convert` turns float metres into it" if heights.dtype.kind == "f" else ""
        problems.append(f"{path}: dtype {heights.dtype}; a prediction is uint16 centimetres{hint}")
        unknown = int((~np.isfinite(heights)).sum()) if heights.dtype.kind == "f" else 0
        if unknown:
            problems.append(
                f"{path}: {unknown} pixels are NaN or infinite; a prediction is finite everywhere"
            )
    else:
        unknown = int(np.count_nonzero(heights == geometry.NO_DATA_CM))
        if unknown:
            problems.append(
                f"{path}: {unknown} pixels are 65535, which means unknown; a prediction is known everywhere"
            )
    return problems


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def read_vflow(path: Path) -> tuple[float, float]:
    """(scale, angle) of a VFLOW file as written, unchecked numbers; anything else is a UserError."""
    try:
        facts = json.loads(path.read_bytes())
        scale, angle = facts["scale"], facts["angle"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); wanted JSON with scale and angle"
        ) from error
    for name, value in (("scale", scale), ("angle", angle)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{path}: {name} is {value!r}; wanted a number")
    try:
        return float(scale), float(angle)
    except OverflowError as error:  # an integer of hundreds of digits
        raise UserError(f"{path}: scale or angle is too large a number; write it again") from error


def heights_cm(agl_m: F32) -> tuple[U16, int]:
    """Predicted heights in metres [H, W] as uint16 centimetres, and how many pixels had to be clipped.

    As `geometry.agl_cm_from_m` for heights that are finite everywhere (ValueError if not), in a tenth of its
    time, by float32: a height within 0.01 mm of half a centimetre may round the other way.
    """
    lowest, highest = float(agl_m.min()), float(agl_m.max())
    if not np.isfinite(lowest + highest):
        wrong = int((~np.isfinite(agl_m)).sum())
        raise ValueError(
            f"agl_m holds {wrong} NaN or infinite heights; a prediction must be finite everywhere"
        )
    cm = np.multiply(agl_m, np.float32(geometry.CM_PER_M), dtype=np.float32)
    np.rint(cm, out=cm)
    clipped = 0
    if lowest < 0 or highest * geometry.CM_PER_M > geometry.MAX_AGL_CM:
        clipped = int(((cm < 0) | (cm > geometry.MAX_AGL_CM)).sum())
        np.clip(cm, 0, geometry.MAX_AGL_CM, out=cm)
    return cm.astype(np.uint16), clipped


def encode_agl(agl_cm: U16) -> bytes:
    """uint16 centimetres [H, W] as a deflate TIFF with horizontal predictor; same heights, same bytes."""
    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        agl_cm,
        compression="adobe_deflate",
        compressionargs={"level": DEFLATE_LEVEL},
        predictor=True,
        rowsperstrip=ROWS_PER_STRIP,
        photometric="minisblack",
        metadata=None,
        software=False,
        maxworkers=1,  # tiles are written in parallel already
    )
    return buffer.getvalue()


def encode_vflow(scale_px_per_m: float, angle_rad: float) -> bytes:
    """A VFLOW file: px/cm and radians in [0, 2 pi), rounded to nine significant digits."""
    angle = geometry.wrap_angle(rounded(geometry.wrap_angle(angle_rad)))  # rounding up may reach 2 pi
    facts = {"scale": rounded(geometry.px_per_cm(scale_px_per_m)), "angle": angle}
    return (json.dumps(facts, allow_nan=False) + "\n").encode()


def rounded(number: float) -> float:
    """A number with nine significant digits."""
    return float(f"{number:.{SIGNIFICANT_DIGITS}g}")
