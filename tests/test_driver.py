"""The predict job end to end: any source, any dispatch, killed in the middle, poisoned, run again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import s3_server
import tifffile
import torch
from jobs import (
    actor_processes,
    outputs,
    predict,
    save_tiny_net,
    start,
    wait_for_files,
    wait_until_gone,
    write_tiles,
)
from range_server import serve
from tiles import make_dataset
from two_nodes import lose_a_node, two_nodes

from geopose_dist import cli
from geopose_dist.errors import UserError
from geopose_dist.infer.recipe import PredictRecipe
from geopose_dist.infer.sources import find_source
from geopose_dist.infer.work import TileSource, WorkItem, fix_batches
from geopose_dist.model.recipe import ModelRecipe
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.model.weights import save_weights
from shards import images

REAL = Path(__file__).parents[1] / ".." / "shared" / "real"


def test_a_folder_becomes_challenge_files_and_a_second_run_does_nothing(
    tiles: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert predict(tiles, checkpoint, out, "--dispatch", "inline") == 0
    assert "7 of 7 tiles predicted" in capsys.readouterr().out
    assert len(outputs(out)) == 14
    heights = tifffile.imread(out / "JAX_tile03_AGL.tif")
    assert heights.dtype == np.uint16
    assert heights.shape == (96, 130)
    assert heights.max() < 65535
    pose = json.loads((out / "JAX_tile03_VFLOW.json").read_text())
    assert 0 <= pose["angle"] < 2 * np.pi
    assert 0 < pose["scale"] <= 0.03
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert predict(tiles, checkpoint, out, "--dispatch", "inline") == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_damaged_output_and_a_missing_one_are_made_again(
    tiles: Path, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    predict(tiles, checkpoint, out, "--dispatch", "inline")
    whole = outputs(out)
    (out / "JAX_tile00_VFLOW.json").unlink()
    (out / "JAX_tile05_AGL.tif").write_bytes(whole["JAX_tile05_AGL.tif"][:-500])
    (out / ".JAX_tile06_AGL.tif.123.tmp").write_bytes(b"left by a killed actor")
    assert predict(tiles, checkpoint, out, "--dispatch", "inline") == 0
    assert outputs(out) == whole
    assert not list(out.glob(".*.tmp"))


def test_unreadable_tiles_among_good_ones_are_named_and_the_rest_is_written(
    tiles: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = tmp_path / "undisturbed"
    predict(tiles, checkpoint, undisturbed, "--dispatch", "inline")
    (tiles / "JAX_tile02_RGB.tif").unlink()
    (tiles / "JAX_tile02_RGB.j2k").write_bytes(b"\xff\x4f\xff\x51 and then nothing")
    out = tmp_path / "out"
    assert predict(tiles, checkpoint, out, "--dispatch", "inline") == 1
    assert "JAX_tile02_RGB.j2k" in capsys.readouterr().err
    rest = {name: data for name, data in outputs(undisturbed).items() if "tile02" not in name}
    assert outputs(out) == rest
    (told,) = (out / ".geopose-predict" / "failures.jsonl").read_text().splitlines()
    assert json.loads(told)["key"] == "JAX_tile02"


def test_another_checkpoint_does_not_go_on_in_a_finished_folder(
    tiles: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    predict(tiles, checkpoint, out, "--dispatch", "inline", "--limit", "2")
    assert len(outputs(out)) == 4
    assert predict(tiles, checkpoint, out, "--dispatch", "inline", "--net.tta", "flips") == 2
    assert "predictions there have other net" in capsys.readouterr().err
    assert (
        predict(tiles, checkpoint, out, "--dispatch", "inline", "--net.tta", "flips", "--overwrite", "true")
        == 0
    )


def test_metres_on_request(tiles: Path, checkpoint: Path, tmp_path: Path) -> None:
    cm, m = tmp_path / "cm", tmp_path / "m"
    predict(tiles, checkpoint, cm, "--dispatch", "inline", "--limit", "1")
    predict(tiles, checkpoint, m, "--dispatch", "inline", "--limit", "1", "--unit", "m")
    metres = tifffile.imread(m / "JAX_tile00_AGL.tif")
    assert metres.dtype == np.float32
    np.testing.assert_allclose(metres, tifffile.imread(cm / "JAX_tile00_AGL.tif") / 100, atol=0.0051)
    converted = tmp_path / "converted"
    assert cli.main(["convert", "--predictions", str(m), "--out", str(converted), "--from", "m"]) == 0
    assert outputs(converted) == outputs(cm)


def test_sources(tiles: Path, tmp_path: Path, checkpoint: Path) -> None:
    def keys(source: Path, **options: object) -> list[str]:
        return [
            tile.key
            for tile in find_source(PredictRecipe(str(source), [checkpoint], tmp_path, **options)).tiles
        ]  # type: ignore[arg-type]

    assert keys(tiles / "JAX_tile03_RGB.tif") == ["JAX_tile03"]
    assert keys(tiles, limit=3) == ["JAX_tile00", "JAX_tile01", "JAX_tile02"]
    challenge = tmp_path / "challenge"
    challenge.mkdir()
    shutil.copytree(tiles, challenge / "test_rgbs")
    (challenge / "train").mkdir()
    shutil.copy(tiles / "JAX_tile00_RGB.tif", challenge / "train" / "ARG_other_RGB.tif")
    assert len(keys(challenge)) == 7
    assert keys(challenge, split="train") == ["ARG_other"]
    assert len(keys(challenge, split="all")) == 8
    with pytest.raises(UserError, match="none of 7 tiles is of split 'val'"):
        keys(tiles, split="val")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="not an image by its name"):
        keys(tmp_path / "notes.txt")


def test_shards_give_what_their_folder_gives(
    tiles: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    shutil.rmtree(tiles)
    write_tiles(tiles, 3)
    for key in ("JAX_tile00", "JAX_tile01", "JAX_tile02"):
        tifffile.imwrite(tiles / f"{key}_AGL.tif", np.zeros((128, 128), np.uint16))
        (tiles / f"{key}_VFLOW.json").write_text('{"scale": 0.01, "angle": 1}')
    assert cli.main(["pack", "--source", str(tiles), "--out", str(shards), "--workers", "1"]) == 0
    capsys.readouterr()
    assert predict(shards, checkpoint, tmp_path / "a", "--dispatch", "inline") == 2
    assert "no split test in these shards; name one by --split: train" in capsys.readouterr().err
    options = ("--dispatch", "inline", "--net.enlarge", "bilinear")  # guided wants the full-size image
    assert predict(shards, checkpoint, tmp_path / "a", *options, "--split", "train") == 0
    assert predict(tiles, checkpoint, tmp_path / "b", *options) == 0
    assert tifffile.imread(tmp_path / "a" / "JAX_tile00_AGL.tif").shape == (128, 128)  # at full resolution
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")


def test_real_jpeg2000_is_predicted_and_the_15_bit_one_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not REAL.is_dir():
        pytest.skip("the real images of ../shared/real are not here")
    folder = tmp_path / "real"
    folder.mkdir()
    shutil.copy(REAL / "jpeg2000" / "sentinel2_343.jp2", folder / "S2_good_RGB.jp2")
    shutil.copy(REAL / "jpeg2000" / "sentinel2_15bit_1830.jp2", folder / "S2_bits_RGB.jp2")
    out = tmp_path / "out"
    assert predict(folder, checkpoint, out, "--dispatch", "inline") == 1
    assert "S2_bits_RGB.jp2" in capsys.readouterr().err
    assert tifffile.imread(out / "S2_good_AGL.tif").shape == (343, 343)


def test_batches_are_cut_from_the_sorted_list_and_parts_keep_their_slots() -> None:
    items = fix_batches([TileSource(key) for key in "dbca"], 3)
    assert [item.keys for item in items] == [["a", "b", "c"], ["d"]]
    assert [part.tiles.index(TileSource(key)) for part, key in zip(items[0].parts(), "abc", strict=True)] == [
        0,
        1,
        2,
    ]


# Real kills.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ray", pytest.param("process", marks=pytest.mark.soak)])
def test_killed_actor_and_killed_driver_leave_the_same_files(
    kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "tiles"
    write_tiles(source, 200)
    undisturbed = tmp_path / "undisturbed"
    assert predict(source, checkpoint, undisturbed, "--dispatch", "inline") == 0
    out, log = tmp_path / "out", tmp_path / "log"
    first = start(source, checkpoint, out, log, "--dispatch", kind)
    wait_for_files(out, 6, first)
    assert first.poll() is None, log.read_text()
    victims = actor_processes(first.pid, kind)
    assert victims
    os.kill(victims[-1], signal.SIGKILL)
    wait_for_files(out, 20, first)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    wait_until_gone(victims)  # orphans notice that their driver is gone
    assert len(list(out.glob("*_AGL.tif"))) < 200, "it was too fast to be killed in the middle"
    second = start(source, checkpoint, out, log, "--dispatch", kind)
    assert second.wait(timeout=300) == 0, log.read_text()
    assert "200 of 200 tiles predicted" in log.read_text()
    assert outputs(out) == outputs(undisturbed)


@pytest.mark.slow
def test_a_node_of_a_cluster_dies_and_the_files_are_the_same(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    source, undisturbed, out, log = (tmp_path / name for name in ("tiles", "undisturbed", "out", "log"))
    write_tiles(source, 300)
    assert predict(source, checkpoint, undisturbed, "--dispatch", "inline") == 0
    with two_nodes(monkeypatch) as (address, cluster):
        job = start(source, checkpoint, out, log, "--ray-address", address)
        wait_for_files(out, 20, job)
        assert job.poll() is None, log.read_text()
        lose_a_node(cluster)
        assert job.poll() is None, "it was too fast to lose a node in the middle"
        assert job.wait(timeout=300) == 0, log.read_text()
    assert "predict, 2 ray actors" in log.read_text()
    assert outputs(out) == outputs(undisturbed)


@pytest.mark.slow
def test_ray_writes_what_inline_writes_and_counts_clipped(
    tiles: Path, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--net.tta", "flips", "--net.agl_max_m", "3", "--net.scale_min_px_per_m", "2")
    assert predict(tiles, checkpoint, tmp_path / "inline", "--dispatch", "inline", *options) == 0
    assert predict(tiles, checkpoint, tmp_path / "ray", "--workers", "2", *options) == 0
    assert outputs(tmp_path / "ray") == outputs(tmp_path / "inline")
    assert "heights clipped to 0 .. 3 m; 7 scales limited to 2 .. 3 px/m" in capfd.readouterr().out


def test_help_is_quick_and_knows_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys, geopose_dist.infer.recipe; assert not {'torch', 'ray', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_parts_of_an_item_are_items(checkpoint: Path) -> None:
    item = WorkItem((TileSource("a"), None, TileSource("c")))
    assert item.keys == ["a", "c"]
    assert [part.keys for part in item.parts()] == [["a"], ["c"]]


@pytest.mark.parametrize("name", ["cpu", "best", "gpu"])
def test_shipped_recipes_run(name: str, tiles: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--config", f"predict/{name}", "--dispatch", "inline", "--limit", "1", "--device", "cpu")
    assert predict(tiles, checkpoint, out, *options) == 0
    assert len(outputs(out)) == 2


def test_a_gpu_that_is_not_there_is_one_sentence(
    tiles: Path, checkpoint: Path, tmp_path: Path, no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--source", str(tiles), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    assert cli.main(["predict", *words, "--device", "cuda", "--dispatch", "inline"]) == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_a_csv_list_names_tiles_and_every_wrong_line_is_told(
    tiles: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "list.csv"
    table.write_text("id,rgb,gsd\na,tiles/JAX_tile02_RGB.tif,0.5\nb,tiles/JAX_tile00_RGB.tif,\n")
    found = find_source(PredictRecipe(str(table), [checkpoint], tmp_path)).tiles
    assert [tile.key for tile in found] == ["JAX_tile00", "JAX_tile02"]
    assert [tile.tile.gsd_m for tile in found if tile.tile] == [None, 0.5]
    assert predict(table, checkpoint, tmp_path / "out", "--dispatch", "inline") == 0
    assert len(outputs(tmp_path / "out")) == 4
    table.write_text(
        "rgb,gsd\ntiles/none.tif,1\ntiles/JAX_tile00_RGB.tif,far\ntiles/JAX_tile01_RGB.tif,\n"
        "tiles/JAX_tile01_RGB.tif,\nlist.csv,\n"
    )
    capsys.readouterr()
    assert predict(table, checkpoint, tmp_path / "out2", "--dispatch", "inline") == 2
    said = capsys.readouterr().err
    for sentence in (
        "4 lines cannot be predicted",
        "line 2: no file",
        "line 3: gsd is 'far'",
        "line 5: a second tile named JAX_tile01",
        "line 6: list.csv is no image",
    ):
        assert sentence in said
    table.write_text("image\nx\n")
    assert predict(table, checkpoint, tmp_path / "out2", "--dispatch", "inline") == 2
    assert "wanted one named rgb or path or file" in capsys.readouterr().err


def test_shards_behind_a_url_give_what_the_folder_gives(
    train_shards: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ("--split", "val", "--dispatch", "inline")
    torch.manual_seed(0)
    recipe = ModelRecipe(encoder="tu-mobilenetv3_small_050", decoder_channels=[16, 16, 8, 8, 8])
    save_weights(tmp_path / "n.safetensors", GeoposeNet(recipe).state_dict(), recipe, {"reduction": 1})
    assert predict(train_shards, tmp_path / "n.safetensors", tmp_path / "folder", *options) == 0
    with serve(train_shards) as (url, _):
        words = ["--source", url, "--checkpoint", str(tmp_path / "n.safetensors"), "--device", "cpu"]
        words += ["--out", str(tmp_path / "url"), "--batch", "2", "--threads", "1", *options]
        assert cli.main(["predict", *words]) == 0
    assert len(outputs(tmp_path / "url")) == 8
    assert outputs(tmp_path / "url") == outputs(tmp_path / "folder")


@pytest.mark.slow
def test_shards_in_an_object_store_give_what_the_folder_gives(
    train_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("moto.server", reason="moto, the S3 server of these tests, is not installed")
    for name, value in s3_server.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    net = save_tiny_net(tmp_path / "n.safetensors", reduction=1)
    options = (
        "--split",
        "val",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--batch",
        "2",
        "--checkpoint",
        str(net),
    )
    with s3_server.serve("tiles") as endpoint:
        s3_server.upload(train_shards, "s3://tiles/some/where", endpoint)
        store = ("--source", "s3://tiles/some/where", "--store.endpoint", endpoint)
        for name, source, dispatch in (
            ("folder", ("--source", str(train_shards)), "inline"),
            ("s3", store, "process"),  # workers of their own reach the store
        ):
            words = [*source, *options, "--out", str(tmp_path / name), "--dispatch", dispatch]
            assert cli.main(["predict", *words]) == 0
    assert len(outputs(tmp_path / "s3")) == 8
    assert outputs(tmp_path / "s3") == outputs(tmp_path / "folder")


def test_tiles_are_reduced_as_packing_reduces_them(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By area, in the network's factor; test_wavelet.py has the other filter."""
    make_dataset(tmp_path / "made", 3, size=128)
    data = tmp_path / "data"
    shutil.copytree(tmp_path / "made" / "train", data)
    words = ["--source", str(data), "--out", str(tmp_path / "shards"), "--reduce", "2", "--workers", "1"]
    assert cli.main(["pack", *words]) == 0
    options = ("--dispatch", "inline", "--net.enlarge", "bilinear")
    assert predict(tmp_path / "shards", checkpoint, tmp_path / "a", *options, "--split", "train") == 0
    assert predict(data, checkpoint, tmp_path / "b", *options) == 0
    assert len(outputs(tmp_path / "a")) == 6
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")
    # Other pixels would give other heights: by nearest neighbours the same network says something else.
    for path in sorted(data.glob("*_RGB.*")):
        rgb = images.read_rgb(path)[::2, ::2].repeat(2, 0).repeat(2, 1)
        path.unlink()
        tifffile.imwrite(path.with_suffix(".tif"), rgb)
    assert predict(data, checkpoint, tmp_path / "c", *options) == 0
    assert outputs(tmp_path / "c") != outputs(tmp_path / "b")
    assert "another filter" not in capsys.readouterr().out
