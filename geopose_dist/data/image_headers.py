"""How large an image says it is, read from its first bytes before any decoder allocates memory.

A damaged or hostile file may claim a terabyte of pixels (a decompression bomb). Every decoder here is
called only after `claimed_size` has been compared with a limit. Layouts of the headers: qoiformat.org,
RFC 2083 (PNG), ITU-T T.81 (JPEG), RFC 9649 (WebP), ITU-T T.800 annexes A and I (JPEG 2000), TIFF 6.0 section 2, and
the LERC specification (Esri).
"""

from __future__ import annotations

import struct

MAX_PIXELS = 1 << 28
"""Largest image that is decoded, 16384 x 16384: 64 times a tile of the challenge."""

_SOI, _J2K = b"\xff\xd8", b"\xff\x4f\xff\x51"


def claimed_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """Rows and columns that the header of `data` claims; None if it is no header known here."""
    try:
        if data[:4] == b"qoif":
            columns, rows = struct.unpack_from(">II", data, 4)
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            columns, rows = struct.unpack_from(">II", data, 16)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
        elif data[:4] == _J2K:
            return _codestream(data, 0)
        elif data[4:8] == b"jP  ":
            return _jp2(data)
        elif data[:2] == _SOI:
            return _jpeg(data)
        elif data[:4] == b"gpz1":
            rows, columns = struct.unpack_from("<II", data, 8)  # shards/README.md
        elif data[:4] in (b"II*\0", b"MM\0*"):
            return _tiff(data)
        elif data[:6] == b"Lerc2 ":
            (version,) = struct.unpack_from("<i", data, 6)
            # 6 bytes of name, 4 of version, and from version 3 on 4 of checksum stand before the size.
            rows, columns = struct.unpack_from("<ii", data, 14 if version >= 3 else 10)
        else:
            return None
    except struct.error:
        return None
    return rows, columns


def _codestream(data: bytes | memoryview, start: int) -> tuple[int, int]:
    """JPEG 2000 and HTJ2K: the SIZ segment, which stands first."""
    right, bottom, left, top = struct.unpack_from(">IIII", data, start + 8)
    return bottom - top, right - left


def _jp2(data: bytes | memoryview) -> tuple[int, int] | None:
    """JP2 and JPH files: walk the boxes to the codestream."""
    position = 0
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        header = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, position + 8)
            header = 16
        if kind == b"jp2c":
            return _codestream(data, position + header)
        if length < header:
            return None
        position += length
    return None


def _jpeg(data: bytes | memoryview) -> tuple[int, int] | None:
    """JPEG: walk the segments to a frame header (SOF0 to SOF15 but for DHT, JPG and DAC)."""
    position = 2
    while position + 9 <= len(data):
        marker, length = struct.unpack_from(">HH", data, position)
        if 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):
            rows, columns = struct.unpack_from(">HH", data, position + 5)
            return rows, columns
        if marker < 0xFF01 or length < 2:
            return None
        position += 2 + length
    return None


def _tiff(data: bytes | memoryview) -> tuple[int, int] | None:
    """TIFF: the width and length entries of the first directory."""
    order = "<" if data[:1] == b"I" else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (entries,) = struct.unpack_from(f"{order}H", data, start)
    sides: dict[int, int] = {}
    for entry in range(entries):
        tag, kind, count = struct.unpack_from(f"{order}HHI", data, start + 2 + 12 * entry)
        if tag in (256, 257) and kind in (3, 4) and count == 1:
            (sides[tag],) = struct.unpack_from(
                f"{order}{'H' if kind == 3 else 'I'}", data, start + 10 + 12 * entry
            )
    return (sides[257], sides[256]) if len(sides) == 2 else None


def _webp(data: bytes | memoryview) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return ((bits >> 14) & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8X":
        columns = int.from_bytes(data[24:27], "little") + 1
        return int.from_bytes(data[27:30], "little") + 1, columns
    if kind == b"VP8 ":
        columns, rows = struct.unpack_from("<HH", data, 26)
        return rows & 0x3FFF, columns & 0x3FFF
    return None
