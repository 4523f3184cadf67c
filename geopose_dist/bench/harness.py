"""`geopose bench CASES...`: run named measurements and say what they were taken with.

A case is a function in some `bench/cases_*.py`, listed there in `CASES` by its name; it gets those of
`repeats`, `shards`, `run` (a training recipe) and `recipe` (all of it) that it asks for and returns one row
or several: dicts with `case`, `tiles_per_s` and `spread`, or whatever unit it measures, and `baseline` and
`speedup` where it stands beside one. Each checks its output against a reference once (`check`); one whose output
is wrong has no rate to tell, and the exit code is 1. The harness keeps libraries to one thread (the quantity that
scales), prints a table, and writes the JSON anew after each row, so that what was measured is kept.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import gc
import importlib
import inspect
import itertools
import json
import math
import os
import pkgutil
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geopose_dist import files
from geopose_dist.bench.recipe import BenchRecipe as BenchRecipe
from geopose_dist.errors import FinishedWithFailures, UserError
from geopose_dist.train.recipe import TrainRecipe

Row = dict[str, Any]
Case = Callable[..., Any]

BY_NAME_ONLY = ("accuracy", "calibrate", "enlarge", "leak", "scaling", "similarity", "submission", "transfer")
"""Cases that take long and want more than defaults: run when they are named."""

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over repeats, and the spread as a share of it.

    The spread is half the width of the interval of measured values that holds the true median with 93 % or more,
    whatever the noise looks like (below five repeats: all there are). Up to eight repeats that is from the
    fastest to the slowest, outliers included; more repeats narrow it.
    """

    median_s: float
    spread: float


def measure(call: Callable[[], object], repeats: int, warm_up: int = 1) -> Timing:
    """Time `call` `repeats` times after `warm_up` calls that do not count; the garbage collector waits."""
    for _ in range(warm_up):
        call()
    seconds = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
    finally:
        if collecting:
            gc.enable()
    return timing(seconds)


def timing(seconds: list[float]) -> Timing:
    """Median and spread of measured seconds; see `Timing`."""
    ordered, median = sorted(seconds), statistics.median(seconds)
    left_out = spare_at_an_end(len(ordered))
    low, high = ordered[left_out], ordered[-1 - left_out]
    return Timing(median, (high - low) / 2 / median if median > 0 else 0.0)


