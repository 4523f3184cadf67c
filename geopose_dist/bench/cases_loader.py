"""Tiles per second into the training process: our loader beside two that people use, on the same tiles.

`loader`: beside (a) loose LZW TIFFs with the benchmark's augmentation, (b) WebDataset as its users write it, and
(b) with our kernels; and reading and grouping alone. `loader_stages`: where a sample's CPU time goes, by codec, crop
and augmentation. Pipelines run in turn, one worker each, the same batch; what they deliver is compared first.
Speedups are of CPU time (workers and parent), which another job on the machine changes little; `wall_` is the clock.
"""

from __future__ import annotations

import functools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from geopose_dist.augment import Augmenter, AugmentRecipe
from geopose_dist.augment.recipe import Preset
from geopose_dist.bench import loader_baselines as baselines
from geopose_dist.bench import loader_stages
from geopose_dist.bench.cases_kernels import scene
from geopose_dist.bench.harness import Row, check, timing
from geopose_dist.data.loader import DataRecipe, open_shards, train_loader
from geopose_dist.data.reader import Reader
from geopose_dist.data.sample import View
from geopose_dist.data.workers import keep_freed_memory
from geopose_dist.kernels import planes

TILES = 24
STEPS = 14
"""Batches per repeat; the first, in which workers start and queues fill, do not count."""
SKIPPED = 4
TILE_PX = 1024
PAIRS = {"standard": ("qoi", "lerc"), "fastest": ("gpz", "gpz")}
"""Codecs of colours and heights: the fastest standard ones, and the fastest offered."""
STAGE_TILES = 8
QUICK = {"TILES": 8, "TILE_PX": 128, "STEPS": 6, "STAGE_TILES": 2}

PLAIN_TIFFS = "(a) loose LZW TIFFs"
TIFFS = "(a) loose LZW TIFFs, augmented the benchmark's way"
WEBDATASET = "(b) webdataset as its users write it"
KERNELS = "(b) webdataset with our codecs and kernels"


@dataclass
class Runs:
    """Seconds per tile of one pipeline, one number per repeat."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, one: tuple[float, float]) -> None:
        """Another repeat: by the clock, and of all processes' CPU time."""
        self.wall.append(one[0])
        self.cpu.append(one[1])


def loader(repeats: int, shards: str | None = None) -> list[Row]:
    """Our loader beside the two that people use; without `shards`, on rendered tiles of 1024 px."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        views = tiles_of(shards)
        write_all(work, views)
        check_equal(plain_pipelines(work), views)
        pipelines = plain_pipelines(work) | augmented_pipelines(work)
        runs = {name: Runs() for name in pipelines}
        for _ in range(repeats):
            for name, pipeline in pipelines.items():  # in turn, so that a busy minute hits all alike
                runs[name].add(seconds_per_tile(pipeline))
        rows, columns = views[0].size
        facts = {
            "batch": baselines.BATCH,
            "tile_px": f"{rows}x{columns}",
            "checked": "equal",
            "repeats": repeats,
        }
        return [{**row, **facts} for row in compared(runs)] + [{**read_alone(work, repeats), **facts}]


def write_all(work: Path, views: list[View]) -> None:
    """The same tiles in every form."""
    for name, (rgb, agl) in {**PAIRS, "png": ("png", "png")}.items():
        baselines.write_members(work / name, views, rgb, agl)
    baselines.write_loose(work / "loose", views)


def plain_pipelines(work: Path) -> dict[str, Callable[[], Iterator[Any]]]:
    """Without augmentation."""
    none = Augmenter(AugmentRecipe("none"))
    found: dict[str, Callable[[], Iterator[Any]]] = {
        f"ours, {'+'.join(codecs)}": functools.partial(ours, work / name, none)
        for name, codecs in PAIRS.items()
    }
    found[PLAIN_TIFFS] = functools.partial(baselines.loose, work / "loose", False)
    found[WEBDATASET] = functools.partial(baselines.webdataset_pipeline, work / "png" / "train-000000.tar")
    return found


def augmented_pipelines(work: Path) -> dict[str, Callable[[], Iterator[Any]]]:
    """With the benchmark's probabilities."""
    augmenter = Augmenter(AugmentRecipe("benchmark"))
    tar, cities = (
        work / "fastest" / "train-000000.tar",
        open_shards(str(work / "fastest"), "train").manifest.cities,
    )
    return {
        **{
            f"ours, {'+'.join(codecs)}, augmented": functools.partial(ours, work / name, augmenter)
            for name, codecs in PAIRS.items()
        },
        TIFFS: functools.partial(baselines.loose, work / "loose", True),
        KERNELS: functools.partial(baselines.webdataset_ours, tar, cities, augmenter),
        "ours, gpz+gpz, augmented, 2 workers": functools.partial(ours, work / "fastest", augmenter, 2),
    }


