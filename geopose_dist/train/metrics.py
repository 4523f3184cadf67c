"""What a step tells: the speed since the last line, and a line of metrics about the step just taken.

A step leaves its numbers on the device. They are read here, every `log_every` steps, in one go: reading is
waiting for the device.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from geopose_dist.metrics_log import Progress as ProgressBar
from geopose_dist.model import loss
from geopose_dist.train.session import Session
from geopose_dist.train.step import StepResult

Got = TypeVar("Got")


@dataclass
class Meter:
    """Speed since the last line of metrics.

    Attributes:
        global_batch: tiles of one step over all ranks.
    """

    global_batch: int

    def __post_init__(self) -> None:
        self._began, self._waited_s, self._steps = time.monotonic(), 0.0, 0

    def waiting(self, call: Callable[[], Got]) -> Got:
        """What `call` gives, with the time it took counted as waiting for data."""
        began = time.monotonic()
        got = call()
        self._waited_s += time.monotonic() - began
        return got

    def stepped(self) -> None:
        """Count a step as taken."""
        self._steps += 1

    def take(self) -> dict[str, float]:
        """Tiles per second over all ranks and the share of time spent waiting; starts anew."""
        passed = max(time.monotonic() - self._began, 1e-9)
        speeds = {
            "tiles_per_s": self._steps * self.global_batch / passed,
            "data_wait_share": self._waited_s / passed,
        }
        self.__post_init__()
        return speeds


def write_metrics(session: Session, result: StepResult, meter: Meter, bar: ProgressBar) -> None:
    """One line of metrics.jsonl about the step just taken; what is not finite (see guard.py) is null there."""
    shares = session.world.sum(torch.cat([result.loss[None], result.terms]))
    value, *terms, grad_norm = torch.cat([shares, result.grad_norm[None]]).tolist()  # waits for the device
    step, optimizer = session.progress.step, session.stepper.optimizer
    weight = loss.weights(session.recipe.loss)
    line: dict[str, Any] = {
        "step": step,
        "epoch": step * session.recipe.data.global_batch / session.samples,
        "loss": value,
        **{f"loss_{name}": term for name, term in zip(loss.TERMS, terms, strict=True) if weight[name] > 0},
        **meter.take(),
        "lr": optimizer.param_groups[-1]["lr"],
        "grad_norm": grad_norm,
    }
    if session.recipe.data.on_damage == "substitute":
        line["replaced"] = session.damage.total()
    line["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # the peak, from KiB
    if session.world.device.type == "cuda":
        line["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    line = {
        name: None if isinstance(number, float) and not math.isfinite(number) else number
        for name, number in line.items()
    }
    if session.world.is_first:
        session.log.write("metrics", line)
        note = f"loss {value:.4g}, {line['tiles_per_s']:.3g} tiles/s, waiting {line['data_wait_share']:.0%}"
        note += f", {line['memory_gib']:.1f} GiB"
        if "gpu_memory_gib" in line:
            note += f" and {line['gpu_memory_gib']:.1f} GiB of the GPU"
        bar.advance(0, note)
