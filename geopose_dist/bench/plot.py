"""`geopose bench plot RESULTS.json... --out FIGURE`: what was measured, as a picture or a page.

Rates stand beside their baselines as bars with their spreads, scaling as tiles/s by ranks, accuracy as the score
by minutes of training. One plot for each file of results and unit: one over the other in a .png, .pdf or .svg, on a
.html page with machine, commit and command beside them, or with --format png|pdf each as a file for a paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geopose_dist.bench import compare
from geopose_dist.errors import UserError
from geopose_dist.report import page

if TYPE_CHECKING:
    from geopose_dist.report.figures import Plot

UNITS = (("tiles_per_s", "baseline_tiles_per_s", "tiles/s"), ("ms", "baseline_ms", "ms"))
FORMATS = (".png", ".pdf", ".svg", ".html")
OURS, THEIRS = "#2a6f97", "#b8b8b8"
BAR_IN = 0.3
"""Inches of a bar with its name above it."""


@dataclass(frozen=True)
class Bars:
    """Rates beside their baselines: (label, value, spread, whether it is ours)."""

    title: str
    unit: str
    bars: list[tuple[str, float, float, bool]]

    def draw(self, axes: Any, ink: str) -> None:
        """Horizontal bars, ours in colour, their names above them: beside them there is no room in a column."""
        places = range(len(self.bars))
        colours = [OURS if mine else THEIRS for *_, mine in self.bars]
        values = [value for _, value, _, _ in self.bars]
        spreads = [value * spread for _, value, spread, _ in self.bars]
        axes.barh(
            places, values, height=0.42, color=colours, xerr=spreads, ecolor=ink, error_kw={"elinewidth": 0.8}
        )
        for place, (name, value, *_) in enumerate(self.bars):
            words = {"color": ink, "fontsize": "x-small", "va": "bottom", "clip_on": False}
            axes.annotate(
                f"{name}: {value:.4g}", (0, place - 0.23), (2, 0), textcoords="offset points", **words
            )
        axes.set_yticks([])
        axes.set_ylim(len(self.bars) - 0.6, -0.9)

    def plot(self) -> Plot:
        """As one plot."""
        from geopose_dist.report import figures

        height_in = 0.9 + BAR_IN * len(self.bars)
        return figures.Plot(self.title, self.unit, "", self.draw, legend=False, height_in=height_in)


@dataclass(frozen=True)
class Curves:
    """Lines by name; each a list of (x, y)."""

    title: str
    x_label: str
    y_label: str
    lines: dict[str, list[tuple[float, float]]]
    logarithmic: bool = False

    def plot(self) -> Plot:
        """As one plot, points marked."""
        from geopose_dist.report import figures

        lines = [
            figures.Line(name, [x for x, _ in points], [y for _, y in points], marked=True)
            for name, points in self.lines.items()
        ]
        x, y = self.x_label, self.y_label
        return figures.chart(
            lines, title=self.title, x_label=x, y_label=y, log_x=self.logarithmic, log_y=self.logarithmic
        )


def panels(path: Path) -> Iterator[Bars | Curves]:
    """What is drawn of a file of results, unit by unit."""
    rows, title = compare.read(path)["results"], path.stem
    scaled = by_name(rows, "ranks", "tiles_per_s", lambda row: row["case"].removeprefix("scaling, "))
    if scaled:
        yield Curves(title, "ranks", "tiles/s", scaled, logarithmic=True)
        return
    learned = {
        f"{row['recipe']}, seed {row['seed']}": [(point["minutes"], point["r2"]) for point in row["curve"]]
        for row in rows
        if row.get("curve")
    }
    if learned:
        yield Curves(title, "minutes of training", "score on the validation split", learned)
        return
    for name, other, unit in UNITS:
        bars = []
        for row in rows:
            if not isinstance(row.get(name), int | float):
                continue
            bars.append((label(row, rows), float(row[name]), float(row.get("spread") or 0), True))
            if isinstance(row.get(other), int | float):
                beside = f"  {row.get('baseline', 'baseline')}"
                bars.append((beside, float(row[other]), float(row.get("baseline_spread") or 0), False))
        if bars:
            yield Bars(f"{title}, {unit}", unit, bars)


def by_name(
    rows: list[dict[str, Any]], x: str, y: str, name: Callable[[dict[str, Any]], str]
) -> dict[str, list[tuple[float, float]]]:
    """Points of the rows that have both quantities, by the name of their line."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if isinstance(row.get(x), int | float) and isinstance(row.get(y), int | float):
            lines.setdefault(name(row), []).append((row[x], row[y]))
    return lines


