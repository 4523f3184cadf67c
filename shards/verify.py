"""`geopose verify`: are these shards whole, and are they what the manifest says?

By default every byte is hashed and every tar header walked; where a hash differs, each sample's checksum
tells which ones are damaged. `--deep` decodes every sample as training would. Every damaged member is named:
exit code 1 if there is one, 0 and a summary if there is none.
"""

from __future__ import annotations

import json
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geopose_dist.data import urls
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.errors import FinishedWithFailures, UserError

if TYPE_CHECKING:
    from geopose_dist.data.manifest import Manifest


@dataclass(frozen=True)
class VerifyRecipe:
    """What `geopose verify` looks at."""

    shards: str = ""
    """Folder, or s3://, gs://, az:// or http(s):// prefix, of shards with their manifest."""
    deep: bool = False
    """Decode every sample as training would, instead of trusting hashes."""
    json: str = ""
    """Write the summary to this file, too."""
    workers: int = 0
    """Processes; 0: one per core."""
    scratch: str = ""
    """Folder for one shard per process on its way from a store; unset: the system's folder for temporary files."""
    store: StoreRecipe = field(default_factory=StoreRecipe)
    """Reaching the store that `shards` names."""

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("--shards is missing; wanted a folder of shards")
        if self.workers < 0:
            raise ValueError(f"--workers is {self.workers}; wanted at least 0")


@dataclass(frozen=True)
class Task:
    """One shard to verify: where it is, what the manifest says of it, and its rows of the index."""

    place: str
    name: str
    bytes: int
    sha256: str
    rows: list[tuple[str, int, int, int]]
    """City, offset, length, crc32."""
    deep: bool
    store: StoreRecipe = field(default_factory=StoreRecipe)
    scratch: str = ""


@dataclass(frozen=True)
class Result:
    """What was found in one shard."""

    problems: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


def run(recipe: VerifyRecipe) -> None:
    """Verify a folder of shards; FinishedWithFailures names what is damaged."""
    from geopose_dist import files, metrics_log, pool
    from geopose_dist.data import manifest
    from shards import fetch, tars

    with fetch.described(recipe.shards, recipe.store, recipe.scratch) as folder:
        # An index of shards that stay in a store names their URL.
        place = str(manifest.read_manifest(folder).recipe.get("shards_url", recipe.shards))
        tasks, facts = _tasks(recipe, folder, place)
    workers = min(recipe.workers or pool.usable_cores(), max(len(tasks), 1))
    results = list(
        metrics_log.track(
            pool.process_map(check_shard, tasks, workers=workers),
            total=len(tasks),
            label="verify",
            unit="shards",
        )
    )
    problems = [problem for result in results for problem in result.problems] + _twice(tasks, results)
    shown = urls.shown(place)
    strangers = sorted(_tars(place, recipe) - {task.name for task in tasks})
    problems += [
        f"{urls.join(shown, name)}: is not in the manifest; remove it, or pack again" for name in strangers
    ]
    summary = {
        "shards": len(tasks),
        "samples": sum(len(task.rows) for task in tasks),
        "bytes": sum(task.bytes for task in tasks),
        "splits": facts.splits(),
        "deep": recipe.deep,
        "problems": problems,
    }
    if recipe.json:
        tars.make_folder(Path(recipe.json).parent)
        files.write_bytes(Path(recipe.json), (json.dumps(summary, indent=1) + "\n").encode())
    if problems:
        raise FinishedWithFailures(
            "\n  ".join([f"{shown}: {len(problems)} of these are damaged or missing:", *problems])
        )
    splits = ", ".join(f"{split} {count}" for split, count in facts.splits().items())
    print(
        f"{shown}: whole: {summary['samples']} samples ({splits}) in {len(tasks)} shards, "
        f"{facts_bytes(summary)}, {'every sample decoded' if recipe.deep else 'hashes agree'}"
    )
    sys.stdout.flush()


def facts_bytes(summary: dict[str, Any]) -> str:
    """Size in words."""
    return f"{summary['bytes'] / 1e6:.1f} MB"


def _tars(place: str, recipe: VerifyRecipe) -> set[str]:
    """Names of the tars that are there; a web server has no list."""
    from geopose_dist.data import stores

    if not urls.is_url(place):
        return {path.name for path in Path(place).glob("*.tar")}
    if urls.parse(place).scheme in ("http", "https"):
        return set()
    return {name for name, _ in stores.open_store(place, recipe.store).list(".tar")}


