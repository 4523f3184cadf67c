"""`geopose doctor --distributed`: ranks and their machines side by side, before a training is started on them.

Under torchrun with the training's own recipe and options. First what needs no process group (train/preflight:
versions, recipe, shards; here also reading, shared memory and disks): if ranks differ or a machine lacks
something, the table shows all of it and the command ends with 2, naming rank, host and both values. Then the
exchange between ranks and their clocks are measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from geopose_dist import files
from geopose_dist.errors import FoundProblems
from geopose_dist.meeting import Meeting
from geopose_dist.runtime import StopRequest, World, join_world
from geopose_dist.train import preflight, probes
from geopose_dist.train.preflight import Facts
from geopose_dist.train.recipe import TrainRecipe

MUCH_SKEW_S = 1.0
"""Clocks further apart than this confuse who compares times of files or logs; stores refuse from 15 minutes on."""


class Preflight:
    """One look at all ranks.

    Attributes:
        rows: facts of each rank, on rank 0. problems: sentences that name rank and host.
    """

    def __init__(self, recipe: TrainRecipe, out: str | None) -> None:
        self.recipe, self.out = recipe, out
        self.rows: list[Facts] = []
        self.problems: list[str] = []
        self.measured: dict[str, Any] = {}

    def prepare(self, meeting: Meeting) -> None:
        """What needs no process group; a UserError on all ranks if something is wrong."""
        own: Facts = {}

        def look() -> Facts | None:
            own.update(preflight.facts(self.recipe))
            return own if meeting.rank == 0 else None

        first = meeting.agree("looking at recipe and shards", look, lambda said: said[0])
        meeting.agree(
            "reading", lambda: self._full(own, first, meeting), lambda said: self._judge(meeting, said)
        )

    def _full(self, own: Facts, first: Facts, meeting: Meeting) -> Facts:
        free, lacking = probes.disks(self.recipe, writes_checkpoints=meeting.rank == 0)
        told = preflight.differences(own, first, meeting.host_of(0)) + preflight.lacks(own)
        told += preflight.small_shm(own, self.recipe) + lacking
        reading = probes.read_speed(self.recipe)
        return {**own, "recipe": {}, "disks": free, "reading": reading, "problems": told}

    def _judge(self, meeting: Meeting, said: list[Facts]) -> None:
        self.rows = said
        self.problems = preflight.named(meeting, [row["problems"] for row in said])
        if self.problems:
            self.show()
            raise FoundProblems("these ranks cannot train together:", self.problems)

    def measure(self, world: World) -> None:
        """What needs the process group."""
        reduced, skews = probes.all_reduce(world), probes.clock_skew_s(world)
        self.measured = {
            "ranks": world.size,
            "device": world.device.type,
            "all_reduce": reduced,
            "clock_skew_s": skews,
        }
        if world.is_first:
            self.show()

    def show(self) -> None:
        """The table, or JSON where that is wanted; rank 0 only."""
        facts = {"ranks": self.rows, "measured": self.measured, "problems": self.problems}
        text = json.dumps(facts, indent=1) + "\n"
        if self.out == "-":
            sys.stdout.write(text)
            return
        if self.out is not None:
            files.write_bytes(Path(self.out), text.encode())
        self._print_table()
        for line in self._sentences():
            print(line)

    def _sentences(self) -> list[str]:
        told = ["on rank 0: " + ", ".join(f"{name} {is_}" for name, is_ in self.rows[0]["versions"].items())]
        reduced, skews = self.measured.get("all_reduce"), self.measured.get("clock_skew_s", [])
        if reduced:
            told.append(
                f"all-reduce over {self.measured['ranks']} ranks ({self.measured['device']}): "
                f"{reduced['latency_us']:.0f} us for 4 bytes, {reduced['bus_gb_per_s']:.2f} GB/s for "
                f"{reduced['mb']:.0f} MB"
            )
        far = max(range(len(skews)), key=lambda rank: abs(skews[rank]), default=0)
        if skews and abs(skews[far]) > MUCH_SKEW_S:
            told.append(
                f"warning: the clock of rank {far} on {self.rows[far]['host']} is {skews[far]:+.1f} s off rank 0's on "
                f"{self.rows[0]['host']}; let both follow one time server"
            )
        return told if self.problems else [*told, "nothing is wrong"]

    def _print_table(self) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None)
        for column in (
            "rank", "host", "torch", "shards", "read MB/s", "shm GiB", "files", "out GB", "cache GB", "clock ms"
        ):  # fmt: skip
            table.add_column(column, justify="left" if column in ("host", "torch", "shards") else "right")
        skews = self.measured.get("clock_skew_s")
        for rank, row in enumerate(self.rows):
            first = {"torch": self.rows[0]["versions"]["torch"], "shards": _shards(self.rows[0])}
            cells = {"torch": row["versions"]["torch"], "shards": _shards(row)}
            marked = [f"[red]{cells[name]}" if cells[name] != first[name] else cells[name] for name in cells]
            table.add_row(
                str(rank),
                row["host"],
                *marked,
                _number(row["reading"].get("mb_per_s"), ".0f"),
                _number(row["shm_bytes"], ".2f", 2**30),
                str(row["open_files"]),
                _number(row["disks"]["out_gb"], ".1f"),
                _number(row["disks"].get("cache_gb"), ".1f"),
                _number(skews[rank] if skews else None, "+.1f", 1e-3),
                style="red" if row["problems"] else None,
            )
        Console(width=None if sys.stdout.isatty() else 140).print(table)


def _shards(row: Facts) -> str:
    return next(iter(row["shards"].values()), "-")[:8]


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else format(value / unit, form)


def run(recipe: TrainRecipe, out: str | None) -> None:
    """Look, measure and tell, on every rank that torchrun started (UserError: something is wrong)."""
    look = Preflight(recipe, out)
    with (
        StopRequest() as stop,
        join_world(
            recipe.device, recipe.timeout_s, prepare=look.prepare, stopped=lambda: stop.reason
        ) as world,
    ):
        look.measure(world)
        world.barrier()  # rank 0 holds the store of those who still measure
