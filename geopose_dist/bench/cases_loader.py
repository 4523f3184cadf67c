"""Tiles per second into the training process: our loader beside two that people use, on the same tiles.

Beside (a) loose LZW TIFFs, decoded and normalised to float32 in the worker as the public benchmark does, and
(b) a WebDataset pipeline as its users write it (PNG by Pillow, float32 to the parent, a shuffle buffer).
Each has one worker process and the same batch; the three are run in turn, and their pixels are compared once.
"""

from __future__ import annotations

import functools
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from geopose_dist.bench.harness import Row, timing
from geopose_dist.data.loader import DataRecipe, open_shards, train_loader
from geopose_dist.data.manifest import ShardSet
from geopose_dist.data.reader import Reader
from geopose_dist.data.sample import View

TILES = 24
BATCH = 4
STEPS = 24
"""Batches per repeat; the first four, in which workers start and queues fill, do not count."""
SKIPPED = 4
TILE_PX = 1024

Tile = dict[str, Any]
"""key, rgb float32 [3, H, W] in 0..1, agl_m float32 [H, W]: what all three must agree on."""


def loader(repeats: int, shards: Path | None = None) -> list[Row]:
    """Our loader beside loose TIFFs and beside webdataset; without `shards`, on drawn tiles of 1024 px."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shard_set = open_shards(str(shards or draw_shards(work / "drawn")), "train")
        views = [Reader(shard_set).view(index) for index in range(min(TILES, len(shard_set)))]
        write_loose(work / "loose", views)
        write_webdataset(work / "plain.tar", views)
        pipelines: dict[str, Callable[[], Iterator[Any]]] = {
            "ours": functools.partial(ours, shard_set),
            "loose LZW TIFFs": functools.partial(loose, work / "loose"),
            "webdataset as its users write it": functools.partial(webdataset_pipeline, work / "plain.tar"),
        }
        check_equal(pipelines, views)
        seconds: dict[str, list[float]] = {name: [] for name in pipelines}
        for _ in range(repeats):
            for name, pipeline in pipelines.items():  # in turn, so that a busy minute hits all three
                seconds[name].append(seconds_per_tile(pipeline()))
        first = views[0].rgb.shape
        facts = {"workers": 1, "batch": BATCH, "tile_px": f"{first[0]}x{first[1]}", "repeats": repeats}
        facts["members"] = " ".join(sorted(Reader(shard_set).members(0)[1]))
        return list(rows(seconds, facts))


def rows(seconds: dict[str, list[float]], facts: Row) -> Iterator[Row]:
    """One row for each baseline; the ratio is the median of the ratios of neighbouring runs."""
    mine = timing(seconds["ours"])
    for name in list(seconds)[1:]:
        theirs = timing(seconds[name])
        ratios = timing([b / a for a, b in zip(seconds["ours"], seconds[name], strict=True)])
        yield {
            "tiles_per_s": 1 / mine.median_s,
            "spread": mine.spread,
            "baseline": name,
            "baseline_tiles_per_s": 1 / theirs.median_s,
            "baseline_spread": theirs.spread,
            "speedup": ratios.median_s,
            "checked": "same pixels and heights",
            **facts,
        }


def seconds_per_tile(batches: Iterator[Any]) -> float:
    """Steady-state seconds per tile of an endless iterator of batches."""
    for _ in range(SKIPPED):
        next(batches)
    began = time.perf_counter()
    for _ in range(STEPS - SKIPPED):
        next(batches)
    return (time.perf_counter() - began) / (BATCH * (STEPS - SKIPPED))


def ours(shard_set: ShardSet) -> Iterator[Any]:
    """What a training run iterates, without augmentation."""
    recipe = DataRecipe(shards=shard_set.root, global_batch=BATCH, micro_batch=BATCH, workers=1)
    steps = train_loader(shard_set, recipe, seed=0, rank=0, world_size=1, start_step=0, stop_step=10**9)
    for step in steps:
        yield step[0]


class LooseTiles:
    """The public benchmark's data set: files of a folder, float32 from the worker on."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*_RGB.tif"))

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> Tile:
        import tifffile

        path = self.files[index % len(self.files)]
        key = path.name.removesuffix("_RGB.tif")
        rgb = tifffile.imread(path)
        agl_cm = tifffile.imread(path.with_name(f"{key}_AGL.tif"))
        json.loads(path.with_name(f"{key}_VFLOW.json").read_text())
        return {"key": key, "rgb": unit_floats(rgb), "agl_m": metres(agl_cm)}


def loose(folder: Path) -> Iterator[Any]:
    """Loose TIFFs through a stock DataLoader with one worker."""
    from torch.utils.data import DataLoader

    tiles: Any = LooseTiles(folder)
    return iter(DataLoader(tiles, batch_size=BATCH, num_workers=1, multiprocessing_context="fork"))


def webdataset_pipeline(tar: Path) -> Iterator[Any]:
    """A plain WebDataset pipeline over PNGs, its own decoder and shuffle buffer, one worker."""
    import webdataset

    data = (
        webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False)
        .repeat()
        .shuffle(100, initial=16)
    )
    data = data.map(_decode_webdataset).batched(BATCH, collation_fn=_stack)
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork")
    return iter(loader)


