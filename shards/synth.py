"""`geopose synth`: a dataset of synthetic oblique city tiles in the challenge's own layout (DOMAIN section 2).

A place is built once and seen in several views; every byte follows from (seed, place, view), so the number of
workers, a restart, or more views of other places change nothing. Each tile's files are written whole, then noted
in `.synth/tiles`; running again skips what is noted and finishes the rest. The CSV files come last: a folder with
them is complete. Whole places go to the test set, spread over the cities, and `test_truth/` holds their answers.
With `--shards` the same tiles go straight into shards instead (`synth_shards.py`).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from geopose_dist import metrics_log, pool
from geopose_dist.errors import UserError
from shards.pack_recipe import CodecRecipe
from shards.synth_faults import FaultRecipe
from shards.synth_tiles import BOOKS, Job, TileName, finished, render_job, write

CITIES = ["ARG", "ATL", "JAX", "OMA"]
FOLDERS = ("train", "test_rgbs", "submission_format", "test_truth", "extras")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
PLAN_VERSION = 2
"""Counts changes of the renderer that change its bytes: a folder begun by another version is not mixed with."""
VIEWS_PER_JOB = 8
"""A place is built anew for each job: enough views to make that cheap, few enough for progress to be seen."""
BYTES_PER_PIXEL = {"rgb": 1.4, "agl": 0.45}
"""Rough sizes after compression, for --dry-run and for the check of free space."""


@dataclass(frozen=True)
class SynthRecipe:
    """A synthetic dataset: how many places and views, how large, from which seed."""

    out: Path | None = None
    """Folder to write; new, empty, or begun by the same recipe (then it is finished)."""
    shards: str = ""
    """Folder for shards instead, as `geopose pack` would write them; the test places become the split `val`."""
    places: int = 12
    """Number of places; cities take turns, so four or more cover all four."""
    views: int = 4
    """Views per place, each with its own camera, sun, season and haze."""
    size: int = 2048
    """Side of a tile in pixels; it changes how much ground is covered, not the GSD."""
    seed: int = 0
    """Everything follows from this number."""
    test_places: int | None = None
    """Places whose tiles go to the test set; by default about a quarter, and one per city from 3 places per city."""
    cities: list[str] = field(default_factory=lambda: list(CITIES))
    """Cities in turn order, among ARG (old grid), ATL (downtown), JAX (suburbs), OMA (industry)."""
    relief: float = 1.0
    """Hills under the city, times its own (ARG 2 m up and down, JAX 3, ATL 16, OMA 18); 0 is flat."""
    faults: FaultRecipe = field(default_factory=FaultRecipe)
    """Faults of the labels."""
    extras: list[Literal["instances", "ground"]] = field(default_factory=list)
    """More truth by tile in `extras/`: `instances`, the building that each pixel shows; `ground`, on the tile's grid,
    footprints and what stands there seen from above (RGB, AGL, 255 where the view sees it), which is what
    `geopose rectify` aims at. In shards, further members of the sample."""
    reduce: int = 1
    """With --shards: whole factor by which tiles are reduced, as by `geopose pack`."""
    codec: CodecRecipe = field(default_factory=CodecRecipe)
    """With --shards: how pixels are stored."""
    shard_samples: int = 0
    """With --shards: most samples per shard; 0 is about 256 MB before compression."""
    workers: int = 0
    """Processes; 0 is one per core."""
    dry_run: bool = False
    """Only print what would be written and how large it would be."""

    def __post_init__(self) -> None:
        if (self.out is None) == (not self.shards):
            raise ValueError(
                "wanted a folder for the dataset (--out DIR) or one for shards (--shards DIR), not both"
            )
        least_of = {"places": 1, "views": 1, "seed": 0, "workers": 0, "reduce": 1, "shard_samples": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 64 <= self.size <= 8192:
            raise ValueError(f"size is {self.size}; it must be from 64 to 8192 pixels")
        if not 0 <= self.relief <= 3:
            raise ValueError(f"relief is {self.relief}; it must be from 0 (flat) to 3 times the city's own")
        if self.reduce > 1 and self.extras:
            raise ValueError("extras are of full size; wanted --reduce 1 with them, or none")
        if self.size % self.reduce:
            raise ValueError(f"size is {self.size}; it must be a multiple of reduce ({self.reduce})")
        if len(set(self.extras)) < len(self.extras):
            raise ValueError(f"extras are {self.extras}; each may be named once")
        if not self.cities or (unknown := [city for city in self.cities if city not in CITIES]):
            raise ValueError(f"cities are {self.cities}; wanted some of {', '.join(CITIES)}, not {unknown}")
        if len(set(self.cities)) < len(self.cities):
            raise ValueError(f"cities are {self.cities}; each may be named once")
        if self.test_places is not None and not 0 <= self.test_places <= self.places:
            raise ValueError(
                f"test_places is {self.test_places}; it must be from 0 to places ({self.places})"
            )


def default_test_places(places: int, cities: int) -> int:
    """About a quarter, at least one of two places, and one per city once each city has three."""
    if places < 2:
        return 0
    return max(1, round(places / 4), cities if places >= 3 * cities else 0)


def test_set(places: int, cities: int, count: int) -> set[int]:
    """Numbers of the places that go to the test set: city by city in turn, each city's last places first."""
    by_city = [[p for p in range(places) if p % cities == c] for c in range(cities)]
    chosen: set[int] = set()
    while len(chosen) < count:
        # A city gives when it has given the smallest share, and its only place last of all.
        def rank(own: list[int]) -> tuple[bool, float, int]:
            given = sum(p in chosen for p in own)
            return (len(own) - given <= 1, given / len(own), own[0])

        source = min((own for own in by_city if any(p not in chosen for p in own)), key=rank)
        chosen.add(max(p for p in source if p not in chosen))
    return chosen


