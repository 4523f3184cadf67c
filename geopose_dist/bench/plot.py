"""`geopose bench plot RESULTS.json... --out FIGURE.png`: our rates beside their baselines, as bars.

One panel for each file of results and unit; the whiskers are the spreads. The format is that of the file's
extension (png, pdf, svg).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from geopose_dist.bench import compare
from geopose_dist.errors import UserError

UNITS = (("tiles_per_s", "baseline_tiles_per_s", "tiles/s"), ("ms", "baseline_ms", "ms"))
FORMATS = (".png", ".pdf", ".svg")

Panel = tuple[str, str, list[tuple[str, float, float, str]]]
"""Title, unit, and bars: (label, value, spread, ours or baseline)."""


def panels(files: list[Path]) -> Iterator[Panel]:
    """What is drawn, file by file and unit by unit."""
    for path in files:
        facts = compare.read(path)
        for name, other, unit in UNITS:
            bars = []
            for row in facts["results"]:
                if not isinstance(row.get(name), int | float):
                    continue
                bars.append((label(row), float(row[name]), float(row.get("spread", 0)), "ours"))
                if isinstance(row.get(other), int | float):
                    beside = str(row.get("baseline", "baseline"))
                    bars.append(
                        (f"  {beside}", float(row[other]), float(row.get("baseline_spread", 0)), "baseline")
                    )
            if bars:
                yield f"{path.stem}, {facts['machine']['cpu']}, {facts['date']}", unit, bars


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

    heights = [0.5 + 0.28 * len(bars) for _, _, bars in drawn]
    figure = Figure(figsize=(9, sum(heights) + 0.6 * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, unit, bars) in zip(axes, drawn, strict=True):
        places = range(len(bars))
        colours = ["#2a6f97" if kind == "ours" else "#b8b8b8" for *_, kind in bars]
        values = [value for _, value, _, _ in bars]
        axis.barh(places, values, color=colours, xerr=[value * spread for _, value, spread, _ in bars])
        axis.set_yticks(places, [name for name, *_ in bars])
        axis.invert_yaxis()
        axis.set_xlabel(unit)
        axis.set_title(title, loc="left", fontsize="small")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    print(out)
