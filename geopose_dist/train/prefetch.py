"""The next step's batches on their way to the device while this step computes.

On a GPU the copies run on a stream of their own, from page-locked memory, so they cost the step nothing.
On the CPU batches pass through as they are. Looking one step ahead changes no number: which samples a step
holds is a function of the step, and a run that stops leaves the batches ahead unread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from geopose_dist.data.batch import Batch, to_device

Step = list[Batch]


class DevicePrefetch:
    """Takes steps from `loader` and has them on `device`: `take` this step's, `ahead` starts the next.

    Attributes:
        device: where the batches are needed.
    """

    def __init__(self, loader: Iterable[Step], device: torch.device) -> None:
        self.device = device
        self._steps = iter(loader)
        self._ahead: Step | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def take(self) -> Step:
        """Batches of the next step, ready for the current stream; waits for the loader if it must."""
        batches = self._ahead if self._ahead is not None else self._fetch(next(self._steps))
        self._ahead = None
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)  # the device waits, not the host
            for batch in batches:
                for tensor in _tensors(batch).values():
                    tensor.record_stream(current)  # or its memory would be given away while in use
        return batches

    def ahead(self) -> None:
        """Start the copies of the step after this one; call it once this step's work is queued."""
        if self._stream is not None and self._ahead is None:
            following = next(self._steps, None)
            self._ahead = None if following is None else self._fetch(following)

    def _fetch(self, batches: Step) -> Step:
        if self._stream is None:
            return batches
        with torch.cuda.stream(self._stream):
            return [to_device(pinned(batch), self.device) for batch in batches]


def pinned(batch: Batch) -> Batch:
    """The batch with every tensor in page-locked memory: a copy from any other makes the host wait."""
    loose: dict[str, Any] = {
        name: value.pin_memory() for name, value in _tensors(batch).items() if not value.is_pinned()
    }
    return dataclasses.replace(batch, **loose)


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
