"""Packing straight to an object store (moto's S3 server): the bytes of a local packing, resumable, checked."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import range_server
import s3_server
from packs import hashes, run_pack, spoil
from tars import tile, write_shards
from tiles import make_dataset

from geopose_dist import pool
from geopose_dist.data import resample, stores
from geopose_dist.data.object_store import ObjectStore
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.errors import FinishedWithFailures, UserError
from shards import index_only, layouts, verify
from shards.pack_recipe import PackRecipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    before = {name: os.environ.get(name) for name in s3_server.CREDENTIALS}
    os.environ.update(s3_server.CREDENTIALS)
    with s3_server.serve("packs") as address:
        yield address
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def store(endpoint) -> StoreRecipe:
    return StoreRecipe(endpoint=endpoint, retries=1)


@pytest.fixture
def bucket(request) -> str:
    return f"s3://packs/{request.node.name.replace('[', '-').replace(']', '')}"


@pytest.fixture
def dataset(tmp_path) -> Path:
    make_dataset(tmp_path / "data", 10, test=2)
    return tmp_path / "data"


def objects(url: str, store: StoreRecipe) -> dict[str, bytes]:
    """Objects right below a prefix."""
    client = stores.open_store(url, store)
    return {name: b"".join(client.stream(name)) for name, _ in client.list()}


def test_a_store_gets_what_a_folder_gets(dataset, tmp_path, bucket, store, capsys, monkeypatch):
    run_pack(dataset, tmp_path / "local")
    scratch = tmp_path / "scratch"
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = re.sub(r"[^\w.]", "_", socket.gethostname())
    left = {
        "of a killed packing": scratch / f"geopose-pack-{host}-{ended.pid}-abc",
        "of one that lives": scratch / f"geopose-pack-{host}-{os.getpid()}-abc",
        "of another machine": scratch / f"geopose-pack-{host}x-{ended.pid}-abc",
    }
    for folder in left.values():
        folder.mkdir(parents=True)
    on_disk = []
    put_file = ObjectStore.put_file

    def watched(self, name: str, path: Path) -> None:
        on_disk.append(sorted(p.name for p in scratch.rglob("*") if p.is_file()))
        put_file(self, name, path)

    monkeypatch.setattr(ObjectStore, "put_file", watched)
    run_pack(dataset, bucket, store=store, scratch=str(scratch), workers=2)
    found = objects(bucket, store)
    assert found == {name: (tmp_path / "local" / name).read_bytes() for name in hashes(tmp_path / "local")}
    # Never more than the one shard that is on its way, and nothing in the end.
    assert on_disk == [[name] for name in sorted(found) if name.endswith(".tar")]
    assert sorted(scratch.iterdir()) == sorted([left["of one that lives"], left["of another machine"]])
    # Again: nothing is sent but bookkeeping.
    on_disk.clear()
    run_pack(dataset, bucket, store=store, scratch=str(scratch))
    assert on_disk == []
    # What comes back is what was packed.
    tiles = {tile.key: tile for tile in layouts.read_layout(dataset)}
    reader = Reader(open_shards(bucket, "train", store))
    for index in range(len(reader)):
        view = reader.view(index)
        np.testing.assert_array_equal(view.rgb, resample.reduce_rgb(layouts.load_rgb(tiles[view.key]), 2))


def test_verify_looks_at_objects(dataset, tmp_path, bucket, store, capsys):
    run_pack(dataset, bucket, store=store)
    for deep in (False, True):
        verify.run(verify.VerifyRecipe(bucket, deep=deep, workers=1, store=store))
        assert f"{bucket}: whole: 12 samples (test 2, train 10) in 5 shards" in capsys.readouterr().out
    client = stores.open_store(bucket, store)
    damaged = bytearray(b"".join(client.stream("train-000001.tar")))
    damaged[2000] ^= 1
    client.put_bytes("train-000001.tar", bytes(damaged))
    client.put_bytes("train-000002.tar", b"".join(client.stream("train-000002.tar"))[:-700])
    client.put_bytes("train-000009.tar", b"")
    client.delete("test-000000.tar")
    with pytest.raises(FinishedWithFailures) as caught:
        verify.run(verify.VerifyRecipe(bucket, workers=1, store=store))
    said = str(caught.value)
    for sentence in (
        f"{bucket}/test-000000.tar: missing (2 samples)",
        f"{bucket}/train-000001.tar: another sha256",
        f"{bucket}/train-000001.tar, offset 0, ",
        f"{bucket}/train-000002.tar: ",
        f"{bucket}/train-000009.tar: is not in the manifest",
    ):
        assert said.count(sentence) == 1, said
    with pytest.raises(UserError, match=r"absent/manifest.json: not found; wanted shards"):
        verify.run(verify.VerifyRecipe(f"{bucket}/absent", store=store))
    # Packing again mends it all, the stranger excepted.
    run_pack(dataset, bucket, store=store)
    client.delete("train-000009.tar")
    with pytest.raises(FinishedWithFailures, match=r"train-000001.tar: another sha256"):
        verify.run(verify.VerifyRecipe(bucket, workers=1, store=store))


def test_machines_that_share_nothing_but_the_bucket(dataset, tmp_path, bucket, store, capsys):
    """Each has its own copy of the source, elsewhere and with other times."""
    run_pack(dataset, tmp_path / "local")
    for part in (1, 2, 3):
        copy = tmp_path / f"machine-{part}" / "data"
        shutil.copytree(dataset, copy, copy_function=shutil.copyfile)
        assert stores.open_store(bucket, store).size("manifest.json") is None
        run_pack(copy, bucket, store=store, part=f"{part}/3")
    assert capsys.readouterr().err.count("the last part writes the manifest") == 2
    assert objects(bucket, store) == {
        name: (tmp_path / "local" / name).read_bytes() for name in hashes(tmp_path / "local")
    }
    # A label that was mended is noticed by its content, and the manifest is gone while its shard is replaced.
    label = sorted((tmp_path / "machine-1" / "data" / "train").glob("*_VFLOW.json"))[0]
    label.write_text('{"scale": 0.011, "angle": 2.5}')
    run_pack(tmp_path / "machine-1" / "data", bucket, store=store, part="1/3")
    run_pack(tmp_path / "machine-1" / "data", bucket, store=store)
    shutil.copyfile(label, dataset / "train" / label.name)
    run_pack(dataset, tmp_path / "fresh")
    assert objects(bucket, store) == {
        name: (tmp_path / "fresh" / name).read_bytes() for name in hashes(tmp_path / "fresh")
    }


def test_tasks_of_a_cluster_write_to_the_store_themselves(dataset, tmp_path, bucket, store, monkeypatch):
    """Ray carries jobs by pickle: here, too, and each is done by somebody who has nothing but the job."""

    def ray_map(function, items, *, address, workers):
        for item in items:
            yield pickle.loads(pickle.dumps(function))(pickle.loads(pickle.dumps(item)))

    monkeypatch.setattr(pool, "ray_map", ray_map)
    run_pack(dataset, tmp_path / "local")
    run_pack(dataset, bucket, store=store, ray_address="auto")
    assert objects(bucket, store) == {
        name: (tmp_path / "local" / name).read_bytes() for name in hashes(tmp_path / "local")
    }


def test_the_manifest_goes_before_shards_are_replaced(dataset, bucket, store, monkeypatch):
    run_pack(dataset, bucket, store=store)
    client = stores.open_store(bucket, store)
    client.delete("train-000001.tar")
    seen = []

    def fails(self, name: str, path: Path) -> None:
        seen.append((name, client.size("manifest.json")))
        raise stores.failure(name, "503", store)

    monkeypatch.setattr(ObjectStore, "put_file", fails)
    with pytest.raises(FinishedWithFailures, match=r"train-000001\.tar: the store failed 2 times"):
        run_pack(dataset, bucket, store=store)
    assert seen == [("train-000001.tar", None)]


def test_an_upload_that_arrives_otherwise_is_noticed(dataset, bucket, store, monkeypatch):
    def flips(self, name: str, path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[data.rindex(b"qoif") + 40] ^= 1
        self.put_bytes(name, bytes(data))

    def shortens(self, name: str, path: Path) -> None:
        self.put_bytes(name, path.read_bytes()[:-512])

    for wrong in (flips, shortens):
        monkeypatch.setattr(ObjectStore, "put_file", wrong)
        with pytest.raises(FinishedWithFailures, match=r"test-000000.tar: the store holds \d+ bytes of it"):
            run_pack(dataset, bucket, store=store)
        assert stores.open_store(f"{bucket}/.pack/records", store).list() == []


def test_damaged_tiles_are_shared_by_the_parts(dataset, tmp_path, bucket, store):
    said = spoil(dataset)
    for part in ("1/2", "2/2", "1/2", "2/2"):
        with contextlib.suppress(FinishedWithFailures):  # whichever part is last says it
            run_pack(dataset, bucket, store=store, part=part, skip_damaged=5)
    with pytest.raises(FinishedWithFailures) as failures:
        run_pack(dataset, tmp_path / "alone", skip_damaged=5)
    assert all(key in str(failures.value) for key in said)
    assert objects(bucket, store) == {
        name: (tmp_path / "alone" / name).read_bytes() for name in hashes(tmp_path / "alone")
    }


@pytest.mark.slow
def test_killed_and_run_again_it_goes_on(tmp_path, bucket, store, endpoint):
    make_dataset(tmp_path / "data", 30, size=256)
    run_pack(tmp_path / "data", tmp_path / "whole")
    words = ["--source", tmp_path / "data", "--out", bucket, "--shard-samples", 3, "--workers", 2]
    words += ["--scratch", tmp_path / "scratch", "--store.endpoint", endpoint]
    command = [sys.executable, "-m", "geopose_dist", "pack", *map(str, words)]
    records = stores.open_store(f"{bucket}/.pack/records", store)
    for wanted in (1, 4):
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 60
        while len(records.list()) < wanted and time.monotonic() < limit:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert len(records.list()) >= wanted
    assert stores.open_store(bucket, store).size("manifest.json") is None, "too fast to be killed"
    subprocess.run(command, cwd=ROOT, check=True)
    assert objects(bucket, store) == {
        name: (tmp_path / "whole" / name).read_bytes() for name in hashes(tmp_path / "whole")
    }
    assert not list((tmp_path / "scratch").iterdir())  # what the killed ones left is swept up


def test_foreign_shards_are_indexed_in_their_store_or_from_it(tmp_path, bucket, store):
    keys = write_shards(tmp_path / "tars", [3, 4])
    for name in ("manifest.json", "index.npy"):
        (tmp_path / "tars" / name).unlink()
    client = stores.open_store(bucket, store)
    for path in (tmp_path / "tars").glob("*.tar"):
        client.put_file(path.name, path)
    index_only.run(
        PackRecipe(source=bucket, out=str(tmp_path / "index"), index_only=True, store=store, workers=1)
    )
    assert client.size("manifest.json") is None
    assert sorted(p.name for p in (tmp_path / "index").iterdir()) == ["index.npy", "manifest.json"]
    reader = Reader(open_shards(str(tmp_path / "index"), "train", store))
    assert sorted(reader.key(i) for i in range(len(reader))) == sorted(keys)
    verify.run(verify.VerifyRecipe(str(tmp_path / "index"), deep=True, workers=1, store=store))
    index_only.run(PackRecipe(out=bucket, index_only=True, store=store, workers=1))
    verify.run(verify.VerifyRecipe(bucket, deep=True, workers=1, store=store))
    assert json.loads(objects(bucket, store)["manifest.json"])["recipe"] == {"index_only": True}
    with pytest.raises(UserError, match="only a URL may be named by --source"):
        index_only.run(PackRecipe(source=str(tmp_path / "tars"), out=str(tmp_path / "i"), index_only=True))
    with pytest.raises(UserError, match=r"empty: no \*.tar in it"):
        index_only.run(PackRecipe(out=f"{bucket}/empty", index_only=True, store=store, workers=1))


@pytest.mark.slow
def test_foreign_shards_of_a_web_server_are_named_by_braces(tmp_path):
    keys = write_shards(tmp_path / "www" / "tars", [3, 4, 2])
    for name in ("manifest.json", "index.npy"):
        (tmp_path / "www" / "tars" / name).unlink()
    cached = StoreRecipe(cache_dir=str(tmp_path / "cache"), retries=1, backoff_s=0.01)

    def index(names: str, out: str) -> None:
        source = f"{address}/tars/{names}"
        index_only.run(
            PackRecipe(source=source, out=str(tmp_path / out), index_only=True, store=cached, workers=1)
        )

    with range_server.serve(tmp_path / "www") as (address, acts):
        index("train-{000000..000001}.tar", "two")
        reader = Reader(open_shards(str(tmp_path / "two"), "train", cached))
        assert [reader.key(i) for i in range(len(reader))] == keys[:7]
        assert np.array_equal(reader.view(5).rgb, tile(5, (16, 24))[0])
        index("train-000002.tar", "one")
        assert len(open_shards(str(tmp_path / "one"), "train", cached)) == 2
        for names, problem in {
            "train-{000000..000009.tar": "its braces do not match",
            "train-{0..9999999}.tar": "names more than 1000000 shards",
            "": "cannot be listed; name its shards, such as ",
            "train-00000{2..3}.tar": r"train-000003\.tar: not found",
        }.items():
            with pytest.raises(UserError, match=problem):
                index(names, "bad")
        assert not (tmp_path / "bad" / "manifest.json").exists()
        acts.always = "cut"
        with pytest.raises(
            FinishedWithFailures, match=r"train-000002\.tar, offset \d+: the store failed 2 times"
        ):
            index("train-000002.tar", "cut")


def test_places_that_cannot_be_packed_to(dataset, tmp_path, store, monkeypatch):
    with pytest.raises(UserError, match="a web server cannot be packed to"):
        run_pack(dataset, "https://example.org/shards")
    with pytest.raises(UserError, match="is refused; wanted s3://"):
        run_pack(dataset, "ftp://example.org/shards")
    with pytest.raises(UserError, match="store answered 404"):
        run_pack(dataset, "s3://no-such-bucket/x", store=store)
    nobody = StoreRecipe(endpoint="http://127.0.0.1:9", retries=0, timeout_s=2)
    with pytest.raises(FinishedWithFailures, match=r"s3://packs/x.*: the store failed 1 times"):
        run_pack(dataset, "s3://packs/x", store=nobody)
