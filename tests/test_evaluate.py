"""The scorer: the public numbers, no dependence on order or processes, and nothing scored that should not be."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile

from geopose_dist import cli
from geopose_dist.errors import FoundProblems, UserError
from geopose_dist.evaluate import predictions as files
from geopose_dist.evaluate import score
from geopose_dist.evaluate.evaluate import gather
from geopose_dist.evaluate.moments import Moments, tile_moments
from geopose_dist.kernels import scoring as score_kernel

SCORING = Path(__file__).parents[1] / ".." / "shared" / "conformance" / "scoring"
PUBLIC_NAMES = {  # where the public scorer's name differs from ours
    "mean_angle_error": "mean_angle_error_deg",
    "rms_angle_error": "rms_angle_error_deg",
    "mean_epe_error": "mean_epe",
    "rms_epe_error": "rms_epe",
}


@pytest.fixture
def scoring(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions and truth of the conformance set, to be spoilt."""
    if not SCORING.is_dir():
        pytest.skip("the recorded predictions of ../shared/conformance/scoring are not here")
    shutil.copytree(SCORING / "pred", tmp_path / "pred")
    shutil.copytree(SCORING / "truth", tmp_path / "truth")
    return tmp_path / "pred", tmp_path / "truth"


@pytest.mark.parametrize("workers", [1, 2])
def test_the_public_scorers_numbers(scoring: tuple[Path, Path], workers: int) -> None:
    ours = score(*scoring, workers=workers)
    expected = json.loads((SCORING / "expected.json").read_text())
    assert ours["r2"] == pytest.approx(expected.pop("FINAL")["r2"], abs=1e-5)
    assert ours["cities_missing"] == []
    assert set(ours["cities"]) == set(expected)
    for city, facts in expected.items():
        for name, value in facts.items():
            assert ours["cities"][city][PUBLIC_NAMES.get(name, name)] == pytest.approx(value, abs=1e-5), name


def test_order_splits_and_rank_arrays_change_no_bit(scoring: tuple[Path, Path]) -> None:
    moments = gather(*scoring)
    scores = moments.scores()
    shuffled = [moments.tiles[i] for i in np.random.default_rng(0).permutation(len(moments.tiles))]
    assert Moments(shuffled).scores() == scores
    cities = ["OMA", "JAX", "ATL", "ARG"]
    halves = [Moments(shuffled[::2]).to_array(cities), Moments(shuffled[1::2]).to_array(cities)]
    padding = np.full((3, halves[0].shape[1]), -1.0)
    parts = [Moments.from_array(part, cities) for part in (np.vstack([halves[1], padding]), halves[0])]
    assert parts[0].merged(parts[1]).scores() == scores


def _plain_scores(
    tiles: list[tuple[np.ndarray, float, float, np.ndarray, float, float]],
) -> tuple[float, float]:
    """R2 of height and flow by the formulas as they stand in the challenge's text, all pixels at once."""
    p = np.concatenate([tile[0].ravel() for tile in tiles]).astype(np.float64)
    t = np.concatenate([tile[3].ravel() for tile in tiles]).astype(np.float64)
    known = np.isfinite(t)

    def flow(height: int, scale: int, angle: int) -> np.ndarray:
        pairs = [
            np.stack(
                [
                    tile[height] * tile[scale] * np.sin(tile[angle]),
                    tile[height] * tile[scale] * np.cos(tile[angle]),
                ]
            )
            for tile in tiles
        ]
        return np.concatenate([pair.reshape(2, -1) for pair in pairs], axis=1)[:, known]

    fp, ft = flow(0, 1, 2), flow(3, 4, 5)
    p, t = p[known], t[known]
    return (
        1 - ((t - p) ** 2).sum() / (((t - t.mean()) ** 2).sum() + 1e-4),
        1 - ((ft - fp) ** 2).sum() / (((ft - ft.mean()) ** 2).sum() + 1e-4),
    )


def test_float_tiles_of_any_shape_against_the_plain_formulas() -> None:
    rng = np.random.default_rng(3)
    tiles = []
    for rows, columns in ((130, 257), (1, 9), (64, 200)):
        true = rng.uniform(0, 60, (rows, columns))
        true[rng.random(true.shape) < 0.2] = np.nan
        pred = np.nan_to_num(true, nan=7.0) + rng.normal(0, 3, true.shape)
        tiles.append(
            (pred, rng.uniform(0.5, 1.5), rng.uniform(-9, 9), true, rng.uniform(0.5, 1.5), rng.uniform(0, 6))
        )
    facts = Moments([tile_moments("X", *tile) for tile in tiles]).scores()["cities"]["X"]
    agl_r2, vflow_r2 = _plain_scores(tiles)
    assert facts["agl_r2"] == pytest.approx(agl_r2, abs=1e-10)
    assert facts["vflow_r2"] == pytest.approx(vflow_r2, abs=1e-10)


