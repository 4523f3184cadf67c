"""Micro-batches of this rank, step after step, by the stock DataLoader of torch.

The main process asks the plan which samples a micro-batch holds and hands the list to a worker (`samples`).
So neither the number of workers nor of ranks can change the order, and starting at step k costs nothing: the
state of a loader is that one integer.
"""

from __future__ import annotations

import atexit
import dataclasses
import multiprocessing.connection
import signal
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from geopose_dist.data import plan as plans
from geopose_dist.data.batch import Batch, Substitution, to_device
from geopose_dist.data.manifest import ShardSet
from geopose_dist.data.plan import Plan
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.data.recipe import DataRecipe
from geopose_dist.data.ring import Ring
from geopose_dist.data.samples import Failure, Request, Requests, Samples, Transform
from geopose_dist.data.workers import (
    check_shared_memory,
    open_ring,
    slot_bytes,
    start_server,
    start_worker,
    workers_for,
)
from geopose_dist.errors import FinishedWithFailures, UserError

__all__ = [
    "Batch",
    "DataRecipe",
    "Substitution",
    "TrainLoader",
    "evaluation_indices",
    "evaluation_loader",
    "open_shards",
    "to_device",
    "train_loader",
]


MAX_HELD = 8
"""Micro-batches that the caller may hold in memory that is used again; more of them get memory of their own."""


class LoaderFailure(FinishedWithFailures):
    """Loading stopped for a reason that is neither the data's nor the recipe's fault."""


class TrainLoader:
    """Iterate for the micro-batches of this rank, one list per step; `close` ends its workers at once.

    Attributes:
        substitutions: every damaged sample that was replaced so far, in order; whether they are too many is for
            the run to say, which knows those of all ranks.
    """

    def __init__(
        self,
        batches: Iterable[list[Request]],
        samples: Samples,
        recipe: DataRecipe,
        workers: int,
        per_step: int,
        steps: int,
        slot_bytes: int = 0,
    ) -> None:
        self.substitutions: list[Substitution] = []
        self._recipe, self._workers, self._per_step, self._steps = recipe, workers, per_step, steps
        turn = max(workers, 1) if samples.reader.is_far else 0
        self._samples, self._requests = samples, _Lending(batches, turn)
        # What workers prepare, and what the caller holds: this step's batches and the last's.
        self._slots = recipe.prefetch * workers + min(2 * per_step, MAX_HELD) + 1 if workers else 0
        self._slot_bytes = slot_bytes
        check_shared_memory(self._slots, slot_bytes)
        self._iterator: Any = None
        generator = torch.Generator()  # its own, so that building a loader leaves torch's global one alone
        self._loader = DataLoader(
            samples,
            batch_sampler=self._requests,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker if workers else None,
            multiprocessing_context=start_server() if workers else None,
            generator=generator,
            prefetch_factor=recipe.prefetch if workers else None,
            in_order=True,
        )

    def __iter__(self) -> Iterator[list[Batch]]:
        if not self._per_step:
            yield from ([] for _ in range(self._steps))
            return
        try:
            self._iterator = self._start()
            for _ in range(self._steps):
                yield [self._next() for _ in range(self._per_step)]
        finally:
            self.close()

    def _start(self) -> Any:
        if self._workers:
            _LIVE.add(self)
        self._samples.ring = self._requests.ring = open_ring(self._slots, self._slot_bytes)
        return iter(self._loader)

    def _next(self) -> Batch:
        try:
            batch = next(self._iterator)
        except (RuntimeError, OSError, EOFError) as error:  # batches come over sockets from the workers
            death = _death(self._iterator._workers) if self._workers else None
            if death is None:
                raise
            worker, cause = death
            raise LoaderFailure(
                f"a loader worker died ({cause}){self._made_by(worker)}; nothing of its batch was trained on; run the "
                "same command again to go on, with fewer data.workers if memory was short"
            ) from error
        self._requests.arrived()
        if isinstance(batch, Failure):
            if batch.users:
                raise UserError(batch.sentence)
            if batch.details:
                print(batch.details, file=sys.stderr)
            raise LoaderFailure(batch.sentence)
        self._note(batch.substitutions)
        return batch  # type: ignore[no-any-return]

    def _made_by(self, worker: int) -> str:
        """Which samples a worker was at, as far as torch's own list of tasks tells."""
        tasks = {number: info for number, info in self._iterator._task_info.items() if len(info) == 1}
        mine = [number for number, info in tasks.items() if info[0] == worker]
        requests = self._requests.under_way.get(min(mine)) if mine else None
        if not requests:
            return ""
        names = ", ".join(self._samples.about(request.index) for request in requests)
        return f" while it made positions {requests[0].position} to {requests[-1].position} of the stream: {names}"

    def _note(self, new: list[Substitution]) -> None:
        for one in new:
            print(
                f"data: position {one.position}: {one.key} is damaged, {one.replaced_by} stands in: "
                f"{one.reason}",
                file=sys.stderr,
                flush=True,
            )
        self.substitutions += new

    def worker_pids(self) -> list[int]:
        """Process numbers of the workers; empty before iteration and where there are none."""
        workers = self._iterator._workers if self._iterator is not None and self._workers else []
        return [worker.pid for worker in workers]

    def close(self) -> None:
        """End the workers; they ignore SIGTERM, so whatever does not end by itself is killed."""
        iterator, self._iterator = self._iterator, None
        if iterator is None or not self._workers:
            return
        _LIVE.discard(self)
        self._samples.ring = self._requests.ring = None
        iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():
                worker.kill()


