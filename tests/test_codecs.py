"""Codecs: exact round trips, and one sentence for every way in which bytes can be wrong."""

import io
import struct

import imagecodecs
import numpy as np
import pytest
import tifffile

from geopose_dist.data import codecs
from geopose_dist.data.image_headers import claimed_size
from geopose_dist.errors import UserError

RNG = np.random.Generator(np.random.Philox(key=[1, 2]))
RGB = RNG.integers(0, 256, (37, 53, 3), dtype=np.uint8)
AGL = (RNG.random((37, 53)) * 3000).astype(np.uint16)
AGL[5:9, 7:30] = 65535
AGL[20, :] = 65534


@pytest.mark.parametrize("codec", codecs.RGB_CODECS.values(), ids=lambda c: c.name)
def test_rgb_round_trip(codec):
    data = codecs.encode_rgb(codec.name, RGB)
    assert claimed_size(data) == RGB.shape[:2]
    decoded = codecs.decode_rgb(codec.extension, data, "K", RGB.shape[:2])
    assert decoded.dtype == np.uint8
    if codec.lossless:
        np.testing.assert_array_equal(decoded, RGB)
    else:
        smooth = np.repeat(np.linspace(10, 240, 64).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
        again = codecs.decode_rgb(codec.extension, codecs.encode_rgb(codec.name, smooth), "K")
        assert np.abs(again.astype(int) - smooth).max() <= 3
    assert codecs.encode_rgb(codec.extension, RGB) == data


@pytest.mark.parametrize("codec", codecs.AGL_CODECS.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("fill", [None, 0, 65535])
def test_agl_round_trip(codec, fill):
    agl = AGL if fill is None else np.full_like(AGL, fill)
    data = codecs.encode_agl(codec.name, agl)
    np.testing.assert_array_equal(codecs.decode_agl(codec.extension, data, "K", agl.shape), agl)
    assert codecs.encode_agl(codec.name, agl) == data


EVERY = [(codecs.decode_rgb, c, codecs.encode_rgb(c.name, RGB)) for c in codecs.RGB_CODECS.values()] + [
    (codecs.decode_agl, c, codecs.encode_agl(c.name, AGL)) for c in codecs.AGL_CODECS.values()
]


@pytest.mark.parametrize(("decode", "codec", "data"), EVERY, ids=lambda v: getattr(v, "name", ""))
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_cut_member_is_named(decode, codec, data, share):
    with pytest.raises(UserError, match=r"^s-0\.tar:K.*damaged"):
        decode(codec.extension, data[: int(len(data) * share)], "s-0.tar:K")


@pytest.mark.parametrize(("decode", "codec", "data"), EVERY, ids=lambda v: getattr(v, "name", ""))
def test_another_size_than_the_facts_is_refused(decode, codec, data):
    with pytest.raises(UserError, match=r"^K: .*37.*53.*facts say"):
        decode(codec.extension, data, "K", (53, 37))


def test_other_names_of_the_same_formats():
    for extension in ("j2c", "htj2k"):
        np.testing.assert_array_equal(codecs.decode_rgb(extension, codecs.encode_rgb("htj2k", RGB), "K"), RGB)
    np.testing.assert_array_equal(codecs.decode_agl("tiff", codecs.encode_agl("tif", AGL), "K"), AGL)


def bombs():
    qoi = bytearray(codecs.encode_rgb("qoi", RGB))
    struct.pack_into(">II", qoi, 4, 1 << 20, 1 << 20)
    png = bytearray(codecs.encode_rgb("png", RGB))
    struct.pack_into(">II", png, 16, 1 << 20, 1 << 20)
    jph = bytearray(codecs.encode_rgb("htj2k", RGB))
    struct.pack_into(">II", jph, 8, 1 << 30, 1 << 30)
    jpg = bytearray(codecs.encode_rgb("jpg", RGB))
    frame = jpg.index(b"\xff\xc0")
    struct.pack_into(">HH", jpg, frame + 5, 65535, 65535)
    lerc = bytearray(codecs.encode_agl("lerc", AGL))
    struct.pack_into("<ii", lerc, 14, 1 << 30, 1 << 30)
    webp = b"RIFF\0\0\0\0WEBPVP8X" + bytes(8) + b"\xff\xff\xff" * 2 + bytes(20)
    return {"qoi": qoi, "png": png, "jph": jph, "jpg": jpg, "lerc": lerc, "webp": webp}


@pytest.mark.parametrize("extension", ["qoi", "png", "jph", "jpg", "lerc", "webp"])
def test_a_decompression_bomb_is_refused_before_decoding(extension):
    decode = codecs.decode_agl if extension == "lerc" else codecs.decode_rgb
    with pytest.raises(UserError, match="refused: its header claims"):
        decode(extension, bytes(bombs()[extension]), "K")


def test_a_tiff_bomb_is_refused():
    data = bytearray(codecs.encode_agl("tif", AGL))
    position = data.index(struct.pack("<HHI", 256, 4, 1))  # ImageWidth, LONG, one value
    struct.pack_into("<I", data, position + 8, 1 << 31)
    with pytest.raises(UserError, match=r"refused: its header claims 37 x 2147483648"):
        codecs.decode_agl("tif", bytes(data), "K")


def test_a_flipped_bit_in_lerc_is_noticed():
    data = bytearray(codecs.encode_agl("lerc", AGL))
    data[len(data) // 2] ^= 1
    with pytest.raises(UserError, match="damaged"):
        codecs.decode_agl("lerc", bytes(data), "K")


def test_other_kinds_of_pixels_are_refused():
    grey = imagecodecs.png_encode(RGB[:, :, 0].copy())
    with pytest.raises(UserError, match="wanted uint8 with three bands"):
        codecs.decode_rgb("png", grey, "K")
    with pytest.raises(UserError, match="wanted uint16 with one band"):
        codecs.decode_agl("png", grey, "K")


@pytest.mark.parametrize("extension", ["pkl", "pickle", "pyd", "pth", "npy", "", "cls"])
def test_unknown_extensions_are_refused(extension):
    with pytest.raises(UserError, match="no decoder"):
        codecs.decode_rgb(extension, b"\x80\x04N.", "K")
    with pytest.raises(UserError, match="not known; wanted one of: qoi"):
        codecs.encode_rgb(extension or "?", RGB)


@pytest.mark.parametrize("compression", [None, "lzw", "deflate"])
def test_tiffs_of_other_writers_are_read(compression):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, AGL, compression=compression)
    np.testing.assert_array_equal(codecs.decode_agl("tif", buffer.getvalue(), "K", AGL.shape), AGL)
