"""Whether ranks are alike and their machines fit, asked before there is a process group.

Every start of a training makes these cheap checks; `geopose doctor --distributed` shows them by rank, with what
takes longer (`probes`). Rank 0's facts go to all; each rank says how it differs and what its machine lacks, so the
traffic stays small; rank 0 puts the sentences together, naming rank, host and both values. Ranks whose libraries
differ may not understand each other's collectives, so nothing of those is used.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geopose_dist import __version__, config
from geopose_dist.data import catalogue
from geopose_dist.data.reader import open_shards
from geopose_dist.data.ring import SHARED_MEMORY
from geopose_dist.data.workers import workers_for
from geopose_dist.errors import FoundProblems
from geopose_dist.meeting import Meeting
from geopose_dist.train.checkpoint import flat
from geopose_dist.train.recipe import TrainRecipe

OWN_TO_A_RANK = (
    "data.shards",
    "data.store",
    "data.workers",
    "data.prefetch",
    "check",
    "profile",
    "timeout_s",
)
"""Fields that may differ between machines; shards are compared by what is in them."""
LEAST_OPEN_FILES = 256
"""Shards, sockets and shared memory of a rank with some loader processes take half of it."""
SMALL_SHM_BYTES = 128 << 20
"""Docker's default is 64 MB: too little for batches of real tiles, and NCCL wants some of it, too."""
Facts = dict[str, Any]


def check(recipe: TrainRecipe, meeting: Meeting) -> None:
    """Refuse, on all ranks alike, or tell once, as the recipe says (UserError)."""
    own: Facts = {}

    def look() -> Facts | None:
        own.update(facts(recipe, compare=meeting.size > 1))
        return own if meeting.rank == 0 else None

    first = meeting.agree("looking at recipe and shards", look, lambda said: said[0])

    def judge(said: list[list[str]]) -> list[str]:
        found = named(meeting, said)
        if found and recipe.preflight == "refuse":
            raise FoundProblems(
                "these ranks cannot train together; mend that, or set preflight to warn:", found
            )
        return found

    found = meeting.agree(
        "comparing ranks", lambda: [*differences(own, first, meeting.host_of(0)), *lacks(own)], judge
    )
    for line in found if meeting.rank == 0 else ():
        print(f"preflight: {line}", file=sys.stderr, flush=True)


def named(meeting: Meeting, said: Sequence[Sequence[str]]) -> list[str]:
    """Sentences of all ranks, each once, with the ranks and hosts that said it."""
    by_sentence: dict[str, list[int]] = {}
    for rank, sentences in enumerate(said):
        for sentence in sentences:
            by_sentence.setdefault(sentence, []).append(rank)
    return [f"{meeting.names(ranks)}: {sentence}" for sentence, ranks in by_sentence.items()]


def facts(recipe: TrainRecipe, *, compare: bool = True) -> Facts:
    """What this rank runs and where; with `compare` what it must share with others, too (UserError: its shards)."""
    stat = os.statvfs(SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else None
    return {
        "host": platform.node(),
        "versions": versions(),
        "recipe": own_recipe(recipe) if compare else {},
        "shards": fingerprints(recipe) if compare else {},
        "place": recipe.data.shards,
        "shm_bytes": None if stat is None else stat.f_bavail * stat.f_frsize,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def versions() -> dict[str, str]:
    """Of what must be the same everywhere for the numbers to be."""
    found = {
        "geopose-dist": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "CUDA": torch.version.cuda or "none",
    }
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    with contextlib.suppress(OSError):  # no NVIDIA driver
        found["driver"] = Path("/sys/module/nvidia/version").read_text().strip()
    return found


def own_recipe(recipe: TrainRecipe) -> dict[str, Any]:
    """Fields of the recipe that all ranks must share, flat."""
    return {
        name: value
        for name, value in flat(config.to_dict(recipe)).items()
        if not any(name == own or name.startswith(f"{own}.") for own in OWN_TO_A_RANK)
    }


def fingerprints(recipe: TrainRecipe) -> dict[str, str]:
    """Of the splits that the run reads (UserError, StoreFailure); nothing where no shards are named."""
    data = recipe.data
    if not data.shards:
        return {}
    known = catalogue.read_manifest(data.shards, data.store).splits()
    # A training split that is missing is told when it is opened.
    wanted = [data.train_split] + [data.validation_split] * bool(known.get(data.validation_split))
    return {split: open_shards(data.shards, split, data.store).fingerprint() for split in wanted}


def differences(own: Facts, first: Facts, host: str) -> list[str]:
    """How a rank differs from rank 0, on `host`: a sentence for each thing."""
    there = f"on rank 0 on {host}"
    found = []
    for what in ("versions", "recipe"):
        for name in sorted(own[what].keys() | first[what].keys()):
            mine, other = own[what].get(name, "none"), first[what].get(name, "none")
            if mine != other:
                label = name if what == "versions" else f"{name} of the recipe"
                found.append(f"{label} is {mine}, {there} it is {other}")
    for split in sorted(own["shards"].keys() | first["shards"].keys()):
        mine, other = own["shards"].get(split, "none"), first["shards"].get(split, "none")
        if mine != other:
            found.append(
                f"shards of split {split} are {mine} (in {own['place']}), {there} they are {other} (in "
                f"{first['place']})"
            )
    return found


def lacks(own: Facts) -> list[str]:
    """What a machine has too little of for any run."""
    if own["open_files"] < LEAST_OPEN_FILES:
        return [
            f"a process may open {own['open_files']} files, wanted {LEAST_OPEN_FILES} at least: ulimit -n, or "
            "LimitNOFILE of the service that starts it"
        ]
    return []


def small_shm(own: Facts, recipe: TrainRecipe) -> list[str]:
    """Whether shared memory is as small as Docker's default; what a run needs exactly is checked when it starts."""
    if own["shm_bytes"] is None or own["shm_bytes"] >= SMALL_SHM_BYTES or not workers_for(recipe.data):
        return []
    return [
        f"{SHARED_MEMORY} has {own['shm_bytes'] / 1e6:.0f} MB free, wanted {SMALL_SHM_BYTES / 1e6:.0f} at least: "
        "loader processes hand batches over in it; docker --shm-size, a medium: Memory volume, or data.workers 0"
    ]
