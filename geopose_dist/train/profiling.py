"""`--profile`: where the time of steps 5 to 10 of a start goes, as a trace for Perfetto or chrome://tracing.

Steps 1 to 3 (allocations, autotuning) are left alone and step 4 warms the profiler up. Each rank writes
RUN/profile/rank-N.json.gz. Outside these steps, and without the option, nothing is measured.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch

from geopose_dist.runtime import World
from geopose_dist.train.place import local_folder
from geopose_dist.train.recipe import TrainRecipe

FOLDER = "profile"
FIRST_STEP, LAST_STEP = 5, 10


@contextlib.contextmanager
def profiled(recipe: TrainRecipe, world: World) -> Iterator[Callable[[], None]]:
    """Measure the block if the recipe asks; call what it gives after every step."""
    if not recipe.profile:
        yield lambda: None
        return
    path = local_folder(recipe) / FOLDER / f"rank-{world.rank}.json.gz"
    written = False

    def write(profile: torch.profiler.profile) -> None:
        nonlocal written
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(path))
        written = True

    activities = [torch.profiler.ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(
        wait=FIRST_STEP - 2, warmup=1, active=LAST_STEP - FIRST_STEP + 1, repeat=1
    )
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step
    if world.is_first:
        told = f"trace of steps {FIRST_STEP} to {LAST_STEP}: {path}" if written else (
            f"no trace: --profile looks at steps {FIRST_STEP} to {LAST_STEP}, and this start was shorter"
        )  # fmt: skip
        print(told, file=sys.stderr, flush=True)