def tile_names(recipe: SynthRecipe) -> list[TileName]:
    """All tiles of a recipe, place by place, each with an id of six letters that no other has."""
    from shards.synth_districts import keyed

    cities = len(recipe.cities)
    count = default_test_places(recipe.places, cities) if recipe.test_places is None else recipe.test_places
    tests = test_set(recipe.places, cities, count)
    taken: set[str] = set()
    names = []
    for place in range(recipe.places):
        for view in range(recipe.views):
            rng = keyed(recipe.seed, place, 3, view)
            while (id_ := "".join(LETTERS[k] for k in rng.integers(len(LETTERS), size=6))) in taken:
                pass
            taken.add(id_)
            names.append(TileName(recipe.cities[place % cities], place, view, id_, place in tests))
    return names


def about(recipe: SynthRecipe) -> dict[str, Any]:
    """What decides the pixels and labels, with the renderer's version."""
    how = ("out", "shards", "reduce", "codec", "shard_samples", "workers", "dry_run")
    facts = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in how}
    return {"version": PLAN_VERSION, **facts}


def _prepare(recipe: SynthRecipe, names: list[TileName]) -> None:
    """Refuse a folder that holds something else; write the recipe's note into a new one."""
    out = recipe.out
    assert out is not None
    facts = about(recipe)
    book = out / BOOKS / "recipe.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder to write into")
    if book.is_file():
        try:
            before = json.loads(book.read_bytes())
        except ValueError as error:
            raise UserError(
                f"{book} cannot be read as JSON; remove the folder {out} and run again"
            ) from error
        differs = [f"{k} was {before.get(k)}, is {v}" for k, v in facts.items() if before.get(k) != v]
        if differs:
            raise UserError(
                f"{out} was begun by another recipe ({'; '.join(differs)}); use the same options or another --out"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} holds files that synth did not write; name a new or empty folder with --out")
    expected = {path for tile in names for path in tile.targets(tuple(recipe.extras)).values()}
    for folder in FOLDERS:
        for path in sorted((out / folder).glob("*")) if (out / folder).is_dir() else []:
            if path.name.startswith(".") and path.name.endswith(".tmp"):
                path.unlink(missing_ok=True)  # left by a run that was killed
            elif f"{folder}/{path.name}" not in expected:
                raise UserError(
                    f"{path} is not a file of this dataset; move it away or name another folder with --out"
                )
    if not recipe.dry_run:
        write(book, json.dumps(facts).encode())


