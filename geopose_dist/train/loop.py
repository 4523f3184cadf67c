"""The training loop: step, log, validate, save, until the length is reached or somebody asks to stop.

Everything is a function of the step number: the samples, their augmentation, dropout, learning rate. So
going on from a checkpoint is the run that was never stopped, bit for bit. Stop requests and the clock are
agreed over ranks once a step; all ranks leave at the same step.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch

from geopose_dist.errors import Preempted
from geopose_dist.runtime import StopRequest, World, join_world, note_again
from geopose_dist.train import opening, panels, validate
from geopose_dist.train.beginning import Beginning
from geopose_dist.train.metrics import Meter, write_metrics
from geopose_dist.train.optim import lr_factor, set_lr
from geopose_dist.train.prefetch import DevicePrefetch
from geopose_dist.train.profiling import profiled
from geopose_dist.train.recipe import TrainRecipe
from geopose_dist.train.session import Session, open_session
from geopose_dist.train.step import uncompiled
from geopose_dist.train.watch import Watch


def run(recipe: TrainRecipe) -> None:
    """Train, or go on training, as `recipe` says; on every rank that torchrun started."""
    with (
        StopRequest() as stop,
        begin(recipe, stop) as (world, beginning),
        Watch(world, recipe.timeout_s, recipe.out) as watch,
    ):
        if recipe.check:
            opened = opening.look(recipe, world, beginning)
            next(
                iter(opening.loader_of(opened, world)), None
            )  # tiles that cannot be read or cropped show here
            if world.is_first:
                print(f"{opened.summary(world)}; nothing is wrong", file=sys.stderr)
            return
        session = open_session(recipe, world, beginning)
        watch.on_lost = session.note_lost_peer
        try:
            if session.finished:
                session.say(f"{recipe.out} is done: {session.progress.step} steps; nothing to do")
            else:
                train(session, stop, watch)
        finally:
            session.writer.close()
            session.log.close()
            session.leave()


@contextlib.contextmanager
def begin(recipe: TrainRecipe, stop: StopRequest) -> Iterator[tuple[World, Beginning]]:
    """The world of this rank, after all that the ranks do before they have a process group."""
    beginning = Beginning(recipe, lambda: stop.reason)
    with join_world(
        recipe.device, recipe.timeout_s, prepare=beginning.prepare, stopped=lambda: stop.reason
    ) as world:
        yield world, beginning


def train(session: Session, stop: StopRequest, watch: Watch | None = None) -> None:
    """The loop itself."""
    recipe, world = session.recipe, session.world
    watch = watch or Watch(world, recipe.timeout_s, recipe.out)
    meter = Meter(recipe.data.global_batch)
    steps = DevicePrefetch(session.loader, world.device)
    began = session.progress.step
    with session.progress_bar() as bar, profiled(recipe, world) as profile_step:
        while True:
            step = session.progress.step
            watch.at(f"step {step + 1}: agreeing to go on")
            session.writer.check()
            elapsed_s, asked, replaced = agree(world, session.elapsed_s(), bool(stop), session.damage.count)
            session.damage.agreed(replaced)
            fraction = session.fraction(elapsed_s)
            if fraction >= 1 or session.worn_out():
                break
            if asked:
                save(session, elapsed_s, wait=True)
                session.set_status("preempted")
                note_again()
                why = stop.reason or f"a request to {asked}"
                raise Preempted(
                    f"stopped by {why} after step {step}, which is saved in {recipe.out}; run the same command to go on"
                )
            set_lr(session.stepper.optimizer, lr_factor(recipe.optim, step, fraction))
            watch.at(f"step {step + 1}: waiting for data")
            batches = meter.waiting(steps.take)
            session.damage.note(step + 1, batches)
            watch.at(f"step {step + 1}: forward, backward and the exchange of gradients")
            result = session.stepper.step(batches, step, world.rank)
            session.verdicts.note(step, session.stepper.guard.verdict, batches)
            session.verdicts.read(session.net)
            if session.ema is not None:
                session.ema.update(session.net, step)
            session.advance(elapsed_s)
            if step == began:
                note_again()
            meter.stepped()
            meter.waiting(steps.ahead)
            if session.progress.step % recipe.log_every == 0 or session.is_last():
                write_metrics(session, result, meter, bar)
            if session.validation_due():
                watch.at(f"step {step + 1}: validation")
                take_score(session)
            if session.save_due():
                watch.at(f"step {step + 1}: checkpoint")
                save(session, session.elapsed_s(), wait=False)
            bar.advance()
            profile_step()
    watch.at("the last validation")
    if session.progress.r2 is None:
        take_score(session)
    watch.at("the last checkpoint")
    save(session, session.elapsed_s(), wait=True)
    session.set_status("done")
    session.say(session.summary())


def agree(world: World, elapsed_s: float, stop: bool, replaced: int) -> tuple[float, str, int]:
    """Rank 0's clock, which rank was asked to stop, and what all replaced: one small exchange on the CPU."""
    mine = [elapsed_s if world.is_first else 0.0, float(replaced), float(stop), stop * (world.rank + 1.0)]
    clock, of_all, count, place = world.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
    asked = world.names([int(place) - 1]) if count == 1 else f"{count:.0f} ranks"
    return clock, asked if count else "", int(of_all)


def take_score(session: Session) -> None:
    """Validate raw and averaged weights; the better score is the checkpoint's."""
    if session.validation is None:
        return
    kinds = (
        {"raw": session.net} if session.ema is None else {"raw": session.net, "ema": session.averaged_net()}
    )
    results: dict[str, float] = {}
    for kind, net in kinds.items():
        with uncompiled():  # tiles of other sizes than crops, and a last batch of its own
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
    panels.show(session, kinds[best])
    session.say(f"step {session.progress.step}: validation score {results[best]:.4f} ({best} weights)")


def save(session: Session, elapsed_s: float, *, wait: bool) -> None:
    """Begin a checkpoint on rank 0; with `wait`, or if it is not written in the background, all wait for its end."""
    session.verdicts.read(session.net, all_of_it=True)  # no step may count as taken that was not
    if session.world.is_first:
        session.writer.save(session.progress_at(elapsed_s), session.snapshot(), wait=wait)
    if wait or not session.recipe.checkpoint.asynchronous:
        session.world.barrier()
