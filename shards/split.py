"""`geopose split`: train and validation tiles that share no place.

The same ground is seen in 20 to 40 tiles; a split of tiles leaks (a challenge team scored .925 on its own
split and .873 on the leaderboard). So places are split, city by city: each city with two places or more is in
both sets, which the score needs, and each keeps the wanted share of its tiles as closely as whole places allow.
Places are told by the dataset, by a file of groups, or found by the tiles' looks (`shards.similarity`). `leak` makes
the split that one should not make, to measure what it does.
"""

from __future__ import annotations

import json
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from geopose_dist.errors import FoundProblems, UserError
from shards.similarity_recipe import SimilarityRecipe

if TYPE_CHECKING:
    from shards.layouts import Tile


@dataclass(frozen=True)
class SplitRecipe:
    """How `geopose split` splits."""

    source: str = ""
    """Dataset, as for `geopose pack`."""
    by: str = "place"
    """`place`: the places that the dataset's places.csv (id, place) names; `similarity`: tiles that look like views of
    one place; or a JSON file {"group": [keys, ...], ...} that groups tiles by place, as clusters.json does."""
    out: str = ""
    """File to write: {"train": [keys], "val": [keys]}. With folds, NAME-0.json, NAME-1.json, ... beside it. With
    `--by similarity` also NAME.groups.json, the places found, which --by takes the next time."""
    val_share: float = 0.2
    """Share of each city's tiles to validate on."""
    seed: int = 0
    """Key of the choice of places."""
    folds: int = 0
    """Write this many splits instead, so that each place is validated on in exactly one of them."""
    leak: bool = False
    """Train on every second tile of each validation place, to measure what that does to the score. Never for results:
    the other tiles, which stay for validation, are in the same command's validation set without --leak, too."""
    similarity: SimilarityRecipe = field(default_factory=SimilarityRecipe)
    """How tiles are compared by `--by similarity`."""

    def __post_init__(self) -> None:
        if not self.source or not self.out:
            raise ValueError("--source and --out are wanted: a dataset to split, and the file to write")
        if not 0 < self.val_share < 1:
            raise ValueError(f"--val-share is {self.val_share}; wanted above 0 and below 1")
        if self.folds == 1 or self.folds < 0 or self.seed < 0:
            raise ValueError("--folds is at least 2 (or 0 for one split), --seed at least 0")
        if self.leak and self.folds:
            raise ValueError("--leak makes one split to measure leak by; wanted it without --folds")


def run(recipe: SplitRecipe) -> None:
    """Write the split file or files (UserError)."""
    from geopose_dist import files
    from shards import layouts, tars

    tiles = [tile for tile in layouts.read_layout(Path(recipe.source)) if _is_labelled(tile)]
    if not tiles:
        raise UserError(f"{recipe.source}: no labelled tiles (AGL or VFLOW) to split; nothing to do")
    place_of = _places(recipe, tiles)
    out = Path(recipe.out)
    tars.make_folder(out.parent)
    if recipe.folds:
        folds = make_folds(tiles, place_of, recipe.folds, recipe.seed)
        targets = [(out.with_name(f"{out.stem}-{k}.json"), val) for k, val in enumerate(folds)]
    else:
        targets = [(out, choose_val(tiles, place_of, recipe.val_share, recipe.seed))]
    for path, val_places in targets:
        split = {
            "train": sorted(tile.key for tile in tiles if place_of[tile.key] not in val_places),
            "val": sorted(tile.key for tile in tiles if place_of[tile.key] in val_places),
        }
        if recipe.leak:
            split = leaked(split, place_of)
        files.write_bytes(path, (json.dumps(split, indent=1) + "\n").encode())
        print(f"{path}: {_in_words(split, place_of, tiles)}")
    alone = sorted(city for city, places in _by_city(tiles, place_of).items() if len(places) < 2)
    if alone:
        print(
            f"split: {', '.join(alone)}: one place only, which is for training; not validated",
            file=sys.stderr,
        )


def leaked(split: dict[str, list[str]], place_of: dict[str, str]) -> dict[str, list[str]]:
    """Every second validation tile of each place moved to training; says so on stderr (UserError: none can be).

    The only tile of a validation place can show no leak; it is named `unused`.
    """
    by_place: dict[str, list[str]] = {}
    for key in split["val"]:
        by_place.setdefault(place_of[key], []).append(key)
    moved = {key for keys in by_place.values() for key in keys[1::2]}
    if not moved:
        raise UserError(
            "--leak: no validation place has two tiles, so none can be in both sets; leave --leak out"
        )
    kept = [key for keys in by_place.values() if len(keys) > 1 for key in keys[::2]]
    alone = sorted(keys[0] for keys in by_place.values() if len(keys) == 1)
    print(
        f"split: THIS SPLIT LEAKS: {len(kept)} validation tiles show places that training sees ({len(moved)} tiles "
        "moved there), so scores on it are too good; it is for measuring that, not for results",
        file=sys.stderr,
    )
    found = {"train": sorted([*split["train"], *moved]), "val": sorted(kept)}
    return found | ({"unused": alone} if alone else {})


def _is_labelled(tile: Tile) -> bool:
    return tile.split != "test" and (tile.agl is not None or tile.vflow is not None)


