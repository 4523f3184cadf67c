"""Layouts: what is read, in which units, and one sentence for everything that can be wrong."""

from __future__ import annotations

import io
import json
import math
import shutil
import tarfile
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from tiles import make_dataset, make_tile, write_tile

from geopose_dist.errors import FoundProblems, UserError
from shards import images, layouts


def sentences(source: Path) -> list[str]:
    with pytest.raises(FoundProblems) as caught:
        layouts.read_layout(source)
    return caught.value.problems


def test_the_challenge_layout(tmp_path):
    keys = make_dataset(tmp_path, 6, test=2)
    tiles = layouts.read_layout(tmp_path)
    assert [tile.key for tile in tiles] == sorted(keys)
    by_key = {tile.key: tile for tile in tiles}
    assert {by_key[key].split for key in keys[:6]} == {"train"}
    assert {by_key[key].split for key in keys[6:]} == {"test"}
    first = by_key[keys[0]]
    assert (first.city, first.gsd_m, first.place, first.unit) == ("ARG", 0.4, "ARG-000", "cm")
    rgb, agl, scale, angle = make_tile(0)
    np.testing.assert_array_equal(layouts.load_rgb(first), rgb)
    agl_m = layouts.load_agl_m(first)
    np.testing.assert_array_equal(np.isnan(agl_m), agl == 65535)
    np.testing.assert_allclose(agl_m[agl < 65535], agl[agl < 65535] / 100, rtol=1e-6)
    assert layouts.load_pose(first) == (pytest.approx(scale * 100), pytest.approx(angle))
    last = by_key[keys[-1]]
    assert layouts.load_agl_m(last) is None
    assert layouts.load_pose(last) is None
    # A folder of the dataset, by itself, still finds the tables above it.
    assert [t.gsd_m for t in layouts.read_layout(tmp_path / "test_rgbs")] == [0.4, 0.4]


def pack_tar(folder: Path, flat: bool = False) -> Path:
    archive = folder.with_name(folder.name + ".tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name if flat else f"{folder.name}/{path.name}")
    shutil.rmtree(folder)
    return archive


def test_archives_are_unpacked_once(tmp_path):
    keys = make_dataset(tmp_path, 4, test=2)
    pack_tar(tmp_path / "train")
    archive = pack_tar(tmp_path / "test_rgbs", flat=True)
    tiles = layouts.read_layout(tmp_path)
    assert [tile.key for tile in tiles] == sorted(keys)
    assert layouts.load_rgb(tiles[0]).shape == (64, 64, 3)
    stamp = tiles[0].rgb.stat().st_mtime_ns
    assert layouts.read_layout(tmp_path) == tiles
    assert tiles[0].rgb.stat().st_mtime_ns == stamp
    # Another archive of that name is unpacked again.
    archive.unlink()
    write_tile(tmp_path / "test_rgbs", "OMA_zzzzzz", 9, labelled=False)
    pack_tar(tmp_path / "test_rgbs")
    (tmp_path / "geopose_test.csv").unlink()
    assert sum(tile.split == "test" for tile in layouts.read_layout(tmp_path)) == 1


@pytest.mark.parametrize("share", [0.3, 0.99])
def test_a_cut_archive_is_named(tmp_path, share):
    make_dataset(tmp_path, 4)
    archive = pack_tar(tmp_path / "train")
    data = archive.read_bytes()
    archive.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"train\.tar\.gz: damaged or cut short"):
        layouts.read_layout(tmp_path)
    assert list((tmp_path / ".geopose").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("../ARG_x_RGB.j2k", tarfile.REGTYPE, "points out of its folder"),
        ("/tmp/ARG_x_RGB.j2k", tarfile.REGTYPE, "points out of its folder"),
        ("train/ARG_x_RGB.j2k", tarfile.SYMTYPE, "link or device"),
        ("train/ARG_x_RGB.j2k", tarfile.LNKTYPE, "link or device"),
        ("train/ARG_x_RGB.j2k", tarfile.FIFOTYPE, "link or device"),
    ],
)
def test_hostile_archives_are_refused(tmp_path, name, kind, said):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, "/etc/passwd", 4 if kind == tarfile.REGTYPE else 0
    with tarfile.open(tmp_path / "train.tar.gz", "w:gz") as tar:
        tar.addfile(info, io.BytesIO(b"data"))
    with pytest.raises(UserError, match=said):
        layouts.read_layout(tmp_path)
    assert not (tmp_path.parent / "ARG_x_RGB.j2k").exists()


