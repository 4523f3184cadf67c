"""What `geopose bench` may be told: which cases, how often, and what they read; no torch here, so `--help` is quick."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import yaml

from geopose_dist import config
from geopose_dist.bench.submission_recipe import SubmissionRecipe
from geopose_dist.train.recipe import TrainRecipe


@dataclass(frozen=True)
class BenchData:
    """What the cases read."""

    shards: str | None = None
    """Folder or URL of shards, for the cases that read them."""
    checkpoint: str = ""
    """Run folder or .safetensors file, for enlarge and transfer."""
    tiles: str = ""
    """Labelled tiles that the checkpoint has not seen, for enlarge; tiles of known places, for similarity and leak."""
    pictures: str = ""
    """Folder of real orthophotos, KEY_RGB.tif with heights KEY_AGL.tif, for similarity and transfer."""


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
    """How often each quantity is measured; the median is told, and beside it the spread, within which another run
    on the same quiet machine is to be expected (up to eight repeats: half the range over the median)."""
    threads: int = 1
    """Threads of each library inside a process; 0 leaves them as they are."""
    data: BenchData = field(default_factory=BenchData)
    """What the cases read."""
    run: TrainRecipe = field(default_factory=TrainRecipe)
    """The training recipe that epoch and step measure; --config train/base lays it here."""
    steps: int = 10
    """Optimiser steps of one measurement of epoch and step."""
    batches: tuple[int, ...] = ()
    """Further micro-batches in which step measures the recipe."""
    scaling: ScalingRecipe = field(default_factory=ScalingRecipe)
    """The cluster that scaling predicts."""
    accuracy: AccuracyRecipe = field(default_factory=AccuracyRecipe)
    """The runs that accuracy compares."""
    submission: SubmissionRecipe = field(default_factory=SubmissionRecipe)
    """The test set that submission predicts and packs."""
    tiles: int = 5923
    """Tiles of the epoch whose length is told; the challenge's training set has 5,923."""
    out: Path | None = None
    """Figure that plot draws: .png, .pdf or .svg, or a page: .html; with --format a folder."""
    format: Literal["png", "pdf"] | None = None
    """With plot: each figure as a file of its own, fit for a paper."""
    page: Path = Path("PERFORMANCE.md")
    """Page whose tables are made by tables."""
    check: bool = False
    """With tables: change nothing, and fail if the page says something else than the results. With compare: fail
    if a quantity of one file differs from the other's by more than both spreads."""
    quick: bool = False
    """Small sizes: whether outputs are right and ratios sane, in a minute or two; the times mean nothing."""
    of_training: bool = False
    """Set by a training recipe given as --config."""

    ALIASES: ClassVar[Mapping[str, str]] = {"shards": "data.shards"}

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"--repeats is {self.repeats}; wanted at least 1")
        if self.threads < 0:
            raise ValueError(f"--threads is {self.threads}; wanted 0 (as they are) or more")
        if not all(size > 0 for size in self.batches):
            raise ValueError(f"--batches is {list(self.batches)}; wanted numbers of tiles above 0")
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
