"""`geopose synth`: the challenge's layout, repeatable bytes, restarts, refusals, and each city's label statistics."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections import namedtuple
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile

from geopose_dist import geometry
from geopose_dist.cli import main
from geopose_dist.errors import UserError
from shards import synth, synth_camera, synth_look, synth_scene, synth_tiles
from shards.synth_districts import keyed
from shards.synth_faults import FaultRecipe

SMALL = {"places": 4, "views": 2, "size": 96, "seed": 3}


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a dataset but its bookkeeping, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and synth_tiles.BOOKS not in path.parts
    }


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "data"
    synth.run(synth.SynthRecipe(out=out, workers=1, **SMALL))
    return out


def test_layout_is_the_challenges_own(dataset: Path) -> None:
    everything = table(dataset / "metadata.csv")
    train, test = table(dataset / "geopose_train.csv"), table(dataset / "geopose_test.csv")
    assert list(everything[0]) == ["id", "city", "gsd"]
    assert list(train[0]) == ["id", "agl", "json", "rgb"]
    assert list(test[0]) == ["id", "rgb"]
    assert len(everything) == 8
    assert len(train) == 6
    assert len(test) == 2
    city = {row["id"]: row["city"] for row in everything}
    gsd = {row["id"]: float(row["gsd"]) for row in everything}
    assert set(city.values()) == {"ARG", "ATL", "JAX", "OMA"}
    assert all(len(id_) == 6 and id_.isalpha() for id_ in city)
    expected = {"metadata.csv", "geopose_train.csv", "geopose_test.csv", "places.csv"}
    for row in train:
        stem = f"{city[row['id']]}_{row['id']}"
        assert (row["agl"], row["json"], row["rgb"]) == (
            f"{stem}_AGL.tif",
            f"{stem}_VFLOW.json",
            f"{stem}_RGB.j2k",
        )
        expected |= {f"train/{row[what]}" for what in ("agl", "json", "rgb")}
    for row in test:
        stem = f"{city[row['id']]}_{row['id']}"
        assert row["rgb"] == f"{stem}_RGB.j2k"
        expected |= {f"test_rgbs/{stem}_RGB.j2k"}
        expected |= {
            f"{d}/{stem}_{k}" for d in ("submission_format", "test_truth") for k in ("AGL.tif", "VFLOW.json")
        }
    assert set(tree(dataset)) == expected
    for path in [*dataset.glob("train/*.j2k"), *dataset.glob("test_rgbs/*.j2k")]:
        rgb = imagecodecs.jpeg2k_decode(path.read_bytes())
        assert rgb.shape == (96, 96, 3)
        assert rgb.dtype == np.uint8
        assert rgb.std() > 10
    for path in dataset.rglob("*_AGL.tif"):
        agl = tifffile.imread(path)
        assert agl.shape == (96, 96)
        assert agl.dtype == np.uint16
        pose = json.loads(path.with_name(path.name.replace("AGL.tif", "VFLOW.json")).read_text())
        assert list(pose) == ["scale", "angle"]
        assert geometry.check_label(pose["scale"], pose["angle"], "px/cm", path.name) == []
        assert 0 <= pose["angle"] < 2 * math.pi
        if path.parent.name != "submission_format":
            zenith = geometry.zenith_from_scale(pose["scale"] * 100, gsd[path.name[4:10]])
            assert 50 <= 90 - math.degrees(zenith) <= 87


def test_places_never_stand_on_both_sides(dataset: Path) -> None:
    place = {row["id"]: row["place"] for row in table(dataset / "places.csv")}
    assert len(place) == 8
    train = {place[row["id"]] for row in table(dataset / "geopose_train.csv")}
    test = {place[row["id"]] for row in table(dataset / "geopose_test.csv")}
    assert not train & test
    assert len(train | test) == 4


def test_bytes_do_not_depend_on_workers_or_restarts(dataset: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    recipe = synth.SynthRecipe(out=other, workers=2, **SMALL)
    synth.run(recipe)
    whole = tree(other)
    assert whole == tree(dataset)
    # A tile that is gone, one cut short, and a leftover of a killed run: all are mended, the rest is left alone.
    gone, short, kept = sorted((other / "train").glob("*_RGB.j2k"))[:3]
    gone.unlink()
    short.write_bytes(short.read_bytes()[:100])
    (other / "train" / f".{gone.name}.4242.tmp").write_bytes(b"half")
    (other / "geopose_train.csv").unlink()
    before = kept.stat().st_mtime_ns
    synth.run(recipe)
    assert tree(other) == whole
    assert kept.stat().st_mtime_ns == before


def test_views_do_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    for views in (1, 2):
        synth.run(
            synth.SynthRecipe(
                out=tmp_path / str(views), places=1, views=views, size=64, cities=["OMA"], workers=1
            )
        )
    one, two = tree(tmp_path / "1"), tree(tmp_path / "2")
    tiles = [name for name in one if name.startswith("train/")]
    assert len(tiles) == 3
    assert all(two[name] == one[name] for name in tiles)


def test_another_seed_is_another_dataset() -> None:
    a, b = (synth.tile_names(synth.SynthRecipe(out=Path("x"), seed=seed)) for seed in (0, 1))
    assert not {t.id for t in a} & {t.id for t in b}


@pytest.mark.parametrize(
    ("places", "cities", "count"),
    [(1, 4, 0), (2, 4, 1), (4, 4, 1), (8, 4, 2), (12, 4, 4), (40, 4, 10), (3, 1, 1)],
)
def test_default_share_of_test_places(places: int, cities: int, count: int) -> None:
    assert synth.default_test_places(places, cities) == count
    chosen = synth.test_set(places, cities, count)
    assert len(chosen) == count
    by_city = [sum(p % cities == c for p in chosen) for c in range(cities)]
    assert max(by_city) - min(by_city) <= 1
    if places >= 3 * cities:
        assert min(by_city) >= 1


def test_every_city_keeps_a_train_place_while_it_can() -> None:
    chosen = synth.test_set(6, 4, 2)  # cities 0 and 1 have two places, cities 2 and 3 one each
    assert chosen == {4, 5}
    assert synth.test_set(4, 4, 4) == {0, 1, 2, 3}


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synth.run(synth.SynthRecipe(out=tmp_path / "new", dry_run=True))
    assert "48 tiles of 2048 x 2048" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


def test_refusals_are_one_sentence_and_leave_things_alone(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(dataset)
    with pytest.raises(UserError, match=r"another recipe \(seed was 3, is 4\)"):
        synth.run(synth.SynthRecipe(out=dataset, **(SMALL | {"seed": 4})))
    stranger = dataset / "train" / "ARG_zzzzzz_RGB.j2k"
    stranger.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"ARG_zzzzzz_RGB\.j2k is not a file of this dataset"):
        synth.run(synth.SynthRecipe(out=dataset, **SMALL))
    stranger.unlink()
    assert tree(dataset) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds files that synth did not write"):
        synth.run(synth.SynthRecipe(out=tmp_path / "full"))
    with pytest.raises(UserError, match="is a file"):
        synth.run(synth.SynthRecipe(out=tmp_path / "full" / "thesis.txt"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(UserError, match="only 0 MB are free"):
        synth.run(synth.SynthRecipe(out=tmp_path / "small"))


def test_a_disk_that_fills_up_is_one_sentence(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / ".a.tif.tmp").symlink_to("/dev/full")
    real = synth_tiles.files.write_bytes

    def full(path: Path, data: bytes) -> None:
        with (tmp_path / ".a.tif.tmp").open("wb", buffering=0) as file:
            file.write(data)
        real(path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synth_tiles.files, "write_bytes", full)
        with pytest.raises(UserError, match=r"a\.tif: the disk is full; free some space"):
            synth_tiles.write(tmp_path / "a.tif", b"data")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--places", "0"], "places is 0"),
        (["--size", "63"], "size is 63"),
        (["--test-places", "13"], "test_places is 13"),
        (["--cities", "ARG", "XYZ"], "XYZ"),
        (["--cities", "ARG", "ARG"], "named once"),
    ],
)
def test_the_command_line_refuses_with_exit_2(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["synth", "--out", str(tmp_path / "x"), *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_two_views_of_a_place_agree_on_the_ground(dataset: Path) -> None:
    """From the files alone plus each camera's ground plane: where both saw a square metre, heights agree."""
    names = [t for t in synth.tile_names(synth.SynthRecipe(out=dataset, **SMALL)) if t.place == 3]
    grids = []
    for tile in names:
        agl = geometry.agl_m_from_cm(tifffile.imread(dataset / tile.targets()["agl"]))
        pose = json.loads((dataset / tile.targets()["json"]).read_text())
        camera = synth_tiles.view_camera(tile.city, 96, 3, tile.place, tile.view)
        # Metres from the place's middle, on the plane of its ground: the hills rise little within these 30 m.
        affine = camera.affine((96, 96), 1.0, (0, 0))
        dx, dy = geometry.flow_xy(agl, geometry.px_per_m(pose["scale"]), pose["angle"])
        y, x = np.mgrid[0:96, 0:96]
        east, south = affine.cells(x + dx, y + dy, 0.0)
        grid = np.full((80, 80), -1.0)
        known = ~np.isnan(agl) & (np.abs(east) < 40) & (np.abs(south) < 40)
        np.maximum.at(grid, (south[known].astype(int) + 40, east[known].astype(int) + 40), agl[known])
        grids.append(grid)
    both = (grids[0] >= 0) & (grids[1] >= 0)
    assert both.sum() > 300
    difference = np.abs(grids[0] - grids[1])[both]
    assert np.median(difference) < 0.1
    assert np.mean(difference < 1.0) > 0.85  # the rest: square metres through which an edge runs


