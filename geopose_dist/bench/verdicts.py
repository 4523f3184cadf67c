"""What bounds a training run, told from its measured parts; pure arithmetic, no measuring here.

A run overlaps loading and computing, so the slower of the two sets its speed. A loader that is the slower
one is either short of processes (they compute all the time) or waits for bytes (they do not): the share of
time in which its processes used a core tells the two apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BUSY = 0.6
"""Loader processes that use a core for less of the time than this are waiting for bytes."""
EVEN = 0.05
"""Rates this close are equal: what a second run would answer is chance."""


@dataclass(frozen=True)
class Parts:
    """The measured parts of one rank's run; rates in tiles per second.

    Attributes:
        data: the loader alone. compute: the network alone, on a batch that is there already.
        both: end to end.
        wait_share: share of the end-to-end time in which the training process waited for data.
        workers: loader processes; 0 = the training process loads.
        worker_busy: CPU seconds of a loader process over seconds, with the loader alone.
        augment_share: share of a loader process's CPU time that augmentation takes.
        cores: cores that this process may use.
        on_gpu: whether the network computes on a GPU.
    """

    data: float
    compute: float
    both: float
    wait_share: float
    workers: int
    worker_busy: float
    augment_share: float
    cores: int
    on_gpu: bool

    def bound(self) -> str:
        """`compute`, `store`, `workers` or `even`."""
        if self.data > self.compute * (1 + EVEN):
            return "compute"
        if self.worker_busy < BUSY:
            return "store"
        return "even" if self.data > self.compute * (1 - EVEN) else "workers"


def judge(parts: Parts) -> str:
    """One sentence: what bounds the run, by how much, and what would free it."""
    where = "GPU" if parts.on_gpu else "network on the CPU"
    ratio = parts.data / parts.compute
    bound = parts.bound()
    if bound == "compute":
        return (
            f"the {where} bounds this run: the loader alone delivers {ratio:.1f} times what it takes"
            + ("" if parts.on_gpu or not parts.workers else "; both share the same cores")
            + spare(parts)
        )
    if bound == "even":
        return f"loader and {where} are even: neither waits for the other by more than {EVEN:.0%}"
    short = f"delivers {ratio:.0%} of what the {where} takes"
    if bound == "store":
        return (
            f"the store bounds this run: the loader {short}, and its processes use a core only "
            f"{parts.worker_busy:.0%} of the time; stage the shards on a local disk or give data.store a cache; "
            f"{more_workers(parts)} would hide the waiting"
        )
    return f"the loader bounds this run: it {short}; {more_workers(parts)}{device_help(parts)} would free the {where}"


def wanted_workers(parts: Parts) -> int:
    """Loader processes whose delivery equals what the network takes, if each adds as much as those measured."""
    return math.ceil(max(parts.workers, 1) * parts.compute / parts.data)


def more_workers(parts: Parts) -> str:
    """How many more loader processes, and whether this machine has the cores for them."""
    more = wanted_workers(parts) - parts.workers
    words = f"{more} more worker{'' if more == 1 else 's'}"
    free = max(parts.cores - 1 - parts.workers, 0)
    if more > free and parts.worker_busy >= BUSY:
        words += f" (this rank's share of cores has {free} free)"
    return words


def device_help(parts: Parts) -> str:
    """What augmentation on the device would save, where that is worth a word."""
    if not parts.on_gpu or parts.augment_share < 0.2:
        return ""
    return f", or augment.where: device, which takes {parts.augment_share:.0%} of a worker's time away,"


def spare(parts: Parts) -> str:
    """How many loader processes could go, where some could."""
    if parts.workers == 0 or parts.worker_busy < BUSY:
        return ""
    needed = min(wanted_workers(parts), parts.workers)
    return (
        f", and {needed} worker{'' if needed == 1 else 's'} would be enough" if needed < parts.workers else ""
    )
