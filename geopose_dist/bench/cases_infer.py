"""Scoring, rectifying and predicting, each beside how the public benchmark does it, in the same run.

The baselines are written here: a scorer that reads every tile twice with NumPy, rectification by a Python
double loop and by sorting with NumPy, heights written by Pillow. Results are compared before anything is
timed, and the two sides are timed in turn, so that a busy minute hits both.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from geopose_dist import geometry, kernels
from geopose_dist.bench import predict_job
from geopose_dist.bench.drawn import city
from geopose_dist.bench.harness import Row, check, pinned, timing
from geopose_dist.data.sample import U8
from geopose_dist.evaluate import predictions as files
from geopose_dist.evaluate import score
from geopose_dist.geometry import F32

TILE_PX = 2048
"""Side of the challenge's tiles."""
LOOP_PX = 512
JOB_TILES, JOB_PX = 16, 512
QUICK = {"TILE_PX": 256, "LOOP_PX": 128, "JOB_TILES": 3, "JOB_PX": 128}
"""Side of the tile for the Python double loop, which takes ten seconds for a whole one."""


def beside(ours: Callable[[], object], theirs: Callable[[], object], repeats: int, **facts: object) -> Row:
    """Time both in turn, one core; the ratio is the median of the ratios of neighbouring runs."""
    mine, other = [], []
    with pinned():
        for index in range(repeats + 1):  # the first round warms up
            seconds = []
            for call in (ours, theirs):
                began = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - began)
            if index:
                mine.append(seconds[0])
                other.append(seconds[1])
    ratio = timing([b / a for a, b in zip(mine, other, strict=True)]).median_s
    return {
        "ms": timing(mine).median_s * 1e3,
        "baseline_ms": timing(other).median_s * 1e3,
        "ratio": ratio,
        "speedup": ratio,
        "spread": timing(mine).spread,
        "repeats": repeats,
        **facts,
    }


def score_case(repeats: int) -> list[Row]:
    """The scorer beside one that reads every tile twice, per tile and process."""
    with tempfile.TemporaryDirectory() as folder:
        truth, pred = Path(folder) / "truth", Path(folder) / "pred"
        rng = np.random.default_rng(1)
        for index in range(2):
            _, agl_m = city(TILE_PX, index)
            known, _ = geometry.agl_cm_from_m(agl_m, unknown_allowed=False)
            blobs = cv2.resize(rng.normal(0, 200, (64, 64)), known.shape)  # errors are smooth, as a network's
            guess = np.clip(known + blobs, 0, 60000).astype(np.uint16)
            known[rng.random(known.shape) < 0.02] = geometry.NO_DATA_CM
            for place, heights, scale, angle in ((truth, known, 0.9, 1.0), (pred, guess, 0.8, 1.2)):
                place.mkdir(exist_ok=True)
                (place / f"JAX_{index}_AGL.tif").write_bytes(files.encode_agl(heights))
                (place / f"JAX_{index}_VFLOW.json").write_bytes(files.encode_vflow(scale, angle))
        mine, theirs = score(pred, truth)["cities"]["JAX"], two_pass_score(pred, truth)
        worst = max(abs(mine[name] - theirs[name]) for name in theirs)
        check(worst < 1e-6, f"the two scorers differ by {worst}")
        row = beside(
            lambda: score(pred, truth),
            lambda: two_pass_score(pred, truth),
            repeats,
            name=f"score {TILE_PX}x{TILE_PX}, two tiles, reading included",
            baseline="two-pass NumPy",
            checked=f"same figures to {worst:.1e}",
        )
    return [row]


def two_pass_score(pred: Path, truth: Path) -> dict[str, float]:
    """The challenge's formulas as usually written: read for the means, read again for the squares."""

    def load(folder: Path, key: str) -> tuple[npt.NDArray[np.float64], float, float]:
        heights = files.read_tiff(folder / f"{key}_AGL.tif")
        pose = json.loads((folder / f"{key}_VFLOW.json").read_bytes())
        agl_m = np.where(heights == geometry.NO_DATA_CM, np.nan, heights / 100.0)
        return agl_m, pose["scale"] * 100, pose["angle"]

    def flow(agl_m: npt.NDArray[np.float64], scale: float, angle: float) -> npt.NDArray[np.float64]:
        magnitude = agl_m * scale
        return np.stack([magnitude * np.sin(angle), magnitude * np.cos(angle)])

    keys = sorted(path.name.removesuffix("_AGL.tif") for path in truth.glob("*_AGL.tif"))
    total, total_flow, count = 0.0, 0.0, 0
    errors: dict[str, list[float]] = {"mean_agl_error": [], "mean_mag_error": [], "mean_epe": []}
    for key in keys:
        agl_t, *pose_t = load(truth, key)
        agl_p, *pose_p = load(pred, key)
        known = np.isfinite(agl_t)
        flow_t, flow_p = flow(agl_t, *pose_t), flow(agl_p, *pose_p)
        total, total_flow, count = (
            total + np.nansum(agl_t),
            total_flow + np.nansum(flow_t),
            count + known.sum(),
        )
        errors["mean_agl_error"].append(float(np.nanmean(np.abs(agl_t - agl_p))))
        errors["mean_mag_error"].append(float(np.nanmean(np.abs(agl_t * pose_t[0] - agl_p * pose_p[0]))))
        errors["mean_epe"].append(float(np.nanmean(np.sqrt(((flow_t - flow_p) ** 2).sum(axis=0)))))
    mean, mean_flow = total / count, total_flow / (2 * count)
    sse = sst = sse_flow = sst_flow = 0.0
    for key in keys:
        agl_t, *pose_t = load(truth, key)
        agl_p, *pose_p = load(pred, key)
        flow_t, flow_p = flow(agl_t, *pose_t), flow(agl_p, *pose_p)
        sse += np.nansum((agl_t - agl_p) ** 2)
        sst += np.nansum((agl_t - mean) ** 2)
        sse_flow += np.nansum((flow_t - flow_p) ** 2)
        sst_flow += np.nansum((flow_t - mean_flow) ** 2)
    r2 = {"agl_r2": float(1 - sse / (sst + 1e-4)), "vflow_r2": float(1 - sse_flow / (sst_flow + 1e-4))}
    return r2 | {name: float(np.mean(values)) for name, values in errors.items()}


