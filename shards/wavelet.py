"""A JPEG 2000 image at half, a quarter, ... of its size, from the wavelet's low band: the rest is never decoded.

It costs about half the CPU of decoding whole and reducing by area, and the pixels are others: the low band is
sharper, and its samples sit at the blocks' first pixels, not at their centres, where heights belong. They are
moved there by cubic interpolation ((factor - 1) / 2 of a full pixel), which also takes most of the difference
to area-reduced pixels away. A network wants the filter that it was trained with: manifest and checkpoint name it.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from geopose_dist.data.image_headers import MAX_PIXELS
from geopose_dist.errors import UserError

U8 = npt.NDArray[np.uint8]

_START, _SIZ, _COD, _SOT, _END = b"\xff\x4f", 0xFF51, 0xFF52, 0xFF90, b"\xff\xd9"


@dataclass(frozen=True)
class Codestream:
    """What the main header of a JPEG 2000 codestream says (ITU-T T.800 annex A).

    Attributes:
        rows, columns: of the image.
        offset: rows and columns by which the image is moved on its grid.
        bands: components.
        bits: of each component; negative if signed.
        levels: how often the wavelet halves.
    """

    rows: int
    columns: int
    offset: tuple[int, int]
    bands: int
    bits: tuple[int, ...]
    levels: int


def codestream(data: bytes) -> Codestream | None:
    """The main header of a raw codestream or of the one in a JP2 file; None if there is none."""
    start = data.find(_START + _SIZ.to_bytes(2, "big"))
    if start < 0:
        return None
    try:
        length, _, right, bottom, left, top = struct.unpack_from(">HHIIII", data, start + 4)
        (bands,) = struct.unpack_from(">H", data, start + 40)
        depths = [data[start + 42 + 3 * band] for band in range(bands)]
        position = start + 4 + length
        while True:
            marker, size = struct.unpack_from(">HH", data, position)
            if marker == _COD:
                bits = tuple((-1 if depth & 0x80 else 1) * ((depth & 0x7F) + 1) for depth in depths)
                return Codestream(bottom - top, right - left, (top, left), bands, bits, data[position + 9])
            if marker < 0xFF00 or marker == _SOT or size < 2:
                return None
            position += 2 + size
    except (struct.error, IndexError):
        return None


def can_reduce(path: Path, factor: int) -> bool:
    """Whether `read_rgb` can give this file at `1 / factor`."""
    try:
        with path.open("rb") as file:
            found = codestream(file.read(65536))
    except OSError:
        return False
    return found is not None and not _why_not(found, factor)


def _why_not(found: Codestream, factor: int) -> str:
    if found.bands != 3 or any(bits != 8 for bits in found.bits):
        return f"{found.bands} bands of {max(map(abs, found.bits), default=0)} bits; wanted three bands of 8"
    if 1 << found.levels < factor:
        return f"its wavelet halves {found.levels} times, too few to reduce by {factor}"
    if any(offset % factor for offset in found.offset):
        return f"it is moved by {found.offset} on its grid, no multiple of {factor}"
    return ""


def read_rgb(path: Path, factor: int) -> tuple[U8, tuple[int, int]]:
    """uint8 [ceil(H / factor), ceil(W / factor), 3] of a JPEG 2000 file, and its (H, W) (UserError)."""
    instead = "; convert the file, or pack with --reduce-by area"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend or remove the file") from error
    found = codestream(data)
    if found is None:
        raise UserError(f"{path}: no JPEG 2000, whose wavelet could be read at 1/{factor}{instead}")
    if min(found.rows, found.columns) <= 0 or found.rows * found.columns > MAX_PIXELS:
        raise UserError(
            f"{path}: refused: it claims {found.rows} x {found.columns} pixels; wanted at most {MAX_PIXELS} in all"
        )
    if why := _why_not(found, factor):
        raise UserError(f"{path}: {why}{instead}")
    # The low band stands first in many files: a decoder that wants no more would not notice a cut.
    if _END not in data[-64:]:
        raise UserError(
            f"{path}: damaged or cut short after {len(data)} bytes: the end mark is missing; fetch it again "
            "or remove it"
        )
    pixels = low_band(path, data, factor)
    size = -(-found.rows // factor), -(-found.columns // factor)
    if pixels.shape != (*size, 3):
        raise UserError(f"{path}: decodes to {pixels.shape}; wanted {(*size, 3)}{instead}")
    return to_block_centres(pixels, factor), (found.rows, found.columns)


def low_band(path: Path, data: bytes, factor: int) -> U8:
    """The decoded low band, its samples at the first pixel of each block (UserError)."""
    from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile

    try:
        # Not by Image.open: it warns of large images, whose limit here is ours and was judged above.
        with Jpeg2KImageFile(io.BytesIO(data)) as image:
            image.reduce = factor.bit_length() - 1
            image.load()
            return np.asarray(image)
    except (OSError, ValueError, RuntimeError, SyntaxError) as error:
        raise UserError(
            f"{path}: damaged or cut short: the JPEG 2000 decoder says {error}; fetch it again or remove it"
        ) from error


def to_block_centres(low: U8, factor: int) -> U8:
    """Samples at the first pixel of each block to its centre, [h, w, 3]: cubic interpolation (Keys, a = -1/2)."""
    share = (factor - 1) / (2 * factor)
    taps = np.array([0.0, *(_keys(share + 1), _keys(share), _keys(1 - share), _keys(2 - share))])
    moved = cv2.sepFilter2D(low, -1, taps, taps, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(moved, dtype=np.uint8)


def _keys(distance: float) -> float:
    """Weight of a sample at this distance (Keys, Cubic convolution interpolation, 1981)."""
    if distance <= 1:
        return 1.5 * distance**3 - 2.5 * distance**2 + 1
    return -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
