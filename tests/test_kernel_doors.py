"""The kernels' doors: threads, the GIL, arguments that are refused by name, and layouts that are not."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopose_dist import kernels
from geopose_dist.augment import raise_heights
from geopose_dist.kernels import Raised, reference

quick = settings(max_examples=60, deadline=None, derandomize=True)
SAME = np.array([[1.0, 0, 0], [0, 1.0, 0]])
TURNED = np.array([[0.8, 0.6, 1.5], [-0.6, 0.8, 2.5]])
RIGHT_ANGLES = [
    np.array(linear, float)
    for linear in (
        [[1, 0], [0, 1]], [[0, 1], [-1, 0]], [[-1, 0], [0, -1]], [[0, -1], [1, 0]],
        [[1, 0], [0, -1]], [[-1, 0], [0, 1]], [[0, 1], [1, 0]], [[0, -1], [-1, 0]],
    )
]  # fmt: skip


def tile(rows: int, cols: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(seed))
    agl = rng.uniform(0, 12, (rows, cols)).astype(np.float32)
    agl[rng.random(agl.shape) < 0.1] = np.nan
    return rng.integers(0, 256, (rows, cols, 3), dtype=np.uint8), agl


@quick
@given(
    st.integers(0, 10**6),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from(range(8)),
    st.tuples(st.integers(-3, 39), st.integers(-3, 39)),
    st.booleans(),
)
def test_right_angles_and_cuts_are_the_twins(
    seed: int, size: tuple[int, int], out: tuple[int, int], turn: int, offset: tuple[int, int], heights: bool
) -> None:
    """Whole-number maps go by copies of their own, inside and beyond the tile."""
    rgb, agl = tile(*size, seed)
    matrix = np.column_stack([RIGHT_ANGLES[turn], offset])
    arguments = (rgb, agl if heights else None, matrix, out, None, (7, 8, 9))
    for found, wanted in zip(kernels.gather(*arguments), reference.gather(*arguments), strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("turn", range(8))
@pytest.mark.parametrize("size", [(64, 64), (67, 45), (16, 300)])
def test_the_eight_symmetries_undo_themselves(turn: int, size: tuple[int, int]) -> None:
    """A symmetry and its inverse, or four quarter turns, give every byte back."""
    rgb, agl = tile(*size)
    linear = RIGHT_ANGLES[turn]

    def turned(rgb: np.ndarray, agl: np.ndarray, linear: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, cols = rgb.shape[:2]
        out = (cols, rows) if linear[0, 0] == 0 else (rows, cols)
        centre = (np.array([rows, cols]) - 1) / 2
        offset = centre - linear @ ((np.array(out) - 1) / 2)
        result = kernels.gather(rgb, agl, np.column_stack([linear, offset]), out)
        assert result[2] is None
        return result[0], result[1]

    there = turned(rgb, agl, linear)
    back = turned(*there, linear.T)
    np.testing.assert_array_equal(back[0], rgb)
    np.testing.assert_array_equal(back[1], agl)
    around = rgb, agl
    for _ in range(4):
        around = turned(*around, linear)
    np.testing.assert_array_equal(around[0], rgb)
    np.testing.assert_array_equal(around[1], agl)


@quick
@given(st.integers(0, 10**6), st.tuples(st.integers(1, 20), st.integers(1, 20)), st.booleans())
def test_tone_is_its_twin(seed: int, size: tuple[int, int], noisy: bool) -> None:
    rng = np.random.Generator(np.random.Philox(seed))
    rgb = rng.integers(0, 256, (size[0] * 2, size[1], 3), dtype=np.uint8)[::2]
    table = rng.integers(0, 256, (3, 256), dtype=np.uint8)
    extra = (rng.integers(-128, 128, 256).astype(np.int8), rng.integers(0, 256, rgb.size, dtype=np.uint8))
    arguments = (rgb, table, *(extra if noisy else ()))
    np.testing.assert_array_equal(kernels.tone(*arguments), reference.tone(*arguments))


def test_any_layout_gives_the_same() -> None:
    """Reversed, transposed and cut-out arrays are read as what they show, and never written to."""
    rgb, agl = tile(50, 60)
    shown = [
        (rgb[::-1, ::-1][::-1, ::-1], agl[::-1, ::-1][::-1, ::-1]),
        (np.asfortranarray(rgb), np.asfortranarray(agl)),
        (np.pad(rgb, ((3, 3), (3, 3), (0, 0)))[3:-3, 3:-3], np.pad(agl, 3)[3:-3, 3:-3]),
    ]
    before = rgb.copy(), agl.copy()
    for one, other in shown:
        for array in (one, other):
            array.flags.writeable = False
        for door in (
            lambda r, a: kernels.rectify(r, a, 0.7, 1.0),
            lambda _, a: (kernels.invert_flow(a, 0.7, 1.0),),
            lambda r, a: kernels.gather(r, a, TURNED, (40, 45)),
            lambda r, a: raise_heights(r, a, 0.7, 1.0, 1.5),
        ):
            for found, wanted in zip(door(one, other), door(*before), strict=True):
                np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(rgb, before[0])
    np.testing.assert_array_equal(agl, before[1])


BIG = tile(1200, 1200)
FLAT = np.full((1200, 1200), 30.0, np.float32)
SHIFT = kernels.invert_flow(FLAT, 0.5, 1.0)
DOORS: dict[str, Callable[[], Any]] = {
    "rectify": lambda: kernels.rectify(BIG[0], FLAT, 0.5, 1.0),
    "invert_flow": lambda: kernels.invert_flow(FLAT, 0.5, 1.0),
    "invert_flow with unknowns": lambda: kernels.invert_flow(BIG[1], 0.5, 1.0, facade_px_per_px=0.5),
    "gather": lambda: kernels.gather(*BIG, TURNED, (1200, 1200)),
    "gather raised": lambda: kernels.gather(*BIG, TURNED, (1200, 1200), Raised(SHIFT, 1.0, 2.0)),
    "turn": lambda: kernels.gather(*BIG, np.array([[0, 1.0, 0], [1.0, 0, 0]]), (1200, 1200)),
    "tone": lambda: kernels.tone(BIG[0], np.zeros((3, 256), np.uint8)),
}


@pytest.mark.parametrize("name", DOORS)
def test_the_gil_is_released(name: str) -> None:
    """With a switch interval longer than the kernel runs, the counter advances only if the GIL is let go."""
    counted, stop, ready = [0], threading.Event(), threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1
            ready.set()
            time.sleep(0)  # lets the GIL go, so that the main thread can start its kernel

    before = sys.getswitchinterval()
    sys.setswitchinterval(100)
    thread = threading.Thread(target=count)
    best = 0
    try:
        thread.start()
        ready.wait()
        for _ in range(50):
            # Beside the kernel only a few bytecodes stand between the two readings.
            start = counted[0]
            DOORS[name]()
            best = max(best, counted[0] - start)
            if best > 20:
                break
    finally:
        stop.set()
        sys.setswitchinterval(before)
        thread.join()
    assert best > 20


def test_two_threads_do_not_disturb_each_other() -> None:
    """No state is shared: all doors at once give what each gives alone."""
    rgb, agl = tile(200, 220)
    shift = kernels.invert_flow(agl, 0.5, 1.0)
    calls: list[Callable[[], Any]] = [
        lambda: kernels.gather(rgb, agl, TURNED, (200, 220), Raised(shift, 1.0, 2.0)),
        lambda: kernels.gather(rgb, agl, np.array([[0, 1.0, 0], [1.0, 0, 0]]), (220, 200)),
        lambda: (kernels.invert_flow(agl, 0.5, 1.0, facade_px_per_px=0.5),),
        lambda: kernels.rectify(rgb, agl, 0.5, 1.0),
    ]
    wanted = [call() for call in calls]
    wrong: list[int] = []

    def work(first: int) -> None:
        for turn in range(24):
            which = (first + turn) % len(calls)
            for found, right in zip(calls[which](), wanted[which], strict=True):
                if not np.array_equal(
                    found, right, equal_nan=found is not None and found.dtype == np.float32
                ):
                    wrong.append(which)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


RGB = np.zeros((4, 5, 3), np.uint8)
AGL = np.zeros((4, 5), np.float32)
TABLE = np.zeros((3, 256), np.uint8)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: kernels.invert_flow(AGL.astype(np.float64), 1.0, 0.0), r"agl_m is float64 \[4, 5\]; wanted float32"),
        (lambda: kernels.invert_flow(RGB, 1.0, 0.0), r"agl_m is uint8 \[4, 5, 3\]; wanted float32 \[H, W\]"),
        (lambda: kernels.invert_flow(AGL, math.nan, 0.0), "px_per_m is nan; wanted a finite number"),
        (lambda: kernels.invert_flow(AGL, 1.0, math.nan), "angle_rad is nan; wanted a finite number of radians"),
        (lambda: kernels.invert_flow(AGL, 1.0, 0.0, facade_px_per_px=-1), "facade_px_per_px is -1; wanted"),
        (lambda: kernels.invert_flow(AGL[:0], 1.0, 0.0), r"agl_m has size \(0, 5\); wanted sides of 1"),
        (
            lambda: kernels.invert_flow(np.zeros((1, 40000), np.float32), 1.0, 0.0),
            r"agl_m has size \(1, 40000\); wanted sides of 1 to 32767",
        ),
        (lambda: kernels.gather(RGB[..., :2], AGL, SAME, (4, 5)), r"rgb is uint8 \[4, 5, 2\]; wanted uint8"),
        (lambda: kernels.gather(RGB, AGL[:3], SAME, (4, 5)), r"agl_m is float32 \[3, 5\]; wanted the size of rgb"),
        (lambda: kernels.gather(RGB, AGL, SAME + np.inf, (4, 5)), "matrix is float64"),
        (lambda: kernels.gather(RGB, AGL, SAME, (4, 40000)), r"size is \(4, 40000\); wanted sides of 1 to 32767"),
        (lambda: kernels.gather(RGB, AGL, SAME, (4, 5), Raised(AGL, math.nan, 1.0)), "angle_rad is nan"),
        (lambda: kernels.gather(RGB, AGL, SAME, (4, 5), Raised(AGL, 0.0, 0.0)), "raised.agl_per_shift is 0.0; wanted"),
        (lambda: kernels.gather(RGB, AGL, SAME, (4, 5), Raised(AGL, 0.0, math.nan)), "raised.agl_per_shift is nan"),
        (
            lambda: kernels.gather(RGB, AGL, SAME, (4, 5), Raised(AGL.astype(np.float16), 0.0, 1.0)),
            r"raised.shift_px is float16 \[4, 5\]; wanted float32",
        ),
        (lambda: kernels.tone(RGB.astype(np.int16), TABLE), r"rgb is int16 \[4, 5, 3\]; wanted uint8"),
        (lambda: kernels.tone(RGB, TABLE.astype(np.int32)), r"table is int32 \[3, 256\]; wanted uint8"),
        (
            lambda: kernels.tone(RGB, TABLE, np.zeros(256, np.int16), np.zeros(60, np.uint8)),
            r"noise is int16 \[256\]; wanted int8 \[256\]",
        ),
        (lambda: raise_heights(RGB, AGL, math.nan, 0.0, 1.5), "scale_px_per_m is nan; wanted a finite number above 0"),
        (lambda: raise_heights(RGB, AGL, 0.5, math.nan, 1.5), "angle_rad is nan"),
        (lambda: raise_heights(RGB, AGL, 0.5, 0.0, 0.999), "factor is 0.999; wanted a finite number from 1 to 10"),
        (lambda: raise_heights(RGB, AGL, 0.5, 0.0, 10.5), "factor is 10.5; wanted a finite number from 1 to 10"),
        (lambda: raise_heights(RGB, AGL[:, :4], 0.5, 0.0, 1.5), r"agl_m is float32 \[4, 4\]; wanted the size of rgb"),
        (lambda: raise_heights(RGB[0], AGL, 0.5, 0.0, 1.5), r"rgb is uint8 \[5, 3\]; wanted uint8 \[H, W, 3\]"),
        (lambda: raise_heights(RGB.tolist(), AGL, 0.5, 0.0, 1.5), "rgb is a list; wanted uint8"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