def test_holes_stay_where_the_lidar_missed() -> None:
    scene = synth_scene.build("ARG", 128, 2, 0)
    day = synth_look.draw_day("ARG", keyed(1))
    for view in range(2):
        camera = synth_camera.draw_camera("ARG", 128, keyed(4, view))
        picture = scene.picture(camera, scene.looks(day))
        scene.holes = synth_look.Holes(np.ones_like(scene.holes.mask), False)
        scene.faults = FaultRecipe()
        assert (scene.label_cm(camera, picture, keyed(2)) == geometry.NO_DATA_CM).all()
        scene.faults = FaultRecipe(holes=False)
        cm = scene.label_cm(camera, picture, keyed(2))
        assert np.abs(cm - picture.agl_m * 100.0).max() <= 0.51
        scene.faults = FaultRecipe(holes=False, speckle=0.02)
        gaps = scene.label_cm(camera, picture, keyed(2)) == geometry.NO_DATA_CM
        assert gaps.mean() == pytest.approx(0.02, abs=0.005)
        assert np.mean(gaps[1:] & gaps[:-1]) < 0.002  # single pixels


def test_years_between_lidar_and_image_are_whole_buildings() -> None:
    scene = synth_scene.build("JAX", 192, 2, 1, faults=FaultRecipe(holes=False, date=0.6), owners=True)
    same = synth_scene.build("JAX", 192, 2, 1, owners=True)
    owner, before, now = same.plan.owner, scene.lidar.height, scene.terrain.height
    assert owner is not None
    changed = {n: (before != now)[owner == n].mean() for n in range(1, owner.max() + 1) if (owner == n).any()}
    assert set(changed.values()) <= {0.0, 1.0}
    assert 0.3 < np.mean(list(changed.values())) < 0.9
    assert np.array_equal(before[owner == 0], now[owner == 0])
    assert {bool((now > before).any()), bool((now < before).any())} == {True}  # both came and went
    camera, day = synth_camera.draw_camera("JAX", 192, keyed(4)), synth_look.draw_day("JAX", keyed(1))
    picture = scene.picture(camera, scene.looks(day))
    cm = scene.label_cm(camera, picture, keyed(2))
    assert np.mean(np.abs(cm / 100 - picture.agl_m) > 1.5) > 0.02