def _tasks(recipe: VerifyRecipe, folder: Path, place: str) -> tuple[list[Task], Manifest]:
    """What to verify, by the manifest and index in `folder`, which may be copies."""
    from geopose_dist.data import manifest

    facts = manifest.read_manifest(folder)
    tasks = []
    for split in dict.fromkeys(shard.split for shard in facts.shards):
        index = manifest.open_split(folder, split).index
        for number, shard in enumerate(facts.shards):
            if shard.split != split:
                continue
            if "/" in shard.name or "\\" in shard.name or shard.name.startswith("."):
                raise UserError(
                    f"{folder / manifest.MANIFEST_NAME}: shard name {shard.name!r} points out of the folder; refused"
                )
            rows = [row.item() for row in index[index["shard"] == number]]
            if len(rows) != shard.samples or any(row[1] >= len(facts.cities) for row in rows):
                raise UserError(
                    f"{folder / manifest.INDEX_NAME}: {len(rows)} rows for {shard.name}, the manifest says "
                    f"{shard.samples}; they do not belong together; pack again"
                )
            cities = [(facts.cities[city], offset, length, crc) for _, city, offset, length, crc in rows]
            tasks.append(
                Task(
                    place,
                    shard.name,
                    shard.bytes,
                    shard.sha256,
                    cities,
                    recipe.deep,
                    recipe.store,
                    recipe.scratch,
                )
            )
    return tasks, facts


def check_shard(task: Task) -> Result:
    """Everything that is wrong with one shard, and the keys of its sound samples."""
    from geopose_dist.data import stores
    from shards import fetch

    where = urls.join(task.place, task.name)
    missing = f"{where}: missing ({len(task.rows)} samples); copy it again or pack again"
    if not fetch.is_url(task.place):
        path = Path(task.place) / task.name
        return _check_file(task, path) if path.is_file() else Result([missing])
    try:
        with fetch.local_copy(
            task.place, task.name, task.store, limit=task.bytes, scratch=task.scratch
        ) as path:
            found = _check_file(task, path)
            return Result([problem.replace(str(path), where) for problem in found.problems], found.keys)
    except stores.Missing:
        return Result([missing])


def _check_file(task: Task, path: Path) -> Result:
    from shards import tars

    result = Result()
    size = path.stat().st_size
    same = size == task.bytes and tars.sha256_of(path) == task.sha256
    if not same:
        size_text = (
            f"{size} bytes, the manifest says {task.bytes}" if size != task.bytes else "another sha256"
        )
        result.problems.append(
            f"{path}: {size_text}: damaged, or another shard of that name; copy it again or pack again"
        )
    if same and not task.deep:
        _walk(task, path, result)
    else:
        _check_samples(task, path, result)
    return result


def _walk(task: Task, path: Path, result: Result) -> None:
    """Compare the headers of a shard with its rows of the index."""
    from shards import tars

    try:
        found = list(tars.spans(path))
    except UserError as error:
        result.problems.append(str(error))
        return
    result.keys.extend(span.key for span in found)
    if [(span.offset, span.length, span.crc32) for span in found] != [row[1:] for row in task.rows]:
        result.problems.append(
            f"{path}: its {len(found)} samples do not stand where the index says ({len(task.rows)} rows); pack "
            "again, or `geopose pack --index-only`"
        )


def _check_samples(task: Task, path: Path, result: Result) -> None:
    """Check every sample by itself: checksum, then, if deep, all that training would decode."""
    from geopose_dist.data.members import first_key, key_if_readable
    from shards.inspection import inspect

    with path.open("rb") as file:
        for city, offset, length, crc in task.rows:
            where = f"{path}, offset {offset}"
            file.seek(offset)
            data = file.read(length)
            if len(data) < length:
                name = key_if_readable(data) if len(data) >= 512 else ""
                result.problems.append(f"{where}{name}: lies behind the end of the file (cut short)")
            elif zlib.crc32(data) != crc:
                result.problems.append(
                    f"{where}{key_if_readable(data)}: crc32 differs from the index: damaged"
                )
            else:
                try:
                    if not task.deep:
                        result.keys.append(first_key(data, where))
                        continue
                    found = inspect(data, where)
                    result.keys.append(found.key)
                    if found.facts.city != city:
                        result.problems.append(
                            f"{where}, {found.key}.json: city {found.facts.city}, the index says {city}; pack again"
                        )
                except UserError as error:
                    result.problems.append(str(error))


def _twice(tasks: list[Task], results: list[Result]) -> list[str]:
    first: dict[str, str] = {}
    problems = []
    for task, result in zip(tasks, results, strict=True):
        for key in result.keys:
            if key in first:
                problems.append(
                    f"{urls.join(task.place, task.name)}: {key} stands in {first[key]} too; pack again"
                )
            first.setdefault(key, task.name)
    return problems