def jobs_of(recipe: SynthRecipe, missing: list[TileName]) -> list[Job]:
    """One job per place, or a few where places are fewer than workers."""
    workers = recipe.workers or pool.usable_cores()
    by_place: dict[int, list[TileName]] = {}
    for tile in missing:
        by_place.setdefault(tile.place, []).append(tile)
    parts = -(-workers // max(1, len(by_place)))
    jobs = []
    for place, tiles in by_place.items():
        length = min(VIEWS_PER_JOB, -(-len(tiles) // parts))
        for start in range(0, len(tiles), length):
            part = tuple(tiles[start : start + length])
            where = recipe.out or Path(recipe.shards)
            looks = (recipe.relief, recipe.faults, tuple(recipe.extras))
            jobs.append(Job(where, recipe.size, recipe.seed, tiles[0].city, place, part, *looks))
    return jobs


def expected_bytes(recipe: SynthRecipe, tiles: list[TileName]) -> int:
    return int(len(tiles) * recipe.size**2 * sum(BYTES_PER_PIXEL.values()))


def _write_tables(out: Path, names: list[TileName], gsd: dict[str, float]) -> None:
    """The CSV files, rows in the order of ids so that neighbours are strangers."""
    ordered = sorted(names, key=lambda tile: tile.id)

    def stem(tile: TileName, what: str) -> str:
        return f"{tile.stem}_{what}"

    tables: dict[str, list[list[str]]] = {
        "metadata.csv": [["id", "city", "gsd"], *([t.id, t.city, str(gsd[t.id])] for t in ordered)],
        "geopose_train.csv": [
            ["id", "agl", "json", "rgb"],
            *(
                [t.id, stem(t, "AGL.tif"), stem(t, "VFLOW.json"), stem(t, "RGB.j2k")]
                for t in ordered
                if not t.test
            ),
        ],
        "geopose_test.csv": [["id", "rgb"], *([t.id, stem(t, "RGB.j2k")] for t in ordered if t.test)],
        "places.csv": [["id", "place"], *([t.id, t.place_name] for t in ordered)],
    }
    for name, rows in tables.items():
        write(out / name, "".join(",".join(row) + "\n" for row in rows).encode())


def _sum_up(recipe: SynthRecipe, names: list[TileName], missing: list[TileName]) -> Iterator[str]:
    tests = [tile for tile in names if tile.test]
    shares = f"{len(names) - len(tests)} train, {len(tests)} test"
    yield f"{recipe.out or recipe.shards}: {len(names)} tiles of {recipe.size} x {recipe.size} pixels, {shares}"
    for city in recipe.cities:
        own = [tile for tile in names if tile.city == city]
        places, test_places = len({t.place for t in own}), len({t.place for t in own if t.test})
        yield f"  {city}: {places} places ({test_places} test), {len(own)} tiles"
    yield f"  still to write: {len(missing)} tiles, about {expected_bytes(recipe, missing) / 1e6:.0f} MB"


def run(recipe: SynthRecipe) -> None:
    """Write the dataset; raises UserError if the folder or the disk does not allow it."""
    if recipe.shards:
        from shards import synth_shards

        synth_shards.run(recipe)
        return
    out = recipe.out
    assert out is not None
    names = tile_names(recipe)
    _prepare(recipe, names)
    gsd = {tile.id: value for tile in names if (value := finished(out, tile)) is not None}
    missing = [tile for tile in names if tile.id not in gsd]
    if recipe.dry_run:
        print("\n".join(_sum_up(recipe, names, missing)))
        return
    free = shutil.disk_usage(out).free
    if free < expected_bytes(recipe, missing):
        raise UserError(
            f"{out}: {len(missing)} tiles need about {expected_bytes(recipe, missing) / 1e6:.0f} MB but only "
            f"{free / 1e6:.0f} MB are free; free some space or ask for less with --places, --views or --size"
        )
    for folder in FOLDERS[: None if recipe.extras else -1]:
        (out / folder).mkdir(exist_ok=True)
    jobs = jobs_of(recipe, missing)
    with metrics_log.Progress(len(names), "synth", start=len(gsd)) as progress:
        for done in pool.process_map(render_job, jobs, workers=recipe.workers):
            gsd.update(done)
            progress.advance(len(done))
    _write_tables(out, names, gsd)
    print(f"{out}: {len(names)} tiles, {len(missing)} of them new", file=sys.stderr)


__all__ = ["SynthRecipe", "run"]
