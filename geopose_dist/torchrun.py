"""`python -m geopose_dist.torchrun`: torchrun that lets its ranks have the last word.

torchrun ends with a traceback of its own and exit code 1 whatever its ranks exit with. Here one line names the
ranks that failed, and a user's mistake keeps its exit code. Options are torchrun's own.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from geopose_dist.errors import EXIT_DONE, EXIT_FAILURES, EXIT_USER


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun with the words `argv`; the exit code that its ranks meant."""
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


def _end(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"


if __name__ == "__main__":
    sys.exit(main())
