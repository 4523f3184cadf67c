"""`geopose pack`: a dataset to WebDataset shards with a manifest; parallel, resumable, repeatable by byte.

Tiles are decoded, checked, reduced and encoded by worker processes and written, in the plan's order, by this
one; on a Ray cluster each task writes a whole shard. Finished shards wait in a dot-folder until all are there, or
stand in a store under their own names; the manifest comes last: a place without one is unfinished. If tiles turn
out damaged, all of them are named; within `skip_damaged` the plan is made again without them, so shards stay equal
in size.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from geopose_dist.data import urls
from geopose_dist.errors import FinishedWithFailures, FoundProblems, UserError
from shards.pack_recipe import CodecRecipe, PackRecipe

if TYPE_CHECKING:
    from shards.encode import Damaged, Job
    from shards.layouts import Tile
    from shards.pack_plan import PlannedShard
    from shards.pack_state import State

__all__ = ["CodecRecipe", "PackRecipe", "run"]


def run(recipe: PackRecipe) -> None:
    """Pack, or go on packing; see the module's text."""
    if recipe.index_only:
        from shards import index_only

        index_only.run(recipe)
        return
    from shards import tars

    try:
        _pack(recipe)
    except OSError as error:
        if error.errno not in tars.FULL:
            raise
        where = error.filename if urls.is_url(recipe.out) and error.filename else urls.shown(recipe.out)
        raise UserError(
            f"{where}: the disk is full ({error.strerror}); what is finished is kept; free some space and "
            "run the same command again, or remove the folder"
        ) from error


def _pack(recipe: PackRecipe) -> None:
    from shards import layouts, pack_plan
    from shards.pack_place import open_place
    from shards.pack_state import State

    # Other machines of a cluster work in other folders.
    source = Path(recipe.source).resolve() if recipe.ray_address else Path(recipe.source)
    layout = layouts.scan(source)
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
    out = recipe.out if urls.is_url(recipe.out) else str(Path(recipe.out).resolve())
    place = open_place(out if recipe.ray_address else recipe.out, recipe.store, recipe.scratch)
    # Machines that share a store only may hold the source at different paths.
    where = source.resolve().name if place.is_store else str(source.resolve())
    state = State(place, {"recipe": recipe.about(), "source": where})
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
    number, count = recipe.part_of()
    mine = shards[number - 1 :: count]
    records = state.records(mine, check_bytes=True)
    todo = [shard for shard, record in zip(mine, records, strict=True) if record is None]
    if not todo:
        return {}
    state.unfinish()
    results = (_on_cluster if recipe.ray_address else _here)(recipe, state, todo)
    return {one.key: one.sentence for found in results for one in found}


def _here(recipe: PackRecipe, state: State, todo: list[PlannedShard]) -> Iterator[list[Damaged]]:
    """Encode in processes of this machine, write in this one."""
    from geopose_dist import metrics_log, pool
    from shards import pack_write
    from shards.encode import encode

    jobs = [job for shard in todo for job in jobs_of(recipe, shard)]
    results = pool.process_map(encode, jobs, workers=min(recipe.workers or pool.usable_cores(), len(jobs)))
    tracked = metrics_log.track(results, total=len(jobs), label="pack")
    for shard in todo:
        yield pack_write.write_shard(state.place, shard, state.fingerprint(shard), tracked)


def _on_cluster(recipe: PackRecipe, state: State, todo: list[PlannedShard]) -> Iterator[list[Damaged]]:
    """Encode and write whole shards on the nodes of a Ray cluster: pixels never pass through this machine."""
    from geopose_dist import metrics_log, pool
    from shards.pack_write import ShardJob, pack_shard

    jobs = [
        ShardJob(state.place, shard, state.fingerprint(shard), tuple(jobs_of(recipe, shard)))
        for shard in todo
    ]
    results = pool.ray_map(pack_shard, jobs, address=recipe.ray_address, workers=recipe.workers)
    yield from metrics_log.track(results, total=len(jobs), label="pack", unit="shards")


def jobs_of(recipe: PackRecipe, shard: PlannedShard) -> Iterator[Job]:
    """How each tile of a shard is stored."""
    from shards.encode import Job

    crop = recipe.odd_sizes == "crop"
    for tile in shard.tiles:
        yield Job(tile, recipe.reduce, recipe.codec.rgb, recipe.codec.agl, crop, recipe.reduce_by)


def _finish(recipe: PackRecipe, state: State, shards: list[PlannedShard]) -> bool:
    """Publish if every shard is there; whether that was so."""
    records = state.records(shards, check_bytes=False)
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
    pack_write.write_manifest(state.place, recipe.about(), shards, whole)
    print(
        f"pack: {sum(len(r.table) for r in whole)} tiles in {len(shards)} shards in {urls.shown(recipe.out)}",
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