def test_the_original_release_is_in_metres(tmp_path):
    rgb, agl, scale, angle = make_tile(3)
    metres = np.where(agl == 65535, np.nan, agl / 100).astype(np.float32)
    tifffile.imwrite(tmp_path / "JAX_004_006_RGB.tif", rgb)
    tifffile.imwrite(tmp_path / "JAX_004_006_AGL.tif", metres)
    (tmp_path / "JAX_004_006_VFLOW.json").write_text(
        json.dumps({"scale": scale * 100, "angle": angle + 2 * math.pi})
    )
    (tile,) = layouts.read_layout(tmp_path)
    assert (tile.key, tile.city, tile.unit) == ("JAX_004_006", "JAX", "m")
    np.testing.assert_array_equal(layouts.load_agl_m(tile), metres)
    assert layouts.load_pose(tile) == (pytest.approx(scale * 100), pytest.approx(angle))


@pytest.mark.parametrize(("scale", "unit"), [(0.0004, "cm"), (0.0149, "cm"), (0.06, "m"), (1.2, "m")])
def test_without_heights_the_scale_tells_the_unit(tmp_path, scale, unit):
    write_tile(tmp_path, "NYC_a", 1, labelled=False, codec="png")
    (tmp_path / "NYC_a_VFLOW.json").write_text(json.dumps({"scale": scale, "angle": -1}))
    (tile,) = layouts.read_layout(tmp_path)
    assert tile.unit == unit
    assert layouts.load_pose(tile)[0] == pytest.approx(scale * (100 if unit == "cm" else 1))


def test_heights_without_pose_and_pose_without_heights_are_kept(tmp_path):
    write_tile(tmp_path, "OMA_a", 1)
    write_tile(tmp_path, "OMA_b", 2)
    (tmp_path / "OMA_a_VFLOW.json").unlink()
    (tmp_path / "OMA_b_AGL.tif").unlink()
    a, b = layouts.read_layout(tmp_path)
    assert (layouts.load_pose(a), layouts.load_agl_m(b)) == (None, None)
    assert layouts.load_agl_m(a) is not None
    assert layouts.load_pose(b) is not None


def test_a_dataset_of_real_orthophotos(shared):
    tiles = layouts.read_layout(shared / "real" / "rgb_and_height")
    assert [tile.key for tile in tiles][:2] == ["AUTZEN_trim", "IGN_77055_627760"]
    for tile in tiles:
        assert layouts.load_rgb(tile).shape[:2] == layouts.load_agl_m(tile).shape


def test_real_labels_of_the_challenge_are_usable(shared, tmp_path):
    for path in (shared / "real" / "challenge_labels").glob("*_VFLOW.json"):
        shutil.copy(path, tmp_path)
        write_tile(tmp_path, path.name.removesuffix("_VFLOW.json"), 1, labelled=False)
    tiles = layouts.read_layout(tmp_path)
    assert len(tiles) == 11
    assert all(0.2 < layouts.load_pose(tile)[0] < 1.6 for tile in tiles)


def test_real_jpeg_2000_decodes_and_15_bits_are_refused(shared):
    folder = shared / "real" / "jpeg2000"
    assert images.read_rgb(folder / "sentinel2_tci_658.jp2").shape == (658, 658, 3)
    assert images.read_rgb(folder / "sentinel2_343.jp2").shape == (343, 343, 3)
    with pytest.raises(UserError, match="1 band of 15 bits; wanted RGB: three bands of 8 bits"):
        images.read_rgb(folder / "sentinel2_15bit_1830.jp2")
    assert images.image_size(folder / "sentinel2_15bit_1830.jp2") == (1830, 1830)


