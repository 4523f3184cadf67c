"""The rectify verb: what the kernel computes, written beside its occlusion, for predictions and for truth."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from geopose_dist import cli, geometry
from geopose_dist.evaluate import predictions as files

SCALE_PX_PER_M, ANGLE = 0.5, np.pi / 2  # heights move right, half a pixel per metre


@pytest.fixture
def scene(tmp_path: Path) -> tuple[Path, Path]:
    """A red roof 20 m tall on green ground, seen 10 px left of its place, and its pose as a prediction."""
    source, pred = tmp_path / "source", tmp_path / "pred"
    source.mkdir()
    pred.mkdir()
    rgb = np.zeros((64, 80, 3), np.uint8)
    rgb[:, :, 1] = 200
    agl_m = np.zeros((64, 80), np.float32)
    rgb[20:40, 30:50] = (250, 0, 0)
    agl_m[20:40, 30:50] = 20
    tifffile.imwrite(source / "JAX_roof_RGB.tif", rgb, photometric="rgb")
    heights, _ = geometry.agl_cm_from_m(agl_m, unknown_allowed=False)
    (pred / "JAX_roof_AGL.tif").write_bytes(files.encode_agl(heights))
    (pred / "JAX_roof_VFLOW.json").write_bytes(files.encode_vflow(SCALE_PX_PER_M, ANGLE))
    return source, pred


def rectify(source: Path, pred: Path, out: Path) -> int:
    words = ["--source", str(source), "--predictions", str(pred), "--out", str(out), "--workers", "1"]
    return cli.main(["rectify", *words])


def test_the_roof_moves_to_its_ground_and_uncovers_what_it_hid(
    scene: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert rectify(*scene, out) == 0
    rgb = cv2.imread(str(out / "JAX_roof_RGB.png"))[:, :, ::-1]
    heights = tifffile.imread(out / "JAX_roof_AGL.tif")
    occluded = cv2.imread(str(out / "JAX_roof_OCCLUDED.png"), cv2.IMREAD_UNCHANGED)
    assert (heights[20:40, 40:60] == 2000).all()
    assert (rgb[20:40, 40:60] == (250, 0, 0)).all()
    inner = slice(21, 39), slice(31, 39)  # a corner pixel may count as a crack and be closed
    assert (occluded[inner] == 255).all()
    assert (heights[inner] == 65535).all()
    assert (occluded[20:40, 40:60] == 0).all()
    assert 190 <= int((occluded > 0).sum()) <= 200


def test_again_does_nothing_until_an_input_changes(scene: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    rectify(*scene, out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert rectify(*scene, out) == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    (scene[1] / "JAX_roof_VFLOW.json").write_bytes(files.encode_vflow(SCALE_PX_PER_M, 0.0))
    assert rectify(*scene, out) == 0
    assert (tifffile.imread(out / "JAX_roof_AGL.tif")[30:50, 30:50] == 2000).all()


def test_evaluate_rectifies_predictions_and_truth(scene: tuple[Path, Path], tmp_path: Path) -> None:
    source, pred = scene
    for path in pred.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "rectified"
    words = ["--predictions", str(pred), "--truth", str(source), "--rectify", str(out), "--workers", "1"]
    assert cli.main(["evaluate", *words]) == 0
    for name in ("prediction", "truth"):
        assert (out / name / "JAX_roof_RGB.png").is_file()
        assert (tifffile.imread(out / name / "JAX_roof_AGL.tif")[20:40, 40:60] == 2000).all()


def test_faults_are_named(
    scene: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, pred = scene
    (pred / "JAX_lost_AGL.tif").write_bytes((pred / "JAX_roof_AGL.tif").read_bytes())
    assert rectify(source, pred, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "JAX_lost_VFLOW.json: missing" in told
    assert "JAX_lost has no image" in told
    (pred / "JAX_lost_AGL.tif").unlink()
    (pred / "JAX_roof_VFLOW.json").write_text(json.dumps({"scale": 0, "angle": 0}))
    assert rectify(source, pred, tmp_path / "out") == 1
    assert "JAX_roof_VFLOW.json: scale is 0" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.png"))
