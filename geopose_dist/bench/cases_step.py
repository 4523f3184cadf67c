"""`geopose bench step`: optimiser steps on a batch that is on the device, beside the benchmark's way.

The rows go from the public benchmark's loop (float32, NCHW, a fresh mean per term, every loss read back, so
that the host waits each step) to ours in several precisions, layouts and compile modes, on the same network
and tiles. The first loss of each is compared with that of a plain float32 pass through network and loss. FLOP/s
stand beside what this device's matrix products reach in the same run, so that a reader sees what is left. Rows
come one by one: what was measured before a compiler's minutes run out is kept.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from geopose_dist.bench.cases_epoch import synchronize, windows
from geopose_dist.bench.harness import Row, check, measure, timing
from geopose_dist.bench.recipe import BenchRecipe
from geopose_dist.data.batch import Batch, pack, to_device
from geopose_dist.data.sample import View
from geopose_dist.model import loss
from geopose_dist.model.city_spread import CitySpread
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.runtime import World, join_world
from geopose_dist.train.opening import set_arithmetic
from geopose_dist.train.optim import make_optimizer
from geopose_dist.train.recipe import TrainRecipe
from geopose_dist.train.step import DTYPES, Stepper, seed_dropout, targets_of

WHOLE_TILE_PX = 1024
TOLERANCE = {"fp32": 1e-4, "tf32": 0.01, "bf16": 0.05, "fp16": 0.03}
"""Largest relative difference of the first loss from float32's."""


def step(repeats: int, run: TrainRecipe, recipe: BenchRecipe) -> Iterator[Row]:
    """Tiles per second of the optimiser step in each variant of the recipe, and the benchmark's way."""
    base = with_batch(run, run.data.micro_batch)
    with join_world(base.device) as world:
        batch = to_device(made_batch(base), world.device)
        flops, ceiling = flops_per_tile(base, batch), ceilings(world.device)
        facts: Row = {
            "encoder": base.model.encoder,
            "side_px": batch.rgb.shape[-1],
            "device": world.device.type,
        }
        bench = Bench(world, repeats, recipe.steps, lambda one: complete(one, flops, ceiling) | facts)
        baseline = bench.told(benchmark_row(base, batch, repeats, recipe.steps))
        yield baseline
        reference = first_loss(base, world, batch)
        for name, variant in variants(base, world.device.type):
            yield from bench.variant(name, variant, batch, reference, baseline)
        for size in recipe.batches:
            other = with_batch(base, size)
            batch = to_device(made_batch(other), world.device)
            reference = first_loss(other, world, batch)
            yield from bench.variant(f"the recipe at batch {size}", other, batch, reference, baseline)
        if world.device.type == "cuda":  # its minutes come last
            tuned = dataclasses.replace(base, precision="bf16", channels_last=True, compile="max-autotune")
            batch = to_device(made_batch(base), world.device)
            reference = first_loss(base, world, batch)
            yield from bench.variant("ours, bf16, compiled max-autotune", tuned, batch, reference, baseline)


def with_batch(run: TrainRecipe, size: int) -> TrainRecipe:
    """The recipe with one micro-batch of `size` tiles, random weights and a city that is known."""
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, weights="none"),
        loss=dataclasses.replace(run.loss, city_std_m={"JAX": 10.0}),
        data=dataclasses.replace(run.data, global_batch=size, micro_batch=size),
    )


@dataclasses.dataclass(frozen=True)
class Bench:
    """How variants are measured.

    Attributes:
        world: of one rank.
        repeats, steps: windows, and steps of each.
        told: adds to a row what all rows tell.
    """

    world: World
    repeats: int
    steps: int
    told: Callable[[Row], Row]

    def variant(
        self, name: str, recipe: TrainRecipe, batch: Batch, reference: float, baseline: Row
    ) -> Iterator[Row]:
        """The variant's row, after its first loss was compared; none if the device's memory is too small."""
        torch._dynamo.reset()  # a batch of another size is no reason to compile for any size
        try:
            stepper = stepper_of(recipe, self.world)
            off = abs(float(stepper.step([batch], 0, 0).loss) - reference) / max(abs(reference), 1e-9)
            limit = TOLERANCE[recipe.precision]
            check(off <= limit, f"{name}: the loss is {off:.1%} off float32's, more than {limit:.1%}")
            numbers = itertools.count(1)
            call = lambda: stepper.step([batch], next(numbers), 0)  # noqa: E731
            rates = windows(call, len(batch), self.repeats, self.steps)
        except torch.OutOfMemoryError:
            print(f"bench: step, {name}: out of memory; left out", file=sys.stderr)
            torch.cuda.empty_cache()
            return
        yield self.told(row(name, rates, len(batch), baseline, loss_off=off))


