"""Drawings for pages and papers: curves and histograms, heights and errors as coloured images, flow arrows.

A `Plot` is one pair of axes and what stands on them; it becomes SVG for a page, where lines and letters that
are black on paper get `currentColor` and so serve light and dark, or a matplotlib figure for `report/paper.py`.
Matplotlib draws through figures of its own, never through pyplot's global state. Images are arrays [H, W, 3]
of uint8, reduced before they are encoded. Unknown pixels are grey everywhere.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
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
    "UNKNOWN", "Line", "Plot", "chart", "coloured", "data_uri", "histogram", "plain", "reduced", "scale_bar",
    "spans", "strokes", "thinned", "with_arrows",
]  # fmt: skip

COLOURS = ("#3f8fd2", "#e08a2e", "#3fa66b", "#c65b8c", "#8c7ae6", "#a8932a", "#4fb3b3", "#c9534f")
DASHES = ("solid", "dashed", "dotted", "dashdot")
PAGE_WIDTH_IN = 4.4
"""Letters of 8 points are then 9 pixels high on a phone of 390."""
_INK = "#010203"
"""Stands for the page's own text colour until the SVG is written."""


@dataclass(frozen=True)
class Line:
    """One curve: its name, x and y (same length, float), and whether single points are marked.

    Attributes:
        colour: number of its colour; by default its place among the curves.
        dash: number of its dash pattern; 0 is solid.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marked: bool = False
    colour: int | None = None
    dash: int = 0


@dataclass(frozen=True)
class Plot:
    """One pair of axes.

    Attributes:
        title: what the figure shows; names its file, too.
        x_label: name and unit of x.
        y_label: name and unit of y.
        draw: puts the data on matplotlib axes, in the given colour where no other is wanted.
        legend: whether the names of the data are told below the axes.
        height_in: height of the page's figure in inches; its width is PAGE_WIDTH_IN.
    """

    title: str
    x_label: str
    y_label: str
    draw: Callable[[Any, str], None]
    legend: bool
    height_in: float = 2.7

    def figure(self, size_in: tuple[float, float], ink: str, points: float) -> Figure:
        """The drawing as a matplotlib figure of this size, letters of `points` and smaller."""
        figure = Figure(figsize=size_in, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.set_title(plain(self.title), fontsize=points, color=ink, loc="left")
        axes.set_xlabel(plain(self.x_label), fontsize=0.9 * points, color=ink)
        axes.set_ylabel(plain(self.y_label), fontsize=0.9 * points, color=ink)
        axes.grid(color=ink, alpha=0.15, linewidth=0.6)
        for name, spine in axes.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(ink)
        self.draw(axes, ink)
        axes.tick_params(colors=ink, labelsize=0.8 * points, which="both")
        if self.legend:  # below the axes, where it hides no curve
            columns = 3 if size_in[0] < 4 else 4
            figure.legend(
                loc="outside lower left", ncols=columns, frameon=False, fontsize=0.8 * points, labelcolor=ink
            )
        return figure

    def svg(self) -> str:
        """The drawing as an SVG element for a page: no XML head, text as text, the page's colour and font."""
        buffer = io.StringIO()
        # The salt names clip paths by title, so that figures of one page do not share them; the same figure
        # gives the same bytes.
        rules: dict[Any, Any] = {
            "svg.fonttype": "none",
            "svg.hashsalt": self.title,
            "font.family": "sans-serif",
        }
        rules |= strokes(1.4)
        with matplotlib.rc_context(rules):
            figure = self.figure((PAGE_WIDTH_IN, self.height_in), _INK, 10)
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
        return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(self.title)}" ', 1)


def strokes(points: float) -> dict[Any, Any]:
    """Matplotlib's rules for curves of this width, and markers that fit them."""
    return {"lines.linewidth": points, "patch.linewidth": points, "lines.markersize": 2.6 * points}


def plain(words: str, most: int = 60) -> str:
    """Words for matplotlib, which would read a pair of dollars as a formula and shrink axes beside a long name."""
    shown = words if len(words) <= most else words[: most - 1] + "…"
    return shown.replace("$", r"\$")


def chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    y_floor: float | None = None,
) -> Plot:
    """Curves over one pair of axes; long ones are thinned to some hundred points by block means.

    Args:
        lines: the curves; points that are not finite are left out.
        title: what the figure shows.
        x_label: name and unit of x.
        y_label: name and unit of y.
        log_x: x axis by powers of two.
        log_y: logarithmic y axis.
        y_floor: the y axis does not reach below this, however low the curves go.
    """

    def draw(axes: Any, ink: str) -> None:
        for number, line in enumerate(lines):
            x, y = thinned(np.asarray(line.x, np.float64), np.asarray(line.y, np.float64))
            axes.plot(
                x,
                y,
                color=_colour(number if line.colour is None else line.colour),
                linestyle=DASHES[line.dash % len(DASHES)],
                label=plain(line.name, 24),
                marker="o" if line.marked or len(x) == 1 else None,
            )
        if log_x:
            axes.set_xscale("log", base=2)
        if log_y:
            axes.set_yscale("log")
        if y_floor is not None and axes.get_ylim()[0] < y_floor:
            axes.set_ylim(bottom=y_floor)

    return Plot(title, x_label, y_label, draw, legend=len(lines) > 1)


def histogram(
    counts: Mapping[str, npt.NDArray[Any]],
    edges: npt.NDArray[Any],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
) -> Plot:
    """Outlined histograms over common bins: `counts` by name, [n] each, and `edges` [n + 1]."""

    def draw(axes: Any, ink: str) -> None:
        for number, (name, heights) in enumerate(counts.items()):
            axes.stairs(heights, edges, color=_colour(number), label=plain(name, 24))
        if log_y:
            axes.set_yscale("log")

    return Plot(title, x_label, y_label, draw, legend=True)


def spans(
    values: Mapping[str, Mapping[str, tuple[float, float, float]]], *, title: str, x_label: str
) -> Plot:
    """Numbers with their intervals: a row for each outer name, in it a dot for each inner name.

    Args:
        values: (low, number, high) by row and by kind; low and high NaN where no interval is known.
        title: what the figure shows.
        x_label: name and unit of the numbers.
    """
    kinds = list(dict.fromkeys(kind for row in values.values() for kind in row))

    def draw(axes: Any, ink: str) -> None:
        for number, kind in enumerate(kinds):
            told = [(place, row[kind]) for place, row in enumerate(values.values()) if kind in row]
            y = [place + 0.22 * (number - (len(kinds) - 1) / 2) for place, _ in told]
            x = np.array([number for _, (_, number, _) in told])
            # An interval by quantiles may lie beside the number itself; a bar has no negative length.
            sides = np.array([[max(n - low, 0.0), max(high - n, 0.0)] for _, (low, n, high) in told]).T
            axes.errorbar(x, y, xerr=sides, fmt="o", color=_colour(number), label=plain(kind, 24), capsize=3)
        axes.set_yticks(range(len(values)), [plain(name, 24) for name in values])
        axes.set_ylim(len(values) - 0.5, -0.5)

    return Plot(title, x_label, "", draw, legend=len(kinds) > 1, height_in=1.2 + 0.36 * len(values))


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


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
    return f'<div class="scale"><span>{html.escape(low)}</span>{strip}<span>{html.escape(high)}</span></div>'