LABELS = [
    ('{"scale": 0.01', "cut short"),
    ("", "cut short"),
    ("[1, 2]", "wanted JSON"),
    ('{"scale": 0.01}', "no 'angle'"),
    ('{"scale": "0.01", "angle": 1}', "not numbers"),
    ('{"scale": null, "angle": 1}', "wanted JSON"),
    ('{"scale": NaN, "angle": 1}', "scale is nan"),
    ('{"scale": Infinity, "angle": 1}', "scale is inf"),
    ('{"scale": 0, "angle": 1}', "scale is 0"),
    ('{"scale": -0.01, "angle": 1}', "scale is -0.01"),
    ('{"scale": 0.9, "angle": 1}', "looks like px/m"),
    ('{"scale": 0.01, "angle": NaN}', "angle is nan"),
]


@pytest.mark.parametrize(("text", "said"), LABELS)
def test_labels_that_are_wrong(tmp_path, text, said):
    keys = make_dataset(tmp_path, 2)
    (tmp_path / "train" / f"{keys[1]}_VFLOW.json").write_text(text)
    (sentence,) = sentences(tmp_path)
    assert f"{keys[1]}_VFLOW.json: " in sentence
    assert said in sentence


def test_metres_with_a_scale_in_px_per_cm(tmp_path):
    write_tile(tmp_path, "OMA_a", 1, codec="tif")
    agl = tifffile.imread(tmp_path / "OMA_a_AGL.tif")
    tifffile.imwrite(tmp_path / "OMA_a_AGL.tif", agl.astype(np.float32) / 100)
    (sentence,) = sentences(tmp_path)
    assert "looks like px/cm" in sentence


def test_everything_that_is_wrong_is_listed_at_once(tmp_path):
    keys = make_dataset(tmp_path, 8, test=2)
    train = tmp_path / "train"
    (train / f"{keys[0]}_RGB.j2k").unlink()
    (train / f"{keys[1]}_VFLOW.json").write_text("{")
    write_tile(train, keys[2], 2, codec="png", labelled=False)
    (train / f"{keys[3]}_AGL.tif").unlink()
    write_tile(train, "ARG_1.5m", 2, labelled=False)
    write_tile(tmp_path / "test_rgbs", keys[4], 4, labelled=False)
    with (tmp_path / "metadata.csv").open("a") as file:
        file.write("zzzzzz,ARG,-1\n")
    found = "\n".join(sentences(tmp_path))
    for said in (
        f"{keys[0]}_AGL.tif: a label without its image",
        f"{keys[0]}_RGB.j2k: not found, but geopose_train.csv lists it",
        f"{keys[1]}_VFLOW.json: damaged or cut short",
        f"{keys[2]}_RGB.png: two files for one id; the other is {keys[2]}_RGB.j2k",
        f"{keys[3]}_AGL.tif: not found",
        "'ARG_1.5m' cannot be a key of a shard",
        f"{keys[4]}_RGB.j2k: two files for one id",
        "gsd of zzzzzz is '-1'",
    ):
        assert said in found
    assert len(sentences(tmp_path)) == 8


@pytest.mark.parametrize(
    ("table", "text", "said"),
    [
        ("geopose_train.csv", "id,agl\nabcdef,x\n", "no column rgb, json"),
        ("geopose_train.csv", "id,agl,json,rgb\nabcdef,x\n", "line 2: cut short"),
        ("metadata.csv", "id,city,gsd\nabcdef,ARG,x\n", "wanted a number above 0"),
        ("metadata.csv", "id,city,gsd\nabcdef,ARG,.3\nabcdef,ARG,.4\n", "twice, with different gsd"),
        ("metadata.csv", "id,city,gsd\n\xff\xfe\n", "UTF-8"),
    ],
)
def test_tables_that_are_wrong(tmp_path, table, text, said):
    make_dataset(tmp_path, 2)
    (tmp_path / table).write_bytes(text.encode("latin-1"))
    assert any(table in sentence and said in sentence for sentence in sentences(tmp_path))


def test_an_id_twice_in_a_list(tmp_path):
    make_dataset(tmp_path, 2)
    path = tmp_path / "geopose_train.csv"
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    assert "stands there twice" in sentences(tmp_path)[0]


