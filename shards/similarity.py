"""Which tiles show one place, found by their looks alone, for `geopose split --by similarity`.

Features of every tile are kept as files in a dot-folder (0.14 MB a tile), so a killed run goes on. A tile's words
(VLAD: sums of differences to 64 common descriptors) shortlist the tiles of its city that resemble it; pairs are then
matched best first, those that are joined already left out, and tiles that stay nearly alone look further. How many
matches are chance is measured on the dataset itself: mirrored tiles show no place that any other shows, but have
its streets and roofs. The threshold lies just above them, because a false pair only joins two places, which
costs freedom, while a missed one leaks.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from geopose_dist import metrics_log, pool
from geopose_dist.geometry import F32
from shards.layouts import Tile
from shards.similarity_features import Features, features_of, load, matched, save, small_grey
from shards.similarity_recipe import SimilarityRecipe

VERSION = 2
"""Counts changes that make kept features worthless."""
WORDS = 64
MIRRORS = 32
"""Mirrored tiles by city, each matched with the tiles that resemble it most."""
CHANCE_SHARE = 0.9995
"""Share of mirrored pairs that stay below the threshold."""
LEAST_MATCHES = 6
"""The threshold where mirrored tiles match nothing at all: three matches always fit, a few more by chance."""
ROUNDS = (0, 4, 12, 24)
"""Ranks of the shortlist at which what was found is joined before going on."""
ALONE = 3
"""Groups of fewer tiles look further, LOOK_FURTHER times as far."""
LOOK_FURTHER = 4
BATCH_PAIRS = 48

Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Found:
    """Groups of tiles, and how they came about.

    Attributes:
        groups: group by key; groups are named "0", "1", ... by their first key.
        threshold: matches that made a pair.
        chance: matches of mirrored pairs, sorted.
        compared: pairs that were matched.
        featureless: keys of tiles with too few features to be compared.
    """

    groups: dict[str, str]
    threshold: int
    chance: list[int]
    compared: int
    featureless: list[str]


def find_places(tiles: Sequence[Tile], scratch: Path, recipe: SimilarityRecipe) -> Found:
    """Groups of tiles that show one place; features are kept in `scratch` until the caller removes it (UserError)."""
    tiles = sorted(tiles, key=lambda tile: tile.key)
    scratch.mkdir(parents=True, exist_ok=True)
    cities: dict[str, list[int]] = {}
    for number, tile in enumerate(tiles):
        cities.setdefault(tile.city, []).append(number)
    mirrored = {
        members[k] for members in cities.values() for k in range(0, len(members), -(-len(members) // MIRRORS))
    }
    paths = [scratch / f"{tile.key}-{_fingerprint(tile, recipe):08x}.npz" for tile in tiles]
    jobs = [
        FeatureJob(tile, path, recipe.keypoints, number in mirrored)
        for number, (tile, path) in enumerate(zip(tiles, paths, strict=True))
    ]
    with metrics_log.Progress(len(jobs), "split: features") as progress:
        counts = []
        for count in pool.process_map(make_features, jobs, workers=recipe.workers):
            counts.append(count)
            progress.advance()
    featureless = [tile.key for tile, count in zip(tiles, counts, strict=True) if count < LEAST_MATCHES]
    words = common_words(paths)
    ranked: dict[int, list[int]] = {}
    decoys: list[tuple[Path, Path]] = []
    for members in cities.values():
        vectors = np.stack([word_vector(load(paths[number]), words) for number in members])
        reach = min(len(members) - 1, LOOK_FURTHER * recipe.candidates)
        for place, order in enumerate(nearest(vectors, vectors, reach, apart=True)):
            ranked[members[place]] = [members[k] for k in order]
        own = [number for number in members if number in mirrored]
        turned = np.stack([word_vector(load(mirror_of(paths[number])), words) for number in own])
        # A tile and its own mirror image share a symmetric junction at times; they are no pair of strangers.
        for number, order in zip(
            own,
            nearest(turned, vectors, min(len(members), recipe.candidates + 1), apart=False),
            strict=True,
        ):
            decoys += [(mirror_of(paths[number]), paths[members[k]]) for k in order if members[k] != number]
    chance = sorted(_all_matches(decoys, recipe.workers, "split: what is chance"))
    threshold = recipe.matches or threshold_above(chance)
    joined, compared = _join(paths, ranked, recipe, threshold)
    return Found(
        _named(tiles, joined), threshold, chance, compared=compared + len(decoys), featureless=featureless
    )


def threshold_above(chance: Sequence[int]) -> int:
    """Matches that hardly any mirrored pair reaches."""
    if not chance:
        return LEAST_MATCHES
    return max(LEAST_MATCHES, int(np.quantile(chance, CHANCE_SHARE, method="higher")) + 1)


def _fingerprint(tile: Tile, recipe: SimilarityRecipe) -> int:
    """Tells kept features of another image, or made in another way, apart."""
    facts = tile.rgb.stat()
    return zlib.crc32(repr((VERSION, recipe.keypoints, facts.st_size, facts.st_mtime_ns)).encode())


def mirror_of(path: Path) -> Path:
    """Where the features of the mirrored image stand."""
    return path.with_suffix(".mirror.npz")


@dataclass(frozen=True)
class FeatureJob:
    """One tile whose features are wanted in a file, those of its mirror image beside it if asked for."""

    tile: Tile
    path: Path
    keypoints: int
    mirror: bool


def make_features(job: FeatureJob) -> int:
    """Make what is not there yet; the number of features (UserError)."""
    wanted = [job.path, mirror_of(job.path)] if job.mirror else [job.path]
    if not all(path.is_file() for path in wanted):
        grey = small_grey(job.tile)
        for path, image in zip(wanted, (grey, np.ascontiguousarray(grey[:, ::-1])), strict=False):
            save(path, features_of(image, job.keypoints))
    return len(load(job.path).sizes)


def common_words(paths: Sequence[Path], most: int = 100_000) -> F32:
    """float32 [WORDS, 128] unit vectors: k-means over some descriptors of every tile, the same in every run."""
    each = max(4, most // max(1, len(paths)))
    step = max(1, len(paths) * each // most)
    parts = []
    for path in paths[::step]:
        found = load(path).descriptors()
        parts.append(found[:: max(1, len(found) // each)][:each])
    sample = np.concatenate(parts)
    words: F32 = np.zeros((WORDS, 128), np.float32)
    if len(sample) == 0:
        return words
    words[:] = sample[np.linspace(0, len(sample) - 1, WORDS).astype(int)]
    for _ in range(8):
        belongs = (sample @ words.T).argmax(axis=1)
        for word in range(WORDS):
            own = sample[belongs == word]
            if len(own):
                middle = own.sum(axis=0)
                words[word] = middle / max(float(np.linalg.norm(middle)), 1e-9)
    return words


def word_vector(features: Features, words: F32) -> npt.NDArray[np.float16]:
    """float16 [WORDS * 128] of unit length: by word, the sum of its features' differences to it (zero without any)."""
    summed = np.zeros((WORDS, 128), np.float32)
    found = features.descriptors()
    if len(found):
        belongs = (found @ words.T).argmax(axis=1)
        np.add.at(summed, belongs, found - words[belongs])
        summed /= np.maximum(np.linalg.norm(summed, axis=1, keepdims=True), 1e-9)
        summed /= np.linalg.norm(summed)
    return summed.ravel().astype(np.float16)


