"""Scenes: windows equal the whole, one pose for all, outputs in their place on the earth, killed and continued."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scenes import Pyramid, files_of, pixels, predict, read, use_pyramid, write_scene

from geopose_dist import geometry, kernels
from geopose_dist.errors import UserError
from geopose_dist.infer import raster, scene_plan
from geopose_dist.infer.fuse import fuse, spatial_median, weighted_median
from geopose_dist.infer.predictor import Predictor
from geopose_dist.infer.recipe import NetRecipe
from geopose_dist.infer.scene_plan import ScenePlan

rasterio = pytest.importorskip("rasterio", reason="the extra `scenes` is not installed")


@pytest.mark.parametrize("reduction", [1, 2])
def test_a_scene_by_windows_is_the_scene_as_a_whole(
    reduction: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, net = use_pyramid(monkeypatch, tmp_path, reduction)
    monkeypatch.setattr(scene_plan, "BLOCK_PX", 160)
    rgb = pixels(370 * reduction, 380 * reduction - 1)  # 384: two windows without overlap
    source = write_scene(tmp_path / "JAX_a_RGB.tif", rgb)
    assert NetRecipe(window=192, overlap=96).overlap // 4 >= Pyramid.SEES_PX
    assert predict(source, checkpoint, tmp_path / "out", "--unit", "m", "--rectify", "false") == 0
    whole = Predictor.of_nets([net], [{"reduction": reduction}], NetRecipe(window=1024), batch=1)
    (pose,) = whole.predict([rgb], [None])
    assert pose is not None
    assert pose.agl_m.std() > 0.5
    heights = read(tmp_path / "out" / "JAX_a_AGL.tif")
    assert heights.shape == rgb.shape[:2]
    np.testing.assert_allclose(heights, pose.agl_m, atol=0.01)
    facts = json.loads((tmp_path / "out" / "JAX_a_VFLOW.json").read_text())
    assert facts["seam_max_m"] < 0.01
    # With windows that share nothing the borders show and the report says so: the test above can fail.
    options = ("--unit", "m", "--rectify", "false", "--net.overlap", "0")
    assert predict(source, checkpoint, tmp_path / "seams", *options) == 0
    seams = read(tmp_path / "seams" / "JAX_a_AGL.tif")
    assert np.abs(seams - pose.agl_m).max() > 0.03


def test_the_seam_error_is_reported_for_windows_that_disagree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, net = use_pyramid(monkeypatch, tmp_path)
    forward = net.forward

    def pooled(rgb_u8, gsd_m):  # type: ignore[no-untyped-def]
        answer = forward(rgb_u8, gsd_m)
        answer.agl_m = answer.agl_m + rgb_u8.float().mean(dim=(1, 2, 3), keepdim=True)
        return answer

    monkeypatch.setattr(net, "forward", pooled)
    source = write_scene(tmp_path / "JAX_a.tif", pixels(300, 400))
    assert predict(source, checkpoint, tmp_path / "out", "--rectify", "false") == 0
    facts = json.loads((tmp_path / "out" / "JAX_a_VFLOW.json").read_text())
    assert facts["seam_max_m"] > facts["seam_rms_m"] > 0.05
    assert f"windows differ by {facts['seam_rms_m']:.2g} m" in capsys.readouterr().out


def test_outputs_stand_in_their_place_and_blocks_rectify_like_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = use_pyramid(monkeypatch, tmp_path)
    monkeypatch.setattr(scene_plan, "BLOCK_PX", 128)
    rgb = pixels(530, 300)
    rgb[:200, 200:] = 0
    source = write_scene(tmp_path / "OMA_b_RGB.tif", rgb, nodata=0)
    out = tmp_path / "out"
    assert predict(source, checkpoint, out) == 0
    facts = json.loads((out / "OMA_b_VFLOW.json").read_text())
    agl_cm = read(out / "OMA_b_AGL.tif")
    assert agl_cm.dtype == np.uint16
    unknown = agl_cm == geometry.NO_DATA_CM
    assert unknown[:200, 200:].all()
    assert not unknown[200:].any()
    for name in (
        "OMA_b_AGL.tif",
        "rectified/OMA_b_AGL.tif",
        "rectified/OMA_b_RGB.tif",
        "rectified/OMA_b_OCCLUDED.tif",
    ):
        with rasterio.open(out / name) as file, rasterio.open(source) as like:
            assert file.crs == like.crs
            assert file.transform == like.transform
            assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert file.overviews(1) == [2]
            assert file.nodata == (geometry.NO_DATA_CM if "AGL" in name else None)
    black = rgb.copy()
    black[unknown] = 0
    flat_rgb, flat_m, hidden = kernels.rectify(
        black, geometry.agl_m_from_cm(agl_cm), geometry.px_per_m(facts["scale"]), facts["angle"]
    )
    assert 0.001 < hidden.mean() < 0.5  # something moved
    np.testing.assert_array_equal(read(out / "rectified" / "OMA_b_RGB.tif"), flat_rgb)
    np.testing.assert_array_equal(read(out / "rectified" / "OMA_b_OCCLUDED.tif"), hidden * 255)
    flat_cm, _ = geometry.agl_cm_from_m(flat_m, unknown_allowed=True)
    np.testing.assert_array_equal(read(out / "rectified" / "OMA_b_AGL.tif"), flat_cm)
    assert not (out / ".geopose-predict" / "OMA_b" / "windows").exists()


def test_a_run_that_failed_goes_on_with_its_windows_and_a_finished_one_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, net = use_pyramid(monkeypatch, tmp_path)
    source = write_scene(tmp_path / "ATL_c.tif", pixels(400, 450), compress="deflate")
    assert predict(source, checkpoint, tmp_path / "undisturbed") == 0
    all_passes, net.passes = net.passes, 0
    whole = source.read_bytes()
    with tifffile.TiffFile(source) as tif:
        at = tif.pages.first.dataoffsets[30]  # of 56 blocks
    damaged = bytearray(whole)
    damaged[at : at + 400] = b"\xff" * 400
    stat = source.stat()
    source.write_bytes(bytes(damaged))
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    out = tmp_path / "out"
    assert predict(source, checkpoint, out) == 1
    said = capsys.readouterr().err
    assert "windows failed; the others are kept" in said
    assert "ATL_c.tif: rows" in said
    assert not (out / "ATL_c_AGL.tif").exists()
    first, net.passes = net.passes, 0
    assert 0 < first <= all_passes
    source.write_bytes(whole)
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert predict(source, checkpoint, out) == 0
    assert 0 < net.passes < all_passes
    assert files_of(out) == files_of(tmp_path / "undisturbed")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    net.passes = 0
    assert predict(source, checkpoint, out) == 0
    assert net.passes == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert predict(source, checkpoint, out, "--net.tta", "flips") == 2
    assert "predictions there have other net" in capsys.readouterr().err


def test_a_scene_without_a_place_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, _ = use_pyramid(monkeypatch, tmp_path)
    monkeypatch.setattr(raster, "LARGEST_TILE_PX", 256)
    source = write_scene(tmp_path / "x.tif", pixels(300, 200), crs=None, transform=None)
    assert predict(source, checkpoint, tmp_path / "out", "--unit", "m") == 0
    assert "names no coordinate system" in capsys.readouterr().err
    assert read(tmp_path / "out" / "x_AGL.tif").dtype == np.float32
    assert json.loads((tmp_path / "out" / "x_VFLOW.json").read_text())["gsd_m"] is None


def rgba(rgb: np.ndarray) -> np.ndarray:
    alpha = np.full((*rgb.shape[:2], 1), 255, np.uint8)
    alpha[:50] = 0
    return np.concatenate([rgb, alpha], axis=2)


def test_alpha_marks_what_is_outside_and_all_of_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = use_pyramid(monkeypatch, tmp_path)
    source = write_scene(tmp_path / "x.tif", rgba(pixels(200, 200)), alpha="yes")
    assert predict(source, checkpoint, tmp_path / "out") == 0
    unknown = read(tmp_path / "out" / "x_AGL.tif") == geometry.NO_DATA_CM
    assert unknown[:50].all()
    assert not unknown[50:].any()
    empty = write_scene(tmp_path / "empty.tif", np.zeros((100, 100, 3), np.uint8), nodata=0)
    assert predict(empty, checkpoint, tmp_path / "out2") == 0
    assert (read(tmp_path / "out2" / "empty_AGL.tif") == geometry.NO_DATA_CM).all()


@pytest.mark.parametrize(
    ("change", "profile", "sentence"),
    [
        (lambda rgb: rgb[:, :, :1], {}, r"1 band \(gray\); wanted red, green and blue"),
        (lambda rgb: rgb.astype(np.uint16), {}, "pixels are uint16; wanted uint8"),
        (lambda rgb: rgb.repeat(2, 2), {"photometric": "minisblack"}, r"6 bands \(gray"),
    ],
)
def test_what_is_no_rgb_scene_is_refused(
    change: Callable[[np.ndarray], np.ndarray], profile: dict, sentence: str, tmp_path: Path
) -> None:
    source = write_scene(tmp_path / "x.tif", change(pixels(64, 64)), **profile)
    assert raster.is_scene(source)
    with pytest.raises(UserError, match=sentence):
        raster.look(source)


def test_bands_are_found_by_their_marks_and_ground_sizes_in_any_unit(tmp_path: Path) -> None:
    rgb = pixels(64, 64)
    blue_first = np.concatenate([rgb[:, :, ::-1], rgb[:, :, :1]], axis=2)
    source = write_scene(tmp_path / "bgrn.tif", blue_first, photometric="minisblack")
    with rasterio.open(source, "r+") as file:
        file.colorinterp = [
            rasterio.enums.ColorInterp[name] for name in ("blue", "green", "red", "undefined")
        ]
    scene = raster.look(source)
    assert scene.bands == (3, 2, 1)
    assert scene.gsd_m == 0.5
    read_rgb, known = raster.SceneReader(scene).read(slice(3, 20), slice(5, 40))
    np.testing.assert_array_equal(read_rgb, rgb[3:20, 5:40])
    assert known.all()
    degrees = write_scene(
        tmp_path / "d.tif", rgb, crs="EPSG:4326", transform=rasterio.Affine(1e-5, 0, 30, 0, -1e-5, 60)
    )
    assert raster.look(degrees).gsd_m == pytest.approx(1.1132 * np.sqrt(0.5), rel=1e-3)
    feet = write_scene(tmp_path / "f.tif", rgb, crs="EPSG:2236", transform=rasterio.Affine(1, 0, 0, 0, -1, 0))
    assert raster.look(feet).gsd_m == pytest.approx(0.3048, rel=1e-4)


def test_a_missing_rasterio_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_scene(tmp_path / "x.tif", pixels(64, 64))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'geopose-dist\[scenes\]'"):
        raster.look(source)


@pytest.mark.parametrize(("side", "reduction"), [(1000, 1), (1001, 2), (97, 2), (20_000, 2)])
def test_every_pixel_has_windows_that_sum_to_one_and_one_block(side: int, reduction: int) -> None:
    plan = ScenePlan(side, side // 2 + 7, reduction, 256, 64, 512)
    for weights, small in zip(plan.weights, plan.small, strict=True):
        assert weights.shape[1] == small
        np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-6)
    covered = np.zeros((plan.rows, plan.columns), np.uint8) if side < 2000 else None
    for block in range(plan.blocks):
        if covered is not None:
            covered[plan.core(block)] += 1
    assert covered is None or (covered == 1).all()
    last = plan.windows - 1
    assert plan.source(last)[0].stop == plan.rows
    assert plan.source(last)[1].stop == plan.columns
    assert all(start % 32 == 0 for starts in plan.starts for start in starts)


def test_one_pose_from_windows_of_which_some_are_wrong() -> None:
    rng = np.random.default_rng(2)
    angles = np.r_[rng.normal(0.02, 0.05, 60), rng.uniform(0, 6.28, 25)]  # across the wrap
    scales = np.r_[rng.normal(np.log(0.6), 0.05, 60), np.full(25, np.log(2.5))]
    vectors = np.stack([np.sin(angles), np.cos(angles)], 1)
    fused = fuse(vectors, scales, np.ones(85))
    assert geometry.angle_difference_deg(fused.angle_rad, 0.02) < 2
    assert fused.scale_px_per_m == pytest.approx(0.6, rel=0.05)
    assert 1 < fused.angle_spread_deg < 10
    lawns = fuse(vectors, scales, np.r_[np.ones(60), np.zeros(25)])
    assert lawns.windows == 60
    assert lawns.angle_spread_deg < fused.angle_spread_deg
    assert fuse(vectors, scales, np.zeros(85)).windows == 85
    with pytest.raises(ValueError, match="no window"):
        fuse(vectors[:0], scales[:0], scales[:0])


def test_medians() -> None:
    assert weighted_median(np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 1.0])) == 2
    assert weighted_median(np.array([1.0, 2.0]), np.array([1.0, 1.0])) == 1.5
    assert weighted_median(np.array([1.0, 9.0]), np.array([1.0, 5.0])) == 9
    square = np.array([[0.0, 0.0], [1, 0], [0, 1], [1, 1], [40, 0.5]])
    x, y = spatial_median(square, np.ones(5))
    assert 0.4 < x < 1.1
    assert y == pytest.approx(0.5, abs=1e-6)
