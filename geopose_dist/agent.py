"""torchrun's agent with the policies of a cluster: what is started again, how long a save may take, who is lost.

torch's own starts ranks again whatever they ended of, gives them 30 s to save when the world changes, and ends
them when it cannot reach the rendezvous, which is often before they could say who is lost. This one leaves that to
the ranks: they know, and say it. Everything else is torch's.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
)
from torch.distributed.elastic.rendezvous.api import RendezvousError

from geopose_dist.errors import AGAIN_FILE, EXIT_AGAIN

ASK_S = 1.0
"""Pause between two questions whether nodes wait to join; torch's own answer is no younger."""
CLOSE_S = 5.0
"""How long the end of a job may wait for the rendezvous to hear of it."""
ANSWER_S = 15.0
"""How long a new start waits for an answer that is under way; a cable that was out for 5 s needs up to 13."""


def is_mendable(exit_code: int) -> bool:
    """Whether ranks that ended so may do better when they are started again.

    75 is a lost peer or a save on request; SIGKILL is the memory killer, or an operator. Errors and crashes
    come again.
    """
    return exit_code in (EXIT_AGAIN, -signal.SIGKILL, -signal.SIGTERM)


class Agent(LocalElasticAgent):
    """One node's agent.

    Attributes:
        latest: the one that this process runs, for who asks how it ended.
        codes: exit codes of its ranks by local rank, once they were stopped.
    """

    latest: Agent | None = None

    def __init__(self, spec: WorkerSpec, *rest: Any, **named: Any) -> None:
        self.handler = PatientRendezvous(spec.rdzv_handler)
        spec.rdzv_handler = self.handler
        super().__init__(spec, *rest, **named)
        self.codes: dict[int, int] = {}
        Agent.latest = self

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if any(not is_mendable(failure.exitcode) for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown(timeout=self._shutdown_timeout)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        super()._shutdown(death_sig, timeout)
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        codes = {rank: handler.proc.returncode for rank, handler in handlers.items()}
        self.codes = {rank: code for rank, code in codes.items() if code is not None}

    def _exit_barrier(self) -> None:
        if not self.handler.lost:
            super()._exit_barrier()  # type: ignore[no-untyped-call]


class PatientRendezvous(RendezvousHandler):
    """A rendezvous that is asked in the background, and whose loss ends no rank.

    A store that is cut off answers nothing for a minute, in which torch's agent would not see its ranks end.

    Attributes:
        lost: why the rendezvous can no longer be reached; empty as long as it can.
    """

    def __init__(self, handler: RendezvousHandler) -> None:
        self._handler, self.lost, self._waiting = handler, "", 0
        self._over = threading.Event()
        self._asking: threading.Thread | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other agents; who lost the rendezvous once cannot (RendezvousConnectionError)."""
        self._stop_asking(ANSWER_S)
        if self.lost:
            raise RendezvousConnectionError(self.lost)
        info = self._handler.next_rendezvous()
        self._over = threading.Event()
        self._asking = threading.Thread(target=self._ask, args=(self._over,), name="membership", daemon=True)
        self._asking.start()
        return info

    def _ask(self, over: threading.Event) -> None:
        while not over.wait(ASK_S):
            try:
                waiting = self._handler.num_nodes_waiting()
            except RendezvousConnectionError as error:
                self.lost = str(error)
                return
            if not over.is_set():
                self._waiting = waiting

    def _stop_asking(self, wait_s: float) -> None:
        """Ask no more; a question that gets no answer within `wait_s` means that the rendezvous is lost."""
        self._over.set()
        self._waiting = 0
        if self._asking is not None:
            self._asking.join(wait_s)
            if self._asking.is_alive():
                self.lost = self.lost or f"no answer for {wait_s:g} s"

    def num_nodes_waiting(self) -> int:
        """Nodes that wait to join, as last heard."""
        return self._waiting

    def shutdown(self) -> bool:
        """Close the rendezvous for all, if that can be had soon."""
        self._stop_asking(CLOSE_S)
        closed: list[bool] = []

        def close() -> None:
            try:
                closed.append(self._handler.shutdown())
            except RendezvousError as error:
                self.lost = str(error)

        closing = threading.Thread(target=close, daemon=True)
        if not self.lost:
            closing.start()
            closing.join(CLOSE_S)
        if not closed:
            self.lost = self.lost or f"no answer for {CLOSE_S:g} s"
        return bool(closed) and closed[0]

    def get_backend(self) -> str:
        """Torch's name of what keeps the state."""
        backend: str = self._handler.get_backend()
        return backend

    @property
    def use_agent_store(self) -> bool:
        """Whether ranks meet through the agents' store."""
        return bool(self._handler.use_agent_store)

    def is_closed(self) -> bool:
        """Whether the job is over."""
        return self._handler.is_closed()

    def set_closed(self) -> None:
        """End the job."""
        self._handler.set_closed()  # type: ignore[no-untyped-call]

    def get_run_id(self) -> str:
        """The job's name."""
        return self._handler.get_run_id()


class AgainFile:
    """A file of this node that ranks make once running the same command again makes sense (`note_again`).

    Without it, a job whose ranks are killed before their first step would be queued again for ever.
    """

    def __enter__(self) -> AgainFile:
        self._folder = tempfile.TemporaryDirectory(prefix="geopose-")
        os.environ[AGAIN_FILE] = str(Path(self._folder.name) / "again")
        return self

    def __exit__(self, *_: object) -> None:
        os.environ.pop(AGAIN_FILE)
        self._folder.cleanup()

    def __bool__(self) -> bool:
        return os.path.exists(os.environ[AGAIN_FILE])


def say(text: str) -> None:
    """One line, from this node."""
    print(f"torchrun on {socket.gethostname()}: {text}", file=sys.stderr, flush=True)
