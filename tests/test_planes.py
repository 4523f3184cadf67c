"""The `gpz` member and its kernels: equal to their slow twins, exact round trips, nothing hostile decoded."""

from __future__ import annotations

import struct
import threading

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopose_dist.data import codecs
from geopose_dist.data import planes as gpz
from geopose_dist.errors import UserError
from geopose_dist.kernels import planes
from geopose_dist.kernels import reference_planes as reference


def noise(seed: int, shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(seed))
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def picture(seed: int, shape: tuple[int, int], bands: int) -> np.ndarray:
    """Colours or heights: all values, or smooth with unknown patches."""
    full, dtype = (*shape, 3) if bands == 3 else shape, np.uint8 if bands == 3 else np.uint16
    pixels = noise(seed, full, dtype)
    if seed % 2:
        pixels = (pixels % 7 + np.arange(shape[1]).reshape(1, -1, *[1] * (bands == 3))).astype(dtype)
        pixels[shape[0] // 2 :] = np.iinfo(dtype).max
    return pixels


shapes = st.tuples(st.integers(1, 70), st.integers(1, 70))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), bands=st.sampled_from([1, 3]), data=st.data())
def test_a_block_equals_its_twin_in_every_window(shape, seed, bands, data):
    """Widths around 16 and 32 meet the vectors' ends; `out` is a window of a larger image, whose rest stays."""
    top, left = (data.draw(st.integers(0, side - 1)) for side in shape)
    size = [data.draw(st.integers(1, side - at)) for side, at in zip(shape, (top, left), strict=True)]
    stored = noise(seed, ((3 if bands == 3 else 2) * shape[0] * shape[1],))
    dtype, tail = (np.uint8, (3,)) if bands == 3 else (np.uint16, ())
    found, wanted = (np.full((size[0] + 2, size[1] + 3, *tail), 77, dtype) for _ in range(2))
    name = "undo_rgb" if bands == 3 else "undo_heights"
    window = np.s_[1 : 1 + size[0], 2 : 2 + size[1]]
    getattr(reference, name)(stored, shape, (top, left), wanted[window])
    getattr(planes, name)(stored, shape, (top, left), found[window])
    np.testing.assert_array_equal(found, wanted)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), bands=st.sampled_from([1, 3]), side=st.integers(1, 80))
def test_round_trip(shape, seed, bands, side):
    pixels = picture(seed, shape, bands)
    data = gpz.encode(pixels, side)
    assert gpz.encode(np.asfortranarray(pixels), side) == data
    found = gpz.decode(data)
    assert found.dtype == pixels.dtype
    np.testing.assert_array_equal(found, pixels)
    top, left = seed * 7 % shape[0], seed * 3 % shape[1]
    window = (top, left, shape[0] - top - seed % (shape[0] - top), shape[1] - left - seed % (shape[1] - left))
    np.testing.assert_array_equal(
        gpz.decode(data, window), pixels[top : top + window[2], left : left + window[3]]
    )


