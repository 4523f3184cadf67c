"""Workers that fail in every way; a module of its own, so that processes that import it start quickly."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path


class Moody:
    """Doubles numbers; 3 kills the process, 5 raises, 7 and 17 kill the process the first time only."""

    def __init__(self, marks: Path) -> None:
        self.marks = str(marks)

    def __call__(self, gpu: int) -> Callable[[list[int]], list[int]]:
        marks = Path(self.marks)

        def work(numbers: list[int]) -> list[int]:
            for number in numbers:
                first = marks / f"seen{number}"
                if number == 5:
                    raise ValueError("five is not liked")
                if number == 3 or (number in (7, 17) and not first.exists()):
                    first.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            return [2 * number for number in numbers]

        return work


class CannotStart:
    """No worker comes of it."""

    def __call__(self, gpu: int) -> Callable[[int], int]:
        raise ValueError("no network here")


class Sleepy:
    """Does not answer for 1 the first time."""

    def __init__(self, marks: Path) -> None:
        self.marks = str(marks)

    def __call__(self, gpu: int) -> Callable[[int], int]:
        marks = Path(self.marks)

        def work(number: int) -> int:
            if number == 1 and not (marks / "slept").exists():
                (marks / "slept").touch()
                time.sleep(300)
            return number

        return work


class Patient:
    """Tells its process number at once when asked for 0, and else sleeps for so many minutes."""

    def __call__(self, gpu: int) -> Callable[[int], int]:
        def work(minutes: int) -> int:
            time.sleep(60 * minutes)
            return os.getpid()

        return work
