"""`geopose report`: what a run did, in one file to look at: score, curves, best, median and worst tiles.

Curves come from the run folder's `metrics.jsonl` and `validation.jsonl`, the score and its intervals from
`evaluate --json`, the panels of tiles from `report/tiles.py`. What a run has not written yet is left out.
`--format png|pdf` writes the same as figures for a paper.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geopose_dist.errors import UserError
from geopose_dist.report import page, paper, scores

if TYPE_CHECKING:
    from geopose_dist.report.figures import Line, Plot

MAX_CITIES = 6
"""Curves of so many cities can be told apart; the table shows all."""


@dataclass(frozen=True)
class ReportRecipe:
    """What to put on the page."""

    run: Path
    """Run folder of `geopose train`: curves and recipe."""
    out: Path | None = None
    """The page, or with --format png or pdf the folder of figures; default: report.html or figures/ of the run."""
    format: paper.Format = "html"
    """One page, or one file for each figure, fit for a paper."""
    source: Path | None = None
    """Dataset with the images of the predicted tiles; for panels, together with predictions and truth."""
    predictions: Path | None = None
    """Folder of `geopose predict --out`."""
    truth: Path | None = None
    """Folder of true heights and poses of the predicted tiles."""
    score: Path | None = None
    """JSON of `geopose evaluate --json`."""
    workers: int = 0
    """Processes that read tiles; 0: one per core."""

    def __post_init__(self) -> None:
        folders = {"source": self.source, "predictions": self.predictions, "truth": self.truth}
        missing = [f"--{name}" for name, folder in folders.items() if folder is None]
        if missing and len(missing) < len(folders):
            raise ValueError(
                f"panels want --source, --predictions and --truth; {' and '.join(missing)} is missing"
            )
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; wanted 0 (one per core) or more")


def run(recipe: ReportRecipe) -> None:
    """Write the page (UserError for a folder or file that is not what its option says)."""
    metrics = read_lines(recipe.run / "metrics.jsonl")
    if not metrics:
        raise UserError(
            f"--run {recipe.run}: no metrics.jsonl with a whole line; wanted the --out folder of "
            "`geopose train`"
        )
    validation = read_lines(recipe.run / "validation.jsonl")
    score = None if recipe.score is None else _read_json(recipe.score)
    if recipe.format != "html":
        _write_figures(recipe, metrics, validation, score)
        return
    parts = [summary(metrics, validation)]
    if score is not None:
        parts = [scores.score_part(score), *parts]
    drawn = [page.drawing(plot.svg()) for plot in curves(metrics, validation)]
    parts += [page.heading("Training"), page.grid(drawn)]
    if recipe.source and recipe.predictions and recipe.truth:
        from geopose_dist.report.tiles import tiles_part

        parts += tiles_part(recipe.source, recipe.predictions, recipe.truth, recipe.workers)
    written = recipe.run / "recipe.yaml"
    if written.is_file():
        parts += [page.heading("Recipe"), page.folded("recipe.yaml", written.read_text())]
    out = recipe.out or recipe.run / "report.html"
    page.write(out, f"Geocentric pose: {'/'.join(recipe.run.resolve().parts[-2:])}", parts)
    print(out)


def _write_figures(
    recipe: ReportRecipe,
    metrics: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    score: Mapping[str, Any] | None,
) -> None:
    folder = paper.Folder(recipe.out or recipe.run / "figures", recipe.format)
    for plot in [*([] if score is None else [scores.score_plot(score)]), *curves(metrics, validation)]:
        folder.plot(plot)
    if recipe.source and recipe.predictions and recipe.truth:
        from geopose_dist.report import tiles

        _, shown = tiles.ranked_rows(
            recipe.source, recipe.predictions, recipe.truth, recipe.workers, side=paper.PICTURE_PX
        )
        for rank, tile, row in shown:
            folder.row(row, f"tile {tile.city} {rank} {tile.key}")
    folder.tell()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, the last of each step: a resumed run may tell a step again.

    A last line without its end (the run was killed while writing) is left out; other damage is a UserError.
    """
    if not path.is_file():
        return []
    by_step: dict[tuple[int, str], dict[str, Any]] = {}
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines, 1):
        if not line or number == len(lines):
            continue
        try:
            facts = json.loads(line)
            by_step[int(facts["step"]), str(facts.get("weights", ""))] = facts
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: not an object with a step ({error}); remove the line"
            ) from error
    return [by_step[key] for key in sorted(by_step)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(path.read_bytes())
        facts["cities"], facts["r2"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--score {path}: not the JSON of `geopose evaluate --json` ({error!r})") from error
    return facts


def summary(metrics: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> str:
    """How long the run was, how fast, and its best validation."""
    last = metrics[-1]
    rates = sorted(row["tiles_per_s"] for row in metrics if isinstance(row.get("tiles_per_s"), int | float))
    waits = sorted(
        row["data_wait_share"] for row in metrics if isinstance(row.get("data_wait_share"), int | float)
    )
    losses = [row["loss"] for row in metrics if isinstance(row.get("loss"), int | float)]  # null: not finite
    told = f"{losses[-1]:.4g}" if losses else "unknown"
    said = [f"{last['step']} steps, {last.get('epoch', 0):.3g} epochs, last loss {told}"]
    if rates:
        said.append(f"{rates[len(rates) // 2]:.3g} tiles/s (median over logged steps)")
    if waits:
        said.append(f"{waits[len(waits) // 2]:.1%} of the time waiting for data")
    scored = [row for row in validation if isinstance(row.get("r2"), int | float)]
    if scored:
        best = max(scored, key=lambda row: row["r2"])
        weights = best.get("weights", "raw")
        said.append(f"best validation R² {best['r2']:.4f} at step {best['step']} ({weights} weights)")
    return page.paragraph("; ".join(said) + ".")


def curves(metrics: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Loss, validation, learning rate and throughput over steps."""
    from geopose_dist.report import figures

    terms = {name: name.removeprefix("loss_") for row in metrics for name in row if name.startswith("loss_")}
    losses = _over_steps(metrics, {"loss": "total", **terms})
    positive = all(value > 0 for line in losses for value in line.y)
    charts = []
    if losses:
        charts.append(
            figures.chart(losses, title="Training loss", x_label="step", y_label="loss", log_y=positive)
        )
    charts += _validation_charts(validation)
    for field, title, unit in (
        ("lr", "Learning rate", "learning rate"),
        ("tiles_per_s", "Throughput", "tiles/s, all ranks"),
        ("grad_norm", "Gradient norm before clipping", "norm"),
    ):
        lines = _over_steps(metrics, {field: title})
        if lines:
            log_y = field == "grad_norm" and all(value > 0 for value in lines[0].y)
            charts.append(figures.chart(lines, title=title, x_label="step", y_label=unit, log_y=log_y))
    return charts


def _over_steps(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[Line]:
    """Curves of those fields that some row has as a number, under the names to show."""
    from geopose_dist.report import figures

    lines = []
    for field, shown in names.items():
        told = [(row["step"], row[field]) for row in rows if isinstance(row.get(field), int | float)]
        if told:
            lines.append(figures.Line(shown, [step for step, _ in told], [value for _, value in told]))
    return lines


def _validation_charts(validation: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """The final score by kind of weights, and both parts by city for the kind that is best."""
    from geopose_dist.report import figures

    scored = [row for row in validation if isinstance(row.get("r2"), int | float)]
    if not scored:
        return []
    kinds = list(dict.fromkeys(str(row.get("weights", "raw")) for row in scored))
    finals = []
    for kind in kinds:
        rows = [row for row in scored if str(row.get("weights", "raw")) == kind]
        steps, values = [row["step"] for row in rows], [row["r2"] for row in rows]
        finals.append(figures.Line(f"{kind} weights", steps, values, marked=True))
    best = str(max(scored, key=lambda row: row["r2"]).get("weights", "raw"))
    rows = [row for row in scored if str(row.get("weights", "raw")) == best]
    cities = sorted({city for row in rows for city in row.get("cities", {})})[:MAX_CITIES]
    by_city = [
        figures.Line(
            f"{city} {shown}",
            [row["step"] for row in rows],
            [row["cities"].get(city, {}).get(field) or math.nan for row in rows],
            marked=True,
            colour=number,
            dash=dash,
        )
        for number, city in enumerate(cities)
        for dash, (field, shown) in enumerate((("agl_r2", "height"), ("vflow_r2", "flow")))
    ]
    # Before a net has learned a city, its R² may be far below zero and would press all else flat.
    label = "R², mean of cities"
    charts = [figures.chart(finals, title="Validation score", x_label="step", y_label=label, y_floor=-0.5)]
    if by_city:
        title = f"Validation score by city ({best} weights)"
        charts.append(figures.chart(by_city, title=title, x_label="step", y_label="R²", y_floor=-0.5))
    return charts
