"""`geopose predict`: the work list, who has done what, and what could not be done.

The list is cut into batches once; actors predict them in any order and write each tile's files whole. What
is finished is seen by the files themselves, so a run that was killed goes on and a finished run does
nothing. One georeferenced GeoTIFF goes another way, by windows: see `scene`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from geopose_dist import metrics_log
from geopose_dist.errors import FinishedWithFailures
from geopose_dist.infer import raster, writer
from geopose_dist.infer.bookkeeping import BOOKKEEPING, check_same_maker, only_driver, write_failures
from geopose_dist.infer.crew import device_of, open_crew
from geopose_dist.infer.dispatch import SetAside
from geopose_dist.infer.recipe import PredictRecipe
from geopose_dist.infer.sources import Source, find_source
from geopose_dist.infer.work import Report, WorkItem, WorkSpec, facts_of, fix_batches


@dataclass
class Outcome:
    """What a run has done so far."""

    total: int
    written: int = 0
    clipped: int = 0
    limited: int = 0
    other_filter: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)

    def add(self, item: WorkItem, answer: Report | SetAside) -> None:
        """Count an item's answer."""
        if isinstance(answer, SetAside):
            self.failures += [(key, f"{key}: set aside, {answer.reason}") for key in item.keys]
            return
        self.written += len(answer.written)
        self.clipped += answer.clipped
        self.limited += answer.limited
        self.other_filter += answer.other_filter
        self.failures += answer.failures


def run(recipe: PredictRecipe) -> None:
    """Predict what is not predicted yet; exit 1 naming tiles that could not be."""
    from geopose_dist.model.weights import find_checkpoint

    checkpoints = tuple(find_checkpoint(Path(path)) for path in recipe.checkpoint)
    if raster.is_scene(Path(recipe.source)):
        from geopose_dist.infer.scene import run as run_scene

        run_scene(recipe, checkpoints)
        return
    source = find_source(recipe)
    with only_driver(recipe.out):
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
        check_same_maker(recipe.out, spec.checkpoints, facts_of(spec), overwrite=recipe.overwrite)
        outcome = _predict(recipe, spec, source)
        write_failures(recipe.out, outcome.failures)
    _tell(recipe, outcome)


def _predict(recipe: PredictRecipe, spec: WorkSpec, source: Source) -> Outcome:
    items = fix_batches(source.tiles, recipe.batch)
    done = {
        t.key for t in source.tiles if not recipe.overwrite and writer.is_finished(spec.out, t.key, spec.unit)
    }
    todo = [item for item in items if not done.issuperset(item.keys)]
    outcome = Outcome(total=len(source.tiles))
    told = {key for item in todo for key in item.keys}
    outcome.written = len(source.tiles) - len(told)
    if not todo:
        return outcome
    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(open_crew(recipe, spec, len(todo)))
        progress = stack.enter_context(
            metrics_log.Progress(len(source.tiles), f"predict, {crew.where}", start=outcome.written)
        )
        for item, answer in crew.work.results(todo):
            outcome.add(item, answer)
            note = f"{len(outcome.failures)} failed" if outcome.failures else ""
            progress.advance(len(item.keys), note)
    return outcome


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
        raise FinishedWithFailures(
            "\n  ".join(
                [
                    f"{len(sentences)} of {outcome.total} tiles failed (also in {where}):",
                    *sentences,
                ]
            )
        )
