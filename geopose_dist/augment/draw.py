"""The random half of augmentation: which numbers a sample gets, and nothing else.

`draw` turns a keyed generator into a `Draw`: plain numbers that can be printed, stored as JSON, replayed on
another machine or applied on the device. It always takes the same count of numbers from the generator in the
same order, so that switching one operation off leaves all others as they were. The crop is drawn here too,
in source pixels, and all of it from a tile's `Outline`: before any pixel is decoded.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from geopose_dist.augment.recipe import MAX_FACTOR, OPERATIONS, AugmentRecipe, Settings
from geopose_dist.data.sample import Outline, View
from geopose_dist.errors import UserError

_UNIFORMS = 32  # what one draw takes; more than are used today, so that a new operation moves no old one


@dataclass(frozen=True)
class Tone:
    """A change of colours, in this order; see augment.tone.

    Attributes:
        gamma: exponent. contrast: factor about mid grey. brightness: added, full range 1.
        colour: factor of each channel. haze: share of haze blended in.
        noise: standard deviation in grey levels. noise_seed: what the noise is made from.
    """

    gamma: float
    contrast: float
    brightness: float
    colour: tuple[float, float, float]
    haze: float
    noise: float
    noise_seed: int


@dataclass(frozen=True)
class Draw:
    """One sample's augmentation, all numbers known.

    Attributes:
        heights: factor by which heights are raised first; None = not raised.
        operations: (name, number) in order: ("rotate", degrees), ("zoom", factor), ("flip_x", 1), ...
            A right-angle turn is ("rotate", 90, 180 or 270).
        window: row, column, rows, columns of the crop in the source tile if nothing turned or zoomed it: the
            output has that many rows and columns about that window's centre. None = the whole tile.
        tone: change of colours, if any.
        skipped: what was drawn but cannot be done to this sample, and why.
        faults: repeat the benchmark's faults.
    """

    heights: float | None = None
    operations: tuple[tuple[str, float], ...] = ()
    window: tuple[int, int, int, int] | None = None
    tone: Tone | None = None
    skipped: tuple[str, ...] = ()
    faults: bool = False

    def __post_init__(self) -> None:
        if self.heights is not None and not 1 <= self.heights <= MAX_FACTOR:
            raise ValueError(f"heights is {self.heights}; wanted None or a factor from 1 to {MAX_FACTOR:g}")
        for name, value in self.operations:
            if name not in ("rotate", "zoom", "flip_x", "flip_y", "transpose"):
                raise ValueError(f"operations has {name!r}; wanted rotate, zoom, flip_x, flip_y or transpose")
            if not math.isfinite(value) or (name == "zoom" and value <= 0):
                raise ValueError(f"operations has {name} {value}; wanted a finite number, above 0 for zoom")
        if self.window is not None and (len(self.window) != 4 or min(self.window[2:]) < 1):
            raise ValueError(f"window is {self.window}; wanted row, column and at least 1 rows and columns")

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; `from_json` brings it back exactly."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Draw:
        """A draw of `to_json`, also after a trip through a JSON file."""
        tone = facts["tone"]
        return cls(
            heights=facts["heights"],
            operations=tuple((str(name), float(value)) for name, value in facts["operations"]),
            window=None if facts["window"] is None else tuple(facts["window"]),
            tone=None if tone is None else Tone(**{**tone, "colour": tuple(tone["colour"])}),
            skipped=tuple(facts["skipped"]),
            faults=facts["faults"],
        )


def draw(
    recipe: AugmentRecipe, rng: np.random.Generator, tile: View | Outline, crop_px: int | None = None
) -> Draw:
    """Draw one sample's augmentation.

    Args:
        recipe: what may happen, how often and how strongly.
        rng: keyed by (seed, visit, sample, crop); 32 uniforms and one integer are taken.
        tile: what is known of the sample before it is decoded, or the sample; both give the same draw.
        crop_px: side of the crop; None = the whole tile.

    Raises:
        UserError: the crop is larger than the tile.
    """
    settings = recipe.settings()
    u = iter(rng.random(_UNIFORMS).tolist())
    noise_seed = int(rng.integers(2**63))
    heights, skipped = _heights(settings, next(u), next(u), tile)
    chosen: dict[str, float | None] = {
        "quarter": _when(next(u) < settings.quarter_p, 90.0 * int(next(u) * 4)),
        "rotate": _when(next(u) < settings.rotate_p, float(int(next(u) * 360))),
        "flip_x": _when(next(u) < settings.flip_x_p, 1.0),
        "flip_y": _when(next(u) < settings.flip_y_p, 1.0),
        "transpose": _when(next(u) < settings.transpose_p, 1.0),
        "zoom": _when(next(u) < settings.zoom_p, _between(settings.zoom_min, settings.zoom_max, next(u))),
    }
    assert set(chosen) == set(OPERATIONS)
    operations = []
    for name in settings.order:
        value = chosen[name]
        if value is not None and not (name in ("quarter", "rotate") and value == 0):
            operations.append(("rotate" if name == "quarter" else name, value))
    tone_wanted = next(u) < settings.tone_p
    tone = _tone(settings, [next(u) for _ in range(8)], noise_seed)
    window = _window(tile, crop_px, tuple(operations), next(u), next(u))
    return Draw(heights, tuple(operations), window, tone if tone_wanted else None, skipped, settings.faults)


def linear_part(operations: tuple[tuple[str, float], ...]) -> npt.NDArray[np.float64]:
    """float64 [2, 2] that takes a centred output (row, column) back to the centred source (row, column)."""
    back = np.eye(2)
    for name, value in operations:
        back = back @ _inverse(name, value)
    return back


def _inverse(name: str, value: float) -> npt.NDArray[np.float64]:
    if name == "rotate":
        # Exact at right angles, where cos(pi / 2) is not.
        cos, sin = math.cos(math.radians(value)), math.sin(math.radians(value))
        if value % 90 == 0:
            cos, sin = round(cos), round(sin)
        # Counter-clockwise on the screen takes (x, y down) to (x cos + y sin, y cos - x sin); the inverse:
        return np.array([[cos, sin], [-sin, cos]], np.float64)
    if name == "zoom":
        return np.eye(2) / value
    return np.array(
        {"flip_x": [[1, 0], [0, -1]], "flip_y": [[-1, 0], [0, 1]], "transpose": [[0, 1], [1, 0]]}[name],
        np.float64,
    )


def _when(happens: bool, value: float) -> float | None:
    return value if happens else None


def _between(low: float, high: float, u: float) -> float:
    return low + (high - low) * u


def _heights(
    settings: Settings, chance: float, u: float, tile: View | Outline
) -> tuple[float | None, tuple[str, ...]]:
    if chance >= settings.heights_p:
        return None, ()
    if not tile.has_heights or tile.pose is None:
        return None, (f"heights: {tile.key} has no {'pose' if tile.has_heights else 'heights'}",)
    if settings.faults and not tile.all_known:
        return None, ("heights: faithful to the benchmark, one unknown height switches it off",)
    tallest = tile.tallest_m
    if not tallest > 0:
        return None, (f"heights: {tile.key} has no known height above 0",)
    most = min(settings.heights_max_factor, settings.heights_tallest_m / tallest)
    if most <= 1:
        return None, (f"heights: the tallest of {tile.key} is {tallest:.1f} m already",)
    return _between(1.0, most, u), ()


def _tone(settings: Settings, u: list[float], noise_seed: int) -> Tone:
    either = [2 * value - 1 for value in u]  # -1 .. 1
    return Tone(
        gamma=math.exp(settings.gamma * either[0]),
        contrast=1 + settings.contrast * either[1],
        brightness=settings.brightness * either[2],
        colour=(
            1 + settings.colour * either[3],
            1 + settings.colour * either[4],
            1 + settings.colour * either[5],
        ),
        # Squared: most samples are nearly clear and quiet.
        haze=settings.haze * u[6] ** 2,
        noise=settings.noise * u[7] ** 2,
        noise_seed=noise_seed,
    )


def _window(
    tile: View | Outline,
    crop_px: int | None,
    operations: tuple[tuple[str, float], ...],
    u_row: float,
    u_col: float,
) -> tuple[int, int, int, int] | None:
    if crop_px is None:
        return None
    rows, cols = tile.size
    if crop_px > rows or crop_px > cols:
        raise UserError(
            f"{tile.key}: the crop is {crop_px} px, larger than the tile of {rows} x {cols} px; "
            f"choose a crop of at most {min(rows, cols)} px"
        )
    back = np.abs(linear_part(operations))
    reach = (
        back.sum(axis=1) * (crop_px - 1) / 2
    )  # half the extent of the turned and zoomed crop in the source
    row = _place(rows, crop_px, float(reach[0]), u_row)
    col = _place(cols, crop_px, float(reach[1]), u_col)
    return row, col, crop_px, crop_px


def _place(side: int, crop_px: int, reach: float, u: float) -> int:
    """First pixel of the window: no padding where that is possible, else in the middle, where it is least."""
    half = (crop_px - 1) / 2
    low, high = math.ceil(reach - half - 1e-9), math.floor(side - 1 - reach - half + 1e-9)
    if low > high:
        return (side - crop_px) // 2
    return low + int(u * (high - low + 1))
