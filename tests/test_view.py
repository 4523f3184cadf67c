"""The 3D page: what it holds, what it refuses, and that a browser draws and turns it."""

import base64
import json
import re
from pathlib import Path

import browser
import numpy as np
import pytest
from test_report import dataset as dataset
from test_report import read_page

from geopose_dist import cli
from geopose_dist.geometry import Pose
from geopose_dist.report import mesh

TURN = """
  Element.prototype.setPointerCapture = Element.prototype.releasePointerCapture = () => {};
  const root = document.documentElement, canvas = document.querySelector("canvas");
  const box = canvas.getBoundingClientRect();
  const point = (type, x, more) => canvas.dispatchEvent(new PointerEvent(type,
    { clientX: box.left + x, clientY: box.top + 90, bubbles: true, ...more }));
  const drag = (more) => {
    point("pointerdown", 100, more);
    for (const x of [120, 160, 200]) point("pointermove", x, more);
    point("pointerup", 200, { ...more, buttons: 0 });
  };
  const azimuths = [root.dataset.azimuth], note = () => azimuths.push(root.dataset.azimuth);
  drag({ pointerType: "mouse", pointerId: 1, button: 0, buttons: 1 });
  note();
  drag({ pointerType: "touch", pointerId: 7, button: 0, buttons: 1, isPrimary: true });
  note();
  canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  note();
  root.dataset.before = root.dataset.distance;
  canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: -300, cancelable: true, bubbles: true }));
  root.dataset.after = root.dataset.distance;
  document.querySelector('[value="above"]').click();
  root.dataset.polars = root.dataset.polar;
  document.querySelector('[value="error"]').click();
  root.dataset.azimuths = azimuths.join(" ");
"""


@pytest.fixture(scope="module")
def both(dataset: Path) -> Path:
    """The page of a tile with truth and prediction."""
    out = dataset / "both.html"
    words = [
        "--source",
        dataset / "truth",
        "--predictions",
        dataset / "predictions",
        "--key",
        "JAX_b",
        "--out",
        out,
    ]
    assert cli.main(["view", *map(str, words)]) == 0
    return out


def scene(path: Path) -> dict:
    (words,) = re.findall(r'<script type="application/json" id="scene">(.*?)</script>', read_page(path))
    facts: dict = json.loads(words)
    return facts


def test_the_page_holds_both_meshes_and_the_library_with_its_licence(both: Path) -> None:
    text, facts = read_page(both), scene(both)
    assert "Permission is hereby granted" in text
    assert "three.js authors" in text
    assert [surface["name"] for surface in facts["surfaces"]] == ["truth", "prediction"]
    assert text.count("<span>truth</span><span>prediction</span>") == 1
    assert facts["size"] == [96, 128]
    assert len(facts["rows"]) == 96
    truth, predicted = (
        np.frombuffer(base64.b64decode(surface["agl"]), "<u2").reshape(96, 128)
        for surface in facts["surfaces"]
    )
    assert (truth[:6] == 65535).all()
    assert truth[45, 60] == 1100
    assert predicted[45, 60] == 1300  # two metres more
    agl_m = np.where(truth == 65535, np.nan, truth / 100).astype(np.float32)
    built = mesh.build(agl_m, Pose(2.0, 0.5))
    kept = np.unpackbits(
        np.frombuffer(base64.b64decode(facts["surfaces"][0]["kept"]), np.uint8), bitorder="little"
    )
    np.testing.assert_array_equal(kept[: built.kept.size].astype(bool), built.kept.ravel())
    assert (
        np.frombuffer(base64.b64decode(facts["surfaces"][0]["walls"]), "<u4").tolist()
        == built.walls.ravel().tolist()
    )
    assert facts["surfaces"][0]["shift"] == pytest.approx([0.5 * np.sin(2), 0.5 * np.cos(2)])
    assert "GSD unknown, drawn as 0.4 m" in text


