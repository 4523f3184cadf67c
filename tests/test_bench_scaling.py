"""`geopose bench scaling`: the model finds what it was made from, and tells measured points that it never saw."""

import dataclasses
import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import hosts
import numpy as np
import pytest

from geopose_dist import cli, config
from geopose_dist.bench import cases_scaling, harness, recipe
from geopose_dist.bench.scaling_model import Exchange, Fit, Network, Point, fit, least_squares, quicker
from geopose_dist.train.recipe import TrainRecipe

TRUE = Fit(efficiency=0.8, host_bytes_per_s=4e9, latency_s=2e-5, overlap=0.6)
GIGABIT = Network(1.0, 1e-4)
POINT = Point(
    ranks=2,
    micro_batches=1,
    network=GIGABIT,
    micro_batch_s=0.3,
    update_s=0.05,
    spread=0.02,
    gradient_bytes=50_000_000,
    bucket_bytes=10_000_000,
    seconds=0.0,
)


def made_exchanges(noise: float = 0.0) -> list[Exchange]:
    rng = np.random.default_rng(0)
    networks = [GIGABIT, Network(10.0, 1e-4), Network(math.inf)]
    return [
        Exchange(2, size, network, TRUE.all_reduce_s(2, size, network) * (1 + noise * rng.normal()))
        for size in (64, 2**16, 2**20, 2**23, 50_000_000)
        for network in networks
    ]


def made_points(noise: float = 0.0) -> list[Point]:
    rng = np.random.default_rng(1)
    points = [
        dataclasses.replace(POINT, network=Network(gbit, 1e-4), gradient_bytes=size)
        for gbit, size in itertools.product((0.1, 1.0, 10.0), (10_000_000, 50_000_000))
    ]
    return [dataclasses.replace(p, seconds=TRUE.step_s(p) * (1 + noise * rng.normal())) for p in points]


def test_the_fit_finds_what_the_numbers_were_made_from() -> None:
    found = fit(made_exchanges(), made_points())
    assert found.efficiency == pytest.approx(TRUE.efficiency, rel=1e-6)
    assert found.host_bytes_per_s == pytest.approx(TRUE.host_bytes_per_s, rel=1e-6)
    assert found.latency_s == pytest.approx(TRUE.latency_s, rel=1e-6)
    assert found.overlap == pytest.approx(TRUE.overlap, abs=0.01)
    assert found.error == pytest.approx(0, abs=0.01)


def test_noise_makes_the_stated_error_about_as_large_as_itself() -> None:
    found = fit(made_exchanges(0.03), made_points(0.05))
    assert found.efficiency == pytest.approx(TRUE.efficiency, rel=0.1)
    assert found.error is not None
    assert 0.01 < found.error < 0.25


def test_one_rank_alone_has_no_exchange_and_no_error_to_tell() -> None:
    alone = dataclasses.replace(POINT, ranks=1, seconds=0.35)
    found = fit([], [alone])
    assert found.error is None
    assert found.step_s(alone) == pytest.approx(0.35)


def test_least_squares_never_goes_negative() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        rows = rng.normal(size=(12, 3))
        x = np.array(least_squares(rows, np.ones(12)))
        assert (x >= 0).all()
        wrong = np.square(rows @ x - 1).sum()
        for other in itertools.product((0.0, 0.1, 0.5, 1.0), repeat=3):
            assert wrong <= np.square(rows @ np.array(other) - 1).sum() + 1e-9


def test_more_bandwidth_never_slows_and_more_ranks_never_speed_a_step() -> None:
    many = [dataclasses.replace(POINT, ranks=2**k) for k in range(1, 13)]
    seconds = [TRUE.step_s(point) for point in many]
    assert all(a <= b for a, b in itertools.pairwise(seconds))
    wide = [dataclasses.replace(POINT, ranks=64, network=Network(g, 1e-4)) for g in (0.1, 1, 10, 100, 400)]
    seconds = [TRUE.step_s(point) for point in wide]
    assert all(a >= b for a, b in itertools.pairwise(seconds))
    assert quicker(1, 1e9, 1.0, 1.0) == 0


def test_ranks_of_a_node_share_its_link_once() -> None:
    one = TRUE.all_reduce_s(8, 1e8, Network(100.0, 0.0, ranks_per_node=8))
    eight = TRUE.all_reduce_s(8, 1e8, Network(100.0, 0.0, ranks_per_node=1))
    assert one < eight


def test_no_rank_is_faster_than_its_loader() -> None:
    asked = recipe.BenchRecipe(scaling=recipe.ScalingRecipe(predict=(8, 64), latency_us=0.0))
    run = cases_scaling.with_micro_batch(TrainRecipe(), 4)
    for loader, bound in ((math.inf, "compute"), (2.0, "loader")):
        rows = cases_scaling.predictions(TRUE, POINT, run, asked, loader)
        weak = [row for row in rows if row["case"].endswith("weak")]
        assert [row["bound_by"] for row in weak] == [bound, bound]
        if bound == "loader":
            assert [row["tiles_per_s"] for row in weak] == [pytest.approx(2.0 * n) for n in (8, 64)]
    slow = recipe.BenchRecipe(scaling=recipe.ScalingRecipe(predict=(64,), network_gbit=0.01))
    assert cases_scaling.predictions(TRUE, POINT, run, slow)[0]["bound_by"] == "exchange"