def nearest(
    these: npt.NDArray[np.float16], those: npt.NDArray[np.float16], count: int, *, apart: bool
) -> Iterator[list[int]]:
    """For each of `these`, the `count` most like it of `those`, best first; `apart`: not itself."""
    others = those.astype(np.float32).T
    for start in range(0, len(these), 256):
        likeness = these[start : start + 256].astype(np.float32) @ others
        for row, values in enumerate(likeness):
            if apart:
                values[start + row] = -2
            # Ties are broken by number, so that every machine compares the same pairs.
            order = np.lexsort((np.arange(len(values)), -np.round(values, 5)))
            yield [int(k) for k in order[:count]]


@dataclass(frozen=True)
class MatchJob:
    """Pairs of files of features."""

    pairs: tuple[tuple[Path, Path], ...]


def match_job(job: MatchJob) -> list[int]:
    """Matches of each pair."""
    return [matched(_kept(one), _kept(other)) for one, other in job.pairs]


@functools.lru_cache(maxsize=128)
def _kept(path: Path) -> Features:
    return load(path)


def _all_matches(pairs: Sequence[tuple[Path, Path]], workers: int, label: str) -> list[int]:
    jobs = [
        MatchJob(tuple(pairs[start : start + BATCH_PAIRS])) for start in range(0, len(pairs), BATCH_PAIRS)
    ]
    found: list[int] = []
    with metrics_log.Progress(len(pairs), label, unit="pairs") as progress:
        # A few pairs are matched sooner than processes start.
        for matches in pool.process_map(match_job, jobs, workers=1 if len(jobs) < 2 else workers):
            found += matches
            progress.advance(len(matches))
    return found


