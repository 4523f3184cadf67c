"""Packing that is stopped, damaged, or run again: what is whole is kept, and everything wrong is named."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packs import hashes, run_pack, spoil
from tiles import make_dataset, write_tile

from geopose_dist import cli
from geopose_dist.data import manifest
from geopose_dist.errors import FinishedWithFailures, FoundProblems, UserError
from shards import tars

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def dataset(tmp_path) -> Path:
    make_dataset(tmp_path / "data", 10, test=2)
    return tmp_path / "data"


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
    killed = [out / ".train-000000.tar.1.tmp", out / ".pack" / "records" / ".train-000000.tar.json.1.tmp"]
    for path in killed:
        path.write_bytes(b"half")
    run_pack(dataset, out)
    assert hashes(out) == before
    assert not any(path.exists() for path in killed)
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


@pytest.mark.parametrize("after", [0, 1, 9000])
def test_out_of_disk(dataset, tmp_path, monkeypatch, after):
    """The disk fills after some bytes: one sentence, no manifest, no half shard, and going on works."""
    real = tars.write_samples

    class Full(io.BufferedIOBase):
        def __init__(self, file):
            self.file = file

        def tell(self):
            return self.file.tell()

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


def test_failures_are_not_the_users_mistake():
    assert not issubclass(FinishedWithFailures, UserError)
