"""`geopose bench CASES...`: run named measurements and say what they were taken with.

A case is a function in some `bench/cases_*.py`, listed there in `CASES` by its name; it gets those of
`repeats`, `shards`, `run` (a training recipe) and `recipe` (all of it) that it asks for and returns one row
or several: dicts with `case`, `tiles_per_s` and `spread`, or whatever unit it measures, and `baseline` and
`speedup` where it stands beside one. The harness keeps libraries to one thread (the quantity that scales),
prints a table, writes the JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import gc
import importlib
import inspect
import json
import os
import pkgutil
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from geopose_dist import config, files
from geopose_dist.errors import UserError
from geopose_dist.train.recipe import TrainRecipe

Row = dict[str, Any]
Case = Callable[..., Any]

BY_NAME_ONLY = ("accuracy", "enlarge", "scaling")
"""Cases that take long and want more than defaults: run when they are named."""

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS")


@dataclass(frozen=True)
class BenchData:
    """What the cases read."""

    shards: str | None = None
    """Folder or URL of shards, for the cases that read them."""
    checkpoint: str = ""
    """Run folder or .safetensors file, for enlarge."""
    tiles: str = ""
    """Labelled tiles that the checkpoint has not seen, for enlarge."""


@dataclass(frozen=True)
class ScalingRecipe:
    """The cluster that scaling predicts."""

    ranks: int = 0
    """Most ranks measured on this machine; 0: one per GPU, or two without any."""
    predict: tuple[int, ...] = (8, 64, 512, 4096)
    """Numbers of ranks (GPUs) to predict."""
    network_gbit: float = 400.0
    """Bandwidth of a node's link, gigabits per second."""
    latency_us: float = 5.0
    """Latency of a message between nodes, microseconds."""
    gpus_per_node: int = 8
    """Ranks that share a node and its link."""
    price_per_node_hour: float = 0.0
    """Price of a node for an hour, in any currency; 0: no costs are told."""

    def __post_init__(self) -> None:
        if self.ranks < 0 or self.gpus_per_node < 1 or not all(ranks > 0 for ranks in self.predict):
            raise ValueError(
                f"scaling.ranks is {self.ranks}, gpus_per_node {self.gpus_per_node}, predict {list(self.predict)}; "
                "wanted positive numbers (0 ranks: as many as there are)"
            )
        if not (self.network_gbit > 0 and self.latency_us >= 0 and self.price_per_node_hour >= 0):
            raise ValueError(
                f"scaling.network_gbit is {self.network_gbit}, latency_us {self.latency_us}, price_per_node_hour "
                f"{self.price_per_node_hour}; wanted a bandwidth above 0, and neither of the others negative"
            )


@dataclass(frozen=True)
class AccuracyRecipe:
    """The runs that accuracy compares."""

    recipes: tuple[str, ...] = ()
    """Training recipes, such as [train/base, train/benchmark]."""
    overlay: str = ""
    """Recipe laid over each of them, such as hardware/cpu."""
    options: tuple[str, ...] = ()
    """Further words for each `geopose train`."""
    length: str = "750 steps"
    """Length of each run."""
    seeds: int = 3
    """Runs of each recipe, with the seeds 0, 1, ..."""
    source: str = ""
    """Tiles to predict, of places that training never saw."""
    truth: str = ""
    """Folder of their true heights and poses."""
    work: str = "runs/accuracy"
    """Folder for the runs; those that are finished are not run again."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"accuracy.seeds is {self.seeds}; wanted at least 1")


@dataclass(frozen=True)
class BenchRecipe:
    """Which measurements to take."""

    cases: list[str] = field(default_factory=list)
    """Names of the cases, as words before the first option; none: all that can run. Instead of cases:
    `compare A.json B.json`, `plot A.json ... --out FIGURE.png`, `tables [--check]` (of PERFORMANCE.md)."""
    json: Path | None = None
    """File for the results with machine, commit, command and date."""
    repeats: int = 5
    """How often each quantity is measured; the median is told, and the spread beside it."""
    threads: int = 1
    """Threads of each library inside a process; 0 leaves them as they are."""
    data: BenchData = field(default_factory=BenchData)
    """What the cases read."""
    run: TrainRecipe = field(default_factory=TrainRecipe)
    """The training recipe that epoch and step measure; --config train/base lays it here."""
    steps: int = 10
    """Optimiser steps of one measurement of epoch and step."""
    scaling: ScalingRecipe = field(default_factory=ScalingRecipe)
    """The cluster that scaling predicts."""
    accuracy: AccuracyRecipe = field(default_factory=AccuracyRecipe)
    """The runs that accuracy compares."""
    tiles: int = 5923
    """Tiles of the epoch whose length is told; the challenge's training set has 5,923."""
    out: Path | None = None
    """Figure that plot draws: .png, .pdf or .svg."""
    page: Path = Path("PERFORMANCE.md")
    """Page whose tables are made by tables."""
    check: bool = False
    """With tables: change nothing, and fail if the page says something else than the results."""
    of_training: bool = False
    """Set by a training recipe given as --config."""

    ALIASES: ClassVar[Mapping[str, str]] = {"shards": "data.shards"}

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"--repeats is {self.repeats}; wanted at least 1")
        if self.threads < 0:
            raise ValueError(f"--threads is {self.threads}; wanted 0 (as they are) or more")
        if self.steps < 1 or self.tiles < 1:
            raise ValueError(f"--steps is {self.steps}, --tiles {self.tiles}; wanted at least 1 of each")

    @staticmethod
    def adapt_config(path: Path) -> str:
        """A training recipe becomes the `run` of the benchmark; a file of the benchmark's own stays."""
        text, values = config.read_file(path)
        own = {f.name for f in dataclasses.fields(BenchRecipe)} - {"data"}
        if not isinstance(values, dict) or own & values.keys():
            return text
        return yaml.safe_dump({"run": values, "of_training": True})


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over repeats, and the spread as a share of it.

    The spread is half the distance between the quartiles (below four repeats: half the range) over it.
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
    median = statistics.median(seconds)
    if len(seconds) >= 4:
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    else:
        low, high = min(seconds), max(seconds)
    return Timing(median, (high - low) / 2 / median if median > 0 else 0.0)


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


