"""What may be drawn: a preset, and single fields that override it.

`benchmark` has the public benchmark's probabilities with right labels, `strong` is what we train with,
`dihedral` is exact and nearly free (right angles, flips, tone: nothing is interpolated), `none` only crops,
and `faithful` repeats the benchmark's faults on purpose (DOMAIN section 5), for comparison only.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

Preset = Literal["none", "dihedral", "benchmark", "strong", "faithful"]

MAX_FACTOR = 10.0
"""Heights are raised by at most this: beyond it a mix-up of arguments is likelier than a wish."""

OPERATIONS = ("quarter", "rotate", "flip_x", "flip_y", "transpose", "zoom")
"""Operations that `order` orders; heights are raised before all of them, crop and tone come last."""


@dataclass(frozen=True)
class AugmentRecipe:
    """How samples are changed at random; a field left at null takes the preset's value."""

    preset: Preset = "strong"
    """What unset fields are: none, dihedral, benchmark, strong, or faithful (with its faults)."""
    where: Literal["workers", "device"] = "workers"
    """Who does what was drawn: the loader's processes, or the device of the training, where CPU cores are
    scarce; the same but for the noise, which the device draws from its own generator."""
    heights_p: float | None = None
    """Probability of raising all heights by a factor; needs height and pose labels."""
    heights_max_factor: float | None = None
    """Largest factor for heights."""
    heights_tallest_m: float | None = None
    """No building is raised above this many metres."""
    quarter_p: float | None = None
    """Probability of turning by a number of right angles (0 to 3, equally likely); exact."""
    rotate_p: float | None = None
    """Probability of turning by a whole number of degrees, 0 to 359."""
    flip_x_p: float | None = None
    """Probability of mirroring left and right."""
    flip_y_p: float | None = None
    """Probability of mirroring top and bottom."""
    transpose_p: float | None = None
    """Probability of swapping rows and columns."""
    zoom_p: float | None = None
    """Probability of zooming by a factor between zoom_min and zoom_max."""
    zoom_min: float | None = None
    """Smallest zoom; below 1 shrinks."""
    zoom_max: float | None = None
    """Largest zoom."""
    order: tuple[str, ...] | None = None
    """Order of quarter, rotate, flip_x, flip_y, transpose, zoom."""
    tone_p: float | None = None
    """Probability of changing colours at all, by the strengths below."""
    brightness: float | None = None
    """Largest change of brightness, as a share of the full range."""
    contrast: float | None = None
    """Largest relative change of contrast."""
    gamma: float | None = None
    """Largest change of the logarithm of gamma."""
    colour: float | None = None
    """Largest relative change of each channel."""
    haze: float | None = None
    """Largest share of haze blended in."""
    noise: float | None = None
    """Largest standard deviation of noise, in grey levels."""

    def __post_init__(self) -> None:
        settings = self.settings()
        if self.where not in ("workers", "device"):
            raise ValueError(f"where is {self.where!r}; wanted workers or device")
        if self.where == "device" and settings.faults:
            raise ValueError(
                "where is device with preset faithful, whose faults only the workers can repeat; set where workers"
            )
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if field.name.endswith("_p") and not 0 <= value <= 1:
                raise ValueError(f"{field.name} is {value}; a probability is between 0 and 1")
            if field.name in _STRENGTHS and not 0 <= value <= _STRENGTHS[field.name]:
                raise ValueError(
                    f"{field.name} is {value}; it must be between 0 and {_STRENGTHS[field.name]:g}"
                )
        if not 1 <= settings.heights_max_factor <= MAX_FACTOR:
            raise ValueError(
                f"heights_max_factor is {settings.heights_max_factor}; it must be between 1 and {MAX_FACTOR:g}"
            )
        if not settings.heights_tallest_m > 0:
            raise ValueError(f"heights_tallest_m is {settings.heights_tallest_m}; it must be above 0")
        if not 0 < settings.zoom_min <= settings.zoom_max < math.inf:
            raise ValueError(
                f"zoom_min .. zoom_max is {settings.zoom_min} .. {settings.zoom_max}; wanted 0 < min <= max"
            )
        if sorted(settings.order) != sorted(OPERATIONS):
            raise ValueError(f"order is {list(settings.order)}; wanted each of {', '.join(OPERATIONS)} once")

    def settings(self) -> Settings:
        """The preset with the fields that are set here."""
        if self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}; wanted one of {', '.join(PRESETS)}")
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _NO_SETTING}
        given = {name: value for name, value in given.items() if value is not None}
        if "order" in given:
            given["order"] = tuple(given["order"])
        return dataclasses.replace(PRESETS[self.preset], **given)


_NO_SETTING = ("preset", "where")

_STRENGTHS = {"brightness": 1.0, "contrast": 1.0, "gamma": 3.0, "colour": 1.0, "haze": 1.0, "noise": 40.0}


@dataclass(frozen=True)
class Settings:
    """An `AugmentRecipe` with every field known; see there for the fields.

    Attributes:
        faults: repeat the benchmark's faults: zoom labels inverted, corners of a rotation labelled 0, one
            unknown height switches raising off, raised samples blurred 3x3.
    """

    heights_p: float = 0.0
    heights_max_factor: float = 2.0
    heights_tallest_m: float = 200.0
    quarter_p: float = 0.0
    rotate_p: float = 0.0
    flip_x_p: float = 0.0
    flip_y_p: float = 0.0
    transpose_p: float = 0.0
    zoom_p: float = 0.0
    zoom_min: float = 0.7
    zoom_max: float = 1.0
    order: tuple[str, ...] = OPERATIONS
    tone_p: float = 0.0
    brightness: float = 0.15
    contrast: float = 0.2
    gamma: float = 0.25
    colour: float = 0.06
    haze: float = 0.25
    noise: float = 4.0
    faults: bool = False


_BENCHMARK = Settings(heights_p=0.3, rotate_p=0.3, flip_x_p=0.3, flip_y_p=0.3, zoom_p=0.3)

PRESETS: dict[str, Settings] = {
    "none": Settings(),
    "dihedral": Settings(quarter_p=1.0, flip_x_p=0.5, tone_p=0.8),
    "benchmark": _BENCHMARK,
    "strong": Settings(
        heights_p=0.3, quarter_p=1.0, rotate_p=0.3, flip_x_p=0.5, zoom_p=0.5, zoom_max=1.4, tone_p=0.8
    ),
    "faithful": dataclasses.replace(_BENCHMARK, faults=True),
}