def _decode_webdataset(sample: dict[str, Any]) -> Tile:
    from PIL import Image

    rgb = np.asarray(Image.open(io.BytesIO(sample["rgb.png"])).convert("RGB"))
    agl_cm = np.asarray(Image.open(io.BytesIO(sample["agl.png"]))).astype(np.uint16)
    json.loads(sample["json"])
    return {"key": sample["__key__"], "rgb": unit_floats(rgb), "agl_m": metres(agl_cm)}


def _stack(tiles: list[Tile]) -> Any:
    from torch.utils.data import default_collate

    return default_collate(tiles)


def unit_floats(rgb: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint8 [H, W, 3] to float32 [3, H, W] in 0..1."""
    return np.ascontiguousarray(rgb.transpose(2, 0, 1), np.float32) / np.float32(255)


def metres(agl_cm: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint16 centimetres to float32 metres, NaN where unknown."""
    agl_m = agl_cm.astype(np.float32) / np.float32(100)
    agl_m[agl_cm == 65535] = np.nan
    return agl_m


def check_equal(pipelines: dict[str, Callable[[], Iterator[Any]]], views: list[View]) -> None:
    """Every pipeline delivers the same pixels for the same key."""
    truth = {view.key: view for view in views}
    for name, pipeline in pipelines.items():
        batch = next(pipeline())
        if name == "ours":
            keys, rgb = batch.keys, batch.rgb.numpy()
            floats = [np.ascontiguousarray(image, np.float32) / np.float32(255) for image in rgb]
            heights = [metres(agl[0]) for agl in batch.agl_cm.numpy()]
        else:
            keys, floats, heights = batch["key"], batch["rgb"].numpy(), batch["agl_m"].numpy()
        for key, image, agl_m in zip(keys, floats, heights, strict=True):
            if key not in truth:
                continue  # ours may draw a tile beyond the first TILES
            view = truth[key]
            same = np.array_equal(image, unit_floats(view.rgb)) and (
                view.agl_m is None or np.array_equal(agl_m, view.agl_m, equal_nan=True)
            )
            assert same, f"{name} delivers other pixels for {key}"


def draw_shards(folder: Path) -> Path:
    """Shards of drawn tiles: roofs and streets with the grain of a photograph, packed by `geopose pack`."""
    import imagecodecs

    from shards import pack

    source = folder / "tiles"
    source.mkdir(parents=True)
    rng = np.random.Generator(np.random.Philox(7))
    for number in range(TILES):
        key = f"JAX_{number:06d}"
        agl_cm = np.zeros((TILE_PX, TILE_PX), np.uint16)
        rgb = np.full((TILE_PX, TILE_PX, 3), 90.0, np.float32)
        for _ in range(120):
            row, column = rng.integers(0, TILE_PX - 40, 2)
            size = rng.integers(20, 140, 2)
            rgb[row : row + size[0], column : column + size[1]] = rng.uniform(30, 220, 3)
            agl_cm[row : row + size[0], column : column + size[1]] = rng.integers(300, 4000)
        rgb += rng.normal(0, 5, (TILE_PX, TILE_PX, 1)) + rng.normal(0, 1, rgb.shape)
        pixels = np.clip(rgb, 0, 255).astype(np.uint8)
        (source / f"{key}_RGB.png").write_bytes(imagecodecs.png_encode(pixels, level=1))
        _write_loose(source, key, None, agl_cm, 1.2, 0.01)
    pack.run(pack.PackRecipe(source=str(source), out=str(folder / "shards"), reduce=1))
    return folder / "shards"


def write_loose(folder: Path, views: list[View]) -> None:
    """The views as the benchmark's files."""
    folder.mkdir()
    for view in views:
        _write_loose(folder, view.key, view.rgb, _centimetres(view), view.angle_rad, view.scale_px_per_m)


def _write_loose(
    folder: Path, key: str, rgb: Any, agl_cm: Any, angle: float | None, scale: float | None
) -> None:
    import tifffile

    if rgb is not None:
        tifffile.imwrite(folder / f"{key}_RGB.tif", rgb, compression="lzw", photometric="rgb")
    tifffile.imwrite(folder / f"{key}_AGL.tif", agl_cm, compression="lzw")
    (folder / f"{key}_VFLOW.json").write_text(json.dumps({"scale": scale, "angle": angle}))


def write_webdataset(path: Path, views: list[View]) -> None:
    """The views as a tar of PNGs."""
    import imagecodecs
    import webdataset

    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False) as writer:
        for view in views:
            members = {
                "rgb.png": imagecodecs.png_encode(view.rgb, level=6),
                "agl.png": imagecodecs.png_encode(_centimetres(view), level=6),
                "json": json.dumps({"scale": view.scale_px_per_m, "angle": view.angle_rad}).encode(),
            }
            writer.write({"__key__": view.key, **members})


def _centimetres(view: View) -> np.ndarray[Any, Any]:
    if view.agl_m is None:
        return np.full(view.rgb.shape[:2], 65535, np.uint16)
    known = np.nan_to_num(np.rint(view.agl_m * np.float32(100)), nan=65535)
    agl_cm: np.ndarray[Any, Any] = known.astype(np.uint16)
    return agl_cm


CASES = {"loader": loader}
