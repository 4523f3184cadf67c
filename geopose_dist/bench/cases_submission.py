"""The whole of it: a folder of J2K tiles becomes submission.tar.gz by the commands that a user would give.

`geopose predict` on Ray, then `geopose submit`, each a process of its own whose start counts. The benchmark's way
(predict to float files, convert, pack, one tile after another, one process) is timed on a sample with the
same network on the same device, and told per tile.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from geopose_dist.bench.drawn import city
from geopose_dist.bench.harness import Row, check
from geopose_dist.bench.recipe import BenchRecipe
from geopose_dist.bench.submission_recipe import SubmissionRecipe
from geopose_dist.data.sample import U8
from geopose_dist.errors import FinishedWithFailures
from geopose_dist.evaluate import predictions as files
from geopose_dist.pool import usable_cores

CITIES = ("ARG", "ATL", "JAX", "OMA")
FULL_PX = 2048
"""Side of the challenge's tiles."""


def submission_case(recipe: BenchRecipe) -> list[Row]:
    """Seconds from J2K files to the archive, and what bounds the prediction."""
    import torch

    asked = recipe.submission
    device = asked.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        mean_mb = write_tiles(work, asked)
        weights = write_network(work, asked)
        options = ["--config", "predict/gpu"] if device == "cuda" else ["--device", "cpu"]
        began = time.perf_counter()
        geopose(
            "predict",
            "--source",
            work / "test_rgbs",
            "--checkpoint",
            weights,
            "--out",
            work / "out",
            *options,
        )
        predicted = time.perf_counter()
        archive = work / "submission.tar.gz"
        geopose(
            "submit", "--predictions", work / "out", "--format", work / "submission_format", "--out", archive
        )
        done = time.perf_counter()
        with tarfile.open(archive) as opened:
            count = len(opened.getnames())
        check(count == 2 * asked.tiles, f"the archive holds {count} files for {asked.tiles} tiles")
        facts = json.loads((work / "out" / ".geopose-predict" / "last_job.json").read_bytes())
        theirs = benchmarks_way(work, weights, asked, device)
        where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        quality = "lossless" if asked.megabytes == 0 else "lossy"
        return [
            {
                "name": f"{asked.tiles} {quality} J2K tiles of {asked.side}x{asked.side} ({mean_mb:.2f} MB) to "
                f"submission.tar.gz, {asked.encoder}, {where}, {usable_cores()} cores",
                "seconds": done - began,
                "predict_s": predicted - began,
                "submit_s": done - predicted,
                "tiles_per_s": asked.tiles / (done - began),
                "ms": (done - began) / asked.tiles * 1e3,
                "baseline": f"predict, convert, pack, one tile after another ({theirs[1]} tiles)",
                "baseline_ms": theirs[0] * 1e3,
                "speedup": theirs[0] / ((done - began) / asked.tiles),
                "network_busy": facts["network_busy"] or 0.0,
                "reading_and_writing_busy": facts["reading_and_writing_busy"] or 0.0,
                "bottleneck": facts["bottleneck"] or "too few tiles to tell",
                "archive_mb": archive.stat().st_size / 1e6,
                "spread": 0.0,
                "repeats": 1,
                "checked": "submit accepted every file",
            }
        ]


def geopose(*words: object) -> None:
    """A command of this program (FinishedWithFailures with its last words if it fails)."""
    told = subprocess.run(
        [sys.executable, "-m", "geopose_dist", *map(str, words)], capture_output=True, text=True, check=False
    )
    print("\n".join(told.stderr.splitlines()[-3:]), file=sys.stderr)
    if told.returncode:
        raise FinishedWithFailures(f"geopose {words[0]} ended with {told.returncode}: {told.stderr[-2000:]}")


def picture(side: int, number: int) -> U8:
    """A drawn tile with the noise of a sensor, without which it would compress to nothing."""
    noise = np.random.default_rng(number).normal(0, 6, (side, side, 3))
    return np.clip(city(side, number)[0] + noise, 0, 255).astype(np.uint8)


