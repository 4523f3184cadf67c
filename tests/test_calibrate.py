"""Height calibration: what is fitted, what it brings on places it has not seen, and that it stays with its weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from tiles import make_dataset

from geopose_dist import cli
from geopose_dist.errors import UserError
from geopose_dist.infer import calibration
from geopose_dist.infer.calibration import Calibration, curve, pooled
from geopose_dist.infer.fitting import (
    TileSums,
    corrections_of,
    fit_curve,
    fit_factors,
    heights_of_bins,
    out_of_fold,
    scores,
    tile_sums,
)
from geopose_dist.model.recipe import ModelRecipe
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.model.weights import save_weights


def test_pooled_is_the_nearest_growing_sequence(rng: np.random.Generator) -> None:
    np.testing.assert_allclose(pooled(np.array([1.0, 3, 2, 4]), np.ones(4)), [1, 2.5, 2.5, 4])
    np.testing.assert_allclose(pooled(np.array([4.0, 1.0]), np.array([1.0, 3.0])), [1.75, 1.75])
    values, weights = rng.normal(size=60), rng.uniform(0.1, 2, 60)
    best = pooled(values, weights)
    assert (np.diff(best) >= 0).all()
    assert (best * weights).sum() == pytest.approx((values * weights).sum())
    error = ((best - values) ** 2 * weights).sum()
    for _ in range(300):  # no other growing sequence is nearer
        other = np.sort(best + rng.normal(0, 0.05, 60))
        assert ((other - values) ** 2 * weights).sum() >= error - 1e-12


def tiles_where(
    predicted: object, rng: np.random.Generator, count: int = 12, noise_m: float = 0.5, cities: str = "AB"
) -> list[TileSums]:
    """Tiles of 40 x 40 pixels whose heights are predicted as `predicted(true, city)` plus noise."""
    found = []
    for i in range(count):
        city = cities[i % len(cities)]
        true = np.where(rng.random((40, 40)) < 0.5, rng.uniform(0, 30, (40, 40)), 0).astype(np.float32)
        guess = np.clip(predicted(true, city) + rng.normal(0, noise_m, true.shape), 0, None)  # type: ignore[operator]
        true[:2] = np.nan
        direction = (0.6, 0.8)
        pose = {"scale": 0.7, "true_scale": 0.7, "direction": direction, "true_direction": direction}
        found.append(tile_sums(guess.astype(np.float32), true, city, f"place-{i // 2}", **pose))
    return found


def test_factors_undo_under_prediction_by_city_and_the_gain_is_out_of_fold(rng: np.random.Generator) -> None:
    tiles = tiles_where(lambda true, city: true * (0.8 if city == "A" else 0.9), rng, noise_m=0.2)
    factors = fit_factors(tiles)
    assert factors["A"] == pytest.approx(1.25, rel=0.01)
    assert factors["B"] == pytest.approx(1.11, rel=0.01)
    assert factors["B"] < factors["*"] < factors["A"]
    honest = out_of_fold(tiles, 3)
    assert honest["factor"]["r2"] > honest["none"]["r2"] + 0.02
    assert honest["factor"]["agl_r2"] > 0.99
    assert honest["none"]["agl_r2"] < 0.98


def test_a_curve_undoes_what_no_factor_can(rng: np.random.Generator) -> None:
    tiles = tiles_where(lambda true, city: 12 * np.log1p(true / 12), rng, noise_m=0.1)
    honest = out_of_fold(tiles, 4)
    assert honest["curve"]["r2"] > honest["factor"]["r2"] + 0.01 > honest["none"]["r2"]
    at, to = fit_curve(tiles)
    assert at == sorted(set(at))
    assert to == sorted(to)
    assert np.interp(12 * np.log(2), at, to) == pytest.approx(12, abs=0.5)


def test_what_does_not_help_is_not_said_to(rng: np.random.Generator) -> None:
    # One tile per place, each wrong in its own way: a factor fitted on few others only adds their errors.
    ways = iter(rng.choice([0.6, 1.4], 8))
    tiles = tiles_where(lambda true, city: true * next(ways), rng, count=8, cities="A")
    assert (
        scores(tiles, [corrections_of(tiles)["factor"]] * 8)["r2"]
        >= scores(tiles, [lambda heights, city: heights] * 8)["r2"]
    )  # on what it was fitted on, it always looks good
    honest = out_of_fold(tiles, 8)
    assert honest["factor"]["r2"] < honest["none"]["r2"] + 0.02
    with pytest.raises(UserError, match="tiles of 1 place"):
        out_of_fold(tiles_where(lambda true, city: true, rng, count=2), 3)


def test_sums_score_as_pixels_do(rng: np.random.Generator) -> None:
    true = rng.uniform(0, 20, (30, 30)).astype(np.float32)
    guess = (true + rng.normal(0, 1, true.shape)).clip(0).astype(np.float32)
    guess = (np.rint(guess * 10) / 10).astype(np.float32)  # as the bins are
    tile = tile_sums(
        guess, true, "A", "p", scale=0.5, true_scale=0.6, direction=(0.0, 1.0), true_direction=(0.6, 0.8)
    )
    found = scores([tile], [lambda heights, city: heights])
    flow, guessed = true[..., None] * 0.6 * [0.6, 0.8], guess[..., None] * 0.5 * [0.0, 1.0]
    agl = 1 - ((guess - true) ** 2).sum() / ((true - true.mean()) ** 2).sum()
    vflow = 1 - ((guessed - flow) ** 2).sum() / ((flow - flow.mean()) ** 2).sum()
    assert found["agl_r2"] == pytest.approx(agl, abs=1e-4)
    assert found["vflow_r2"] == pytest.approx(vflow, abs=1e-4)
    assert heights_of_bins()[37] == pytest.approx(3.7)


def test_a_curve_is_read_off_and_goes_on_in_proportion() -> None:
    heights = np.array([[0.0, 5.0, 10.0, 40.0]], np.float32)
    np.testing.assert_allclose(curve(heights, [0.0, 10.0, 20.0], [0.0, 12.0, 30.0]), [[0, 6, 12, 60]])


def network(path: Path) -> Path:
    recipe = ModelRecipe(encoder="tu-mobilenetv3_small_050", decoder_channels=[16, 16, 8, 8, 8])
    torch.manual_seed(0)
    save_weights(path, GeoposeNet(recipe).state_dict(), recipe, {"reduction": 1, "gsd_known": False})
    return path


def test_calibrate_then_predict(
    train_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = network(tmp_path / "net.safetensors")
    make_dataset(tmp_path / "tiles", 3)
    shutil.copytree(tmp_path / "tiles" / "train", tmp_path / "plain")
    words = ["--source", str(tmp_path / "plain"), "--checkpoint", str(weights), "--device", "cpu"]
    words += ["--dispatch", "inline", "--unit", "m"]

    def predict(out: str, *options: str) -> int:
        return cli.main(["predict", *words, "--out", str(tmp_path / out), *options])

    assert predict("early", "--calibration", "factor") == 2
    assert "has no calibration; fit one with `geopose calibrate" in capsys.readouterr().err
    assert cli.main(["calibrate", "--run", str(weights), "--device", "cpu"]) == 2
    assert "name them by --shards" in capsys.readouterr().err
    options = ["--shards", str(train_shards), "--split", "train", "--folds", "3", "--device", "cpu"]
    assert cli.main(["calibrate", "--run", str(weights), *options]) == 0
    said = capsys.readouterr().out
    assert "on places that it was not fitted on" in said
    fitted = json.loads((tmp_path / "net.calibration.json").read_text())
    assert fitted["facts"]["tiles"] == 10  # two of twelve know no height
    assert set(fitted["facts"]["out_of_fold"]) == {"none", "factor", "curve"}
    assert predict("plainly") == 0
    assert predict("factored", "--calibration", "factor") == 0
    assert predict("curved", "--calibration", "curve") == 0
    heights = {
        name: tifffile.imread(sorted((tmp_path / name).glob("*_AGL.tif"))[0])
        for name in ("plainly", "factored", "curved")
    }
    city = sorted((tmp_path / "plainly").glob("*_AGL.tif"))[0].name.partition("_")[0]
    factor = fitted["factors"][city]
    assert abs(factor - 1) > 0.01
    np.testing.assert_allclose(heights["factored"], heights["plainly"] * factor, rtol=1e-4, atol=1e-4)
    assert np.abs(heights["curved"] - heights["plainly"]).max() > 0.01
    capsys.readouterr()
    assert predict("factored", "--calibration", "curve") == 2
    assert "predictions there have other net" in capsys.readouterr().err


def test_a_calibration_belongs_to_its_weights(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    good = Calibration({"*": 1.1}, [0.0, 1.0], [0.0, 1.2], calibration.sha256(weights), {})
    path = calibration.save(weights, good)
    assert calibration.load(weights) == good
    text = path.read_text()
    for wrong in (
        text.replace("1.2", "-1.2"),
        text.replace('"*"', '"A"'),
        "{}",
        "[",
        text.replace("1.1", "1e999"),
    ):
        path.write_text(wrong)
        with pytest.raises(UserError, match="fit it again"):
            calibration.load(weights)
    path.write_text(text)
    weights.write_bytes(b"another")
    with pytest.raises(UserError, match="fitted for other weights"):
        calibration.load(weights)
