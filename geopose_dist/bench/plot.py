"""`geopose bench plot RESULTS.json... --out FIGURE.png`: what was measured, as a picture.

Rates stand beside their baselines as bars with their spreads, scaling as tiles/s by ranks, accuracy as the score
by minutes of training. One panel for each file of results and unit, in the format of the figure's extension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geopose_dist.bench import compare
from geopose_dist.errors import UserError

UNITS = (("tiles_per_s", "baseline_tiles_per_s", "tiles/s"), ("ms", "baseline_ms", "ms"))
FORMATS = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Bars:
    """Rates beside their baselines: (label, value, spread, whether it is ours)."""

    title: str
    unit: str
    bars: list[tuple[str, float, float, bool]]

    def draw(self, axis: Any) -> None:
        """Horizontal bars, ours in colour."""
        places = range(len(self.bars))
        colours = ["#2a6f97" if mine else "#b8b8b8" for *_, mine in self.bars]
        values = [value for _, value, _, _ in self.bars]
        axis.barh(places, values, color=colours, xerr=[value * spread for _, value, spread, _ in self.bars])
        axis.set_yticks(places, [name for name, *_ in self.bars])
        axis.invert_yaxis()
        axis.set_xlabel(self.unit)


@dataclass(frozen=True)
class Curves:
    """Lines by name; each a list of (x, y)."""

    title: str
    x_label: str
    y_label: str
    lines: dict[str, list[tuple[float, float]]]
    logarithmic: bool = False

    def draw(self, axis: Any) -> None:
        """One line for each name, points marked."""
        for name, points in self.lines.items():
            axis.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3, label=name)
        if self.logarithmic:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
        axis.set_xlabel(self.x_label)
        axis.set_ylabel(self.y_label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")


def panels(files: list[Path]) -> Iterator[Bars | Curves]:
    """What is drawn, file by file and unit by unit."""
    for path in files:
        facts = compare.read(path)
        rows, title = facts["results"], f"{path.stem}, {facts['machine']['cpu']}, {facts['date']}"
        scaled = by_name(rows, "ranks", "tiles_per_s", lambda row: row["case"].removeprefix("scaling, "))
        if scaled:
            yield Curves(title, "ranks", "tiles/s", scaled, logarithmic=True)
            continue
        learned = {
            f"{row['recipe']}, seed {row['seed']}": [
                (point["minutes"], point["r2"]) for point in row["curve"]
            ]
            for row in rows
            if row.get("curve")
        }
        if learned:
            yield Curves(title, "minutes of training", "score on the validation split", learned)
            continue
        for name, other, unit in UNITS:
            bars = []
            for row in rows:
                if not isinstance(row.get(name), int | float):
                    continue
                bars.append((label(row), float(row[name]), float(row.get("spread", 0)), True))
                if isinstance(row.get(other), int | float):
                    beside = f"  {row.get('baseline', 'baseline')}"
                    bars.append((beside, float(row[other]), float(row.get("baseline_spread", 0)), False))
            if bars:
                yield Bars(title, unit, bars)


def by_name(
    rows: list[dict[str, Any]], x: str, y: str, name: Callable[[dict[str, Any]], str]
) -> dict[str, list[tuple[float, float]]]:
    """Points of the rows that have both quantities, by the name of their line."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if isinstance(row.get(x), int | float) and isinstance(row.get(y), int | float):
            lines.setdefault(name(row), []).append((row[x], row[y]))
    return lines


def label(row: dict[str, Any]) -> str:
    """Name of a bar: the case and what tells it from its neighbours."""
    told = [str(row[name]) for name in ("codec", "precision", "batch") if name in row]
    return ", ".join([row["case"], *told])


def run(files: list[Path], out: Path | None) -> None:
    """Draw the figure (UserError: no results, no file to draw to, an unknown format)."""
    if not files:
        raise UserError("bench plot: no results are named; give files that `geopose bench ... --json` wrote")
    if out is None or out.suffix not in FORMATS:
        raise UserError(f"bench plot: --out is {out}; wanted a file that ends in {', '.join(FORMATS)}")
    drawn = list(panels(files))
    if not drawn:
        raise UserError(f"{', '.join(map(str, files))}: no rates to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [3.5 if isinstance(panel, Curves) else 0.5 + 0.28 * len(panel.bars) for panel in drawn]
    figure = Figure(figsize=(9, sum(heights) + 0.6 * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel in zip(axes, drawn, strict=True):
        panel.draw(axis)
        axis.set_title(panel.title, loc="left", fontsize="small")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    print(out)
