"""The order of samples: a pure function from a position of an endless stream to (visit, index).

Every visit of the data set is a keyed permutation of all its samples, computed one position at a time by a
Feistel network over integers (no arrays, any size), so a run seeks anywhere in microseconds and its whole
loader state is one integer. A step reads the next G positions, cut into G/b micro-batches that the ranks
take in turn: nothing here depends on the number of ranks or loader workers. Integers and numpy only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from geopose_dist.data.manifest import ShardSet
from geopose_dist.data.permutation import I64, fold, fold_many, permute, permute_many, unpermute_many
from geopose_dist.errors import UserError

# What a key is for, so that two uses of one (seed, visit) never share draws.
PURPOSE_ORDER, PURPOSE_SHARDS, PURPOSE_GROUP, PURPOSE_CITY, PURPOSE_CITY_SLOTS = 1, 2, 3, 4, 5
PURPOSE_AUGMENT, PURPOSE_SUBSTITUTE = 6, 7


@dataclass(frozen=True, slots=True)
class Slot:
    """What stands at a position: the how-manieth visit, and which sample (row of the split's index)."""

    visit: int
    index: int


def parse_order(order: str) -> int:
    """K of an order field `block:K`; 0 for `full` (ValueError for anything else)."""
    name, colon, count = order.replace(" ", "").partition(":")
    if name == "full" and not colon:
        return 0
    if name == "block" and count.isdecimal() and int(count) > 0:
        return int(count)
    raise ValueError(f"order is {order!r}; wanted full, or block:K with K >= 1 shards shuffled together")


@dataclass(frozen=True)
class Plan:
    """Which sample stands at which position of the endless training stream.

    Attributes:
        samples: N, the length of a visit.
        seed: names the whole order.
        order: `full` or `block:K` (shards permuted, then samples within K neighbouring shards).
        global_batch: G, positions of one step.
        micro_batch: b, positions of one forward pass on one device.
        shards: fingerprint of the samples and their numbering.
        shard_sizes: samples of each shard; used by `block:K` only.
        city_weights: positive weight by city, of the city-balanced plan; empty = every sample alike.
        city_rows: rows of each city in `city_weights`, int [n_c] each.
    """

    samples: int
    seed: int = 0
    order: str = "full"
    global_batch: int = 1
    micro_batch: int = 1
    shards: str = ""
    shard_sizes: I64 | None = field(default=None, repr=False, compare=False)
    city_weights: Mapping[str, int] = field(default_factory=dict)
    city_rows: tuple[npt.NDArray[np.integer[Any]], ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(
                "the split to train on has no samples; pack some, or name another data.train_split"
            )
        block = parse_order(self.order)
        check_batches(self.global_batch, self.micro_batch)
        if block and self.city_weights:
            raise UserError(
                f"data.order is {self.order} and data.city_weights are set: a city-balanced order reads "
                "samples from all shards; use data.order full, or leave the weights out"
            )
        assert not block or (self.shard_sizes is not None and int(self.shard_sizes.sum()) == self.samples)

    @classmethod
    def of(
        cls,
        shard_set: ShardSet,
        *,
        seed: int,
        order: str = "full",
        global_batch: int = 1,
        micro_batch: int = 1,
        city_weights: Mapping[str, int] | None = None,
    ) -> Plan:
        """The plan over a split; `city_weights` may name the rest of the cities as `*` (UserError)."""
        weights = resolve_city_weights(city_weights or {}, shard_set)
        cities = shard_set.index["city"] if weights else None
        rows = tuple(np.flatnonzero(cities == shard_set.manifest.cities.index(city)) for city in weights)
        small = np.uint32 if len(shard_set) < 1 << 32 else np.int64
        return cls(
            samples=len(shard_set),
            seed=seed,
            order=order,
            global_batch=global_batch,
            micro_batch=micro_batch,
            shards=shard_set.fingerprint(),
            shard_sizes=np.array(shard_set.shard_sizes(), np.int64) if parse_order(order) else None,
            city_weights=weights,
            city_rows=tuple(r.astype(small) for r in rows),
        )

    def describe(self) -> dict[str, Any]:
        """What must be equal for a run to go on with this stream; plain values for `state.json`."""
        return {
            "samples": self.samples,
            "shards": self.shards,
            "seed": self.seed,
            "order": self.order,
            "global_batch": self.global_batch,
            "micro_batch": self.micro_batch,
            "city_weights": dict(self.city_weights),
        }

    def fingerprint(self) -> str:
        """A short name for `describe()`."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]

    def sample_at(self, position: int) -> Slot:
        """The sample at `position` >= 0, in some microseconds and without reading anything before it."""
        if self.city_weights:
            return self._balanced(position)
        visit, place = divmod(position, self.samples)
        if self._blocks is not None:
            return Slot(visit, self._blocks.index_at(visit, place))
        return Slot(visit, permute(fold(self.seed, PURPOSE_ORDER, visit), self.samples, place))

    def samples_at(self, positions: npt.ArrayLike) -> tuple[I64, I64]:
        """Visits and indices, int64 [n] each, of `positions` [n]; the same as `sample_at` of each."""
        asked = np.asarray(positions, np.int64)
        if self.city_weights or self._blocks is not None:
            slots = [self.sample_at(int(p)) for p in asked]
            return np.array([s.visit for s in slots], np.int64), np.array([s.index for s in slots], np.int64)
        visits, places = np.divmod(asked, self.samples)
        keys = fold_many(fold(self.seed, PURPOSE_ORDER), visits)
        return visits, permute_many(keys, self.samples, places)

    def _balanced(self, position: int) -> Slot:
        """Each block of sum(weights) positions holds w_c of city c; each city has its own visits."""
        total = sum(self.city_weights.values())
        block, place = divmod(position, total)
        turn = permute(fold(self.seed, PURPOSE_CITY_SLOTS, block), total, place)
        for city, (weight, rows) in enumerate(zip(self.city_weights.values(), self.city_rows, strict=True)):
            if turn < weight:
                visit, nth = divmod(block * weight + turn, len(rows))
                return Slot(
                    visit, int(rows[permute(fold(self.seed, PURPOSE_CITY, city, visit), len(rows), nth)])
                )
            turn -= weight
        raise AssertionError("unreachable: turn < total")

    @functools.cached_property
    def _blocks(self) -> _Blocks | None:
        block = parse_order(self.order)
        return _Blocks(self.seed, block, self.shard_sizes) if block and self.shard_sizes is not None else None


class _Blocks:
    """`block:K`: shards in keyed order, K neighbours of that order shuffled together.

    Shards of the most common size need no table: only the others ("odd" ones) are located, once a visit.
    """

    def __init__(self, seed: int, block: int, shard_sizes: I64) -> None:
        self.seed, self.block, self.sizes = seed, block, shard_sizes
        self.first_row = np.concatenate([[0], np.cumsum(shard_sizes)])
        values, counts = np.unique(shard_sizes, return_counts=True)
        self.usual = int(values[np.argmax(counts)])
        self.odd = np.flatnonzero(shard_sizes != self.usual)
        self._visit = functools.lru_cache(maxsize=2)(self._locate_odd)
        self._group = functools.lru_cache(maxsize=4)(self._shards_of_group)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Blocks, (self.seed, self.block, self.sizes)

    def _locate_odd(self, visit: int) -> tuple[I64, I64]:
        """Places of the odd shards in this visit's order, sorted; samples they add to the usual, summed."""
        key = fold(self.seed, PURPOSE_SHARDS, visit)
        places = unpermute_many(key, len(self.sizes), self.odd.astype(np.int64))
        by_place = np.argsort(places)
        extra = (self.sizes[self.odd] - self.usual)[by_place]
        return places[by_place], np.concatenate([[0], np.cumsum(extra)])

    def _before(self, visit: int, group: int) -> int:
        """Samples in the groups before `group`."""
        shards = min(group * self.block, len(self.sizes))
        places, extra = self._visit(visit)
        return shards * self.usual + int(extra[np.searchsorted(places, shards)])

    def _shards_of_group(self, visit: int, group: int) -> tuple[list[int], list[int]]:
        """Shards of a group, and the number of samples before each and after all."""
        key = fold(self.seed, PURPOSE_SHARDS, visit)
        places = range(group * self.block, min((group + 1) * self.block, len(self.sizes)))
        shards = [permute(key, len(self.sizes), place) for place in places]
        return shards, [0, *np.cumsum(self.sizes[shards]).tolist()]

    def index_at(self, visit: int, place: int) -> int:
        group = place // (self.usual * self.block)
        if len(self.odd):
            groups = range(-(-len(self.sizes) // self.block) + 1)
            group = bisect_right(groups, place, key=lambda g: self._before(visit, g)) - 1
        shards, before = self._group(visit, group)
        key = fold(self.seed, PURPOSE_GROUP, visit, group)
        turn = permute(key, before[-1], place - self._before(visit, group))
        which = bisect_right(before, turn) - 1
        return int(self.first_row[shards[which]]) + turn - before[which]


def resolve_city_weights(weights: Mapping[str, int], shard_set: ShardSet) -> dict[str, int]:
    """Positive weights by city of this split, in the manifest's order; `*` stands for all others."""
    if not weights:
        return {}
    present = np.bincount(shard_set.index["city"], minlength=len(shard_set.manifest.cities)) > 0
    if len(present) > len(shard_set.manifest.cities):
        raise UserError(
            f"{shard_set.folder}/index.npy: names a city {len(present) - 1}, the manifest has "
            f"{len(shard_set.manifest.cities)}; they do not belong together; pack again"
        )
    cities = [city for city, here in zip(shard_set.manifest.cities, present, strict=True) if here]
    unknown = sorted(set(weights) - set(cities) - {"*"})
    missing = [city for city in cities if city not in weights and "*" not in weights]
    if unknown or missing:
        found = f"names {', '.join(unknown)}" if unknown else f"leaves out {', '.join(missing)}"
        raise UserError(
            f"data.city_weights {found}, but split {shard_set.split} of {shard_set.root} has the cities "
            f"{', '.join(cities)}; give each a whole number (0 leaves a city out), or use '*' for the rest"
        )
    resolved = {city: weights.get(city, weights.get("*", 0)) for city in cities}
    positive = {city: weight for city, weight in resolved.items() if weight > 0}
    if not positive:
        raise UserError(
            "data.city_weights are all 0, which leaves no sample; give at least one city a positive weight"
        )
    return positive


def check_batches(global_batch: int, micro_batch: int) -> None:
    """Micro-batches must cut a step evenly (ValueError)."""
    if global_batch < 1 or micro_batch < 1 or global_batch % micro_batch:
        near = max(1, global_batch - global_batch % max(micro_batch, 1))
        raise ValueError(
            f"global_batch {global_batch} must be a positive multiple of micro_batch {micro_batch}; "
            f"{near} or {near + max(micro_batch, 1)} would do"
        )


def micro_batches(step: int, global_batch: int, micro_batch: int, rank: int, world_size: int) -> list[range]:
    """Positions of each micro-batch of `step` that `rank` of `world_size` takes; may be empty."""
    first = step * global_batch
    cuts = range(rank, global_batch // micro_batch, world_size)
    return [range(first + m * micro_batch, first + (m + 1) * micro_batch) for m in cuts]


def rank_of(position: int, global_batch: int, micro_batch: int, world_size: int) -> int:
    """The rank that reads `position`: the inverse of `micro_batches`."""
    return position % global_batch // micro_batch % world_size


def steps_of_run(epochs: float, samples: int, global_batch: int) -> int:
    """Steps after which every sample was visited `epochs` times: ceil(epochs * N / G)."""
    return math.ceil(Fraction(epochs).limit_denominator(1_000_000) * samples / global_batch)


def epochs_done(steps: int, samples: int, global_batch: int) -> int:
    """Whole visits that the first `steps` steps contain."""
    return steps * global_batch // samples


def ends_epoch(step: int, samples: int, global_batch: int) -> bool:
    """Whether `step` (counted from 0) is the first to reach past a multiple of N: time to validate."""
    return epochs_done(step + 1, samples, global_batch) > epochs_done(step, samples, global_batch)