def rectify_case(repeats: int) -> list[Row]:
    """The rectification kernel beside a Python loop and beside NumPy."""
    scale, angle = 0.8, 2.2
    rows = []
    for name, baseline, side in (
        ("NumPy sort", rectify_numpy, TILE_PX),
        ("Python loop", rectify_loop, LOOP_PX),
    ):
        rgb, agl_m = city(side)
        _, flat_agl, occluded = kernels.rectify(rgb, agl_m, scale, angle)
        _, their_agl, hidden = baseline(rgb, agl_m, scale, angle)
        both = ~occluded & ~hidden
        same = float((flat_agl[both] == their_agl[both]).mean())
        check(same > 0.97, f"the two rectifications agree at {same:.3f} of the pixels only")
        agree = float((occluded == hidden).mean())
        rows.append(
            beside(
                lambda rgb=rgb, agl_m=agl_m: kernels.rectify(rgb, agl_m, scale, angle),  # type: ignore[misc]
                lambda rgb=rgb, agl_m=agl_m, baseline=baseline: baseline(rgb, agl_m, scale, angle),  # type: ignore[misc]
                min(repeats, 3) if baseline is rectify_loop else repeats,
                name=f"rectify {side}x{side}",
                baseline=name,
                checked=f"same height at {same:.4f} of the pixels that both fill, occlusion agrees at {agree:.4f}",
            )
        )
    return rows


def rectify_numpy(rgb: U8, agl_m: F32, scale: float, angle: float) -> tuple[U8, F32, npt.NDArray[np.bool_]]:
    """Tallest wins by assigning pixels in the order of their heights; no hole is filled."""
    rows, columns = agl_m.shape
    dx, dy = geometry.flow_xy(agl_m, scale, angle)
    row, column = np.mgrid[:rows, :columns]
    to_row, to_column = np.rint(row + dy).astype(np.int64), np.rint(column + dx).astype(np.int64)
    inside = (to_row >= 0) & (to_row < rows) & (to_column >= 0) & (to_column < columns)
    source = np.flatnonzero(inside)
    source = source[np.argsort(agl_m.ravel()[source], kind="stable")]
    target = (to_row * columns + to_column).ravel()[source]
    out_rgb, out_agl = np.zeros_like(rgb), np.full_like(agl_m, np.nan)
    out_rgb.reshape(-1, 3)[target] = rgb.reshape(-1, 3)[source]
    out_agl.ravel()[target] = agl_m.ravel()[source]
    return out_rgb, out_agl, np.isnan(out_agl)


def rectify_loop(rgb: U8, agl_m: F32, scale: float, angle: float) -> tuple[U8, F32, npt.NDArray[np.bool_]]:
    """Tallest wins, pixel by pixel; no hole is filled."""
    rows, columns = agl_m.shape
    dx, dy = geometry.flow_xy(agl_m, scale, angle)
    out_rgb, out_agl = np.zeros_like(rgb), np.full_like(agl_m, np.nan)
    for row in range(rows):
        for column in range(columns):
            to_row, to_column = round(row + float(dy[row, column])), round(column + float(dx[row, column]))
            if 0 <= to_row < rows and 0 <= to_column < columns:
                there = out_agl[to_row, to_column]
                if not there >= agl_m[row, column]:
                    out_agl[to_row, to_column] = agl_m[row, column]
                    out_rgb[to_row, to_column] = rgb[row, column]
    return out_rgb, out_agl, np.isnan(out_agl)


def predict_case(repeats: int) -> list[Row]:
    """Converting and writing heights beside Pillow; then a whole job, with what it waits for."""
    from PIL import Image

    _, agl_m = city(TILE_PX)
    with tempfile.TemporaryDirectory() as folder:
        ours_path, pillow_path = Path(folder) / "ours.tif", Path(folder) / "pillow.tif"

        def pillow() -> None:
            Image.fromarray((agl_m * 100).round().astype(np.uint16)).save(
                pillow_path, compression="tiff_adobe_deflate"
            )

        def ours() -> None:
            ours_path.write_bytes(files.encode_agl(files.heights_cm(agl_m)[0]))

        ours()
        pillow()
        difference = int(
            np.abs(files.read_tiff(ours_path).astype(int) - np.asarray(Image.open(pillow_path))).max()
        )
        check(difference <= 1, f"heights written differ by {difference} cm")
        share = ours_path.stat().st_size / pillow_path.stat().st_size
        check(share <= 1.05, f"our file has {share:.2f} of Pillow's bytes")
        name = f"convert and write {TILE_PX}x{TILE_PX} uint16 deflate TIFF"
        checked = f"same heights, {share:.2f} of the baseline's bytes"
        written = beside(ours, pillow, repeats, name=name, baseline="NumPy + Pillow", checked=checked)
        return [written, *predict_job.rows(Path(folder), JOB_TILES, JOB_PX)]


CASES = {"score": score_case, "rectify": rectify_case, "predict": predict_case}
