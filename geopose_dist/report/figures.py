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
from geopose_dist.evaluate.pictures import UNKNOWN, coloured, reduced, with_arrows

__all__ = [
    "UNKNOWN", "Line", "chart", "coloured", "data_uri", "histogram", "reduced", "scale_bar", "thinned", "with_arrows"
]  # fmt: skip

COLOURS = ("#3f8fd2", "#e08a2e", "#3fa66b", "#c65b8c", "#8c7ae6", "#a8932a", "#4fb3b3", "#c9534f")
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


def scale_bar(map_name: str, low: str, high: str) -> str:
    """The legend of `coloured` images as HTML: a strip of the map between two labels."""
    stops = matplotlib.colormaps[map_name](np.linspace(0, 1, 9), bytes=True)[:, :3]
    colours = ", ".join(f"rgb({r}, {g}, {b})" for r, g, b in stops)
    strip = f'<i style="background: linear-gradient(to right, {colours})"></i>'
    return f'<div class="scale"><span>{low}</span>{strip}<span>{high}</span></div>'