UNSAID = ("baseline", "verdict", "bound_by", "checked", "bottleneck")
"""Words of a row that do not say what was measured."""


def label(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Name of a bar: the case and what tells it from the other rows of that case."""
    beside = [other for other in rows if other["case"] == row["case"]]
    told = [
        str(value)
        for name, value in row.items()
        if (isinstance(value, str) or name == "batch")
        and name not in ("case", *UNSAID)
        and any(other.get(name) != value for other in beside)
    ]
    return ", ".join([row["case"], *told])


def run(files: list[Path], out: Path | None, kind: str | None = None) -> None:
    """Draw the figure, the page, or a folder of figures of one kind (UserError: nothing to draw, nowhere to)."""
    if not files:
        raise UserError("bench plot: no results are named; give files that `geopose bench ... --json` wrote")
    if out is None or (kind is None and out.suffix not in FORMATS):
        raise UserError(
            f"bench plot: --out is {out}; wanted a file that ends in {', '.join(FORMATS)}, or a folder with --format"
        )
    drawn = {path: [panel.plot() for panel in panels(path)] for path in files}
    plots = [plot for found in drawn.values() for plot in found]
    if not plots:
        raise UserError(f"{', '.join(map(str, files))}: no rates to draw")
    if kind is not None:
        from geopose_dist.report import paper

        folder = paper.Folder(out, kind)
        for plot in plots:
            folder.plot(plot)
        folder.tell()
        return
    if out.suffix == ".html":
        page.write(out, "Benchmarks", [part for path, found in drawn.items() for part in _parts(path, found)])
    else:
        _one_figure(plots, out)
    print(out)


def _parts(path: Path, plots: list[Plot]) -> list[str]:
    """A file of results on the page: where and how it was measured, its verdict, its plots."""
    facts = compare.read(path)
    machine = ", ".join(
        f"{name} {value}" for name, value in facts["machine"].items() if not isinstance(value, dict)
    )
    commit = str(facts.get("commit", "unknown"))[:12]
    told = f"{facts.get('command', 'command unknown')}; commit {commit}; {facts['date']}"
    verdict = [page.paragraph(str(facts["verdict"]))] if facts.get("verdict") else []
    if not plots:
        return [
            page.heading(path.stem),
            page.note(f"{told}. {machine}."),
            *verdict,
            page.note("No rates to draw."),
        ]
    drawn = page.grid(page.drawing(plot.svg()) for plot in plots)
    has_bars = any(not plot.legend for plot in plots)
    legend = [page.note(LEGEND)] if has_bars else []
    return [page.heading(path.stem), page.note(f"{told}. {machine}."), *verdict, drawn, *legend]


LEGEND = (
    "Bars: medians with their spread (see geopose bench --help); ours blue, baselines of the same run grey."
)


def _one_figure(plots: list[Plot], out: Path) -> None:
    """All plots one over the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from geopose_dist.report.figures import plain

    heights = [plot.height_in + 0.4 for plot in plots]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(plots), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, plot in zip(axes, plots, strict=True):
        plot.draw(axis, "black")
        axis.set(xlabel=plain(plot.x_label), ylabel=plain(plot.y_label))
        axis.set_title(plain(plot.title), loc="left", fontsize="small")
        axis.grid(alpha=0.3)
        if plot.legend:
            axis.legend(fontsize="small")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
