"""Packing: exact round trips, the same bytes however it is run, plans, splits and recipes."""

from __future__ import annotations

import gc
import io
import json
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import webdataset
from packs import hashes, run_pack, spoil
from tiles import make_dataset, make_tile, name_of, write_tile

from geopose_dist import cli, config
from geopose_dist.data import codecs, manifest, resample
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.errors import FoundProblems, UserError
from geopose_dist.geometry import agl_m_from_cm
from shards import images, layouts, pack, pack_plan, tars, verify
from shards.pack import CodecRecipe, PackRecipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def dataset(tmp_path) -> Path:
    make_dataset(tmp_path / "data", 10, test=2)
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("reduce", "rgb", "agl"),
    [(1, "qoi", "lerc"), (2, "png", "tif"), (2, "webp", "png"), (1, "htj2k", "htj2k"), (4, "qoi", "lerc")],
)
def test_reading_gives_back_the_source(dataset, tmp_path, reduce, rgb, agl):
    run_pack(dataset, tmp_path / "out", reduce=reduce, codec=CodecRecipe(rgb, agl))
    seen = set()
    tiles = {tile.key: tile for tile in layouts.read_layout(dataset)}
    for split in ("train", "test"):
        reader = Reader(manifest.open_split(tmp_path / "out", split))
        for index in range(len(reader)):
            view = reader.view(index)
            tile = tiles[view.key]
            seen.add(view.key)
            np.testing.assert_array_equal(view.rgb, resample.reduce_rgb(layouts.load_rgb(tile), reduce))
            assert (view.city, view.place) == (tile.city, tile.place)
            assert view.gsd_m == pytest.approx(0.4 * reduce)
            if split == "test":
                assert (view.agl_m, view.pose) == (None, None)
                continue
            wanted = resample.reduce_agl(layouts.load_agl_m(tile), reduce)
            np.testing.assert_allclose(view.agl_m, wanted, atol=0.0051 if reduce > 1 else 0)
            scale, angle = layouts.load_pose(tile)
            assert view.scale_px_per_m == scale / reduce
            assert view.angle_rad == angle
    assert seen == set(tiles)


def test_webdataset_reads_the_shards_as_they_are(dataset, tmp_path):
    run_pack(dataset, tmp_path / "out", reduce=1)
    shards = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    keys = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves closing files to the collector
        samples = list(webdataset.WebDataset(shards, shardshuffle=False))
        gc.collect()
    for sample in samples:
        facts = json.loads(sample["json"])
        rgb = codecs.decode_rgb("qoi", sample["rgb.qoi"], "K", tuple(facts["size"]))
        assert rgb.shape == (64, 64, 3)
        assert ("agl.lerc" in sample) == (facts["angle_rad"] is not None)
        keys.append(sample["__key__"])
    assert len(keys) == len(set(keys)) == 12
    assert keys != sorted(keys)


def test_shards_are_written_as_webdataset_would_but_without_torch(tmp_path):
    samples = [
        (
            f"ARG_{'x' * length}",
            {"rgb.qoi": bytes(range(256)) * length, "json": b"{}", "agl.lerc": b"\0" * 511},
        )
        for length in (1, 2, 76)
    ]
    ours, theirs = io.BytesIO(), io.BytesIO()
    tars.write_samples(ours, samples)
    with webdataset.TarWriter(theirs, encoder=False, mtime=0, user="", group="", mode=0o444) as tar:
        for key, members in samples:
            tar.write({"__key__": key, **members})
    assert ours.getvalue() == theirs.getvalue()
    code = "import sys, shards.pack_write, shards.pack, shards.verify; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_shards_of_the_first_version_are_read_as_ever():
    """`golden/shards_v1`: packed at commit d40ea0e, before facts told the tallest height.

    make_dataset(data, 3, size=(24, 20), test=1); PackRecipe(data, out, reduce=1, shard_samples=2, workers=1)
    """
    old = ROOT / "tests" / "golden" / "shards_v1"
    verify.run(verify.VerifyRecipe(str(old), deep=True, workers=1))
    seen = {}
    for split in ("train", "test"):
        reader = Reader(open_shards(str(old), split))
        for view in map(reader.view, range(len(reader))):
            seen[view.key] = view
    cities = ("ARG", "ARG", "ATL", "ATL")
    assert sorted(seen) == sorted(f"{city}_{name_of(number)}" for number, city in enumerate(cities))
    for number, city in enumerate(cities):
        view = seen[f"{city}_{name_of(number)}"]
        rgb, agl_cm, scale, angle = make_tile(number, (24, 20))
        np.testing.assert_array_equal(view.rgb, rgb)
        if number == 3:
            assert (view.agl_m, view.pose) == (None, None)
            continue
        np.testing.assert_array_equal(view.agl_m, agl_m_from_cm(agl_cm))
        assert view.scale_px_per_m == pytest.approx(100 * scale, rel=1e-12)
        assert view.angle_rad == pytest.approx(angle, rel=1e-12)


