"""`geopose bench scaling`: measured on the ranks of this machine, predicted for a cluster, with its own error.

One, two, ... ranks are started by torchrun and measured (`scaling_rank`), a model of few terms is fitted to
them (`scaling_model`), and asked about 8 to 4096 ranks of a named network, weakly scaled (every rank keeps its
micro-batch) and strongly (the recipe's global batch is cut thinner). The rows show how well the model tells the
measured points that were left out: what it says of a thousand GPUs is no better than that.
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
from geopose_dist.bench.harness import Row
from geopose_dist.bench.recipe import BenchRecipe, ScalingRecipe
from geopose_dist.bench.scaling_model import Exchange, Fit, Network, Point, fit
from geopose_dist.errors import FinishedWithFailures
from geopose_dist.pool import usable_cores
from geopose_dist.train.recipe import TrainRecipe

LOCAL = Network(math.inf)
TIMEOUT_S = 1800


def scaling(repeats: int, recipe: BenchRecipe, run: TrainRecipe) -> list[Row]:
    """Measured and predicted tiles per second by ranks, efficiency, seconds and cost of an epoch."""
    run = for_scaling(run)
    local = recipe.scaling.ranks or torch.cuda.device_count() or min(2, usable_cores())
    counts = sorted({1, local, *(2**k for k in range(local.bit_length()) if 2**k <= local)})
    with tempfile.TemporaryDirectory() as folder:
        found = [measured(run, ranks, recipe.steps, repeats, Path(folder)) for ranks in counts]
    points = [point_of(one, LOCAL) for one in found]
    model = fit(exchanges_of(found, LOCAL), points)
    batch = run.data.micro_batch
    rows = [
        {
            "case": "scaling, measured",
            "ranks": point.ranks,
            "tiles_per_s": point.ranks * batch / point.seconds,
            "spread": one["step_spread"],
            "model_tiles_per_s": point.ranks * batch / model.step_s(point),
            "model_off": model.step_s(point) / point.seconds - 1,
        }
        for point, one in zip(points, found, strict=True)
    ]
    rows += predictions(model, points[-1], run, recipe)
    for row in rows:
        row |= {
            "encoder": run.model.encoder,
            "micro_batch": batch,
            "gradient_mb": points[-1].gradient_bytes / 1e6,
        }
    rows[-1]["verdict"] = in_words(model, rows)
    return rows


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
    return result


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


def predictions(model: Fit, last: Point, run: TrainRecipe, recipe: BenchRecipe) -> list[Row]:
    """The model's answer for the asked numbers of ranks, weak and strong."""
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
            seconds = model.step_s(point)
            epoch_s = recipe.tiles / (tiles / seconds)
            rows.append(
                {
                    "case": f"scaling, predicted {kind}",
                    "ranks": ranks,
                    "tiles_per_s": tiles / seconds,
                    "efficiency": tiles / seconds / (ranks * alone),
                    "exposed_share": model.exposed_s(point) / seconds,
                    "epoch_tiles": recipe.tiles,
                    "epoch_s": epoch_s,
                    "cost_per_epoch": cost(asked, ranks, epoch_s),
                }
            )
    return rows


def cost(asked: ScalingRecipe, ranks: int, epoch_s: float) -> float:
    """Price of an epoch, whole nodes by the hour's share."""
    nodes = -(-ranks // asked.gpus_per_node)
    return nodes * asked.price_per_node_hour * epoch_s / 3600


def in_words(model: Fit, rows: list[Row]) -> str:
    """What the fit is good for, and where it stops to pay."""
    error = "unknown: too few ranks were measured" if model.error is None else f"{model.error:.0%}"
    weak = [row for row in rows if row["case"] == "scaling, predicted weak"]
    good = [row["ranks"] for row in weak if row["efficiency"] >= 0.8]
    reach = f"efficiency stays above 80 % up to {max(good)} ranks" if good else "no asked size reaches 80 %"
    return f"left-out measured points are told to within {error}; weakly scaled, {reach}"


CASES = {"scaling": scaling}