def test_small_spread_on_tall_ground_keeps_its_digits() -> None:
    rng = np.random.default_rng(4)
    true = 8000.0 + rng.normal(0, 1e-3, (300, 300))
    pred = true + rng.normal(0, 2e-4, true.shape)
    facts = Moments([tile_moments("X", pred, 1.0, 0.5, true, 1.0, 0.5)]).scores()["cities"]["X"]
    want = 1 - ((pred - true) ** 2).sum() / (((true - true.mean()) ** 2).sum() + 1e-4)
    assert facts["agl_r2"] == pytest.approx(want, abs=1e-6)


def test_tiles_without_heights_or_pose() -> None:
    heights = np.arange(12.0).reshape(3, 4)
    no_pose = tile_moments("X", heights, 1.0, 0.0, heights, None, math.nan)
    no_height = tile_moments("X", heights, 1.0, 0.0, np.full((3, 4), np.nan), 1.0, math.pi)
    alone = Moments([no_pose]).scores()["cities"]["X"]
    assert alone["vflow_r2"] is None
    assert alone["r2"] == alone["agl_r2"] == 1.0
    both = Moments([no_pose, no_height]).scores()["cities"]["X"]
    assert both["mean_angle_error_deg"] == pytest.approx(180)
    assert (
        "Y"
        not in Moments([no_pose, tile_moments("Y", heights, 1, 0, heights * np.nan, 1, 0)]).scores()["cities"]
    )


def _spoil_heights(path: Path, change) -> None:
    tifffile.imwrite(path, change(tifffile.imread(path)))


def _with_unknown(heights: np.ndarray) -> np.ndarray:
    heights[5, 6] = 65535
    return heights


