"""Door of the scorer's kernel, and its slow NumPy twin.

Both reduce a predicted and a true tile to nine numbers in one pass: how many true heights are known, and over
those pixels the sums from which every figure of the score follows (`evaluate.moments`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import geopose_dist.kernels._score as _score
from geopose_dist.geometry import NO_DATA_CM

_KINDS = (np.uint16, np.float32, np.float64)


class PixelSums(NamedTuple):
    """Sums over the pixels with a true height.

    With p and t the heights in metres, P and T their flow magnitudes in pixels, and `turn4` four times the
    squared sine of half the angle between the flows: (pixels, sum t - offset, sum (t - offset)^2, sum p t,
    sum |p - t|, sum (p - t)^2, sum |P - T|, sum (P - T)^2, sum sqrt((P - T)^2 + turn4 P T)).
    """

    known: float
    shifted: float
    shifted2: float
    cross: float
    abs_agl: float
    sse_agl: float
    abs_mag: float
    sse_mag: float
    sum_epe: float


def pixel_sums(
    predicted: npt.NDArray[Any],
    true: npt.NDArray[Any],
    p_unit: float,
    t_unit: float,
    p_scale: float,
    t_scale: float,
    turn4: float,
    offset: float,
) -> PixelSums:
    """One pass over two tiles [H, W] of uint16, float32 or float64 heights.

    Args:
        predicted: heights, in units of `p_unit` metres; unknown ones are not looked for.
        true: heights, in units of `t_unit` metres; 65535 in uint16 and NaN in floats are left out.
        p_unit, t_unit: metres.
        p_scale, t_scale: px/m.
        turn4: see `PixelSums`.
        offset: metres; a number near the mean keeps the squares' digits.

    Raises:
        ValueError: sizes differ, or another dtype.
    """
    if predicted.shape != true.shape:
        raise ValueError(f"predicted is {predicted.shape}, true is {true.shape}; they must agree")
    for name, array in (("predicted", predicted), ("true", true)):
        if array.dtype not in _KINDS:
            raise ValueError(f"{name} is {array.dtype}; wanted uint16, float32 or float64")
    out = np.zeros(9)
    _score.pixel_sums(_flat(predicted), _flat(true), p_unit, t_unit, p_scale, t_scale, turn4, offset, out)
    return PixelSums(*out.tolist())


def _flat(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(array).reshape(-1)


def pixel_sums_slow(
    predicted: npt.NDArray[Any],
    true: npt.NDArray[Any],
    p_unit: float,
    t_unit: float,
    p_scale: float,
    t_scale: float,
    turn4: float,
    offset: float,
) -> PixelSums:
    """What `pixel_sums` computes, in the words of NumPy."""
    known = true != NO_DATA_CM if true.dtype == np.uint16 else ~np.isnan(true)
    t = true[known].astype(np.float64) * t_unit
    p = predicted[known].astype(np.float64) * p_unit
    magnitude = p * p_scale - t * t_scale
    epe = np.sqrt(np.maximum(magnitude**2 + turn4 * (p * p_scale) * (t * t_scale), 0))
    sums = ((t - offset), (t - offset) ** 2, p * t, np.abs(p - t), (p - t) ** 2)
    more = (np.abs(magnitude), magnitude**2, epe)
    return PixelSums(float(t.size), *(float(values.sum()) for values in (*sums, *more)))
