"""What a checkpoint costs: the time that training stands still for one, in the background and in the foreground.

Both write the same bytes of the same network with its optimiser to the same disk, in turn. In the background
training waits for the copy in host memory alone; the time until the checkpoint is whole stands beside it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from geopose_dist.bench.harness import Row, check, timing
from geopose_dist.model.recipe import ModelRecipe
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.runtime import choose_device
from geopose_dist.train import checkpoint
from geopose_dist.train.checkpoint import Progress, Snapshot
from geopose_dist.train.optim import AveragedWeights, make_optimizer
from geopose_dist.train.recipe import CheckpointRecipe, OptimRecipe, TrainRecipe
from geopose_dist.train.saving import Writer

ENCODER = "resnet34"
QUICK = {"ENCODER": "tu-mobilenetv3_small_050"}


def checkpoint_case(repeats: int) -> Row:
    """Milliseconds that training stops for a checkpoint of a ResNet-34 U-Net with AdamW and averaged weights."""
    device = choose_device("auto")
    net = GeoposeNet(ModelRecipe(encoder=ENCODER)).to(device)
    snapshot = snapshot_of(net, device)
    stops: dict[bool, list[float]] = {True: [], False: []}
    whole: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        writers = {kind: writer_of(Path(folder) / str(kind), asynchronous=kind) for kind in stops}
        for number in range(repeats + 1):
            for kind, writer in writers.items():
                began = time.perf_counter()
                writer.save(Progress(step=number), snapshot, wait=False)
                stop = time.perf_counter() - began
                writer.finish()
                if number > 0:  # the first save makes the memory that later ones use again
                    stops[kind].append(stop)
                    whole[kind].append(time.perf_counter() - began)
        for writer in writers.values():
            writer.close()
        for kind in writers:
            check_whole(Path(folder) / str(kind), repeats, snapshot)
    background, foreground = timing(stops[True]), timing(stops[False])
    return {
        "stop_ms": 1e3 * background.median_s,
        "spread": background.spread,
        "baseline": "writing while training waits",
        "baseline_stop_ms": 1e3 * foreground.median_s,
        "baseline_spread": foreground.spread,
        "speedup": timing([b / a for a, b in zip(stops[True], stops[False], strict=True)]).median_s,
        "whole_after_ms": 1e3 * timing(whole[True]).median_s,
        "mib": checkpoint.size_bytes(net, averaged=True) / 2**20,
        "device": device.type,
        "encoder": ENCODER,
        "checked": "gives back what was saved",
        "repeats": repeats,
    }


def check_whole(run: Path, step: int, snapshot: Snapshot) -> None:
    """The newest checkpoint gives back what was saved, bit for bit."""
    found = checkpoint.load(run / "checkpoints" / f"step-{step:08d}")
    for what in ("model", "ema"):
        wanted, there = getattr(snapshot, what), getattr(found, what)
        same = wanted.keys() == there.keys() and all(
            torch.equal(value.detach().cpu(), there[name]) for name, value in wanted.items()
        )
        check(same, f"the checkpoint gives back other weights ({what})")
    wanted, there = snapshot.optimizer["state"], found.optimizer["state"]
    same = all(torch.equal(wanted[n]["exp_avg"].cpu(), there[n]["exp_avg"]) for n in wanted)
    check(same, "the checkpoint gives back another optimiser")


def snapshot_of(net: GeoposeNet, device: torch.device) -> Snapshot:
    """Everything that a run of `net` saves, after one update."""
    optimizer = make_optimizer(OptimRecipe(), net, device)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    averaged = AveragedWeights(net, 0.9)
    return Snapshot(net.state_dict(), optimizer.state_dict(), {}, averaged.state)


def writer_of(run: Path, *, asynchronous: bool) -> Writer:
    """A writer that keeps one checkpoint."""
    recipe = TrainRecipe(out=str(run), checkpoint=CheckpointRecipe(keep=1, asynchronous=asynchronous))
    return Writer(run, recipe)


CASES = {"checkpoint": checkpoint_case}
