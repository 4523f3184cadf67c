"""Pixels of a dataset's files: JPEG 2000, TIFF, PNG and JPEG in; uint8 RGB and heights in metres out.

Every fault is one sentence that names the file: cut, damaged, another number of bands or bits, heights of
another kind than the layout says. The size that a header claims is judged before a decoder allocates.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt

from geopose_dist.data.codecs import DECODE_ERRORS, decode_tiff
from geopose_dist.data.image_headers import MAX_PIXELS, claimed_size
from geopose_dist.errors import UserError
from geopose_dist.geometry import F32, agl_m_from_cm

U8 = npt.NDArray[np.uint8]

J2K, TIFF = ("j2k", "jp2", "j2c"), ("tif", "tiff")
RGB_EXTENSIONS = (*J2K, *TIFF, "png", "jpg", "jpeg")
"""Extensions of RGB files that are read."""
HEADER_BYTES = 65536
"""Enough of a file to find its size in; TIFFs are looked at whole, their directory may stand at the end."""


def read_rgb(path: Path) -> U8:
    """uint8 [H, W, 3] of an image file (UserError)."""
    pixels = _decode(path, _bytes(path))
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        bands = pixels.shape[2] if pixels.ndim == 3 else 1
        raise UserError(
            f"{path}: {bands} band{'s' * (bands != 1)} of {_bits(path, pixels)}; wanted RGB: three bands of "
            "8 bits; convert or remove the file"
        )
    return pixels


def read_agl_m(path: Path, unit: str) -> F32:
    """float32 metres [H, W], NaN = unknown, of an AGL file: uint16 if unit is cm, else float (UserError)."""
    return read_heights(path, unit)[0]


def read_heights(path: Path, unit: str) -> tuple[F32, str]:
    """Heights as `read_agl_m` gives them, and their unit; an empty unit is judged by the kind of numbers.

    The file is opened once.
    """
    data = _bytes(path)
    pixels = _decode(path, data)
    if pixels.ndim == 3 and 1 in (pixels.shape[0], pixels.shape[2]):
        pixels = pixels.squeeze()
    unit = unit or ("cm" if pixels.dtype.kind == "u" else "m")
    wanted = "uint16 centimetres" if unit == "cm" else "float metres"
    kind_fits = pixels.dtype == np.uint16 if unit == "cm" else pixels.dtype.kind == "f"
    if not kind_fits or pixels.ndim != 2:
        raise UserError(
            f"{path}: heights are {pixels.dtype} of shape {pixels.shape}; wanted {wanted} with one band, as "
            "elsewhere in this dataset; convert or remove the file"
        )
    if unit == "cm":
        return agl_m_from_cm(pixels), unit
    agl_m: F32 = pixels.astype(np.float32)
    no_data = _no_data(data)
    if no_data is not None:
        agl_m[agl_m == np.float32(no_data)] = np.nan
    if np.isinf(agl_m).any() or np.nanmin(agl_m, initial=0) < -1000:
        raise UserError(
            f"{path}: heights reach from {np.nanmin(agl_m):g} to {np.nanmax(agl_m):g}; wanted metres, NaN if "
            "unknown; convert or remove the file"
        )
    return agl_m, unit


def _no_data(data: bytes) -> float | None:
    """The number that GDAL marks unknown pixels of a TIFF with, if the file says one."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as tif:
        tag = tif.pages.first.tags.get(42113)  # GDAL_NODATA
    try:
        return None if tag is None else float(tag.value)
    except (ValueError, TypeError):
        return None


def image_size(path: Path) -> tuple[int, int] | None:
    """Rows and columns that an image file's header claims; None if it has no header that is known."""
    if _extension(path) in TIFF:
        found = tiff_kind(path)
        return None if found is None else found[0]
    try:
        with path.open("rb") as file:
            return claimed_size(file.read(HEADER_BYTES))
    except OSError:
        return None


def tiff_kind(file: Path | bytes) -> tuple[tuple[int, int], np.dtype[Any]] | None:
    """Rows and columns and kind of numbers of a TIFF by its header; None if it has none that can be read."""
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(file) if isinstance(file, bytes) else file) as tif:
            page = tif.pages.first
            return (int(page.imagelength), int(page.imagewidth)), np.dtype(page.dtype)
    except DECODE_ERRORS:
        return None


def _extension(path: Path) -> str:
    return path.suffix[1:].lower()


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend or remove the file") from error
    if not data:
        raise UserError(f"{path}: is empty; fetch it again or remove it")
    return data


def _decode(path: Path, data: bytes) -> npt.NDArray[Any]:
    """The pixels in `data`, the bytes of the file `path` (UserError)."""
    extension = _extension(path)
    found = tiff_kind(data) if extension in TIFF else None
    claimed = claimed_size(data) if extension not in TIFF else found and found[0]
    if claimed is None:
        raise UserError(
            f"{path}: damaged: its {len(data)} bytes do not begin as a {extension} file; "
            "fetch it again or remove it"
        )
    if min(claimed) <= 0 or claimed[0] * claimed[1] > MAX_PIXELS:
        raise UserError(
            f"{path}: refused: it claims {claimed[0]} x {claimed[1]} pixels; wanted at most "
            f"{MAX_PIXELS} in all"
        )
    # OpenJPEG reports a cut; libjpeg would fill what is missing with grey.
    if extension in ("jpg", "jpeg") and b"\xff\xd9" not in data[-64:]:
        raise UserError(f"{path}: damaged: cut short after {len(data)} bytes; fetch it again or remove it")
    try:
        if extension in J2K:
            return np.asarray(imagecodecs.jpeg2k_decode(data, numthreads=1))
        if extension in TIFF:
            return _bands_last(decode_tiff(data))
        return np.asarray(
            imagecodecs.png_decode(data) if extension == "png" else imagecodecs.jpeg8_decode(data)
        )
    except DECODE_ERRORS as error:
        raise UserError(
            f"{path}: damaged or cut short: the {extension} decoder says {error or type(error)}; "
            "fetch it again or remove it"
        ) from error


def _bands_last(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Band-sequential TIFFs decode as (bands, rows, columns)."""
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
        return np.ascontiguousarray(pixels.transpose(1, 2, 0))
    return pixels


def _bits(path: Path, pixels: npt.NDArray[Any]) -> str:
    """How the user knows the depth: JPEG 2000 counts bits (15, say), numpy does not."""
    if _extension(path) not in J2K:
        return str(pixels.dtype)
    data = path.read_bytes()
    size = data.find(b"\xff\x4f\xff\x51")
    return f"{(data[size + 42] & 0x7F) + 1} bits" if 0 <= size < len(data) - 42 else str(pixels.dtype)