def test_shards_are_even_and_say_nothing_of_this_machine(dataset, tmp_path):
    run_pack(dataset, tmp_path / "out", shard_samples=4)
    facts = manifest.read_manifest(tmp_path / "out")
    assert [(s.name, s.samples) for s in facts.shards] == [
        ("test-000000.tar", 2),
        ("train-000000.tar", 4),
        ("train-000001.tar", 3),
        ("train-000002.tar", 3),
    ]
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o444)
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_statistics_are_those_of_the_stored_pixels(dataset, tmp_path):
    run_pack(dataset, tmp_path / "out")
    facts = manifest.read_manifest(tmp_path / "out")
    reader = Reader(manifest.open_split(tmp_path / "out", "train"))
    views = [view for view in map(reader.view, range(len(reader))) if view.city == "ATL"]
    heights = np.concatenate([view.agl_m.ravel() for view in views]).astype(np.float64)
    found = facts.statistics["train"]["ATL"]
    assert found["tiles"] == len(views)
    assert found["agl_mean_m"] == pytest.approx(np.nanmean(heights), rel=1e-6)
    assert found["agl_std_m"] == pytest.approx(np.nanstd(heights), rel=1e-5)
    assert found["unknown_share"] == pytest.approx(np.isnan(heights).mean())
    assert found["scale_mean_px_per_m"] == pytest.approx(np.mean([v.scale_px_per_m for v in views]))
    assert (
        facts.statistics["test"]["JAX"]["agl_mean_m"] is None if "JAX" in facts.statistics["test"] else True
    )


def test_the_same_bytes_whoever_packs(dataset, tmp_path):
    run_pack(dataset, tmp_path / "one")
    run_pack(dataset, tmp_path / "two", workers=2)
    shutil.copytree(dataset, tmp_path / "copy" / "data")
    run_pack(tmp_path / "copy" / "data", tmp_path / "three")
    for part in ("2/3", "1/3", "3/3"):
        assert not (tmp_path / "four" / "manifest.json").exists()
        run_pack(dataset, tmp_path / "four", part=part)
    assert (
        hashes(tmp_path / "one")
        == hashes(tmp_path / "two")
        == hashes(tmp_path / "three")
        == hashes(tmp_path / "four")
    )
    run_pack(dataset, tmp_path / "five", seed=1)
    assert hashes(tmp_path / "one")["train-000000.tar"] != hashes(tmp_path / "five")["train-000000.tar"]


def test_odd_sizes(tmp_path):
    write_tile(tmp_path / "data", "OMA_a", 1, size=(63, 64))
    write_tile(tmp_path / "data", "OMA_b", 2, size=(64, 65))
    with pytest.raises(FoundProblems) as caught:
        run_pack(tmp_path / "data", tmp_path / "out")
    assert ["OMA_a_RGB.j2k: 63 x 64 pixels" in p for p in caught.value.problems] == [True, False]
    assert "--odd-sizes crop" in caught.value.problems[1]
    run_pack(tmp_path / "data", tmp_path / "crop", odd_sizes="crop")
    reader = Reader(manifest.open_split(tmp_path / "crop", "train"))
    assert sorted(reader.view(i).rgb.shape for i in (0, 1)) == [(31, 32, 3), (32, 32, 3)]
    run_pack(tmp_path / "data", tmp_path / "full", reduce=1)


