"""Half resolution from the wavelet: registered to the blocks' centres, near to area, and damage is named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from packs import run_pack
from PIL import Image
from tiles import make_dataset, make_tile, write_rgb

from geopose_dist import cli
from geopose_dist.data import manifest
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.errors import FoundProblems, UserError
from geopose_dist.infer.predictor import Predictor
from geopose_dist.infer.recipe import NetRecipe
from geopose_dist.model.recipe import ModelRecipe
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.model.weights import save_weights
from geopose_dist.train.opening import facts_of
from shards import layouts, wavelet
from shards.pack_recipe import PackRecipe


def smooth(rows: int = 128, columns: int = 160, sigma: float = 2.5) -> np.ndarray:
    """An image with structure at many sizes but none that half the resolution cannot hold."""
    rng = np.random.Generator(np.random.Philox(5))
    noise = rng.normal(128, 50 * sigma, (rows, columns, 3)).astype(np.float32)
    return np.clip(cv2.GaussianBlur(noise, (0, 0), sigma), 0, 255).astype(np.uint8)


def area(rgb: np.ndarray, factor: int) -> np.ndarray:
    rows, columns = rgb.shape[0] // factor, rgb.shape[1] // factor
    return cv2.resize(rgb, (columns, rows), interpolation=cv2.INTER_AREA)


def offset(seen: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """By how many pixels (row, column) `seen` is moved against `wanted`, by least squares."""
    a, b = (x.astype(float).mean(2)[4:-4, 4:-4] for x in (wanted, seen))
    slopes = np.stack([slope.ravel() for slope in np.gradient(a)], 1)
    return -np.linalg.lstsq(slopes, (b - a).ravel(), rcond=None)[0]


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("factor", [2, 4])
def test_the_low_band_comes_out_where_area_reduction_puts_it(tmp_path, reversible, factor):
    rgb = smooth(256, 320, 2.5 * factor)
    data = imagecodecs.jpeg2k_encode(rgb, level=None if reversible else 60, reversible=reversible)
    (tmp_path / "a.j2k").write_bytes(data)
    seen, size = wavelet.read_rgb(tmp_path / "a.j2k", factor)
    assert size == rgb.shape[:2]
    wanted = area(rgb, factor)
    assert seen.shape == wanted.shape
    assert np.abs(offset(seen, wanted)).max() < 0.03
    with Image.open(io.BytesIO(data)) as image:
        image.reduce = factor.bit_length() - 1
        image.load()
        raw = np.asarray(image)
    # The low band samples a block's first pixel, not its centre: unmoved, its content lies down and right.
    np.testing.assert_allclose(offset(raw, wanted), (factor - 1) / (2 * factor), atol=0.05)
    assert np.abs(seen.astype(int) - wanted).mean() < 0.5 * np.abs(raw.astype(int) - wanted).mean()


def test_odd_sizes_and_jp2_files_and_real_images(tmp_path, shared):
    rgb = smooth(61, 83)
    (tmp_path / "odd.j2k").write_bytes(imagecodecs.jpeg2k_encode(rgb, reversible=True))
    seen, size = wavelet.read_rgb(tmp_path / "odd.j2k", 2)
    assert (seen.shape, size) == ((31, 42, 3), (61, 83))
    real = shared / "real" / "jpeg2000" / "sentinel2_tci_658.jp2"
    whole = imagecodecs.jpeg2k_decode(real.read_bytes())
    seen, size = wavelet.read_rgb(real, 2)
    assert size == whole.shape[:2]
    wanted = area(whole[: size[0] // 2 * 2, : size[1] // 2 * 2], 2)
    rows, columns = wanted.shape[:2]
    assert np.abs(seen[:rows, :columns].astype(int) - wanted).mean() < 4
    assert np.abs(offset(seen[:rows, :columns], wanted)).max() < 0.06
    assert not wavelet.can_reduce(shared / "real" / "jpeg2000" / "sentinel2_15bit_1830.jp2", 2)
    assert wavelet.can_reduce(real, 2)


def test_what_has_no_wavelet_to_read_is_named(tmp_path):
    rgb = smooth()
    good = imagecodecs.jpeg2k_encode(rgb, reversible=True)
    siz = good.index(b"\xff\x51")
    files = {
        "a.png": (imagecodecs.png_encode(rgb), "no JPEG 2000"),
        "b.j2k": (imagecodecs.jpeg2k_encode(rgb, reversible=True, resolutions=1), "too few to reduce by 2"),
        "c.j2k": (good[:-200], "cut short after"),
        "d.j2k": (good[: len(good) // 2] + b"\xff\xd9", "damaged or cut short"),
        "e.j2k": (imagecodecs.jpeg2k_encode(rgb[..., 0].copy(), reversible=True), "1 bands of 8 bits"),
        "f.j2k": (imagecodecs.jpeg2k_encode(rgb.astype(np.uint16), reversible=True), "3 bands of 16 bits"),
        "g.j2k": (good[: siz + 6] + b"\0\0\xff\xff\0\0\xff\xff" + good[siz + 14 :], "65535 x 65535 pixels"),
        "h.j2k": (good[: siz + 50], "no JPEG 2000"),
        "i.j2k": (b"", "no JPEG 2000"),
    }
    for name, (data, said) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: .*{said}"):
            wavelet.read_rgb(tmp_path / name, 2)
    with pytest.raises(UserError, match="cannot be read"):
        wavelet.read_rgb(tmp_path / "absent.j2k", 2)
    assert [name for name in sorted(files) if wavelet.can_reduce(tmp_path / name, 2)] == [
        "c.j2k",
        "d.j2k",
        "g.j2k",
    ]


def test_shards_from_the_wavelet_say_so_and_hold_the_same_heights(tmp_path):
    make_dataset(tmp_path / "data", 4, test=1)
    run_pack(tmp_path / "data", tmp_path / "area")
    run_pack(tmp_path / "data", tmp_path / "wavelet", reduce_by="wavelet")
    run_pack(tmp_path / "data", tmp_path / "again", reduce_by="wavelet", workers=2)
    assert "reduce_by" not in manifest.read_manifest(tmp_path / "area").recipe
    assert manifest.read_manifest(tmp_path / "wavelet").recipe["reduce_by"] == "wavelet"
    a, b = (Reader(manifest.open_split(tmp_path / name, "train")) for name in ("area", "wavelet"))
    tiles = {tile.key: tile for tile in layouts.read_layout(tmp_path / "data")}
    for one, two in zip(map(a.view, range(4)), map(b.view, range(4)), strict=True):
        assert (one.key, one.scale_px_per_m, one.gsd_m) == (two.key, two.scale_px_per_m, two.gsd_m)
        np.testing.assert_array_equal(one.agl_m, two.agl_m)
        np.testing.assert_array_equal(two.rgb, wavelet.read_rgb(tiles[one.key].rgb, 2)[0])
        assert not np.array_equal(one.rgb, two.rgb)
    for path in (tmp_path / "wavelet").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    with pytest.raises(UserError, match="reduce_by was None, now 'wavelet'"):
        run_pack(tmp_path / "data", tmp_path / "area", reduce_by="wavelet")


def test_odd_sizes_are_cropped_or_refused(tmp_path):
    make_dataset(tmp_path / "data", 2, size=(63, 66))
    with pytest.raises(FoundProblems, match="63 x 66 pixels"):
        run_pack(tmp_path / "data", tmp_path / "out", reduce_by="wavelet")
    run_pack(tmp_path / "data", tmp_path / "crop", reduce_by="wavelet", odd_sizes="crop")
    view = Reader(manifest.open_split(tmp_path / "crop", "train")).view(0)
    assert view.rgb.shape == (31, 33, 3)
    assert view.agl_m is not None
    assert view.agl_m.shape == (31, 33)


def test_sources_without_a_wavelet_are_refused_by_name(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number, extension in enumerate(("j2k", "tif")):
        rgb, _, _, _ = make_tile(number)
        write_rgb(folder / f"JAX_{number}_RGB.{extension}", rgb)
        (folder / f"JAX_{number}_VFLOW.json").write_text(json.dumps({"scale": 0.01, "angle": 1.0}))
    with pytest.raises(FoundProblems, match=r"JAX_1_RGB.tif: no JPEG 2000(.|\n)*--reduce-by area"):
        run_pack(folder, tmp_path / "out", reduce_by="wavelet")


@pytest.mark.parametrize("reduce", [1, 3, 64])
def test_a_wavelet_halves(reduce):
    with pytest.raises(
        ValueError, match=f"--reduce-by wavelet cannot reduce by {reduce}; wanted --reduce 2, 4"
    ):
        PackRecipe(source="a", out="b", reduce=reduce, reduce_by="wavelet")


def test_prediction_reduces_as_training_did(tmp_path, capsys):
    """A checkpoint of wavelet shards reads files by their wavelets: the answers are those of the shards."""
    make_dataset(tmp_path / "data", 4, size=128)
    run_pack(tmp_path / "data", tmp_path / "shards", reduce_by="wavelet")
    run_pack(tmp_path / "data", tmp_path / "area")
    recipe = ModelRecipe(encoder="tu-mobilenetv3_small_050", decoder_channels=[16, 16, 8, 8, 8])
    facts = facts_of(open_shards(str(tmp_path / "shards"), "train"), recipe)
    assert (facts["reduction"], facts["reduce_by"]) == (2, "wavelet")
    assert facts_of(open_shards(str(tmp_path / "area"), "train"), recipe)["reduce_by"] == "area"
    torch.manual_seed(0)
    save_weights(tmp_path / "net.safetensors", GeoposeNet(recipe).state_dict(), recipe, facts)

    def predicted(source: Path, out: str) -> tuple[dict[str, bytes], str]:
        words = ["--source", str(source), "--checkpoint", str(tmp_path / "net.safetensors")]
        words += ["--out", str(tmp_path / out), "--dispatch", "inline", "--batch", "2", "--threads", "1"]
        assert cli.main(["predict", *words, "--device", "cpu", "--split", "train"]) == 0
        files = {p.name: p.read_bytes() for p in sorted((tmp_path / out).glob("*_*.*"))}
        return files, capsys.readouterr().out

    from_files, said = predicted(tmp_path / "data", "a")
    assert len(from_files) == 8
    assert "another filter" not in said
    assert predicted(tmp_path / "shards", "b")[0] == from_files
    from_area, said = predicted(tmp_path / "area", "c")
    assert "4 tiles were reduced by another filter than in training" in said
    assert from_area != from_files
    assert tifffile.imread(tmp_path / "a" / sorted(from_files)[0]).shape == (128, 128)


def test_odd_sizes_are_predicted_whole_and_filters_are_not_mixed(tmp_path, capsys):
    torch.manual_seed(0)
    recipe = ModelRecipe(encoder="tu-mobilenetv3_small_050", decoder_channels=[16, 16, 8, 8, 8])
    net = GeoposeNet(recipe)
    facts = {"reduction": 2, "reduce_by": "wavelet"}
    with pytest.raises(UserError, match=r"different filters \(network 0: wavelet, network 1: area\)"):
        Predictor.of_nets([net, net], [facts, {"reduction": 2}], NetRecipe(), batch=1)
    save_weights(tmp_path / "net.safetensors", net.state_dict(), recipe, facts)
    (tmp_path / "odd").mkdir()
    data = imagecodecs.jpeg2k_encode(smooth(97, 131), reversible=True)
    (tmp_path / "odd" / "JAX_odd_RGB.j2k").write_bytes(data)
    tifffile.imwrite(tmp_path / "odd" / "JAX_plain_RGB.tif", smooth(97, 131))
    words = ["--source", str(tmp_path / "odd"), "--checkpoint", str(tmp_path / "net.safetensors")]
    words += ["--out", str(tmp_path / "out"), "--dispatch", "inline", "--device", "cpu", "--threads", "1"]
    assert cli.main(["predict", *words]) == 0
    assert "; 1 tiles were reduced by another filter" in capsys.readouterr().out
    for key in ("JAX_odd", "JAX_plain"):
        assert tifffile.imread(tmp_path / "out" / f"{key}_AGL.tif").shape == (97, 131)