def test_costs_count_whole_nodes() -> None:
    asked = recipe.ScalingRecipe(gpus_per_node=8, price_per_node_hour=36.0)
    assert cases_scaling.cost(asked, 9, 100.0) == pytest.approx(2.0)


def test_impossible_clusters_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "scaling", "--config", "smoke", "--scaling.network-gbit", "0"]) == 2
    assert "wanted a bandwidth above 0" in capsys.readouterr().err


SMALL = (
    "--data.shards=unused",
    "--device=cpu",
    "--precision=fp32",
    "--data.crop-px=64",
    "--data.global-batch=4",
    "--data.micro-batch=2",
)


def small_recipe(*options: str) -> TrainRecipe:
    words = ["--config", "smoke", *SMALL, *options]
    return cases_scaling.for_scaling(config.parse(TrainRecipe, words, prog="test", description=""))


@pytest.mark.extra
def test_scaling_measures_two_ranks_and_predicts_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "keep_to", lambda threads: None)
    out = tmp_path / "scaling.json"
    small = ["--run.data.crop-px", "64", "--run.data.micro-batch", "2", "--steps", "2", "--repeats", "2"]
    cluster = ["--scaling.predict", "[16]", "--scaling.price-per-node-hour", "10"]
    assert cli.main(["bench", "scaling", "--config", "smoke", *small, *cluster, "--json", str(out)]) == 0
    rows: list[dict[str, Any]] = json.loads(out.read_text())["results"]
    assert [(row["case"], row["ranks"]) for row in rows] == [
        ("scaling, measured", 1),
        ("scaling, measured", 2),
        ("scaling, measured", 2),
        ("scaling, predicted weak", 16),
        ("scaling, predicted strong", 16),
    ]
    assert [row["micro_batch"] for row in rows[:3]] == [2, 2, 1]
    assert "unknown" not in rows[-1]["verdict"], "a point that was left out tells the error"
    weak, strong = rows[3:]
    assert weak["cost_per_epoch"] == pytest.approx(2 * 10 * weak["epoch_s"] / 3600)
    assert 0 < strong["efficiency"] < weak["efficiency"] <= 1
    assert rows[1]["gradient_mb"] > 1


def measured_on_hosts(recipe: TrainRecipe, mbit: float, folder: Path) -> dict[str, Any]:
    """What two ranks on two hosts with a link of `mbit` measured."""
    asked = folder / "asked.json"
    asked.write_text(json.dumps({"recipe": config.to_dict(recipe), "steps": 2, "repeats": 3}))
    with hosts.two_hosts(mbit) as pair:
        processes = []
        for rank, host in enumerate(pair):
            env = {
                "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": pair[0].address, "MASTER_PORT": "29511", "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            words = [sys.executable, "-m", "geopose_dist.bench.scaling_rank", str(asked)]
            processes.append(host.start(words, env))
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    found: dict[str, Any] = json.loads(asked.with_suffix(".result.json").read_text())
    return found


@pytest.mark.multihost
@pytest.mark.soak
def test_left_out_links_and_models_are_told_within_the_stated_error(tmp_path: Path) -> None:
    """Two hosts x two sizes of network x 100 Mbit, 1 and 10 Gbit: each point is told by a fit to the others."""
    sizes = {"small": "[16,16,8,8,8]", "large": "[256,128,64,32,16]"}
    measured: dict[tuple[str, float], dict[str, Any]] = {}
    for (size, channels), mbit in itertools.product(sizes.items(), (100.0, 1000.0, 10000.0)):
        recipe = small_recipe(
            "--model.encoder=tu-mobilenetv3_small_050", f"--model.decoder-channels={channels}"
        )
        measured[size, mbit] = measured_on_hosts(recipe, mbit, tmp_path)
    points = {key: cases_scaling.point_of(one, Network(key[1] / 1000)) for key, one in measured.items()}
    off = {}
    for left_out in points:
        rest = [key for key in points if key != left_out]
        exchanges = [
            one for key in rest for one in cases_scaling.exchanges_of([measured[key]], Network(key[1] / 1000))
        ]
        model = fit(exchanges, [points[key] for key in rest])
        assert model.error is not None
        off[left_out] = abs(model.step_s(points[left_out]) / points[left_out].seconds - 1), model.error
    print({key: (round(a, 3), round(b, 3)) for key, (a, b) in off.items()})
    # The stated error is the largest of those left out while fitting: a new point may exceed it by its own noise.
    noise = 2 * max(one["step_spread"] + one["spread"] for one in measured.values())
    for key, (wrong, stated) in off.items():
        assert wrong <= stated + noise, (key, off)


def test_hosts_say_why_they_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert hosts.why_not() == "network namespaces need root"
