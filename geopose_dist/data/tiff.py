"""TIFF members: heights in one strip, or images in tiles of which a window decodes only those that it touches.

A tiled member is a standard TIFF (TIFF 6.0 section 15): 256 x 256 pixels a tile, each row's differences (predictor
2) packed by zstd (compression 50000, which GDAL, libtiff, Pillow and tifffile know), as it decodes colours in less than
half the time of deflate. Nothing that the file claims is believed: pixels and the number of tiles must agree, every
tile must lie in the file, and a tile that does not hold exactly its pixels is refused. Other TIFFs tifffile decodes
whole.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt

from geopose_dist.data.image_headers import MAX_PIXELS
from geopose_dist.data.sample import Window

Pixels = npt.NDArray[Any]

SIDE = 256
"""Side of a tile. With 128, whole tiles cost a third more and no crop less; with 512, crops of 512 px a third more."""
ZSTD_LEVEL = 1
"""Level 3 saves 2 % of the bytes and takes a third longer to decode."""
SIDES = (16, 4096)
"""Sides of tiles that are read here."""

_NONE, _DEFLATE, _ZSTD = (1,), (8, 32946), (50000,)
_decompress: dict[int, Any] = {
    **dict.fromkeys(_DEFLATE, imagecodecs.deflate_decode),
    **dict.fromkeys(_ZSTD, imagecodecs.zstd_decode),
}


def encode_strip(agl_cm: Pixels) -> bytes:
    """Heights in one strip of deflate, which any GIS opens."""
    return _written(agl_cm, compression="deflate", rowsperstrip=agl_cm.shape[0])


def encode_tiled(pixels: Pixels, side: int = SIDE) -> bytes:
    """Colours uint8 [H, W, 3] or heights uint16 [H, W] in tiles."""
    return _written(pixels, compression="zstd", compressionargs={"level": ZSTD_LEVEL}, tile=(side, side))


def _written(pixels: Pixels, **how: Any) -> bytes:
    import tifffile

    buffer = io.BytesIO()
    kind = "rgb" if pixels.ndim == 3 else "minisblack"
    # No metadata: the same pixels give the same bytes.
    tifffile.imwrite(
        buffer, pixels, predictor=True, photometric=kind, metadata=None, software=False, byteorder="<", **how
    )
    return buffer.getvalue()


def decode(data: bytes | memoryview, window: Window | None = None) -> Pixels:
    """The first image of a TIFF, or a window of it (ValueError or another of `DECODE_ERRORS` if cut or hostile)."""
    import tifffile

    file: Any = _Readable(data)
    with file, tifffile.TiffFile(file) as tif:
        page = tif.pages.first
        if page.imagewidth * page.imagelength * page.samplesperpixel > MAX_PIXELS * 3:
            raise ValueError(f"it claims {page.imagelength} x {page.imagewidth} pixels")
        # tifffile fills what a cut file lacks with zeros; look for every part before decoding.
        reaches = [
            offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        ]
        if not reaches or max(reaches) > len(data) or 0 in page.databytecounts:
            raise ValueError("the file is cut short")
        if not _in_our_tiles(page, tif.byteorder):
            whole = np.asarray(page.asarray())
            return whole if window is None else whole[window.slices]
        rows, cols, side = page.imagelength, page.imagewidth, page.tilelength
        window = window or Window(0, 0, rows, cols)
        if min(window[:2]) < 0 or min(window[2:]) < 1:
            raise ValueError(f"window {tuple(window)} holds no pixel")
        if window.row + window.rows > rows or window.col + window.cols > cols:
            raise ValueError(f"window {tuple(window)} is not inside its {rows} x {cols} pixels")
        wanted = -(-rows // side) * -(-cols // side)
        if len(reaches) != wanted:
            raise ValueError(
                f"it has {len(reaches)} tiles; {wanted} of {side} px make {rows} x {cols} pixels"
            )
        return _window(memoryview(data), page, window)


class _Readable(io.RawIOBase):
    """Bytes as a file, of which nothing is copied but what is read: a member is megabytes, its directory is not."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._at = memoryview(data), 0

    def close(self) -> None:
        """Let go of the bytes: tifffile's pages and files refer to each other and wait for the garbage collector."""
        self._data = memoryview(b"")
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        target = memoryview(buffer).cast("B")  # tifffile reads bare pixels into arrays of uint16
        part = self._data[self._at : self._at + len(target)]
        target[: len(part)] = part
        self._at += len(part)
        return len(part)


def _in_our_tiles(page: Any, byteorder: str) -> bool:
    """Whether the tiles are of the kind that `encode_tiled` writes, or like it."""
    return bool(
        page.is_tiled
        and byteorder == "<"
        and page.imagedepth == page.tiledepth == 1
        and SIDES[0] <= page.tilelength == page.tilewidth <= SIDES[1]
        and page.compression in (*_NONE, *_DEFLATE, *_ZSTD)
        and page.predictor in (1, 2)
        and page.fillorder == 1
        and page.sampleformat == 1
        and (page.samplesperpixel, page.bitspersample) in ((3, 8), (1, 8), (1, 16))
        and page.planarconfig == 1
    )


def _window(data: memoryview, page: Any, window: Window) -> Pixels:
    side, bands = page.tilelength, page.samplesperpixel
    dtype = np.dtype(np.uint8 if page.bitspersample == 8 else np.uint16)
    deep = (bands,) if bands > 1 else ()
    out = np.empty((window.rows, window.cols, *deep), dtype)
    room = side * side * bands * dtype.itemsize
    across = -(-page.imagewidth // side)
    decompress = _decompress.get(int(page.compression))
    for tile_row, top, bottom in _spans(window.row, window.rows, side):
        for tile_col, left, right in _spans(window.col, window.cols, side):
            number = tile_row * across + tile_col
            begin = page.dataoffsets[number]
            packed = data[begin : begin + page.databytecounts[number]]
            # `out` is the most that is ever written: a frame that claims gigabytes is an error, not memory.
            plain = packed if decompress is None else decompress(packed, out=room)
            if len(plain) != room:
                raise ValueError(f"its tile {number} holds {len(plain)} bytes, not {room}")
            tile = np.frombuffer(plain, dtype).reshape(side, side, *deep)[top:bottom, :right]
            if page.predictor == 2:  # a row's differences need what is left of the window, no other row
                tile = imagecodecs.delta_decode(tile, axis=1)
            at_row, at_col = tile_row * side + top - window.row, tile_col * side + left - window.col
            out[at_row : at_row + bottom - top, at_col : at_col + right - left] = tile[:, left:]
    return out


def _spans(first: int, count: int, side: int) -> Iterator[tuple[int, int, int]]:
    """Tiles that `count` pixels from `first` touch: number, and first and last + 1 pixel within it."""
    for number in range(first // side, (first + count - 1) // side + 1):
        start = number * side
        yield number, max(first - start, 0), min(first + count - start, side)