class Groups:
    """Which tiles are joined (union-find)."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))
        self._size = [1] * count

    def of(self, number: int) -> int:
        """The group of a tile: the number of one of its members."""
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def size(self, number: int) -> int:
        """Tiles in the group of a tile."""
        return self._size[self.of(number)]

    def join(self, one: int, other: int) -> None:
        """Make two groups one; the smaller number names it."""
        low, high = sorted((self.of(one), self.of(other)))
        if low != high:
            self._parent[high] = low
            self._size[low] += self._size[high]


def _join(
    paths: Sequence[Path], ranked: dict[int, list[int]], recipe: SimilarityRecipe, threshold: int
) -> tuple[Groups, int]:
    """Join pairs with enough matches, best candidates first; the groups, and the number of pairs compared."""
    groups = Groups(len(paths))
    done: set[tuple[int, int]] = set()
    compared: list[int] = []

    def compare(pairs: Iterable[tuple[int, int]], label: str) -> None:
        new = sorted(set(pairs) - done)
        done.update(new)
        new = [pair for pair in new if groups.of(pair[0]) != groups.of(pair[1])]
        counts = _all_matches([(paths[a], paths[b]) for a, b in new], recipe.workers, label)
        compared.append(len(new))
        for (one, other), count in zip(new, counts, strict=True):
            if count >= threshold:
                groups.join(one, other)

    edges = [*(edge for edge in ROUNDS if edge < recipe.candidates), recipe.candidates]
    for low, high in itertools.pairwise(edges):
        near = ((min(number, k), max(number, k)) for number, order in ranked.items() for k in order[low:high])
        compare(near, f"split: candidates {low + 1} to {high}")
    far = [
        (min(number, k), max(number, k))
        for number, order in ranked.items()
        if groups.size(number) < ALONE
        for k in order[recipe.candidates :]
    ]
    if far:
        compare(far, "split: tiles nearly alone")
    return groups, sum(compared)


def _named(tiles: Sequence[Tile], groups: Groups) -> dict[str, str]:
    numbers: dict[int, str] = {}
    return {
        tile.key: numbers.setdefault(groups.of(number), str(len(numbers)))
        for number, tile in enumerate(tiles)
    }


def sum_up(found: Found, tiles: Sequence[Tile]) -> None:
    """Tell on stderr what was found and what to doubt."""
    sizes: dict[str, int] = {}
    for group in found.groups.values():
        sizes[group] = sizes.get(group, 0) + 1
    print(
        f"split: {len(tiles)} tiles show {len(sizes)} places ({found.compared} pairs compared, {found.threshold} "
        f"matches make a pair; the largest place has {max(sizes.values())} tiles, "
        f"{sum(size == 1 for size in sizes.values())} have one)",
        file=sys.stderr,
    )
    for city in sorted({tile.city for tile in tiles}):
        own = [tile.key for tile in tiles if tile.city == city]
        biggest = max(sizes[found.groups[key]] for key in own)
        if len(own) >= 20 and biggest > len(own) / 2:
            print(
                f"split: {city}: {biggest} of {len(own)} tiles are one place; if they are not, chance joined them: "
                f"raise --similarity.matches above {found.threshold}",
                file=sys.stderr,
            )
    if found.featureless:
        print(
            f"split: {len(found.featureless)} tiles have hardly any features (cloud, or blank) and stand alone, though "
            f"others may show their place: {', '.join(found.featureless[:5])}"
            f"{', ...' if len(found.featureless) > 5 else ''}",
            file=sys.stderr,
        )


def clear(scratch: Path) -> None:
    """Remove kept features."""
    shutil.rmtree(scratch, ignore_errors=True)
