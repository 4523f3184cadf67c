"""What CI asks of every case of `geopose bench`: right outputs and sane ratios at small sizes; never a time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from geopose_dist.bench import compare, harness

pytestmark = pytest.mark.extra

STEP = ("--run.data.crop-px=64", "--run.data.micro-batch=2", "--steps=3")


@pytest.fixture(scope="module")
def facts(
    tmp_path_factory: pytest.TempPathFactory, train_shards: Path, geopose: Callable[..., Any]
) -> dict[str, Any]:
    """The JSON of one run of all cases that need no names, on small shards and a small network."""
    out = tmp_path_factory.mktemp("quick") / "bench.json"
    words = ["--quick", "true", "--repeats", "1", "--config", "smoke", *STEP, "--shards", train_shards]
    done = geopose("bench", *words, "--json", out, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def rows(facts: dict[str, Any], case: str) -> list[dict[str, Any]]:
    return [row for row in facts["results"] if row["case"].partition(",")[0] == case]


def test_every_case_runs_and_its_output_is_right(facts: dict[str, Any]) -> None:
    cases = {row["case"].partition(",")[0] for row in facts["results"]}
    left_out = {*harness.BY_NAME_ONLY, "epoch_benchmark"}  # its rows stand with those of epoch
    assert cases >= harness.collect().keys() - left_out
    assert facts["failed"] == []
    for case in (
        "kernels",
        "codecs",
        "augment",
        "pack",
        "loader",
        "checkpoint",
        "predict",
        "score",
        "rectify",
    ):
        told = [row.get("speedup", row.get("ratio")) for row in rows(facts, case)]
        assert any(ratio and ratio > 0 for ratio in told), f"{case} stands beside no baseline"


def test_step_stands_beside_the_benchmarks_way_and_agrees_with_it(facts: dict[str, Any]) -> None:
    first, *others = rows(facts, "step")
    assert first["case"] == "step, the benchmark's way"
    assert [row["precision"] for row in others] == ["fp32", "fp32", "bf16", "fp32"]
    for row in others:
        assert row["speedup"] == pytest.approx(row["tiles_per_s"] / first["tiles_per_s"])
        assert row["loss_off"] <= 0.05
    # A U-Net's cost: forward, and twice as much backward, for each pixel.
    assert 0.3 < first["gflop_per_tile"] < 3
    assert first["tflops"] == pytest.approx(first["tiles_per_s"] * first["gflop_per_tile"] / 1e3)


def test_epoch_stands_beside_the_benchmarks_way(facts: dict[str, Any]) -> None:
    told = [row["case"] for row in rows(facts, "epoch")]
    assert told == [
        f"epoch, {what}" for what in ("loader alone", "network alone", "end to end", "the benchmark's way")
    ]
    assert all(row["epoch_s"] == pytest.approx(5923 / row["tiles_per_s"]) for row in rows(facts, "epoch"))


def test_the_device_leaves_a_worker_less_to_do(facts: dict[str, Any]) -> None:
    for row in rows(facts, "device_augment"):
        assert row["worker_ms"] > 0 < row["device_ms"]
    assert row["shipped_mb"] > row["shipped_mb_where_workers"] > 0


def test_the_loader_stands_beside_those_that_people_use(facts: dict[str, Any]) -> None:
    found = rows(facts, "loader")
    assert len(found) == 9
    assert {row["baseline"][:3] for row in found} == {"(a)", "(b)", "our", "web"}
    assert all(row["cpu_ms"] >= 0 and row["verdict"].startswith(("ours", "reading")) for row in found)


def test_two_runs_agree_within_the_spread_that_they_print(
    tmp_path: Path, geopose: Callable[..., Any]
) -> None:
    """Neighbouring runs of one case, by the command that a user would ask; a machine may be busy in one of them."""
    last = None
    for number in range(4):
        path = tmp_path / f"{number}.json"
        assert geopose("bench", "kernels", "--repeats", 7, "--json", path).returncode == 0
        if last is not None:
            done = geopose("bench", "compare", last, path, "--check", "true")
            if done.returncode == 0:
                break
        last = path
    assert done.returncode == 0, done.stderr
    measured = compare.read(path)["results"]
    assert all(0 < row["spread"] < 3 for row in measured), "a spread that says nothing agrees with everything"
