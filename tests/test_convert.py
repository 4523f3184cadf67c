"""Float metres and px/m become uint16 centimetres and px/cm, or are refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from geopose_dist import cli


@pytest.fixture
def metres(tmp_path: Path) -> Path:
    folder = tmp_path / "metres"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for key in ("ARG_a", "JAX_b"):
        tifffile.imwrite(folder / f"{key}_AGL.tif", rng.uniform(0, 90, (33, 47)).astype(np.float32))
        (folder / f"{key}_VFLOW.json").write_text(json.dumps({"scale": 0.8123456789012, "angle": -0.5}))
    return folder


def convert(folder: Path, out: Path) -> int:
    return cli.main(
        ["convert", "--predictions", str(folder), "--out", str(out), "--from", "m", "--workers", "1"]
    )


def test_units_change_and_numbers_stay(metres: Path, tmp_path: Path) -> None:
    out = tmp_path / "cm"
    assert convert(metres, out) == 0
    heights = tifffile.imread(out / "ARG_a_AGL.tif")
    assert heights.dtype == np.uint16
    np.testing.assert_allclose(heights / 100, tifffile.imread(metres / "ARG_a_AGL.tif"), atol=0.00501)
    pose = json.loads((out / "ARG_a_VFLOW.json").read_text())
    assert pose == {"scale": 0.00812345679, "angle": 5.78318531}
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert convert(metres, out) == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


def test_heights_outside_the_files_range_are_clipped_and_counted(
    metres: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heights = tifffile.imread(metres / "JAX_b_AGL.tif")
    heights[0, :3] = [-2, 655.34, 900]
    tifffile.imwrite(metres / "JAX_b_AGL.tif", heights)
    assert convert(metres, tmp_path / "cm") == 0
    assert tifffile.imread(tmp_path / "cm" / "JAX_b_AGL.tif")[0, :3].tolist() == [0, 65534, 65534]
    assert "2 pixels in 1 tiles clipped" in capsys.readouterr().out


def test_faults_are_named_together_and_the_good_tile_is_converted(
    metres: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heights = tifffile.imread(metres / "JAX_b_AGL.tif")
    heights[3, 4] = np.nan
    tifffile.imwrite(metres / "JAX_b_AGL.tif", heights)
    (metres / "JAX_b_VFLOW.json").write_text('{"scale": 0.008, "angle": 0}')
    tifffile.imwrite(metres / "OMA_c_AGL.tif", np.zeros((4, 4), np.uint16))
    (metres / "OMA_c_VFLOW.json").write_text('{"scale": 0.8, "angle": 0}')
    (metres / "OMA_d_AGL.tif").write_bytes(b"")
    assert convert(metres, tmp_path / "cm") == 2
    told = capsys.readouterr().err
    for sentence in (
        "JAX_b_AGL.tif: 1 pixels are NaN",
        "JAX_b_VFLOW.json: scale is 0.008, which looks like px/cm",
        "OMA_c_AGL.tif: uint16 (4, 4); wanted float metres",
        "OMA_d_VFLOW.json: missing",
    ):
        assert sentence in told
    assert sorted(path.name for path in (tmp_path / "cm").iterdir()) == ["ARG_a_AGL.tif", "ARG_a_VFLOW.json"]


def test_converting_onto_itself_is_refused(metres: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(metres, metres) == 2
    assert "is the folder of the predictions" in capsys.readouterr().err
