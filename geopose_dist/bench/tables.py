"""`geopose bench tables`: the tables of PERFORMANCE.md, made from the JSON beside the benchmarks.

A block `<!-- table FILE.json: case, tiles_per_s as tiles/s, ... [where CASE*] -->` ... `<!-- end -->` of the
page is filled from `bench/results/FILE.json`, with the command, machine, date and commit below it. `--check`
changes nothing and fails where the page says something else than the JSON: no number is typed by hand.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geopose_dist import files
from geopose_dist.bench import compare
from geopose_dist.errors import FinishedWithFailures, UserError

RESULTS = Path(__file__).parent / "results"
BLOCK = re.compile(
    r"(?P<open><!-- table (?P<file>[\w.-]+\.json): (?P<columns>[^>]+?)"
    r"(?: where (?P<case>(?:(?! where )[^>])+?))? -->\n)"
    r".*?(?P<close><!-- end -->)",
    re.DOTALL,
)


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with every block made anew (UserError: no such file, no such column, no such case)."""
    return BLOCK.sub(lambda block: _fill(block, results), page)


def _fill(block: re.Match[str], results: Path) -> str:
    facts = compare.read(results / block["file"])
    pattern = block["case"] or "*"
    rows = [row for row in facts["results"] if fnmatch.fnmatchcase(row["case"], pattern)]
    if not rows:
        raise UserError(f"{block['file']} has no case {pattern}; mend the block in the page")
    return "".join(
        [block["open"], table(rows, block["columns"], block["file"]), below(facts), block["close"]]
    )


def table(rows: list[dict[str, Any]], columns: str, where: str) -> str:
    """Rows as Markdown; `columns` is `name, name as title, ...`; a title may hold the word "as", but no comma."""
    wanted = [[part.strip() for part in column.split(" as ", 1)] for column in columns.split(",")]
    for name, *_ in wanted:
        if not any(name in row for row in rows):
            raise UserError(f"{where} has no column {name}; it has {', '.join(sorted(rows[0]))}")
    titles = [title[0] if title else name for name, *title in wanted]
    numbers = [any(isinstance(row.get(name), int | float) for row in rows) for name, *_ in wanted]
    lines = [
        "| " + " | ".join(titles) + " |",
        "|" + "|".join("--:" if number else "---" for number in numbers) + "|",
        *("| " + " | ".join(shown(name, row.get(name)) for name, *_ in wanted) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def shown(name: str, value: Any) -> str:
    """A cell: three figures are more than a measurement is good for, shares are percent."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if name == "spread" or name.endswith("_spread") or name.endswith("_share") or name.startswith("share_"):
        return f"{value:.0%}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def below(facts: Mapping[str, Any]) -> str:
    """What the numbers were taken with."""
    machine = facts["machine"]
    gpus = ", ".join(gpu["name"] for gpu in machine.get("gpus", [])) or "no GPU"
    changed = ", with changes" if facts.get("changed_since_commit") else ""
    old = "spread_is" not in facts and facts.get("repeats", 0) >= 4
    if old and any("spread" in row for row in facts["results"]):
        changed += "; spread: half the quartiles' distance"
    command = re.sub(r"(--(?:json|shards|data\.shards|out)[ =])\S*/", r"\1", facts["command"])
    return (
        f"\n`{command}`: {machine['cpu']}, {machine['cores']} cores, {gpus}; {facts['date']}; "
        f"commit {facts['commit'][:12]}{changed}.\n"
    )


def run(page: Path, check: bool) -> None:
    """Fill the page, or only look whether it is filled (UserError: no such page; exit 1: it is not)."""
    try:
        text = page.read_text()
    except OSError as error:
        raise UserError(
            f"{page}: cannot be read ({error.strerror}); give --page, the file with the tables"
        ) from error
    new = filled(text)
    if check and new != text:
        raise FinishedWithFailures(f"{page} differs from the results; run `geopose bench tables`")
    if new != text:
        files.write_bytes(page, new.encode())
    print(f"{page}: {len(BLOCK.findall(text))} tables {'hold' if check else 'made'}")