def spare_at_an_end(count: int) -> int:
    """How many of the lowest, and of the highest, of `count` values the median's interval can do without.

    The true median lies below the lowest k + 1 of n values with the chance that at most k of n coins show heads.
    """
    spare, chances = 0, 1
    for k in range(1, (count + 1) // 2):
        chances += math.comb(count, k)
        if 2 * chances <= 2**count / 16:
            spare = k
    return spare


def check(right: bool, sentence: str) -> None:
    """FinishedWithFailures with the sentence if a case's output is not its reference's."""
    if not right:
        raise FinishedWithFailures(f"wrong output: {sentence}")


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Keep this thread on one core for the time of the block, where the system can: less noise."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def collect() -> dict[str, Case]:
    """All cases by name, from every `cases_*.py` beside this file."""
    import geopose_dist.bench as package

    cases: dict[str, Case] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        if module.startswith("cases_"):
            found = importlib.import_module(f"{package.__name__}.{module}").CASES
            twice = cases.keys() & found.keys()
            assert not twice, f"two modules name a case {sorted(twice)}"
            cases.update(found)
    return cases


def keep_to(threads: int) -> None:
    """Keep the libraries of this process, and of processes that it starts, to so many threads."""
    if threads == 0:
        return
    for name in _THREAD_VARIABLES:
        os.environ[name] = str(threads)
    import cv2

    cv2.setNumThreads(threads)
    if "torch" in sys.modules:  # a torch imported later reads the variables
        import torch

        torch.set_num_threads(threads)


def chosen(
    names: list[str], known: Mapping[str, Case], shards: str | None, run: TrainRecipe | None = None
) -> list[str]:
    """The cases to run; UserError for unknown names, and for named cases that lack their shards or recipe."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}" if near else ""
            raise UserError(f"bench has no case {name!r}; it has: {', '.join(sorted(known))}{hint}")
    lacking: dict[str, str] = {}
    for name in names or known:
        if shards is None and _requires(known[name], "shards"):
            lacking[name] = "--shards, a folder made by `geopose pack`"
        if run is None and _requires(known[name], "run"):
            lacking[name] = "--config, a training recipe such as train/base"
    for name, what in lacking.items():
        if names:
            raise UserError(f"bench {name} needs {what}")
        print(f"bench: {name} is left out; it needs {what}", file=sys.stderr)
    return list(names) or [name for name in known if name not in lacking and name not in BY_NAME_ONLY]


def _requires(case: Case, argument: str) -> bool:
    parameter = inspect.signature(case).parameters.get(argument)
    return parameter is not None and parameter.default is inspect.Parameter.empty


def rows_of(name: str, case: Case, offered: Mapping[str, object]) -> Iterator[Row]:
    """Run one case with the arguments that it asks for, row by row; every row names its case."""
    wanted = inspect.signature(case).parameters
    result = case(**{key: value for key, value in offered.items() if key in wanted})
    for row in [result] if isinstance(result, Mapping) else result:
        told = {"case": name, **row}
        if told.get("repeats", offered.get("repeats")) == 1 and not told.get("spread"):
            told["spread"] = None  # one measurement has none, which is not the same as 0
        yield told


def verdict(rows: list[Row]) -> str:
    """One sentence per comparison: what is how many times as fast as what."""
    said = [str(row["verdict"]) for row in rows if row.get("verdict")]
    for row in rows:
        if "speedup" in row and not row.get("verdict"):
            beside = row.get("baseline", "its baseline")
            said.append(f"{row['case']} is {row['speedup']:.2f} times as fast as {beside}")
    return "; ".join(said) if said else "no comparison among these cases"


def run(recipe: BenchRecipe) -> None:
    """Take the measurements that `recipe` names, or work on results that are there (UserError)."""
    if recipe.cases and recipe.cases[0] in ("compare", "plot", "tables"):
        work_on_results(recipe.cases[0], [Path(name) for name in recipe.cases[1:]], recipe)
        return
    from geopose_dist.bench import machine, quick

    keep_to(recipe.threads)
    known = collect()
    shards = recipe.data.shards or recipe.run.data.shards or None
    training = recipe.run if recipe.of_training else None
    names = chosen(recipe.cases, known, shards, training)
    offered = {"repeats": recipe.repeats, "shards": shards, "recipe": recipe, "run": training}
    commit, changed = machine.commit()
    rows: list[Row] = []
    failed: list[str] = []
    facts: dict[str, Any] = {
        "results": rows,
        "failed": failed,
        "verdict": "",
        "machine": machine.describe(),
        "commit": commit,
        "changed_since_commit": changed,
        "command": shlex.join(["geopose", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "repeats": recipe.repeats,
        "threads": recipe.threads,
        "spread_is": "interval of the median",
    }
    with quick.sizes(known[name] for name in names) if recipe.quick else contextlib.nullcontext():
        for name in names:
            print(f"bench: {name} ...", file=sys.stderr, flush=True)
            began = time.monotonic()
            try:
                for row in rows_of(name, known[name], offered):
                    rows.append(row)
                    save(recipe.json, facts)
                    if recipe.quick:
                        quick.check_sane(row)
            except FinishedWithFailures as error:
                failed.append(f"{name}: {error}")
                save(recipe.json, facts)
            print(f"bench: {name} took {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    _print_table(rows, facts)
    if failed:
        raise FinishedWithFailures("\n  ".join([f"{len(failed)} of {len(names)} cases failed:", *failed]))


def save(path: Path | None, facts: dict[str, Any]) -> None:
    """Write what is known so far, whole."""
    facts["verdict"] = verdict(facts["results"])
    if path is not None:
        files.write_bytes(path, (json.dumps(facts, indent=1, default=_plain) + "\n").encode())


def work_on_results(what: str, names: list[Path], recipe: BenchRecipe) -> None:
    """`compare`, `plot` or `tables` over files of results."""
    from geopose_dist.bench import compare, plot, tables

    if what == "plot":
        plot.run(names, recipe.out, recipe.format)
    elif what == "tables":
        if names:
            raise UserError(f"bench tables takes no files, got {names[0]}; --page names the page")
        tables.run(recipe.page, recipe.check)
    else:
        rows = compare.run(names)
        if recipe.json is not None:
            files.write_bytes(recipe.json, (json.dumps({"results": rows}, indent=1) + "\n").encode())
        if recipe.check:
            compare.must_agree(rows)


def _plain(value: object) -> object:
    """NumPy numbers and paths as JSON knows them."""
    return value.item() if hasattr(value, "item") else str(value)


def _print_table(rows: list[Row], facts: Mapping[str, Any]) -> None:
    """A table for each kind of case, then what it was taken with and the verdict."""
    from rich.console import Console

    # A log file is no terminal, and a number cut to fit is no number.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    for _, alike in itertools.groupby(rows, key=lambda row: str(row["case"]).partition(",")[0]):
        _print_rows(console, list(alike))
    cpu, cores = facts["machine"]["cpu"], facts["machine"]["cores"]
    console.print(f"{cpu}, {cores} cores; {facts['date']}; commit {facts['commit'][:12]}", markup=False)
    console.print(facts["verdict"].replace("; ", "\n"), markup=False)


def _print_rows(console: Any, rows: list[Row]) -> None:
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key in row if key != "verdict"))
    alike = shared_facts(rows)
    columns = [column for column in columns if column not in alike]
    table = Table()
    for column in columns:
        numbers = all(isinstance(row.get(column, 0), int | float) for row in rows)
        table.add_column(column, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(_shown(row.get(column, "")) for column in columns))
    if alike:
        console.print(", ".join(f"{name} {_shown(value)}" for name, value in alike.items()), markup=False)
    console.print(table)


def shared_facts(rows: list[Row]) -> Row:
    """What all of several rows say alike, told once above the table; measured values stay in it."""
    if len(rows) < 2:
        return {}
    return {
        name: value
        for name, value in rows[0].items()
        if not isinstance(value, float) and name not in ("case", "verdict")
        if all(name in row and row[name] == value for row in rows)
    }


def _shown(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
