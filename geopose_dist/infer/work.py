"""What an actor does with one item of the work list: read, predict, write, and tell what happened.

An item is a batch fixed by the sorted work list. Tiles keep their slot in it and the rest of a batch is
padding, so an item that is tried again, whole or tile by tile, gives the same bytes. A tile that cannot be
read is named in the report and the others go on. One thread runs the network and nothing else; all that is done tile
by tile (decode, reduce, enlarge, encode, write) is done by `threads` others, for the items before and after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.data.sample import U8
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.errors import UserError
from geopose_dist.geometry import F32, F64
from geopose_dist.infer import writer
from geopose_dist.infer.load import Load, Stopwatch
from geopose_dist.infer.predictor import Predictor, TilePose, remaining_factor
from geopose_dist.infer.recipe import NetRecipe
from shards import layouts, wavelet

Result = TypeVar("Result")


@dataclass(frozen=True)
class TileSource:
    """Where the pixels of a tile are: a file of a dataset, or a row of the index of the shards.

    Attributes:
        key: name of the tile.
        tile: the file, or None for shards.
        index: row of the split's index.
    """

    key: str
    tile: layouts.Tile | None = None
    index: int = -1


@dataclass(frozen=True)
class WorkItem:
    """A batch of tiles, each in the slot of its position; None where another try has the tile."""

    tiles: tuple[TileSource | None, ...]

    def parts(self) -> list[WorkItem]:
        """One item per tile, which keeps its slot."""
        return [
            WorkItem(tuple(tile if i == slot else None for i in range(len(self.tiles))))
            for slot, tile in enumerate(self.tiles)
            if tile is not None
        ]

    @property
    def keys(self) -> list[str]:
        """Names of the tiles."""
        return [tile.key for tile in self.tiles if tile is not None]


@dataclass
class Report:
    """What became of an item.

    Attributes:
        written: tiles written.
        failures: (key, sentence) of tiles that were not.
        clipped: pixels whose height had to be clipped.
        limited: tiles whose scale had to be limited.
        other_filter: tiles reduced by another filter than those that the network was trained on.
        load: what the actor had been busy with by then.
    """

    written: list[str] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    clipped: int = 0
    limited: int = 0
    other_filter: int = 0
    load: Load | None = None


@dataclass(frozen=True)
class Pixels:
    """A tile that was read.

    Attributes:
        small: uint8 [3, h, w], reduced as the network wants it.
        gsd_m: ground metres of a pixel of it, if known.
        rgb: uint8 [H, W, 3] at full resolution, None where the source has none.
        size: rows and columns at full resolution.
        other_filter: whether training's tiles were reduced by another filter.
    """

    small: U8
    gsd_m: float | None
    rgb: U8 | None
    size: tuple[int, int]
    other_filter: bool


def city_of(tile: TileSource | None) -> str | None:
    """The city that a tile's name begins with."""
    return None if tile is None else tile.key.partition("_")[0]


