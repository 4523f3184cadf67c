"""The manifest and index of a folder of shards: what is written is opened, and mismatches are refused."""

import dataclasses
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from geopose_dist.data import manifest as manifests
from geopose_dist.data.manifest import INDEX_DTYPE, Manifest, Shard
from geopose_dist.data.plan import Plan
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.errors import UserError

SHARDS = [
    Shard("train-000000.tar", "train", 3, 30000, "aa"),
    Shard("train-000001.tar", "train", 2, 20000, "bb"),
    Shard("val-000000.tar", "val", 4, 40000, "cc"),
]
MANIFEST = Manifest(SHARDS, ["ARG", "JAX"], {"train": {"ARG": {"tiles": 5}}}, {"reduce": 2})


def index_of(rows: int) -> manifests.Index:
    index = np.zeros(rows, INDEX_DTYPE)
    index["offset"] = np.arange(rows) * 10_000
    index["crc32"] = np.arange(rows) * 7
    index["shard"] = [0, 0, 0, 1, 1, 2, 2, 2, 2][:rows]
    return index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    manifests.write(tmp_path, MANIFEST, index_of(9))
    return tmp_path


def test_what_is_written_is_read(folder: Path) -> None:
    assert manifests.read_manifest(folder) == MANIFEST
    train, val = (manifests.open_split(folder, split) for split in ("train", "val"))
    assert (len(train), train.shard_sizes(), len(val), val.shard_sizes()) == (5, [3, 2], 4, [4])
    np.testing.assert_array_equal(val.index, index_of(9)[5:])
    assert isinstance(val.index, np.memmap)
    facts = json.loads((folder / "manifest.json").read_text())
    assert facts["samples"] == 9
    assert facts["splits"] == {"train": 5, "val": 4}


def test_the_same_shards_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    manifests.write(again, MANIFEST, index_of(9))
    for name in ("manifest.json", "index.npy"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_the_fingerprint_names_samples_and_their_order(folder: Path) -> None:
    train = manifests.open_split(folder, "train")
    names = {train.fingerprint(), manifests.open_split(folder, "val").fingerprint()}
    names.add(dataclasses.replace(train, index=train.index[::-1]).fingerprint())
    changed = dataclasses.replace(SHARDS[1], sha256="bc")
    names.add(
        dataclasses.replace(
            train, manifest=dataclasses.replace(MANIFEST, shards=[SHARDS[0], changed])
        ).fingerprint()
    )
    assert len(names) == 4
    other_val = dataclasses.replace(
        MANIFEST, shards=[*SHARDS[:2], dataclasses.replace(SHARDS[2], sha256="x")]
    )
    assert dataclasses.replace(train, manifest=other_val).fingerprint() == train.fingerprint()


def refusal(folder: Path, split: str = "train") -> str:
    with pytest.raises(UserError) as refused:
        manifests.open_split(folder, split)
    return str(refused.value)


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    assert "run it again" in refusal(tmp_path)


def test_an_unknown_split_is_refused_with_the_known(folder: Path) -> None:
    assert re.search("no split 'test'.*train, val", refusal(folder, "test"))


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"schema": 1}', b'{"schema": 1, "shards": [{"name": "a"}]}']
)
def test_a_damaged_manifest_is_refused(folder: Path, damage: bytes) -> None:
    (folder / "manifest.json").write_bytes(damage)
    assert str(folder / "manifest.json") in refusal(folder)


def test_a_manifest_of_another_version_says_both(folder: Path) -> None:
    facts = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**facts, "schema": 9}))
    assert "schema 9, this program reads 1" in refusal(folder)


def test_an_index_of_other_shards_is_refused(folder: Path) -> None:
    np.save(folder / "index.npy", index_of(8))
    assert "wanted (9,)" in refusal(folder)
    np.save(folder / "index.npy", np.zeros(9))
    assert "does not belong" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 7, 100])
def test_an_index_cut_short_is_refused(folder: Path, keep: int) -> None:
    path = folder / "index.npy"
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refusal(folder)


def test_an_index_never_loads_objects(folder: Path) -> None:
    np.save(folder / "index.npy", np.array([{}] * 9, object), allow_pickle=True)
    assert str(folder / "index.npy") in refusal(folder)


def test_a_part_of_a_split_is_its_first_samples(folder: Path) -> None:
    train = manifests.open_split(folder, "train")
    for samples, sizes in ((1, [1]), (3, [3]), (4, [3, 1]), (5, [3, 2])):
        part = train.first(samples)
        assert (len(part), part.shard_sizes()) == (samples, sizes)
        assert (part.fingerprint() == train.fingerprint()) == (samples == 5)
    assert train.first(0) is train
    with pytest.raises(UserError, match=r"samples is 6.*has 5"):
        train.first(6)


@pytest.mark.slow
def test_ten_million_samples_start_in_a_second(tmp_path: Path):
    """2 * 10^5 shards: opening, planning and finding any sample costs less than a second, as an epoch's start."""
    shards, each = 200_000, 50
    listed = [Shard(f"train-{n:06d}.tar", "train", each, 1 << 27, "0" * 64) for n in range(shards)]
    index = np.zeros(shards * each, INDEX_DTYPE)
    index["shard"] = np.repeat(np.arange(shards, dtype=np.uint32), each)
    index["offset"] = np.tile(np.arange(each, dtype=np.uint64) * 2_500_000, shards)
    index["length"] = 2_500_000
    manifests.write(tmp_path, Manifest(listed, ["ARG"], {}, {}), index)
    del index, listed

    def open_and_plan() -> float:
        began = time.process_time()
        shard_set = open_shards(str(tmp_path), "train")
        reader = Reader(shard_set)
        opened = time.process_time() - began
        assert reader.where(9_999_999).endswith("train-199999.tar, offset 122500000")
        return opened

    def seek(plan: Plan) -> float:
        began = time.process_time()
        for position in range(7 * plan.samples, 7 * plan.samples + 1024):
            plan.sample_at(position)
        return time.process_time() - began

    opening = open_and_plan()
    shard_set = open_shards(str(tmp_path), "train")
    began = time.process_time()
    plan = Plan.of(shard_set, seed=1)
    planning = time.process_time() - began
    blocks = Plan.of(shard_set, seed=1, order="block:16")
    starts = min(seek(plan) for _ in range(3)), min(seek(blocks) for _ in range(3))
    print(
        f"opening {opening:.2f} s, planning {planning:.2f} s, 1024 samples {starts[0]:.3f} and {starts[1]:.3f} s"
    )
    assert max(starts) < 1
    assert opening + planning < 5  # 0.9 + 0.2 s of CPU time, measured beside other work
