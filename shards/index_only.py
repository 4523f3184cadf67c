"""`geopose pack --index-only`: manifest and index for WebDataset shards that were made elsewhere.

Shards are walked header by header and every sample is inspected, so the index is only ever of sound shards;
the images themselves are not decoded (that is `geopose verify --deep`). A shard's split is its name up to
the number: `val-000003.tar` is of `val`, and a name without such a part is `train`. With `--source URL` the
shards stay in their store, and `--out` is a folder with manifest and index, which names that URL. A web server
has no list of its files: there the URL names them, as in https://HOST/PATH/train-{000000..000009}.tar.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

from geopose_dist import metrics_log, pool
from geopose_dist.data import manifest, stores, urls
from geopose_dist.errors import FoundProblems, UserError
from shards import fetch, pack_write, tallies, tars
from shards.inspection import inspect
from shards.pack_place import open_place
from shards.pack_plan import PlannedShard
from shards.pack_recipe import PackRecipe
from shards.pack_state import Record

MAX_SHARD_BYTES = 1 << 40
"""More of one object than a disk could hold is not fetched."""

MAX_NAMED = 1_000_000
"""Shards that braces may name."""

_NAME = re.compile(r"(?P<split>[A-Za-z0-9]+)-[\d_-]*\d\.tar")


def run(recipe: PackRecipe) -> None:
    """Write `manifest.json` and `index.npy` beside the tars of a place (UserError, FoundProblems)."""
    out = urls.shown(recipe.out)
    about: dict[str, Any] = {"index_only": True}
    if not urls.is_url(recipe.source or recipe.out) and not Path(recipe.source or recipe.out).is_dir():
        raise UserError(
            f"{recipe.source or out}: no such folder; wanted --out with the shards to index, or --source with "
            "their URL"
        )
    source, listed = _named(recipe.source)
    if source:
        about |= {"shards_url": _url_of(source)}
    place = open_place(recipe.out, recipe.store, recipe.scratch)
    there = place.read(manifest.MANIFEST_NAME)
    if there is not None and not _is_ours(there):
        raise UserError(f"{out}: has a manifest of `geopose pack` already; remove it to make another")
    tars_at = source or recipe.out
    if source and not listed:
        listed = [name for name, _ in stores.open_store(source, recipe.store).list(".tar")]
    names = listed if source else place.sizes()
    shards = sorted((_split(name), name) for name in names if not name.startswith("."))
    if not shards:
        raise UserError(f"{urls.shown(tars_at)}: no *.tar in it; wanted WebDataset shards to index")
    results = pool.process_map(
        functools.partial(_read, tars_at, recipe),
        [name for _, name in shards],
        workers=min(recipe.workers or pool.usable_cores(), len(shards)),
    )
    records, problems = [], []
    for result in metrics_log.track(results, total=len(shards), label="index", unit="shards"):
        if isinstance(result, str):
            problems.append(result)
        else:
            records.append(result)
    problems += _twice([name for _, name in shards], records) if not problems else []
    if problems:
        raise FoundProblems(f"{urls.shown(tars_at)}: {len(problems)} problems; nothing is written:", problems)
    planned = [PlannedShard(name, split, ()) for split, name in shards]
    pack_write.write_manifest(place, about, planned, [record.stored() for record in records])
    print(
        f"pack: indexed {sum(len(r.rows) for r in records)} samples in {len(shards)} shards", file=sys.stderr
    )


def _named(source: str) -> tuple[str, list[str]]:
    """Where shards are, and their names if `source` lists them as WebDataset does: URL/train-{000000..000009}.tar."""
    if not urls.is_url(source) or not source.endswith(".tar"):
        return source, []
    from braceexpand import braceexpand

    parent, _, pattern = source.rpartition("/")
    try:
        names = [name for _, name in zip(range(MAX_NAMED + 1), braceexpand(pattern), strict=False)]
    except ValueError as error:
        raise UserError(f"--source {urls.shown(source)}: its braces do not match; close them") from error
    if len(names) > MAX_NAMED:
        raise UserError(f"--source {urls.shown(source)}: names more than {MAX_NAMED} shards; refused")
    for name in names:
        urls.check_name(name, parent)
    return parent, names


def _url_of(source: str) -> str:
    """The URL of shards that stay where they are (UserError for a folder)."""
    if not urls.is_url(source):
        raise UserError(
            f"--source {source}: --index-only indexes the shards in --out; only a URL may be named by --source"
        )
    return str(urls.parse(source))


def _is_ours(there: bytes) -> bool:
    """Whether a manifest was written by this job, and may be written again."""
    try:
        return "index_only" in json.loads(there)["recipe"]
    except (ValueError, KeyError, TypeError):
        return False


def _split(name: str) -> str:
    match = _NAME.fullmatch(name)
    return match["split"] if match else "train"


def _read(shards: str, recipe: PackRecipe, name: str) -> Record | str:
    """The record of a shard, or what is wrong with it."""
    if not urls.is_url(shards):
        return _read_file(Path(shards) / name)
    with fetch.local_copy(shards, name, recipe.store, limit=MAX_SHARD_BYTES, scratch=recipe.scratch) as path:
        found = _read_file(path)
        return found.replace(str(path), urls.join(shards, name)) if isinstance(found, str) else found


def _read_file(path: Path) -> Record | str:
    rows = []
    sums: dict[str, tallies.Tally] = {}
    try:
        with path.open("rb") as file:
            for span in tars.spans(path):
                file.seek(span.offset)
                found = inspect(file.read(span.length), f"{path}, offset {span.offset}", decode_rgb=False)
                city = found.facts.city
                tally = tallies.of_tile(found.agl_cm, found.facts.scale_px_per_m)
                sums[city] = sums.get(city, tallies.Tally()) + tally
                rows.append((span.key, city, span.offset, span.length, span.crc32))
    except UserError as error:
        return str(error)
    if not rows:
        return f"{path}: holds no sample; remove it"
    return Record("", path.stat().st_size, tars.sha256_of(path), rows, sums)


def _twice(names: list[str], records: list[Record]) -> list[str]:
    """Keys that stand in two places: resuming and splits count on a key being one tile."""
    first: dict[str, str] = {}
    problems = []
    for name, record in zip(names, records, strict=True):
        for key, *_ in record.rows:
            if key in first:
                problems.append(f"{name}: {key} stands in {first[key]} too; remove one of them")
            first.setdefault(key, name)
    return problems
