"""Folders and lists of scenes: what is a scene and what a tile, one failing scene among good ones, plans."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scenes import files_of, pixels, predict, use_pyramid, write_scene

from geopose_dist.errors import UserError
from geopose_dist.infer import raster
from geopose_dist.infer.recipe import PredictRecipe
from geopose_dist.infer.scene_list import find_scenes

rasterio = pytest.importorskip("rasterio", reason="the extra `scenes` is not installed")


def scenes_of(source: Path, **options: object) -> list[str]:
    recipe = PredictRecipe(str(source), [Path("x")], Path("y"), **options)  # type: ignore[arg-type]
    return [path.name for path in find_scenes(recipe)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three small scenes, of which two have the same size."""
    place = tmp_path / "scenes"
    place.mkdir()
    write_scene(place / "ARG_a_RGB.tif", pixels(100, 210))
    write_scene(place / "JAX_b_RGB.tiff", pixels(90, 200, seed=1))
    write_scene(place / "JAX_c_RGB.tif", pixels(90, 200, seed=2))
    return place


def test_a_folder_holds_scenes_if_all_of_its_images_are(folder: Path, tmp_path: Path) -> None:
    assert scenes_of(folder) == ["ARG_a_RGB.tif", "JAX_b_RGB.tiff", "JAX_c_RGB.tif"]
    assert scenes_of(folder, limit=1) == ["ARG_a_RGB.tif"]
    assert scenes_of(folder, scenes="never") == []
    assert scenes_of(folder / "ARG_a_RGB.tif") == ["ARG_a_RGB.tif"]
    assert scenes_of(folder / "ARG_a_RGB.tif", scenes="never") == []
    table = tmp_path / "list.csv"
    table.write_text("rgb\nscenes/JAX_b_RGB.tiff\nscenes/ARG_a_RGB.tif\n")
    assert scenes_of(table) == ["ARG_a_RGB.tif", "JAX_b_RGB.tiff"]
    tifffile.imwrite(folder / "OMA_d_RGB.tif", pixels(64, 64))  # without a place on the earth
    assert scenes_of(folder) == []
    assert len(scenes_of(folder, scenes="always")) == 4
    (folder / "OMA_d_RGB.tif").rename(folder / "overview.tif")  # no _RGB in its name, as the others have
    assert len(scenes_of(folder)) == 3
    (folder / "x_RGB.j2k").touch()
    assert scenes_of(folder) == []
    (folder / "x_RGB.j2k").unlink()
    (folder / "ARG_a_AGL.tif").touch()  # labels: a dataset of tiles
    assert scenes_of(folder) == []
    assert scenes_of(tmp_path / "nothing") == []


def test_what_cannot_be_a_scene_is_said(folder: Path, tmp_path: Path) -> None:
    write_scene(folder / "JAX_b_RGB.tif", pixels(64, 64))
    with pytest.raises(UserError, match=r"JAX_b_RGB.tif and JAX_b_RGB.tiff are both JAX_b"):
        scenes_of(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no TIFF, where --scenes always wants GeoTIFFs"):
        scenes_of(tmp_path / "empty", scenes="always")


def test_a_folder_of_scenes_gives_what_each_gives_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, net = use_pyramid(monkeypatch, tmp_path)
    alone, out = tmp_path / "alone", tmp_path / "out"
    for source in sorted(folder.iterdir()):
        assert predict(source, checkpoint, alone) == 0
    assert predict(folder, checkpoint, out, "--dry-run", "true") == 0
    assert "ARG_a_RGB.tif: 100 x 210 pixels, 2 windows, 1 blocks to do" in capsys.readouterr().out
    assert not out.exists()
    assert predict(folder, checkpoint, out, "--limit", "1") == 0
    net.passes = 0
    assert predict(folder, checkpoint, out) == 0
    assert net.passes == 2  # the first of the three was finished
    assert len(capsys.readouterr().out.split("windows differ by")) == 1 + 1 + 3
    assert files_of(out) == files_of(alone)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert predict(folder, checkpoint, out) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    capsys.readouterr()
    assert predict(folder, checkpoint, out, "--dry-run", "true") == 0
    assert capsys.readouterr().out.count("finished") == 3


def test_a_scene_that_fails_keeps_no_other_from_being_finished(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, _ = use_pyramid(monkeypatch, tmp_path)
    out, whole = tmp_path / "out", (folder / "ARG_a_RGB.tif").read_bytes()
    write_scene(folder / "ARG_a_RGB.tif", pixels(100, 210), compress="deflate")
    with tifffile.TiffFile(folder / "ARG_a_RGB.tif") as tif:
        at = tif.pages.first.dataoffsets[5]
    damaged = bytearray((folder / "ARG_a_RGB.tif").read_bytes())
    damaged[at : at + 300] = b"\xff" * 300
    (folder / "ARG_a_RGB.tif").write_bytes(bytes(damaged))
    assert predict(folder, checkpoint, out) == 1
    said = capsys.readouterr()
    assert "1 of 3 scenes are not finished" in said.err
    assert "ARG_a_RGB.tif: rows" in said.err
    assert "JAX_c_AGL.tif: 90 x 200 pixels" in said.out
    assert sorted(path.name for path in out.glob("*_AGL.tif")) == ["JAX_b_AGL.tif", "JAX_c_AGL.tif"]
    told = (out / ".geopose-predict" / "failures.jsonl").read_text().splitlines()
    assert all("ARG_a_RGB.tif" in json.loads(line)["problem"] for line in told)
    (folder / "ARG_a_RGB.tif").write_bytes(whole)
    assert predict(folder, checkpoint, out) == 0
    assert predict(folder, checkpoint, tmp_path / "undisturbed") == 0
    assert files_of(out) == files_of(tmp_path / "undisturbed")
    assert not (out / ".geopose-predict" / "failures.jsonl").read_text()


def test_headers_are_all_looked_at_before_anything_starts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, net = use_pyramid(monkeypatch, tmp_path)
    for name in ("JAX_b_RGB.tiff", "JAX_c_RGB.tif"):
        write_scene(folder / name, pixels(64, 64).astype(np.uint16))
    assert predict(folder, checkpoint, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "2 of 3 scenes cannot be predicted" in said
    assert "JAX_b_RGB.tiff: pixels are uint16" in said
    assert net.passes == 0


@pytest.mark.slow
def test_scenes_of_another_network_are_not_taken_for_finished(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, net = use_pyramid(monkeypatch, tmp_path)
    out, flips = tmp_path / "out", ("--net.tta", "flips")
    assert predict(folder, checkpoint, out) == 0
    assert predict(folder, checkpoint, tmp_path / "flipped", *flips) == 0
    assert predict(folder, checkpoint, out, *flips, "--limit", "1", "--overwrite", "true") == 0
    net.passes = 0
    assert predict(folder, checkpoint, out, *flips) == 0
    assert net.passes == 2 * 4
    assert files_of(out) == files_of(tmp_path / "flipped")
    assert raster.is_scene(folder / "ARG_a_RGB.tif")
