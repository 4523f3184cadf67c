"""Splitting: no place in two sets, every city validated where it can be, and sentences for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiles import make_dataset

from geopose_dist import cli
from geopose_dist.bench import cases_leak
from geopose_dist.errors import FoundProblems, UserError
from shards import layouts, pack_plan, split
from shards.layouts import Tile
from shards.split import SplitRecipe


def run_split(source, out, **options):
    split.run(SplitRecipe(source=str(source), out=str(out), **options))
    return json.loads(Path(out).read_text()) if Path(out).exists() else None


@st.composite
def datasets(draw):
    tiles, place_of = [], {}
    for city in draw(st.sampled_from([("JAX",), ("ARG", "OMA"), ("ARG", "ATL", "JAX", "OMA")])):
        for place, views in enumerate(draw(st.lists(st.integers(1, 12), min_size=1, max_size=9))):
            for view in range(views):
                key = f"{city}_{place}v{view}"
                tiles.append(Tile(key, city, Path("x")))
                place_of[key] = f"{city}{place}"
    return tiles, place_of


@given(datasets(), st.floats(0.05, 0.6), st.integers(0, 5))
def test_places_are_disjoint_and_every_city_is_in_both(dataset, share, seed):
    tiles, place_of = dataset
    val = split.choose_val(tiles, place_of, share, seed)
    for city in {tile.city for tile in tiles}:
        places = {place_of[tile.key] for tile in tiles if tile.city == city}
        if len(places) >= 2:
            assert val & places
        assert places - val
    assert val == split.choose_val(tiles[::-1], place_of, share, seed)


def test_the_share_is_kept():
    tiles = [Tile(f"ARG_{i:04d}", "ARG", Path("x")) for i in range(1000)]
    place_of = {tile.key: f"p{number // 25}" for number, tile in enumerate(tiles)}
    for seed in range(5):
        val = split.choose_val(tiles, place_of, 0.2, seed)
        assert len(val) == 8
    assert split.choose_val(tiles, place_of, 0.2, 1) != split.choose_val(tiles, place_of, 0.2, 2)


@given(datasets(), st.integers(2, 4))
def test_folds_cover_every_place_once(dataset, folds):
    tiles, place_of = dataset
    cities = {tile.city: {place_of[t.key] for t in tiles if t.city == tile.city} for tile in tiles}
    if min(len(places) for places in cities.values()) < folds:
        with pytest.raises(UserError, match="would be without it"):
            split.make_folds(tiles, place_of, folds, 0)
        return
    sets = split.make_folds(tiles, place_of, folds, 0)
    assert sorted(place for places in sets for place in places) == sorted(set(place_of.values()))
    for places in cities.values():
        assert all(fold & places for fold in sets)


def test_by_place(tmp_path, capsys):
    keys = make_dataset(tmp_path / "data", 16, test=4)
    found = run_split(tmp_path / "data", tmp_path / "split.json")
    assert sorted(found["train"] + found["val"]) == sorted(keys[:16])
    assert {key[:3] for key in found["val"]} == {"ARG", "ATL", "JAX", "OMA"}
    assert "val 8 tiles of 4 places (ARG, ATL, JAX, OMA)" in capsys.readouterr().out
    assert set(pack_plan.read_split(tmp_path / "split.json").values()) == {"train", "val"}
    before = (tmp_path / "split.json").read_bytes()
    run_split(tmp_path / "data", tmp_path / "split.json")
    assert (tmp_path / "split.json").read_bytes() == before


def test_a_city_with_one_place_is_for_training(tmp_path, capsys):
    make_dataset(tmp_path / "data", 6, cities=("ARG", "JAX"))
    found = run_split(tmp_path / "data", tmp_path / "split.json")
    assert {key[:3] for key in found["val"]} == {"ARG"}
    assert "JAX: one place only" in capsys.readouterr().err


def test_folds_are_files(tmp_path):
    make_dataset(tmp_path / "data", 24)
    run_split(tmp_path / "data", tmp_path / "split.json", folds=3)
    sets = [set(json.loads((tmp_path / f"split-{k}.json").read_text())["val"]) for k in range(3)]
    assert sum(map(len, sets)) == len(set().union(*sets)) == 24


def test_by_groups(tmp_path):
    keys = make_dataset(tmp_path / "data", 8)
    (tmp_path / "data" / "places.csv").unlink()
    groups = {str(number): keys[number::4] for number in range(4)}
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    found = run_split(tmp_path / "data", tmp_path / "split.json", by=str(tmp_path / "groups.json"))
    for members in groups.values():
        assert len({key in found["val"] for key in members}) == 1
    (tmp_path / "groups.json").write_text(json.dumps({"a": keys[:-1]}))
    with pytest.raises(FoundProblems, match=f"no group for 1 of 8 labelled tiles(.|\n)*{keys[-1]}"):
        run_split(tmp_path / "data", tmp_path / "split.json", by=str(tmp_path / "groups.json"))


def test_the_winners_groups(shared):
    path = shared / "real" / "challenge_labels" / "clusters.json"
    groups = split.read_groups(path)
    tiles = [Tile(key, key[:3], Path("x")) for key in sorted(groups)]
    val = split.choose_val(tiles, groups, 0.2, 0)
    for city in ("ARG", "ATL", "JAX", "OMA"):
        of_city = [tile.key for tile in tiles if tile.city == city]
        assert sum(groups[key] in val for key in of_city) / len(of_city) == pytest.approx(0.2, abs=0.01)


def test_a_leaking_split_is_made_on_request_only_and_says_so(tmp_path, capsys):
    make_dataset(tmp_path / "data", 40, views=3)
    free = run_split(tmp_path / "data", tmp_path / "split.json")
    assert "LEAKS" not in capsys.readouterr().err
    leaky = run_split(tmp_path / "data", tmp_path / "leaky.json", leak=True)
    said = capsys.readouterr().err
    moved = set(leaky["train"]) - set(free["train"])
    assert f"THIS SPLIT LEAKS: {len(leaky['val'])} validation tiles" in said
    assert moved
    assert set(leaky["val"]) < set(free["val"])
    assert not moved & set(leaky["val"])
    assert set(free["train"]) < set(leaky["train"])
    place = {tile.key: tile.place for tile in layouts.read_layout(tmp_path / "data")}
    assert {place[key] for key in moved} == {place[key] for key in leaky["val"]}
    pack_plan.read_split(tmp_path / "leaky.json")
    with pytest.raises(ValueError, match="without --folds"):
        SplitRecipe(source="a", out="b", leak=True, folds=2)


def test_leak_is_measured_on_the_same_tiles(tmp_path, monkeypatch):
    make_dataset(tmp_path / "data", 40, views=3)
    monkeypatch.setattr(cases_leak, "geopose", cli.main)
    paths = cases_leak.make_splits(tmp_path / "data", tmp_path / "work")
    free, leaky = (json.loads(paths[way].read_text()) for way in cases_leak.WAYS)
    assert free["val"] == leaky["val"]
    moved = set(leaky["train"]) - set(free["train"])
    assert moved
    assert set(free["unused"]) == moved | set(leaky["unused"])
    assert sorted(key for keys in free.values() for key in keys) == sorted(
        key for keys in leaky.values() for key in keys
    )
    (tmp_path / "run").mkdir()
    lines = [{"step": 5, "r2": 0.9}, {"step": 9, "r2": 0.1}, {"step": 9, "r2": 0.3}]
    (tmp_path / "run" / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cases_leak.last_score(tmp_path / "run") == 0.3


def test_a_leak_needs_places_of_two_tiles(tmp_path):
    make_dataset(tmp_path / "data", 12, views=1)
    with pytest.raises(UserError, match="no validation place has two tiles"):
        run_split(tmp_path / "data", tmp_path / "split.json", leak=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "damaged or cut short"),
        ("[]", "not groups"),
        ('{"a": ["k"], "b": ["k"]}', "k is in groups a and b"),
    ],
)
def test_groups_that_are_wrong(tmp_path, text, said):
    make_dataset(tmp_path / "data", 2)
    (tmp_path / "groups.json").write_text(text)
    with pytest.raises(UserError, match=said):
        run_split(tmp_path / "data", tmp_path / "split.json", by=str(tmp_path / "groups.json"))


def test_unknown_places_are_refused_with_the_way_out(tmp_path):
    make_dataset(tmp_path / "data", 4)
    (tmp_path / "data" / "places.csv").unlink()
    with pytest.raises(
        UserError, match=r"place of 4 of 4 tiles is not known.*places\.csv.*--by FILE.*--by similarity"
    ):
        run_split(tmp_path / "data", tmp_path / "split.json")
    with pytest.raises(UserError, match="cannot be read"):
        run_split(tmp_path / "data", tmp_path / "split.json", by="absent.json")


def test_nothing_to_split(tmp_path):
    make_dataset(tmp_path / "data", 0, test=2)
    with pytest.raises(UserError, match="no labelled tiles"):
        run_split(tmp_path / "data", tmp_path / "split.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"val_share": 0.0}, "--val-share is 0"),
        ({"val_share": 1.0}, "--val-share is 1"),
        ({"folds": 1}, "at least 2"),
        ({"out": ""}, "are wanted"),
    ],
)
def test_recipes_that_are_wrong(options, said):
    with pytest.raises(ValueError, match=said):
        SplitRecipe(**({"source": "a", "out": "b"} | options))


def test_the_command(tmp_path, geopose):
    make_dataset(tmp_path / "data", 8)
    words = ("split", "--source", tmp_path / "data", "--out", tmp_path / "split.json")
    assert geopose(*words, "--by", "place").returncode == 0
    result = geopose(*words, "--by", "similarity", "--similarity.keypoints", "5")
    assert (result.returncode, "keypoints 5" in result.stderr) == (2, True)
