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

import torch

from geopose_dist import config, files
from geopose_dist.augment import transform_of
from geopose_dist.data.loader import train_loader
from geopose_dist.data.manifest import ShardSet
from geopose_dist.data.reader import open_shards
from geopose_dist.errors import UserError
from geopose_dist.metrics_log import MetricsLog
from geopose_dist.metrics_log import Progress as ProgressBar
from geopose_dist.model import weights
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.runtime import World
from geopose_dist.train import checkpoint, opening, parallel, recompute
from geopose_dist.train.checkpoint import Progress, Snapshot
from geopose_dist.train.optim import AveragedWeights, make_optimizer
from geopose_dist.train.recipe import Length, TrainRecipe
from geopose_dist.train.step import Stepper

ENDLESS_STEPS = 2**40
"""Steps that the loader is ready for where the clock ends the run."""
RUN_STATE = "state.json"
"""In the run folder: {"status": "running" | "preempted" | "done", "step": N}; launchers read it."""


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
        facts: what prediction must share with training.
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
    finished: bool = False
    _began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._elapsed_before_s = self.progress.elapsed_s
        self._saved_step = self.progress.step

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
        """Note the validation score of the weights at this step."""
        self.progress = replace(self.progress, r2=None if math.isnan(r2) else r2, use=use)

    def progress_at(self, elapsed_s: float) -> Progress:
        """The position, for a checkpoint written now."""
        self._saved_step = self.progress.step
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
        """The run folder."""
        return Path(self.recipe.out)

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
        )

    def set_status(self, status: str) -> None:
        """Tell launchers how the run stands."""
        if self.world.is_first:
            state = {"status": status, "step": self.progress.step}
            files.write_bytes(self.recipe_path() / RUN_STATE, json.dumps(state).encode())

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
        return f"done: {self.progress.step} steps in {self.elapsed_s():.0f} s{score}; see {self.recipe.out}"


def open_session(recipe: TrainRecipe, world: World) -> Session:
    """Open data, network and checkpoint of a run; every mistake in the recipe shows here (UserError)."""
    if not recipe.data.shards:
        raise UserError("data.shards is not set; name the folder that `geopose pack` made: --data.shards DIR")
    parallel.check_parallel(recipe, world)
    shards = open_shards(recipe.data.shards, recipe.data.train_split)
    validation = opening.validation_split(recipe, world)
    recipe = opening.with_data_facts(recipe, shards)
    run = Path(recipe.out)
    folders = weights.step_folders(run)
    fingerprint = shards.fingerprint()
    progress, stored = Progress(fingerprint=fingerprint), None
    if folders:
        checkpoint.check_same_run(folders[-1], recipe, fingerprint)
        progress, stored = checkpoint.read_progress(folders[-1]), checkpoint.load(folders[-1])

    torch.manual_seed(recipe.seed)
    net = GeoposeNet(recipe.model)
    source = opening.start_weights(net, recipe, stored)
    if recipe.sync_batchnorm:
        net = parallel.normalise_over_ranks(net)
    if recipe.checkpoint_activations:
        recompute.recompute_blocks(net)
    net.to(world.device)
    if recipe.channels_last:
        net.to(memory_format=torch.channels_last)
    net.train()
    opening.set_arithmetic(recipe.precision)
    optimizer = make_optimizer(recipe.optim, net, world.device)
    stepper = Stepper(recipe, net, optimizer, world, shards.manifest.cities)
    ema = AveragedWeights(net, recipe.ema_decay) if recipe.ema_decay > 0 else None
    if stored is not None:
        optimizer.load_state_dict(stored.optimizer)
        stepper.scaler.load_state_dict(stored.scaler)
        if ema is not None and stored.ema is not None:
            ema.state = {name: value.to(world.device) for name, value in stored.ema.items()}

    total_steps = Length.parse(recipe.length).steps(len(shards), recipe.data.global_batch)
    finished = stored is not None and (total_steps is not None and progress.step >= total_steps)
    if world.is_first:
        run.mkdir(parents=True, exist_ok=True)
        files.write_bytes(run / "recipe.yaml", config.dump(recipe).encode())
    loader = train_loader(
        shards,
        recipe.data,
        seed=recipe.seed,
        rank=world.rank,
        world_size=world.size,
        start_step=progress.step,
        stop_step=total_steps if total_steps is not None else ENDLESS_STEPS,
        transform=transform_of(recipe.augment, recipe.data.crop_px),
    )
    session = Session(
        recipe=recipe,
        world=world,
        net=net,
        stepper=stepper,
        ema=ema,
        loader=loader,
        samples=len(shards),
        total_steps=total_steps,
        validation=validation,
        log=MetricsLog(run, progress.step, tensorboard=True) if world.is_first else _NoLog(),
        facts=opening.facts_of(shards),
        progress=progress,
        finished=finished,
    )
    if not finished:
        session.set_status("running")
        where = f"goes on after step {progress.step}" if stored is not None else source
        length = f"{total_steps} steps" if total_steps is not None else recipe.length
        session.say(
            f"{recipe.out}: {len(shards)} tiles, {length} of {recipe.data.global_batch}, {world.size} rank(s) on "
            f"{world.device.type}, {recipe.precision}; {where}"
        )
    return session


class _NoLog(MetricsLog):
    """The log of ranks that write nothing."""

    def __init__(self) -> None:
        self._board = None

    def write(self, kind: str, line: dict[str, Any]) -> None:
        raise AssertionError("only the first rank writes metrics")
