"""What ranks do together before their process group, and its clock, exist.

They see that they are alike (`preflight`), every machine stages its shards if it is to, rank 0 finds the
newest checkpoint, and every machine gets it. Whatever takes long here cannot time a collective out, and what is
wrong on one machine ends all ranks with one sentence that names it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from geopose_dist.data import catalogue, staging
from geopose_dist.data.reader import open_shards
from geopose_dist.errors import UserError
from geopose_dist.meeting import Meeting
from geopose_dist.model import weights
from geopose_dist.model.run_store import CHECKPOINTS
from geopose_dist.train import place, preflight
from geopose_dist.train.recipe import TrainRecipe

SHARED_S = 30.0
"""How long a shared folder may take to show on one machine what another one wrote."""


class Beginning:
    """The start of a run, as far as it needs no process group.

    Attributes:
        folder: of the run on this machine. store: where it is kept besides, if `out` is a URL.
        checkpoint: the newest one, in `folder`; None if there is none. Alike on all ranks.
        claim: keeps staged shards from being thrown out.
    """

    def __init__(self, recipe: TrainRecipe, stopped: Callable[[], str] = lambda: "") -> None:
        self.recipe, self._stopped = recipe, stopped
        self.folder, self.store = place.local_folder(recipe), place.run_store(recipe)
        self.checkpoint: Path | None = None
        self.claim: staging.Claim | None = None

    @classmethod
    def alone(cls, recipe: TrainRecipe) -> Beginning:
        """Of one process that asks nobody."""
        beginning = cls(recipe)
        beginning.prepare(Meeting(0, 1))
        return beginning

    def prepare(self, meeting: Meeting) -> None:
        """All of it, on every rank."""
        preflight.check(self.recipe, meeting)
        data = self.recipe.data
        if data.shards and data.store.stage == "node" and not self.recipe.check:
            meeting.agree("staging of shards", self._stage, lambda _: None)
        newest: str = meeting.agree(
            "the newest checkpoint", lambda: "" if meeting.rank else self._newest(), lambda said: said[0]
        )
        fetched = f"fetching {newest or 'no checkpoint'}"
        meeting.agree(fetched, lambda: self._bring(newest, meeting), lambda _: None)

    def _stage(self) -> None:
        data = self.recipe.data
        known = catalogue.read_manifest(data.shards, data.store).splits()
        splits = [split for split in (data.train_split, data.validation_split) if known.get(split)]
        sets = [open_shards(data.shards, split, data.store) for split in splits]
        if sets:
            sets[0] = sets[0].first(data.samples)
            self.claim = staging.stage(sets, self._stopped)

    def _newest(self) -> str:
        steps = self.store.steps() if self.store else [f.name for f in weights.step_folders(self.folder)]
        return steps[-1] if steps else ""

    def _bring(self, newest: str, meeting: Meeting) -> None:
        if self.store is not None:
            self.checkpoint = self.store.bring(newest)
            if meeting.rank == 0 and newest:
                self.store.bring_logs()
        elif newest:
            self.checkpoint = self.folder / CHECKPOINTS / newest
            until = time.monotonic() + SHARED_S
            while not (self.checkpoint / weights.STATE_NAME).is_file():
                if time.monotonic() > until:
                    raise UserError(
                        f"{self.checkpoint} is not there, but rank 0 on {meeting.host_of(0)} has it; --out must be a "
                        "folder that all machines share, or a URL such as s3://BUCKET/RUN"
                    )
                threading.Event().wait(0.2)
