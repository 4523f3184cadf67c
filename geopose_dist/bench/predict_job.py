"""A whole prediction job of one actor, J2K files to challenge files: how fast, and what bounds it.

Two networks: one that takes longer than the files, and one that takes less. Both are dispatched as `geopose predict`
does it, and beside the benchmark's three blocking steps over the same tiles and network.
"""

from __future__ import annotations

import time
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np

from geopose_dist.bench.drawn import city
from geopose_dist.bench.harness import Row, check
from geopose_dist.evaluate import predictions as files
from geopose_dist.pool import Actors


def rows(folder: Path, tiles: int, side: int) -> list[Row]:
    """`tiles` tiles of `side` px by a larger network, and of twice that side by a tiny one."""
    return [
        job(folder / "network", "resnet18", {}, 2, tiles, side),
        job(
            folder / "files",
            "tu-mobilenetv3_small_050",
            {"decoder_channels": [16, 16, 8, 8, 8]},
            4,
            tiles,
            2 * side,
        ),
    ]


def job(work: Path, encoder: str, model: dict[str, Any], reduction: int, tiles: int, side: int) -> Row:
    """One job on the CPU, checked and beside its baseline."""
    import imagecodecs
    import torch

    from geopose_dist.infer.dispatch import Dispatch
    from geopose_dist.infer.load import Loads
    from geopose_dist.infer.predictor import Predictor
    from geopose_dist.infer.recipe import NetRecipe
    from geopose_dist.infer.work import TileSource, WorkSpec, fix_batches
    from geopose_dist.model.recipe import ModelRecipe
    from geopose_dist.model.unet import GeoposeNet
    from geopose_dist.model.weights import save_weights
    from shards import layouts

    out = work / "out"
    out.mkdir(parents=True)
    recipe = ModelRecipe(encoder=encoder, **model)
    torch.manual_seed(0)
    weights = work / "net.safetensors"
    save_weights(weights, GeoposeNet(recipe).state_dict(), recipe, {"reduction": reduction})
    sources = []
    for index in range(tiles):
        path = work / f"JAX_{index:03}_RGB.j2k"
        path.write_bytes(imagecodecs.jpeg2k_encode(city(side, index)[0], codecformat="J2K"))
        sources.append(TileSource(f"JAX_{index:03}", layouts.Tile(f"JAX_{index:03}", "JAX", path)))
    threads, batch = torch.get_num_threads(), 2
    spec = WorkSpec((weights,), NetRecipe(), batch, out, "cm", "", "", 1, "cpu", threads)
    loads, written = Loads(), 0
    with Actors("inline", cpus=threads, use_gpus=False) as actors:
        work_list = Dispatch(
            actors,
            spec,
            count=1,
            cpus=threads,
            gpus=0,
            in_flight=spec.in_flight,
            attempts=1,
            timeout_s=900,
            split=methodcaller("parts"),
        )
        items = fix_batches(sources, batch)
        for _ in work_list.results(items[:1]):  # warm-up
            pass
        began = time.perf_counter()
        for _, report in work_list.results(items):
            loads.add(report.load)
            written += len(report.written)
        wall = time.perf_counter() - began
    check(written == tiles, "not all tiles were written")
    predictor = Predictor([weights], NetRecipe(), batch=batch)
    check_written(predictor, sources, out)
    theirs = in_steps(predictor, sources, work / "steps")
    facts, found = loads.facts(), loads.bottleneck()
    return {
        "name": f"predict {tiles} J2K tiles of {side}x{side}, {encoder} at 1/{reduction}, one actor on CPU",
        "tiles_per_s": tiles / wall,
        "ms": wall / tiles * 1e3,
        "baseline": "predict, then convert, one tile after another",
        "baseline_ms": theirs / tiles * 1e3,
        "speedup": theirs / wall,
        "network_busy": facts["network_busy"] or 0.0,
        "files_busy": facts["reading_and_writing_busy"] or 0.0,
        "bottleneck": found[0] if found else "too few tiles to tell",
        "spread": 0.0,
        "repeats": 1,
        "checked": "all tiles written, each as the network alone predicts it",
    }


def check_written(predictor: Any, sources: list[Any], folder: Path) -> None:
    """Files hold what the predictor answers for a tile alone, to a centimetre (rounding by the place in a batch)."""
    import imagecodecs

    for source in sources[:: max(1, len(sources) // 3)]:
        pose = predictor.predict([imagecodecs.jpeg2k_decode(source.tile.rgb.read_bytes())], [None])[0]
        wanted, _ = files.heights_cm(pose.agl_m)
        found = files.read_tiff(folder / f"{source.key}_AGL.tif")
        off = int(np.abs(found.astype(int) - wanted.astype(int)).max())
        check(off <= 1, f"{source.key}: heights in the file are {off} cm off the network's")
        scale, angle = files.read_vflow(folder / f"{source.key}_VFLOW.json")
        same = abs(scale * 100 / pose.scale_px_per_m - 1) < 1e-4 and abs(angle - pose.angle_rad) < 1e-4
        check(same, f"{source.key}: the file holds another pose than the network's")


def in_steps(predictor: Any, sources: list[Any], folder: Path) -> float:
    """Seconds of the benchmark's way over the same tiles and network: float files first, then uint16 ones."""
    import imagecodecs
    import tifffile
    from PIL import Image

    folder.mkdir()
    factor = predictor.reduction
    began = time.perf_counter()
    for source in sources:
        rgb = imagecodecs.jpeg2k_decode(source.tile.rgb.read_bytes())[::factor, ::factor]
        agl_m, _, _ = predictor.answers([np.ascontiguousarray(rgb)], [None], reduced_by=factor)
        large = agl_m[0].clip(0).repeat(factor, 0).repeat(factor, 1)
        tifffile.imwrite(folder / f"{source.key}_AGL.tif", large)
    for source in sources:
        heights = tifffile.imread(folder / f"{source.key}_AGL.tif")
        centimetres = (heights * 100).round().astype(np.uint16)
        Image.fromarray(centimetres).save(folder / f"{source.key}_cm.tif", compression="tiff_adobe_deflate")
    return time.perf_counter() - began
