"""Units and the flow algebra: the one place that knows x from y.

A tile is seen by an affine camera. A surface point of height `agl_m` appears displaced from its place on
the ground; `flow` moves it back: (dx, dy) = agl * scale * (sin angle, cos angle), x to the right, y DOWN,
so angle 0 points down the image and pi/2 to the right. Inside the program heights are metres (NaN =
unknown), scales px/m, angles radians in [0, 2 pi). Files of the challenge hold centimetres, px/cm, and
65535 for unknown heights (Christie et al., "Learning Geocentric Object Pose in Oblique Monocular Images",
CVPR 2020, section 3, and the Overhead Geopose Challenge's data description).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U16 = npt.NDArray[np.uint16]

CM_PER_M = 100.0
NO_DATA_CM = 65535
"""Unknown height in a uint16 file."""
MAX_AGL_CM = 65534
"""The tallest height that a uint16 file can hold without meaning "unknown"."""
SCALE_SUSPECT_PX_PER_CM = 0.03
"""A px/cm scale above this is px/m by mistake; a px/m scale below the same number is px/cm by mistake."""


def agl_m_from_cm(agl_cm: U16) -> F32:
    """Heights of a challenge file, uint16 centimetres [H, W], as float32 metres with NaN for 65535."""
    agl_m = agl_cm.astype(np.float32)
    agl_m /= np.float32(CM_PER_M)
    agl_m[agl_cm == NO_DATA_CM] = np.nan
    return agl_m


def agl_cm_from_m(agl_m: F32, *, unknown_allowed: bool) -> tuple[U16, int]:
    """Heights in metres [H, W] as uint16 centimetres, and how many pixels had to be clipped.

    Negative heights become 0 and heights above 655.34 m become 65534; both count as clipped. NaN becomes
    65535 where `unknown_allowed` (labels), and is a ValueError where not (predictions).
    """
    cm = np.rint(agl_m.astype(np.float64) * CM_PER_M)
    unknown = np.isnan(cm)
    if not unknown_allowed and unknown.any():
        raise ValueError(f"agl_m holds {int(unknown.sum())} NaN; a prediction must be finite everywhere")
    with np.errstate(invalid="ignore"):
        clipped = int(((cm < 0) | (cm > MAX_AGL_CM)).sum())
        cm = np.clip(cm, 0, MAX_AGL_CM)
    return np.where(unknown, NO_DATA_CM, cm).astype(np.uint16), clipped


def px_per_m(scale_px_per_cm: float) -> float:
    """Scale in px/m of a scale in px/cm."""
    return scale_px_per_cm * CM_PER_M


def px_per_cm(scale_px_per_m: float) -> float:
    """Scale in px/cm of a scale in px/m."""
    return scale_px_per_m / CM_PER_M


def wrap_angle(angle_rad: float) -> float:
    """The same angle in [0, 2 pi)."""
    wrapped = math.fmod(angle_rad, 2 * math.pi)
    if wrapped < 0:
        wrapped += 2 * math.pi
    return 0.0 if wrapped >= 2 * math.pi else wrapped  # -1e-17 + 2 pi rounds to 2 pi itself


def direction(angle_rad: float) -> tuple[float, float]:
    """Unit vector (x, y) of the flow, y down: (sin, cos)."""
    return math.sin(angle_rad), math.cos(angle_rad)


def angle_of(x: float, y: float) -> float:
    """Angle in [0, 2 pi) of a flow vector (x, y), y down."""
    return wrap_angle(math.atan2(x, y))


def angle_difference_deg(a_rad: F64 | float, b_rad: F64 | float) -> F64:
    """Smallest difference between angles, in degrees from 0 to 180, elementwise."""
    difference = np.abs(np.asarray(a_rad, np.float64) - np.asarray(b_rad, np.float64)) % (2 * np.pi)
    return np.degrees(np.minimum(difference, 2 * np.pi - difference))


def mean_angle(angles_rad: F64, weights: F64 | None = None) -> float:
    """Angle of the weighted mean of unit vectors; averaging the numbers would break at the wrap."""
    w = np.ones_like(angles_rad) if weights is None else weights
    return angle_of(float((w * np.sin(angles_rad)).sum()), float((w * np.cos(angles_rad)).sum()))


def flow_xy(agl_m: F32, scale_px_per_m: float, angle_rad: float) -> tuple[F32, F32]:
    """Flow (dx, dy) in pixels, each float32 [H, W], of heights in metres; NaN stays NaN."""
    x, y = direction(angle_rad)
    magnitude = agl_m * np.float32(scale_px_per_m)
    return magnitude * np.float32(x), magnitude * np.float32(y)


def zenith_from_scale(scale_px_per_m: float, gsd_m: float) -> float:
    """Zenith angle in radians of a camera with this scale and mean GSD.

    From scale = sin z / p with p = gsd * sqrt(cos z), the pixel across the look (DOMAIN: "for a sensor,
    scale is almost a function of GSD"): with s = scale * gsd, sin^2 z = s^2 cos z, so
    cos z = (-s^2 + sqrt(s^4 + 4)) / 2.
    """
    s2 = (scale_px_per_m * gsd_m) ** 2
    return math.acos((-s2 + math.sqrt(s2 * s2 + 4)) / 2)


@dataclass(frozen=True)
class Pose:
    """Angle, scale and GSD of a tile, and what each image operation does to them.

    Attributes:
        angle_rad: direction of the flow, in [0, 2 pi).
        scale_px_per_m: flow magnitude per metre of height.
        gsd_m: ground metres per pixel, if known.
    """

    angle_rad: float
    scale_px_per_m: float
    gsd_m: float | None = None

    def _pointing(self, x: float, y: float) -> Pose:
        return replace(self, angle_rad=angle_of(x, y))

    def rotated(self, degrees: float) -> Pose:
        """After turning the image counter-clockwise on the screen by `degrees`."""
        return replace(self, angle_rad=wrap_angle(self.angle_rad + math.radians(degrees)))

    def flipped_x(self) -> Pose:
        """After mirroring left and right."""
        x, y = direction(self.angle_rad)
        return self._pointing(-x, y)

    def flipped_y(self) -> Pose:
        """After mirroring top and bottom."""
        x, y = direction(self.angle_rad)
        return self._pointing(x, -y)

    def transposed(self) -> Pose:
        """After swapping rows and columns."""
        x, y = direction(self.angle_rad)
        return self._pointing(y, x)

    def zoomed(self, factor: float) -> Pose:
        """After resizing the image by `factor` (below 1 shrinks it): fewer pixels for the same metre."""
        if not (factor > 0 and math.isfinite(factor)):
            raise ValueError(f"zoom factor is {factor}; it must be finite and > 0")
        gsd_m = None if self.gsd_m is None else self.gsd_m / factor
        return replace(self, scale_px_per_m=self.scale_px_per_m * factor, gsd_m=gsd_m)


def check_label(scale: float, angle: float, unit: str, where: str) -> list[str]:
    """What is wrong with a label as read, one sentence each; none if it is usable.

    Any finite angle is accepted. `unit` is "px/cm" or "px/m"; a scale on the wrong side of 0.03 is a
    mix-up of the two, and no narrower range is refused: other sensors and predictions go below it.
    """
    problems = []
    if not math.isfinite(angle):
        problems.append(
            f"{where}: angle is {angle}; wanted a finite number of radians; mend or remove the file"
        )
    if not (math.isfinite(scale) and scale > 0):
        problems.append(
            f"{where}: scale is {scale}; wanted a finite number above 0 in {unit}; mend or remove the file"
        )
    elif unit == "px/cm" and scale > SCALE_SUSPECT_PX_PER_CM:
        problems.append(
            f"{where}: scale is {scale:g}, which looks like px/m; wanted px/cm (at most "
            f"{SCALE_SUSPECT_PX_PER_CM}); divide it by 100"
        )
    elif unit == "px/m" and scale < SCALE_SUSPECT_PX_PER_CM:
        problems.append(
            f"{where}: scale is {scale:g}, which looks like px/cm; wanted px/m (at least "
            f"{SCALE_SUSPECT_PX_PER_CM}); multiply it by 100"
        )
    return problems
