"""Staged shards: fetched once per machine whatever happens, checked, bounded, never served stale."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import range_server
import runs

from geopose_dist import cli
from geopose_dist.data import manifest, staging
from geopose_dist.data.manifest import INDEX_DTYPE, Manifest, Shard, ShardSet
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.errors import Preempted, UserError

SHARD_BYTES = 300_000


def store(folder: Path, **settings: object) -> StoreRecipe:
    """Settings of a machine whose disk is `folder`."""
    return StoreRecipe(cache_dir=str(folder / "cache"), stage="node", backoff_s=0.01, **settings)  # type: ignore[arg-type]


def fake_set(
    folder: Path, recipe: StoreRecipe, count: int = 4, root: str = "", shard_bytes: int = SHARD_BYTES
) -> ShardSet:
    """A split whose shards are random bytes: staging does not look into them."""
    folder.mkdir(exist_ok=True)
    shards = []
    for i in range(count):
        data = np.random.Generator(np.random.Philox(zlib.crc32(folder.name.encode()) + i)).bytes(shard_bytes)
        name = f"train-{i:06d}.tar"
        (folder / name).write_bytes(data)
        shards.append(Shard(name, "train", 1, len(data), hashlib.sha256(data).hexdigest()))
    index = np.zeros(count, INDEX_DTYPE)
    return ShardSet(
        root or str(folder), Manifest(shards, ["JAX"], {}, {}), index, "train", str(folder), recipe
    )


def test_staged_shards_give_the_same_samples(train_shards: Path, tmp_path: Path) -> None:
    """From a folder that another disk may be, and after that disk is gone."""
    far = tmp_path / "far"
    shutil.copytree(train_shards, far)
    plain = Reader(open_shards(str(train_shards), "train"))
    recipe = store(tmp_path)
    opened = open_shards(str(far), "train", recipe)
    assert staging.source_of(opened) is None  # and a reader would read where they are
    assert Reader(opened).raw(0) == plain.raw(0)
    claim = staging.stage([opened], silent=True)
    for tar in far.glob("*.tar"):
        tar.unlink()
    reader = Reader(opened)
    assert [reader.raw(i) for i in range(len(reader))] == [plain.raw(i) for i in range(len(plain))]
    claim.close()


def test_a_replaced_shard_is_another_file(tmp_path: Path) -> None:
    """Same folder, same name, same size: the sha256 of the new manifest names another copy."""
    recipe = store(tmp_path)
    before = fake_set(tmp_path / "a", recipe)
    staging.stage([before], silent=True)
    data = bytes(SHARD_BYTES)
    (tmp_path / "a" / "train-000001.tar").write_bytes(data)
    shards = list(before.manifest.shards)
    shards[1] = dataclasses.replace(shards[1], sha256=hashlib.sha256(data).hexdigest())
    after = dataclasses.replace(before, manifest=dataclasses.replace(before.manifest, shards=shards))
    assert staging.source_of(after) is None
    kept = {path.name: path.stat().st_ino for path in staging.folder_of(recipe).glob("*.tar")}
    staging.stage([after], silent=True)
    source = staging.source_of(after)
    assert source is not None
    assert source.read("train-000001.tar", 0, SHARD_BYTES) == data
    # What is the same was not fetched again.
    assert all(
        path.stat().st_ino == kept[path.name]
        for path in staging.folder_of(recipe).glob("*.tar")
        if path.name in kept
    )


def test_another_shard_than_the_manifest_says_is_refused(tmp_path: Path) -> None:
    shard_set = fake_set(tmp_path / "a", store(tmp_path))
    (tmp_path / "a" / "train-000002.tar").write_bytes(bytes(SHARD_BYTES))
    with pytest.raises(
        UserError, match=r"train-000002.tar: 300000 bytes of sha256 .*another shard of that name"
    ):
        staging.stage([shard_set], silent=True)
    assert not list(staging.folder_of(shard_set.store).glob(".*.part"))  # nothing of it is gone on with


def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    shard_set = fake_set(tmp_path / "a", store(tmp_path), 1)
    for change in ({"sha256": "../../../x"}, {"name": "../x.tar"}):
        bad = dataclasses.replace(shard_set.manifest.shards[0], **change)
        facts = dataclasses.replace(shard_set.manifest, shards=[bad])
        with pytest.raises(UserError, match="pack again"):
            staging.stage([dataclasses.replace(shard_set, manifest=facts)], silent=True)


def test_the_bound_throws_out_what_nobody_uses_and_never_what_is_used(tmp_path: Path) -> None:
    recipe = store(tmp_path, stage_gb=9 * SHARD_BYTES / 1e9)
    old, used, new = (fake_set(tmp_path / name, recipe) for name in ("old", "used", "new"))
    staging.stage([old], silent=True).close()
    claim = staging.stage([used], silent=True)
    staging.stage([new], silent=True)
    assert staging.source_of(old) is None
    assert staging.source_of(used) is not None
    assert staging.source_of(new) is not None
    held = staging.stage([new], silent=True)
    with pytest.raises(
        UserError, match=r"above the limit of .* \(store.stage_gb; what other runs here use counts"
    ):
        staging.stage([old], silent=True)
    claim.close()
    staging.stage([old], silent=True)
    held.close()


def test_the_claim_of_a_killed_process_counts_no_more(tmp_path: Path) -> None:
    recipe = store(tmp_path, stage_gb=5 * SHARD_BYTES / 1e9)
    first, second = (fake_set(tmp_path / name, recipe) for name in ("first", "second"))
    pid = os.fork()
    if pid == 0:
        claim = staging.stage([first], silent=True)
        assert claim
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert list(staging.folder_of(recipe).glob(".user-*"))
    staging.stage([second], silent=True)
    assert not staging.source_of(first)


def test_a_full_disk_is_told_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_set = fake_set(tmp_path / "a", store(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=SHARD_BYTES))
    with pytest.raises(
        UserError, match=r"4 shards of .*/a take 0.001 GB more, and the disk lacks 0.001 GB of that"
    ):
        staging.stage([shard_set], silent=True)
    assert not list(staging.folder_of(shard_set.store).glob("*.tar"))


def test_each_shard_is_asked_for_once_however_many_want_it(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    fake_set(data, store(tmp_path))
    with range_server.serve(data, delay_s=0.02) as (address, acts):
        shard_set = fake_set(data, store(tmp_path), root=address)
        with ThreadPoolExecutor(4) as threads:
            claims = list(threads.map(lambda _: staging.stage([shard_set], silent=True), range(4)))
        assert acts.count(".tar") == 4
        assert len(claims) == 4


@pytest.mark.parametrize("ranges", [True, False])
def test_a_stopped_download_goes_on_where_it_was(
    tmp_path: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geopose_dist.data.stores.PIECE", 100_000)
    data = tmp_path / "data"
    data.mkdir()
    fake_set(data, store(tmp_path), 1)
    with range_server.serve(data, ranges=ranges) as (address, acts):
        shard_set = fake_set(data, store(tmp_path), 1, root=address)
        seen = iter(["", "", "SIGTERM", "SIGTERM"])
        with pytest.raises(Preempted, match="stopped by SIGTERM while shards are staged"):
            staging.stage([shard_set], lambda: next(seen, "SIGTERM") if acts.asked else "", silent=True)
        (part,) = staging.folder_of(shard_set.store).glob(".*.part")
        before = part.stat().st_size
        assert 0 < before < SHARD_BYTES
        assert staging.source_of(shard_set) is None  # half a shard is none
        acts.asked.clear()
        staging.stage([shard_set], silent=True)
        if ranges:
            assert acts.asked[0][2].startswith(f"bytes={before}-")
    source = staging.source_of(shard_set)
    assert source is not None
    assert source.read("train-000000.tar", 0, SHARD_BYTES) == (data / "train-000000.tar").read_bytes()


def test_another_process_goes_on_when_the_one_that_fetches_is_killed(tmp_path: Path) -> None:
    """kill -9 in the middle of a shard: who waited takes over at once, from where the dead one was."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    shard_set = fake_set(data, store(tmp_path), 2, shard_bytes=20_000_000)
    manifest.write(data, shard_set.manifest, shard_set.index)
    with range_server.serve(data, script=["ok", "hang"]) as (address, acts):
        words = ["-m", "geopose_dist", "stage", "--shards", address, "--store.cache-dir", str(cache)]
        folder, processes = cache / "staged", []
        try:
            for claims in (1, 2):
                processes.append(runs.python(*words, "--store.in-flight=1"))
                runs.wait_until(
                    lambda claims=claims: len(list(folder.glob(".user-*"))) == claims, processes[-1]
                )
                runs.wait_until(lambda: any(p.stat().st_size for p in folder.glob(".*.part")), processes[0])
            processes[0].send_signal(signal.SIGKILL)
            processes[0].communicate(timeout=60)
            assert not all((folder / f"{shard.sha256}.tar").is_file() for shard in shard_set.manifest.shards)
            code, said = runs.finish(processes[1])
        finally:
            for process in processes:
                process.kill()
                process.communicate(timeout=60)
    assert code == 0, said
    for shard in shard_set.manifest.shards:
        assert hashlib.sha256((folder / f"{shard.sha256}.tar").read_bytes()).hexdigest() == shard.sha256
    asked = [wanted for _, path, wanted in acts.asked if path.endswith(".tar")]
    assert (
        len(asked) <= 2 * 3 + 1
    )  # three pieces each, of which the killed one may have asked for one in vain
    assert not list(folder.glob(".*.part"))


def test_a_half_that_is_wrong_is_fetched_anew(tmp_path: Path) -> None:
    """What a power cut may leave: the right length, other bytes."""
    shard_set = fake_set(tmp_path / "a", store(tmp_path), 1)
    folder = staging.folder_of(shard_set.store)
    folder.mkdir(parents=True)
    (folder / f".{shard_set.manifest.shards[0].sha256}.part").write_bytes(bytes(1000))
    staging.stage([shard_set], silent=True)
    source = staging.source_of(shard_set)
    assert source is not None
    assert (
        source.read("train-000000.tar", 0, 1000) == (tmp_path / "a" / "train-000000.tar").read_bytes()[:1000]
    )


def test_the_verb_stages_what_a_training_recipe_names(
    train_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        json.dumps({"length": "2 steps", "data": {"shards": str(train_shards), "micro_batch": 2}})
    )
    words = ["stage", "--config", str(recipe), "--store.cache-dir", str(tmp_path / "cache")]
    assert cli.main(words) == 0
    assert "`data.store.stage: node` reads them there" in capsys.readouterr().err
    for split in ("train", "val"):
        assert staging.source_of(open_shards(str(train_shards), split, store(tmp_path))) is not None