def complete(one: Row, flops: float, ceiling: dict[str, float]) -> Row:
    """A row with its arithmetic beside the device's ceiling."""
    tflops = one["tiles_per_s"] * flops / 1e12
    share = tflops / ceiling[str(one["precision"])]
    return {**one, "gflop_per_tile": flops / 1e9, "tflops": tflops, "share_of_matmul": share}


def first_loss(recipe: TrainRecipe, world: World, batch: Batch) -> float:
    """The loss of the fresh network on the batch, float32, by network and loss alone: no trainer, no compiler."""
    net = fresh_net(plain(recipe), world.device)
    spread = CitySpread(recipe.loss, ("JAX",), world.device)
    with torch.no_grad():
        target = spread.describe(targets_of(batch), batch.city)
        seed_dropout(recipe.seed, 0, 0)
        answer = net(batch.rgb, batch.gsd_m, target.inside, None)
        sums = loss.numerators(recipe.loss, answer, target)
        share, _ = loss.combine(recipe.loss, sums, loss.denominators(recipe.loss, target))
    return float(share)


def plain(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe in eager float32, NCHW."""
    return dataclasses.replace(recipe, precision="fp32", channels_last=False, compile="off")


def variants(recipe: TrainRecipe, device: str) -> list[tuple[str, TrainRecipe]]:
    """What is measured: name and recipe, float32 first, the recipe itself last."""
    wanted: list[tuple[str, dict[str, Any]]] = [
        ("ours", {}),
        ("ours, channels last", {"channels_last": True}),
    ]
    bf16 = {"precision": "bf16", "channels_last": True}
    wanted.append(("ours, bf16, channels last", bf16))
    if device == "cuda":
        wanted.insert(1, ("ours, TF32", {"precision": "tf32"}))
        wanted.append(("ours, fp16, channels last", {**bf16, "precision": "fp16"}))
        wanted.append(("ours, bf16, compiled", {**bf16, "compile": "default"}))
    return [
        *((name, dataclasses.replace(plain(recipe), **changes)) for name, changes in wanted),
        ("the recipe as it is", recipe),
    ]


def stepper_of(recipe: TrainRecipe, world: Any) -> Stepper:
    """A fresh network of the recipe with its optimiser, the same weights every time."""
    net = fresh_net(recipe, world.device)
    return Stepper(recipe, net, make_optimizer(recipe.optim, net, world.device), world, ("JAX",))


def fresh_net(recipe: TrainRecipe, device: torch.device) -> GeoposeNet:
    """The recipe's network on the device, in its layout, from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    net = GeoposeNet(dataclasses.replace(recipe.model, scale_mean_px_per_m=0.5, height_mean_m=4.0)).to(device)
    if recipe.channels_last:
        net.to(memory_format=torch.channels_last)
    net.train()
    set_arithmetic(recipe.precision)
    return net


def benchmark_row(recipe: TrainRecipe, batch: Batch, repeats: int, steps: int) -> Row:
    """The public benchmark's loop on the same network: eager float32, NCHW, four means, each read back."""
    net = fresh_net(plain(recipe), batch.rgb.device)
    one_step = benchmark_step(net, recipe)
    targets = targets_of(batch)
    rgb, truth = batch.rgb.contiguous(), torch.where(targets.known, targets.agl_m, torch.nan)
    magnitude = truth * batch.scale_px_per_m[:, None, None, None]

    labels = (truth, magnitude, batch.direction, batch.scale_px_per_m)
    check(all(np.isfinite(one_step(rgb, *labels))), "the benchmark's way: the loss is not finite")
    call = lambda: one_step(rgb, *labels)  # noqa: E731
    return row("the benchmark's way", windows(call, len(batch), repeats, steps), len(batch), None)


def benchmark_step(net: nn.Module, recipe: TrainRecipe) -> Callable[..., list[float]]:
    """The benchmark's optimiser step on (rgb 0..255, heights, magnitudes, directions, scales), unknown = NaN."""
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.optim.lr)

    def one_step(
        rgb: torch.Tensor,
        agl_m: torch.Tensor,
        magnitude: torch.Tensor,
        direction: torch.Tensor,
        scale: torch.Tensor,
    ) -> list[float]:
        optimizer.zero_grad()
        gsd_m = torch.full((len(rgb),), torch.nan, device=rgb.device)
        answer = net(rgb, gsd_m, None)
        terms = [
            known_mean(answer.agl_m, agl_m),
            2 * known_mean(answer.magnitude_px, magnitude),
            10 * nn.functional.mse_loss(answer.direction, direction),
            10 * nn.functional.mse_loss(answer.scale_px_per_m, scale),
        ]
        torch.autograd.backward(torch.stack(terms).sum())
        optimizer.step()
        return [term.item() for term in terms]

    return one_step


