"""What a packing remembers in its dot-folder `.pack`, so that it can be killed at any moment and go on.

`state.json` says what is being packed; `records/` says of each finished shard what went into it and what came
out; `damaged/` lists tiles that could not be packed. A record counts only if its fingerprint (recipe, and names,
sizes and times of the source's files, or their first and last bytes where the place is a store) is today's and
its shard is there with the recorded size, on a disk also with the recorded hash. Several machines may share the
place: each writes files of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geopose_dist.data import manifest
from geopose_dist.errors import UserError
from shards.layouts import Tile
from shards.pack_place import FOLDER, LocalPlace, Place, Row
from shards.pack_plan import PlannedShard
from shards.tallies import Tally
from shards.tars import sha256_of

READS_AT_ONCE = 16
"""Records that are asked for at a time."""
END_BYTES = 65536
"""Of each end of a file that goes into its signature by content: all of a label, enough of an image."""


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
    rows: list[Row]
    tallies: dict[str, Tally]

    def stored(self) -> Stored:
        """What the manifest needs of it."""
        cities = tuple(dict.fromkeys(city for _, city, *_ in self.rows))
        table = np.array(
            [(0, cities.index(city), *span) for _, city, *span in self.rows], manifest.INDEX_DTYPE
        )
        return Stored(self.bytes, self.sha256, cities, table, self.tallies)


@dataclass(frozen=True)
class Stored:
    """A record without its keys, in the 22 bytes per sample that the index has: all of them are held at once.

    Attributes:
        bytes, sha256, tallies: as in `Record`.
        cities: names that the table numbers.
        table: rows of the index [n], their shard not filled in.
    """

    bytes: int
    sha256: str
    cities: tuple[str, ...]
    table: manifest.Index
    tallies: dict[str, Tally]


def signature(tile: Tile, *, by_content: bool = False) -> str:
    """What is known of a tile's files almost unread: a mended file has another signature.

    By content (size, and the first and last bytes) where machines hold copies of the source, whose times differ.
    """
    parts: list[Any] = [tile.key, tile.unit, tile.gsd_m, tile.place]
    for path in (tile.rgb, tile.agl, tile.vflow):
        facts = path.stat() if path is not None and path.exists() else None
        if path is None or facts is None:
            parts.append(None)
        else:
            stamp = _ends(path) if by_content else facts.st_mtime_ns
            parts.append((path.name, facts.st_size, stamp))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _ends(path: Path) -> str:
    """Hash of the first and the last bytes of a file; the whole of a label."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(END_BYTES))
        file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - END_BYTES))
        digest.update(file.read(END_BYTES))
    return digest.hexdigest()[:16]


