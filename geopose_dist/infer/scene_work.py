"""What an actor does for a scene: windows through the network first, then blocks of the outputs.

A window's heights are a file of the run's scratch folder, its pose and facts a small JSON that is written
last, so a window is finished when that is there. A block blends the windows that meet it, enlarges, and, with the
scene's one pose, moves it to the ground: it looks as far around itself as the tallest surface of the scene
leans, so that blocks give exactly what the whole scene would.
"""

from __future__ import annotations

import io
import json
import math
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from geopose_dist import geometry, kernels
from geopose_dist.data import resample
from geopose_dist.errors import UserError
from geopose_dist.files import write_bytes
from geopose_dist.geometry import F32
from geopose_dist.infer import tiles
from geopose_dist.infer.enlarge import enlarge
from geopose_dist.infer.raster import Bools, Scene, SceneReader
from geopose_dist.infer.recipe import NetRecipe
from geopose_dist.infer.scene_plan import SLOPE_PX, STEP, ScenePlan


@dataclass(frozen=True)
class WindowItem:
    """A batch of windows by number, each in its slot; None where another try has the window."""

    windows: tuple[int | None, ...]

    def parts(self) -> list[WindowItem]:
        """One item per window, which keeps its slot."""
        return [
            WindowItem(tuple(number if i == slot else None for i in range(len(self.windows))))
            for slot, number in enumerate(self.windows)
            if number is not None
        ]


@dataclass(frozen=True)
class BlockItem:
    """A block of the outputs, with what is known once all windows are done.

    Attributes:
        block: its number.
        angle_rad, scale_px_per_m: the scene's pose.
        tallest_m: no surface of the scene is taller.
    """

    block: int
    angle_rad: float
    scale_px_per_m: float
    tallest_m: float

    def parts(self) -> list[BlockItem]:
        """A block has no parts."""
        return [self]


@dataclass
class Report:
    """What became of an item: sentences of failures, and of a block how far windows disagree where they meet.

    Attributes:
        failures: one sentence each.
        seam_pixels: reduced pixels with more than one window.
        seam_squares: sum over them of the windows' variance about their mean, in m^2.
        seam_max_m: the farthest that any window is from the mean.
    """

    failures: list[str] = field(default_factory=list)
    seam_pixels: int = 0
    seam_squares: float = 0.0
    seam_max_m: float = 0.0


@dataclass(frozen=True)
class SceneSpec:
    """Everything that an actor needs; calling it makes the worker.

    Attributes:
        checkpoints: weights files.
        net: how a window is predicted.
        batch: windows of a batch.
        scene: what is read.
        city: name of its city.
        plan: how it is cut.
        scratch: folder of finished windows and of blocks on their way.
        unit: cm or m.
        rectify: whether blocks are moved to the ground too.
        device: auto, cpu or cuda.
        threads: of the arithmetic on CPU.
    """

    checkpoints: tuple[Path, ...]
    net: NetRecipe
    batch: int
    scene: Scene
    city: str
    plan: ScenePlan
    scratch: Path
    unit: str
    rectify: bool
    device: str
    threads: int

    @property
    def in_flight(self) -> int:
        """Items that keep an actor busy; a block takes some 200 MB while it is made, so never more than five."""
        return 1 + min(self.threads, 4)

    def __call__(self, gpu: int) -> SceneWorker:
        """The worker on the `gpu`-th GPU that this process sees, or on the CPU."""
        return SceneWorker(self, gpu)

    def window_paths(self, window: int) -> tuple[Path, Path]:
        """Heights and facts of a window."""
        row, column = self.plan.split(window)
        name = self.scratch / f"window-{row:04}-{column:04}"
        return name.with_suffix(".npy"), name.with_suffix(".json")

    def block_path(self, block: int) -> Path:
        """A finished block, until it is in the outputs."""
        return self.scratch / f"block-{block:06}.npz"

    def is_finished(self, window: int) -> bool:
        """Whether a window is on the disk."""
        return all(path.is_file() for path in self.window_paths(window))


