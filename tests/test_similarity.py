"""Views of one place found by their looks: all of them, no others, the same again; ranks of heights."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from geopose_dist import cli
from geopose_dist.bench import cases_similarity, cases_transfer
from geopose_dist.bench.recipe import BenchData, BenchRecipe
from geopose_dist.errors import UserError
from shards import similarity, similarity_features
from shards.layouts import Tile
from shards.similarity_recipe import SimilarityRecipe

SIDE = 256
RECIPE = SimilarityRecipe(keypoints=320, workers=1)


def ground(place: int) -> np.ndarray:
    """Blocks, paths and spots that no other place has, [H, W, 3], with room around the views."""
    rng = np.random.Generator(np.random.Philox(key=[place, 1]))
    side = 2 * SIDE
    image = cv2.resize(rng.uniform(60, 190, (16, 16, 3)).astype(np.float32), (side, side))
    for _ in range(220):
        corner, size = rng.integers(0, side, 2), rng.integers(4, 30, 2)
        cv2.rectangle(image, corner.tolist(), (corner + size).tolist(), rng.uniform(20, 235, 3).tolist(), -1)
    return image


def view(image: np.ndarray, number: int) -> np.ndarray:
    """The middle of the ground, turned, zoomed and moved a little, in other light."""
    rng = np.random.Generator(np.random.Philox(key=[number, 2]))
    matrix = cv2.getRotationMatrix2D((SIDE, SIDE), rng.uniform(-5, 5), rng.uniform(0.85, 1.2))
    matrix[:, 2] += rng.uniform(-20, 20, 2) - SIDE / 2
    seen = cv2.warpAffine(image, matrix, (SIDE, SIDE)) / 255
    haze = rng.uniform(0, 0.5)
    seen = seen ** rng.uniform(0.7, 1.4) * (1 - haze) + 0.8 * haze + rng.normal(0, 0.015, seen.shape)
    return np.rint(np.clip(seen, 0, 1) * 255).astype(np.uint8)


def make_views(folder: Path, places: int = 5, views: int = 3) -> list[Tile]:
    """Tiles of known places, views of one place far apart in the order of names."""
    folder.mkdir()
    return [
        cases_similarity.written(
            folder, f"OMA_v{number}p{place}", f"p{place}", view(ground(place), 10 * place + number)
        )
        for place in range(places)
        for number in range(views)
    ]


def found_places(found: similarity.Found) -> set[frozenset[str]]:
    groups: dict[str, set[str]] = {}
    for key, group in found.groups.items():
        groups.setdefault(group, set()).add(key)
    return {frozenset(keys) for keys in groups.values()}


@pytest.fixture(autouse=True)
def few_mirrors(monkeypatch):
    monkeypatch.setattr(similarity, "MIRRORS", 5)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> list[Tile]:
    return make_views(tmp_path_factory.mktemp("similarity") / "tiles")


def test_views_of_a_place_are_found_and_strangers_are_not(tiles, tmp_path, monkeypatch, capsys):
    found = similarity.find_places(tiles, tmp_path / "features", RECIPE)
    places = {frozenset(tile.key for tile in tiles if tile.place == f"p{place}") for place in range(5)}
    assert found_places(found) == places
    assert max(found.chance) < found.threshold <= 9
    similarity.sum_up(found, tiles)
    assert "15 tiles show 5 places" in capsys.readouterr().err
    # A run that was killed goes on with the features that it has; the order of tiles changes nothing.
    monkeypatch.setattr(similarity, "features_of", lambda grey, keypoints: pytest.fail("made again"))
    assert similarity.find_places(tiles[::-1], tmp_path / "features", RECIPE).groups == found.groups


def test_kept_features_of_another_image_are_made_again(tiles, tmp_path):
    tile = Tile("OMA_x", "OMA", tmp_path / "OMA_x_RGB.png")
    for source in tiles[0], tiles[-1]:
        tile.rgb.write_bytes(source.rgb.read_bytes())
        similarity.find_places([tile], tmp_path / "features", RECIPE)
    assert len([path for path in (tmp_path / "features").iterdir() if ".mirror" not in path.name]) == 2


def test_a_blank_tile_stands_alone_and_is_named(tiles, tmp_path, capsys):
    blank = cases_similarity.written(tmp_path, "OMA_blank", "?", np.full((SIDE, SIDE, 3), 200, np.uint8))
    found = similarity.find_places([*tiles[:3], blank], tmp_path / "features", RECIPE)
    assert found_places(found) == {frozenset({"OMA_blank"}), frozenset(tile.key for tile in tiles[:3])}
    similarity.sum_up(found, [*tiles[:3], blank])
    assert "1 tiles have hardly any features (cloud, or blank)" in capsys.readouterr().err


def test_the_mirror_image_of_a_place_is_another_place(tiles):
    grey = similarity_features.small_grey(tiles[0])
    whole, turned, again = (
        similarity_features.features_of(np.ascontiguousarray(image), 320)
        for image in (grey, grey[:, ::-1], similarity_features.small_grey(tiles[1]))
    )
    assert similarity_features.matched(whole, again) > 30
    assert similarity_features.matched(turned, again) < similarity.LEAST_MATCHES
    nothing = similarity_features.features_of(np.zeros((64, 64), np.uint8), 320)
    assert similarity_features.matched(whole, nothing) == 0


@pytest.mark.parametrize(
    ("across", "can_be"),
    [
        ([[1, 0], [0, 1]], True),
        ([[0.7, 0.05], [-0.05, 1.2]], True),
        ([[-1, 0], [0, 1]], False),  # mirrored
        ([[0.5, 0], [0, 1]], False),  # squeezed more than any sensor looks down
        ([[0, -1], [1, 0]], False),  # a quarter turn
        ([[np.nan, 0], [0, 1]], False),
    ],
)
def test_maps_that_views_can_have(across, can_be):
    assert similarity_features.plausible(np.column_stack([across, [30.0, -200.0]])) is can_be


def test_the_threshold_lies_just_above_chance():
    assert similarity.threshold_above([]) == similarity.LEAST_MATCHES
    assert similarity.threshold_above([0] * 100 + [3]) == similarity.LEAST_MATCHES
    assert similarity.threshold_above([0] * 1000 + [11]) == 12
    # One mirrored pair in thousands that is alike by accident must not hide views.
    assert similarity.threshold_above([4] * 4000 + [60]) == similarity.LEAST_MATCHES


def test_the_shortlist_is_the_nearest_and_leaves_out_itself():
    rng = np.random.Generator(np.random.Philox(3))
    vectors = rng.normal(size=(300, 8)).astype(np.float16)
    lists = list(similarity.nearest(vectors, vectors, 5, apart=True))
    exact = vectors.astype(np.float32) @ vectors.astype(np.float32).T
    np.fill_diagonal(exact, -np.inf)
    for row, order in enumerate(lists):
        assert row not in order
        assert exact[row, order].min() >= np.sort(exact[row])[-5] - 1e-4


def test_groups_join_whatever_the_order():
    one, other = similarity.Groups(6), similarity.Groups(6)
    pairs = [(0, 1), (4, 5), (1, 4), (2, 3)]
    for pair in pairs:
        one.join(*pair)
    for a, b in pairs[::-1]:
        other.join(b, a)
    assert [one.of(k) for k in range(6)] == [other.of(k) for k in range(6)] == [0, 0, 2, 2, 0, 0]
    assert one.size(5) == 4


def test_split_by_similarity_writes_groups_that_it_takes_again(tiles, tmp_path, capsys):
    folder = tiles[0].rgb.parent
    for tile in tiles:
        (folder / f"{tile.key}_VFLOW.json").write_text('{"scale": 0.01, "angle": 1.0}')
    words = ["split", "--source", str(folder), "--similarity.workers", "1", "--similarity.keypoints", "320"]
    assert cli.main([*words, "--by", "similarity", "--out", str(tmp_path / "a.json")]) == 0
    assert "a.groups.json: 5 places of 15 tiles" in capsys.readouterr().out
    assert not (tmp_path / ".a.features").exists()
    words[-4:] = []
    groups = tmp_path / "a.groups.json"
    assert cli.main([*words, "--by", str(groups), "--out", str(tmp_path / "b.json")]) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    sets = json.loads((tmp_path / "a.json").read_text())
    place = {tile.key: tile.place for tile in tiles}
    assert sets["val"]
    assert not {place[key] for key in sets["train"]} & {place[key] for key in sets["val"]}


@pytest.mark.slow
def test_the_bench_case_finds_rendered_places(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["synth", "--out", "t", "--places", "4", "--views", "3", "--size", "320", "--test-places", "0"]
    assert cli.main(words) == 0
    assert cli.main(["bench", "similarity", "--data.tiles", "t", "--json", "s.json"]) == 0
    rows = json.loads(Path("s.json").read_text())["results"]
    # Of errors, joined places are the harmless kind; all four joined would be a precision of .18.
    assert rows[0]["recall"] == 1
    assert all(row["precision"] > 0.4 for row in rows)
    assert rows[1]["recall"] > 0.2
    capsys.readouterr()


def test_rank_correlation_is_spearmans():
    rng = np.random.Generator(np.random.Philox(8))
    true = rng.integers(0, 30, (40, 50)).astype(np.float32)
    guess = true**3 + rng.normal(0, 3000, true.shape).astype(np.float32)
    true[:5] = np.nan
    known = np.isfinite(true)

    def mean_ranks(values):
        return np.array([(values < one).sum() + ((values == one).sum() - 1) / 2 for one in values])

    exact = np.corrcoef(mean_ranks(guess[known]), mean_ranks(true[known]))[0, 1]
    facts = cases_transfer.interval([cases_transfer.block_sums(guess, true)])
    assert facts["rho"] == pytest.approx(exact, abs=1e-9)
    assert facts["low"] < exact < facts["high"]
    strangers = cases_transfer.interval(
        [cases_transfer.block_sums(rng.normal(size=true.shape).astype(np.float32), true)]
    )
    assert strangers["low"] < 0 < strangers["high"]


def test_transfer_wants_pictures(tmp_path):
    asked = BenchRecipe()
    with pytest.raises(UserError, match=r"--data\.pictures, a folder of orthophotos"):
        cases_transfer.transfer(asked)
    asked = BenchRecipe(data=BenchData(checkpoint="x", pictures=str(tmp_path / "absent")))
    with pytest.raises(UserError, match="absent: no such folder"):
        cases_transfer.transfer(asked)
