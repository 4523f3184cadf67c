"""Ranks, devices and the request to stop, under one vocabulary.

A `World` is what torchrun's environment says (rank, world size, local rank) and the device of this rank.
Alone, without torchrun, it is a world of one and no process group exists. Control values (stop requests,
the clock) travel in a gloo group on the CPU, so agreeing on them never waits for a GPU.
"""

from __future__ import annotations

import datetime
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from geopose_dist.errors import AGAIN_FILE, LostPeer, UserError
from geopose_dist.meeting import Meeting

TIMEOUT_S = 600.0
"""How long a collective may wait for a lost peer, if nothing else is asked for."""
MEETING_TIMEOUT = datetime.timedelta(minutes=10)
"""How long ranks may take to find each other: hosts start at different times."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""Signals that ask for a save and exit code 75; the second is what batch systems send before a time limit."""

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class World:
    """This process's place among the ranks.

    Attributes:
        rank: 0 .. size - 1.
        size: number of ranks in all (torchrun's WORLD_SIZE).
        local_rank: number on this host.
        local_size: ranks on this host.
        device: where this rank computes.
        control: gloo group for values on the CPU; None in a world of one.
        store: small strings that outlive a broken group, for telling who is lost; None in a world of one.
        hosts: name of each rank's machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    control: Any = None
    store: Any = None
    hosts: tuple[str, ...] = ()

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def names(self, ranks: Sequence[int]) -> str:
        """`rank 3`, `ranks 0-2, 5`; with the machine of each, `ranks 0-7 on a, 8 on b`, if there are several."""
        several = len(set(self.hosts)) > 1
        spans: list[list[int]] = []
        for rank in ranks:
            if (
                spans
                and rank == spans[-1][-1] + 1
                and (not several or self.hosts[rank] == self.hosts[rank - 1])
            ):
                spans[-1].append(rank)
            else:
                spans.append([rank])
        text = ", ".join(
            (str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}")
            + (f" on {self.hosts[span[0]]}" if several else "")
            for span in spans
        )
        return f"rank{'s' if len(ranks) > 1 else ''} {text}"

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` over ranks, in place, by the group of the tensor's own device."""
        if self.size > 1:
            dist.all_reduce(values, group=self.control if values.device.type == "cpu" else None)
        return values

    def gather(self, values: Tensor) -> list[Tensor]:
        """CPU tensors of one shape from all ranks, in the order of ranks."""
        if self.size == 1:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values, group=self.control)
        return gathered

    def gather_objects(self, value: Any) -> list[Any]:
        """Small picklable values from all ranks of this job, in the order of ranks."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.control)
        return gathered

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def on_first(self, check: Callable[[], None]) -> None:
        """Let rank 0 `check` what only it can see; what it finds wrong is every rank's UserError."""
        wrong = ""
        if self.is_first:
            try:
                check()
            except UserError as error:
                wrong = str(error)
        found = self.gather_objects(wrong)[0]
        if found:
            raise UserError(found)


@contextmanager
def join_world(
    device: Device,
    timeout_s: float = TIMEOUT_S,
    *,
    prepare: Callable[[Meeting], None] = lambda _: None,
    stopped: Callable[[], str] = lambda: "",
) -> Iterator[World]:
    """Join the ranks that torchrun started, or be a world of one; leaves the process group at the end.

    `timeout_s` is how long a collective waits for a rank that does not come. `prepare` is what every rank does
    before there is a group, when nothing times out yet; `stopped` says there why this process was asked to stop.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif size > 1 or "OMP_NUM_THREADS" not in os.environ:
        # torchrun sets one thread per rank whatever the number of cores; share what this host really has.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_size))
    if size == 1:
        prepare(Meeting(rank, size, stopped=stopped))
        yield World(rank, size, local_rank, local_size, chosen)
        return
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    with _finding(rank, MEETING_TIMEOUT.total_seconds()):
        store, _, _ = next(rendezvous("env://", rank, size, timeout=MEETING_TIMEOUT))
    prepare(Meeting(rank, size, PrefixStore("meeting", store), timeout_s, stopped))
    try:
        with _finding(rank, timeout_s):
            dist.init_process_group(
                backend,
                store=PrefixStore("group", store),
                rank=rank,
                world_size=size,
                timeout=timeout,
                device_id=chosen if backend == "nccl" else None,
            )
            control = (
                dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else dist.group.WORLD
            )
            kept = PrefixStore("geopose", store)
            world = World(rank, size, local_rank, local_size, chosen, control, kept)
            hosts = tuple(world.gather_objects(platform.node()))
        yield replace(world, hosts=hosts)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _finding(rank: int, wait_s: float) -> Iterator[None]:
    """Turn what torch says of ranks that do not come into a sentence (LostPeer)."""
    began = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        waited_s = time.monotonic() - began
        raise LostPeer(
            f"rank {rank} on {platform.node()} did not find the other ranks in {waited_s:.0f} s (at most "
            f"{wait_s:.0f}): {str(error).splitlines()[0]}; run the same command again"
        ) from error


def note_again() -> None:
    """Tell torchrun's agent that running the same command again makes sense: something was trained, or saved."""
    if AGAIN_FILE in os.environ:
        Path(os.environ[AGAIN_FILE]).touch()


def choose_device(device: Device, local_rank: int = 0) -> torch.device:
    """The device of a local rank; asking for a GPU that is not there is a UserError."""
    count = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cpu" or (device == "auto" and count == 0):
        return torch.device("cpu")
    if local_rank >= count:
        raise UserError(
            f"local rank {local_rank} wants GPU {local_rank}, and this host has {count}; start at most {count} "
            "ranks per host, or set --device cpu"
        )
    return torch.device("cuda", local_rank)


class StopRequest:
    """Remembers that a signal asked this process to stop; the loop asks once a step.

    Used as a context manager around the work: the former handlers come back at its end. Under torchrun, the end of
    its agent asks as well: a rank that nobody watches would go on beside those that are started in its place.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._former: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    @property
    def reason(self) -> str:
        """What asked; empty if nothing did."""
        if not self.signal_name and self._agent is not None and os.getppid() != self._agent:
            self.signal_name = f"the end of torchrun on {platform.node()}"
        return self.signal_name

    def __bool__(self) -> bool:
        return bool(self.reason)