class SceneWorker:
    """An actor's state: networks, if there are windows to do, and the opened scene."""

    def __init__(self, spec: SceneSpec, gpu: int) -> None:
        import torch

        from geopose_dist.infer.predictor import Predictor

        self.spec = spec
        self.reader = SceneReader(spec.scene)
        self._network = threading.Lock()
        if spec.device == "cpu":
            torch.set_num_threads(spec.threads)
        device = "cpu" if spec.device == "cpu" else f"cuda:{gpu}"
        self.predictor = Predictor(spec.checkpoints, spec.net, batch=spec.batch, device=device)
        assert STEP % self.predictor.size_multiple == 0
        if device != "cpu" or spec.net.compile != "none":
            self.predictor.warm_up(*spec.plan.window_size)

    def __call__(self, item: WindowItem | BlockItem) -> Report:
        """Do an item; what cannot be read or predicted is told, not raised."""
        report = Report()
        if isinstance(item, BlockItem):
            try:
                self._finish_block(item, report)
            except UserError as error:
                report.failures.append(str(error))
        else:
            self._predict(item, report)
        return report

    def _predict(self, item: WindowItem, report: Report) -> None:
        spec, plan = self.spec, self.spec.plan
        read: dict[int, tuple[int, npt.NDArray[np.uint8], Bools]] = {}
        for slot, window in enumerate(item.windows):
            if window is None:
                continue
            try:
                rgb, known = self.reader.read(*plan.source(window))
            except UserError as error:
                report.failures.append(str(error))
                continue
            small = resample.reduce_rgb(resample.pad_rgb(rgb, plan.reduction), plan.reduction)
            pixels = tiles.pad_to_multiple(small.transpose(2, 0, 1), STEP)
            if known.any():
                read[slot] = window, pixels, _reduced(known, plan.reduction)
            else:
                self._write_window(window, np.zeros(small.shape[:2], np.float32), {"weight": 0.0})
        if not read:
            return
        batch = np.stack([pixels for _, pixels, _ in read.values()])
        with self._network:
            heights, vectors, log_scales = self.predictor.windows(
                batch, list(read), spec.scene.gsd_m, spec.city
            )
        answers = zip(read.values(), heights, vectors, log_scales, strict=True)
        for (window, _, known), padded, vector, log_scale in answers:
            agl_m = padded[: known.shape[0], : known.shape[1]]
            if not (np.isfinite(agl_m).all() and np.isfinite(vector).all() and math.isfinite(log_scale)):
                row, column = plan.split(window)
                report.failures.append(
                    f"{spec.scene.path}: window {row}, {column}: the network answered NaN or infinity; is the "
                    "checkpoint sound?"
                )
                continue
            clipped = np.clip(agl_m, 0, np.float32(spec.net.agl_max_m))
            facts = {
                "vector": [float(x) for x in vector],
                "log_scale": float(log_scale),
                # A window shows the lean by what stands above the ground.
                "weight": float(clipped[known].sum(dtype=np.float64)),
                "tallest_m": float(clipped.max()),
                "clipped": int((agl_m != clipped).sum()),
            }
            self._write_window(window, clipped, facts)

    def _write_window(self, window: int, agl_m: F32, facts: dict[str, Any]) -> None:
        heights, about = self.spec.window_paths(window)
        buffer = io.BytesIO()
        np.save(buffer, agl_m, allow_pickle=False)
        write_bytes(heights, buffer.getvalue())
        write_bytes(about, json.dumps(facts).encode())

    def _finish_block(self, item: BlockItem, report: Report) -> None:
        spec, plan = self.spec, self.spec.plan
        core = plan.core(item.block)
        margin = (0, 0)
        if spec.rectify:
            across = item.tallest_m * item.scale_px_per_m
            x, y = geometry.direction(item.angle_rad)
            # One pixel for rounding, one for the cracks that are closed by their neighbours.
            margin = math.ceil(across * abs(y)) + 2, math.ceil(across * abs(x)) + 2
        outer = plan.around(core, margin)
        self._measure_seams(core, report)
        agl_m = np.clip(self.heights(*outer), 0, np.float32(item.tallest_m))
        rgb, known = self.reader.read(*outer)
        agl_m[~known] = np.nan
        stored: npt.NDArray[Any] = agl_m
        if spec.unit == "cm":
            stored, _ = geometry.agl_cm_from_m(agl_m, unknown_allowed=True)
            agl_m = geometry.agl_m_from_cm(stored)
        rows, columns = (slice(s.start - o.start, s.stop - o.start) for s, o in zip(core, outer, strict=True))
        arrays = {"agl": stored[rows, columns]}
        if spec.rectify:
            flat_rgb, flat_m, hidden = kernels.rectify(rgb, agl_m, item.scale_px_per_m, item.angle_rad)
            flat = flat_m[rows, columns]
            arrays["flat_agl"] = (
                geometry.agl_cm_from_m(flat, unknown_allowed=True)[0] if spec.unit == "cm" else flat
            )
            arrays["flat_rgb"] = flat_rgb[rows, columns]
            arrays["hidden"] = hidden[rows, columns].astype(np.uint8) * np.uint8(255)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        write_bytes(spec.block_path(item.block), buffer.getvalue())

    def heights(self, rows: slice, columns: slice) -> F32:
        """Blended heights in metres at full resolution, as enlarging the whole scene would give them."""
        plan, f = self.spec.plan, self.spec.plan.reduction
        margin = SLOPE_PX * (f > 1)
        pairs = zip((rows, columns), plan.small, strict=True)
        small = [slice(max(s.start // f - margin, 0), min(-(-s.stop // f) + margin, n)) for s, n in pairs]
        blended = self.blend(small[0], small[1])
        pairs = zip(small, (plan.rows, plan.columns), strict=True)
        around = [slice(part.start * f, min(part.stop * f, side)) for part, side in pairs]
        size = around[0].stop - around[0].start, around[1].stop - around[1].start
        guide = (
            self.reader.read(around[0], around[1])[0] if self.spec.net.enlarge == "guided" and f > 1 else None
        )
        whole = enlarge(blended, f, size, self.spec.net.enlarge, guide)
        top, left = small[0].start * f, small[1].start * f
        cut = whole[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        return np.ascontiguousarray(cut)

    def blend(self, rows: slice, columns: slice) -> F32:
        """The weighted mean of the windows over a part of the reduced scene."""
        total = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.float32)
        for at, weight, heights in self._pieces(rows, columns):
            total[at] += weight * heights
        return total

    def _pieces(self, rows: slice, columns: slice) -> list[tuple[tuple[slice, slice], F32, F32]]:
        """(place in the part, weights, heights) of every window that meets a part of the reduced scene."""
        plan, found = self.spec.plan, []
        for window in plan.meeting(rows, columns):
            path, _ = self.spec.window_paths(window)
            heights = np.load(path, mmap_mode="r", allow_pickle=False)
            inside, grid = plan.inside(window), plan.split(window)
            both = [
                slice(max(s.start, part.start), min(s.stop, part.stop))
                for s, part in zip(inside, (rows, columns), strict=True)
            ]
            if any(part.start >= part.stop for part in both):
                continue
            weight = np.outer(plan.weights[0][grid[0], both[0]], plan.weights[1][grid[1], both[1]])
            at = tuple(
                slice(b.start - p.start, b.stop - p.start) for b, p in zip(both, (rows, columns), strict=True)
            )
            cut = tuple(slice(b.start - s.start, b.stop - s.start) for b, s in zip(both, inside, strict=True))
            found.append(((at[0], at[1]), weight, np.asarray(heights[cut])))
        return found

    def _measure_seams(self, core: tuple[slice, slice], report: Report) -> None:
        """How far windows are from their mean where more than one is used."""
        f = self.spec.plan.reduction
        rows, columns = (slice(s.start // f, -(-s.stop // f)) for s in core)
        pieces = self._pieces(rows, columns)
        if len(pieces) < 2:
            return
        mean = self.blend(rows, columns)
        used, variance = np.zeros(mean.shape, np.uint8), np.zeros(mean.shape, np.float64)
        for at, weight, heights in pieces:
            away = np.where(weight > 0, np.abs(heights - mean[at]), 0)
            variance[at] += weight * away.astype(np.float64) ** 2
            used[at] += weight > 0
            report.seam_max_m = max(report.seam_max_m, float(away.max()))
        report.seam_pixels += int((used > 1).sum())
        report.seam_squares += float(variance[used > 1].sum())


def _reduced(known: Bools, factor: int) -> Bools:
    """Whether all pixels of each block of factor x factor belong to the image; what is cut off at the end does."""
    if factor == 1 or known.all():
        return np.full([-(-side // factor) for side in known.shape], known.all()) if factor > 1 else known
    down, right = (-side % factor for side in known.shape)
    padded = np.pad(known, ((0, down), (0, right)), mode="edge").astype(np.uint8) * np.uint8(255)
    small = cv2.resize(
        padded, (padded.shape[1] // factor, padded.shape[0] // factor), interpolation=cv2.INTER_AREA
    )
    return np.asarray(small == 255)
