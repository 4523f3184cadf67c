"""Shards as files: plain USTAR with nothing of this machine in them, walked by header.

A tar of samples is a pure function of the samples: no times, no owners, fixed modes; the bytes are those of
webdataset's TarWriter, whose package imports torch and with it half a gigabyte into every process that packs.
The walk reads 512 bytes per member, so an index can be made for any WebDataset shard; a sample is a run of
members with one key.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from geopose_dist.data.members import BLOCK, first_key
from geopose_dist.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when there is no more room for a file."""
WRITE_BYTES = 1 << 23
"""Most bytes written at a time."""
EXTENDED = (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)
"""Headers that tell something about the member behind them."""


@dataclass(frozen=True)
class Span:
    """Where a sample stands in its shard: bytes from its first header to the end of its last padding."""

    key: str
    offset: int
    length: int
    crc32: int


def write_samples(file: BinaryIO, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write (key, members by extension) as a WebDataset tar to an open file, a member at a time.

    tarfile's own pieces of 10 KB would stand so in the page cache, from which a sample is then read at half the speed.
    """
    with tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT, copybufsize=WRITE_BYTES) as tar:
        for key, members in samples:
            for extension, data in sorted(members.items()):
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size, header.mode = len(data), 0o444
                tar.addfile(header, io.BytesIO(data))


def spans(path: Path) -> Iterator[Span]:
    """The samples of a shard in order, by its headers, with their checksums; UserError where it is damaged.

    Unlike streaming readers, a cut file, a zeroed block in the middle and a broken header are all errors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        begin, key, position, ended = 0, "", 0, False
        while position < size and not ended:
            start, this_key, position, ended = _member(file, position, size, path)
            if ended or this_key != key:
                if key:
                    yield _span(file, key, begin, start)
                begin, key = start, this_key
        if not ended:
            raise UserError(f"{path}: cut short after {size} bytes: its end mark is missing; copy it again")


def _member(file: BinaryIO, position: int, size: int, path: Path) -> tuple[int, str, int, bool]:
    """Start, key and end of the member at `position`, and whether the archive ends there instead."""
    start, headers = position, b""
    while True:
        file.seek(position)
        block = file.read(BLOCK)
        if block == bytes(BLOCK) and not headers:
            _only_zeros(file, position, path)
            return start, "", size, True
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise UserError(
                f"{path}, offset {position}: damaged: no tar header ({error}); copy it again or pack again"
            ) from error
        end = position + BLOCK + -(-header.size // BLOCK) * BLOCK
        if end > size or header.size < 0:
            raise UserError(
                f"{path}, offset {position}: member {header.name!r} claims {header.size} bytes, the file "
                f"has {size - position - BLOCK} more: cut short or hostile; copy it again or pack again"
            )
        if header.type not in EXTENDED:
            break
        file.seek(position)
        headers += file.read(min(end - position, 1 << 17))
        position = end
    return start, first_key(headers + block, f"{path}, offset {start}"), end, False


def _only_zeros(file: BinaryIO, position: int, path: Path) -> None:
    """A zeroed block ends a tar; anything behind it means that the block was zeroed by damage."""
    file.seek(position)
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise UserError(
                f"{path}, offset {position}: damaged: zeros where a tar header belongs, data behind "
                "them; copy the shard again or pack again"
            )


def _span(file: BinaryIO, key: str, begin: int, end: int) -> Span:
    file.seek(begin)
    crc, left = 0, end - begin
    while left:
        chunk = file.read(min(left, 1 << 20))
        crc = zlib.crc32(chunk, crc)
        left -= len(chunk)
    return Span(key, begin, end - begin, crc)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: Path) -> None:
    """Make a folder to write into (UserError if that cannot be)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in FULL:
            raise
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); wanted a folder to write into"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: may not be written to; wanted a folder to write into")
