"""How pixels become the bytes of a shard's member and back: one table by extension, never pickle.

RGB is uint8 [H, W, 3], heights are uint16 centimetres [H, W] with 65535 for unknown; every codec but `jpg`
is lossless. QOI and LERC are the defaults because of the standard ones they decode fastest (FINDINGS 2.2 and
2.3); `gpz` is our own, smaller and faster still (`planes`). `gpz` and `tiled` decode a window of a tile alone;
of the others a window is cut out. A member's bytes are judged before a decoder sees them: the size that the header
claims against a limit or the size that the sample's facts promise, and the end mark against a cut.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt

from geopose_dist.data import planes, tiff
from geopose_dist.data.image_headers import MAX_PIXELS, claimed_size
from geopose_dist.data.sample import Window
from geopose_dist.errors import UserError

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
Data = bytes | memoryview

DECODE_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    OSError,
    struct.error,
    EOFError,
)
"""What the decoders raise on damaged bytes: imagecodecs' errors are RuntimeErrors, tifffile's a wide mix."""


@dataclass(frozen=True)
class Codec:
    """One way to store pixels.

    Attributes:
        name: what `--codec.rgb` or `--codec.agl` takes.
        extension: last part of the member's name.
        lossless: whether decoding gives back every bit.
        encode: array to bytes.
        decode: bytes to array.
        end: bytes that a whole file ends with; decoders of some formats accept a cut one silently.
        windowed: whether `decode` takes a window as its second argument, and decodes little else.
    """

    name: str
    extension: str
    lossless: bool
    encode: Callable[[Any], bytes | bytearray]
    decode: Callable[..., Any]
    end: bytes = b""
    windowed: bool = False


def _htj2k(pixels: npt.NDArray[Any]) -> bytes:
    # Reversible only: imagecodecs' irreversible path wraps around where values clip (FINDINGS 2.2).
    return bytes(imagecodecs.htj2k_encode(pixels, reversible=True))


def _table(*codecs: Codec) -> dict[str, Codec]:
    return {codec.name: codec for codec in codecs}


_PNG_END = b"IEND\xaeB`\x82"

RGB_CODECS: dict[str, Codec] = _table(
    Codec("qoi", "qoi", True, imagecodecs.qoi_encode, imagecodecs.qoi_decode, end=bytes(7) + b"\1"),
    Codec(
        "png",
        "png",
        True,
        lambda rgb: imagecodecs.png_encode(rgb, level=3),
        imagecodecs.png_decode,
        end=_PNG_END,
    ),
    Codec("htj2k", "jph", True, _htj2k, imagecodecs.htj2k_decode, end=b"\xff\xd9"),
    Codec(
        "webp",
        "webp",
        True,
        lambda rgb: imagecodecs.webp_encode(rgb, lossless=True, method=4),
        imagecodecs.webp_decode,
    ),
    Codec(
        "jpg",
        "jpg",
        False,
        lambda rgb: imagecodecs.jpeg8_encode(rgb, level=95, subsampling="444"),
        imagecodecs.jpeg8_decode,
        end=b"\xff\xd9",
    ),
    Codec("gpz", "gpz", True, planes.encode, planes.decode, windowed=True),
    Codec("tiled", "tif", True, tiff.encode_tiled, tiff.decode, windowed=True),
)
"""RGB codecs by name."""

AGL_CODECS: dict[str, Codec] = _table(
    Codec("lerc", "lerc", True, lambda agl: imagecodecs.lerc_encode(agl, level=0), imagecodecs.lerc_decode),
    Codec("tif", "tif", True, tiff.encode_strip, tiff.decode, windowed=True),
    Codec(
        "png",
        "png",
        True,
        lambda agl: imagecodecs.png_encode(agl, level=6),
        imagecodecs.png_decode,
        end=_PNG_END,
    ),
    Codec("htj2k", "jph", True, _htj2k, imagecodecs.htj2k_decode, end=b"\xff\xd9"),
    Codec("gpz", "gpz", True, planes.encode, planes.decode, windowed=True),
    Codec("tiled", "tif", True, tiff.encode_tiled, tiff.decode, windowed=True),
)
"""Height codecs by name; those of one extension have one decoder."""

decode_tiff = tiff.decode

ALIASES = {"j2c": "jph", "jhc": "jph", "htj2k": "jph", "jpeg": "jpg", "tiff": "tif"}
"""Other extensions that shards made elsewhere may use."""


def names(table: dict[str, Codec]) -> list[str]:
    """What `--codec.rgb` or `--codec.agl` may be."""
    return [codec.name for codec in table.values()]


def by_name(table: dict[str, Codec], codec: str) -> Codec:
    """The codec of a table by its name or its extension (UserError)."""
    for known in table.values():
        if codec in (known.name, known.extension):
            return known
    raise UserError(f"codec {codec!r} is not known; wanted one of: {', '.join(names(table))}")


def encode_rgb(codec: str, rgb: U8) -> bytes:
    """Bytes of uint8 [H, W, 3] by a codec's name or extension (UserError: no such codec)."""
    assert rgb.dtype == np.uint8, rgb.dtype
    assert rgb.shape[2:] == (3,), rgb.shape
    return bytes(by_name(RGB_CODECS, codec).encode(np.ascontiguousarray(rgb)))