def rows_of(name: str, case: Case, offered: Mapping[str, object]) -> list[Row]:
    """Run one case with the arguments that it asks for; every row names its case."""
    wanted = inspect.signature(case).parameters
    result = case(**{key: value for key, value in offered.items() if key in wanted})
    rows = [result] if isinstance(result, Mapping) else list(result)
    return [{"case": name, **row} for row in rows]


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
    from geopose_dist.bench import machine

    keep_to(recipe.threads)
    known = collect()
    shards = recipe.data.shards or recipe.run.data.shards or None
    training = recipe.run if recipe.of_training else None
    names = chosen(recipe.cases, known, shards, training)
    offered = {"repeats": recipe.repeats, "shards": shards, "recipe": recipe, "run": training}
    rows: list[Row] = []
    for name in names:
        print(f"bench: {name} ...", file=sys.stderr, flush=True)
        rows += rows_of(name, known[name], offered)
    commit, changed = machine.commit()
    facts = {
        "results": rows,
        "verdict": verdict(rows),
        "machine": machine.describe(),
        "commit": commit,
        "changed_since_commit": changed,
        "command": shlex.join(["geopose", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "repeats": recipe.repeats,
        "threads": recipe.threads,
    }
    if recipe.json is not None:
        files.write_bytes(recipe.json, (json.dumps(facts, indent=1, default=_plain) + "\n").encode())
    _print_table(rows, facts)


def work_on_results(what: str, names: list[Path], recipe: BenchRecipe) -> None:
    """`compare`, `plot` or `tables` over files of results."""
    from geopose_dist.bench import compare, plot, tables

    if what == "plot":
        plot.run(names, recipe.out)
    elif what == "tables":
        if names:
            raise UserError(f"bench tables takes no files, got {names[0]}; --page names the page")
        tables.run(recipe.page, recipe.check)
    else:
        rows = compare.run(names)
        if recipe.json is not None:
            files.write_bytes(recipe.json, (json.dumps({"results": rows}, indent=1) + "\n").encode())


def _plain(value: object) -> object:
    """NumPy numbers and paths as JSON knows them."""
    return value.item() if hasattr(value, "item") else str(value)


def _print_table(rows: list[Row], facts: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key in row if key != "verdict"))
    alike = shared_facts(rows)
    columns = [column for column in columns if column not in alike]
    cpu, cores = facts["machine"]["cpu"], facts["machine"]["cores"]
    table = Table(caption=f"{cpu}, {cores} cores; {facts['date']}; commit {facts['commit'][:12]}")
    for column in columns:
        numbers = all(isinstance(row.get(column, 0), int | float) for row in rows)
        table.add_column(column, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(_shown(row.get(column, "")) for column in columns))
    # A log file is no terminal, and a number cut to fit is no number.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    if alike:
        console.print(", ".join(f"{name} {_shown(value)}" for name, value in alike.items()), markup=False)
    console.print(table)
    console.print(facts["verdict"], markup=False)


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
    return f"{value:.4g}" if isinstance(value, float) else str(value)
