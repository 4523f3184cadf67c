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
from geopose_dist.model.heads import Prediction
from geopose_dist.model.loss import Targets
from geopose_dist.runtime import World
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
        known = recipe.loss.city_std_m
        self._city_std_m = (
            torch.tensor([known.get(c, 1.0) for c in cities], device=world.device) if known else None
        )
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
        self._buffers = [buffer for name, buffer in net.named_buffers() if name.endswith(running)]
        self._settle_buckets()

    def step(self, batches: Sequence[Batch], number: int, first_micro_batch: int) -> StepResult:
        """Take optimiser step `number` with this rank's `batches`, which are on its device.

        Nothing here waits for the device: what is computed stays there (see `StepResult`).

        `first_micro_batch` is the number of the first of them within the step; the next ones follow at
        distances of the world size. Numbers only key the dropout.
        """
        world = self.world
        batches = [device_augment.finish(batch) for batch in batches]
        targets = [targets_of(batch, self._city_std_m) for batch in batches]
        sums = [loss.denominators(self.recipe.loss, target) for target in targets]
        total = world.sum(torch.stack([*sums, self._zero_sums()]).sum(dim=0))
        losses, terms = self._zero(), torch.zeros(len(loss.TERMS), device=world.device)
        for i, (batch, target) in enumerate(zip(batches, targets, strict=True)):
            seed_dropout(self.recipe.seed, number, first_micro_batch + i * world.size)
            with self._sync_only(i == len(batches) - 1):
                prediction = self._forward(batch.rgb, batch.gsd_m, target.inside)
                numerators = loss.numerators(self.recipe.loss, prediction, target)
                share, term_shares = loss.combine(self.recipe.loss, numerators, total)
                torch.autograd.backward(self.scaler.scale(share * world.size))
            losses, terms = losses + share.detach(), terms + term_shares
        if not batches:
            self._zero_weight_pass()
        self.scaler.unscale_(self.optimizer)
        clip = self.recipe.optim.clip_norm
        grad_norm = nn.utils.clip_grad_norm_(self.net.parameters(), clip if clip > 0 else float("inf"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._clear_gradients()
        self._average_buffers()
        return StepResult(losses, terms, grad_norm)

    def _forward(self, rgb: Tensor, gsd_m: Tensor, inside: Tensor | None) -> Prediction:
        dtype = DTYPES[self.recipe.precision]
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype is not None):
            prediction: Prediction = self.wrapped(rgb, gsd_m, inside)
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
        if self.world.size > 1 and self._buffers:
            flat = torch.cat([buffer.flatten() for buffer in self._buffers])
            dist.all_reduce(flat)
            flat /= self.world.size
            parts = torch.split(flat, [buffer.numel() for buffer in self._buffers])
            for buffer, part in zip(self._buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.world.device)

    def _zero_sums(self) -> Tensor:
        return torch.zeros(len(loss.TERMS), dtype=torch.float64, device=self.world.device)


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Run compiled networks as they were written, for inputs of a size or mode that is seldom seen."""
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def targets_of(batch: Batch, city_std_m: Tensor | None = None) -> Targets:
    """Labels of a batch: heights in metres from its compact centimetres and their two markers.

    `city_std_m` is a float32 [cities] on the batch's device, in the order of the manifest's cities.
    """
    agl_cm = batch.agl_cm.to(torch.int32)
    inside = agl_cm != OUTSIDE_CM
    known = inside & (agl_cm != UNKNOWN_CM)
    std = None if city_std_m is None else city_std_m[batch.city]
    return Targets(agl_cm.float() / 100, known, batch.direction, batch.scale_px_per_m, inside, city_std_m=std)


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Seed torch so that dropout depends on the step and micro-batch alone, not on rank or restart."""
    torch.manual_seed(
        int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)[0] >> 1)
    )
