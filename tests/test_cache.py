"""The cache of a store: bounded, shared by processes, never trusted without a checksum."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import range_server
from range_server import Behaviour
from tars import tile, write_shards

from geopose_dist.data import cache
from geopose_dist.data.cache import ShardCache, bytes_held
from geopose_dist.data.plan import resolve_city_weights
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.data.stores import StoreFailure, open_store
from geopose_dist.errors import UserError

SIZE = (16, 24)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Behaviour]]:
    """A web server with shards of 4, 3 and 2 samples at /x."""
    write_shards(tmp_path / "www" / "x", [4, 3, 2], SIZE)
    with range_server.serve(tmp_path / "www") as (address, acts):
        yield f"{address}/x", acts


def recipe_of(tmp_path: Path, **fields: object) -> StoreRecipe:
    return StoreRecipe(cache_dir=str(tmp_path / "cache"), retries=1, timeout_s=20, backoff_s=0.01, **fields)


def samples_in(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*/samples/*"))


def test_a_second_visit_asks_the_store_for_nothing(web: tuple[str, Behaviour], tmp_path: Path):
    url, acts = web
    reader = Reader(open_shards(url, "train", recipe_of(tmp_path)))
    first = [reader.view(index) for index in (8, 0, 3, 5)]
    asked = acts.count(".tar")
    assert asked == 1 + 4  # a look whether ranges are honoured, and a range each
    again = Reader(open_shards(url, "train", recipe_of(tmp_path)))
    acts.always = "503"
    for index, view in zip((8, 0, 3, 5), first, strict=True):
        assert np.array_equal(again.view(index).rgb, view.rgb)
        assert np.array_equal(view.rgb, tile(index, SIZE)[0])
    assert acts.count("/index.npy") == 1
    with pytest.raises(StoreFailure, match=r"train-000000\.tar, offset \d+: the store failed 2 times"):
        again.view(1)


def test_a_bad_copy_is_fetched_again_and_mended(web: tuple[str, Behaviour], tmp_path: Path):
    url, acts = web
    reader = Reader(open_shards(url, "train", recipe_of(tmp_path)))
    reader.view(0)
    (path,) = samples_in(tmp_path)
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    acts.asked.clear()
    assert np.array_equal(reader.view(0).rgb, tile(0, SIZE)[0])
    assert np.array_equal(reader.view(0).rgb, tile(0, SIZE)[0])
    assert acts.count(".tar") == 1


def test_a_byte_that_flips_on_the_way_is_no_damage_but_one_that_stays_is(
    web: tuple[str, Behaviour], tmp_path: Path
):
    url, acts = web
    reader = Reader(open_shards(url, "train", recipe_of(tmp_path)))
    acts.script = ["wrong"]
    assert np.array_equal(reader.view(2).rgb, tile(2, SIZE)[0])
    acts.always = "wrong"
    with pytest.raises(UserError, match=rf"{url}/train-000001\.tar, offset \d+, .*: crc32 is"):
        reader.view(5)
    acts.always = "ok"
    assert np.array_equal(reader.view(5).rgb, tile(5, SIZE)[0])  # nothing wrong was kept


def test_holes_are_misses(tmp_path: Path):
    kept = ShardCache(tmp_path, "set", 10**9)
    assert kept.sample("a.tar", 0, 10) is None
    kept.keep("a.tar", 1 << 20, b"x" * 4096)
    assert kept.sample("a.tar", 1 << 20, 4096) == b"x" * 4096
    assert kept.sample("a.tar", 0, 4096) is None
    assert kept.sample("a.tar", 2 << 20, 4096) is None
    assert kept.sample("a.tar", 1 << 20, 8192) is None
    assert bytes_held(tmp_path) <= 8192  # a sparse file


def _fill(root: Path, number: int, limit: int, count: int) -> None:
    kept = ShardCache(root, "set", limit)
    for sample in range(count):
        kept.keep(f"{number}.tar", sample * 65536, os.urandom(65536))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_limit_holds_for_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "STEP_BYTES", 1 << 18)
    limit, processes = 4 << 20, 3
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=_fill, args=(tmp_path, n, limit, 60)) for n in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert limit * 0.9 <= bytes_held(tmp_path) <= limit + processes * (1 << 18)


def test_a_full_cache_keeps_what_it_has_and_a_full_disk_is_a_full_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept = ShardCache(tmp_path, "set", 1 << 20)
    for sample in range(40):
        kept.keep("a.tar", sample * 65536, bytes([sample + 1]) * 65536)
    assert kept.sample("a.tar", 0, 65536) == bytes([1]) * 65536
    assert kept.sample("a.tar", 30 * 65536, 65536) is None
    other = ShardCache(tmp_path / "b", "set", 1 << 30)

    def no_room(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.os, "pwrite", no_room)
    other.keep("a.tar", 0, b"x" * 4096)
    assert other.sample("a.tar", 0, 4096) is None


def test_data_sets_that_nobody_has_open_make_room(tmp_path: Path):
    limit = 1 << 20
    old, held = ShardCache(tmp_path, "old", limit), ShardCache(tmp_path, "held", limit)
    for one in (old, held):
        for sample in range(6):
            one.keep("a.tar", sample * 65536, b"x" * 65536)
    del old
    new = ShardCache(tmp_path, "new", limit)
    for sample in range(30):
        new.keep("a.tar", sample * 65536, b"x" * 65536)
    assert not list((tmp_path / "old").glob("*/*"))
    assert ShardCache(tmp_path, "old", limit).sample("a.tar", 0, 65536) is None  # it may be opened again
    assert held.sample("a.tar", 0, 65536)
    assert bytes_held(tmp_path / "new" / "..") <= limit
    assert new.sample("a.tar", 5 * 65536, 65536)


def facts(folder: Path, name: str) -> tuple[int, str]:
    data = (folder / name).read_bytes()
    return len(data), hashlib.sha256(data).hexdigest()


def test_whole_shards_are_fetched_once_and_the_oldest_goes_first(web: tuple[str, Behaviour], tmp_path: Path):
    url, acts = web
    acts.ranges = False
    folder = tmp_path / "www" / "x"
    sizes = {
        name: facts(folder, name) for name in ("train-000000.tar", "train-000001.tar", "train-000002.tar")
    }
    room = sum(size for size, _ in sizes.values()) - 1
    kept = ShardCache(tmp_path / "cache", "set", room)
    store = open_store(url, recipe_of(tmp_path))
    with ThreadPoolExecutor(8) as threads:
        paths = list(
            threads.map(
                lambda _: kept.whole("train-000000.tar", store, *sizes["train-000000.tar"]), range(16)
            )
        )
    assert len(set(paths)) == 1
    assert acts.count("train-000000.tar") == 1
    assert paths[0].read_bytes() == (folder / "train-000000.tar").read_bytes()
    os.utime(kept.whole("train-000001.tar", store, *sizes["train-000001.tar"]), (1, 1))
    with paths[0].open("rb") as reading, (kept.folder / "whole" / "train-000001.tar").open("rb") as cut:
        kept.whole("train-000002.tar", store, *sizes["train-000002.tar"])
        assert not (kept.folder / "whole" / "train-000001.tar").exists()
        assert cut.read() == b""  # its space is free although somebody had it open
        assert len(reading.read()) == sizes["train-000000.tar"][0]
    assert bytes_held(tmp_path / "cache") <= room + 3 * 4096
    assert not list(kept.folder.glob("whole/.*"))


def test_a_whole_shard_is_checked_by_its_sha256(web: tuple[str, Behaviour], tmp_path: Path):
    url, acts = web
    size, sha256 = facts(tmp_path / "www" / "x", "train-000002.tar")
    store = open_store(url, recipe_of(tmp_path))
    kept = ShardCache(tmp_path / "cache", "set", 10**9)
    acts.script = ["wrong"]
    assert kept.whole("train-000002.tar", store, size, sha256).stat().st_size == size
    kept.drop_whole("train-000002.tar")
    acts.always = "wrong"
    with pytest.raises(UserError, match=r"train-000002\.tar: sha256 is .*the manifest says"):
        kept.whole("train-000002.tar", store, size, sha256)
    acts.always = "ok"
    with pytest.raises(UserError, match=rf"more than the {size - 512} bytes that the manifest says"):
        kept.whole("train-000002.tar", store, size - 512, sha256)
    with pytest.raises(UserError, match=r"no room for a shard of .* raise store\.cache_gb"):
        ShardCache(tmp_path / "small", "set", size - 1).whole("train-000002.tar", store, size, sha256)
    assert not list(tmp_path.glob("*/set/whole/*"))


FETCH = """
import sys
from pathlib import Path
from geopose_dist.data.cache import ShardCache
from geopose_dist.data.stores import open_store
folder, url, size, sha256 = sys.argv[1:]
ShardCache(Path(folder), "set", 10**9).whole("train-000000.tar", open_store(url), int(size), sha256)
"""


@pytest.mark.slow
def test_who_is_killed_while_fetching_leaves_nothing_in_the_way(web: tuple[str, Behaviour], tmp_path: Path):
    url, acts = web
    size, sha256 = facts(tmp_path / "www" / "x", "train-000000.tar")
    acts.script = ["slow"]
    command = [sys.executable, "-c", FETCH, str(tmp_path / "cache"), url, str(size), sha256]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("cache/set/whole/.*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob("cache/set/whole/.*"))
    kept = ShardCache(tmp_path / "cache", "set", size + 4096)  # no room for what was left beside it
    path = kept.whole("train-000000.tar", open_store(url), size, sha256)
    assert [found.name for found in path.parent.iterdir()] == ["train-000000.tar"]
    assert path.stat().st_size == size


def test_a_damaged_whole_shard_is_fetched_again(web: tuple[str, Behaviour], tmp_path: Path):
    url, acts = web
    acts.ranges = False
    reader = Reader(open_shards(url, "train", recipe_of(tmp_path)))
    reader.view(0)
    (path,) = (tmp_path / "cache").glob("*/whole/train-000000.tar")
    path.write_bytes(bytes(path.stat().st_size))
    assert np.array_equal(reader.view(0).rgb, tile(0, SIZE)[0])
    os.truncate(path, 100)  # cut by whoever makes room
    path.unlink()
    assert np.array_equal(reader.view(1).rgb, tile(1, SIZE)[0])


def test_no_cache_at_all(web: tuple[str, Behaviour], tmp_path: Path):
    url, _ = web
    recipe = recipe_of(tmp_path, cache_gb=0)
    reader = Reader(open_shards(url, "train", recipe))
    assert np.array_equal(reader.view(0).rgb, tile(0, SIZE)[0])
    assert samples_in(tmp_path) == []
    whole = Reader(open_shards(url, "train", dataclasses.replace(recipe, fetch="shards")))
    with pytest.raises(UserError, match=r"only be fetched in whole shards, and store\.cache_gb is 0"):
        whole.view(0)


def test_a_cache_that_cannot_be_made_is_named(web: tuple[str, Behaviour], tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be written .*store\.cache_dir"):
        open_shards(web[0], "train", StoreRecipe(cache_dir=str(tmp_path / "file")))


def test_shards_may_stay_where_a_local_manifest_says(web: tuple[str, Behaviour], tmp_path: Path):
    url, _ = web
    local = tmp_path / "local"
    local.mkdir()
    for name in ("index.npy", "manifest.json"):
        data = (tmp_path / "www" / "x" / name).read_bytes()
        text = data.replace(b'"recipe": {}', f'"recipe": {{"shards_url": "{url}"}}'.encode())
        (local / name).write_bytes(text)
    recipe = recipe_of(tmp_path)
    reader = Reader(open_shards(str(local), "train", recipe))
    assert np.array_equal(reader.view(6).rgb, tile(6, SIZE)[0])
    assert reader.where(6).startswith(f"{url}/train-000001.tar, offset ")
    (local / "manifest.json").write_bytes((local / "manifest.json").read_bytes().replace(b"http:", b"pipe:"))
    with pytest.raises(UserError, match="pipe: is refused"):
        open_shards(str(local), "train", recipe)


def test_a_row_of_the_index_cannot_claim_more_than_its_shard(tmp_path: Path):
    write_shards(tmp_path, [2], SIZE)
    index = np.load(tmp_path / "index.npy")
    for field, value in (("length", 1 << 31), ("offset", 1 << 40), ("shard", 7)):
        changed = index.copy()
        changed[field][1] = value
        np.save(tmp_path / "index.npy", changed)
        with pytest.raises(UserError, match=r"row 1 of split train names shard .* which cannot be"):
            Reader(open_shards(str(tmp_path), "train")).view(1)
    index["city"][1] = 999
    np.save(tmp_path / "index.npy", index)
    with pytest.raises(UserError, match=r"names a city 999, the manifest has 3"):
        resolve_city_weights({"*": 1}, open_shards(str(tmp_path), "train"))
