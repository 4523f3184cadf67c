"""Packing: exact round trips, the same bytes however it is run, and everything wrong named before anything is kept."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import webdataset
from tiles import make_dataset, write_tile

from geopose_dist import cli, config
from geopose_dist.data import codecs, manifest, resample
from geopose_dist.data.reader import Reader
from geopose_dist.errors import FinishedWithFailures, FoundProblems, UserError
from geopose_dist.geometry import agl_m_from_cm
from shards import images, layouts, pack, pack_plan, tars
from shards.pack import CodecRecipe, PackRecipe

ROOT = Path(__file__).resolve().parents[1]


def run_pack(source: Path, out: Path, **options) -> None:
    options = {"workers": 1, "shard_samples": 3} | options
    pack.run(PackRecipe(source=str(source), out=str(out), **options))


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


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


def test_packing_again_changes_nothing_and_mends_what_is_missing(dataset, tmp_path):
    out = tmp_path / "out"
    run_pack(dataset, out)
    before = hashes(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    run_pack(dataset, out)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")} == times
    data = bytearray((out / "train-000001.tar").read_bytes())
    data[3000] ^= 1
    (out / "train-000001.tar").write_bytes(data)
    (out / "train-000000.tar").unlink()
    run_pack(dataset, out)
    assert hashes(out) == before
    assert (out / "train-000002.tar").stat().st_mtime_ns == times["train-000002.tar"]


@pytest.mark.parametrize("shards_before", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_and_run_again_it_goes_on(tmp_path, shards_before):
    make_dataset(tmp_path / "data", 15, size=256)
    words = [sys.executable, "-m", "geopose_dist", "pack", "--source", str(tmp_path / "data"), "--out"]
    options = ["--shard-samples", "3", "--workers", "2"]
    process = subprocess.Popen([*words, str(tmp_path / "out"), *options], cwd=ROOT, start_new_session=True)
    waiting = tmp_path / "out" / ".pack" / "records"
    limit = time.monotonic() + 60
    while len(list(waiting.glob("*.json"))) < shards_before and time.monotonic() < limit:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in waiting.glob("*.json")}
    assert len(done) >= shards_before
    if not (tmp_path / "out" / "manifest.json").exists():
        assert not list((tmp_path / "out").glob("*.tar"))
    run_pack(tmp_path / "data", tmp_path / "out")
    run_pack(tmp_path / "data", tmp_path / "whole")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert not list((tmp_path / "out").rglob("*.tmp"))


def spoil(dataset: Path) -> dict[str, str]:
    """Damage five tiles, each in its own way; what is said of each key."""
    keys = sorted(path.name.removesuffix("_RGB.j2k") for path in (dataset / "train").glob("*_RGB.j2k"))
    folder = dataset / "train"
    image = folder / f"{keys[0]}_RGB.j2k"
    image.write_bytes(image.read_bytes()[:-300])
    heights = folder / f"{keys[1]}_AGL.tif"
    heights.write_bytes(heights.read_bytes()[: heights.stat().st_size // 2])
    (folder / f"{keys[2]}_VFLOW.json").write_text('{"scale": 0.8, "angle": 1}')
    tifffile.imwrite(folder / f"{keys[3]}_AGL.tif", np.zeros((64, 62), np.uint16))
    tifffile.imwrite(folder / f"{keys[4]}_AGL.tif", np.zeros((64, 64), np.float32))
    said = [
        "_RGB.j2k: damaged or cut short",
        "_AGL.tif: damaged",
        "_VFLOW.json: scale is 0.8, which looks like px/m",
        "_AGL.tif: 64 x 62 pixels, but its image",
        "_AGL.tif: heights are float32",
    ]
    return dict(zip(keys, said, strict=False))


def test_every_damaged_tile_is_named_and_nothing_is_kept(dataset, tmp_path):
    said = spoil(dataset)
    with pytest.raises(FoundProblems) as caught:
        run_pack(dataset, tmp_path / "out", skip_damaged=4)
    assert len(caught.value.problems) == 5
    for key, sentence in said.items():
        assert sum(key + sentence in problem for problem in caught.value.problems) == 1
    assert "--skip-damaged 5" in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".pack"]


def test_damaged_tiles_can_be_left_out(dataset, tmp_path, capsys):
    said = spoil(dataset)
    words = ["pack", "--source", str(dataset), "--out", str(tmp_path / "out"), "--shard-samples", "3"]
    assert cli.main([*words, "--workers", "1", "--skip-damaged", "5"]) == 1
    first = capsys.readouterr().err
    assert all(key + sentence in first for key, sentence in said.items())
    with pytest.raises(FinishedWithFailures) as again:  # nothing is left to do, and the same is said
        run_pack(dataset, tmp_path / "out", skip_damaged=5)
    assert str(again.value) in first
    facts = manifest.read_manifest(tmp_path / "out")
    assert facts.splits() == {"test": 2, "train": 5}
    assert [s.samples for s in facts.shards if s.split == "train"] == [3, 2]
    # The same as if the damaged tiles had never been there.
    for key in said:
        for path in (dataset / "train").glob(f"{key}_*"):
            path.unlink()
    (dataset / "geopose_train.csv").unlink()
    run_pack(dataset, tmp_path / "without")
    assert {k: v for k, v in hashes(tmp_path / "out").items() if k.endswith("tar")} == {
        k: v for k, v in hashes(tmp_path / "without").items() if k.endswith("tar")
    }


def test_a_mended_source_goes_on(dataset, tmp_path):
    image = sorted((dataset / "train").glob("*_RGB.j2k"))[0]
    good = image.read_bytes()
    image.write_bytes(good[:-300])
    with pytest.raises(FoundProblems, match="damaged or cut short"):
        run_pack(dataset, tmp_path / "out")
    image.write_bytes(good)
    run_pack(dataset, tmp_path / "out")
    run_pack(dataset, tmp_path / "other")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "other")


def test_a_changed_file_is_packed_again(dataset, tmp_path):
    run_pack(dataset, tmp_path / "out")
    before = hashes(tmp_path / "out")
    label = sorted((dataset / "train").glob("*_VFLOW.json"))[0]
    label.write_text('{"scale": 0.011, "angle": 2.5}')
    run_pack(dataset, tmp_path / "out")
    run_pack(dataset, tmp_path / "fresh")
    after = hashes(tmp_path / "out")
    assert after == hashes(tmp_path / "fresh")
    assert sum(before[name] != after[name] for name in before if name.endswith(".tar")) == 1


def test_damage_that_one_part_finds_changes_the_plan_of_all(dataset, tmp_path):
    spoil(dataset)
    said = []
    for part in ("1/2", "2/2", "1/2", "2/2"):
        try:
            run_pack(dataset, tmp_path / "out", part=part, skip_damaged=5)
        except FinishedWithFailures as failures:
            said.append(str(failures))
    assert len(said) >= 1
    with pytest.raises(FinishedWithFailures):
        run_pack(dataset, tmp_path / "alone", skip_damaged=5)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")


def test_another_recipe_or_source_in_one_folder_is_refused(dataset, tmp_path):
    run_pack(dataset, tmp_path / "out")
    with pytest.raises(UserError, match="reduce was 2, now 1"):
        run_pack(dataset, tmp_path / "out", reduce=1)
    make_dataset(tmp_path / "other", 10, test=2)
    with pytest.raises(UserError, match=r"source was '.*data', now '.*other'"):
        run_pack(tmp_path / "other", tmp_path / "out")
    write_tile(dataset / "train", "ARG_new", 99)
    with pytest.raises(UserError, match="tiles was 12, now 13"):
        run_pack(dataset, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / ".pack")
    with pytest.raises(UserError, match="holds a finished packing that this command did not make"):
        run_pack(dataset, tmp_path / "out")


def test_a_first_try_that_wrote_nothing_binds_nobody(dataset, tmp_path):
    write_tile(tmp_path / "wrong", "OMA_a", 1, size=(63, 64))
    with pytest.raises(FoundProblems):
        run_pack(tmp_path / "wrong", tmp_path / "out")
    run_pack(dataset, tmp_path / "out")


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


@pytest.mark.parametrize("after", [0, 1, 9000])
def test_out_of_disk(dataset, tmp_path, monkeypatch, after):
    """The disk fills after some bytes: one sentence, no manifest, no half shard, and going on works."""
    real = tars.write_samples

    class Full(io.BufferedIOBase):
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if self.file.tell() + len(data) > after:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

    monkeypatch.setattr(tars, "write_samples", lambda file, samples: real(Full(file), samples))
    with pytest.raises(
        UserError, match=r"the disk is full \(No space left on device\); what is finished is kept"
    ):
        run_pack(dataset, tmp_path / "out")
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [name for name in left if name.endswith((".tar", ".tmp")) or name == "manifest.json"] == []
    monkeypatch.undo()
    run_pack(dataset, tmp_path / "out")


def test_a_folder_that_cannot_be_written(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be made"):
        run_pack(dataset, tmp_path / "file")


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


def test_failures_are_not_the_users_mistake():
    assert not issubclass(FinishedWithFailures, UserError)
