"""What a packing remembers in its dot-folder `.pack`, so that it can be killed at any moment and go on.

`state.json` says what is being packed; `shards/` holds finished shards until all are; `records/` says of each
what went into it and what came out; `damaged/` lists tiles that could not be packed. A record counts only if
its fingerprint (recipe, and names, sizes and times of the source's files) is today's and its shard's bytes
have the recorded hash. Several machines may share the folder: each writes files of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geopose_dist import files
from geopose_dist.data import manifest
from geopose_dist.errors import UserError
from shards.layouts import Tile
from shards.pack_plan import PlannedShard
from shards.tallies import Tally
from shards.tars import sha256_of

FOLDER = ".pack"


@dataclass(frozen=True)
class Record:
    """A finished shard.

    Attributes:
        fingerprint: of what went into it.
        bytes: size of the tar.
        sha256: hash of the tar.
        rows: per sample key, city, offset, length, crc32.
        tallies: sums by city.
    """

    fingerprint: str
    bytes: int
    sha256: str
    rows: list[tuple[str, str, int, int, int]]
    tallies: dict[str, Tally]


def signature(tile: Tile) -> str:
    """What is known of a tile's files unread: a mended file has another signature."""
    parts: list[Any] = [tile.key, tile.unit, tile.gsd_m, tile.place]
    for path in (tile.rgb, tile.agl, tile.vflow):
        facts = path.stat() if path is not None and path.exists() else None
        parts.append(None if path is None or facts is None else (path.name, facts.st_size, facts.st_mtime_ns))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class State:
    """The dot-folder of one packing."""

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self.out, self.folder, self.about = out, out / FOLDER, about
        self._recipe = json.dumps(about["recipe"], sort_keys=True)

    def begin(self, keys: list[str]) -> None:
        """Claim the folder for this packing; UserError if it holds another one, naming both sides."""
        path = self.folder / "state.json"
        keys_sha = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
        finished = (self.out / manifest.MANIFEST_NAME).is_file()
        about = dict(self.about, tiles=len(keys), keys_sha256=keys_sha)
        begun = finished or any((self.folder / "records").glob("*.json"))
        if path.is_file() and begun:  # a first try that wrote no shard binds nobody
            self._compare(json.loads(path.read_bytes()), about, finished)
        elif finished:
            raise UserError(
                f"{self.out}: holds a finished packing that this command did not make (no {FOLDER}); pack "
                "into another folder, or remove this one"
            )
        files.write_bytes(path, json.dumps(about, indent=1, sort_keys=True).encode())

    def _compare(self, there: dict[str, Any], here: dict[str, Any], finished: bool) -> None:
        old, new = dict(there["recipe"], source=there["source"]), dict(here["recipe"], source=here["source"])
        if finished:  # before that, removing or adding a tile to mend the source is part of the work
            for field in ("tiles", "keys_sha256"):
                old[field], new[field] = there[field], here[field]
        differ = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        if differ:
            sides = "; ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in differ)
            raise UserError(
                f"{self.out}: was begun with another recipe or source ({sides}); give the same ones to go on, "
                "or pack into another folder"
            )

    def fingerprint(self, shard: PlannedShard) -> str:
        """What goes into a shard, in short."""
        parts = [self._recipe, shard.name, shard.split, *(signature(tile) for tile in shard.tiles)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def place(self, shard: PlannedShard) -> Path:
        """Where a shard waits for the others."""
        return self.folder / "shards" / shard.name

    def record(self, shard: PlannedShard, *, check_bytes: bool) -> Record | None:
        """The record of a shard that is whole and still what is wanted, or None."""
        path = self.folder / "records" / f"{shard.name}.json"
        if not path.is_file():
            return None
        facts = json.loads(path.read_bytes())
        if facts["fingerprint"] != self.fingerprint(shard):
            return None
        tar = next((p for p in (self.place(shard), self.out / shard.name) if p.is_file()), None)
        if tar is None or tar.stat().st_size != facts["bytes"]:
            return None
        if check_bytes and sha256_of(tar) != facts["sha256"]:
            return None
        tallies = {city: Tally(**tally) for city, tally in facts["tallies"].items()}
        rows = [tuple(row) for row in facts["rows"]]
        return Record(facts["fingerprint"], facts["bytes"], facts["sha256"], rows, tallies)

    def keep(self, shard: PlannedShard, record: Record) -> None:
        """Remember a finished shard."""
        path = self.folder / "records" / f"{shard.name}.json"
        files.write_bytes(path, json.dumps(dataclasses.asdict(record)).encode())

    def damaged(self, tiles: dict[str, Tile]) -> dict[str, str]:
        """Tiles that an earlier run could not pack and that have not been touched since: sentence by key."""
        found = {}
        for path in sorted((self.folder / "damaged").glob("*.json")):
            for key, (stamp, sentence) in json.loads(path.read_bytes()).items():
                if key in tiles and signature(tiles[key]) == stamp:
                    found[key] = sentence
        return found

    def keep_damaged(self, part: str, damaged: dict[str, str], tiles: dict[str, Tile]) -> None:
        """Remember tiles that cannot be packed, so that no later run and no other machine tries them."""
        stamped = {key: (signature(tiles[key]), sentence) for key, sentence in sorted(damaged.items())}
        path = self.folder / "damaged" / f"part-{part.replace('/', '-of-')}.json"
        files.write_bytes(path, json.dumps(stamped, indent=1).encode())

    def publish(self, shards: list[PlannedShard]) -> None:
        """Move the finished shards to their place; what an earlier plan left behind goes."""
        for shard in shards:
            if self.place(shard).is_file():
                self.place(shard).replace(self.out / shard.name)
        names = {shard.name for shard in shards}
        for path in sorted((self.folder / "records").glob("*.tar.json")):
            name = path.name.removesuffix(".json")
            if name not in names:
                (self.out / name).unlink(missing_ok=True)
                path.unlink()
        files.fsync_folder(self.out)
        shutil.rmtree(self.folder / "shards", ignore_errors=True)
