"""Confidence intervals, errors by height, and the table of tiles."""

import csv
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import tifffile

from geopose_dist import cli
from geopose_dist.evaluate import bins, intervals
from geopose_dist.evaluate.intervals import Groups
from geopose_dist.evaluate.moments import Moments, tile_moments

PLACES = 12
VIEWS = 4


def moments_of(seed: int = 0, cities: tuple[str, ...] = ("JAX", "OMA")) -> Moments:
    """Tiles of places whose error is the place's own: views of one place tell the same thing again."""
    rng = np.random.default_rng(seed)
    moments = Moments()
    for city in cities:
        for place in range(PLACES):
            true = rng.gamma(1.0, 8.0, (16, 16))
            bias = rng.normal(0, 4)
            for view in range(VIEWS):
                noise = rng.normal(0, 0.5, true.shape)
                found = tile_moments(city, true + bias + noise, 0.9, 1.0, true, 1.0, 1.1)
                moments.add(dataclasses.replace(found, key=f"{city}_{place:02d}{view}"))
    return moments


def places_of(moments: Moments) -> Groups:
    return Groups("places", {tile.key: tile.key[:-1] for tile in moments.tiles})


def test_weights_of_one_give_the_score_itself() -> None:
    moments = moments_of()
    scores = moments.scores()["cities"]
    for city in ("JAX", "OMA"):
        tiles = [tile for tile in moments.tiles if tile.city == city]
        found = intervals._scores(np.ones((1, len(tiles))), tiles)
        for name in ("agl_r2", "vflow_r2", "r2"):
            assert found[name][0] == pytest.approx(scores[city][name], abs=1e-12)


def test_a_round_is_the_score_of_the_tiles_it_drew() -> None:
    tiles = moments_of(cities=("JAX",)).tiles
    weights = np.random.default_rng(1).integers(0, 4, (5, len(tiles)))
    found = intervals._scores(weights.astype(float), tiles)
    for number, row in enumerate(weights):
        drawn = Moments([tile for tile, count in zip(tiles, row, strict=True) for _ in range(count)])
        scores = drawn.scores()["cities"]["JAX"]
        for name in ("agl_r2", "vflow_r2", "r2"):
            assert found[name][number] == pytest.approx(scores[name], abs=1e-9)


def test_the_interval_holds_the_score_and_places_make_it_wider_than_tiles() -> None:
    moments = moments_of()
    by_place = intervals.bootstrap(moments, places_of(moments))
    by_tile = intervals.bootstrap(moments, Groups("tiles", {}))
    low, high = by_place["r2"]
    assert low < moments.scores()["r2"] < high
    assert by_place["groups"] == {"JAX": PLACES, "OMA": PLACES}
    assert by_tile["groups"] == {"JAX": PLACES * VIEWS, "OMA": PLACES * VIEWS}
    # Four views of a place that say the same are one observation: about twice the width.
    assert (high - low) / (by_tile["r2"][1] - by_tile["r2"][0]) > 1.4


def test_the_interval_covers_as_often_as_it_says() -> None:
    """The score of many more places of the same kind lies in the interval about as often as its level."""
    truth = np.mean([moments_of(seed).scores()["r2"] for seed in range(100, 160)])
    inside = 0
    for seed in range(60):
        moments = moments_of(seed)
        low, high = intervals.bootstrap(moments, places_of(moments), rounds=200)["r2"]
        inside += low <= truth <= high
    assert 45 <= inside <= 60  # nominal 57; percentile intervals of twelve groups are a little short


def test_order_changes_nothing_and_the_seed_does() -> None:
    moments = moments_of()
    groups = places_of(moments)
    found = intervals.bootstrap(moments, groups)
    assert intervals.bootstrap(Moments(moments.tiles[::-1]), groups) == found
    assert intervals.bootstrap(moments, groups, seed=1)["r2"] != found["r2"]


def test_few_groups_get_no_interval_and_are_named() -> None:
    moments = moments_of()
    few = Groups("clusters", {tile.key: f"{tile.city}{int(tile.key[4:6]) % 3}" for tile in moments.tiles})
    found = intervals.bootstrap(moments, few)
    assert found["r2"] is None
    assert found["cities"] == {"JAX": None, "OMA": None}
    assert "fewer than 5 clusters in a city (JAX 3, OMA 3)" in intervals.in_words(found, 0.5)


def test_a_city_without_poses_has_no_flow() -> None:
    tiles = []
    for number in range(8):
        true = np.full((4, 4), float(number))
        tile = tile_moments("JAX", true + 1, 1.0, 0.0, true, None, None)
        tiles.append(dataclasses.replace(tile, key=str(number)))
    city = intervals.bootstrap(Moments(tiles), Groups("tiles", {}))["cities"]["JAX"]
    assert set(city) == {"agl_r2", "r2"}


