"""Samples that stood in for damaged ones: `damage.jsonl` of a run, over all ranks and all starts.

Every rank counts what its loader replaced; the sum is part of the exchange in which ranks agree once a step to go
on, so that all of them see it grow, write it down and stop past `data.damage_limit` at the same step. A line
names the position in the stream, so what was replaced after the last checkpoint is written again by the steps
that are taken again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from geopose_dist.data.batch import Batch, Substitution
from geopose_dist.errors import UserError
from geopose_dist.metrics_log import keep_until
from geopose_dist.runtime import World

DAMAGE_LOG = "damage.jsonl"
"""In the run folder: {"step", "position", "key", "reason", "replaced_by"}, in the order of positions."""


class Damage:
    """What was replaced so far.

    Attributes:
        limit: replacements past which the run stops.
    """

    def __init__(self, run: Path, step: int, limit: int, world: World) -> None:
        self.limit, self._world, self._path = limit, world, run / DAMAGE_LOG
        self._new: list[dict[str, Any]] = []
        self._written = 0
        # Counted by rank 0, which alone reads the run folder; the others begin with nothing.
        self._count = len(_lines(self._path, step)) if world.is_first else 0

    def note(self, step: int, batches: Iterable[Batch]) -> None:
        """Remember what was replaced in this rank's batches of a step; nothing is told to anybody yet."""
        found = [_line(step, one) for batch in batches for one in batch.substitutions]
        self._new += found
        self._count += len(found)

    @property
    def count(self) -> int:
        """This rank's share of `total`."""
        return self._count

    def total(self) -> int:
        """Replacements of all ranks and starts; every rank must ask."""
        return int(self._world.sum(torch.tensor([self._count], dtype=torch.int64)))

    def agreed(self, total: int) -> None:
        """Write what is new and stop past the limit; `total` is the sum of the ranks' counts (UserError)."""
        if total == self._written:
            return
        gathered = self._world.gather_objects(self._new)
        new = sorted((line for lines in gathered for line in lines), key=lambda line: line["position"])
        self._new, self._written = [], total
        if self._world.is_first and new:
            with self._path.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in new))
        if total > self.limit:
            last = new[-1]["reason"] if new else f"see {self._path}"
            raise UserError(
                f"{total} damaged samples were replaced so far, more than data.damage_limit {self.limit} allows; "
                f"{self._path} names them; the last: {last}"
            )


def _line(step: int, one: Substitution) -> dict[str, Any]:
    return {"step": step, **dataclasses.asdict(one)}


def _lines(path: Path, step: int) -> list[str]:
    """Lines of steps up to `step`; later ones are of steps that will be taken again."""
    keep_until(path, step)
    return path.read_text().splitlines() if path.exists() else []
