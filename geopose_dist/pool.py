"""Work on local processes or Ray; the only file that imports ray.

`process_map` runs a picklable function over items in worker processes and yields results in the order of
the items, with a bounded number in flight, so memory does not grow with the work list. An exception in
the function reaches the caller as itself; a worker that dies (killed, out of memory) is named. `ray_map` is
the same on a Ray cluster, where work of a worker or node that dies is done again elsewhere.
`Actors` starts workers that keep a state, such as a network on a GPU: as Ray actors, on this machine or a
cluster, as plain processes, or inside this process. All three answer with futures; who tries what again
is the caller's business (`infer.dispatch`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any, Protocol, TypeVar, cast

from geopose_dist.errors import FinishedWithFailures, UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

TASK_RETRIES = 4
"""How often an item of `ray_map` is tried again after its worker or node died."""
CONNECT_S = 20.0
"""Longest wait for a cluster's first answer."""
OBJECT_STORE_BYTES = 100_000_000
"""Ray's shared memory: only names and small reports travel through it, pixels never do."""


def usable_cores() -> int:
    """Cores that this process may run on (containers and batch systems often allow fewer than exist)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""Signals to a job that its first process answers: a batch system sends them to every process at once."""


def fork_server() -> BaseContext:
    """The context of worker processes, its server started deaf to the parent's signals.

    A fork of this process could copy locks held by its threads (torch, OpenCV, rich), and a fresh interpreter
    for each worker would take seconds. There is one server per process whoever starts it first, and without
    it all workers die, so it must not die of a signal that is the parent's to answer. Workers inherit the
    blocked signals; those that may die of them unblock them (`start_worker`).
    """
    context = multiprocessing.get_context("forkserver")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
    try:
        # The tracker ignores SIGINT and SIGTERM, unblocks both here, and would die of the third.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def start_mapper() -> None:
    """Set up a worker of `process_map`."""
    start_worker()
    one_thread()


def start_worker() -> None:
    """Let this process die of signals like any, and with its parent, which could not end it when it is killed."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def one_thread() -> None:
    """Keep libraries inside a worker process to one thread: the workers are the parallelism."""
    import cv2

    cv2.setNumThreads(0)


def process_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int = 0
) -> Iterator[Result]:
    """Results of `function` over `items`, in order, computed by `workers` processes (0: one per core).

    With one worker everything runs in this process, which is easier to debug. At most four items per
    worker are in flight. Raises what the function raises, and FinishedWithFailures if a worker dies.
    """
    workers = workers or usable_cores()
    if workers == 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(workers, mp_context=fork_server(), initializer=start_mapper) as executor:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(executor.submit(function, item))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise FinishedWithFailures(
                "a worker process died (killed, or out of memory); run the same command again, with fewer "
                "workers if memory is short"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def ray_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, address: str, workers: int = 0
) -> Iterator[Result]:
    """Results of `function` over `items`, in order, computed one per core by the Ray cluster at `address`.

    At most `workers` items are in flight (0: two per core that the cluster has by then). An item whose worker or
    node dies is done again, so `function` must be safe to repeat. Raises what the function raises, and
    FinishedWithFailures if an item kills worker after worker.
    """
    if not ray_is_installed():
        raise UserError(f"--ray-address {address}: Ray is not installed here; pip install ray")
    owns = _join_ray(address, cpus=0, use_gpus=False)
    import ray
    from ray import exceptions

    task: Any = ray.remote(cast(Any, _call_there)).options(num_cpus=1, max_retries=TASK_RETRIES)
    waiting: deque[Any] = deque()

    def next_result() -> Result:
        try:
            result: Result = ray.get(waiting[0])
        except exceptions.RayTaskError as error:
            raise error.cause from None
        except exceptions.RayError as error:
            raise FinishedWithFailures(
                f"one item ended {TASK_RETRIES + 1} workers of the cluster at {address} ({type(error).__name__}: "
                "killed, out of memory, or their nodes lost); look at its nodes, then run the same command again"
            ) from error
        waiting.popleft()
        return result

    try:
        for item in items:
            waiting.append(task.remote(function, item))
            while len(waiting) >= (workers or 2 * _ray_cpus()):
                yield next_result()
        while waiting:
            yield next_result()
    finally:
        # Never by force: a task that ends just then ends this process, too (a failed check inside of Ray 2.60).
        if owns:
            ray.shutdown()  # the cluster ends what a driver leaves behind
        else:
            for reference in waiting:
                ray.cancel(reference)


def _call_there(function: Callable[[Item], Result], item: Item) -> Result:
    one_thread()
    return function(item)


def _ray_cpus() -> int:
    """Cores of the cluster now; nodes come and go."""
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return max(1, int(resources.get("CPU", 1)))


def _join_ray(address: str, *, cpus: int, use_gpus: bool) -> bool:
    """Join the cluster at `address`, or start one of this machine; whether it is ours to leave again."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry unless somebody asks for it
    # Without it Ray warns, once an actor has no GPU, of what a later version will do then.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return False
    if address:
        try:
            _knock(address)
            ray.init(address=address, logging_level=logging.WARNING)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise UserError(
                f"--ray-address {address}: cannot be joined ({error}); start a cluster with "
                "`ray start --head`, with the same RAY_AUTH_TOKEN here and there"
            ) from error
        return True
    ray.init(
        address="local",  # never a cluster that RAY_ADDRESS happens to name
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        num_cpus=cpus,
        num_gpus=None if use_gpus else 0,
        logging_level=logging.WARNING,
    )
    return True