def compared(runs: dict[str, Runs]) -> Iterator[Row]:
    """One row for each comparison; a ratio is the median of the ratios of neighbouring runs."""
    for mine, theirs in (
        ("ours, qoi+lerc, augmented", TIFFS),
        ("ours, gpz+gpz, augmented", TIFFS),
        ("ours, qoi+lerc", PLAIN_TIFFS),
        ("ours, gpz+gpz", PLAIN_TIFFS),
        ("ours, qoi+lerc", WEBDATASET),
        ("ours, gpz+gpz", WEBDATASET),
        ("ours, gpz+gpz, augmented", KERNELS),
        ("ours, gpz+gpz, augmented, 2 workers", "ours, gpz+gpz, augmented"),
    ):
        cpu, other = timing(runs[mine].cpu), timing(runs[theirs].cpu)
        yield {
            "name": mine,
            "tiles_per_s": 1 / timing(runs[mine].wall).median_s,
            "tiles_per_core_s": 1 / cpu.median_s,
            "cpu_ms": 1e3 * cpu.median_s,
            "spread": cpu.spread,
            "baseline": theirs,
            "baseline_tiles_per_s": 1 / timing(runs[theirs].wall).median_s,
            "baseline_cpu_ms": 1e3 * other.median_s,
            "baseline_spread": other.spread,
            "speedup": ratio(runs[mine].cpu, runs[theirs].cpu),
            "wall_speedup": ratio(runs[mine].wall, runs[theirs].wall),
            "verdict": f"{mine}: {ratio(runs[mine].cpu, runs[theirs].cpu):.2f} times as fast as {theirs}",
        }


def ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times as long theirs takes."""
    return timing([b / a for a, b in zip(ours, theirs, strict=True)]).median_s


def seconds_per_tile(pipeline: Callable[[], Iterator[Any]]) -> tuple[float, float]:
    """Steady-state seconds per tile of an endless iterator of batches: by the clock, and of CPU time.

    CPU time is this process's and that of all processes it started, user and system.
    """
    batches = pipeline()
    for _ in range(SKIPPED):
        next(batches)
    began, cpu = time.perf_counter(), cpu_s()
    for _ in range(STEPS - SKIPPED):
        next(batches)
    tiles = baselines.BATCH * (STEPS - SKIPPED)
    spent = (time.perf_counter() - began) / tiles, (cpu_s() - cpu) / tiles
    del batches  # ends its workers
    return spent


def cpu_s() -> float:
    """CPU seconds of this process and all that descend from it and still live."""
    ticks, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        pid = int(path.parent.name)
        parents[pid], ticks[pid] = int(text[1]), int(text[11]) + int(text[12])
    me = multiprocessing.current_process().pid
    assert me is not None
    family = {me}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    return time.process_time() + sum(ticks[pid] for pid in family - {me}) / 100


def ours(folder: Path, transform: Augmenter, workers: int = 1) -> Iterator[Any]:
    """What a training run iterates."""
    shard_set = open_shards(str(folder), "train")
    batch = baselines.BATCH
    recipe = DataRecipe(shards=str(folder), global_batch=batch, micro_batch=batch, workers=workers)
    steps = train_loader(shard_set, recipe, 0, 0, 1, 0, 10**9, transform)
    for step in steps:
        yield step[0]


def check_equal(pipelines: dict[str, Callable[[], Iterator[Any]]], views: list[View]) -> None:
    """Every pipeline without augmentation delivers the same pixels for the same key."""
    truth = {view.key: view for view in views}
    for name, pipeline in pipelines.items():
        batch = next(pipeline())
        if isinstance(batch, dict):
            keys, floats, heights = batch["key"], batch["rgb"].numpy(), batch["agl_m"].numpy()
        else:
            keys, rgb = batch.keys, batch.rgb.numpy()
            floats = [np.ascontiguousarray(image, np.float32) / np.float32(255) for image in rgb]
            heights = [baselines.metres(agl[0]) for agl in batch.agl_cm.numpy()]
        for key, image, agl_m in zip(keys, floats, heights, strict=True):
            same = np.array_equal(image, baselines.unit_floats(truth[key].rgb))
            wanted_m = truth[key].agl_m
            check(same, f"{name} delivers other pixels for {key}")
            assert wanted_m is not None
            same = np.array_equal(agl_m, wanted_m, equal_nan=True)
            check(same, f"{name} delivers other heights for {key}")


def read_alone(work: Path, repeats: int) -> Row:
    """Reading samples and telling their members apart, in any order, beside webdataset's sequential reading."""
    seconds: dict[str, list[float]] = {"ours": [], "webdataset": []}
    fork = multiprocessing.get_context("fork")
    for _ in range(max(repeats, 3)):
        for name, taken in seconds.items():
            back, end = fork.Pipe(duplex=False)
            child = fork.Process(target=_read_all, args=(name, work / "standard", end))
            child.start()
            taken.append(back.recv())
            child.join()
    mine, theirs = timing(seconds["ours"]), timing(seconds["webdataset"])
    speedup = ratio(seconds["ours"], seconds["webdataset"])
    return {
        "name": "ours: read, check, group in any order",
        "tiles_per_core_s": 1 / mine.median_s,
        "cpu_ms": 1e3 * mine.median_s,
        "spread": mine.spread,
        "baseline": "webdataset: read, group in order",
        "baseline_cpu_ms": 1e3 * theirs.median_s,
        "baseline_spread": theirs.spread,
        "speedup": speedup,
        "verdict": f"reading and grouping alone: {speedup:.2f} times as fast as webdataset",
    }


