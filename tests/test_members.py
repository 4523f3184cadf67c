"""Tar headers: the quick way says what tarfile says, or nothing."""

from __future__ import annotations

import random
import tarfile

import pytest

from geopose_dist.data.members import _plain_header

NAMES = ["a.b", "JAX_1.rgb.qoi", "x/y.json", "é.json", "a" * 99, "a" * 100, "a" * 101, "d/"]


def headers(count: int) -> list[bytes]:
    """Headers of all formats, kinds and sizes; most of them with a byte changed, half of these with a new checksum."""
    rng = random.Random(1)
    made = []
    while len(made) < count:
        header = tarfile.TarInfo(rng.choice(NAMES))
        header.size = rng.choice([0, 1, 511, 8**10, 8**11 - 1, 8**12])
        header.type = rng.choice([b"0", b"0", b"0", b"5", b"2", b"\0", b"x"])
        try:
            block = bytearray(
                header.tobuf(rng.choice([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
            )
        except ValueError:  # USTAR has no room for the name or the size
            continue
        block = block[-512:]
        if rng.random() < 0.6:
            block[rng.randrange(512)] = rng.randrange(256)
            if rng.random() < 0.5:
                block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
        made.append(bytes(block))
    return made


def test_a_header_read_the_quick_way_is_what_tarfile_reads():
    quick = 0
    for block in headers(4000):
        header = _plain_header(block)
        if header is None:
            continue
        quick += 1
        try:
            same = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.InvalidHeaderError, UnicodeDecodeError):  # times and owners, which nobody here reads
            continue
        assert (header.name, header.size, header.type) == (same.name, same.size, same.type)
    assert quick > 400


@pytest.mark.parametrize("length", [0, 100, 300, 511])
def test_a_cut_header_is_left_to_tarfile(length: int):
    block = tarfile.TarInfo("a.b").tobuf(tarfile.USTAR_FORMAT)
    assert _plain_header(block) is not None
    assert _plain_header(block[:length]) is None
