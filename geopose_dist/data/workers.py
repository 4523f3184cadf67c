"""Loader processes: how many, whether their batches fit into shared memory, and how they start.

They come from a fork server that has torch already imported: a fork of a process with CUDA, NCCL or Ray
threads is unsafe, and a fresh interpreter for each would take seconds. Signals to the run are the parent's to
answer; the server and its workers must not die of a SIGTERM that a batch system sends to all processes.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import signal
from collections.abc import Callable
from multiprocessing.context import BaseContext

import torch

from geopose_dist import pool
from geopose_dist.data.batch import pixel_bytes
from geopose_dist.data.reader import Reader
from geopose_dist.data.recipe import DataRecipe
from geopose_dist.data.ring import SHARED_MEMORY, Ring
from geopose_dist.errors import UserError

MAX_WORKERS = 8
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""


def workers_for(recipe: DataRecipe) -> int:
    """Loader processes of this rank; -1: its share of the cores of this machine, less its own."""
    if recipe.workers >= 0:
        return recipe.workers
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(pool.usable_cores() // local_ranks - 1, MAX_WORKERS))


def slot_bytes(
    reader: Reader, recipe: DataRecipe, samples: int, ships_px: Callable[[int, int], tuple[int, int]] | None
) -> int:
    """Bytes of a batch of `samples`; 0 if no tile can be read that would tell.

    `ships_px` says how much of a tile is shipped where the device augments; None: the crop or the tile.
    """
    if recipe.crop_px and ships_px is None:
        return pixel_bytes(samples, recipe.crop_px, recipe.crop_px)
    for index in range(min(len(reader), 16)):
        try:
            rows, columns = reader.facts(index).size
        except UserError:  # what to do about damage is the business of whoever asks for that sample
            continue
        return pixel_bytes(samples, *(ships_px(rows, columns) if ships_px else (rows, columns)))
    return 0


def check_shared_memory(slots: int, slot_bytes: int) -> None:
    """Refuse to start where batches in flight would not fit: the kernel would kill a worker much later."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    need = slots * slot_bytes * local_ranks
    stat = os.statvfs(SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else None
    free = stat.f_bavail * stat.f_frsize if stat else need
    if free < need:
        raise UserError(
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, but {local_ranks} rank(s) x {slots} micro-batches "
            f"of {slot_bytes / 2**20:.1f} MiB need {need / 2**20:.0f} MiB; give the container more shared memory "
            "(docker --shm-size, or a medium: Memory volume), or lower data.workers or data.prefetch"
        )


def open_ring(slots: int, slot_bytes: int) -> Ring | None:
    """Memory for `slots` batches, if there are any (UserError: other programs took it since it was checked)."""
    if not slots * slot_bytes:
        return None
    try:
        return Ring(slots, slot_bytes)
    except OSError as error:
        check_shared_memory(slots, slot_bytes)
        raise UserError(
            f"{SHARED_MEMORY}: {slots} micro-batches of {slot_bytes / 2**20:.1f} MiB cannot be kept there "
            f"({error.strerror}); give the container more shared memory, or lower data.workers"
        ) from error


def start_server() -> BaseContext:
    """The context of loader processes; starts their fork server, which imports torch in the background.

    Calling it early in a run hides these two seconds. It inherits the blocked signals, and so do workers.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["geopose_dist.data.samples", "geopose_dist.augment"]
    )
    return pool.fork_server()


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks up to 32 MiB (its maximum) for reuse instead of giving them back.

    A tile of 1024 x 1024 passes through some 12 MB of buffers. Returned to the kernel after each tile and taken
    again page by page, they cost 6 to 7 ms of the 15 ms of CPU time that reading and decoding it took.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 256 << 20)


def start_worker(_: int) -> None:
    """Set up a worker: one thread, memory kept for the next tile, and the parent's signals ignored."""
    keep_freed_memory()
    torch.set_num_threads(1)
    pool.one_thread()
    for number in pool.PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
