"""Figures for a paper: each a PNG or PDF of its own in a folder, a column or a page wide, fonts embedded.

The widths are those of a two-column paper of letter size. Letters are matplotlib's own DejaVu Sans, so the
same data give the same file on every machine. PDF keeps lines and letters as such; pictures are 300 dpi.
"""

from __future__ import annotations

import io
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from geopose_dist import files
from geopose_dist.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from geopose_dist.report.figures import Plot
    from geopose_dist.report.panels import Row

Format = Literal["html", "png", "pdf"]
"""A page, or figures."""

COLUMN_IN = 3.5
PAGE_IN = 7.16
DPI = 300
POINTS = 8.0
"""Size of titles; other letters are a little smaller."""
PICTURE_PX = 640
"""Longer side of a picture: 300 dpi over a quarter of a page's width need 540."""


class Folder:
    """A folder that takes figures (UserError if the name is taken by a file).

    Attributes:
        written: the files so far, in order.
    """

    def __init__(self, path: Path, kind: str) -> None:
        if path.exists() and not path.is_dir():
            raise UserError(
                f"--out {path}: is a file; with --format {kind} wanted a folder, every figure is a file"
            )
        self.path, self.kind = path, kind
        self.written: list[Path] = []

    def plot(self, plot: Plot) -> None:
        """Write one plot, a column wide."""
        from geopose_dist.report import figures

        with _rules():
            size_in = COLUMN_IN, plot.height_in * COLUMN_IN / figures.PAGE_WIDTH_IN
            self.save(plot.figure(size_in, "black", POINTS), plot.title.lower())

    def row(self, row: Row, name: str) -> None:
        """Write one tile's pictures, a page wide."""
        with _rules():
            self.save(_row_figure(row), name)

    def save(self, figure: Figure, name: str) -> None:
        """Write a figure under a file name made from `name`."""
        stem = re.sub(r"[^A-Za-z0-9+=@-]+", "_", name).strip("_")[:100] or "figure"
        path = self.path / f"{stem}.{self.kind}"
        number = 2
        while path in self.written:
            path, number = self.path / f"{stem}_{number}.{self.kind}", number + 1
        # No dates: the same data give the same bytes.
        facts: dict[str, Any] = {"CreationDate": None} if self.kind == "pdf" else {"Software": None}
        data = io.BytesIO()
        figure.patch.set_alpha(1)  # a page shines through, paper does not
        with _rules():
            figure.savefig(data, format=self.kind, dpi=DPI, metadata=facts, facecolor="white")
        files.write_bytes(path, data.getvalue())
        self.written.append(path)

    def tell(self) -> None:
        """Print the files, one a line; UserError if there are none."""
        if not self.written:
            raise UserError(f"--out {self.path}: nothing to draw, so no figure was written")
        print(*self.written, sep="\n")


def _rules() -> Any:
    """Letters as letters, of a font that matplotlib brings; fonttype 42 embeds them as TrueType."""
    import matplotlib

    from geopose_dist.report.figures import strokes

    letters: dict[Any, Any] = {"pdf.fonttype": 42, "font.family": "DejaVu Sans", "font.size": POINTS}
    return matplotlib.rc_context(letters | strokes(1.0))


def _row_figure(row: Row) -> Figure:
    """All pictures of a tile in lines of two or three, captions above, colour bars side by side below."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    from geopose_dist.report.figures import plain

    pictures = [*row.pictures, *row.pair]
    columns = 3 if len(pictures) % 3 == 0 else 4
    lines = -(-len(pictures) // columns)
    high, wide = pictures[0][0].shape[:2]
    # Captions need some room above the pictures, bars with their numbers and names below.
    heights = [*[PAGE_IN / columns * high / wide + 0.12] * lines, 0.12]
    figure = Figure(figsize=(PAGE_IN, sum(heights) + 0.6), layout="constrained")
    grid = figure.add_gridspec(lines + 1, 12, height_ratios=heights)
    span = 12 // columns
    for number, (image, caption) in enumerate(pictures):
        line, place = divmod(number, columns)
        axes = figure.add_subplot(grid[line, place * span : (place + 1) * span])
        axes.imshow(image, interpolation="nearest")
        wrapped = textwrap.fill(plain(caption), 120 // columns)
        axes.set_title(wrapped, fontsize=0.8 * POINTS, loc="left", pad=3)
        axes.set_axis_off()
    for number, bar in enumerate(row.bars):
        axes = figure.add_subplot(grid[lines, number * 6 + 1 : number * 6 + 5])
        colours = ScalarMappable(Normalize(bar.low_m, bar.high_m), bar.map_name)
        figure.colorbar(colours, cax=axes, orientation="horizontal")
        axes.set_xlabel(f"{bar.shows}, m", fontsize=0.8 * POINTS)
        axes.tick_params(labelsize=0.8 * POINTS)
    return figure
