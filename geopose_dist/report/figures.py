"""Drawings for the pages: curves and histograms as SVG, heights and errors as coloured images, flow arrows.

Matplotlib draws through figures of its own, never through pyplot's global state. Lines and letters that are
black on paper get `currentColor` in the SVG, so one drawing serves a light and a dark page. Images are
arrays [H, W, 3] of uint8, reduced before they are encoded. Unknown pixels are grey everywhere.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from geopose_dist.data.sample import U8
from geopose_dist.geometry import F32, Pose, flow_xy

COLOURS = ("#3f8fd2", "#e08a2e", "#3fa66b", "#c65b8c", "#8c7ae6", "#a8932a", "#4fb3b3", "#c9534f")
UNKNOWN = (128, 128, 128)
_INK = "#010203"
"""Stands for the page's own text colour until the SVG is written."""


@dataclass(frozen=True)
class Line:
    """One curve: its name, x and y (same length, float), and whether single points are marked."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marked: bool = False


def chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    y_floor: float | None = None,
) -> str:
    """Curves over one pair of axes, as SVG; long ones are thinned to some hundred points by block means.

    Args:
        lines: the curves; points that are not finite are left out.
        title: what the figure shows.
        x_label: name and unit of x.
        y_label: name and unit of y.
        log_y: logarithmic y axis.
        y_floor: the y axis does not reach below this, however low the curves go.
    """
    figure, axes = _axes(title, x_label, y_label)
    for line, colour in zip(lines, _cycle(len(lines)), strict=True):
        x, y = thinned(np.asarray(line.x, np.float64), np.asarray(line.y, np.float64))
        axes.plot(
            x,
            y,
            color=colour,
            label=line.name,
            linewidth=1.6,
            marker="o" if line.marked else None,
            markersize=4,
        )
    if log_y:
        axes.set_yscale("log")
    if y_floor is not None and axes.get_ylim()[0] < y_floor:
        axes.set_ylim(bottom=y_floor)
    if len(lines) > 1:
        _legend(figure)
    return _svg(figure, title)


def histogram(
    counts: Mapping[str, npt.NDArray[Any]],
    edges: npt.NDArray[Any],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
) -> str:
    """Outlined histograms over common bins, as SVG: `counts` by name, [n] each, and `edges` [n + 1]."""
    figure, axes = _axes(title, x_label, y_label)
    for (name, heights), colour in zip(counts.items(), _cycle(len(counts)), strict=True):
        axes.stairs(heights, edges, color=colour, label=name, linewidth=1.6)
    if log_y:
        axes.set_yscale("log")
    _legend(figure)
    return _svg(figure, title)


def thinned(
    x: npt.NDArray[Any], y: npt.NDArray[Any], most: int = 400
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """At most `most` points of a curve: means over equal blocks of its finite points."""
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= most:
        return x, y
    starts = np.linspace(0, len(x), most, endpoint=False).astype(int)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _axes(title: str, x_label: str, y_label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.6, 3.1), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_title(title, fontsize=10, color=_INK, loc="left")
    axes.set_xlabel(x_label, fontsize=9, color=_INK)
    axes.set_ylabel(y_label, fontsize=9, color=_INK)
    axes.tick_params(colors=_INK, labelsize=8, which="both")
    axes.grid(color=_INK, alpha=0.15, linewidth=0.6)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_INK)
    return figure, axes


def _legend(figure: Figure) -> None:
    """Below the axes, where it hides no curve."""
    figure.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=8, labelcolor=_INK)


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element for a page: no XML head, text as text, the page's colour and font."""
    buffer = io.StringIO()
    # The salt names clip paths by title, so that figures of one page do not share them; the same figure gives
    # the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def data_uri(image: U8, side: int = 360, quality: int = 85) -> str:
    """An image [H, W, 3] as JPEG data URI, reduced by area so that its longer side is at most `side`."""
    done, data = cv2.imencode(".jpg", reduced(image, side)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def reduced(image: U8, side: int) -> U8:
    """The image with its longer side brought down to `side` pixels; smaller images stay."""
    rows, columns = image.shape[:2]
    factor = side / max(rows, columns)
    if factor >= 1:
        return image
    size = (max(1, round(columns * factor)), max(1, round(rows * factor)))
    small: U8 = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    return small


def coloured(values: F32, low: float, high: float, map_name: str) -> U8:
    """Values [H, W] as colours [H, W, 3] of a matplotlib map between `low` and `high`; NaN is grey."""
    share = (values - low) / max(high - low, 1e-9)
    colours: U8 = matplotlib.colormaps[map_name](np.nan_to_num(share), bytes=True)[..., :3]
    colours[np.isnan(values)] = UNKNOWN
    return colours


def scale_bar(map_name: str, low: str, high: str) -> str:
    """The legend of `coloured` images as HTML: a strip of the map between two labels."""
    stops = matplotlib.colormaps[map_name](np.linspace(0, 1, 9), bytes=True)[:, :3]
    colours = ", ".join(f"rgb({r}, {g}, {b})" for r, g, b in stops)
    strip = f'<i style="background: linear-gradient(to right, {colours})"></i>'
    return f'<div class="scale"><span>{low}</span>{strip}<span>{high}</span></div>'


def with_arrows(
    rgb: U8, agl_m: F32, poses: Sequence[tuple[Pose, F32, tuple[int, int, int]]], side: int = 360
) -> tuple[U8, int]:
    """The image, brought near `side` pixels, with flow arrows at the tallest pixel of each of up to 7 x 7 cells.

    Args:
        rgb: uint8 [H, W, 3].
        agl_m: float32 [H, W]: where the tall things are; NaN is passed over.
        poses: for each set of arrows its pose, its heights [H, W] and its colour.
        side: longer side of the result in pixels.

    Returns:
        The image, and the whole factor by which arrows are drawn longer than they are.
    """
    picture = np.array(reduced(rgb, side), order="C")  # a copy: arrows must not get into `rgb` itself
    enlarged = side // max(picture.shape)
    if enlarged >= 2:  # arrows over a small picture would hide it
        picture = picture.repeat(enlarged, axis=0).repeat(enlarged, axis=1)
    spots = _tall_spots(agl_m)
    shrink = picture.shape[0] / rgb.shape[0]
    flows = [(*flow_xy(agl, pose.scale_px_per_m, pose.angle_rad), colour) for pose, agl, colour in poses]
    longest = max((float(np.hypot(dx[s], dy[s])) for dx, dy, _ in flows for s in spots), default=0.0) * shrink
    factor = int(np.clip(0.12 * side // max(longest, 1e-6), 1, 8))
    for width, outline in ((4, True), (2, False)):
        for dx, dy, colour in flows:
            for row, column in spots:
                along = np.array([dx[row, column], dy[row, column]], np.float64) * shrink * factor
                if not np.isfinite(along).all():
                    continue
                start = np.array([column + 0.5, row + 0.5]) * shrink
                ends = [tuple(map(int, np.rint(point * 16))) for point in (start, start + along)]
                ink = (0, 0, 0) if outline else colour
                cv2.arrowedLine(picture, ends[0], ends[1], ink, width, cv2.LINE_AA, shift=4, tipLength=0.3)
    return picture, factor


def _tall_spots(agl_m: F32, cells: int = 7, least_m: float = 2.0) -> list[tuple[int, int]]:
    """(row, column) of the tallest known pixel of each cell of a grid, where it is at least `least_m`."""
    rows, columns = agl_m.shape
    known = np.where(np.isnan(agl_m), -np.inf, agl_m)
    spots = []
    for top, bottom in zip(*_bounds(rows, cells), strict=True):
        for left, right in zip(*_bounds(columns, cells), strict=True):
            cell = known[top:bottom, left:right]
            row, column = np.unravel_index(int(cell.argmax()), cell.shape)
            if cell[row, column] >= least_m:
                spots.append((int(top + row), int(left + column)))
    return spots


def _bounds(length: int, cells: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    edges = np.unique(np.linspace(0, length, cells + 1).astype(int))
    return edges[:-1], edges[1:]
