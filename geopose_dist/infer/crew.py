"""The actors of a run: where they run, how many, and what each of them may use.

One actor per GPU, or without a GPU one for every two cores. The threads of an actor's arithmetic depend on
the machine and the recipe, never on how much is left to do: a run that goes on rounds as the first one did.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, Protocol

from geopose_dist import pool
from geopose_dist.errors import UserError
from geopose_dist.infer.dispatch import Dispatch
from geopose_dist.infer.recipe import PredictRecipe


class Spec(Protocol):
    """A frozen dataclass that makes an actor's worker when it is called with the number of its GPU."""

    @property
    def device(self) -> str:
        """auto, cpu or cuda."""
        ...

    def __call__(self, gpu: int) -> Any:
        """The worker."""
        ...


@dataclass(frozen=True)
class Crew:
    """Actors at work.

    Attributes:
        work: gives them items, which have `parts()`.
        where: what they are, in words.
    """

    work: Dispatch
    where: str


def device_of(recipe: PredictRecipe) -> str:
    """cpu or cuda; auto where the machines of a cluster decide."""
    if recipe.device != "auto":
        return recipe.device
    if recipe.ray_address:
        return "auto"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def open_crew(recipe: PredictRecipe, spec: Spec, items: int) -> Iterator[Crew]:
    """Actors for `items` items, ended with the block; `spec` has `device` and `threads` to be settled."""
    dispatch = recipe.dispatch
    if dispatch == "ray" and not pool.ray_is_installed():
        print("predict: Ray is not installed; plain processes do the same work", file=sys.stderr)
        dispatch = "process"
    if dispatch == "inline":
        print(
            "predict: one actor in this process (--dispatch inline), which is for debugging", file=sys.stderr
        )
    cores = max(pool.usable_cores(), recipe.workers * max(1, recipe.threads))
    use_gpus = spec.device != "cpu"
    with pool.Actors(dispatch, address=recipe.ray_address, cpus=cores, use_gpus=use_gpus) as actors:
        settled, threads, count, gpus = _share(recipe, spec, actors, items)
        work = Dispatch(
            actors,
            settled,
            count=count,
            cpus=threads,
            gpus=gpus,
            attempts=recipe.attempts,
            timeout_s=recipe.item_timeout_s,
            split=methodcaller("parts"),
        )
        yield Crew(work, f"{count} {dispatch} actor{'s' * (count != 1)} on {'GPU' if gpus else 'CPU'}")


def _share(recipe: PredictRecipe, spec: Spec, actors: pool.Actors, items: int) -> tuple[Spec, int, int, int]:
    """The specification with device and threads settled, threads and number of actors, GPUs of each."""
    device = spec.device if spec.device != "auto" else ("cuda" if actors.gpus else "cpu")
    if device == "cuda" and not actors.gpus:
        raise UserError("--device cuda: there is no GPU here; use --device cpu")
    count = recipe.workers or (actors.gpus if device == "cuda" else max(1, actors.cpus // 2))
    if actors.kind == "inline":
        count = 1
    threads = recipe.threads or max(1, actors.cpus // count)
    if device == "cuda":
        count = min(count, actors.gpus)
    settled: Spec = dataclasses.replace(spec, device=device, threads=threads)  # type: ignore[type-var]
    return settled, threads, max(1, min(count, items)), int(device == "cuda")