def test_heights_in_metres_and_back_equal_their_twins():
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    metres = planes.metres(every)
    np.testing.assert_array_equal(metres, reference.metres(every))
    odd = [np.nan, -np.nan, np.inf, -np.inf, -0.0, -1e30, 1e30, 0.005, 0.015, 0.025, 655.334, 655.336, 1e-40]
    values = np.concatenate([metres.ravel(), np.float32(odd), noise(5, (5000,), np.uint32).view(np.float32)])
    values = np.ascontiguousarray(values[: values.size // 50 * 50].reshape(-1, 50))
    inside = noise(6, values.shape) > 50
    for mask in (None, inside):
        found, wanted = (np.zeros((values.shape[0], 60), np.uint16) for _ in range(2))
        with np.errstate(invalid="ignore", over="ignore"):
            reference.centimetres(values, wanted[:, 3:53], mask, 65534)
        planes.centimetres(values, found[:, 3:53], mask, 65534)
        np.testing.assert_array_equal(found, wanted)
    back = np.empty_like(every)
    planes.centimetres(metres, back)
    np.testing.assert_array_equal(back, np.where(every == 65534, 65533, every))


def test_threads_decode_at_once():
    pixels = picture(3, (300, 200), 3)
    data, found = gpz.encode(pixels), []
    threads = [threading.Thread(target=lambda: found.append(gpz.decode(data))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.array_equal(one, pixels) for one in found)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: planes.undo_rgb(np.zeros(9, np.uint8), (2, 2), (0, 0), np.zeros((1, 1, 3), np.uint8)),
         r"planes is uint8 \[9\]; wanted contiguous uint8 \[12\]"),
        (lambda: planes.undo_rgb(np.zeros(12, np.uint8), (2, 2), (1, 0), np.zeros((2, 1, 3), np.uint8)),
         r"out is \[2, 1\] at \(1, 0\); wanted a window"),
        (lambda: planes.undo_rgb(np.zeros(12, np.uint8), (2, 2), (-1, 0), np.zeros((2, 1, 3), np.uint8)),
         "wanted a window"),
        (lambda: planes.undo_rgb(np.zeros(12, np.uint8), (2, 2), (0, 0), np.zeros((2, 4, 3), np.uint8)[:, ::2]),
         "whose pixels of a row touch"),
        (lambda: planes.undo_heights(np.zeros(8, np.uint8), (2, 2), (0, 0), np.zeros((2, 2), np.int32)),
         "out is int32.*wanted uint16"),
        (lambda: planes.metres(np.zeros((4, 4), np.uint16)[:, ::2]), "agl_cm is .*wanted contiguous"),
        (lambda: planes.centimetres(np.zeros((4, 4)), np.zeros((4, 4), np.uint16)), "agl_m is float64"),
        (lambda: planes.centimetres(np.zeros((4, 4), np.float32), np.zeros((4, 3), np.uint16)),
         r"agl_m is float32 \[4, 4\]; wanted contiguous float32 \[4, 3\]"),
        (lambda: planes.mark_outside(np.zeros((4, 4), np.uint8), 1, np.zeros((4, 4), np.uint16)),
         "inside is uint8"),
    ],
)  # fmt: skip
def test_doors_refuse_what_does_not_fit(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def hostile() -> dict[str, bytes]:
    """Members whose header or blocks lie, all of 40 x 30 pixels in blocks of 16."""
    good = gpz.encode(picture(1, (40, 30), 3), 16)
    blocks, head = 6, gpz.HEADER.size

    def with_field(offset: int, fmt: str, value: int) -> bytes:
        data = bytearray(good)
        struct.pack_into(fmt, data, offset, value)
        return bytes(data)

    def with_block(content: bytes) -> bytes:
        """The first block replaced, its length told rightly."""
        lengths = np.frombuffer(good, "<u4", blocks, head).copy()
        rest = good[head + 4 * blocks + lengths[0] :]
        block = bytes(imagecodecs.zstd_encode(content, level=1))
        lengths[0] = len(block)
        return good[:head] + lengths.tobytes() + block + rest

    return {
        "bands": with_field(4, "<B", 2),
        "reserved": with_field(5, "<B", 1),
        "no side": with_field(6, "<H", 0),
        "huge side": with_field(6, "<H", 65535),
        "another side": with_field(6, "<H", 32),
        "a block longer than the rest": with_field(head, "<I", 1 << 31),
        "a block of nothing": with_field(head, "<I", 0),
        "bytes behind": good + b"x",
        "a block with too little": with_block(bytes(16 * 16 * 3 - 1)),
        "a bomb": with_block(bytes(1 << 26)),
        "more blocks than bytes": gpz.HEADER.pack(b"gpz1", 3, 0, 1, 1 << 14, 1 << 14) + bytes(64),
        "no zstd": good[: head + 4 * blocks] + bytes(len(good) - head - 4 * blocks),
    }


@pytest.mark.parametrize("fault", list(hostile()))
def test_what_lies_is_refused(fault: str):
    with pytest.raises(UserError, match=r"^s-0\.tar:K: damaged: gpz decoder says"):
        codecs.decode_rgb("gpz", hostile()[fault], "s-0.tar:K")


def test_any_cut_and_most_flips_are_noticed():
    """A flip inside noise may decode; the crc32 of the index is what catches those."""
    data = gpz.encode(picture(1, (40, 30), 1), 16)
    for length in range(len(data)):
        with pytest.raises(UserError, match="damaged"):
            codecs.decode_agl("gpz", data[:length], "K")
    for at in range(gpz.HEADER.size + 24):
        flipped = bytearray(data)
        flipped[at] ^= 1
        with pytest.raises(UserError, match=r"damaged|facts say|refused"):
            codecs.decode_agl("gpz", bytes(flipped), "K", (40, 30))


def test_windows_outside_are_refused():
    data = gpz.encode(picture(1, (40, 30), 1))
    for window in ((0, 0, 41, 30), (-1, 0, 4, 4), (0, 29, 1, 2), (3, 3, 0, 1)):
        with pytest.raises(ValueError, match="is not inside its 40 x 30 pixels"):
            gpz.decode(data, window)