def _read_all(name: str, folder: Path, end: Any) -> None:
    """CPU seconds per sample of the best of some passes, as a fresh worker of either kind reads."""
    import webdataset

    reader = Reader(open_shards(str(folder), "train"))
    order = np.random.Generator(np.random.Philox(0)).permutation(len(reader)).tolist()
    if name == "ours":
        keep_freed_memory()
    best = float("inf")
    for _ in range(5):
        began, found = time.process_time(), 0
        if name == "ours":
            for index in order:
                found += len(reader.members(index)[1])
        else:
            for sample in webdataset.WebDataset(
                str(folder / "train-000000.tar"), shardshuffle=False, empty_check=False
            ):
                found += sum(not key.startswith("__") for key in sample)
        assert found == 3 * len(reader)
        best = min(best, (time.process_time() - began) / len(reader))
    end.send(best)


def stages(repeats: int, shards: str | None = None) -> list[Row]:
    """CPU milliseconds of a sample by stage, for every codec, with crops and with augmentation."""
    keep_freed_memory()
    found: list[Row] = []
    presets: list[tuple[Preset, int | None]] = [
        ("none", None),
        ("benchmark", None),
        ("strong", None),
        ("strong", 512),
    ]
    with tempfile.TemporaryDirectory() as folder:
        views = tiles_of(shards)[:STAGE_TILES]
        side = min(min(view.size) for view in views)
        for rgb, agl in (
            *PAIRS.values(),
            ("htj2k", "htj2k"),
            ("webp", "lerc"),
            ("png", "png"),
            ("jpg", "lerc"),
        ):
            work = Path(folder) / f"{rgb}-{agl}"
            baselines.write_members(work, views, rgb, agl)
            reader = Reader(open_shards(str(work), "train"))
            for preset, crop in presets if (rgb, agl) in PAIRS.values() else presets[:1]:
                if crop is not None and crop > side:
                    continue
                transform = Augmenter(AugmentRecipe(preset), crop)
                spent = loader_stages.stages(reader, transform, repeats)
                total = sum(spent[stage] for stage in loader_stages.STAGES)
                found.append({
                    "name": f"{rgb}+{agl}",
                    "augment": preset,
                    "crop_px": crop or "whole",
                    **{f"{stage}_ms": round(value, 2) for stage, value in spent.items()},
                    "total_ms": round(total, 2),
                    "tiles_per_core_s": 1e3 / total,
                })  # fmt: skip
    return found


def tiles_of(shards: str | None) -> list[View]:
    """The first labelled tiles of a folder of shards, or rendered ones: streets and roofs with a camera's noise."""
    if shards is not None:
        reader = Reader(open_shards(str(shards), "train"))
        views = [reader.view(index) for index in range(min(2 * TILES, len(reader)))]
        return [view for view in views if view.agl_m is not None and view.pose is not None][:TILES]
    views = []
    for number in range(TILES):
        view = scene(TILE_PX, number)
        rng = np.random.Generator(np.random.Philox(key=[12, number]))
        assert view.agl_m is not None
        grain = rng.normal(0, 4, (TILE_PX, TILE_PX, 1)) + rng.normal(0, 1, view.rgb.shape)
        rgb = np.clip(view.rgb + grain, 0, 255).astype(np.uint8)
        agl_m = planes.metres(np.rint(view.agl_m * 100).astype(np.uint16))
        key = f"BEN_{number:06d}"
        views.append(View(key, "BEN", rgb, agl_m, 0.5, view.scale_px_per_m, view.angle_rad))
    return views


CASES = {"loader": loader, "loader_stages": stages}
