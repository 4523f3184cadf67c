"""What a run holds while it lasts: data, network, optimiser, position; opened fresh or from a checkpoint."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from geopose_dist import config, files
from geopose_dist.data.manifest import ShardSet
from geopose_dist.data.stores import StoreFailure
from geopose_dist.errors import UserError
from geopose_dist.metrics_log import MetricsLog
from geopose_dist.metrics_log import Progress as ProgressBar
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.runtime import World
from geopose_dist.train import checkpoint, opening
from geopose_dist.train.beginning import Beginning
from geopose_dist.train.checkpoint import Progress, Snapshot
from geopose_dist.train.damage import Damage
from geopose_dist.train.guard import Verdicts
from geopose_dist.train.optim import AveragedWeights, make_optimizer
from geopose_dist.train.recipe import Length, TrainRecipe
from geopose_dist.train.saving import Writer
from geopose_dist.train.step import Stepper

RUN_STATE = "state.json"
"""In the run folder: {"status": "running" | "preempted" | "lost" | "done", "step": N}; launchers read it."""


@dataclass
class Session:
    """A run in progress on this rank.

    Attributes:
        recipe: with the model's means filled in from the data.
        net: the bare network.
        loader: this rank's micro-batches, step by step, from `progress.step` on.
        samples: tiles of the training split.
        total_steps: steps of the whole run; None if the clock decides.
        validation: the validation split, if there is one.
        writer: writes checkpoints, on rank 0.
        facts: what prediction must share with training.
        verdicts: reads whether steps were finite.
        damage: counts samples that stood in for damaged ones.
    """

    recipe: TrainRecipe
    world: World
    net: GeoposeNet
    stepper: Stepper
    ema: AveragedWeights | None
    loader: Iterable[Any]
    samples: int
    total_steps: int | None
    validation: ShardSet | None
    log: MetricsLog
    facts: dict[str, Any]
    progress: Progress
    writer: Writer
    verdicts: Verdicts
    damage: Damage
    finished: bool = False
    _began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._elapsed_before_s, self._first_step = self.progress.elapsed_s, self.progress.step

    def elapsed_s(self) -> float:
        """Time trained so far, over all starts."""
        return self._elapsed_before_s + time.monotonic() - self._began

    def fraction(self, elapsed_s: float) -> float:
        """Share of the run that has passed, 0 to 1."""
        if self.total_steps is not None:
            return self.progress.step / self.total_steps
        return elapsed_s / (60 * Length.parse(self.recipe.length).value)

    def is_last(self) -> bool:
        """Whether the step just taken is known to be the last."""
        return self.progress.step == self.total_steps

    def advance(self, elapsed_s: float) -> None:
        """Count a step as taken; a score belongs to the step it was taken at."""
        self.progress = replace(
            self.progress, step=self.progress.step + 1, elapsed_s=elapsed_s, r2=None, use="raw"
        )

    def set_score(self, r2: float, use: str) -> None:
        """Note the validation score of the weights at this step, and whether it is the best so far."""
        best = self.progress.best
        better = not math.isnan(r2) and (best is None or r2 > best)
        self.progress = replace(
            self.progress,
            r2=None if math.isnan(r2) else r2,
            use=use,
            best=r2 if better else best,
            stale=0 if better else self.progress.stale + 1,
        )

    def worn_out(self) -> bool:
        """Whether `validation.patience` validations in a row brought nothing better: the run ends early."""
        return 0 < self.recipe.validation.patience <= self.progress.stale

    def progress_at(self, elapsed_s: float) -> Progress:
        """The position, for a checkpoint written now."""
        return replace(self.progress, elapsed_s=elapsed_s)

    def validation_due(self) -> bool:
        """Whether this is the first step past a multiple of `validation.every_epochs`."""
        every = self.recipe.validation.every_epochs * self.samples
        if self.validation is None or every == 0 or self.is_last():
            return False
        seen = self.progress.step * self.recipe.data.global_batch
        return seen // every > (seen - self.recipe.data.global_batch) // every

    def save_due(self) -> bool:
        """Whether to write a checkpoint after this step."""
        return self.progress.r2 is not None or self.progress.step % self.recipe.checkpoint.every_steps == 0

    def recipe_path(self) -> Path:
        """The run folder on this machine."""
        return self.writer.run

    def averaged_net(self) -> GeoposeNet:
        """A copy of the network with the averaged weights."""
        assert self.ema is not None
        net = copy.deepcopy(self.net)
        net.load_state_dict(self.ema.state)
        return net

    def snapshot(self) -> Snapshot:
        """What a checkpoint written now must hold."""
        return Snapshot(
            self.net.state_dict(),
            self.stepper.optimizer.state_dict(),
            self.stepper.scaler.state_dict(),
            None if self.ema is None else self.ema.state,
            self.facts,
            self.stepper.spread.sums if self.stepper.spread.running else None,
        )

    def set_status(self, status: str, for_all: bool = False) -> None:
        """Tell launchers how the run stands; rank 0 does, or this rank in its place."""
        if self.world.is_first or for_all:
            state = {"status": status, "step": self.progress.step}
            files.write_bytes(self.recipe_path() / RUN_STATE, json.dumps(state).encode())

    def note_lost_peer(self) -> None:
        """Tell launchers to start again, from any rank; not if this start came to nothing, or they would for ever."""
        if self.progress.step > self._first_step:
            self.set_status("lost", for_all=True)
            self.upload((RUN_STATE,))

    def leave(self) -> None:
        """Upload what was written since the last save, whatever ends the run; of other ranks what is theirs alone."""
        self.upload(("",) if self.world.is_first else (f"rank-{self.world.rank}.",))

    def upload(self, marks: tuple[str, ...]) -> None:
        """Bring files whose names hold one of `marks` into the run's store, if it has one; says what fails."""
        if self.writer.store is None:
            return
        try:
            self.writer.store.put_logs(marks)
        except (StoreFailure, UserError) as error:
            told = f"rank {self.world.rank}: the last lines of the logs are not in the store: {error}"
            print(told, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Tell the user, once over all ranks."""
        if self.world.is_first:
            print(text, file=sys.stderr, flush=True)

    def progress_bar(self) -> AbstractContextManager[ProgressBar]:
        """The display of steps; silent on ranks other than the first."""
        total = self.total_steps if self.total_steps is not None else 0
        return ProgressBar(total, "train", "steps", start=self.progress.step, silent=not self.world.is_first)

    def summary(self) -> str:
        """The last sentence of a run."""
        score = "" if self.progress.r2 is None else f", validation score {self.progress.r2:.4f}"
        early = (
            f", ended early: no better score in {self.progress.stale} validations" if self.worn_out() else ""
        )
        return f"done: {self.progress.step} steps in {self.elapsed_s():.0f} s{score}{early}; see {self.recipe.out}"


def open_session(recipe: TrainRecipe, world: World, beginning: Beginning | None = None) -> Session:
    """Open a run, fresh or where it stopped; every mistake in the recipe shows here (UserError)."""
    opened = opening.look(recipe, world, beginning)
    recipe, progress, stored = opened.recipe, opened.progress, opened.stored
    net = opening.prepared(opened, world)
    optimizer = make_optimizer(recipe.optim, net, world.device, recipe.data.global_batch)
    stepper = Stepper(recipe, net, optimizer, world, opened.shards.manifest.cities)
    ema = AveragedWeights(net, recipe.ema_decay) if recipe.ema_decay > 0 else None
    if stored is not None:
        optimizer.load_state_dict(stored.optimizer)
        stepper.scaler.load_state_dict(stored.scaler)
        if stored.city_sums is not None:
            stepper.spread.sums.copy_(stored.city_sums)
        if ema is not None and stored.ema is not None:
            ema.state = {name: value.to(world.device) for name, value in stored.ema.items()}
    loader = opening.loader_of(opened, world)
    run, store = opened.beginning.folder, opened.beginning.store
    # From here on files are written: all that a recipe can get wrong was looked at before.
    if world.is_first:
        run.mkdir(parents=True, exist_ok=True)
        files.write_bytes(run / "recipe.yaml", config.dump(recipe).encode())
        checkpoint.tidy(run)
    session = Session(
        recipe=recipe,
        world=world,
        net=net,
        stepper=stepper,
        ema=ema,
        loader=loader,
        samples=len(opened.shards),
        total_steps=opened.total_steps,
        validation=opened.validation,
        log=MetricsLog(run, progress.step, tensorboard=True) if world.is_first else _NoLog(),
        facts=opening.facts_of(opened.shards, recipe.model),
        progress=progress,
        writer=Writer(run, recipe, store),
        verdicts=Verdicts(recipe, world, opened.shards.manifest.cities),
        damage=Damage(run, progress.step, recipe.data.damage_limit, world),
        finished=opened.total_steps is not None and progress.step >= opened.total_steps,
    )
    session.finished |= session.worn_out()
    if not session.finished:
        session.set_status("running")
        if store is not None and world.is_first:
            store.put_logs()  # what may not be written shows now
        session.say(opened.summary(world))
    return session


class _NoLog(MetricsLog):
    """The log of ranks that write nothing."""

    def __init__(self) -> None:
        self._board = None

    def write(self, kind: str, line: dict[str, Any]) -> None:
        raise AssertionError("only the first rank writes metrics")
