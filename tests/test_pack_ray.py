"""Packing on a Ray cluster: the bytes of a local packing though a worker and a node die; errors as they are."""

from __future__ import annotations

import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from packs import children, command_line, hashes, run_pack, spoil
from tiles import make_dataset
from two_nodes import lose_a_node, two_nodes

from geopose_dist import pool
from geopose_dist.data.plan import parse_order
from geopose_dist.errors import FoundProblems, UserError
from geopose_dist.evaluate.evaluate import gather

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def wait_for(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 90
    while len(list(folder.glob("*.json"))) < count and process.poll() is None:
        assert time.monotonic() < limit, f"no {count} records in {folder}"
        time.sleep(0.01)


def busy_worker(cluster: int, job: subprocess.Popen[bytes]) -> int:
    """A process of the cluster that works on an item right now: Ray calls those without one ray::IDLE."""
    while job.poll() is None:
        busy = [pid for pid in children(cluster) if b"ray::_call_there" in command_line(pid)]
        if busy:
            return busy[0]
    raise AssertionError("the job ended before a worker could be killed")


def test_a_cluster_packs_the_same_bytes_though_a_worker_and_a_node_die(tmp_path, monkeypatch):
    make_dataset(tmp_path / "data", 100, size=256)
    run_pack(tmp_path / "data", tmp_path / "local", shard_samples=1)
    records, log = tmp_path / "out" / ".pack" / "records", tmp_path / "log"
    with two_nodes(monkeypatch) as (address, cluster):
        words = ["--source", "data", "--out", "out", "--shard-samples", "1", "--ray-address", address]
        command = [sys.executable, "-m", "geopose_dist", "pack", *words]
        environment = dict(os.environ, PYTHONPATH=str(ROOT))
        with log.open("wb") as file:
            # In a folder of its own: the nodes work elsewhere, and must be told whole paths.
            job = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file, env=environment)
        wait_for(records, 5, job)
        os.kill(busy_worker(cluster.pid, job), signal.SIGKILL)
        wait_for(records, 30, job)
        assert job.poll() is None, log.read_text()
        lose_a_node(cluster)
        assert len(list(records.glob("*.json"))) < 100, "too fast to lose a node in the middle"
        assert job.wait(timeout=240) == 0, log.read_text()
    assert hashes(tmp_path / "out") == hashes(tmp_path / "local")
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_on_a_cluster_mistakes_are_sentences_and_damage_is_shared(tmp_path, monkeypatch):
    make_dataset(tmp_path / "data", 10, test=2)
    run_pack(tmp_path / "data", tmp_path / "local")
    # In a process of its own: Ray reads the token once in a process's life, and earlier tests had another.
    with (
        two_nodes(monkeypatch) as (address, _),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh,
    ):
        fresh.submit(make_mistakes, tmp_path, address).result()
    with pytest.raises(UserError, match=r"--ray-address 127.0.0.1:1: cannot be joined"):
        run_pack(tmp_path / "data", tmp_path / "third", ray_address="127.0.0.1:1", skip_damaged=5)


def make_mistakes(folder: Path, address: str) -> None:
    run_pack(folder / "data", folder / "out", ray_address=address, workers=0)
    assert hashes(folder / "out") == hashes(folder / "local")
    said = spoil(folder / "data")
    with pytest.raises(FoundProblems) as caught:
        run_pack(folder / "data", folder / "other", ray_address=address, workers=1)
    assert len(caught.value.problems) == 5
    assert all(any(key in text for text in caught.value.problems) for key in said)
    # What a task raises reaches the caller as itself.
    with pytest.raises(ValueError, match=r"^order is 'x'; wanted full, or block:K") as wrong:
        list(pool.ray_map(parse_order, ["full", "x", "block:2"], address=address))
    assert type(wrong.value) is ValueError
    assert list(pool.ray_map(operator.neg, range(20), address=address)) == [-i for i in range(20)]
    assert list(pool.ray_map(operator.neg, [], address=address)) == []
    # Tiles are scored there, too; no number depends on where.
    truth, predictions = folder / "truth", folder / "predictions"
    for path in (truth, predictions):
        path.mkdir()
    for path in sorted((folder / "data" / "train").glob("*_VFLOW.json"))[-3:]:
        heights = tifffile.imread(path.with_name(path.name.replace("_VFLOW.json", "_AGL.tif")))
        for target, values in ((truth, heights), (predictions, np.where(heights < 65535, heights, 0) + 100)):
            (target / path.name).write_bytes(path.read_bytes())
            tifffile.imwrite(target / path.name.replace("_VFLOW.json", "_AGL.tif"), values.astype(np.uint16))
    local = gather(predictions, truth).scores()
    assert gather(predictions, truth, ray_address=address).scores() == local
    assert local["r2"] < 1
