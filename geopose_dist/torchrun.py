"""`python -m geopose_dist.torchrun`: torchrun that lets its ranks have the last word.

torchrun ends with a traceback of its own and exit code 1 whatever its ranks exit with. Here one line names the
ranks that failed; a user's mistake keeps its exit code, and 75 says that the same command will go on, which it will if
ranks were lost or saved on request and something was trained (`agent.AgainFile`). A signal that follows a first one
does not cut short the ranks' last step and save. What is started again and when is in `agent`. Options are torchrun's.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Sequence
from types import FrameType

import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousTimeoutError,
)
from torch.distributed.launcher import api as launcher

from geopose_dist.agent import AgainFile, Agent, is_mendable, say
from geopose_dist.errors import EXIT_AGAIN, EXIT_DONE, EXIT_FAILURES, EXIT_USER


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun with the words `argv`; the exit code that its ranks meant."""
    api._terminate_process_handler = _stop_once
    launcher.LocalElasticAgent = Agent  # type: ignore[attr-defined]  # the one place where torch makes it
    with AgainFile() as again:
        try:
            run.main(list(sys.argv[1:] if argv is None else argv))
        except ChildFailedError as failed:
            codes = {rank: failure.exitcode for rank, failure in sorted(failed.failures.items())}
            say(", ".join(f"rank {rank} {_end(code)}" for rank, code in codes.items()) + "; see above")
            # A rank that found a mistake of the user leaves with 2; its peers do, or are sent away by a signal.
            ended = [code for code in codes.values() if code >= 0]
            if ended and set(ended) == {EXIT_USER}:
                return EXIT_USER
            return _again(codes.values(), bool(again))
        except SignalException as stopped:
            say(f"stopped by {stopped.sigval.name}")
            codes = Agent.latest.codes if Agent.latest else {}
            return EXIT_DONE if codes and not any(codes.values()) else _again(codes.values(), True)
        except (RendezvousError, dist.DistError) as error:
            say(f"{_why(error)}; run the same command again on all nodes")
            return _again([], bool(again))
    return EXIT_DONE


def _again(codes: Iterable[int], worth: bool) -> int:
    """75 or 1: whether ranks that ended so would do better if the same command were run again."""
    mendable = all(code == EXIT_DONE or is_mendable(code) for code in codes)
    if mendable and not worth:
        say("nothing was trained since this start, so another would hardly get further: exit code 1")
    return EXIT_AGAIN if mendable and worth else EXIT_FAILURES


def _why(error: Exception) -> str:
    """What the end of a rendezvous means."""
    if isinstance(error, RendezvousClosedError):
        return "another node has ended the job, and said why"
    if isinstance(error, RendezvousTimeoutError):
        return "too few nodes came within join_timeout (MEET_TIMEOUT)"
    reason = str(error.__cause__ or error).splitlines()[0]
    return f"the node that keeps the rendezvous (node 0) is gone ({reason})"


def _stop_once(signum: int, frame: FrameType | None) -> None:
    """torchrun's handler, for the first signal only.

    torchrun waits for its ranks inside an `except`; a signal there ends the wait, and then torchrun, under ranks that
    still save. Slurm sends one to every process of a job, so that with those passed on by a script several come.
    """
    for name in os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM").split(","):
        signal.signal(signal.Signals[name.strip()], lambda *_: None)
    raise SignalException(f"got {signal.Signals(signum).name}", sigval=signal.Signals(signum))


def _end(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"


if __name__ == "__main__":
    sys.exit(main())
