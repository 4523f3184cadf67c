"""A process of its own that makes one sample and prints, as JSON, the most memory that took: `SMALL LARGE` folders.

The sample of the small shards goes first, so that code and libraries are loaded; the one of the large shards is then
read, decoded, augmented with everything on, and packed, as a loader worker does it. Two figures: NumPy's own
allocations (tracemalloc, on a second sample) and the growth of the process's resident memory (Linux only).
"""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path

import torch

from geopose_dist.augment import AugmentRecipe, transform_of
from geopose_dist.data.batch import Batch
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.data.recipe import DataRecipe
from geopose_dist.data.samples import Request, Samples

EVERYTHING = AugmentRecipe("strong", heights_p=1.0, rotate_p=1.0, zoom_p=1.0, tone_p=1.0)
MB = 1e6


def made(samples: Samples) -> Batch:
    """The first sample of the shards, as a batch of one."""
    batch = samples.__getitems__([Request(0, 0, 0)])
    assert isinstance(batch, Batch), batch
    return batch


def _status_mb(name: str) -> float:
    """A line of /proc/self/status in megabytes; NaN elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next(
        (int(line.split()[1]) * 1024 / MB for line in lines if line.startswith(f"{name}:")), float("nan")
    )


def main(small: str, large: str) -> dict[str, float]:
    """Most extra memory while a sample is made, in MB; the batch itself counts."""
    torch.set_num_threads(1)
    first, second = (
        Samples(
            Reader(open_shards(folder, "train")), DataRecipe(shards=folder), 0, transform_of(EVERYTHING, None)
        )
        for folder in (small, large)
    )
    made(first)
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text("5")  # forget the highest resident size so far
    before = _status_mb("VmRSS")
    batch = made(second)
    resident = _status_mb("VmHWM") - before
    tracemalloc.start()
    began = tracemalloc.get_traced_memory()[0]
    made(second)
    arrays = (tracemalloc.get_traced_memory()[1] - began) / MB
    return {
        "resident_mb": resident,
        "arrays_mb": arrays,
        "batch_mb": (batch.rgb.nbytes + batch.agl_cm.nbytes) / MB,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
