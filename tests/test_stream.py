"""Training data from a store, through the real loader: the same batches as from a folder, whatever befalls."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import range_server
import s3_server
from range_server import Behaviour
from tars import write_shards

from geopose_dist import cli
from geopose_dist.data.loader import LoaderFailure, evaluation_loader, train_loader
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.data.recipe import DataRecipe
from geopose_dist.data.sample import View
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.errors import UserError
from geopose_dist.report import augment_panel

COUNTS = [7, 7, 6]
STEPS = 5
SEED = 3


def stamp(view: View, generator: np.random.Generator) -> View:
    """An augmentation whose draws show in the pixels."""
    return dataclasses.replace(view, rgb=view.rgb ^ generator.integers(0, 255, dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("store") / "x"
    write_shards(place, COUNTS, (24, 24))
    (place.parent / "xyz").symlink_to(place)
    return place


@pytest.fixture
def web(folder: Path) -> Iterator[tuple[str, Behaviour]]:
    with range_server.serve(folder.parent) as (address, acts):
        yield f"{address}/x", acts


def recipe_of(place: object, cache: Path, **fields: object) -> DataRecipe:
    of_store = {f.name for f in dataclasses.fields(StoreRecipe)}
    store = {name: fields.pop(name) for name in list(fields) if name in of_store}
    quick = {"retries": 2, "timeout_s": 0.5, "backoff_s": 0.01, "cache_dir": str(cache)}
    shared = {"global_batch": 6, "micro_batch": 3, "crop_px": 24, "workers": 0} | fields
    return DataRecipe(shards=str(place), store=StoreRecipe(**quick | store), **shared)


def batches(
    recipe: DataRecipe, world: int = 1, start: int = 0, stop: int = STEPS
) -> list[tuple[list[str], bytes, bytes]]:
    """Keys, pixels and heights of every micro-batch of the stream, in its order, read by `world` ranks."""
    shard_set = open_shards(recipe.shards, "train", recipe.store)
    ranks = [
        list(train_loader(shard_set, recipe, SEED, rank, world, start, stop, stamp)) for rank in range(world)
    ]
    found = []
    for step in range(stop - start):
        of_step = [iter(rank[step]) for rank in ranks]
        for number in range(recipe.global_batch // recipe.micro_batch):
            batch = next(of_step[number % world])
            found.append((list(batch.keys), batch.rgb.numpy().tobytes(), batch.agl_cm.numpy().tobytes()))
    return found


@pytest.mark.slow
def test_a_folder_s3_and_http_give_the_same_batches(
    folder: Path, web: tuple[str, Behaviour], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url, acts = web
    for name, value in s3_server.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    ways = {"full": ((2, 1), (1, 2), (3, 0)), "block:2": ((1, 0), (1, 0), (2, 1))}  # ranks and workers
    with s3_server.serve("tiles") as endpoint:
        s3_server.upload(folder, "s3://tiles/a/b", endpoint)
        reached = {"endpoint": endpoint, "timeout_s": 20}
        for order, (in_s3, uncached, cached) in ways.items():
            expected = batches(recipe_of(folder, tmp_path, order=order))
            assert len({key for keys, *_ in expected for key in keys}) == sum(COUNTS)
            for place, (world, workers), fields in (
                ("s3://tiles/a/b", in_s3, reached),
                (url, uncached, {"cache_gb": 0}),
                (url, cached, {}),
            ):
                far = recipe_of(place, tmp_path / "cache", order=order, workers=workers, **fields)
                assert batches(far, world) == expected
            assert batches(recipe_of(url, tmp_path / "cache", order=order), start=3) == expected[6:]
    acts.ranges = False
    whole = recipe_of(url, tmp_path / "whole", order="block:2", workers=2, timeout_s=20)
    acts.asked.clear()
    assert batches(whole, 2) == batches(recipe_of(folder, tmp_path, order="block:2"))
    assert sorted(path for _, path, wanted in acts.asked if path.endswith(".tar") and not wanted) == [
        f"/x/train-00000{n}.tar" for n in range(3)
    ]


def test_without_ranges_a_block_order_fetches_each_shard_once_a_visit(
    folder: Path, web: tuple[str, Behaviour], tmp_path: Path
):
    url, acts = web
    acts.ranges = False
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    room = (2 * largest + 4096) / 1e9
    expected = batches(recipe_of(folder, tmp_path, order="block:1"), stop=3)
    tight = recipe_of(url, tmp_path / "tight", order="block:1", cache_gb=room, timeout_s=20)
    assert batches(tight, stop=3) == expected
    assert acts.count(".tar") == 1 + 3  # a look whether ranges are honoured, and every shard once
    assert sum(path.stat().st_size for path in tmp_path.glob("tight/*/whole/*")) <= 2 * largest
    plain = batches(recipe_of(url, tmp_path / "asked", order="block:1", fetch="shards"), stop=3)
    assert plain == expected


def test_without_ranges_other_orders_are_refused_with_the_k_that_fits(
    folder: Path, web: tuple[str, Behaviour], tmp_path: Path
):
    url, acts = web
    acts.ranges = False
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    fields = {"cache_gb": 5 * largest / 1e9}
    for order in ("full", "block:3"):
        with pytest.raises(
            UserError, match=rf"data\.order is {order}, .* set data\.order to block:K with K up to 2, "
        ):
            batches(recipe_of(url, tmp_path, order=order, **fields))
    with pytest.raises(UserError, match=r"store\.cache_gb is 1e-06, wanted .* with data\.order block:1"):
        batches(recipe_of(url, tmp_path, order="block:1", cache_gb=1e-6))
    assert batches(recipe_of(url, tmp_path, order="block:2", **fields), stop=1)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_faults_that_pass_change_nothing(
    folder: Path, web: tuple[str, Behaviour], tmp_path: Path, workers: int
):
    url, acts = web
    expected = batches(recipe_of(folder, tmp_path))
    # One unlucky read may meet nearly all of them.
    acts.script = ["ok", "503", "cut", "ok", "wrong", "hang", "429", "more", "500", "slow"]
    assert batches(recipe_of(url, tmp_path, workers=workers, retries=10)) == expected
    assert acts.script == []


@pytest.mark.parametrize(
    ("fault", "policy"), [("503", "stop"), ("503", "substitute"), ("hang", "stop"), ("cut", "substitute")]
)
def test_an_outage_stops_the_run_under_any_policy(
    web: tuple[str, Behaviour], tmp_path: Path, fault: str, policy: str
):
    url, acts = web
    acts.script, acts.always = ["ok"] * 5, fault
    began = time.monotonic()
    with pytest.raises(
        LoaderFailure, match=rf"^{url}/train-.*tar, offset \d+: the store failed 3 times"
    ) as caught:
        batches(recipe_of(url, tmp_path, on_damage=policy))
    assert time.monotonic() - began < 5  # three tries of half a second, and pauses
    assert "of the stream" in str(caught.value)


def test_damage_in_a_store_is_the_policys(
    folder: Path, web: tuple[str, Behaviour], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    url, acts = web
    whole = (folder / "train-000001.tar").read_bytes()
    damaged = bytearray(whole)
    damaged[3000] ^= 1
    try:
        (folder / "train-000001.tar").write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{url}/train-000001\.tar, offset 0, .*crc32 is"):
            batches(recipe_of(url, tmp_path))
        found = batches(recipe_of(url, tmp_path, on_damage="substitute"))
    finally:
        (folder / "train-000001.tar").write_bytes(whole)
    assert "is damaged" in capsys.readouterr().err
    expected = batches(recipe_of(folder, tmp_path))
    assert 0 < sum(a != b for a, b in zip(found, expected, strict=True)) <= 2  # once a visit
    (tmp_path / "lost").mkdir()
    acts.always = "403"
    with pytest.raises(UserError, match="the server answered 403"):  # a refusal is no damage
        batches(recipe_of(url, tmp_path / "lost", on_damage="substitute", fetch="samples"))


def test_a_shard_that_is_missing_or_was_replaced_is_named(
    folder: Path, web: tuple[str, Behaviour], tmp_path: Path
):
    url, _ = web
    path = folder / "train-000002.tar"
    whole = path.read_bytes()
    try:
        path.unlink()
        with pytest.raises(UserError, match=r"train-000002\.tar: not found"):
            batches(recipe_of(url, tmp_path))
        path.write_bytes(whole[:5000])
        with pytest.raises(UserError, match=r"train-000002\.tar.*(cut short|shorter)|the store failed"):
            batches(recipe_of(url, tmp_path, cache_gb=0))
        path.write_bytes((folder / "train-000000.tar").read_bytes())
        with pytest.raises(UserError, match=r"train-000002\.tar, offset \d+, .*belong to another packing"):
            batches(recipe_of(url, tmp_path, cache_gb=0))
    finally:
        path.write_bytes(whole)


def test_reads_of_a_micro_batch_are_under_way_at_once(web: tuple[str, Behaviour], tmp_path: Path):
    """30 ms of latency: a micro-batch of ten costs little more than one sample, not ten times that."""
    url, acts = web
    acts.delay_s = 0.03

    def seconds(in_flight: int) -> float:
        recipe = recipe_of(url, tmp_path, in_flight=in_flight, cache_gb=0, global_batch=10, micro_batch=10)
        shard_set = open_shards(url, "train", recipe.store)
        loader = iter(train_loader(shard_set, recipe, SEED, 0, 1, 0, 4))
        next(loader)
        began = time.monotonic()
        for _ in loader:
            pass
        return time.monotonic() - began

    acts.most_at_once = 0
    alone = seconds(1)
    assert acts.most_at_once <= 2  # one ahead, and one for a sample that comes twice
    together = statistics.median(seconds(8) for _ in range(3))
    assert acts.most_at_once >= 8
    assert alone > 3 * 10 * acts.delay_s
    assert together < alone / 2.5


def test_what_is_read_ahead_is_bounded(web: tuple[str, Behaviour], tmp_path: Path):
    url, acts = web
    recipe = recipe_of(url, tmp_path, in_flight=4, cache_gb=0, timeout_s=20)
    reader = Reader(open_shards(url, "train", recipe.store))
    acts.asked.clear()
    reader.prefetch(range(20))
    time.sleep(0.3)
    assert acts.count(".tar") == 4
    reader.raw(0)
    reader.raw(11)  # out of turn
    time.sleep(0.3)
    assert acts.count(".tar") == 6
    reader.prefetch([1, 2, 19])  # those that are here stay
    time.sleep(0.3)
    assert acts.count(".tar") == 7
    for index in (1, 2, 19):
        reader.raw(index)
    assert acts.count(".tar") == 7


def test_an_evaluation_reads_a_store_too(folder: Path, web: tuple[str, Behaviour], tmp_path: Path):
    url, acts = web
    for ranges in (True, False):
        acts.ranges = ranges
        recipe = recipe_of(url, tmp_path)
        far = open_shards(url, "train", recipe.store)
        keys = [batch.keys for batch in evaluation_loader(far, recipe, 0, 1, batch_size=4)]
        near = open_shards(str(folder), "train")
        assert keys == [
            b.keys for b in evaluation_loader(near, recipe_of(folder, tmp_path), 0, 1, batch_size=4)
        ]


def test_the_panel_finds_a_sample_in_a_store(web: tuple[str, Behaviour], tmp_path: Path):
    store = recipe_of(web[0], tmp_path).store
    assert augment_panel.find(web[0], None, store)[1] == 0
    wanted = Reader(open_shards(web[0], "train", store)).key(13)
    assert augment_panel.find(web[0], wanted, store)[1] == 13
    with pytest.raises(UserError, match=f"{web[0]}: no sample 'X' in its splits train"):
        augment_panel.find(web[0], "X", store)


def test_order_prints_what_a_store_holds(
    folder: Path, web: tuple[str, Behaviour], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    url, acts = web

    def order(place: object, *words: object) -> tuple[int, str, str]:
        cache = ("--store.cache_dir", tmp_path, "--store.backoff_s", 0.01, "--store.retries", 1)
        code = cli.main(["order", "--shards", str(place), *map(str, (*cache, *words))])
        return code, *capsys.readouterr()

    assert order(url, "--count", 30) == order(folder, "--count", 30)
    acts.always = "503"
    code, out, err = order(url, "--count", 3)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"geopose order: {url}/train-000000.tar, offset 0: the store failed 2 times")
    acts.always, acts.ranges = "ok", False
    code, out, err = order(url, "--count", 3)
    assert (code, out) == (2, "")
    assert "order is full" in err


@pytest.mark.slow
def test_a_run_trains_from_a_url(web: tuple[str, Behaviour], tmp_path: Path, geopose):
    url, out = web[0], tmp_path / "run"
    small = ("--data.global_batch", 4, "--data.micro_batch", 2, "--data.crop_px", 24, "--data.workers", 1)
    common = ("--config", "smoke", *small, "--length", "2 steps")
    done = geopose(
        "train", *common, "--data.shards", url, "--out", out, "--data.store.cache_dir", tmp_path / "cache"
    )
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert len([record["loss"] for record in lines if "loss" in record]) == 2
    stored = (out / "recipe.yaml").read_text()
    assert url in stored
    assert "cache_dir" in stored
    assert list((tmp_path / "cache").glob("*/samples/*.tar"))


def test_the_next_micro_batch_is_read_while_this_one_is_used(web: tuple[str, Behaviour], tmp_path: Path):
    """Whoever takes its time over a batch finds the next one read."""
    url, acts = web
    acts.delay_s = 0.03
    recipe = recipe_of(url, tmp_path, cache_gb=0, global_batch=4, micro_batch=4, timeout_s=20)
    shard_set = open_shards(url, "train", recipe.store)
    loader = iter(train_loader(shard_set, recipe, SEED, 0, 1, 0, 4))
    next(loader)
    waits = []
    for _ in range(3):
        time.sleep(0.2)  # a training step
        began = time.monotonic()
        next(loader)
        waits.append(time.monotonic() - began)
    assert statistics.median(waits) < acts.delay_s
    assert acts.count(".tar") == 1 + 16  # every sample once, and a look whether ranges are honoured


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.parametrize("kind", ["http", "s3"])
@pytest.mark.parametrize(
    "rounds",
    [pytest.param(75, marks=pytest.mark.slow), pytest.param(500, marks=pytest.mark.soak)],  # of 20 samples
)
def test_memory_is_flat_however_much_is_read(
    web: tuple[str, Behaviour], tmp_path: Path, kind: str, rounds: int
):
    url, acts = web
    place = url if kind == "http" else "s3://xyz"  # the shortest name that a bucket may have
    store = StoreRecipe(endpoint=url.removesuffix("/x"), anonymous=True, cache_dir=str(tmp_path), cache_gb=0)
    reader = Reader(open_shards(place, "train", store))

    def read(times: int) -> None:
        for _ in range(times):
            reader.prefetch(range(20))
            for index in range(20):
                reader.raw(index)
            acts.asked.clear()

    read(25)
    before = _resident_mb()
    read(rounds)
    assert _resident_mb() - before < 8