def encode_agl(codec: str, agl_cm: U16) -> bytes:
    """Bytes of uint16 centimetres [H, W] by a codec's name or extension (UserError: no such codec)."""
    assert agl_cm.dtype == np.uint16, agl_cm.dtype
    assert agl_cm.ndim == 2, agl_cm.shape
    return bytes(by_name(AGL_CODECS, codec).encode(np.ascontiguousarray(agl_cm)))


def decode_rgb(
    extension: str, data: Data, where: str, size: tuple[int, int] | None = None, window: Window | None = None
) -> U8:
    """Pixels uint8 [H, W, 3] of a member's bytes, or of a window of it.

    `size` is what the sample's facts promise; a header that claims another is refused before decoding.
    UserError naming `where`: unknown extension, damaged bytes, another size or kind of pixels.
    """
    rgb = _decode(RGB_CODECS, extension, data, where, size, window)
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise UserError(
            f"{where}: {rgb.dtype} of shape {rgb.shape}; wanted uint8 with three bands (H, W, 3); pack again"
        )
    return rgb


def decode_agl(
    extension: str, data: Data, where: str, size: tuple[int, int] | None = None, window: Window | None = None
) -> U16:
    """Heights uint16 centimetres [H, W], 65535 = unknown; the rest as `decode_rgb`."""
    agl_cm = _decode(AGL_CODECS, extension, data, where, size, window)
    if agl_cm.dtype != np.uint16 or agl_cm.ndim != 2:
        raise UserError(
            f"{where}: {agl_cm.dtype} of shape {agl_cm.shape}; wanted uint16 with one band (H, W); pack again"
        )
    return agl_cm


def _decode(
    table: dict[str, Codec],
    extension: str,
    data: Data,
    where: str,
    size: tuple[int, int] | None,
    window: Window | None,
) -> npt.NDArray[Any]:
    codec = _by_extension(table, extension, where)
    claimed = claimed_size(data)
    if claimed is None and codec.extension != "tif":
        raise UserError(f"{where}: damaged: no {codec.name} header in its {len(data)} bytes; {_REMEDY}")
    if claimed is not None and not (min(claimed) > 0 and claimed[0] * claimed[1] <= MAX_PIXELS):
        raise UserError(
            f"{where}: refused: its header claims {claimed[0]} x {claimed[1]} pixels; "
            f"wanted at most {MAX_PIXELS} in all"
        )
    if claimed is not None and size is not None and claimed != size:
        raise UserError(
            f"{where}: {claimed[0]} x {claimed[1]} pixels, but the sample's facts say "
            f"{size[0]} x {size[1]}; {_REMEDY}"
        )
    if codec.end and data[-len(codec.end) :] != codec.end:
        raise UserError(f"{where}: damaged: its {len(data)} bytes lack the {codec.name} end mark; {_REMEDY}")
    try:
        pixels: npt.NDArray[Any] = codec.decode(data, window) if codec.windowed else codec.decode(data)
    except DECODE_ERRORS as error:
        raise UserError(f"{where}: damaged: {codec.name} decoder says {error}; {_REMEDY}") from error
    if window is not None and not codec.windowed:
        pixels = np.ascontiguousarray(pixels[window.slices])  # a copy, so that the rest of the tile is let go
    wanted = size if window is None else (window.rows, window.cols)
    if wanted is not None and pixels.shape[:2] != wanted:
        raise UserError(f"{where}: {pixels.shape[:2]} pixels, the sample's facts say {wanted}; {_REMEDY}")
    return pixels


def _by_extension(table: dict[str, Codec], extension: str, where: str) -> Codec:
    for codec in table.values():
        if codec.extension == ALIASES.get(extension, extension):
            return codec
    known = ", ".join(dict.fromkeys(codec.extension for codec in table.values()))
    raise UserError(
        f"{where}: extension {extension!r} has no decoder here; wanted one of: {known}; pack again with one of these"
    )


_REMEDY = "run `geopose verify --deep` to find every such member, then pack again"
