"""The training loop: step, log, validate, save, until the length is reached or somebody asks to stop.

Everything is a function of the step number: the samples, their augmentation, dropout, learning rate. So
going on from a checkpoint is the run that was never stopped, bit for bit. Stop requests and the clock are
agreed over ranks once a step; all ranks leave at the same step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from geopose_dist.errors import FinishedWithFailures, Preempted
from geopose_dist.metrics_log import Progress as ProgressBar
from geopose_dist.model import loss
from geopose_dist.runtime import StopRequest, World, join_world
from geopose_dist.train import checkpoint, validate
from geopose_dist.train.optim import lr_factor, set_lr
from geopose_dist.train.recipe import TrainRecipe
from geopose_dist.train.session import Session, open_session
from geopose_dist.train.step import StepResult


def run(recipe: TrainRecipe) -> None:
    """Train, or go on training, as `recipe` says; on every rank that torchrun started."""
    with StopRequest() as stop, join_world(recipe.device) as world:
        session = open_session(recipe, world)
        if session.finished:
            session.say(f"{recipe.out} is done: {session.progress.step} steps; nothing to do")
            return
        try:
            train(session, stop)
        finally:
            session.log.close()


def train(session: Session, stop: StopRequest) -> None:
    """The loop itself."""
    recipe, world = session.recipe, session.world
    meter = Meter(recipe.data.global_batch)
    steps = iter(session.loader)
    with session.progress_bar() as bar:
        while True:
            elapsed_s, asked = agree(world, session.elapsed_s(), stop)
            step, fraction = session.progress.step, session.fraction(elapsed_s)
            if fraction >= 1:
                break
            if asked:
                save(session, elapsed_s)
                session.set_status("preempted")
                raise Preempted(
                    f"stopped by {stop.signal_name or 'a signal to another rank'} after step {step}, which is saved in "
                    f"{recipe.out}; run the same command to go on"
                )
            set_lr(session.stepper.optimizer, lr_factor(recipe.optim, step, fraction))
            batches = meter.waiting(steps)
            result = session.stepper.step(batches, step, world.rank)
            if session.ema is not None:
                session.ema.update(session.net, step)
            session.advance(elapsed_s)
            if session.progress.step % recipe.log_every == 0 or session.is_last():
                write_metrics(session, result, meter, bar, [key for batch in batches for key in batch.keys])
            if session.validation_due():
                take_score(session)
            if session.save_due():
                save(session, session.elapsed_s())
            bar.advance()
    if session.progress.r2 is None:
        take_score(session)
    save(session, session.elapsed_s())
    session.set_status("done")
    session.say(session.summary())


def agree(world: World, elapsed_s: float, stop: StopRequest) -> tuple[float, bool]:
    """Rank 0's clock, and whether any rank was asked to stop: one small exchange on the CPU."""
    control = torch.tensor([elapsed_s if world.is_first else 0.0, float(bool(stop))], dtype=torch.float64)
    clock, asked = world.sum(control).tolist()
    return clock, asked > 0


@dataclass
class Meter:
    """Speed since the last line of metrics.

    Attributes:
        global_batch: tiles of one step over all ranks.
    """

    global_batch: int

    def __post_init__(self) -> None:
        self._began, self._waited_s, self._steps = time.monotonic(), 0.0, 0

    def waiting(self, steps: Iterator[Any]) -> Any:
        """The next step's batches, with the time it took counted as waiting for data."""
        began = time.monotonic()
        batches = next(steps)
        self._waited_s += time.monotonic() - began
        self._steps += 1
        return batches

    def take(self) -> dict[str, float]:
        """Tiles per second over all ranks and the share of time spent waiting; starts anew."""
        passed = max(time.monotonic() - self._began, 1e-9)
        speeds = {
            "tiles_per_s": self._steps * self.global_batch / passed,
            "data_wait_share": self._waited_s / passed,
        }
        self.__post_init__()
        return speeds


def write_metrics(
    session: Session, result: StepResult, meter: Meter, bar: ProgressBar, keys: list[str]
) -> None:
    """One line of metrics.jsonl about the step just taken; a loss that is not finite ends the run by name."""
    shares = session.world.sum(torch.cat([result.loss[None], result.terms]))
    value, *terms = (float(share) for share in shares)
    step, optimizer = session.progress.step, session.stepper.optimizer
    if value != value or abs(value) == float("inf"):
        raise FinishedWithFailures(
            f"step {step}: the loss is {value}; this rank's tiles: {', '.join(keys)}; the last "
            f"checkpoint in {session.recipe.out} is whole; lower optim.lr, or look at these tiles"
        )
    weight = loss.weights(session.recipe.loss)
    line: dict[str, Any] = {
        "step": step,
        "epoch": step * session.recipe.data.global_batch / session.samples,
        "loss": value,
        **{f"loss_{name}": term for name, term in zip(loss.TERMS, terms, strict=True) if weight[name] > 0},
        **meter.take(),
        "lr": optimizer.param_groups[-1]["lr"],
        "grad_norm": float(result.grad_norm),
    }
    if session.world.device.type == "cuda":
        line["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if session.world.is_first:
        session.log.write("metrics", line)
        bar.advance(
            0, f"loss {value:.4g}, {line['tiles_per_s']:.3g} tiles/s, waiting {line['data_wait_share']:.0%}"
        )


def take_score(session: Session) -> None:
    """Validate raw and averaged weights; the better score is the checkpoint's."""
    if session.validation is None:
        return
    kinds = (
        {"raw": session.net} if session.ema is None else {"raw": session.net, "ema": session.averaged_net()}
    )
    results: dict[str, float] = {}
    for kind, net in kinds.items():
        score = validate.evaluate(
            net,
            session.validation,
            session.world,
            precision=session.recipe.precision,
            batch=session.recipe.data.micro_batch,
        )
        results[kind] = score["r2"]
        if session.world.is_first:
            step = session.progress.step
            epoch = step * session.recipe.data.global_batch / session.samples
            line = {
                "step": step,
                "epoch": epoch,
                "weights": kind,
                "r2": score["r2"],
                "cities": score["cities"],
            }
            session.log.write("validation", line)
    best = max(results, key=lambda kind: results[kind])
    session.set_score(results[best], best)
    session.say(f"step {session.progress.step}: validation score {results[best]:.4f} ({best} weights)")


def save(session: Session, elapsed_s: float) -> None:
    """Write a checkpoint on rank 0 while the others wait, then remove what is too old."""
    if session.world.is_first:
        checkpoint.save(
            session.recipe_path(), session.recipe, session.progress_at(elapsed_s), session.snapshot()
        )
        checkpoint.prune(session.recipe_path(), session.recipe.checkpoint.keep)
    session.world.barrier()
