"""Figures for papers: a file each, a column or a page wide, letters embedded, the same bytes every time."""

import json
import re
import zlib
from pathlib import Path

import imagecodecs
import pytest
from test_report import dataset as dataset
from test_report import run_folder as run_folder

from geopose_dist import cli
from geopose_dist.report import figures, paper


def objects(pdf: bytes) -> bytes:
    """A PDF with its compressed streams beside it as they are inside."""
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL)
    inside = []
    for stream in streams:
        try:
            inside.append(zlib.decompress(stream))
        except zlib.error:
            continue  # a JPEG or a font as such
    return b"\n".join([pdf, *inside])


def width_in(path: Path) -> float:
    """Width of a figure on paper."""
    if path.suffix == ".pdf":
        (box,) = re.findall(rb"/MediaBox \[ ?0 0 ([0-9.]+) [0-9.]+ ?\]", objects(path.read_bytes()))
        return float(box) / 72
    pixels = imagecodecs.imread(path)
    return float(pixels.shape[1]) / paper.DPI


@pytest.mark.parametrize("kind", [pytest.param("png", marks=pytest.mark.slow), "pdf"])
def test_exploring_writes_figures(kind: str, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures"
    words = ["explore", "--source", dataset / "truth", "--examples", "1", "--workers", "1", "--format", kind]
    assert cli.main([*map(str, words), "--out", str(out)]) == 0
    names = {path.stem for path in out.iterdir()}
    assert names == {
        "scale",
        "direction_of_the_flow",
        "height_above_ground",
        "example_JAX_b",
        "example_OMA_b",
    }
    for path in out.iterdir():
        wanted = paper.PAGE_IN if "example" in path.name else paper.COLUMN_IN
        assert width_in(path) == pytest.approx(wanted, abs=0.01)
    if kind == "png":
        pixels = imagecodecs.imread(out / "scale.png")
        assert (pixels[:5, :5] == 255).all()  # opaque white
    else:
        for path in out.iterdir():
            inside = objects(path.read_bytes())
            fonts = re.findall(rb"/FontName /[A-Z]*\+?DejaVuSans", inside)
            assert fonts
            assert inside.count(b"/FontFile2") >= 1  # TrueType, embedded
            assert b"/Type3" not in inside


@pytest.mark.slow
def test_a_run_is_drawn_with_its_score_and_tiles(run_folder: Path, dataset: Path, tmp_path: Path) -> None:
    score = {"cities": {"JAX": {"agl_r2": 0.5, "vflow_r2": 0.4, "r2": 0.45, "images": 3}}, "r2": 0.45}
    (tmp_path / "score.json").write_text(json.dumps(score))
    folders = {"source": "truth", "truth": "truth", "predictions": "predictions"}
    words = [word for name, folder in folders.items() for word in (f"--{name}", str(dataset / folder))]
    words += ["--score", str(tmp_path / "score.json"), "--workers", "1", "--format", "png"]
    assert cli.main(["report", "--run", str(run_folder), *words]) == 0
    names = {path.stem for path in (run_folder / "figures").iterdir()}
    assert {"score_by_city", "training_loss", "validation_score", "learning_rate", "throughput"} < names
    assert {
        f"tile_JAX_{rank}_JAX_{key}" for rank, key in (("best", "a"), ("median", "b"), ("worst", "c"))
    } < names


def test_the_same_data_give_the_same_file_and_names_do_not_collide(tmp_path: Path) -> None:
    plot = figures.chart([figures.Line("a", [1, 2], [3, 4])], title="A/B: §$x$", x_label="x", y_label="y")
    for kind in ("png", "pdf"):
        folder = paper.Folder(tmp_path / kind, kind)
        folder.plot(plot)
        folder.plot(plot)
        first, second = folder.written
        assert [path.name for path in (first, second)] == [f"a_b_x.{kind}", f"a_b_x_2.{kind}"]
        assert first.read_bytes() == second.read_bytes()


def test_a_file_is_no_folder_for_figures(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.pdf"
    out.write_bytes(b"")
    words = ["explore", "--source", str(dataset / "truth"), "--out", str(out), "--format", "pdf"]
    assert cli.main(words) == 2
    assert "wanted a folder" in capsys.readouterr().err
    assert out.read_bytes() == b""
