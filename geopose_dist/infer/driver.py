"""`geopose predict`: the work list, who has done what, and what could not be done.

The list is cut into batches once; actors predict them in any order and write each tile's files whole. What
is finished is seen by the files themselves, so a run that was killed goes on and a finished run does
nothing. One georeferenced GeoTIFF goes another way, by windows: see `scene`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from geopose_dist import metrics_log
from geopose_dist.errors import FinishedWithFailures
from geopose_dist.files import write_bytes
from geopose_dist.infer import writer
from geopose_dist.infer.bookkeeping import (
    BOOKKEEPING,
    check_same_maker,
    forget,
    maker_of,
    only_driver,
    remember_maker,
    write_failures,
)
from geopose_dist.infer.crew import device_of, open_crew
from geopose_dist.infer.dispatch import SetAside
from geopose_dist.infer.load import Loads
from geopose_dist.infer.predictor import common_reduction, remaining_factor
from geopose_dist.infer.recipe import PredictRecipe
from geopose_dist.infer.scene_list import find_scenes
from geopose_dist.infer.sources import Source, find_source
from geopose_dist.infer.work import Report, WorkItem, WorkSpec, facts_of, fix_batches

TOLD = 50
"""Failures said on the terminal; a file has all of them."""


@dataclass
class Outcome:
    """What a run has done so far: counts, (key, sentence) of failures, keys written by this run."""

    total: int
    written: int = 0
    clipped: int = 0
    limited: int = 0
    other_filter: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    loads: Loads = field(default_factory=Loads)

    def add(self, item: WorkItem, answer: Report | SetAside) -> None:
        """Count an item's answer."""
        if isinstance(answer, SetAside):
            self.failures += [(key, f"{key}: set aside, {answer.reason}") for key in item.keys]
            return
        self.written += len(answer.written)
        self.keys += answer.written
        self.loads.add(answer.load)
        self.clipped += answer.clipped
        self.limited += answer.limited
        self.other_filter += answer.other_filter
        self.failures += answer.failures


def run(recipe: PredictRecipe) -> None:
    """Predict what is not predicted yet; exit 1 naming tiles that could not be."""
    from geopose_dist.model.run_store import fetched_weights
    from geopose_dist.model.weights import find_checkpoint, read_facts

    # Runs in a store are fetched to where all machines write their outputs.
    fetched = [
        fetched_weights(one, recipe.store, recipe.out / BOOKKEEPING / "weights") for one in recipe.checkpoint
    ]
    checkpoints = tuple(find_checkpoint(path) for path in fetched)
    reduction, _ = common_reduction([read_facts(path) for path in checkpoints], checkpoints)
    if scenes := find_scenes(recipe):
        from geopose_dist.infer.scene import run as run_scenes

        run_scenes(recipe, checkpoints, scenes, reduction)
        return
    source = find_source(recipe)
    remaining_factor(reduction, source.reduced_by)
    spec = WorkSpec(
        tuple(path.resolve() for path in checkpoints),
        recipe.net,
        recipe.batch,
        recipe.out.resolve(),
        recipe.unit,
        source.shards,
        source.split,
        source.reduced_by,
        device_of(recipe),
        recipe.threads,
        source.store,
        source.tiles[0] if source.tiles else None,
    )
    maker = maker_of(checkpoints, facts_of(spec))
    if recipe.dry_run:
        check_same_maker(recipe.out, maker, overwrite=recipe.overwrite)
        todo, done = _todo(recipe, spec, source)
        print(
            f"{recipe.out}: {len(source.tiles)} tiles from {source.tiles[0].key} to {source.tiles[-1].key}; "
            f"{len(done)} are finished, {len(source.tiles) - len(done)} to do in {len(todo)} batches"
        )
        return
    with only_driver(recipe.out):
        same = check_same_maker(recipe.out, maker, overwrite=recipe.overwrite)
        if recipe.overwrite:
            forget(recipe.out, {tile.key for tile in source.tiles}, all_of_them=not same)
        remember_maker(recipe.out, maker)
        outcome = _predict(recipe, spec, source)
        write_failures(recipe.out, outcome.failures)
    _tell(recipe, outcome)