def test_labels_or_a_prediction_alone_will_do(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.html"
    words = ["--key", "JAX_a", "--out", str(out), "--side", "40", "--gsd_m", "0.5"]
    assert cli.main(["view", "--source", str(dataset / "truth"), *words]) == 0
    assert [surface["name"] for surface in scene(out)["surfaces"]] == ["truth"]
    assert (len(scene(out)["rows"]), len(scene(out)["columns"])) == (30, 40)
    assert "so a camera 76 deg above the horizon" in out.read_text()
    (tmp_path / "images").mkdir()
    image = tmp_path / "images" / "JAX_a_RGB.tif"
    image.write_bytes((dataset / "truth" / "JAX_a_RGB.tif").read_bytes())
    bare = ["view", "--source", str(image.parent), *words]
    assert cli.main([*bare, "--predictions", str(dataset / "predictions")]) == 0
    assert [surface["name"] for surface in scene(out)["surfaces"]] == ["prediction"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--key", "JAX_q"], "no such tile among the 6"),
        (["--key", "JAX_a", "--predictions", "EMPTY"], "no JAX_a_AGL.tif with JAX_a_VFLOW.json"),
        (["--key", "JAX_a", "--side", "1"], "wanted 2 to 1024 vertices"),
        (["--key", "JAX_a", "--gsd_m", "-1"], "wanted metres above 0"),
    ],
)
def test_mistakes_are_told(
    words: list[str],
    said: str,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    words = [str(tmp_path / "empty") if word == "EMPTY" else word for word in words]
    out = tmp_path / "v.html"
    assert cli.main(["view", "--source", str(dataset / "truth"), "--out", str(out), *words]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_a_browser_draws_the_tile_and_mouse_touch_and_keys_turn_it(both: Path, tmp_path: Path) -> None:
    waiting = (
        "const wait = () => document.documentElement.dataset.view ? turn() : setTimeout(wait, 50); wait();"
    )
    driven = browser.with_script(both, tmp_path / "driven.html", f"function turn() {{ {TURN} }} {waiting}")
    facts = browser.facts(driven, tmp_path)
    assert facts["view"] == "ready"
    packed = [base64.b64decode(surface["kept"]) for surface in scene(both)["surfaces"]]
    kept = [int(np.unpackbits(np.frombuffer(bits, np.uint8)).sum()) for bits in packed]
    assert [int(count) for count in facts["triangles"].split()] == kept
    start, mouse, touch, key = map(float, facts["azimuths"].split())
    assert mouse < start - 5  # dragging to the right turns the tile after the pointer
    assert touch < mouse - 5
    assert key == pytest.approx(touch + 10, abs=0.2)
    assert float(facts["after"]) < float(facts["before"])  # the wheel brings it nearer
    assert float(facts["polars"]) < 1  # seen from above


@pytest.mark.slow
def test_a_phone_shows_the_tile_in_the_dark(both: Path, tmp_path: Path) -> None:
    frame = tmp_path / "phone.html"
    frame.write_text(
        f'<body style="margin:0"><iframe src="{both.as_uri()}" width=390 height=700 style="border:0">'
    )
    dark, _ = browser.screenshot(frame.as_uri(), tmp_path, (500, 700), dark=True)
    stage = dark[230:600, 30:360]
    grey = (
        np.ptp(stage.astype(int), axis=2) < 16
    )  # the tile is noise of all colours; what is around it is not
    assert 15 <= np.median(stage[grey]) < 60
    assert 0.1 < 1 - grey.mean() < 0.95


@pytest.mark.slow
def test_without_webgl_there_is_a_sentence_instead(both: Path, tmp_path: Path) -> None:
    shown = browser.dump(both.as_uri(), tmp_path, "--disable-3d-apis")
    assert 'data-view="no WebGL"' in shown
    assert '<p id="fallback">The 3D view needs a browser with WebGL' in shown
    assert "<canvas" not in shown