class State:
    """The bookkeeping of one packing."""

    def __init__(self, place: Place, about: dict[str, Any]) -> None:
        self.place, self.about = place, about
        self._recipe = json.dumps(about["recipe"], sort_keys=True)
        self._signatures: dict[str, str] = {}

    def begin(self, keys: list[str]) -> None:
        """Claim the place for this packing; UserError if it holds another one, naming both sides."""
        name = f"{FOLDER}/state.json"
        keys_sha = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
        finished, there = self.is_finished(), self.place.read(name)
        about = dict(self.about, tiles=len(keys), keys_sha256=keys_sha)
        begun = finished or bool(self._record_names())
        if there is not None and begun:  # a first try that wrote no shard binds nobody
            self._compare(json.loads(there), about, finished)
        elif finished:
            raise UserError(
                f"{self.place.out}: holds a finished packing that this command did not make (no {FOLDER}); pack "
                "into another folder, or remove this one"
            )
        self.place.write(name, json.dumps(about, indent=1, sort_keys=True).encode())

    def is_finished(self) -> bool:
        """Whether the manifest is there."""
        return self.place.read(manifest.MANIFEST_NAME) is not None

    def unfinish(self) -> None:
        """Before shards are replaced in their place, the manifest that describes the old ones goes."""
        if self.place.is_store:
            self.place.delete(manifest.MANIFEST_NAME)

    def _compare(self, there: dict[str, Any], here: dict[str, Any], finished: bool) -> None:
        old, new = dict(there["recipe"], source=there["source"]), dict(here["recipe"], source=here["source"])
        if finished:  # before that, removing or adding a tile to mend the source is part of the work
            for field in ("tiles", "keys_sha256"):
                old[field], new[field] = there[field], here[field]
        differ = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        if differ:
            sides = "; ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in differ)
            raise UserError(
                f"{self.place.out}: was begun with another recipe or source ({sides}); give the same ones to go "
                "on, or pack into another folder"
            )

    def signature(self, tile: Tile) -> str:
        """The signature of a tile, as it was when this packing looked first."""
        if tile.key not in self._signatures:
            self._signatures[tile.key] = signature(tile, by_content=self.place.is_store)
        return self._signatures[tile.key]

    def fingerprint(self, shard: PlannedShard) -> str:
        """What goes into a shard, in short."""
        parts = [self._recipe, shard.name, shard.split, *map(self.signature, shard.tiles)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def records(self, shards: list[PlannedShard], *, check_bytes: bool) -> list[Stored | None]:
        """The records of the shards that are whole and still what is wanted, and None for the others.

        `check_bytes` hashes the shards that lie on a disk; of those in a store, sizes are compared.
        """
        sizes, noted = self.place.sizes(), set(self._record_names())

        def look(shard: PlannedShard) -> Stored | None:
            text = self._read_record(shard.name) if shard.name in noted else None
            return self._judged(shard, text, sizes.get(shard.name), check_bytes)

        with ThreadPoolExecutor(READS_AT_ONCE) as executor:  # a store answers in tens of milliseconds
            return list(executor.map(look, shards))

    def _judged(
        self, shard: PlannedShard, text: bytes | None, size: int | None, check_bytes: bool
    ) -> Stored | None:
        facts = json.loads(text) if text is not None else None
        if facts is None or facts["fingerprint"] != self.fingerprint(shard) or facts["bytes"] != size:
            return None
        if check_bytes and isinstance(self.place, LocalPlace):
            tar = self.place.path(shard.name)
            if tar is None or sha256_of(tar) != facts["sha256"]:
                return None
        return record_of(facts).stored()

    def _read_record(self, name: str) -> bytes | None:
        return self.place.read(f"{FOLDER}/records/{name}.json")

    def _record_names(self) -> list[str]:
        names = self.place.names(f"{FOLDER}/records")
        return [name.removesuffix(".json") for name in names if name.endswith(".tar.json")]

    def damaged(self, tiles: dict[str, Tile]) -> dict[str, str]:
        """Tiles that an earlier run could not pack and that have not been touched since: sentence by key."""
        found = {}
        for name in self.place.names(f"{FOLDER}/damaged"):
            text = self.place.read(f"{FOLDER}/damaged/{name}") if name.endswith(".json") else None
            for key, (stamp, sentence) in json.loads(text or b"{}").items():
                if key in tiles and self.signature(tiles[key]) == stamp:
                    found[key] = sentence
        return found

    def keep_damaged(self, part: str, damaged: dict[str, str], tiles: dict[str, Tile]) -> None:
        """Remember tiles that cannot be packed, so that no later run and no other machine tries them."""
        stamped = {key: (self.signature(tiles[key]), sentence) for key, sentence in sorted(damaged.items())}
        name = f"{FOLDER}/damaged/part-{part.replace('/', '-of-')}.json"
        self.place.write(name, json.dumps(stamped, indent=1).encode())

    def publish(self, shards: list[PlannedShard]) -> None:
        """Put the finished shards in their places; what an earlier plan left behind goes."""
        self.place.publish([shard.name for shard in shards])
        names = {shard.name for shard in shards}
        for name in self._record_names():
            if name not in names:
                self.place.delete(name)
                self.place.delete(f"{FOLDER}/records/{name}.json")


def keep(place: Place, name: str, record: Record) -> None:
    """Remember a finished shard."""
    place.write(f"{FOLDER}/records/{name}.json", json.dumps(dataclasses.asdict(record)).encode())


def record_of(facts: dict[str, Any]) -> Record:
    """A record from its JSON."""
    tallies = {city: Tally(**tally) for city, tally in facts["tallies"].items()}
    rows = [tuple(row) for row in facts["rows"]]
    return Record(facts["fingerprint"], facts["bytes"], facts["sha256"], rows, tallies)
