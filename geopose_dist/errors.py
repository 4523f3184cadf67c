"""What can end a command, and the exit code that each of them means.

0 done; 1 finished with named failures, or an internal error; 2 the user's mistake;
75 preempted or a lost peer: run the same command again (sysexits.h EX_TEMPFAIL).
"""

from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILURES = 1
EXIT_USER = 2
EXIT_AGAIN = 75
AGAIN_FILE = "GEOPOSE_AGAIN_FILE"
"""Variable: a file that ranks make for torchrun's agent once running the same command again makes sense."""


class UserError(ValueError):
    """A mistake that the user can mend: one sentence saying what, where, found, wanted, what to do.

    The command line prints it without a traceback and exits with 2.

    Attributes:
        said: another process has said the same already, and once is enough.
    """

    said = False


class FoundProblems(UserError):
    """Several mistakes found in one look, so that they can be mended in one go.

    Attributes:
        problems: one sentence per problem, each naming its file or member.
    """

    def __init__(self, title: str, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n  ".join([title, *self.problems]))


class FinishedWithFailures(Exception):
    """The work is done but for what the message names; exit code 1."""


class Preempted(Exception):
    """Stopped on request after saving; exit code 75."""


class LostPeer(Preempted):
    """Another rank did not come, or is gone; what was saved is whole: exit code 75."""
