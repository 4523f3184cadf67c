"""`geopose bench scaling`: measured on the ranks of this machine, predicted for a cluster, with its own error.

One, two, ... ranks are started by torchrun and measured (`scaling_rank`), several of them with two sizes of
micro-batch; a model of few terms is fitted to them (`scaling_model`), and asked about 8 to 4096 ranks of a named
network, weakly scaled (every rank keeps its micro-batch) and strongly (the recipe's global batch is cut thinner).
With `--shards` a rank's loader is measured, too, and no rank is predicted to be faster than that. The rows show
how well the model tells the measured points that were left out: what it says of a thousand GPUs is no better.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from geopose_dist import config
from geopose_dist.bench.cases_epoch import data_only, for_bench
from geopose_dist.bench.harness import Row
from geopose_dist.bench.recipe import BenchRecipe, ScalingRecipe
from geopose_dist.bench.scaling_model import Exchange, Fit, Network, Point, fit
from geopose_dist.errors import FinishedWithFailures
from geopose_dist.pool import usable_cores
from geopose_dist.runtime import join_world
from geopose_dist.train.recipe import TrainRecipe
from geopose_dist.train.session import open_session

LOCAL = Network(math.inf)
TIMEOUT_S = 1800


def scaling(repeats: int, recipe: BenchRecipe, run: TrainRecipe, shards: str | None = None) -> list[Row]:
    """Measured and predicted tiles per second by ranks, efficiency, seconds and cost of an epoch."""
    loader = loader_tiles_per_s(run, shards, repeats, recipe.steps) if shards else math.inf
    run = for_scaling(run)
    local = recipe.scaling.ranks or torch.cuda.device_count() or min(2, usable_cores())
    counts = sorted({1, local, *(2**k for k in range(local.bit_length()) if 2**k <= local)})
    with tempfile.TemporaryDirectory() as folder:
        found = [
            measured(with_micro_batch(run, size), ranks, recipe.steps, repeats, Path(folder))
            for ranks in counts
            for size in sizes_of(run, ranks)
        ]
    points = [point_of(one, LOCAL) for one in found]
    model = fit(exchanges_of(found, LOCAL), points)
    batch = run.data.micro_batch
    rows = [
        {
            "case": "scaling, measured",
            "ranks": point.ranks,
            "micro_batch": one["micro_batch"],
            "tiles_per_s": point.ranks * one["micro_batch"] / point.seconds,
            "spread": one["step_spread"],
            "model_tiles_per_s": point.ranks * one["micro_batch"] / model.step_s(point),
            "model_off": model.step_s(point) / point.seconds - 1,
        }
        for point, one in zip(points, found, strict=True)
    ]
    own = next(
        point for point, one in zip(points[::-1], found[::-1], strict=True) if one["micro_batch"] == batch
    )
    rows += predictions(model, own, run, recipe, loader)
    for row in rows:
        row |= {"encoder": run.model.encoder, "gradient_mb": points[-1].gradient_bytes / 1e6}
    rows[-1]["verdict"] = in_words(model, rows, counts[-1])
    return rows


def sizes_of(run: TrainRecipe, ranks: int) -> list[int]:
    """Micro-batches to measure: the recipe's own, and, where ranks exchange, another to check the model by."""
    own = run.data.micro_batch
    return [own] if ranks == 1 else [own, own // 2 if own > 1 else 2]


def with_micro_batch(run: TrainRecipe, size: int) -> TrainRecipe:
    """The recipe with a micro-batch of `size` tiles."""
    return dataclasses.replace(run, data=dataclasses.replace(run.data, micro_batch=size, global_batch=size))


def loader_tiles_per_s(run: TrainRecipe, shards: str, repeats: int, steps: int) -> float:
    """What a rank's loader delivers alone, with the recipe's workers."""
    wanted = for_bench(run, shards)
    with tempfile.TemporaryDirectory() as folder, join_world(wanted.device) as world:
        session = open_session(dataclasses.replace(wanted, out=folder, length="1 steps"), world)
        data, _ = data_only(session, repeats, steps)
    return 1 / data.timing().median_s


def for_scaling(run: TrainRecipe) -> TrainRecipe:
    """The recipe with random weights and cities that are known."""
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, weights="none"),
        loss=dataclasses.replace(run.loss, city_std_m={"JAX": 10.0}),
    )


