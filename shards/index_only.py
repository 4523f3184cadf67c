"""`geopose pack --index-only`: manifest and index for WebDataset shards that were made elsewhere.

Shards are walked header by header and every sample is inspected, so the index is only ever of sound shards;
the images themselves are not decoded (that is `geopose verify --deep`). A shard's split is its name up to
the number: `val-000003.tar` is of `val`, and a name without such a part is `train`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from geopose_dist import metrics_log, pool
from geopose_dist.data import manifest
from geopose_dist.errors import FoundProblems, UserError
from shards import pack_write, tallies, tars
from shards.inspection import inspect
from shards.pack_plan import PlannedShard
from shards.pack_state import Record

_NAME = re.compile(r"(?P<split>[A-Za-z0-9]+)-[\d_-]*\d\.tar")


def run(out: Path, *, workers: int = 0) -> None:
    """Write `manifest.json` and `index.npy` beside the tars of a folder (UserError, FoundProblems)."""
    if not out.is_dir():
        raise UserError(f"{out}: no such folder; wanted one with the shards to index")
    if (out / manifest.MANIFEST_NAME).is_file() and "index_only" not in manifest.read_manifest(out).recipe:
        raise UserError(f"{out}: has a manifest of `geopose pack` already; remove it to make another")
    tar_files = sorted(path for path in out.glob("*.tar") if not path.name.startswith("."))
    if not tar_files:
        raise UserError(f"{out}: no *.tar in it; wanted WebDataset shards to index")
    shards = sorted((_split(path.name), path.name) for path in tar_files)
    results = pool.process_map(
        _read, [out / name for _, name in shards], workers=min(workers or pool.usable_cores(), len(shards))
    )
    records, problems = [], []
    for result in metrics_log.track(results, total=len(shards), label="index", unit="shards"):
        if isinstance(result, str):
            problems.append(result)
        else:
            records.append(result)
    problems += _twice([name for _, name in shards], records) if not problems else []
    if problems:
        raise FoundProblems(f"{out}: {len(problems)} problems; nothing is written:", problems)
    planned = [PlannedShard(name, split, ()) for split, name in shards]
    pack_write.write_manifest(out, {"index_only": True}, planned, records)
    print(
        f"pack: indexed {sum(len(r.rows) for r in records)} samples in {len(shards)} shards", file=sys.stderr
    )


def _split(name: str) -> str:
    match = _NAME.fullmatch(name)
    return match["split"] if match else "train"


def _read(path: Path) -> Record | str:
    """The record of a shard, or what is wrong with it."""
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