SPOILT = {
    "missing AGL": (lambda pred: (pred / "JAX_WmCBQn_AGL.tif").unlink(), "JAX_WmCBQn_AGL.tif"),
    "missing VFLOW": (lambda pred: (pred / "JAX_WmCBQn_VFLOW.json").unlink(), "JAX_WmCBQn_VFLOW.json"),
    "unknown heights": (
        lambda pred: _spoil_heights(pred / "OMA_ghyOLs_AGL.tif", _with_unknown),
        "1 pixels are 65535",
    ),
    "all unknown": (
        lambda pred: _spoil_heights(pred / "OMA_ghyOLs_AGL.tif", lambda h: np.full_like(h, 65535)),
        "OMA_ghyOLs_AGL.tif: 36864 pixels",
    ),
    "wrong size": (
        lambda pred: _spoil_heights(pred / "OMA_ghyOLs_AGL.tif", lambda h: h[:-1]),
        "size 191 x 192",
    ),
    "three channels": (
        lambda pred: _spoil_heights(pred / "OMA_ghyOLs_AGL.tif", lambda h: np.stack([h] * 3, -1)),
        "size 192 x 192 x 3",
    ),
    "float metres": (
        lambda pred: _spoil_heights(pred / "OMA_ghyOLs_AGL.tif", lambda h: h.astype(np.float32) / 100),
        "dtype float32",
    ),
    "float NaN": (
        lambda pred: _spoil_heights(
            pred / "OMA_ghyOLs_AGL.tif", lambda h: np.full(h.shape, np.nan, np.float32)
        ),
        "36864 pixels are NaN",
    ),
    "float infinity": (
        lambda pred: _spoil_heights(
            pred / "OMA_ghyOLs_AGL.tif", lambda h: np.full(h.shape, np.inf, np.float32)
        ),
        "36864 pixels are NaN or infinite",
    ),
    "uint8": (
        lambda pred: _spoil_heights(pred / "OMA_ghyOLs_AGL.tif", lambda h: h.astype(np.uint8)),
        "dtype uint8",
    ),
    "cut TIFF": (
        lambda pred: (pred / "OMA_ghyOLs_AGL.tif").write_bytes(
            (pred / "OMA_ghyOLs_AGL.tif").read_bytes()[:3000]
        ),
        "OMA_ghyOLs_AGL.tif: cannot be read",
    ),
    "no TIFF": (
        lambda pred: (pred / "OMA_ghyOLs_AGL.tif").write_bytes(b"hello"),
        "OMA_ghyOLs_AGL.tif: cannot be read",
    ),
    "NaN scale": (
        lambda pred: (pred / "ATL_YBCtlE_VFLOW.json").write_text('{"scale": NaN, "angle": 1}'),
        "ATL_YBCtlE_VFLOW.json: scale is nan",
    ),
    "negative scale": (
        lambda pred: (pred / "ATL_YBCtlE_VFLOW.json").write_text('{"scale": -0.01, "angle": 1}'),
        "ATL_YBCtlE_VFLOW.json: scale is -0.01",
    ),
    "px/m": (
        lambda pred: (pred / "ATL_YBCtlE_VFLOW.json").write_text('{"scale": 0.9, "angle": 1}'),
        "looks like px/m",
    ),
    "infinite angle": (
        lambda pred: (pred / "ATL_YBCtlE_VFLOW.json").write_text('{"scale": 0.01, "angle": Infinity}'),
        "angle is inf",
    ),
    "no number": (
        lambda pred: (pred / "ATL_YBCtlE_VFLOW.json").write_text('{"scale": "1", "angle": 1}'),
        "'1'",
    ),
    "cut JSON": (lambda pred: (pred / "ATL_YBCtlE_VFLOW.json").write_text('{"scale": 0.0'), "cannot be read"),
    "nested JSON": (
        lambda pred: (pred / "ATL_YBCtlE_VFLOW.json").write_text("[" * 100_000),
        "ATL_YBCtlE_VFLOW.json: cannot be read",
    ),
    "endless number": (
        lambda pred: (pred / "ATL_YBCtlE_VFLOW.json").write_text('{"scale": 1' + "0" * 400 + ', "angle": 1}'),
        "too large a number",
    ),
    "extra tile": (
        lambda pred: shutil.copy(pred / "ATL_YBCtlE_VFLOW.json", pred / "ATL_zzzzzz_VFLOW.json"),
        "ATL_zzzzzz_VFLOW.json: no such tile in the truth",
    ),
    "extra file": (lambda pred: (pred / "notes.txt").write_text("x"), "notes.txt: not a prediction's"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_must_not_be_scored_is_refused_by_name(scoring: tuple[Path, Path], name: str) -> None:
    spoil, sentence = SPOILT[name]
    spoil(scoring[0])
    with pytest.raises(FoundProblems) as caught:
        score(*scoring)
    assert len(caught.value.problems) <= 2
    assert sentence in str(caught.value)


def test_everything_wrong_is_named_at_once_and_nothing_is_printed(
    scoring: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pred, truth = scoring
    (pred / "JAX_WmCBQn_AGL.tif").unlink()
    _spoil_heights(pred / "OMA_ghyOLs_AGL.tif", _with_unknown)
    (truth / "ARG_tYuoJS_VFLOW.json").unlink()
    out = tmp_path / "score.json"
    code = cli.main(["evaluate", "--predictions", str(pred), "--truth", str(truth), "--json", str(out)])
    told = capsys.readouterr()
    assert code == 2
    assert told.out == ""
    assert not out.exists()
    for name in (
        "JAX_WmCBQn_AGL.tif: missing",
        "OMA_ghyOLs_AGL.tif: 1 pixels",
        "ARG_tYuoJS_VFLOW.json: missing",
    ):
        assert name in told.err


def test_dot_files_are_no_predictions_and_images_beside_the_truth_are_ignored(
    scoring: tuple[Path, Path],
) -> None:
    pred, truth = scoring
    before = score(pred, truth)
    (pred / ".geopose").mkdir()
    (pred / ".DS_Store").write_bytes(b"")
    (truth / "JAX_WmCBQn_RGB.j2k").write_bytes(b"an image")
    assert score(pred, truth) == before


def test_a_missing_city_is_told(
    scoring: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pred, truth = scoring
    for path in [*pred.glob("OMA_*"), *truth.glob("OMA_*")]:
        path.unlink()
    out = tmp_path / "score.json"
    assert cli.main(["evaluate", "--predictions", str(pred), "--truth", str(truth), "--json", str(out)]) == 0
    scores = json.loads(out.read_text())
    assert scores["cities_missing"] == ["OMA"]
    assert scores["r2"] == pytest.approx(np.mean([scores["cities"][c]["r2"] for c in ("ARG", "ATL", "JAX")]))
    printed = capsys.readouterr().out
    assert "the mean of ARG, ATL, JAX" in printed
    assert "not covered: OMA" in printed


def test_truth_in_float_metres_scores_the_same(scoring: tuple[Path, Path]) -> None:
    pred, truth = scoring
    before = score(pred, truth)
    for path in truth.glob("*_AGL.tif"):
        heights = tifffile.imread(path)
        tifffile.imwrite(path, np.where(heights == 65535, np.nan, heights / 100).astype(np.float32))
    for path in truth.glob("*.json"):
        facts = json.loads(path.read_text())
        path.write_text(json.dumps(dict(facts, scale=facts["scale"] * 100)))
    after = score(pred, truth)
    assert after["r2"] == pytest.approx(before["r2"], abs=1e-6)


def test_the_table_holds_every_tile(scoring: tuple[Path, Path], tmp_path: Path) -> None:
    pred, truth = scoring
    table = tmp_path / "tiles.csv"
    words = ["--predictions", str(pred), "--truth", str(truth), "--table", str(table)]
    assert cli.main(["evaluate", *words]) == 0
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == 10
    scores = score(pred, truth)["cities"]["JAX"]
    errors = [float(row["mean_agl_error"]) for row in rows if row["city"] == "JAX"]
    assert np.mean(errors) == pytest.approx(scores["mean_agl_error"])
    assert rows[0]["key"] == "ARG_oRnvHC"


@pytest.mark.parametrize("kind", [">u2", "<u2"])
def test_byte_order_of_a_file_changes_nothing(scoring: tuple[Path, Path], kind: str) -> None:
    pred, truth = scoring
    before = score(pred, truth)
    for path in [*pred.glob("*.tif"), *truth.glob("*.tif")]:
        tifffile.imwrite(path, tifffile.imread(path), byteorder=kind[0])  # type: ignore[arg-type]
    assert score(pred, truth) == before


def test_a_city_without_any_known_height_is_no_perfect_score(scoring: tuple[Path, Path]) -> None:
    pred, truth = scoring
    for path in truth.glob("ATL_*_AGL.tif"):
        _spoil_heights(path, lambda heights: np.full_like(heights, 65535))
    with pytest.raises(FoundProblems, match="no tile of ATL has a known height"):
        score(pred, truth)


def test_no_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        score(tmp_path / "nothing", tmp_path)
    with pytest.raises(UserError, match=r"no KEY_AGL.tif"):
        score(tmp_path, tmp_path)


def test_the_kernel_sums_what_numpy_sums() -> None:
    rng = np.random.default_rng(7)
    metres = rng.uniform(-2, 80, (61, 83))
    metres[rng.random(metres.shape) < 0.1] = np.nan
    kinds = {np.uint16: 0.01, np.float32: 1.0, np.float64: 1.0}
    for p_kind, p_unit in kinds.items():
        predicted = (rng.uniform(0, 80, metres.shape) / p_unit).astype(p_kind)
        for t_kind, t_unit in kinds.items():
            true = np.where(np.isnan(metres), 65535, np.nan_to_num(metres).clip(0) / t_unit).astype(t_kind)
            if t_kind is not np.uint16:
                true[np.isnan(metres)] = np.nan
            given = (predicted, true[::-1], p_unit, t_unit, 0.8, 0.9, 0.3, 11.0)
            np.testing.assert_allclose(
                score_kernel.pixel_sums(*given), score_kernel.pixel_sums_slow(*given), rtol=1e-10
            )
    with pytest.raises(ValueError, match="must agree"):
        score_kernel.pixel_sums(metres, metres[1:], 1, 1, 1, 1, 0, 0)
    with pytest.raises(ValueError, match="int64"):
        score_kernel.pixel_sums(metres, np.zeros(metres.shape, np.int64), 1, 1, 1, 1, 0, 0)


def test_heights_in_centimetres_are_clipped_and_counted() -> None:
    agl_m = np.array([[-1, 0.004, 0.006, 655.34, 655.36]], np.float32)
    heights, clipped = files.heights_cm(agl_m)
    assert heights.tolist() == [[0, 0, 1, 65534, 65534]]
    assert clipped == 2
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match="1 NaN or infinite"):
            files.heights_cm(np.array([[0, wrong]], np.float32))


def test_written_heights_come_back_and_angles_stay_in_range(tmp_path: Path) -> None:
    heights = np.random.default_rng(0).integers(0, 65535, (130, 67)).astype(np.uint16)
    path = tmp_path / "X_a_AGL.tif"
    path.write_bytes(files.encode_agl(heights))
    np.testing.assert_array_equal(files.read_tiff(path), heights)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages[0].compression == 8
        assert tiff.pages[0].predictor == 2
    for angle in (0.0, -1e-18, 2 * math.pi, 6.283185307179586, 6.28318530999, -3.0, 100.0):
        told = json.loads(files.encode_vflow(0.9, angle))
        assert 0 <= told["angle"] < 2 * math.pi
        assert math.cos(told["angle"] - angle) == pytest.approx(1)
        assert told["scale"] == 0.009
