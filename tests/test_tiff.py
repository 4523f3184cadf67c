"""Tiled TIFF members: any window of them is the window of the image, and no lie of theirs costs memory."""

from __future__ import annotations

import io
import struct

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from geopose_dist.data import codecs, tiff
from geopose_dist.data.sample import Window
from geopose_dist.errors import UserError

RNG = np.random.Generator(np.random.Philox(key=[3, 4]))
RGB = RNG.integers(0, 256, (75, 90, 3), dtype=np.uint8)
AGL = RNG.integers(0, 65536, (75, 90), dtype=np.uint16)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([16, 32, 256]), st.booleans())
def test_a_window_is_the_cut_of_the_whole(data, side, heights):
    pixels = AGL if heights else RGB
    row, col = data.draw(st.integers(0, 74)), data.draw(st.integers(0, 89))
    window = Window(row, col, data.draw(st.integers(1, 75 - row)), data.draw(st.integers(1, 90 - col)))
    member = tiff.encode_tiled(pixels, side)
    np.testing.assert_array_equal(tiff.decode(member, window), pixels[window.slices])
    np.testing.assert_array_equal(tiff.decode(memoryview(member), window), pixels[window.slices])


@pytest.mark.parametrize(
    "how",
    [
        {"compression": "zstd", "predictor": True, "tile": (32, 32)},
        {"compression": "deflate", "tile": (16, 16)},
        {"tile": (48, 48)},
        {"compression": "lzw", "predictor": True, "tile": (32, 32)},  # by tifffile, then cut
        {"compression": "zstd", "tile": (32, 48)},
        {"compression": "lzw", "rowsperstrip": 7},
        {"compression": "deflate", "tile": (32, 32), "bigtiff": True},
        {"compression": "zstd", "predictor": True, "tile": (32, 32), "byteorder": ">"},
    ],
    ids=lambda how: " ".join(map(str, how.values())),
)
def test_tiffs_of_other_writers_are_read(tmp_path, how):
    path, window = tmp_path / "a.tif", Window(30, 41, 20, 33)
    for pixels, kind in ((RGB, "rgb"), (AGL, "minisblack")):
        tifffile.imwrite(path, pixels, photometric=kind, metadata=None, **how)
        data = path.read_bytes()
        np.testing.assert_array_equal(tiff.decode(data), pixels)
        np.testing.assert_array_equal(tiff.decode(data, window), pixels[window.slices])
        decode = codecs.decode_rgb if pixels is RGB else codecs.decode_agl
        np.testing.assert_array_equal(decode("tif", data, "K", (75, 90), window), pixels[window.slices])


def test_only_the_tiles_of_a_window_are_decoded():
    """Every other tile is rubbish, and the window comes out: nobody looked at them."""
    member = bytearray(tiff.encode_tiled(RGB, 16))
    with tifffile.TiffFile(io.BytesIO(bytes(member))) as tif:
        offsets, counts = tif.pages.first.dataoffsets, tif.pages.first.databytecounts
    touched = {row * 6 + col for row in (1, 2) for col in (2, 3)}
    for number, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
        if number not in touched:
            member[offset : offset + count] = b"\xff" * count
    window = Window(20, 40, 20, 20)
    np.testing.assert_array_equal(tiff.decode(bytes(member), window), RGB[window.slices])
    with pytest.raises(UserError, match="damaged: tiled decoder says"):
        codecs.decode_rgb("tif", bytes(member), "K", (75, 90), Window(20, 40, 30, 20))


def _with_tag(data: bytes, tag: int, value: int) -> bytes:
    """The file with the first value of a directory entry changed."""
    out = bytearray(data)
    (start,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, start)
    for entry in range(entries):
        at = start + 2 + 12 * entry
        found, kind, count = struct.unpack_from("<HHI", data, at)
        if found == tag:
            size = {3: 2, 4: 4}[kind]
            place = at + 8 if count * size <= 4 else struct.unpack_from("<I", data, at + 8)[0]
            struct.pack_into("<H" if kind == 3 else "<I", out, place, value)
            return bytes(out)
    raise AssertionError(f"no tag {tag}")


