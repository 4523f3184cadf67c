"""`geopose bench --quick`: the cases at sizes of seconds, to see that outputs are right and ratios sane.

A module of cases names its small sizes in `QUICK`, a table from its constants to their values; they are put in place
for the time of the run. A ratio far outside what any machine shows means that one of its sides did not do the
work. Times are not looked at, so a busy machine does not fail.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from geopose_dist.errors import FinishedWithFailures

RATIOS = ("speedup", "ratio", "wall_speedup")
LEAST, MOST = 0.005, 5000.0
"""Wide bounds of a ratio: a Python loop is some hundred times slower than a kernel, and tiny sizes cost both sides."""


@contextlib.contextmanager
def sizes(cases: Iterable[Callable[..., Any]]) -> Iterator[None]:
    """The small sizes of the cases' modules, for the time of the block."""
    modules = {case.__module__: sys.modules[case.__module__] for case in cases}
    before = [
        (module, name, getattr(module, name))
        for module in modules.values()
        for name in getattr(module, "QUICK", {})
    ]
    for module, name, _ in before:
        setattr(module, name, module.QUICK[name])
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def check_sane(row: Mapping[str, Any]) -> None:
    """FinishedWithFailures if a number of the row is not finite, or a ratio or rate cannot be."""
    numbers = {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    wrong = [name for name, value in numbers.items() if not math.isfinite(value)]
    wrong += [name for name in RATIOS if name in numbers and not LEAST <= numbers[name] <= MOST]
    wrong += [name for name in numbers if name.endswith("tiles_per_s") and not numbers[name] > 0]
    if wrong:
        told = ", ".join(f"{name} {numbers[name]:g}" for name in dict.fromkeys(wrong))
        raise FinishedWithFailures(f"{row.get('name', row['case'])}: {told}: no measurement gives that")
