"""Correcting predicted heights by what the validation split showed: one factor per city, or a monotone curve.

Networks under-predict towers. A calibration is fitted by `geopose calibrate`, lies beside the checkpoint's
weights as JSON, names them by hash, and does nothing unless `predict` is told to use it. A curve is a list of
points that predicted heights are read off from, straight between them; beyond the last one its last ratio holds.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from geopose_dist import files
from geopose_dist.errors import UserError
from geopose_dist.geometry import F32, F64

NAME = "calibration.json"
Method = Literal["none", "factor", "curve"]
EVERY_CITY = "*"
"""The factor of cities that the validation split does not have."""


@dataclass(frozen=True)
class Calibration:
    """What was fitted.

    Attributes:
        factors: by city, and for every other one.
        predicted_m, true_m: the curve, both growing.
        weights_sha256: of the checkpoint that it was fitted for.
        facts: how it was fitted and what it brought, for people.
    """

    factors: dict[str, float]
    predicted_m: list[float]
    true_m: list[float]
    weights_sha256: str
    facts: dict[str, Any]

    def apply(self, agl_m: F32, method: Method, city: str | None) -> F32:
        """Heights corrected by `method`."""
        if method == "none":
            return agl_m
        if method == "factor":
            return agl_m * np.float32(self.factors.get(city or EVERY_CITY, self.factors[EVERY_CITY]))
        return curve(agl_m, self.predicted_m, self.true_m)

    def to_json(self) -> bytes:
        """Indented, sorted."""
        plain = {
            "factors": self.factors,
            "curve": {"predicted_m": self.predicted_m, "true_m": self.true_m},
            "weights_sha256": self.weights_sha256,
            "facts": self.facts,
        }
        return (json.dumps(plain, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def curve(agl_m: F32, predicted_m: list[float], true_m: list[float]) -> F32:
    """Heights read off a curve; beyond its end the ratio of its last point holds."""
    corrected = np.interp(agl_m, predicted_m, true_m).astype(np.float32)
    beyond = agl_m > predicted_m[-1]
    corrected[beyond] = agl_m[beyond] * np.float32(true_m[-1] / max(predicted_m[-1], 1e-6))
    return corrected


def pooled(values: F64, weights: F64) -> F64:
    """The growing sequence nearest to `values` by weighted squares: neighbours that fall are pooled (PAVA)."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, members
    for value, weight in zip(values, weights, strict=True):
        mean, total, count = float(value), float(weight), 1
        while blocks and blocks[-1][0] >= mean:
            before, heavy, many = blocks.pop()
            mean = (before * heavy + mean * total) / (heavy + total)
            total, count = heavy + total, many + count
        blocks.append((mean, total, count))
    return np.concatenate([np.full(count, mean) for mean, _, count in blocks])


def sha256(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def path_for(weights: Path) -> Path:
    """Where the calibration of a weights file lies: one for each file of its folder."""
    return weights.with_name(f"{weights.stem}.{NAME}")


def save(weights: Path, calibration: Calibration) -> Path:
    """Write a calibration beside its weights; its path."""
    files.write_bytes(path_for(weights), calibration.to_json())
    return path_for(weights)


def load(weights: Path) -> Calibration:
    """The calibration of a weights file (UserError: there is none, it is damaged, or it belongs to others)."""
    path = path_for(weights)
    if not path.is_file():
        raise UserError(
            f"{weights}: has no calibration; fit one with `geopose calibrate --run RUN`, or predict with "
            "--calibration none"
        )
    try:
        plain = json.loads(path.read_bytes())
        factors = {str(city): float(factor) for city, factor in plain["factors"].items()}
        points = [[float(x) for x in plain["curve"][name]] for name in ("predicted_m", "true_m")]
        found = Calibration(factors, points[0], points[1], str(plain["weights_sha256"]), plain["facts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no calibration ({error}); fit it again with `geopose calibrate`") from error
    numbers = [*factors.values(), *points[0], *points[1]]
    if (
        EVERY_CITY not in factors
        or not all(math.isfinite(number) and number >= 0 for number in numbers)
        or len(points[0]) != len(points[1])
        or not points[0]
        or points[0] != sorted(set(points[0]))
        or points[1] != sorted(points[1])
    ):
        raise UserError(f"{path}: factors or curve cannot be; fit it again with `geopose calibrate`")
    if found.weights_sha256 != sha256(weights):
        raise UserError(
            f"{path}: was fitted for other weights than {weights.name} beside it; fit it again with "
            "`geopose calibrate`"
        )
    return found
