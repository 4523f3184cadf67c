"""`geopose bench compare A.json B.json`: what became faster or slower, and what is only noise.

Rows of the two files stand for the same measurement where their case and all their words agree (codec, crop,
baseline ...). A difference counts only where it is larger than both spreads together; ratios against the
baseline of the same run are compared too (with the baseline's spread), which is what holds between two busy
machines. Rows of one repeat have no spread, and nothing is judged by them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geopose_dist.errors import FinishedWithFailures, UserError

Row = dict[str, Any]

MORE_IS_BETTER = ("tiles_per_s", "speedup", "ratio")
RATIOS = ("speedup", "ratio")
LESS_IS_BETTER = ("ms", "s", "cpu_ms", "ms_per_tile", "epoch_s", "bytes_per_tile")


def read(path: Path) -> dict[str, Any]:
    """A file of `geopose bench --json` (UserError)."""
    try:
        facts = json.loads(path.read_text())
        rows, _ = facts["results"], facts["machine"]
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give one that `geopose bench ... --json` wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a file of results ({type(error).__name__}); give one that `geopose bench ... --json` wrote"
        ) from error
    if not all(isinstance(row, dict) and "case" in row for row in rows):
        raise UserError(f"{path}: a result has no case; give a file that `geopose bench ... --json` wrote")
    return dict(facts)


def identity(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What makes two rows the same measurement: the case and every other word."""
    words = {name: value for name, value in row.items() if isinstance(value, str)}
    for name in ("verdict", "bound_by", "checked", "bottleneck"):
        words.pop(name, None)
    return tuple(sorted(words.items()))


def compare(before: list[Row], after: list[Row]) -> list[Row]:
    """One row for each quantity of each measurement that both have: the ratio, the noise, what to think.

    `ratio` is how many times better the later one is; `noise` is the sum of both spreads, or None if unknown.
    """
    known = {identity(row): row for row in before}
    rows: list[Row] = []
    for row in after:
        former = known.get(identity(row))
        if former is None:
            continue
        for name in (*MORE_IS_BETTER, *LESS_IS_BETTER):
            if not (_positive(former.get(name)) and _positive(row.get(name))):
                continue
            if name == "ratio" and "speedup" in row:
                continue  # the same number
            noises = [spread_of(one, name) for one in (former, row)]
            noise = None if None in noises else sum(one for one in noises if one is not None)
            ratio = row[name] / former[name] if name in MORE_IS_BETTER else former[name] / row[name]
            words = "unknown: one repeat has no spread" if noise is None else "same within noise"
            if noise is not None and abs(math.log(ratio)) > noise:
                words = "better" if ratio > 1 else "worse"
            rows.append(
                {
                    "case": row["case"],
                    "quantity": name,
                    "before": former[name],
                    "after": row[name],
                    "ratio": ratio,
                    "noise": noise,
                    "verdict": words,
                }
            )
    return rows


def spread_of(row: Mapping[str, Any], quantity: str) -> float | None:
    """The spread of a quantity of a row; a ratio has that of its baseline, too. None if it was not measured."""
    names = ["spread", "baseline_spread"] if quantity in RATIOS and "baseline_spread" in row else ["spread"]
    found = [row.get(name, 0.0) for name in names]
    return None if None in found else float(sum(found))


def must_agree(rows: list[Row]) -> None:
    """FinishedWithFailures that names every quantity that differs by more than the noise."""
    differing = [row for row in rows if row["verdict"] in ("better", "worse")]
    if differing:
        told = [
            f"{row['case']}, {row['quantity']}: {row['before']:.4g} and {row['after']:.4g} differ by "
            f"{abs(row['ratio'] - 1):.0%}, more than both spreads, {row['noise']:.0%}"
            for row in differing
        ]
        raise FinishedWithFailures("\n  ".join([f"{len(told)} of {len(rows)} quantities differ:", *told]))


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def run(files: list[Path]) -> list[Row]:
    """Compare two files and print the table (UserError: not two, not results, nothing in common)."""
    if len(files) != 2:
        raise UserError(
            f"bench compare takes two files of results, got {len(files)}: compare BEFORE.json AFTER.json"
        )
    before, after = (read(path) for path in files)
    rows = compare(before["results"], after["results"])
    if not rows:
        raise UserError(f"{files[0]} and {files[1]} have no measurement in common")
    show(rows, before, after)
    return rows


def show(rows: list[Row], before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """The table, and a warning where the machines differ: then only ratios against a baseline say something."""
    import sys

    from rich.console import Console
    from rich.table import Table

    table = Table(
        caption=f"{before['date']} {before['commit'][:12]} -> {after['date']} {after['commit'][:12]}"
    )
    for name in ("case", "quantity", "before", "after", "ratio", "noise", "verdict"):
        table.add_column(name, justify="left" if name in ("case", "quantity", "verdict") else "right")
    for row in rows:
        cells = [row[name] for name in ("case", "quantity", "before", "after", "ratio", "noise", "verdict")]
        table.add_row(
            *(
                f"{cell:.4g}" if isinstance(cell, float) else str("" if cell is None else cell)
                for cell in cells
            )
        )
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)
    differ = [
        name for name in ("cpu", "cores", "gpus") if before["machine"].get(name) != after["machine"].get(name)
    ]
    if differ:
        print(f"the machines differ in {', '.join(differ)}: compare only speedup, taken beside a baseline")