_LIVE: weakref.WeakSet[TrainLoader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before multiprocessing's own exit handler, which would wait for workers that ignore its SIGTERM."""
    for loader in list(_LIVE):
        loader.close()


class _Lending:
    """Lists of requests, each with a free slot of the ring for its batch, if there is one.

    Attributes:
        turn: lists between two of the same worker; told what comes next, it reads that from afar while it decodes.
            0: nothing is to be read from afar.
        under_way: by number, lists that were sent to workers and whose batches have not come yet.
    """

    def __init__(self, batches: Iterable[list[Request]], turn: int) -> None:
        self.batches, self.turn = batches, turn
        self.ring: Ring | None = None
        self.under_way: dict[int, Requests] = {}

    def __iter__(self) -> Iterator[Requests]:
        self.under_way.clear()
        for number, (batch, next_batch) in enumerate(with_later(self.batches, self.turn)):
            requests = self.under_way[number] = Requests(batch)
            requests.later = [request.index for request in next_batch]
            requests.slot = None if self.ring is None else self.ring.lend()
            yield requests

    def arrived(self) -> None:
        """The batch of the first list under way has come; they come in order."""
        del self.under_way[next(iter(self.under_way))]

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def with_later(batches: Iterable[list[Request]], turn: int) -> Iterator[tuple[list[Request], list[Request]]]:
    """Each batch with the one `turn` places behind it; with nothing at the end, or if `turn` is 0."""
    waiting: deque[list[Request]] = deque()
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > turn:
            yield waiting.popleft(), batch if turn else []
    while waiting:
        yield waiting.popleft(), []


class _Requests:
    """The micro-batches of one rank from `start_step` on, as lists of requests."""

    def __init__(self, plan: Plan, rank: int, world_size: int, start_step: int, stop_step: int) -> None:
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.start_step, self.stop_step = start_step, stop_step

    def per_step(self) -> int:
        """Micro-batches that this rank takes of each step."""
        return len(self._of_step(0))

    def _of_step(self, step: int) -> list[range]:
        g, b = self.plan.global_batch, self.plan.micro_batch
        return plans.micro_batches(step, g, b, self.rank, self.world_size)

    def __iter__(self) -> Iterator[list[Request]]:
        for step in range(self.start_step, self.stop_step):
            for positions in self._of_step(step):
                visits, indices = self.plan.samples_at(positions)
                slots = zip(positions, visits.tolist(), indices.tolist(), strict=True)
                yield [Request(*slot) for slot in slots]

    def __len__(self) -> int:
        return self.per_step() * (self.stop_step - self.start_step)


def plan_of(shard_set: ShardSet, recipe: DataRecipe, seed: int) -> Plan:
    """The order in which a run with this recipe and seed reads these shards (UserError)."""
    return Plan.of(
        shard_set,
        seed=seed,
        order=recipe.order,
        global_batch=recipe.global_batch,
        micro_batch=recipe.micro_batch,
        city_weights=recipe.city_weights,
    )


def train_loader(
    shard_set: ShardSet,
    recipe: DataRecipe,
    seed: int,
    rank: int,
    world_size: int,
    start_step: int,
    stop_step: int,
    transform: Transform | None = None,
    plan: Plan | None = None,
) -> TrainLoader:
    """Steps [start_step, stop_step) of the stream, as lists of this rank's micro-batches.

    A rank without a micro-batch gets empty lists. `plan` saves making it again (`plan_of`).
    UserError: no such city, too little shared memory; while iterating: damaged shards, sizes that differ.
    """
    requests = _Requests(plan or plan_of(shard_set, recipe, seed), rank, world_size, start_step, stop_step)
    reader = Reader(shard_set)
    reader.check_order(plans.parse_order(recipe.order))
    workers = workers_for(recipe)
    # A transform that leaves pixels to the device ships more of a tile than the crop.
    slot = (
        slot_bytes(reader, recipe, recipe.micro_batch, getattr(transform, "ships_px", None)) if workers else 0
    )
    samples = Samples(reader, recipe, seed, transform)
    steps = max(stop_step - start_step, 0)
    return TrainLoader(requests, samples, recipe, workers, requests.per_step(), steps, slot)


def evaluation_indices(samples: int, rank: int, world_size: int) -> range:
    """Rows that `rank` evaluates: over all ranks every row once, in shares that differ by one at most."""
    return range(rank, samples, world_size)


def evaluation_loader(
    shard_set: ShardSet,
    recipe: DataRecipe,
    rank: int,
    world_size: int,
    transform: Transform | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> Iterator[Batch]:
    """This rank's share of a split, each sample once, in batches of `batch_size` (the last may be smaller).

    Damage always stops an evaluation. Tiles of different sizes need batch_size 1 or a transform that crops.
    """
    rows = evaluation_indices(len(shard_set), rank, world_size)
    cuts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    requests = [[Request(row, 0, row) for row in cut] for cut in cuts]
    strict = dataclasses.replace(recipe, on_damage="stop")
    reader = Reader(shard_set)
    workers = min(workers_for(recipe), len(requests))
    slot = slot_bytes(reader, strict, batch_size, getattr(transform, "ships_px", None)) if workers else 0
    samples = Samples(reader, strict, seed, transform)
    loader = TrainLoader(requests, samples, strict, workers, 1, len(requests), slot)
    for step in loader:
        yield from step


def _as_is(batch: Any) -> Any:
    return batch


def _death(workers: list[Any]) -> tuple[int, str] | None:
    """Which worker ended and how, by its exit code; None if all live. It is given a moment to show."""
    multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=2)
    for number, code in enumerate(worker.exitcode for worker in workers):
        if code is not None and code < 0:
            return number, f"killed by {signal.Signals(-code).name}"
        if code:
            return number, f"exit code {code}"
    return None
