"""The guard against losses and gradients that are not finite: no such update is applied, and the batch is kept.

On the device: the gradient's norm, equal on all ranks, decides. The fused optimisers take its verdict as a
flag (`found_inf`) and leave weights and moments alone; running buffers keep their former values. The host
reads a verdict `LAG_STEPS` later, when the device has long passed it, so nothing waits. Under `stop` the
device applies nothing more until then: the weights that are saved beside the batch are those that met it.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from geopose_dist import config, files
from geopose_dist.data.batch import Batch
from geopose_dist.errors import FinishedWithFailures
from geopose_dist.model import device_augment, weights
from geopose_dist.runtime import World
from geopose_dist.train.place import local_folder
from geopose_dist.train.recipe import TrainRecipe

FOLDER = "nonfinite"
"""In the run folder: one folder for each step that was not finite."""
LAG_STEPS = 2
"""Steps of a GPU between a verdict and its reading; the CPU computes as it goes and reads at once."""
FP16_PATIENCE = 20
"""Steps in a row that fp16 may overflow: its scaler halves the loss each time, and 2^16 is where it starts."""
TENSORS = ("rgb", "agl_cm", "gsd_m", "scale_px_per_m", "direction", "city")


class Guard:
    """The device's part.

    Attributes:
        verdict: float32 scalar on the device, 1 if the step just judged was not finite.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        optimizer: torch.optim.Optimizer,
        buffers: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self._optimizer, self._buffers = optimizer, list(buffers)
        self._sticky = recipe.on_nonfinite == "stop"
        self._scaled = recipe.precision == "fp16"  # there the scaler leaves out what overflowed
        self.verdict = torch.zeros((), device=device)
        self._closed = torch.zeros((), device=device)
        self._kept = self.running()

    def judge(self, grad_norm: Tensor) -> None:
        """Take the gradient's norm of a step, before the optimiser's update."""
        self.verdict = (~torch.isfinite(grad_norm)).float()
        self._closed = torch.maximum(self._closed, self.verdict) if self._sticky else self.verdict
        if self._scaled:
            self._closed = self.verdict
        else:
            self._optimizer.found_inf = self._closed  # type: ignore[attr-defined]

    def running(self) -> Tensor:
        """The running buffers as one flat tensor."""
        return torch.cat([buffer.flatten() for buffer in self._buffers]) if self._buffers else torch.zeros(0)

    def put_running(self, flat: Tensor) -> None:
        """Set the running buffers to `flat`, or to their former values after a step that was not finite."""
        if not self._buffers:
            return
        self._kept = torch.where(self._closed > 0, self._kept, flat)
        parts = torch.split(self._kept, [buffer.numel() for buffer in self._buffers])
        shaped = [part.view_as(buffer) for part, buffer in zip(parts, self._buffers, strict=True)]
        torch._foreach_copy_(self._buffers, shaped)


@dataclass(frozen=True)
class _Pending:
    step: int
    verdict: Tensor  # on the host
    ready: Any  # torch.cuda.Event, or None where it is ready already
    batches: Sequence[Batch]


class Verdicts:
    """The host's part: reads verdicts, keeps batches until then, and does what the recipe says.

    Attributes:
        skipped: steps of this start that were left out.
    """

    def __init__(self, recipe: TrainRecipe, world: World, cities: Sequence[str]) -> None:
        self.recipe, self.world, self.cities = recipe, world, cities
        self.skipped = 0
        self._pending: deque[_Pending] = deque()
        self._in_a_row = 0

    def note(self, step: int, verdict: Tensor, batches: Sequence[Batch]) -> None:
        """Remember step `step` (counted from 0), whose verdict is on its way."""
        ready = None
        if verdict.device.type == "cuda":
            host = torch.empty((), pin_memory=True)
            host.copy_(verdict, non_blocking=True)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
            verdict = host
        self._pending.append(_Pending(step, verdict, ready, batches))

    def read(self, net: torch.nn.Module, *, all_of_it: bool = False) -> None:
        """Look at the verdicts that are old enough, alike on all ranks (FinishedWithFailures)."""
        lag = LAG_STEPS if self.world.device.type == "cuda" and not all_of_it else 0
        while len(self._pending) > lag:
            pending = self._pending.popleft()
            if pending.ready is not None:
                pending.ready.synchronize()
            if not pending.verdict.item():
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            if self.recipe.precision != "fp16" or self._in_a_row >= FP16_PATIENCE:
                self._in_a_row = 0
                self._react(pending, net)

    def _react(self, pending: _Pending, net: torch.nn.Module) -> None:
        folder = local_folder(self.recipe) / FOLDER / f"step-{pending.step + 1:08d}"
        save(folder, self.recipe, pending.step, pending.batches, self.world, net, self.cities)
        keys = ", ".join(key for batch in pending.batches for key in batch.keys) or "none"
        told = (
            f"step {pending.step + 1}: the gradient is not finite; this rank's tiles: {keys}; the update was not "
            f"applied, and the batch is saved: `geopose replay {folder}` shows which term, tile and module"
        )
        self.skipped += 1
        if self.recipe.on_nonfinite == "stop":
            raise FinishedWithFailures(f"{told}; lower optim.lr, or go on with --on-nonfinite skip")
        if self.skipped > self.recipe.nonfinite_limit:
            raise FinishedWithFailures(
                f"{told}; that is more than nonfinite_limit {self.recipe.nonfinite_limit} allows"
            )
        print(told, flush=True, file=sys.stderr)


def save(
    folder: Path,
    recipe: TrainRecipe,
    step: int,
    batches: Sequence[Batch],
    world: World,
    net: torch.nn.Module,
    cities: Sequence[str],
) -> None:
    """Write this rank's micro-batches of a step, as the network saw them, and on rank 0 the network.

    What was drawn follows from seed, visit and sample (`geopose augment` shows it); the pixels are those after.
    """
    tensors: dict[str, Tensor] = {}
    told = []
    for i, batch in enumerate(batches):
        seen = device_augment.finish(batch)
        for name in TENSORS:
            tensors[f"{i}.{name}"] = getattr(seen, name).cpu().contiguous()
        tensors[f"{i}.agl_cm"] = tensors[f"{i}.agl_cm"].to(torch.int32)
        names = ("keys", "positions", "visits")
        told.append(
            {"micro_batch": world.rank + i * world.size, **{name: getattr(batch, name) for name in names}}
        )
    facts: dict[str, Any] = {"step": step, "rank": world.rank, "world_size": world.size, "batches": told}
    facts |= {"cities": list(cities), "recipe": config.to_dict(recipe)}
    files.write_bytes(folder / f"rank-{world.rank}.safetensors", safetensors.torch.save(tensors))
    files.write_bytes(folder / f"rank-{world.rank}.json", json.dumps(facts, indent=1).encode())
    if world.is_first:
        weights.save_weights(folder / weights.MODEL_NAME, net.state_dict(), recipe.model, {"step": step})
