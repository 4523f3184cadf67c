"""`python -m geopose_dist.torchrun`: torchrun that lets its ranks have the last word.

torchrun ends with a traceback of its own and exit code 1 whatever its ranks exit with. Here one line names the
ranks that failed, and a user's mistake keeps its exit code. A signal that follows a first one does not cut short the
ranks' last step and save. Options are torchrun's own.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from geopose_dist.errors import EXIT_DONE, EXIT_FAILURES, EXIT_USER


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun with the words `argv`; the exit code that its ranks meant."""
    api._terminate_process_handler = _stop_once
    try:
        run.main(list(sys.argv[1:] if argv is None else argv))
    except ChildFailedError as failed:
        codes = {rank: failure.exitcode for rank, failure in sorted(failed.failures.items())}
        told = ", ".join(f"rank {rank} {_end(code)}" for rank, code in codes.items())
        print(f"torchrun: {told}; what they said stands above", file=sys.stderr)
        # A rank that found a mistake of the user leaves with 2; its peers do, or are sent away by a signal.
        ended = [code for code in codes.values() if code >= 0]
        return EXIT_USER if ended and set(ended) == {EXIT_USER} else EXIT_FAILURES
    except SignalException as stopped:
        print(f"torchrun: stopped by {stopped.sigval.name}", file=sys.stderr)
        return EXIT_FAILURES
    return EXIT_DONE


def _stop_once(number: int, _frame: FrameType | None) -> None:
    """torchrun's handler, for the first signal only.

    torchrun waits for its ranks inside an `except`; a signal there ends the wait, and then torchrun, under ranks that
    still save. Slurm sends one to every process of a job, so that with those passed on by a script several come.
    """
    for name in os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM").split(","):
        signal.signal(signal.Signals[name.strip()], lambda *_: None)
    raise SignalException(f"got {signal.Signals(number).name}", sigval=signal.Signals(number))


def _end(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"


if __name__ == "__main__":
    sys.exit(main())