def _todo(recipe: PredictRecipe, spec: WorkSpec, source: Source) -> tuple[list[WorkItem], set[str]]:
    """Batches with a tile that is not finished, and the tiles that are."""
    finished = (t.key for t in source.tiles if writer.is_finished(spec.out, t.key, spec.unit))
    done = set() if recipe.overwrite else set(finished)
    items = fix_batches(source.tiles, recipe.batch)
    return [item for item in items if not done.issuperset(item.keys)], done


def _predict(recipe: PredictRecipe, spec: WorkSpec, source: Source) -> Outcome:
    todo, _ = _todo(recipe, spec, source)
    outcome = Outcome(total=len(source.tiles))
    told = {key for item in todo for key in item.keys}
    outcome.written = len(source.tiles) - len(told)
    if not todo:
        return outcome
    print(
        f"predict: {outcome.total} tiles, {outcome.written} of them finished; starting actors",
        file=sys.stderr,
    )
    began = time.monotonic()
    with (
        open_crew(recipe, spec, len(todo)) as crew,
        metrics_log.Progress(outcome.total, f"predict, {crew.where}", start=outcome.written) as progress,
    ):
        for item, answer in crew.work.results(todo):
            outcome.add(item, answer)
            note = f"{len(outcome.failures)} failed" if outcome.failures else ""
            progress.advance(len(item.keys), note)
    outcome.failures += not_here(recipe.out, outcome.keys)
    if said := outcome.loads.in_words():
        print(f"predict: {said}", file=sys.stderr)
    facts = {
        "tiles": len(outcome.keys),
        "seconds": round(time.monotonic() - began, 3),
        **outcome.loads.facts(),
    }
    write_bytes(recipe.out / BOOKKEEPING / "last_job.json", (json.dumps(facts, indent=1) + "\n").encode())
    return outcome


def not_here(out: Path, keys: Collection[str], patience_s: float = 10.0) -> list[tuple[str, str]]:
    """(key, sentence) of tiles that actors wrote and that this machine does not see, even after a while (NFS)."""
    until = time.monotonic() + patience_s
    while True:
        names = {entry.name for entry in os.scandir(out)}
        lost = [key for key in keys if f"{key}_AGL.tif" not in names]
        if not lost or time.monotonic() > until:
            return [
                (
                    key,
                    f"{key}: written where this machine does not see it; --out is to be a folder that all share",
                )
                for key in lost
            ]
        time.sleep(0.5)


def _tell(recipe: PredictRecipe, outcome: Outcome) -> None:
    """One line on stdout; FinishedWithFailures if a tile is not there."""
    notes = []
    if outcome.clipped:
        notes.append(f"{outcome.clipped} heights clipped to 0 .. {recipe.net.agl_max_m:g} m")
    if outcome.limited:
        limits = f"{recipe.net.scale_min_px_per_m:g} .. {recipe.net.scale_max_px_per_m:g} px/m"
        notes.append(f"{outcome.limited} scales limited to {limits}")
    if outcome.other_filter:
        notes.append(f"{outcome.other_filter} tiles were reduced by another filter than in training")
    told = "".join(f"; {note}" for note in notes)
    print(f"{recipe.out}: {outcome.total - len(outcome.failures)} of {outcome.total} tiles predicted{told}")
    if outcome.failures:
        where = recipe.out / BOOKKEEPING / "failures.jsonl"
        sentences = [sentence for _, sentence in sorted(outcome.failures)]
        more = [f"... and {len(sentences) - TOLD} more"] * (len(sentences) > TOLD)
        title = f"{len(sentences)} of {outcome.total} tiles failed (all of them in {where}):"
        raise FinishedWithFailures("\n  ".join([title, *sentences[:TOLD], *more]))