def known_mean(answer: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean square error over the pixels whose truth is a number."""
    known = torch.isfinite(truth)
    return nn.functional.mse_loss(answer[known], truth[known])


def row(name: str, rates: list[float], batch: int, baseline: Row | None, **facts: Any) -> Row:
    """One variant's row; the ratio stands beside the benchmark's way."""
    seconds = timing([1 / rate for rate in rates])
    words = name.replace("TF32", "tf32")
    found = next((kind for kind in DTYPES if kind in words), "fp32")
    result: Row = {
        "case": f"step, {name}",
        "precision": found,
        "tiles_per_s": 1 / seconds.median_s,
        "spread": seconds.spread,
        "ms": 1e3 * seconds.median_s * batch,
        "batch": batch,
        **facts,
    }
    if baseline is not None:
        result |= {"baseline": baseline["case"], "speedup": result["tiles_per_s"] / baseline["tiles_per_s"]}
    return result


def made_batch(recipe: TrainRecipe) -> Batch:
    """Tiles of noise with heights and a few unknown pixels: what they show does not change the work."""
    side = recipe.data.crop_px or WHOLE_TILE_PX
    rng = np.random.Generator(np.random.Philox(key=[recipe.seed, side]))
    views = []
    for number in range(recipe.data.micro_batch):
        agl_m = rng.gamma(1.0, 6.0, (side, side)).astype(np.float32)
        agl_m[:3] = np.nan
        rgb = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        views.append(View(f"JAX_{number:06d}", "JAX", rgb, agl_m, 0.5, 0.8, 1.0 + number))
    counted = list(range(len(views)))
    return pack(views, ["JAX"], counted, [0] * len(views))


def flops_per_tile(recipe: TrainRecipe, batch: Batch) -> float:
    """Floating-point operations of forward and backward of one tile, counted by torch."""
    net = fresh_net(dataclasses.replace(recipe, compile="off", precision="fp32"), batch.rgb.device)
    # BatchNorm wants more than one value per channel; two tiles are counted and halved.
    rgb = batch.rgb[:1].repeat(2, 1, 1, 1)
    with FlopCounterMode(display=False) as counter:
        answer = net(rgb, batch.gsd_m[:1].repeat(2), None)
        torch.autograd.backward(torch.stack([part.sum() for part in answer if part is not None]).sum())
    return float(counter.get_total_flops()) / 2


def ceilings(device: torch.device) -> dict[str, float]:
    """TFLOP/s that large matrix products reach on this device, by precision."""
    side = 8192 if device.type == "cuda" else 1024
    found = {}
    for name, dtype in DTYPES.items():
        set_arithmetic(name)
        if name == "fp16" and device.type == "cpu":
            continue
        left = torch.randn(side, side, device=device, dtype=dtype or torch.float32)

        def product(left: torch.Tensor = left) -> None:
            left @ left
            synchronize()

        found[name] = 2 * side**3 / measure(product, 5).median_s / 1e12
    return found


CASES = {"step": step}
