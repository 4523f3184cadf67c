"""Confidence intervals of the score: the bootstrap over places, else clusters, else tiles.

Views of one place share their ground, so tiles are not independent and a bootstrap over tiles promises more
than is known; whole places are drawn, city by city (the score is a mean over cities). Each round is a matrix
product over the tiles' moments, so a thousand rounds of six thousand tiles take a second or two. Percentile
intervals (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geopose_dist.errors import UserError
from geopose_dist.evaluate.moments import EPSILON, Moments, TileMoments
from geopose_dist.geometry import F64

ROUNDS = 1000
LEVEL = 0.95
FEWEST_GROUPS = 5
"""Below this many groups in a city the draws hardly differ from each other: no interval is given."""


@dataclass(frozen=True)
class Groups:
    """Which tiles are drawn together.

    Attributes:
        unit: what a group is: places, clusters or tiles.
        of_key: group of each tile; tiles that are not named stand alone.
    """

    unit: str
    of_key: Mapping[str, str]


def find_groups(truth: Path, named: Path | None) -> Groups:
    """The groups of a truth folder: the file that is named, else places.csv in or above it, else tiles (UserError)."""
    from shards import layouts_tables
    from shards.split import read_groups

    if named is not None:
        return Groups("clusters", read_groups(named))
    for folder in (truth, truth.resolve().parent):
        if (folder / "places.csv").is_file():
            problems: list[layouts_tables.Problem] = []
            places = layouts_tables.read(folder, problems).places
            if problems:
                raise UserError(problems[0].sentence)
            return Groups("places", places)
        if (folder / "clusters.json").is_file():
            return Groups("clusters", read_groups(folder / "clusters.json"))
    return Groups("tiles", {})


def bootstrap(
    moments: Moments, groups: Groups, rounds: int = ROUNDS, level: float = LEVEL, seed: int = 0
) -> dict[str, Any]:
    """Intervals of the final score and of each city's R2s.

    Returns:
        `{"unit": "places", "groups": {CITY: n}, "rounds", "level", "r2": [low, high] | None, "cities": {CITY:
        {"agl_r2": [low, high], "vflow_r2": ..., "r2": ...} | None}}`; None where a city has too few groups.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, rounds]))
    by_city: dict[str, list[TileMoments]] = {}
    for tile in sorted(moments.tiles, key=lambda tile: tile.key):
        if tile["known"] > 0:
            by_city.setdefault(tile.city, []).append(tile)
    counts: dict[str, int] = {}
    cities: dict[str, dict[str, list[float]] | None] = {}
    finals: list[F64] = []
    for city, tiles in sorted(by_city.items()):
        names = [_group_of(tile.key, groups) for tile in tiles]
        unique, number = np.unique(names, return_inverse=True)
        counts[city] = len(unique)
        if len(unique) < FEWEST_GROUPS:
            cities[city] = None
            continue
        drawn = rng.multinomial(len(unique), np.full(len(unique), 1 / len(unique)), size=rounds)
        scores = _scores(drawn[:, number].astype(np.float64), tiles)
        finals.append(scores["r2"])
        cities[city] = {name: _interval(values, level) for name, values in scores.items()}
    whole = bool(finals) and len(finals) == len(by_city)
    return {
        "unit": groups.unit,
        "groups": counts,
        "rounds": rounds,
        "level": level,
        "r2": _interval(np.mean(finals, axis=0), level) if whole else None,
        "cities": cities,
    }


def _group_of(key: str, groups: Groups) -> str:
    """A tile's group, by its key or its id without the city; itself where none is named."""
    return groups.of_key.get(key, groups.of_key.get(key.partition("_")[2], f"tile {key}"))


def _scores(weights: F64, tiles: list[TileMoments]) -> dict[str, F64]:
    """R2s [rounds] of a city whose tiles count `weights` [rounds, tiles] times."""
    known = np.array([tile["known"] for tile in tiles])
    posed = np.array([tile["posed"] for tile in tiles])

    def r2(count: F64, mean: str, squares: str, errors: str) -> F64:
        means = np.array([tile[mean] for tile in tiles])
        means -= np.average(means, weights=count)  # near 0: squares of what is left lose no digits
        inner = np.array([tile[squares] for tile in tiles]) * (count > 0)
        total, first = weights @ count, weights @ (count * means)
        spread = weights @ (inner + count * means**2) - first**2 / np.maximum(total, 1)
        wrong = weights @ (np.array([tile[errors] for tile in tiles]) * (count > 0))
        ratio: F64 = np.where(total > 0, 1 - wrong / (spread + EPSILON), np.nan)
        return ratio

    agl = r2(known, "mean_m", "m2_m", "sse_agl")
    if not posed.any():
        return {"agl_r2": agl, "r2": agl}
    flow = r2(2 * known * posed, "flow_mean", "flow_m2", "sse_flow")
    return {"agl_r2": agl, "vflow_r2": flow, "r2": (agl + flow) / 2}


def _interval(values: F64, level: float) -> list[float]:
    """The middle `level` of the values that are numbers."""
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def in_words(found: Mapping[str, Any], final: float) -> str:
    """One line for people."""
    unit, count = found["unit"], sum(found["groups"].values())
    if found["r2"] is None:
        few = ", ".join(f"{city} {n}" for city, n in found["groups"].items() if n < FEWEST_GROUPS)
        return f"no confidence interval: fewer than {FEWEST_GROUPS} {unit} in a city ({few})"
    low, high = found["r2"]
    words = f"final {final:.4f}, {found['level']:.0%} interval {low:.4f} to {high:.4f} (bootstrap over {count} {unit}"
    if unit == "tiles":
        return (
            words + "; views of one place are not independent: places.csv or --groups would make it honest)"
        )
    return words + ")"
