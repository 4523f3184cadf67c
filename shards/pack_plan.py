"""Which tile goes into which shard: a pure function of the tiles, the split and the seed.

Tiles of a split are permuted once by a keyed permutation, so that neighbours in a shard are strangers, and
cut into shards whose sizes differ by one at most. Nothing depends on workers, machines or earlier runs.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geopose_dist.errors import FoundProblems, UserError
from shards.layouts import Tile

BYTES_PER_PIXEL = 5
"""RGB and height, uncompressed."""


@dataclass(frozen=True)
class PlannedShard:
    """One shard to write: its file name, split, and tiles in order."""

    name: str
    split: str
    tiles: tuple[Tile, ...]


def plan(tiles: Iterable[Tile], split_of: dict[str, str], *, seed: int, samples: int) -> list[PlannedShard]:
    """The shards of these tiles, at most `samples` in each, sorted by split and name."""
    by_split: dict[str, list[Tile]] = {}
    for tile in sorted(tiles, key=lambda tile: tile.key):
        by_split.setdefault(split_of[tile.key], []).append(tile)
    shards = []
    for split, members in sorted(by_split.items()):
        # The split's name is part of the key: adding a split does not reorder another.
        generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(split.encode())]))
        order = generator.permutation(len(members))
        count = -(-len(members) // samples)
        for number, part in enumerate(np.array_split(order, count)):
            name = f"{split}-{number:06d}.tar"
            shards.append(PlannedShard(name, split, tuple(members[i] for i in part)))
    return shards


def splits_of(tiles: Iterable[Tile], split_file: Path | None) -> dict[str, str]:
    """Split of every tile (FoundProblems).

    With a file, what it says; unlabelled tiles and those of a test folder that it does not name are `test`,
    and any other tile that it does not name is a problem. Without one, labelled tiles are `train`, but for
    those of a test folder.
    """
    named = {} if split_file is None else read_split(split_file)
    splits, missing = {}, []
    for tile in tiles:
        is_test = tile.split == "test" or (tile.agl is None and tile.vflow is None)
        if tile.key in named:
            splits[tile.key] = named[tile.key]
        elif is_test:
            splits[tile.key] = "test"
        elif split_file is None:
            splits[tile.key] = "train"
        else:
            missing.append(tile.key)
    if missing:
        raise FoundProblems(
            f"{split_file}: names no split for {len(missing)} labelled tiles; run `geopose split` again, or "
            "add them:",
            missing,
        )
    return splits


def read_split(path: Path) -> dict[str, str]:
    """Split by key of a file such as {"train": [keys], "val": [keys]} (UserError)."""
    form = (
        'wanted JSON such as {"train": ["JAX_abcdef"], "val": ["OMA_ghijkl"]}, as `geopose split` writes it'
    )
    try:
        listed = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {form}") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged or cut short ({error}); {form}") from error
    if not isinstance(listed, dict) or not all(
        isinstance(keys, list) and all(isinstance(key, str) for key in keys) for keys in listed.values()
    ):
        raise UserError(f"{path}: not a split; {form}")
    split_of: dict[str, str] = {}
    for split, keys in listed.items():
        if not split.isalnum() or not split.isascii():
            raise UserError(f"{path}: split {split!r} cannot name shards; wanted letters and digits; {form}")
        for key in keys:
            if split_of.setdefault(key, split) != split:
                raise UserError(f"{path}: {key} is in {split_of[key]} and in {split}; a tile has one split")
    return split_of
