"""Tiles packed per second by one process, beside the public benchmark's way of preparing its data.

The benchmark decodes a tile whole, reduces RGB bilinearly and heights by taking the nearest, and writes loose
LZW TIFFs, heights as float32 metres (DOMAIN section 4). Ours writes a shard with its index and hashes, fsynced.
Both read the same rendered JPEG 2000 tiles, one process each, in turn in every repeat. A second row packs from
the wavelet's half resolution (`--reduce-by wavelet`); `wavelet` tells what that does to the pixels.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from geopose_dist.bench.cases_codecs import ratio, render, rendered_source
from geopose_dist.bench.harness import Row, check, pinned, timing
from geopose_dist.data import resample
from shards import wavelet

U8 = npt.NDArray[np.uint8]

WAVELET_OFF = 8.0
"""Largest mean difference of the wavelet's half resolution, in levels."""
SAME_M, SAME_SHARE = 1.5, 0.6
"""Heights are the same if they differ by less, at so many of a tile's pixels at least."""
BASELINE = "loose LZW TIFFs as the benchmark makes them"


def pack(repeats: int) -> list[Row]:
    """`geopose pack` with its defaults and from the wavelet's half resolution, beside the benchmark's script."""
    with tempfile.TemporaryDirectory() as folder:
        work, source, tiles = Path(folder), rendered_source(), render()
        calls: dict[str, Callable[[Path], None]] = {
            "geopose pack": lambda out: packed(source, out, "area"),
            "geopose pack --reduce-by wavelet": lambda out: packed(source, out, "wavelet"),
            BASELINE: lambda out: loose(tiles, out),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        written: dict[str, int] = {}
        with pinned():
            for round_ in range(repeats + 1):  # the first round warms up
                for number, (name, call) in enumerate(calls.items()):
                    out = work / f"out-{round_}-{number}"
                    began = time.process_time()
                    call(out)
                    if round_:
                        seconds[name].append(time.process_time() - began)
                    written[name] = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
        check_same(work / "out-0-0", work / f"out-0-{len(calls) - 1}")
        check_same(work / "out-0-1", work / f"out-0-{len(calls) - 1}", WAVELET_OFF)
    base = timing(seconds[BASELINE])
    rows = []
    for name in calls:
        spent = timing(seconds[name])
        row = {
            "how": name,
            "tiles_per_s": len(tiles) / spent.median_s,
            "spread": spent.spread,
            "mb_per_tile": written[name] / len(tiles) / 1e6,
            "tile_px": "2048x2048 to 1024x1024",
            "processes": 1,
            "time": "CPU",
            "repeats": repeats,
        }
        if name != BASELINE:
            speedup = ratio(seconds[BASELINE], seconds[name]).median_s
            row |= {"baseline": BASELINE, "baseline_tiles_per_s": len(tiles) / base.median_s}
            row |= {"baseline_spread": base.spread, "speedup": speedup}
            row["verdict"] = f"{name} packs {speedup:.2f} times as fast as {BASELINE}"
        rows.append(row)
    return rows


def packed(source: Path, out: Path, reduce_by: Any) -> None:
    """One shard with manifest, index and hashes, by this process."""
    from shards import pack as packing

    packing.run(packing.PackRecipe(source=str(source), out=str(out), reduce_by=reduce_by, workers=1))


def loose(tiles: list[Any], out: Path) -> None:
    """The benchmark's files at half size."""
    import imagecodecs
    import tifffile
    from PIL import Image

    out.mkdir()
    for tile in tiles:
        # Every reader of JPEG 2000 in use is OpenJPEG underneath; this one is the fastest way to it.
        rgb = imagecodecs.jpeg2k_decode(tile.rgb.read_bytes(), numthreads=1)
        agl_cm = tifffile.imread(tile.agl)
        agl_m = agl_cm.astype(np.float32)
        agl_m[agl_cm == 65535] = np.nan
        agl_m /= 100
        rows, columns = rgb.shape[0] // 2, rgb.shape[1] // 2
        small = cv2.resize(rgb, (columns, rows))
        heights = cv2.resize(agl_m, (columns, rows), interpolation=cv2.INTER_NEAREST)
        facts = json.loads(tile.vflow.read_bytes())
        facts["scale"] /= 2
        Image.fromarray(small).save(out / f"{tile.key}_RGB.tif", compression="tiff_lzw")
        Image.fromarray(heights).save(out / f"{tile.key}_AGL.tif", compression="tiff_lzw")
        (out / f"{tile.key}_VFLOW.json").write_text(json.dumps(facts))


def check_same(shards: Path, folder: Path, allowed: float = 1.0) -> None:
    """Both hold the same tiles: RGB that differs by rounding only (bilinear by half is the mean of four), heights of
    the same surfaces, the same pose. With `allowed` above 1 RGB may differ by so many levels in the mean.
    """
    import tifffile

    from geopose_dist.data.reader import Reader, open_shards

    reader = Reader(open_shards(str(shards), "train"))
    check(len(reader) == len(list(folder.glob("*_RGB.tif"))), f"the shards hold {len(reader)} tiles")
    for view in map(reader.view, range(len(reader))):
        off = np.abs(view.rgb.astype(int) - tifffile.imread(folder / f"{view.key}_RGB.tif").astype(int))
        worst = float(off.max() if allowed <= 1 else off.mean())
        check(worst <= allowed, f"{view.key}: RGB is {worst:.1f} levels off the baseline's")
        theirs = tifffile.imread(folder / f"{view.key}_AGL.tif")
        assert view.agl_m is not None
        known = np.isfinite(view.agl_m) & np.isfinite(theirs)
        # The baseline takes one pixel of four, which differs where a roof ends; most pixels lie within a surface.
        same = float((np.abs(view.agl_m - theirs)[known] <= SAME_M).mean()) if known.any() else 0.0
        check(same >= SAME_SHARE, f"{view.key}: heights are the baseline's at {same:.0%} of the pixels only")
        pose = json.loads((folder / f"{view.key}_VFLOW.json").read_text())
        check(
            view.pose is not None
            and abs(view.scale_px_per_m - pose["scale"] * 100) < 1e-4
            and abs(view.angle_rad - pose["angle"]) < 1e-6,
            f"{view.key}: the pose is another than the baseline's",
        )


def wavelet_pixels() -> list[Row]:
    """What the wavelet's half resolution does to pixels, against reduction by area, lossy source and lossless."""
    import imagecodecs

    from shards import layouts

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tiles = render()
        again = Path(folder) / "again.j2k"
        for source in ("9/7, lossy", "5/3, lossless"):
            found: dict[str, list[list[float]]] = {"as packed": [], "unmoved": []}
            for tile in tiles:
                rgb = layouts.load_rgb(tile)
                path = tile.rgb
                if source.startswith("5/3"):
                    again.write_bytes(imagecodecs.jpeg2k_encode(rgb, reversible=True))
                    path = again
                area = resample.reduce_rgb(rgb, 2)
                found["as packed"].append(against(wavelet.read_rgb(path, 2)[0], area))
                found["unmoved"].append(against(wavelet.low_band(path, path.read_bytes(), 2), area))
            for how, each in found.items():
                off, sharper, down, right = np.mean(each, axis=0).tolist()
                rows.append(
                    {
                        "source": source,
                        "low_band": how,
                        "mean_difference_levels": off,
                        "sharpness": sharper,
                        "down_px": down,
                        "right_px": right,
                        "tiles": len(tiles),
                    }
                )
    return rows


def against(seen: U8, area: U8) -> list[float]:
    """Mean difference, ratio of gradient energies, and offset (row, column; least squares) of two images."""
    a, b = (x.astype(np.float64).mean(2)[4:-4, 4:-4] for x in (area, seen))
    slopes = np.stack([slope.ravel() for slope in np.gradient(a)], 1)
    moved = -np.linalg.lstsq(slopes, (b - a).ravel(), rcond=None)[0]
    energy = [
        sum(float((step**2).mean()) for step in (np.diff(x, axis=0), np.diff(x, axis=1))) for x in (a, b)
    ]
    off = float(np.abs(seen.astype(np.int32) - area.astype(np.int32)).mean())
    return [off, energy[1] / energy[0], *moved.tolist()]


CASES = {"pack": pack, "wavelet": wavelet_pixels}