def test_no_images(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        layouts.read_layout(tmp_path / "absent")
    with pytest.raises(UserError, match="no images; wanted files named CITY_ID_RGB"):
        layouts.read_layout(tmp_path)
    (tmp_path / "photo.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no images.*found: photo\.png"):
        layouts.read_layout(tmp_path)


def broken_images():
    rgb, agl, _, _ = make_tile(1)
    good = bytes(imagecodecs.jpeg2k_encode(rgb, reversible=True))
    jpeg = bytes(imagecodecs.jpeg8_encode(rgb))
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, rgb, compression="lzw")
    tiff = buffer.getvalue()
    bomb = bytearray(good)
    size = bomb.index(b"\xff\x4f\xff\x51") + 8
    bomb[size : size + 8] = b"\x7f\xff\xff\xff" * 2
    return [
        ("a.j2k", good[: len(good) // 2], "damaged or cut short"),
        ("a.j2k", good[:20], "damaged"),
        ("a.j2k", b"", "is empty"),
        ("a.j2k", b"not an image at all", "do not begin as a j2k file"),
        ("a.j2k", bytes(bomb), "refused: it claims 2147483647"),
        ("a.jpg", jpeg[: len(jpeg) // 2], "cut short"),
        ("a.tif", tiff[: len(tiff) // 2], "damaged"),
        ("a.tif", tiff[:-200], "damaged"),
        ("a.png", bytes(imagecodecs.png_encode(rgb))[:-100], "damaged or cut short"),
        ("a.png", bytes(imagecodecs.png_encode(rgb[:, :, 0].copy())), "1 band of uint8; wanted RGB"),
        (
            "a.png",
            bytes(imagecodecs.png_encode(np.dstack([rgb, rgb[:, :, :1]]))),
            "4 bands of uint8; wanted RGB",
        ),
        ("a.j2k", bytes(imagecodecs.jpeg2k_encode(agl, reversible=True)), "1 band of 16 bits; wanted RGB"),
        ("a.png", bytes(imagecodecs.png_encode(rgb.astype(np.uint16))), "3 bands of uint16; wanted RGB"),
    ]


@pytest.mark.parametrize(("name", "data", "said"), broken_images())
def test_images_that_are_wrong(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=said) as caught:
        images.read_rgb(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("pixels", "unit", "said"),
    [
        (np.zeros((8, 8), np.float32), "cm", "heights are float32 .* wanted uint16 centimetres"),
        (np.zeros((8, 8), np.int16), "cm", "heights are int16"),
        (np.zeros((8, 8), np.uint16), "m", "wanted float metres"),
        (np.zeros((8, 8, 3), np.uint16), "cm", r"shape \(8, 8, 3\)"),
        (np.full((8, 8), np.inf, np.float32), "m", "wanted metres, NaN if unknown"),
        (np.full((8, 8), -9999, np.float32), "m", "reach from -9999"),
    ],
)
def test_heights_that_are_wrong(tmp_path, pixels, unit, said):
    tifffile.imwrite(tmp_path / "a_AGL.tif", pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack")
    with pytest.raises(UserError, match=said):
        images.read_agl_m(tmp_path / "a_AGL.tif", unit)


def test_the_no_data_value_of_a_tiff_is_unknown(tmp_path):
    heights = np.array([[1.5, -9999], [2, 3]], np.float32)
    tifffile.imwrite(tmp_path / "a.tif", heights, extratags=[(42113, "s", 0, "-9999", True)])
    np.testing.assert_array_equal(images.read_agl_m(tmp_path / "a.tif", "m"), [[1.5, np.nan], [2, 3]])


def test_other_compressions_and_band_orders(tmp_path):
    rgb = make_tile(1)[0]
    tifffile.imwrite(tmp_path / "a.tif", rgb.transpose(2, 0, 1), planarconfig="separate", photometric="rgb")
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "a.tif"), rgb)
    tifffile.imwrite(tmp_path / "b.tif", rgb, tile=(16, 16), compression="deflate")
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "b.tif"), rgb)