def _in_words(split: dict[str, list[str]], place_of: dict[str, str], tiles: list[Tile]) -> str:
    parts = []
    for name, keys in split.items():
        chosen = set(keys)
        cities = sorted({tile.city for tile in tiles if tile.key in chosen})
        parts.append(
            f"{name} {len(keys)} tiles of {len({place_of[k] for k in keys})} places ({', '.join(cities)})"
        )
    return ", ".join(parts)


def _places(recipe: SplitRecipe, tiles: list[Tile]) -> dict[str, str]:
    """Place by key (UserError where one is not known)."""
    if recipe.by == "place":
        unknown = [tile.key for tile in tiles if tile.place is None]
        if unknown:
            raise UserError(
                f"{recipe.source}: the place of {len(unknown)} of {len(tiles)} tiles is not known ({unknown[0]}, ...); "
                "wanted places.csv (id,place) in the dataset; add it, give a JSON file of groups: --by FILE, or let "
                "them be found by their looks: --by similarity"
            )
        return {tile.key: str(tile.place) for tile in tiles}
    if recipe.by == "similarity":
        return _by_looks(recipe, tiles)
    groups = read_groups(Path(recipe.by))
    missing = [tile.key for tile in tiles if tile.key not in groups]
    if missing:
        raise FoundProblems(
            f"{recipe.by}: names no group for {len(missing)} of {len(tiles)} labelled tiles; add them to it:",
            missing,
        )
    return {tile.key: groups[tile.key] for tile in tiles}


def _by_looks(recipe: SplitRecipe, tiles: list[Tile]) -> dict[str, str]:
    """Place by key, found by image features; also written as NAME.groups.json (UserError)."""
    from geopose_dist import files
    from shards import similarity

    out = Path(recipe.out)
    scratch = out.with_name(f".{out.stem}.features")
    found = similarity.find_places(tiles, scratch, recipe.similarity)
    similarity.sum_up(found, tiles)
    groups: dict[str, list[str]] = {}
    for key, group in found.groups.items():
        groups.setdefault(group, []).append(key)
    path = out.with_name(f"{out.stem}.groups.json")
    files.write_bytes(path, (json.dumps(groups, indent=1) + "\n").encode())
    print(f"{path}: {len(groups)} places of {len(tiles)} tiles; --by {path} takes them again")
    similarity.clear(scratch)
    return found.groups


def read_groups(path: Path) -> dict[str, str]:
    """Group of each tile from a file such as the challenge's clusters.json: {"45": [keys], ...} (UserError)."""
    form = 'wanted JSON such as {"45": ["OMA_YHDJAu", "OMA_GrpQCB"]}: groups of tiles of one place'
    try:
        groups = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"--by {path}: cannot be read ({error.strerror}); wanted `place`, or a file; {form}"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: damaged or cut short ({error}); {form}") from error
    if not isinstance(groups, dict) or not all(isinstance(keys, list) for keys in groups.values()):
        raise UserError(f"{path}: not groups of tiles; {form}")
    group_of: dict[str, str] = {}
    for group, keys in groups.items():
        for key in keys:
            if group_of.setdefault(str(key), group) != group:
                raise UserError(
                    f"{path}: {key} is in groups {group_of[str(key)]} and {group}; a tile has one place"
                )
    return group_of


def _by_city(tiles: list[Tile], place_of: dict[str, str]) -> dict[str, dict[str, int]]:
    """Number of tiles by city, then place. A place that spans cities counts for its first city only."""
    city_of: dict[str, str] = {}
    counts: dict[str, dict[str, int]] = {}
    for tile in sorted(tiles, key=lambda tile: tile.key):
        place = place_of[tile.key]
        places = counts.setdefault(city_of.setdefault(place, tile.city), {})
        places[place] = places.get(place, 0) + 1
    return counts


def _shuffled(city: str, places: dict[str, int], seed: int) -> list[str]:
    """The places of a city in keyed order; the city's name is part of the key, so cities do not shift each other."""
    generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(city.encode())]))
    names = sorted(places)
    return [names[i] for i in generator.permutation(len(names))]


def choose_val(tiles: list[Tile], place_of: dict[str, str], share: float, seed: int) -> set[str]:
    """Places to validate on: of each city with two or more, at least one and never all."""
    chosen: set[str] = set()
    for city, places in _by_city(tiles, place_of).items():
        wanted, taken = share * sum(places.values()), 0
        for place in _shuffled(city, places, seed)[1:]:
            # Take a place while that comes nearer to the wanted number of tiles, and one in any case.
            if taken == 0 or abs(taken + places[place] - wanted) < abs(taken - wanted):
                chosen.add(place)
                taken += places[place]
    return chosen


def make_folds(tiles: list[Tile], place_of: dict[str, str], folds: int, seed: int) -> list[set[str]]:
    """Disjoint sets of places that cover all, each city dealt to the folds by number of tiles (UserError)."""
    sets: list[set[str]] = [set() for _ in range(folds)]
    for city, places in _by_city(tiles, place_of).items():
        if len(places) < folds:
            raise UserError(
                f"--folds {folds}: {city} has {len(places)} places, so a fold would be without it; wanted at most "
                f"{len(places)} folds"
            )
        order = _shuffled(city, places, seed)
        filled = [0] * folds
        # The largest places first, each to the emptiest fold: sizes stay even, and every fold gets one.
        for place in sorted(order, key=lambda name: -places[name]):
            fold = min(range(folds), key=lambda k: (filled[k], k))
            sets[fold].add(place)
            filled[fold] += places[place]
    return sets