@pytest.mark.parametrize("kind", ["centimetres", "metres"])
def test_bins_are_what_numpy_says(kind: str) -> None:
    rng = np.random.default_rng(3)
    true_cm = rng.integers(0, 15000, (40, 50)).astype(np.uint16)
    true_cm[0, :4] = 300, 600, 599, 100
    predicted = rng.integers(0, 15000, true_cm.shape).astype(np.uint16)
    unknown = rng.random(true_cm.shape) < 0.1
    true: Any = np.where(unknown, 65535, true_cm).astype(np.uint16)
    unit = 0.01
    if kind == "metres":
        true, unit = np.where(unknown, np.nan, true_cm / np.float32(100)).astype(np.float32), 1.0
    found = bins.tile_bins(predicted, true, 0.01, unit)
    edges = [*bins.EDGES_M, np.inf]
    heights, error = true_cm / 100, predicted / 100 - true_cm / 100
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = ~unknown & (heights >= low) & (heights < high)
        wanted = [inside.sum(), error[inside].sum(), np.abs(error[inside]).sum(), (error[inside] ** 2).sum()]
        assert found[number] == pytest.approx(wanted, rel=1e-5)


def test_bins_add_up_over_tiles_and_empty_ones_have_no_errors() -> None:
    low = bins.tile_bins(np.full((2, 2), 3.0), np.full((2, 2), 2.0), 1, 1)
    rows = bins.summary([low, low])
    assert [row["height_m"] for row in rows] == bins.names()
    assert rows[1] == {
        "height_m": "1 to 3", "pixels": 8, "share": 1.0, "bias_m": 1.0, "mean_error_m": 1.0, "rms_error_m": 1.0
    }  # fmt: skip
    assert rows[0]["mean_error_m"] is None


def write_folders(folder: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(5)
    truth, pred = folder / "data" / "test_truth", folder / "pred"
    truth.mkdir(parents=True)
    pred.mkdir()
    lines = ["id,place"]
    for number in range(12):
        key = f"JAX_{number:06d}"
        heights = rng.integers(0, 4000, (24, 24)).astype(np.uint16)
        tifffile.imwrite(truth / f"{key}_AGL.tif", heights)
        tifffile.imwrite(pred / f"{key}_AGL.tif", heights // 2)
        for where in (truth, pred):
            (where / f"{key}_VFLOW.json").write_text(json.dumps({"scale": 0.01, "angle": 1.0}))
        lines.append(f"{number:06d},place{number // 2}")
    (folder / "data" / "places.csv").write_text("\n".join(lines) + "\n")
    return pred, truth


def test_evaluate_tells_intervals_bins_and_the_same_table_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pred, truth = write_folders(tmp_path)
    words = [
        "evaluate",
        "--predictions",
        str(pred),
        "--truth",
        str(truth),
        "--json",
        str(tmp_path / "s.json"),
    ]
    assert cli.main([*words, "--height-bins", "--table", str(tmp_path / "t.csv")]) == 0
    assert "bootstrap over 6 places" in (printed := capsys.readouterr().out)
    assert "25 to 50" in printed
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["intervals"]["unit"] == "places"
    assert sum(row["pixels"] for row in scores["height_bins"]) == 12 * 24 * 24
    assert cli.main([*words, "--intervals", "0", "--table", str(tmp_path / "t.parquet")]) == 0
    assert "bootstrap" not in capsys.readouterr().out
    rows = pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pylist()
    told = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [{name: str(value) for name, value in row.items()} for row in rows] == told
    assert "intervals" not in json.loads((tmp_path / "s.json").read_text())


def test_groups_by_name_and_their_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pred, truth = write_folders(tmp_path)
    groups = tmp_path / "clusters.json"
    groups.write_text(json.dumps({str(n): [f"JAX_{2 * n:06d}", f"JAX_{2 * n + 1:06d}"] for n in range(6)}))
    words = ["evaluate", "--predictions", str(pred), "--truth", str(truth)]
    assert cli.main([*words, "--groups", str(groups)]) == 0
    assert "bootstrap over 6 clusters" in capsys.readouterr().out
    groups.write_text("[1")
    assert cli.main([*words, "--groups", str(groups)]) == 2
    assert "clusters.json: damaged or cut short" in capsys.readouterr().err
    assert cli.main([*words, "--table", "tiles.xlsx"]) == 2
    assert "wanted a file that ends in .csv or .parquet" in capsys.readouterr().err