def hostile() -> dict[str, tuple[bytes, str]]:
    """Members that lie, and what is said of each."""
    good = tiff.encode_tiled(RGB, 32)
    with tifffile.TiffFile(io.BytesIO(good)) as tif:
        offset, count = tif.pages.first.dataoffsets[0], tif.pages.first.databytecounts[0]
    bomb = imagecodecs.zstd_encode(bytes(1 << 28), level=1)
    small = imagecodecs.zstd_encode(bytes(100), level=1)
    swollen = _with_tag(_with_tag(good + bomb, 324, len(good)), 325, len(bomb))
    short = _with_tag(_with_tag(good + small, 324, len(good)), 325, len(small))
    return {
        "a frame of 268 MB": (swollen, "damaged: .*too small"),
        "a frame of too few pixels": (short, "damaged: .*tile 0 holds 100 bytes, not 3072"),
        "a tile that begins behind the end": (_with_tag(good, 324, len(good) + 5), "damaged: .*cut short"),
        "a tile that ends behind the end": (
            _with_tag(good, 325, len(good) - offset + 1),
            "damaged: .*cut short",
        ),
        "an empty tile": (_with_tag(good, 325, 0), "damaged: .*cut short"),
        "a tile cut short": (_with_tag(good, 325, count // 2), "damaged"),
        "more columns than tiles": (_with_tag(good, 256, 190), "damaged: .*it has 9 tiles; 18 of 32 px"),
        "larger tiles than pixels": (
            _with_tag(_with_tag(good, 322, 64), 323, 64),
            "damaged: .*it has 9 tiles; 4 of",
        ),
        "gigantic tiles": (_with_tag(_with_tag(good, 322, 65520), 323, 65520), "damaged"),
        "a bomb of pixels": (
            _with_tag(_with_tag(good, 256, 1 << 20), 257, 1 << 20),
            "refused: its header claims",
        ),
        "bits that are not bytes": (_with_tag(good, 258, 1), "damaged|wanted uint8"),
        "no directory": (good[:4] + struct.pack("<I", len(good) + 9) + good[8:], "damaged"),
        "the first half": (good[: len(good) // 2], "damaged"),
    }


@pytest.mark.parametrize("name", hostile())
@pytest.mark.parametrize("window", [None, Window(0, 0, 40, 40)])
def test_hostile_members_are_refused_by_name(name, window):
    data, said = hostile()[name]
    with pytest.raises(UserError, match=rf"^s-0\.tar:K: {said}"):
        codecs.decode_rgb("tif", data, "s-0.tar:K", None, window)


def test_another_size_than_the_facts_is_refused_before_decoding():
    member = tiff.encode_tiled(RGB, 32)
    with pytest.raises(UserError, match="K: 75 x 90 pixels, but the sample's facts say 75 x 80"):
        codecs.decode_rgb("tif", member, "K", (75, 80), Window(0, 0, 10, 10))


@pytest.mark.parametrize(
    "window", [Window(-1, 0, 5, 5), Window(0, 0, 0, 5), Window(70, 0, 6, 5), Window(0, 88, 1, 3)]
)
def test_windows_outside_are_refused(window):
    with pytest.raises(ValueError, match="window"):
        tiff.decode(tiff.encode_tiled(RGB, 32), window)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 10**9))
def test_flipped_bytes_end_in_an_error_or_in_pixels(seed):
    """Never in another exception, a crash or a flood of memory."""
    rng = np.random.Generator(np.random.Philox(seed))
    data = bytearray(tiff.encode_tiled(AGL if seed % 2 else RGB, 16))
    for at in rng.integers(0, min(len(data), 400 if seed % 3 else len(data)), 3):
        data[at] ^= 1 << int(rng.integers(0, 8))
    decode = codecs.decode_agl if seed % 2 else codecs.decode_rgb
    try:
        assert decode("tif", bytes(data), "K", (75, 90), Window(10, 10, 30, 30)).shape[:2] == (30, 30)
    except UserError as error:
        assert str(error).startswith("K: ")  # noqa: PT017