def measured(run: TrainRecipe, ranks: int, steps: int, repeats: int, folder: Path) -> dict[str, Any]:
    """What `ranks` ranks on this machine measured (FinishedWithFailures: they did not)."""
    asked = folder / f"{ranks}.json"
    asked.write_text(json.dumps({"recipe": config.to_dict(run), "steps": steps, "repeats": repeats}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "geopose_dist.bench.scaling_rank", str(asked)]
    print(f"bench: scaling on {ranks} rank{'' if ranks == 1 else 's'} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise FinishedWithFailures(f"{ranks} ranks could not be measured:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(asked.with_suffix(".result.json").read_text())
    return result | {"micro_batch": run.data.micro_batch}


def point_of(found: dict[str, Any], network: Network) -> Point:
    """A measured step for the model."""
    return Point(
        ranks=found["ranks"],
        micro_batches=1,
        network=network,
        micro_batch_s=found["micro_batch_s"],
        update_s=found["update_s"],
        spread=found["spread"],
        gradient_bytes=found["gradient_bytes"],
        bucket_bytes=found["bucket_bytes"],
        seconds=found["step_s"],
    )


def exchanges_of(found: list[dict[str, Any]], network: Network) -> list[Exchange]:
    """The measured all-reduces for the model."""
    return [
        Exchange(one["ranks"], int(size), network, seconds)
        for one in found
        for size, seconds in one["exchanges"].items()
    ]


def predictions(
    model: Fit, last: Point, run: TrainRecipe, recipe: BenchRecipe, loader: float = math.inf
) -> list[Row]:
    """The model's answer for the asked numbers of ranks, weak and strong; `loader` is what a rank is fed at most."""
    asked = recipe.scaling
    network = Network(asked.network_gbit, asked.latency_us * 1e-6, asked.gpus_per_node)
    batch, alone = run.data.micro_batch, run.data.micro_batch / (last.micro_batch_s + last.update_s)
    rows = []
    for kind in ("weak", "strong"):
        for ranks in asked.predict:
            share, tiles = 1, ranks * batch
            if kind == "strong":
                share, tiles = -(-run.data.global_batch // (batch * ranks)), run.data.global_batch
            point = dataclasses.replace(last, ranks=ranks, network=network, micro_batches=share)
            stepping, feeding = model.step_s(point), share * batch / loader
            seconds = max(stepping, feeding)
            epoch_s = recipe.tiles / (tiles / seconds)
            rows.append(
                {
                    "case": f"scaling, predicted {kind}",
                    "ranks": ranks,
                    "tiles_per_s": tiles / seconds,
                    "efficiency": tiles / seconds / (ranks * alone),
                    "micro_batch": batch,
                    "exposed_share": model.exposed_s(point) / seconds,
                    "bound_by": bound_by(model, point, feeding),
                    "epoch_tiles": recipe.tiles,
                    "epoch_s": epoch_s,
                    "cost_per_epoch": cost(asked, ranks, epoch_s),
                }
            )
    return rows


def bound_by(model: Fit, point: Point, feeding_s: float) -> str:
    """What most of a predicted step beyond the network's own time is: the loader, the exchange, or nothing."""
    if feeding_s > model.step_s(point):
        return "loader"
    alone = point.micro_batches * point.micro_batch_s + point.update_s
    return "exchange" if model.exposed_s(point) > alone else "compute"


def cost(asked: ScalingRecipe, ranks: int, epoch_s: float) -> float:
    """Price of an epoch, whole nodes by the hour's share."""
    nodes = -(-ranks // asked.gpus_per_node)
    return nodes * asked.price_per_node_hour * epoch_s / 3600


def in_words(model: Fit, rows: list[Row], measured_ranks: int) -> str:
    """What the fit is good for, what was not measured, and where it stops to pay."""
    error = "unknown: too few ranks were measured" if model.error is None else f"{model.error:.0%}"
    weak = [row for row in rows if row["case"] == "scaling, predicted weak"]
    good = [row["ranks"] for row in weak if row["efficiency"] >= 0.8]
    reach = f"efficiency stays above 80 % up to {max(good)} ranks" if good else "no asked size reaches 80 %"
    return (
        f"left-out measured points are told to within {error}; extrapolated from at most {measured_ranks} ranks of one "
        f"machine, the network between nodes taken at its nominal rate; weakly scaled, {reach}"
    )


CASES = {"scaling": scaling}
