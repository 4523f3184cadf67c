"""`geopose synth --shards`: tiles rendered straight into the shards that `geopose pack` would write of them.

Places are rendered one after another, but neighbours in a shard are strangers: each tile's encoded sample waits in
`.pack/samples`, a file of its own, until the samples of a shard are there. So a run that was killed goes on tile by
tile. Order, names, members and manifest are pack's; pixels have not been through JPEG 2000. The places that a dataset
would keep for its test set make the split `val`, with labels.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from geopose_dist import files, geometry, metrics_log, pool
from geopose_dist.data import urls
from geopose_dist.errors import UserError
from shards import pack_plan, pack_write, synth
from shards.encode import Job as EncodeJob
from shards.encode import Sample, sample_of
from shards.layouts import Tile
from shards.pack_place import FOLDER, open_place
from shards.pack_plan import PlannedShard
from shards.pack_recipe import PackRecipe
from shards.pack_state import State
from shards.synth_tiles import Job, Rendered, TileName, encode_extra, render, view_camera
from shards.tallies import Tally


@dataclass(frozen=True)
class SampleJob:
    """Views of one place that one worker renders, encodes and puts down in `folder`."""

    views: Job
    reduce: int
    rgb_codec: str
    agl_codec: str
    folder: Path


def run(recipe: synth.SynthRecipe) -> None:
    """Write the shards, or go on writing; UserError where the folder or the disk does not allow it."""
    if urls.is_url(recipe.shards):
        raise UserError(
            f"--shards {urls.shown(recipe.shards)}: synth writes shards to a folder only; wanted one, to be copied"
        )
    names = {tile.stem: tile for tile in synth.tile_names(recipe)}
    listed = [
        Tile(
            *(stem, tile.city, Path(f"{stem}_RGB")),
            gsd_m=round(view_camera(tile.city, recipe.size, recipe.seed, tile.place, tile.view).gsd_m, 6),
            place=tile.place_name,
        )
        for stem, tile in names.items()
    ]
    split_of = {stem: "val" if tile.test else "train" for stem, tile in names.items()}
    packing = PackRecipe(
        *("synth", recipe.shards),
        reduce=recipe.reduce,
        codec=recipe.codec,
        shard_samples=recipe.shard_samples,
    )
    pixels = (recipe.size // recipe.reduce) ** 2
    fitting = int(packing.shard_mb * 1e6 / (pixels * pack_plan.BYTES_PER_PIXEL))
    samples = packing.shard_samples or max(1, fitting)
    shards = pack_plan.plan(listed, split_of, seed=packing.seed, samples=samples)
    if recipe.dry_run:
        print("\n".join(f"{recipe.shards}/{s.name}: {len(s.tiles)} tiles" for s in shards))
        return
    place = open_place(recipe.shards, packing.store)
    about = dict(packing.about(), source="synth", synth=synth.about(recipe))
    state = State(place, {"recipe": about, "source": "synth"})
    state.begin(sorted(names))
    records = state.records(shards, check_bytes=True)
    todo = [shard for shard, record in zip(shards, records, strict=True) if record is None]
    folder = Path(recipe.shards) / FOLDER / "samples"
    waiting = {tile.key for shard in todo for tile in shard.tiles}
    missing = [names[key] for key in names if key in waiting and not _path(folder, key).is_file()]
    _check_room(recipe, missing)
    jobs = [
        SampleJob(job, recipe.reduce, recipe.codec.rgb, recipe.codec.agl, folder)
        for job in synth.jobs_of(recipe, missing)
    ]
    open_shards = {shard.name: {tile.key for tile in shard.tiles} for shard in todo}
    with metrics_log.Progress(len(names), "synth", start=len(names) - len(missing)) as progress:
        _write_whole(state, todo, open_shards, folder)
        for keys in pool.process_map(render_samples, jobs, workers=recipe.workers):
            progress.advance(len(keys))
            _write_whole(state, todo, open_shards, folder)
    whole = [record for record in state.records(shards, check_bytes=False) if record is not None]
    assert len(whole) == len(shards), "every sample was rendered, so every shard is written"
    state.publish(shards)
    pack_write.write_manifest(place, about, shards, whole)
    shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{recipe.shards}: {len(names)} tiles in {len(shards)} shards, {len(missing)} of them new",
        file=sys.stderr,
    )


def _check_room(recipe: synth.SynthRecipe, missing: list[TileName]) -> None:
    wanted = int(len(missing) * recipe.size**2 / recipe.reduce**2 * 2.6)
    free = shutil.disk_usage(recipe.shards).free
    if free < wanted:
        raise UserError(
            f"{recipe.shards}: {len(missing)} tiles need about {wanted / 1e6:.0f} MB but only {free / 1e6:.0f} MB are "
            "free; free some space or ask for less with --places, --views, --size or --reduce"
        )


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.sample"


def _write_whole(
    state: State, todo: list[PlannedShard], open_shards: dict[str, set[str]], folder: Path
) -> None:
    """Write the shards whose samples have all been put down, and take these away."""
    there = {path.name.removesuffix(".sample") for path in folder.glob("*.sample")}
    for shard in todo:
        if shard.name in open_shards and open_shards[shard.name] <= there:
            read = (_read(_path(folder, tile.key)) for tile in shard.tiles)
            pack_write.write_shard(state.place, shard, state.fingerprint(shard), read)
            del open_shards[shard.name]
            for tile in shard.tiles:
                _path(folder, tile.key).unlink()


def render_samples(job: SampleJob) -> list[str]:
    """Render, encode and put down the views of a job; their keys."""
    keys = []
    for made in render(job.views):
        sample = encoded(made, job)
        _put(_path(job.folder, sample.key), sample)
        keys.append(sample.key)
    return keys


def encoded(made: Rendered, job: SampleJob) -> Sample:
    """The sample that packing the tile's files would give, but for the image's own compression."""
    tile = Tile(
        *(made.tile.stem, made.tile.city, Path(f"{made.tile.stem}_RGB")),
        gsd_m=made.gsd_m,
        place=made.tile.place_name,
    )
    how = EncodeJob(tile, job.reduce, job.rgb_codec, job.agl_codec, crop=False)
    pose = geometry.px_per_m(made.pose["scale"]), geometry.wrap_angle(made.pose["angle"])
    sample = sample_of(how, made.rgb, geometry.agl_m_from_cm(made.cm), pose)
    for name, pixels in made.extras.items():
        extension = "tif" if pixels.dtype.itemsize == 2 else "png"
        sample.members[f"{name.lower()}.{extension}"] = encode_extra(pixels)
    return sample


def _put(path: Path, sample: Sample) -> None:
    """A line of JSON, then the members' bytes."""
    head = {
        "key": sample.key,
        "city": sample.city,
        "members": {name: len(data) for name, data in sample.members.items()},
        "tally": dataclasses.asdict(sample.tally),
    }
    with files.atomic_write(path) as file:
        file.write(json.dumps(head).encode() + b"\n")
        for data in sample.members.values():
            file.write(data)


def _read(path: Path) -> Sample:
    with path.open("rb") as file:
        head = json.loads(file.readline())
        members = {name: file.read(length) for name, length in head["members"].items()}
    return Sample(head["key"], head["city"], members, Tally(**head["tally"]))


def samples_of(jobs: list[SampleJob]) -> Iterator[Sample]:
    """The samples of jobs, put down nowhere: for measuring."""
    for job in jobs:
        for made in render(job.views):
            yield encoded(made, job)
