"""The score of `evaluate --json` on a page and as a figure: by city and final, with the bootstrap's intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from geopose_dist.report import page

if TYPE_CHECKING:
    from geopose_dist.report.figures import Plot


def score_part(score: Mapping[str, Any]) -> str:
    """The final score with its interval, the table by city, and both as a drawing."""
    columns = (
        ("R² height", "agl_r2", 4),
        ("R² flow", "vflow_r2", 4),
        ("R²", "r2", 4),
        ("angle, deg", "mean_angle_error_deg", 2),
        ("scale, px/m", "mean_scale_error", 4),
        ("endpoint, px", "mean_epe", 2),
        ("height, m", "mean_agl_error", 2),
    )
    found = score.get("intervals") or {}
    headings, rows = ["city", "tiles"], []
    for name, field, _ in columns:
        headings += [name, *([_level(found)] if found and field == "r2" else [])]
    for city, facts in sorted(score["cities"].items()):
        row = [city, facts["images"]]
        for _, field, digits in columns:
            row.append(_number(facts.get(field), digits))
            if found and field == "r2":
                row.append(_span((found.get("cities", {}).get(city) or {}).get("r2")))
        rows.append(row)
    tiles = sum(facts["images"] for facts in score["cities"].values())
    total = ["final", tiles, "", "", _number(score["r2"], 4), *([_span(found.get("r2"))] if found else [])]
    missing = score.get("cities_missing") or []
    told = "The final score is the plain mean of the cities' R². 1 is perfect, 0 is the constant mean. "
    told += "Errors are means over tiles of their means."
    if missing:
        told += f" Not covered: {', '.join(missing)}."
    big = f"R² {score['r2']:.4f}"
    if found.get("r2"):
        big += f" <small>({_span(found['r2'])})</small>"
    return (
        f'<p class="big">{big}</p>'
        + page.table(headings, rows, total=[*total, "", "", "", ""])
        + page.note(told)
        + (page.note(_origin(found)) if found else "")
        + page.grid([page.drawing(score_plot(score).svg())])
    )


def _origin(found: Mapping[str, Any]) -> str:
    """Where the intervals come from, and what they do not hold."""
    unit = str(found.get("unit", "tiles"))
    counts = ", ".join(f"{city} {count}" for city, count in (found.get("groups") or {}).items())
    told = (
        f"Intervals: bootstrap over {unit}, city by city, {found.get('rounds')} rounds ({counts} {unit}); "
        '"-" where a city has too few. They hold the choice of tiles, not that of another training run.'
    )
    if unit == "tiles":
        told += " Views of one place are not independent, so these are too narrow where places repeat."
    return told


def _level(found: Mapping[str, Any]) -> str:
    level = found.get("level")
    return f"{level:.0%} interval" if isinstance(level, int | float) else "interval"


def _span(interval: object) -> str:
    if not (isinstance(interval, list) and len(interval) == 2):
        return "-"
    return f"{_number(interval[0], 3)} to {_number(interval[1], 3)}"


def score_plot(score: Mapping[str, Any]) -> Plot:
    """R² of heights, of flow and of both, by city, with intervals where they are known."""
    from geopose_dist.report import figures

    found = score.get("intervals") or {}
    names = {"agl_r2": "height", "vflow_r2": "flow", "r2": "R²"}

    def one(facts: Mapping[str, Any], interval: object, field: str) -> tuple[float, float, float]:
        spans = interval if isinstance(interval, Mapping) else {}
        low, high = spans.get(field) or (math.nan, math.nan)
        return float(low), float(facts[field]), float(high)

    values = {
        city: {
            name: one(facts, (found.get("cities") or {}).get(city), field)
            for field, name in names.items()
            if isinstance(facts.get(field), int | float)
        }
        for city, facts in sorted(score["cities"].items())
    }
    values["final"] = {"R²": one(score, {"r2": found.get("r2")}, "r2")}
    known = any(not math.isnan(low) for row in values.values() for low, _, _ in row.values())
    level = f" with {_level(found)}s" if known else ""
    return figures.spans(
        values, title=f"Score by city{level}", x_label="R² (1 is perfect, 0 the constant mean)"
    )


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"
