"""The actors of a run: where they run, how many, and what each of them may use.

One actor per GPU, or without a GPU one for every two cores. The threads of an actor's arithmetic depend on
the machine and the recipe, never on how much is left to do: a run that goes on rounds as the first one did.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, Protocol

from geopose_dist import pool
from geopose_dist.errors import Preempted, UserError
from geopose_dist.infer.dispatch import Dispatch
from geopose_dist.infer.recipe import PredictRecipe
from geopose_dist.runtime import STOP_SIGNALS


class Spec(Protocol):
    """A frozen dataclass that makes an actor's worker when it is called with the number of its GPU."""

    @property
    def device(self) -> str:
        """auto, cpu or cuda."""
        ...

    @property
    def in_flight(self) -> int:
        """Items that an actor is given at a time."""
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
    with open_actors(recipe, spec) as actors:
        settled, threads, count, gpus = _share(recipe, spec, actors, items)
        work = Dispatch(
            actors,
            settled,
            count=count,
            cpus=threads,
            gpus=gpus,
            in_flight=settled.in_flight,
            attempts=recipe.attempts,
            timeout_s=recipe.item_timeout_s,
            split=methodcaller("parts"),
        )
        with stoppable():  # Ray's own handler came with the actors
            yield Crew(work, f"{count} {actors.kind} actor{'s' * (count != 1)} on {'GPU' if gpus else 'CPU'}")


def open_actors(recipe: PredictRecipe, spec: Spec) -> pool.Actors:
    """Where actors can be started; around several crews it keeps Ray up."""
    dispatch = recipe.dispatch
    if dispatch == "ray" and not pool.ray_is_installed():
        print("predict: Ray is not installed; plain processes do the same work", file=sys.stderr)
        dispatch = "process"
    if dispatch == "inline":
        print(
            "predict: one actor in this process (--dispatch inline), which is for debugging", file=sys.stderr
        )
    cores = max(pool.usable_cores(), recipe.workers * max(1, recipe.threads))
    return pool.Actors(dispatch, address=recipe.ray_address, cpus=cores, use_gpus=spec.device != "cpu")


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let a batch system's signal end the block by Preempted, so that actors are ended and the exit code is 75."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        for one in STOP_SIGNALS:
            signal.signal(one, signal.SIG_IGN)  # the actors are being ended already
        raise Preempted(
            f"stopped by {signal.Signals(number).name}; what is finished is kept; run the same command again to go on"
        )

    before = {one: signal.signal(one, stop) for one in STOP_SIGNALS}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


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
