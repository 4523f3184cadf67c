"""One map over local processes or Ray; the only file that imports ray.

`process_map` runs a picklable function over items in worker processes and yields results in the order of
the items, with a bounded number in flight, so memory does not grow with the work list. An exception in
the function reaches the caller as itself; a worker that dies (killed, out of memory) is named.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Cores that this process may run on (containers and batch systems often allow fewer than exist)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_thread() -> None:
    """Keep libraries inside a worker process to one thread: the workers are the parallelism."""
    import cv2

    cv2.setNumThreads(0)


def process_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int = 0
) -> Iterator[Result]:
    """Results of `function` over `items`, in order, computed by `workers` processes (0: one per core).

    With one worker everything runs in this process, which is easier to debug. At most four items per
    worker are in flight. Raises what the function raises, and RuntimeError if a worker process dies.
    """
    workers = workers or usable_cores()
    if workers == 1:
        yield from map(function, items)
        return
    # forkserver: a fork of this process could copy locks held by its threads (torch, OpenCV, rich).
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=one_thread) as executor:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(executor.submit(function, item))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died (killed, or out of memory); run the same command again, with fewer "
                "workers if memory is short"
            ) from error
        finally:
            for future in waiting:
                future.cancel()