@dataclass(frozen=True)
class WorkSpec:
    """Everything that an actor needs, small enough to send anywhere; calling it makes the worker.

    Attributes:
        checkpoints: weights files.
        net: how a batch is predicted.
        batch: tiles of a batch.
        out: folder of the outputs.
        unit: cm or m.
        shards: folder or URL of shards, or empty.
        split: split of the shards.
        reduced_by: how far the source was reduced already.
        device: cpu or cuda.
        threads: of the arithmetic on CPU.
        store: how shards behind a URL are reached.
        first: a tile of the usual size, to warm up with on a GPU or compiled.
    """

    checkpoints: tuple[Path, ...]
    net: NetRecipe
    batch: int
    out: Path
    unit: str
    shards: str
    split: str
    reduced_by: int
    device: str
    threads: int
    store: StoreRecipe = field(default_factory=StoreRecipe)
    first: TileSource | None = None

    @property
    def in_flight(self) -> int:
        """Items that keep an actor busy: one in the network, one being written, and a tile read by each thread."""
        return 2 + -(-self.threads // self.batch)

    def __call__(self, gpu: int) -> Worker:
        """The worker on the `gpu`-th GPU that this process sees, or on the CPU."""
        return Worker(self, gpu)


class Worker:
    """An actor's state: networks, and the reader of the shards."""

    def __init__(self, spec: WorkSpec, gpu: int) -> None:
        import torch

        self.spec = spec
        self.reader = Reader(open_shards(spec.shards, spec.split, spec.store)) if spec.shards else None
        self._network = ThreadPoolExecutor(1)
        self._hands = ThreadPoolExecutor(spec.threads)  # codecs and kernels let other threads run meanwhile
        self.watch = Stopwatch(spec.threads)
        if spec.device == "cpu":
            torch.set_num_threads(spec.threads)
        device = "cpu" if spec.device == "cpu" else f"cuda:{gpu}"
        self.predictor = Predictor(spec.checkpoints, spec.net, batch=spec.batch, device=device)
        if spec.first is not None and (device != "cpu" or spec.net.compile != "none"):
            self._warm_up(spec.first)

    def _warm_up(self, tile: TileSource) -> None:
        """Before the first item, whose time limit is not meant for compiling."""
        try:
            pixels = self._read(tile)
        except UserError:
            return  # its own item will tell
        self.predictor.warm_up(*pixels.small.shape[1:])

    def __call__(self, item: WorkItem) -> Report:
        """Predict the tiles of an item; a tile that cannot be read or predicted is told, not raised."""
        report = Report()
        pixels: dict[int, Pixels] = {}
        reading = [
            (slot, tile, self._hands.submit(self._timed, self._read, tile))
            for slot, tile in enumerate(item.tiles)
            if tile is not None
        ]
        for slot, tile, future in reading:
            try:
                pixels[slot] = future.result()
            except UserError as error:
                report.failures.append((tile.key, str(error)))
        # Only like sizes go through the network together; each size keeps its tiles' slots.
        for size in sorted({one.small.shape for one in pixels.values()}):
            chosen = {slot: one for slot, one in pixels.items() if one.small.shape == size}
            self._predict(item, chosen, report)
        report.load = self.watch.load()
        return report

    def _timed(self, function: Callable[..., Result], *given: Any) -> Result:
        with self.watch.span("hands"):
            return function(*given)

    def _read(self, tile: TileSource) -> Pixels:
        predictor = self.predictor
        factor, filter_ = predictor.reduction, predictor.reduce_by
        if tile.tile is None:
            assert self.reader is not None
            view, by = self.reader.view(tile.index), self.spec.reduced_by
            packed_by = self.reader.shard_set.manifest.recipe.get("reduce_by", "area") if by > 1 else "area"
            size = view.rgb.shape[0] * by, view.rgb.shape[1] * by
            rgb, gsd_m, other = view.rgb, view.gsd_m, packed_by != filter_
        elif filter_ == "wavelet" and wavelet.can_reduce(tile.tile.rgb, factor):
            rgb, size = wavelet.read_rgb(tile.tile.rgb, factor)
            by, other, gsd_m = factor, False, tile.tile.gsd_m
            gsd_m = None if gsd_m is None else gsd_m * factor
        else:
            rgb, gsd_m = layouts.load_rgb(tile.tile), tile.tile.gsd_m
            by, size, other = 1, (rgb.shape[0], rgb.shape[1]), filter_ != "area"
        gsd_m = None if gsd_m is None else gsd_m * remaining_factor(factor, by)
        return Pixels(predictor.reduced(rgb, by), gsd_m, rgb if by == 1 else None, size, other)

    def _predict(self, item: WorkItem, pixels: dict[int, Pixels], report: Report) -> None:
        """Tiles of one reduced size through the network, then each to its files."""
        slots = sorted(pixels)
        answers = self._network.submit(
            self._answers,
            [pixels[slot].small for slot in slots],
            [pixels[slot].gsd_m for slot in slots],
            slots,
            [city_of(item.tiles[slot]) for slot in slots],
        ).result()
        writing = []
        for slot, *answer in zip(slots, *answers, strict=True):
            tile = item.tiles[slot]
            assert tile is not None
            report.other_filter += pixels[slot].other_filter
            writing.append((tile, self._hands.submit(self._timed, self._write, tile, pixels[slot], *answer)))
        for tile, future in writing:
            pose = future.result()
            if pose is None:
                report.failures.append(
                    (tile.key, f"{tile.key}: the network answered NaN or infinity; is the checkpoint sound?")
                )
                continue
            report.written.append(tile.key)
            report.clipped += pose.clipped
            report.limited += pose.scale_limited

    def _answers(self, *given: Any) -> tuple[F32, F64, F64]:
        with self.watch.span("network"):
            return self.predictor.answers_of_reduced(*given)

    def _write(
        self, tile: TileSource, pixels: Pixels, agl_m: F32, vector: F64, log_scale: float
    ) -> TilePose | None:
        """A tile's answer to its files; None if it is not finite."""
        pose = self.predictor.finish(agl_m, vector, float(log_scale), pixels.size, pixels.rgb)
        if pose is not None:
            writer.write_pose(self.spec.out, tile.key, pose, self.spec.unit)
        return pose


def fix_batches(tiles: list[TileSource], batch: int) -> list[WorkItem]:
    """The work list: batches of the tiles sorted by key."""
    ordered = sorted(tiles, key=lambda tile: tile.key)
    return [WorkItem(tuple(ordered[i : i + batch])) for i in range(0, len(ordered), batch)]


def facts_of(spec: WorkSpec) -> dict[str, object]:
    """What of a specification changes outputs, as plain values."""
    return {"net": dataclasses.asdict(spec.net), "unit": spec.unit}
