"""`geopose pack`: a dataset to WebDataset shards with a manifest; parallel, resumable, repeatable by byte.

Tiles are decoded, checked, reduced and encoded by worker processes and written, in the plan's order, by this
one. Finished shards wait in a dot-folder until all are there; then they take their places, and the manifest
last: a folder without one is unfinished. If tiles turn out damaged, all of them are named; within
`skip_damaged` the plan is made again without them, so shards stay equal in size.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from geopose_dist.errors import FinishedWithFailures, FoundProblems, UserError
from shards.pack_recipe import CodecRecipe, PackRecipe

if TYPE_CHECKING:
    from shards.layouts import Tile
    from shards.pack_plan import PlannedShard
    from shards.pack_state import State

__all__ = ["CodecRecipe", "PackRecipe", "run"]


def run(recipe: PackRecipe) -> None:
    """Pack, or go on packing; see the module's text."""
    if recipe.index_only:
        from shards import index_only

        index_only.run(Path(recipe.out), workers=recipe.workers)
        return
    from shards import tars

    try:
        _pack(recipe)
    except OSError as error:
        if error.errno not in tars.FULL:
            raise
        raise UserError(
            f"{recipe.out}: the disk is full ({error.strerror}); what is finished is kept; free some space and "
            "run the same command again, or remove the folder"
        ) from error


def _pack(recipe: PackRecipe) -> None:
    from shards import layouts, pack_plan, tars
    from shards.pack_state import State

    layout = layouts.scan(Path(recipe.source))
    tiles = {tile.key: tile for tile in layout.tiles}
    split_of = pack_plan.splits_of(layout.tiles, Path(recipe.split) if recipe.split else None)
    faults = [problem.sentence for problem in layout.problems if problem.key is None]
    spoiled: dict[str, list[str]] = {}
    for problem in layout.problems:
        if problem.key is not None:
            spoiled.setdefault(problem.key, []).append(problem.sentence)
    bad = {key: "\n  ".join(sentences) for key, sentences in spoiled.items()}
    samples = _samples_per_shard(recipe, layout.tiles)
    if recipe.dry_run:
        _refuse_too_many(recipe, faults, bad)
        _print_plan(
            pack_plan.plan(
                [t for t in layout.tiles if t.key not in bad], split_of, seed=recipe.seed, samples=samples
            )
        )
        return
    tars.make_folder(Path(recipe.out))
    state = State(Path(recipe.out), {"recipe": recipe.about(), "source": str(Path(recipe.source).resolve())})
    state.begin(sorted(tiles))
    bad |= {key: text for key, text in state.damaged(tiles).items() if key not in bad}
    while True:
        good = [tile for key, tile in tiles.items() if key not in bad]
        shards = pack_plan.plan(good, split_of, seed=recipe.seed, samples=samples)
        found = _write_missing(recipe, state, shards)
        if found:
            bad |= found
            state.keep_damaged(recipe.part, {k: v for k, v in bad.items() if k in tiles}, tiles)
        _refuse_too_many(recipe, faults, bad)
        if not found:
            break
    if not good:
        raise FoundProblems(f"{recipe.source}: no tile can be packed:", _by_key(bad))
    if _finish(recipe, state, shards) and bad:
        raise FinishedWithFailures(
            "\n  ".join(
                [f"packed {len(good)} tiles into {recipe.out}; {len(bad)} were left out:", *_by_key(bad)]
            )
        )


def _by_key(bad: dict[str, str]) -> list[str]:
    return [bad[key] for key in sorted(bad)]


def _refuse_too_many(recipe: PackRecipe, faults: list[str], bad: dict[str, str]) -> None:
    if faults or len(bad) > recipe.skip_damaged:
        hint = "" if faults else f", or leave them out with --skip-damaged {len(bad)}"
        raise FoundProblems(
            f"{recipe.source}: {len(faults) + len(bad)} problems, nothing is packed; mend or remove{hint}:",
            [*faults, *_by_key(bad)],
        )


def _samples_per_shard(recipe: PackRecipe, tiles: list[Tile]) -> int:
    """Samples per shard: as told, or by the mean size of the stored pixels."""
    from shards import images
    from shards.pack_plan import BYTES_PER_PIXEL

    if recipe.shard_samples:
        return recipe.shard_samples
    sizes = [size for size in (images.image_size(tile.rgb) for tile in tiles) if size is not None]
    pixels = sum(rows * columns for rows, columns in sizes) / max(len(sizes), 1) / recipe.reduce**2
    return max(1, int(recipe.shard_mb * 1e6 / max(pixels * BYTES_PER_PIXEL, 1)))


def _write_missing(recipe: PackRecipe, state: State, shards: list[PlannedShard]) -> dict[str, str]:
    """Write the shards of this part that are not there yet; the tiles that could not be packed."""
    from geopose_dist import metrics_log, pool
    from shards import pack_write
    from shards.encode import Job, encode

    number, count = recipe.part_of()
    todo = [s for s in shards[number - 1 :: count] if state.record(s, check_bytes=True) is None]
    jobs = [
        Job(
            tile,
            recipe.reduce,
            recipe.codec.rgb,
            recipe.codec.agl,
            recipe.odd_sizes == "crop",
            recipe.reduce_by,
        )
        for shard in todo
        for tile in shard.tiles
    ]
    damaged: dict[str, str] = {}
    if not jobs:
        return damaged
    results = pool.process_map(encode, jobs, workers=min(recipe.workers or pool.usable_cores(), len(jobs)))
    tracked = metrics_log.track(results, total=len(jobs), label="pack")
    for shard in todo:
        damaged |= {one.key: one.sentence for one in pack_write.write_shard(state, shard, tracked)}
    return damaged


def _finish(recipe: PackRecipe, state: State, shards: list[PlannedShard]) -> bool:
    """Publish if every shard is there; whether that was so."""
    records = [state.record(shard, check_bytes=False) for shard in shards]
    whole = [record for record in records if record is not None]
    if len(whole) < len(shards):
        print(
            f"pack: part {recipe.part} is done; {len(shards) - len(whole)} of {len(shards)} shards are for "
            "the other parts; the last part writes the manifest",
            file=sys.stderr,
        )
        return False
    from shards import pack_write

    state.publish(shards)
    pack_write.write_manifest(state.out, recipe.about(), shards, whole)
    print(
        f"pack: {sum(len(r.rows) for r in whole)} tiles in {len(shards)} shards in {state.out}",
        file=sys.stderr,
    )
    return True


def _print_plan(shards: list[PlannedShard]) -> None:
    splits: dict[str, dict[str, int]] = {}
    for shard in shards:
        facts = splits.setdefault(shard.split, {"shards": 0, "tiles": 0})
        facts["shards"] += 1
        facts["tiles"] += len(shard.tiles)
    print(json.dumps({"splits": splits, "shards": [[s.name, len(s.tiles)] for s in shards]}, indent=1))