def test_real_orthophotos_pack_without_pose(shared, tmp_path):
    source = shared / "real" / "rgb_and_height"
    run_pack(source, tmp_path / "out", reduce=1)
    reader = Reader(manifest.open_split(tmp_path / "out", "train"))
    assert len(reader) == 5
    for view in map(reader.view, range(5)):
        assert view.pose is None
        np.testing.assert_array_equal(view.rgb, images.read_rgb(source / f"{view.key}_RGB.tif"))
        wanted = agl_m_from_cm(tifffile.imread(source / f"{view.key}_AGL.tif"))
        np.testing.assert_array_equal(view.agl_m, wanted)


def test_a_split_file_decides(dataset, tmp_path):
    keys = sorted(tile.key for tile in layouts.read_layout(dataset) if tile.split == "train")
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": keys[:7], "val": keys[7:], "extra": []}))
    run_pack(dataset, tmp_path / "out", split=str(path))
    assert manifest.read_manifest(tmp_path / "out").splits() == {"test": 2, "train": 7, "val": 3}
    assert list(tmp_path.glob("out/val-000000.tar"))
    path.write_text(json.dumps({"train": keys[:7], "val": keys[8:]}))
    with pytest.raises(FoundProblems, match=f"names no split for 1 labelled tiles(.|\n)*{keys[7]}"):
        run_pack(dataset, tmp_path / "other", split=str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"train": ["a"', "damaged or cut short"),
        ('["a"]', "not a split"),
        ('{"train": "a"}', "not a split"),
        ('{"train": ["a"], "val": ["a"]}', "a is in train and in val"),
        ('{"../x": ["a"]}', "cannot name shards"),
    ],
)
def test_split_files_that_are_wrong(dataset, tmp_path, text, said):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(UserError, match=said):
        run_pack(dataset, tmp_path / "out", split=str(tmp_path / "split.json"))
    with pytest.raises(UserError, match="cannot be read"):
        run_pack(dataset, tmp_path / "out", split=str(tmp_path / "absent.json"))


def test_a_plan_without_packing(dataset, capsys):
    assert cli.main(["pack", "--source", str(dataset), "--dry-run", "--shard-samples", "4"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["splits"] == {
        "test": {"shards": 1, "tiles": 2},
        "train": {"shards": 3, "tiles": 10},
    }
    spoil(dataset)
    assert cli.main(["pack", "--source", str(dataset), "--dry-run"]) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"out": ""}, "--out is missing"),
        ({"source": ""}, "--source is missing"),
        ({"reduce": 0}, "--reduce is 0"),
        ({"part": "3/2"}, "--part is '3/2'; wanted i/n"),
        ({"part": "x"}, "wanted i/n"),
        ({"skip_damaged": -1}, "at least 0"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_recipes_that_are_wrong(options, said):
    with pytest.raises(ValueError, match=said):
        PackRecipe(**({"source": "a", "out": "b"} | options))


def test_the_recipe_names_every_codec():
    assert codecs.names(codecs.RGB_CODECS) == list(_choices("rgb"))
    assert codecs.names(codecs.AGL_CODECS) == list(_choices("agl"))


def _choices(field: str) -> tuple[str, ...]:
    import typing

    return typing.get_args(typing.get_type_hints(CodecRecipe)[field])


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs" / "pack").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_packs(recipe, dataset, tmp_path):
    words = [
        "--config",
        str(recipe),
        "--source",
        str(dataset),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
    ]
    pack.run(config.parse(PackRecipe, words, prog="geopose pack", description=""))
    assert len(manifest.open_split(tmp_path / "out", "train")) == 10


def test_order_is_a_function_of_seed_and_split():
    tiles = [layouts.Tile(f"ARG_{i:04d}", "ARG", Path("x")) for i in range(100)]
    split_of = {tile.key: "train" for tile in tiles}
    plans = [pack_plan.plan(order, split_of, seed=3, samples=30) for order in (tiles, tiles[::-1])]
    assert plans[0] == plans[1]
    assert [len(shard.tiles) for shard in plans[0]] == [25, 25, 25, 25]
    flat = [int(tile.key[4:]) for shard in plans[0] for tile in shard.tiles]
    assert sorted(flat) == list(range(100))
    assert np.mean(np.abs(np.diff(flat)) < 3) < 0.15  # strangers
