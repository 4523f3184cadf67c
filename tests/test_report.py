"""Pages: whole, self-contained, right in numbers, and readable in a browser."""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import cv2
import numpy as np
import pytest

from geopose_dist import cli, geometry
from geopose_dist.evaluate import pictures
from geopose_dist.evaluate import predictions as challenge
from geopose_dist.geometry import Pose
from geopose_dist.report import dataset_sums, figures, page, panels, run_page, scores, tiles

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Whole(HTMLParser):
    """Checks that tags close in order, and collects what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag


def read_page(path: Path) -> str:
    """The page's text, checked to be one whole file that fetches nothing."""
    text = path.read_text()
    reader = Whole()
    reader.feed(text)
    assert not reader.open
    assert all(link.startswith(("data:", "#")) for link in reader.links)
    assert "url(http" not in text
    assert len(text) < page.MAX_BYTES
    # The only scripts are files of the package, and the browser is told to run no others and to fetch nothing.
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert set(scripts) <= {page.resource(name).strip() for name in ("page.js", "view.js", "three.min.js")}
    digests = [base64.b64encode(hashlib.sha256(words.encode()).digest()).decode() for words in scripts]
    (rules,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    assert rules == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    return text


def write_tile(folder: Path, key: str, agl_m: Any, scale: float, angle: float, rgb: Any = None) -> None:
    folder.mkdir(exist_ok=True)
    cm, _ = geometry.agl_cm_from_m(agl_m.astype(np.float32), unknown_allowed=True)
    (folder / f"{key}_AGL.tif").write_bytes(challenge.encode_agl(cm))
    (folder / f"{key}_VFLOW.json").write_bytes(challenge.encode_vflow(scale, angle))
    if rgb is not None:
        cv2.imwrite(str(folder / f"{key}_RGB.tif"), rgb[..., ::-1])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`truth` with images, and `predictions` whose heights are off by 1 m, 2 m, 3 m for the tiles of a city."""
    folder = tmp_path_factory.mktemp("dataset")
    rng = np.random.Generator(np.random.Philox(1))
    for city in ("JAX", "OMA"):
        for number in range(3):
            rgb = rng.integers(0, 255, (96, 128, 3), dtype=np.uint8)
            agl_m = np.zeros((96, 128))
            agl_m[30:60, 40:80] = 10.0 + number
            known = agl_m + (number + 1.0)
            agl_m[:8] = np.nan
            write_tile(folder / "truth", f"{city}_{'abc'[number]}", agl_m, 0.5, 1.0 + number, rgb)
            write_tile(folder / "predictions", f"{city}_{'abc'[number]}", known, 0.5, 1.0 + number)
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    rows = [
        {"step": s, "epoch": s / 9, "loss": 2.0 / s, "loss_agl": 1.0 / s, "tiles_per_s": 7.5, "lr": 1e-3}
        for s in range(1, 31)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    validation = [
        {"step": s, "weights": kind, "r2": r2, "cities": {"JAX": {"agl_r2": r2, "vflow_r2": r2, "r2": r2}}}
        for s, kind, r2 in ((10, "raw", -300.0), (10, "ema", 0.2), (20, "raw", 0.4), (20, "ema", 0.5678))
    ]
    (run / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in validation))
    (run / "recipe.yaml").write_text("note: a < b\n")
    return run


def report(run: Path, dataset: Path, out: Path, score: Path) -> int:
    folders = [
        "--source",
        dataset / "truth",
        "--predictions",
        dataset / "predictions",
        "--truth",
        dataset / "truth",
    ]
    return cli.main(
        ["report", "--run", *map(str, [run, *folders, "--score", score, "--out", out, "--workers", 1])]
    )


@pytest.fixture
def made(run_folder: Path, dataset: Path, tmp_path: Path) -> Path:
    score, out = tmp_path / "score.json", tmp_path / "index.html"
    words = [
        "--predictions",
        dataset / "predictions",
        "--truth",
        dataset / "truth",
        "--json",
        score,
        "--workers",
        1,
    ]
    assert cli.main(["evaluate", *map(str, words)]) == 0
    assert report(run_folder, dataset, out, score) == 0
    return out


def test_the_page_of_a_run_tells_its_numbers(made: Path, tmp_path: Path) -> None:
    text = read_page(made)
    score = json.loads((tmp_path / "score.json").read_text())
    assert f"R² {score['r2']:.4f}" in text
    assert f"<td>{score['cities']['JAX']['agl_r2']:.4f}</td>" in text
    assert "30 steps" in text
    assert "7.5 tiles/s" in text
    assert "best validation R² 0.5678 at step 20 (ema weights)" in text
    assert "note: a &lt; b" in text
    for title in ("Training loss", "Validation score", "Learning rate", "Throughput"):
        assert f'aria-label="{title}"' in text
    assert (
        text.count("data:image/jpeg") == 6 * 6
    )  # best, median and worst of two cities, four panels and a pair each


def test_scores_stand_with_their_intervals() -> None:
    facts = {"agl_r2": 0.5, "vflow_r2": 0.7, "r2": 0.6, "images": 9}
    spans = {"agl_r2": [0.4, 0.6], "vflow_r2": [0.6, 0.8], "r2": [0.512, 0.688]}
    found: dict[str, Any] = {"unit": "places", "groups": {"JAX": 9, "OMA": 2}, "rounds": 1000, "level": 0.95}
    found |= {"r2": None, "cities": {"JAX": spans, "OMA": None}}
    score = {"cities": {"JAX": facts, "OMA": facts}, "r2": 0.6, "intervals": found}
    told = scores.score_part(score)
    assert '<th scope="col">95% interval</th>' in told
    assert "<td>0.6000</td><td>0.512 to 0.688</td>" in told
    assert told.count("<td>0.6000</td><td>-</td>") == 2  # a city of two places, and so the final score
    assert "bootstrap over places, city by city, 1000 rounds (JAX 9, OMA 2 places)" in told
    assert "not that of another training run" in told
    assert "interval" not in scores.score_part({"cities": {"JAX": facts}, "r2": 0.6})


def test_tiles_are_ranked_by_their_error(made: Path) -> None:
    titles = re.findall(r"<h3>([^<]*)</h3>", read_page(made))
    wanted = [
        f"{c}, {rank}: {c}_{key}"
        for c in ("JAX", "OMA")
        for rank, key in (("best", "a"), ("median", "b"), ("worst", "c"))
    ]
    assert titles == wanted
    # Heights are off by one metre and the scale is 0.5 px/m, so the endpoint is half a pixel off.
    assert "endpoint 0.50 px, height 1.00 m (RMS), angle 0.0 deg" in read_page(made)


@pytest.mark.parametrize(
    ("count", "ranks"), [(1, "best"), (2, "best worst"), (3, "best median worst"), (9, "best median worst")]
)
def test_a_tile_is_shown_once(count: int, ranks: str) -> None:
    measured = [tiles.Measured(f"JAX_{i}", "JAX", float(i), 0.0, 0.0, 0.0) for i in range(count)]
    found = tiles.picked(measured)
    assert [rank for rank, _ in found] == ranks.split()
    assert found[-1][1].key == f"JAX_{count - 1}"
    assert len({tile.key for _, tile in found}) == len(found)


def test_a_run_alone_makes_a_page_in_its_folder(run_folder: Path) -> None:
    assert cli.main(["report", "--run", str(run_folder)]) == 0
    assert "Tiles" not in read_page(run_folder / "report.html")


def test_a_line_cut_by_a_crash_is_left_out_and_other_damage_is_named(run_folder: Path) -> None:
    path = run_folder / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 31, "lo')
    assert len(run_page.read_lines(path)) == 30
    with path.open("a") as file:
        file.write('ss": }\n{"step": 32}\n')
    assert cli.main(["report", "--run", str(run_folder)]) == 2


def test_a_step_told_twice_counts_once(run_folder: Path) -> None:
    path = run_folder / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 7, "loss": 99.0}\n')
    lines = run_page.read_lines(path)
    assert [row["step"] for row in lines] == list(range(1, 31))
    assert lines[6]["loss"] == 99.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run", "nowhere"], "no metrics.jsonl"),
        (["--run", "RUN", "--score", "nowhere.json"], "--score nowhere.json"),
        (["--run", "RUN", "--truth", "x"], "--source and --predictions is missing"),
        (["--run", "RUN", "--truth", "x", "--source", "x", "--predictions", "x"], "no such folder"),
    ],
)
def test_mistakes_are_told(
    words: list[str], said: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", *(str(run_folder) if word == "RUN" else word for word in words)]) == 2
    assert said in capsys.readouterr().err
    assert not (run_folder / "report.html").exists()


def test_exploring_tells_counts_ranges_and_no_data(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "explore.html"
    words = ["--source", dataset / "truth", "--out", out, "--examples", 1, "--workers", 1]
    assert cli.main(["explore", *map(str, words)]) == 0
    text = read_page(out)
    assert "6 tiles of 2 cities." in text
    assert "<td>JAX</td><td>3</td><td>3</td>" in text
    assert "0.500 to 0.500" in text
    assert "<td>8.3%</td>" in text  # 8 of 96 rows are unknown
    assert "<td>12.00</td>" in text  # the tallest
    assert text.count("data:image/jpeg") == 2 * 4


def test_exploring_a_damaged_dataset_names_the_file(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(dataset / "truth", broken)
    path = broken / "JAX_b_AGL.tif"
    path.write_bytes(path.read_bytes()[:200])
    out = tmp_path / "e.html"
    assert cli.main(["explore", "--source", str(broken), "--out", str(out), "--workers", "1"]) == 1
    assert "JAX_b_AGL.tif" in capsys.readouterr().err
    assert "JAX_b_AGL.tif" in read_page(out)


def test_quantiles_are_right_to_a_decimetre() -> None:
    heights = np.random.Generator(np.random.Philox(2)).gamma(1.0, 8.0, 10_000)
    counts = np.bincount((heights * dataset_sums.BINS_PER_M).astype(int), minlength=dataset_sums.BINS)
    for share in (0.1, 0.5, 0.9):
        assert dataset_sums.quantile_m(counts, share) == pytest.approx(np.quantile(heights, share), abs=0.06)
    assert np.isnan(dataset_sums.quantile_m(np.zeros(5, np.int64), 0.5))


def test_arrows_leave_the_picture_alone_and_point_along_the_flow() -> None:
    rgb = np.zeros((200, 200, 3), np.uint8)
    agl_m = np.full((200, 200), np.nan, np.float32)
    agl_m[50, 50] = 20.0
    drawn, factor = figures.with_arrows(rgb, agl_m, [(Pose(0.0, 1.0), agl_m, (0, 255, 0))], side=200)
    assert not rgb.any()
    rows, columns = np.nonzero(drawn[..., 1] > 128)
    assert factor >= 1
    assert rows.min() >= 48  # angle 0 points down the image, from the roof on
    assert rows.max() == pytest.approx(50 + 20 * factor, abs=3)
    assert np.abs(columns - 50).max() <= 8


def test_unknown_heights_are_grey() -> None:
    image = figures.coloured(np.array([[0.0, np.nan, 5.0]], np.float32), 0.0, 5.0, "viridis")
    assert tuple(image[0, 1]) == figures.UNKNOWN
    assert tuple(image[0, 0]) != tuple(image[0, 2])


def test_thinning_keeps_means_and_drops_what_is_not_finite() -> None:
    x = np.arange(10_000.0)
    y = np.where(np.arange(10_000) % 2, 1.0, 3.0)
    y[17] = np.nan
    thin_x, thin_y = figures.thinned(x, y, most=100)
    assert len(thin_x) == len(thin_y) == 100
    assert np.allclose(thin_y, 2.0, atol=0.02)
    assert np.all(np.diff(thin_x) > 0)


def test_rectified_pictures_show_hidden_ground_black() -> None:
    rgb = np.full((64, 64, 3), 200, np.uint8)
    agl_m = np.zeros((64, 64), np.float32)
    agl_m[20:40, 20:40] = 10.0
    flat = panels.rectified(rgb, panels.Surface(agl_m, Pose(0.0, 1.0)))
    assert (flat[33:48, 24:36] == 200).all()  # the roof, ten pixels further down
    assert (flat[22:27, 24:36] == 0).all()  # what it hid
    assert (rgb == 200).all()


def test_the_augment_panel_shows_the_draw_of_a_run(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, out = tmp_path / "shards", tmp_path / "panel.png"
    words = ["--source", dataset / "truth", "--out", shards, "--reduce", 1, "--workers", 1]
    assert cli.main(["pack", *map(str, words)]) == 0
    capsys.readouterr()

    def augment(*words: object) -> dict[str, Any]:
        assert cli.main(["augment", "--shards", str(shards), "--out", str(out), *map(str, words)]) == 0
        drawn: dict[str, Any] = json.loads(capsys.readouterr().out)
        return drawn

    first = augment("--key", "JAX_b", "--augment.preset", "strong", "--seed", 3)
    assert cv2.imread(str(out)).shape[2] == 3
    assert augment("--key", "JAX_b", "--seed", 3) == first
    assert augment("--key", "JAX_b", "--seed", 3, "--visit", 1) != first
    assert augment("--key", "JAX_b", "--augment.preset", "none")["operations"] == []
    assert cli.main(["augment", "--shards", str(shards), "--out", str(out), "--key", "JAX_z"]) == 2
    assert "no sample 'JAX_z'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_browser_shows_the_page(made: Path, tmp_path: Path) -> None:
    """On a desktop and in a phone's width, light and dark."""
    light, _ = browser.screenshot(made.as_uri(), tmp_path, (1280, 2400))
    frame = tmp_path / "phone.html"  # a window of a browser on a desktop has a least width
    frame.write_text(
        f'<body style="margin:0"><iframe src="{made.name}" width=390 height=2400 style="border:0">'
    )
    dark, _ = browser.screenshot(frame.as_uri(), tmp_path, (500, 2400), dark=True)
    for picture, is_light in ((light, True), (dark[:, :390], False)):
        assert bool(np.median(picture) > 200) is is_light
        rows = np.ptp(picture.reshape(len(picture), -1), axis=1) > 60
        assert rows[:300].any()
        assert rows.mean() > 0.5, "most of the page should be filled"


@pytest.mark.slow
def test_the_slider_of_a_pair_is_dragged(made: Path, tmp_path: Path) -> None:
    """A third of the way from the left, by a pointer; the wide table scrolls inside itself."""
    script = """
      Element.prototype.setPointerCapture = () => {};
      const stack = document.querySelector(".stack"), box = stack.getBoundingClientRect();
      const at = { clientX: box.left + box.width / 3, clientY: box.top + 9, buttons: 1, bubbles: true, pointerId: 1 };
      stack.dispatchEvent(new PointerEvent("pointerdown", at));
      document.documentElement.dataset.cut = stack.style.getPropertyValue("--cut") + " " + stack.nextSibling.value;
      document.documentElement.dataset.wide = document.documentElement.scrollWidth - innerWidth;
    """
    facts = browser.facts(browser.with_script(made, tmp_path / "driven.html", script), tmp_path)
    assert facts["cut"] == "33% 33"
    assert facts["wide"] == "0"


def hostile(folder: Path) -> Path:
    """A run folder whose every name and word tries to become markup."""
    run = folder / f"{EVIL.replace('/', '')}run"
    run.mkdir(parents=True)
    row = {"step": 1, "loss": 1.0, f"loss_{EVIL}": 0.5, "tiles_per_s": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    cities = {EVIL: {"agl_r2": 0.1, "vflow_r2": 0.1, "r2": 0.1}}
    validation = {"step": 1, "weights": EVIL, "r2": 0.1, "cities": cities}
    (run / "validation.jsonl").write_text(json.dumps(validation) + "\n")
    (run / "recipe.yaml").write_text(f"note: {EVIL}\n")
    span = {"agl_r2": [0.0, 0.2], "vflow_r2": [0.0, 0.2], "r2": [0.0, 0.2]}
    intervals = {
        "unit": EVIL,
        "rounds": EVIL,
        "level": 0.95,
        "groups": {EVIL: 9},
        "r2": [0, 1],
        "cities": {EVIL: span},
    }
    score = {"cities": {EVIL: cities[EVIL] | {"images": EVIL_COUNT}}, "r2": 0.1, "cities_missing": [EVIL]}
    (run / "score.json").write_text(json.dumps(score | {"intervals": intervals}))
    return run


EVIL = '</title></pre><script>document.title="hit"</script>"><img src=x onerror=document.title="hit">'
EVIL_COUNT = 3


def test_names_stay_words(tmp_path: Path) -> None:
    run = hostile(tmp_path)
    assert cli.main(["report", "--run", str(run), "--score", str(run / "score.json")]) == 0
    text = read_page(run / "report.html")
    assert "<img src=x" not in text
    assert "<script>document" not in text
    assert text.count("&lt;img src=x onerror=document.title=") >= 10
    # Formulas are not wanted either: matplotlib would refuse this one.
    assert "$\\frac" in figures.chart(
        [figures.Line("$\\frac$", [1, 2], [1, 2]), figures.Line("b", [1, 2], [1, 2])],
        title="$\\frac$", x_label="$\\frac$", y_label="",
    ).svg()  # fmt: skip


def test_file_names_stay_words(dataset: Path, tmp_path: Path) -> None:
    """Names that no shard could hold are problems of the data set, told as they are."""
    folder, out = tmp_path / "d", tmp_path / "e.html"
    shutil.copytree(dataset / "truth", folder)
    name = "<img src=x onerror=document.title=1>"
    shutil.copy(folder / "JAX_a_RGB.tif", folder / f"{name}_RGB.tif")
    assert cli.main(["explore", "--source", str(folder), "--out", str(out), "--workers", "1"]) == 1
    text = read_page(out)
    assert "<img src=x" not in text
    assert "&lt;img src=x onerror=document.title=1&gt;" in text


@pytest.mark.slow
def test_a_browser_runs_nothing_that_names_smuggle_in(tmp_path: Path) -> None:
    """Not even where escaping is forgotten: the page allows its own scripts only."""
    run = hostile(tmp_path)
    assert cli.main(["report", "--run", str(run), "--score", str(run / "score.json")]) == 0
    out = tmp_path / "forgotten.html"
    out.write_text((run / "report.html").read_text().replace("<h2>Training</h2>", EVIL + "<h2>Training</h2>"))
    shown = browser.dump(out.as_uri(), tmp_path)
    assert "<h2>Training</h2>" in shown
    assert "<title>hit" not in shown


def test_losses_that_were_not_finite_are_passed_over() -> None:
    """A skipped step's line says null."""
    rows = [{"step": 1, "loss": 1.25}, {"step": 2, "loss": None, "loss_agl": None, "grad_norm": None}]
    assert "last loss 1.25" in run_page.summary(rows, [])
    assert "last loss unknown" in run_page.summary(rows[1:], [])
    assert "Training loss" in [plot.title for plot in run_page.curves(rows, [])]


def test_arrows_of_any_length_can_be_drawn() -> None:
    """An untrained network may predict a scale of millions; the picture shows that the arrow leaves it."""
    rgb, agl_m = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.float32)
    agl_m[20:30, 20:30] = 50
    for scale in (1.0, 1e6, 1e12, 1e30):
        picture, factor = pictures.with_arrows(rgb, agl_m, [(Pose(1.0, scale), agl_m, (255, 0, 0))], side=128)
        assert picture.shape == (128, 128, 3)
        assert factor >= 1
        assert (picture == (255, 0, 0)).all(-1).any()