def test_cameras_follow_each_citys_ranges() -> None:
    bounds = {"ARG": (0.31, 0.41), "ATL": (0.465, 0.59), "JAX": (0.31, 0.395), "OMA": (0.31, 0.365)}
    tiles = {"ARG": 2325, "ATL": 704, "JAX": 1098, "OMA": 1796}
    scales, spread = [], {}
    for city, (low, high) in bounds.items():
        cameras = [synth_camera.draw_camera(city, 512, keyed(9, k)) for k in range(tiles[city] // 4)]
        gsd = np.array([camera.gsd_m for camera in cameras])
        elevation = 90 - np.degrees([camera.zenith for camera in cameras])
        angles = np.array([camera.angle_rad for camera in cameras])
        assert low <= gsd.min() < gsd.max() <= high, city
        assert 54 <= elevation.min() < elevation.max() <= 86, city
        spread[city] = float(np.hypot(np.sin(angles).mean(), np.cos(angles).mean()))
        scales.append([geometry.px_per_cm(camera.scale_px_per_m) for camera in cameras])
    pooled = np.concatenate(scales)
    assert pooled.mean() == pytest.approx(0.00968, rel=0.1)
    assert pooled.std() == pytest.approx(0.00329, rel=0.15)
    assert np.percentile(pooled, (25, 50, 75)) == pytest.approx((0.00801, 0.01023, 0.01245), rel=0.12)
    assert 0.0015 < pooled.min() < 0.0035
    assert 0.0145 < pooled.max() < 0.0158
    atl = np.array(scales[1])
    assert atl.mean() < 0.75 * pooled.mean()
    assert atl.std() < 0.6 * pooled.std()
    assert spread["ATL"] > 0.9  # narrow
    assert spread["ARG"] < 0.15  # the full circle


@pytest.mark.slow
@pytest.mark.parametrize(
    ("city", "mean", "median", "upper", "tallest", "missing"),
    [
        ("ARG", (290, 480), (120, 420), (480, 780), (2000, 10000), (0.08, 0.40)),
        ("ATL", (600, 1250), (100, 800), (950, 1750), (8000, 20000), (0.0, 0.02)),
        ("JAX", (300, 560), (0, 300), (450, 1000), (1500, 19993), (0.005, 0.14)),
        ("OMA", (130, 320), (0, 60), (40, 480), (1500, 19276), (0.001, 0.07)),
    ],
)
def test_heights_resemble_each_city(
    city: str,
    mean: tuple[float, float],
    median: tuple[float, float],
    upper: tuple[float, float],
    tallest: tuple[float, float],
    missing: tuple[float, float],
) -> None:
    """Bounds around DOMAIN section 2's mean, median, upper quartile, maximum (cm) and no-data share."""
    size, heights, holes = 640, [], []
    for place in range(10):
        scene = synth_scene.build(city, size, 5, place, relief=1.0)
        camera = synth_camera.draw_camera(city, size, keyed(5, place, 6, 0))
        picture = scene.picture(camera, scene.looks(synth_look.draw_day(city, keyed(1))))
        cm = scene.label_cm(camera, picture, keyed(2, place))
        known = cm != geometry.NO_DATA_CM
        heights.append(cm[known])
        holes.append(1 - known.mean())
    pooled = np.concatenate(heights)
    assert mean[0] < pooled.mean() < mean[1]
    assert median[0] <= np.median(pooled) < median[1]
    assert upper[0] < np.percentile(pooled, 75) < upper[1]
    assert tallest[0] < pooled.max() <= tallest[1]
    assert missing[0] <= np.mean(holes) < missing[1]