def write_tiles(work: Path, asked: SubmissionRecipe) -> float:
    """The test set and its format folder; the mean size of a J2K file in MB."""
    import imagecodecs

    images, form = work / "test_rgbs", work / "submission_format"
    images.mkdir()
    form.mkdir()
    level = quality(asked) if asked.megabytes else None
    size = asked.side, asked.side
    empty = files.encode_agl(np.zeros(size, np.uint16))

    def encode(number: int) -> bytes:
        pixels = picture(asked.side, number)
        if level is None:
            return bytes(imagecodecs.jpeg2k_encode(pixels, reversible=True, codecformat="J2K"))
        return bytes(imagecodecs.jpeg2k_encode(pixels, level=level, codecformat="J2K"))

    with ThreadPoolExecutor(usable_cores()) as hands:
        encoded = list(hands.map(encode, range(min(asked.distinct, asked.tiles))))
    first: dict[int, Path] = {}
    for index in range(asked.tiles):
        number, key = index % len(encoded), f"{CITIES[index % 4]}_{index:06}"
        path = images / f"{key}_RGB.j2k"
        if number in first:
            os.link(first[number], path)
        else:
            path.write_bytes(encoded[number])
            first[number] = path
        if index:
            os.link(form / f"{CITIES[0]}_{0:06}_AGL.tif", form / f"{key}_AGL.tif")
        else:
            (form / f"{key}_AGL.tif").write_bytes(empty)
        (form / f"{key}_VFLOW.json").write_bytes(files.encode_vflow(1.0, 0.0))
    return sum(map(len, encoded)) / len(encoded) / 1e6


def quality(asked: SubmissionRecipe) -> int:
    """The PSNR in dB at which a tile takes about so many megabytes for its area."""
    import imagecodecs

    wanted = asked.megabytes * 1e6 * (asked.side / FULL_PX) ** 2
    pixels = picture(min(asked.side, 512), 0)
    wanted *= (len(pixels) / asked.side) ** 2
    sizes = {
        db: len(imagecodecs.jpeg2k_encode(pixels, level=db, codecformat="J2K")) for db in range(30, 51, 2)
    }
    return min(sizes, key=lambda db: abs(math.log(sizes[db] / wanted)))


def write_network(work: Path, asked: SubmissionRecipe) -> Path:
    """A network with random weights on half resolution, as the benchmark's."""
    import torch

    from geopose_dist.model.recipe import ModelRecipe
    from geopose_dist.model.unet import GeoposeNet
    from geopose_dist.model.weights import save_weights

    recipe = ModelRecipe(encoder=asked.encoder)
    torch.manual_seed(0)
    path = work / "net.safetensors"
    save_weights(path, GeoposeNet(recipe).state_dict(), recipe, {"reduction": 2, "gsd_known": False})
    return path


def benchmarks_way(work: Path, weights: Path, asked: SubmissionRecipe, device: str) -> tuple[float, int]:
    """Seconds per tile of the tutorial's three steps, and the number of tiles they were timed on."""
    import imagecodecs
    import tifffile
    from PIL import Image

    from geopose_dist.infer.predictor import Predictor
    from geopose_dist.infer.recipe import NetRecipe

    predictor: Any = Predictor([weights], NetRecipe(), batch=1, device=device)
    images = sorted((work / "test_rgbs").iterdir())[: asked.sample]
    folder = work / "steps"
    folder.mkdir()
    predictor.warm_up(asked.side // 2, asked.side // 2)
    began = time.perf_counter()
    for path in images:
        rgb = np.ascontiguousarray(imagecodecs.jpeg2k_decode(path.read_bytes())[::2, ::2])
        agl_m, _, _ = predictor.answers([rgb], [None], reduced_by=2)
        tifffile.imwrite(folder / f"{path.stem}.tif", agl_m[0].clip(0).repeat(2, 0).repeat(2, 1))
    for path in images:
        centimetres = (tifffile.imread(folder / f"{path.stem}.tif") * 100).round().astype(np.uint16)
        Image.fromarray(centimetres).save(folder / f"{path.stem}_cm.tif", compression="tiff_adobe_deflate")
    with tarfile.open(folder / "all.tar.gz", "w:gz") as archive:
        for path in images:
            archive.add(folder / f"{path.stem}_cm.tif", arcname=path.name)
    return (time.perf_counter() - began) / len(images), len(images)


CASES = {"submission": submission_case}
