"""One optimiser step: this rank's micro-batches, exact global sums, one update.

Denominators of all loss terms are summed over ranks once, before the first forward pass. Each
micro-batch then contributes numerator / global denominator; the sum over micro-batches and ranks is the
loss. DDP averages gradients over ranks, so each share is multiplied by the world size first. A rank
without a micro-batch in this step still takes part, with a pass of weight zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from geopose_dist.data.batch import OUTSIDE_CM, UNKNOWN_CM, Batch
from geopose_dist.model import depthwise, device_augment, loss
from geopose_dist.model.city_spread import CitySpread
from geopose_dist.model.heads import Prediction
from geopose_dist.model.inputs import city_numbers
from geopose_dist.model.loss import Targets
from geopose_dist.runtime import World
from geopose_dist.train.guard import Guard
from geopose_dist.train.parallel import wrap
from geopose_dist.train.recipe import TrainRecipe

DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """What a step computed, still on the device: reading it is the caller's choice of when to wait.

    Attributes:
        loss: this rank's share of the weighted loss.
        terms: this rank's share of each term, in the order of `loss.TERMS`.
        grad_norm: norm of the whole gradient before clipping, equal on all ranks.
    """

    loss: Tensor
    terms: Tensor
    grad_norm: Tensor


class Stepper:
    """The network with what it takes to update it.

    Attributes:
        net: the bare network, whose state is saved.
        optimizer: see `optim.make_optimizer`.
        scaler: scales the loss under fp16; does nothing otherwise.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        cities: Sequence[str] = (),
    ) -> None:
        self.recipe, self.net, self.optimizer, self.world = recipe, net, optimizer, world
        self.spread = CitySpread(recipe.loss, cities, world.device)
        self._cities = city_numbers(recipe.model.cities, cities).to(world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.precision == "fp16")
        if world.device.type == "cpu" and recipe.precision == "bf16":
            depthwise.keep_float32(net)
        if recipe.compile != "off":
            net.compile(mode=None if recipe.compile == "default" else recipe.compile)
        # max-autotune replays CUDA graphs, which write gradients where the former ones were; gradients that
        # live on from one micro-batch to the next need memory of their own.
        self._graphs = recipe.compile == "max-autotune"
        if self._graphs:
            for parameter in net.parameters():
                parameter.grad = torch.zeros_like(parameter)
        self.wrapped = wrap(net, world, recipe.ddp)
        running = ("running_mean", "running_var")
        buffers = [buffer for name, buffer in net.named_buffers() if name.endswith(running)]
        self.guard = Guard(recipe, optimizer, buffers, world.device)
        self._settle_buckets()

    def step(self, batches: Sequence[Batch], number: int, first_micro_batch: int) -> StepResult:
        """Take optimiser step `number` with this rank's `batches`, which are on its device.

        Nothing here waits for the device: what is computed stays there (see `StepResult`).

        `first_micro_batch` is the number of the first of them within the step; the next ones follow at
        distances of the world size. Numbers only key the dropout.
        """
        world = self.world
        batches = [device_augment.finish(batch) for batch in batches]
        targets = [self.spread.describe(targets_of(batch), batch.city) for batch in batches]
        total = self._global_sums(targets, [batch.city for batch in batches])
        losses, terms = self._zero(), torch.zeros(len(loss.TERMS), device=world.device)
        for i, (batch, target) in enumerate(zip(batches, targets, strict=True)):
            seed_dropout(self.recipe.seed, number, first_micro_batch + i * world.size)
            with self._sync_only(i == len(batches) - 1):
                city = self._cities[batch.city] if self.recipe.model.city_input else None
                prediction = self._forward(batch.rgb, batch.gsd_m, target.inside, city)
                numerators = loss.numerators(self.recipe.loss, prediction, target)
                share, term_shares = loss.combine(self.recipe.loss, numerators, total)
                torch.autograd.backward(self.scaler.scale(share * world.size))
            losses, terms = losses + share.detach(), terms + term_shares
        if not batches:
            self._zero_weight_pass()
        self.scaler.unscale_(self.optimizer)
        clip = self.recipe.optim.clip_norm
        grad_norm = nn.utils.clip_grad_norm_(self.net.parameters(), clip if clip > 0 else float("inf"))
        self.guard.judge(grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._clear_gradients()
        self._average_buffers()
        return StepResult(losses, terms, grad_norm)

    def _global_sums(self, targets: Sequence[Targets], cities: Sequence[Tensor]) -> Tensor:
        """float64 [len(TERMS)]: the denominators of the whole global batch, by one exchange."""
        recipe, width = self.recipe.loss, len(loss.TERMS)
        sums = torch.zeros(width, dtype=torch.float64, device=self.world.device)
        seen = torch.zeros_like(self.spread.sums if self.spread.running else sums[:0]).flatten()
        for target, city in zip(targets, cities, strict=True):
            sums = sums + loss.denominators(recipe, target)
            seen = seen + self.spread.shares(target, city)
        total = self.world.sum(torch.cat([sums, seen]))
        self.spread.add(total[width:])
        return total[:width]

    def _forward(
        self, rgb: Tensor, gsd_m: Tensor, inside: Tensor | None, city: Tensor | None = None
    ) -> Prediction:
        dtype = DTYPES[self.recipe.precision]
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype is not None):
            prediction: Prediction = self.wrapped(rgb, gsd_m, inside, city)
        return prediction

    def _clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=not self._graphs)

    def _sync_only(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Let DDP exchange gradients in the last backward pass of a step alone."""
        if self.world.size == 1 or last:
            return contextlib.nullcontext()
        assert isinstance(self.wrapped, nn.parallel.DistributedDataParallel)
        return self.wrapped.no_sync()

    def _zero_weight_pass(self) -> None:
        """Take part in the exchange of gradients without adding to them, running buffers untouched."""
        side = self.recipe.data.crop_px or 64
        side = -(-side // 32) * 32
        rgb = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.world.device)
        self.net.eval()
        try:
            with uncompiled():  # a pass of another size, in eval mode, is not worth minutes of compiling
                gsd_m = torch.full((1,), float("nan"), device=self.world.device)
                prediction = self._forward(rgb, gsd_m, None)
            sums = torch.stack([part.sum() for part in prediction if part is not None])
            torch.autograd.backward(self.scaler.scale(sums.sum() * 0.0))
        finally:
            self.net.train()

    def _settle_buckets(self) -> None:
        """Let DDP rebuild its buckets before the first real step.

        It does so after the first backward pass, which changes the order of later sums. Two passes of
        weight zero at every start, fresh or resumed, make the two the same bit for bit.
        """
        if self.world.size > 1:
            for _ in range(2):
                self._zero_weight_pass()
                self._clear_gradients()

    def _average_buffers(self) -> None:
        """Make BatchNorm's running buffers their mean over ranks, every step.

        So all ranks hold the same state at each step's end, whichever of them saves it, and a run that
        goes on from a checkpoint is the run that was never stopped, validation included.
        """
        flat = self.guard.running()
        if self.world.size > 1 and len(flat):
            dist.all_reduce(flat)
            flat /= self.world.size
        self.guard.put_running(flat)

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.world.device)


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Run compiled networks as they were written, for inputs of a size or mode that is seldom seen."""
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def targets_of(batch: Batch) -> Targets:
    """Labels of a batch: heights in metres from its compact centimetres and their two markers."""
    agl_cm = batch.agl_cm.to(torch.int32)
    inside = agl_cm != OUTSIDE_CM
    known = inside & (agl_cm != UNKNOWN_CM)
    return Targets(
        agl_cm.float() / 100, known, batch.direction, batch.scale_px_per_m, inside, gsd_m=batch.gsd_m
    )


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Seed torch so that dropout depends on the step and micro-batch alone, not on rank or restart."""
    torch.manual_seed(
        int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)[0] >> 1)
    )
