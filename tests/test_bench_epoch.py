"""`geopose bench epoch`: its verdict in staged situations, and the arithmetic of the verdict."""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiles
import torch
from range_server import serve

from geopose_dist import cli
from geopose_dist.bench import harness, verdicts
from geopose_dist.bench.verdicts import Parts
from geopose_dist.model.loss import TERMS
from geopose_dist.train.step import Stepper, StepResult
from shards import pack

PARTS = Parts(
    data=100.0,
    compute=400.0,
    both=99.0,
    wait_share=0.7,
    workers=2,
    worker_busy=0.98,
    augment_share=0.4,
    cores=16,
    on_gpu=True,
)


@pytest.fixture(autouse=True)
def threads_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "keep_to", lambda threads: None)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("epoch")
    tiles.make_dataset(folder / "tiles", 12, 256)
    pack.run(pack.PackRecipe(source=str(folder / "tiles"), out=str(folder / "shards"), reduce=1, workers=1))
    return folder / "shards"


def pretend_step(seconds: float) -> Callable[..., StepResult]:
    """A network that takes `seconds` and learns nothing."""

    def step(self: Stepper, batches: Any, number: int, first_micro_batch: int) -> StepResult:
        time.sleep(seconds)
        return StepResult(torch.zeros(()), torch.zeros(len(TERMS)), torch.zeros(()))

    return step


def bench(tmp_path: Path, shards: Path | str, *words: str) -> list[dict[str, Any]]:
    out = tmp_path / "epoch.json"
    common = ["--shards", str(shards), "--repeats", "2", "--json", str(out)]
    assert cli.main(["bench", "epoch", "--config", "smoke", *common, *words]) == 0
    rows: list[dict[str, Any]] = json.loads(out.read_text())["results"]
    return rows


@pytest.mark.slow
def test_a_slow_model_is_named(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stepper, "step", pretend_step(0.2))
    rows = bench(tmp_path, shards, "--steps", "3")
    assert [row["case"] for row in rows] == [
        "epoch, loader alone",
        "epoch, network alone",
        "epoch, end to end",
    ]
    assert rows[-1]["bound_by"] == "compute"
    assert rows[-1]["verdict"].startswith("the network on the CPU bounds this run")
    assert rows[1]["tiles_per_s"] == pytest.approx(4 / 0.2, rel=0.1)
    assert rows[2]["epoch_s"] == pytest.approx(5923 / rows[2]["tiles_per_s"])
    assert rows[-1]["data_wait_share"] < 0.3


@pytest.mark.slow
def test_too_few_workers_are_counted(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stepper, "step", pretend_step(0.001))
    rows = bench(tmp_path, shards, "--steps", "20", "--run.augment.preset", "strong")
    assert rows[-1]["bound_by"] == "workers"
    assert "the loader bounds this run" in rows[-1]["verdict"]
    assert "more worker" in rows[-1]["verdict"]
    assert rows[0]["worker_busy"] > verdicts.BUSY
    assert rows[-1]["data_wait_share"] > 0.3
    assert rows[0]["worker_cpu_ms_per_tile"] > 0


@pytest.mark.slow
def test_a_slow_store_is_told_from_busy_workers(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stepper, "step", pretend_step(0.001))
    with serve(shards, delay_s=0.1) as (address, _):
        store = ["--run.data.store.cache-gb", "0", "--run.data.store.cache-dir", str(tmp_path / "cache")]
        rows = bench(tmp_path, address, "--steps", "2", *store, "--run.data.store.in-flight", "1")
    assert rows[-1]["bound_by"] == "store"
    assert rows[-1]["verdict"].startswith("the store bounds this run: the loader delivers")
    assert "give data.store a cache" in rows[-1]["verdict"]
    assert rows[0]["worker_busy"] < verdicts.BUSY


def test_the_verdict_counts_the_workers_that_are_missing() -> None:
    said = verdicts.judge(PARTS)
    assert (
        "the loader bounds this run: it delivers 25% of what the GPU takes; 6 more workers, or augment"
        in said
    )
    assert "which takes 40% of a worker's time away" in said
    assert "free)" not in said
    assert "has 5 free)" in verdicts.judge(dataclasses.replace(PARTS, cores=8))


@pytest.mark.parametrize(
    ("changes", "bound", "words"),
    [
        ({"worker_busy": 0.1}, "store", "the store bounds this run"),
        ({"data": 1000.0}, "compute", "the GPU bounds this run: the loader alone delivers 2.5 times"),
        ({"data": 402.0}, "even", "are even"),
        ({"data": 402.0, "on_gpu": False}, "even", "network on the CPU"),
        ({"data": 2000.0, "workers": 8}, "compute", "2 workers would be enough"),
    ],
)
def test_what_bounds_follows_from_the_parts(changes: dict[str, Any], bound: str, words: str) -> None:
    parts = dataclasses.replace(PARTS, **changes)
    assert parts.bound() == bound
    assert words in verdicts.judge(parts)


def test_more_loader_never_makes_the_loader_the_bound() -> None:
    rates = [10.0, 100.0, 399.0, 400.0, 401.0, 500.0, 5000.0]
    order = {"store": 0, "workers": 0, "even": 1, "compute": 2}
    ranks = [order[dataclasses.replace(PARTS, data=rate).bound()] for rate in rates]
    assert all(a <= b for a, b in itertools.pairwise(ranks))


def test_epoch_without_a_recipe_is_refused(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "epoch", "--shards", str(shards)]) == 2
    assert "bench epoch needs --config, a training recipe such as train/base" in capsys.readouterr().err