def _knock(address: str) -> None:
    """OSError if nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()


Make = Callable[[int], Callable[[Any], Any]]
"""Makes a worker from the number of its GPU on its machine: a function that keeps its state."""


class Actor(Protocol):
    """A worker somewhere; dead once a future of it raises `ActorDied`."""

    ready: Future[Any]
    """Done when the worker has started; raises what kept it from starting."""

    def submit(self, item: Any) -> Future[Any]:
        """The worker's answer for `item`."""
        ...

    def kill(self) -> None:
        """End it, without waiting for what it does."""
        ...


def ray_is_installed() -> bool:
    """Whether Ray could be imported, without importing it."""
    return importlib.util.find_spec("ray") is not None


def died(error: BaseException) -> bool:
    """Whether an actor's future failed because the actor is gone, not because its work raised."""
    if isinstance(error, BrokenProcessPool):
        return True
    if ray_is_installed():
        from ray import exceptions

        return isinstance(error, exceptions.RayError) and not isinstance(error, exceptions.RayTaskError)
    return False


class Actors:
    """Where actors can be started; a context manager that ends all of them.

    Attributes:
        kind: ray, process or inline.
        cpus, gpus: what the machine or the cluster has, known inside the context.
    """

    def __init__(self, kind: str, *, address: str = "", cpus: int = 0, use_gpus: bool = True) -> None:
        self.kind, self._address, self._use_gpus = kind, address, use_gpus
        self.cpus, self.gpus = cpus or usable_cores(), 0
        self._started: list[Actor] = []
        self._owns_ray = False

    def __enter__(self) -> Actors:
        if self.kind == "ray":
            self._connect()
        elif self._use_gpus:
            import torch

            self.gpus = torch.cuda.device_count()
        return self

    def _connect(self) -> None:
        import ray

        self._owns_ray = _join_ray(self._address, cpus=self.cpus, use_gpus=self._use_gpus)
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self.cpus = int(resources.get("CPU", 1))
        self.gpus = int(resources.get("GPU", 0)) if self._use_gpus else 0

    def start(self, make: Make, number: int, *, cpus: int, gpus: int, in_flight: int) -> Actor:
        """Start one more actor, the `number`-th; `cpus` and `gpus` are what Ray reserves for it."""
        actor: Actor
        if self.kind == "ray":
            actor = _RayActor(make, cpus=cpus, gpus=gpus, in_flight=in_flight)
        elif self.kind == "process":
            actor = _ProcessActor(make, number % max(self.gpus, 1))
        else:
            actor = _InlineActor(make, in_flight)
        self._started.append(actor)
        return actor

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._started:
            actor.kill()
        if self._owns_ray:
            import ray

            ray.shutdown()


class _Worker:
    """What runs inside a Ray actor: a made worker and nothing else."""

    def __init__(self, make: Make) -> None:
        one_thread()
        self._work = make(0)  # Ray shows an actor its own GPU only

    def is_up(self) -> None:
        """Answers once the worker is made."""

    def work(self, item: Any) -> Any:
        """The worker's answer."""
        return self._work(item)


class _RayActor:
    def __init__(self, make: Make, *, cpus: int, gpus: int, in_flight: int) -> None:
        import ray

        # Threads of one actor: it decodes the next batch while the network is busy with this one.
        # No restarts by Ray: while a node is not yet declared dead they burn within seconds (ray#44212).
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_concurrency": in_flight + 1, "max_restarts": 0}
        self._actor: Any = ray.remote(cast(Any, _Worker)).options(**options).remote(make)
        self.ready: Future[Any] = self._actor.is_up.remote().future()

    def submit(self, item: Any) -> Future[Any]:
        future: Future[Any] = self._actor.work.remote(item).future()
        return future

    def kill(self) -> None:
        import ray

        if ray.is_initialized():
            ray.kill(self._actor)


_work_here: Callable[[Any], Any] | None = None


def _start_here(make: Make, gpu: int) -> int:
    global _work_here
    one_thread()
    _work_here = make(gpu)
    return os.getpid()


def _call_here(item: Any) -> Any:
    assert _work_here is not None
    return _work_here(item)


class _ProcessActor:
    """One process that works on one item after another."""

    def __init__(self, make: Make, gpu: int) -> None:
        self._executor = ProcessPoolExecutor(1, mp_context=fork_server(), initializer=start_worker)
        self.ready: Future[Any] = self._executor.submit(_start_here, make, gpu)

    def submit(self, item: Any) -> Future[Any]:
        return self._executor.submit(_call_here, item)

    def kill(self) -> None:
        started = self.ready.done() and not self.ready.cancelled() and self.ready.exception() is None
        self._executor.shutdown(wait=False, cancel_futures=True)
        if started:
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.kill(self.ready.result(), signal.SIGKILL)


class _InlineActor:
    """Threads of this process."""

    def __init__(self, make: Make, in_flight: int) -> None:
        self._executor = ThreadPoolExecutor(in_flight)
        self.ready: Future[Any] = Future()
        self._work = make(0)
        self.ready.set_result(None)

    def submit(self, item: Any) -> Future[Any]:
        return self._executor.submit(self._work, item)

    def kill(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
