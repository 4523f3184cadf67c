"""`geopose predict`: the work list, who has done what, and what could not be done.

The list is cut into batches once; actors predict them in any order and write each tile's files whole. What
is finished is seen by the files themselves, so a run that was killed goes on and a finished run does
nothing. `.geopose-predict/` beside the outputs remembers what made them (another checkpoint is refused
there), keeps a second driver out, and lists failures in `failures.jsonl`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geopose_dist import files, metrics_log, pool
from geopose_dist.data import manifest
from geopose_dist.data.reader import Reader
from geopose_dist.errors import FinishedWithFailures, UserError
from geopose_dist.infer import writer
from geopose_dist.infer.dispatch import Dispatch, SetAside
from geopose_dist.infer.recipe import PredictRecipe
from geopose_dist.infer.work import Report, TileSource, WorkItem, WorkSpec, facts_of, fix_batches
from shards import images, layouts

BOOKKEEPING = ".geopose-predict"


@dataclass(frozen=True)
class Source:
    """What is to be predicted: tiles sorted by key, and how they are read."""

    tiles: list[TileSource]
    shards: Path | None = None
    split: str = ""
    reduced_by: int = 1


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


def find_source(recipe: PredictRecipe) -> Source:
    """The tiles that `--source`, `--split` and `--limit` mean (UserError)."""
    path, split = recipe.source, recipe.split
    if path.is_file():
        source = Source([_single(path)])
    elif (path / manifest.MANIFEST_NAME).is_file():
        facts = manifest.read_manifest(path)
        available = facts.splits()
        if not split and "test" not in available:
            raise UserError(
                f"--source {path}: no split test in these shards; name one by --split: {', '.join(available)}"
            )
        reader = Reader(manifest.open_split(path, split or "test"))
        tiles = [TileSource(reader.key(i), index=i) for i in range(len(reader))]
        source = Source(tiles, path, split or "test", int(facts.recipe.get("reduce", 1)))
    else:
        found = layouts.read_layout(path)
        chosen = [tile for tile in found if tile.split == (split or "test")]
        if split == "all" or (not split and not chosen):
            chosen = found
        if not chosen:
            raise UserError(
                f"--source {path}: none of {len(found)} tiles is of split {split!r}; try --split all"
            )
        source = Source([TileSource(tile.key, tile) for tile in chosen])
    ordered = sorted(source.tiles, key=lambda tile: tile.key)
    return Source(ordered[: recipe.limit or None], source.shards, source.split, source.reduced_by)


def _single(path: Path) -> TileSource:
    if path.suffix[1:].lower() not in images.RGB_EXTENSIONS:
        raise UserError(
            f"--source {path}: not an image by its name; wanted one of .{', .'.join(images.RGB_EXTENSIONS)}, a "
            "dataset folder, or a folder of shards"
        )
    key = path.name[: -len(path.suffix)].removesuffix("_RGB")
    return TileSource(key, layouts.Tile(key, key.split("_")[0], path))


def run(recipe: PredictRecipe) -> None:
    """Predict what is not predicted yet; exit 1 naming tiles that could not be."""
    from geopose_dist.model.weights import find_checkpoint

    checkpoints = tuple(find_checkpoint(Path(path)) for path in recipe.checkpoint)
    source = find_source(recipe)
    with _only_driver(recipe.out):
        spec = WorkSpec(
            tuple(path.resolve() for path in checkpoints),
            recipe.net,
            recipe.batch,
            recipe.out.resolve(),
            recipe.unit,
            source.shards.resolve() if source.shards else None,
            source.split,
            source.reduced_by,
            _device(recipe),
            recipe.threads,
        )
        _check_same_maker(recipe, spec)
        outcome = _predict(recipe, spec, source)
        _write_failures(recipe.out, outcome)
    _tell(recipe, outcome)


def _device(recipe: PredictRecipe) -> str:
    if recipe.device != "auto":
        return recipe.device
    if recipe.ray_address:
        return "auto"  # the cluster's machines decide
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


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
    dispatch = recipe.dispatch
    if dispatch == "ray" and not pool.ray_is_installed():
        print("predict: Ray is not installed; plain processes do the same work", file=sys.stderr)
        dispatch = "process"
    if dispatch == "inline":
        print(
            "predict: one actor in this process (--dispatch inline), which is for debugging", file=sys.stderr
        )
    with contextlib.ExitStack() as stack:
        cores = pool.usable_cores()
        cpus_wanted = max(cores, recipe.workers * max(1, recipe.threads))
        actors = stack.enter_context(
            pool.Actors(dispatch, address=recipe.ray_address, cpus=cpus_wanted, use_gpus=spec.device != "cpu")
        )
        spec, count, gpus = _share(recipe, spec, actors, len(todo))
        work = Dispatch(
            actors,
            spec,
            count=count,
            cpus=spec.threads,
            gpus=gpus,
            attempts=recipe.attempts,
            timeout_s=recipe.item_timeout_s,
            split=WorkItem.parts,
        )
        where = f"{count} {dispatch} actor{'s' * (count != 1)} on {'GPU' if gpus else 'CPU'}"
        progress = stack.enter_context(
            metrics_log.Progress(len(source.tiles), f"predict, {where}", start=outcome.written)
        )
        for item, answer in work.results(todo):
            outcome.add(item, answer)
            note = f"{len(outcome.failures)} failed" if outcome.failures else ""
            progress.advance(len(item.keys), note)
    return outcome


def _share(
    recipe: PredictRecipe, spec: WorkSpec, actors: pool.Actors, items: int
) -> tuple[WorkSpec, int, int]:
    """The specification with device and threads settled, the number of actors, and the GPUs of each."""
    device = spec.device if spec.device != "auto" else ("cuda" if actors.gpus else "cpu")
    if device == "cuda" and not actors.gpus:
        raise UserError("--device cuda: there is no GPU here; use --device cpu")
    count = recipe.workers or (actors.gpus if device == "cuda" else max(1, actors.cpus // 2))
    if actors.kind == "inline":
        count = 1
    # Threads must not depend on how much is left to do: a run that goes on rounds as the first one did.
    threads = recipe.threads or max(1, actors.cpus // count)
    if device == "cuda":
        count = min(count, actors.gpus)
    settled = dataclasses.replace(spec, device=device, threads=threads)
    return settled, max(1, min(count, items)), int(device == "cuda")


@contextlib.contextmanager
def _only_driver(out: Path) -> Iterator[None]:
    """Keep a second driver out of the folder, and remove what killed actors left half-written."""
    folder = out / BOOKKEEPING
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--out {out}: another `geopose predict` is writing there; wait for it"
            ) from error
        for leftover in out.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        yield


def _check_same_maker(recipe: PredictRecipe, spec: WorkSpec) -> None:
    """Refuse to go on in a folder that other checkpoints or settings began (UserError)."""
    maker: dict[str, Any] = json.loads(json.dumps(facts_of(spec)))
    maker["checkpoints"] = [_sha256(path) for path in spec.checkpoints]
    path = recipe.out / BOOKKEEPING / "made_by.json"
    if not recipe.overwrite and not path.is_file() and any(recipe.out.glob("*_AGL.tif")):
        raise UserError(
            f"--out {recipe.out}: holds heights of unknown origin; give another folder, or --overwrite true"
        )
    if path.is_file() and not recipe.overwrite:
        before = json.loads(path.read_bytes())
        differ = [name for name in maker if before.get(name) != maker[name]]
        if differ:
            raise UserError(
                f"--out {recipe.out}: predictions there have other {' and '.join(differ)}; give "
                "another folder, or --overwrite true to predict them again"
            )
    _write_if_new(path, (json.dumps(maker, indent=1, sort_keys=True) + "\n").encode())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_failures(out: Path, outcome: Outcome) -> None:
    lines = [json.dumps({"key": key, "problem": sentence}) for key, sentence in sorted(outcome.failures)]
    _write_if_new(out / BOOKKEEPING / "failures.jsonl", "".join(line + "\n" for line in lines).encode())


def _write_if_new(path: Path, data: bytes) -> None:
    """A finished run that is started again touches nothing."""
    if not path.is_file() or path.read_bytes() != data:
        files.write_bytes(path, data)


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
