"""Shared memory for micro-batches, written by workers, read by the training process, and used again and again.

Fresh shared memory costs its pages: 3 ms of the kernel's time for the 5 MB of a tile of 1024 px, a third of all
that a worker does. So a loader owns a ring of slots. A slot's number goes out with a list of requests; the
worker writes its batch there and sends back shapes; the slot is free again when the last tensor over it is gone,
however long that is kept. Where no slot is free, or a batch is too large, it travels in memory of its own.
"""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
import weakref
from collections import deque
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from geopose_dist.data.batch import Batch, pixels_in

SHARED_MEMORY = "/dev/shm"
_TOKENS = itertools.count()
_RINGS: weakref.WeakValueDictionary[int, Ring] = weakref.WeakValueDictionary()

Bytes = npt.NDArray[np.uint8]


class Ring:
    """Slots of equal size in a nameless file of shared memory; pickled to a worker, it is the same memory.

    Attributes:
        token: tells the rings of a process apart.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        folder = SHARED_MEMORY if os.path.isdir(SHARED_MEMORY) else None
        slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(slots * slot_bytes)
            if hasattr(os, "posix_fallocate"):
                # Reserved now: a hole that cannot be filled later would kill whoever writes there (SIGBUS).
                os.posix_fallocate(file.fileno(), 0, slots * slot_bytes)
            self._map(os.dup(file.fileno()), slots, slot_bytes)
        self.token = next(_TOKENS)
        self._free: deque[int] = deque(range(slots))
        _RINGS[self.token] = self

    def _map(self, descriptor: int, slots: int, slot_bytes: int) -> None:
        self._descriptor = descriptor
        self._slots: Bytes = np.frombuffer(mmap.mmap(descriptor, slots * slot_bytes), np.uint8)
        self._slots = self._slots.reshape(slots, slot_bytes)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (DupFd(self._descriptor), self._slots.shape, self.token)

    def lend(self) -> int | None:
        """A free slot, the one used last if possible: it is still in the cache. None: all are in use."""
        try:
            return self._free.pop()
        except IndexError:
            return None

    def give_back(self, slot: int) -> None:
        """The slot is free again."""
        self._free.append(slot)

    def free_slots(self) -> int:
        """How many slots nobody uses."""
        return len(self._free)

    def room(self, slot: int) -> Bytes:
        """The memory of a slot, uint8 [slot_bytes]."""
        memory: Bytes = self._slots[slot]
        return memory

    def parked(self, slot: int, batch: Batch) -> Parked:
        """In a worker: what to send for a batch that may lie in the slot."""
        return Parked(self.token, slot, batch, batch.rgb.data_ptr() == self.room(slot).ctypes.data)

    def batch_at(self, slot: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """In the training process: the pixels in a slot, which is given back when the last of them is gone."""
        owner = self._slots[slot]
        weakref.finalize(owner, self._free.append, slot).atexit = False
        # The tensors share one storage, and that keeps `owner`; an array over it would keep its base only.
        memory = torch.from_numpy(owner)
        return pixels_in(memory, shape[0], shape[2], shape[3])


def _attach(descriptor: Any, shape: tuple[int, int], token: int) -> Ring:
    ring = Ring.__new__(Ring)
    ring._map(descriptor.detach(), *shape)
    ring.token = token
    return ring


@dataclass(frozen=True)
class Parked:
    """A batch on its way from a worker; unpickled, it is a `Batch`.

    Attributes:
        token, slot: which ring and slot were lent for it.
        placed: whether it lies there; if not, it brings its own memory.
    """

    token: int
    slot: int
    batch: Batch
    placed: bool

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.placed:
            return _arrived, (self.token, self.slot, self.batch)
        return _unpark, (self.token, self.slot, tuple(self.batch.rgb.shape), self.batch.small())


def _arrived(token: int, slot: int, batch: Batch) -> Batch:
    _RINGS[token].give_back(slot)
    return batch


def _unpark(token: int, slot: int, shape: tuple[int, ...], small: tuple[Any, ...]) -> Batch:
    return Batch.of(*_RINGS[token].batch_at(slot, shape), *small)
