"""Cameras of the four cities: where satellites stood when the challenge's tiles were taken.

A view is drawn by its zenith angle and azimuth; the pixel follows from the satellite's nadir pixel and the
slant range over a round earth, so that GSD and off-nadir agree as they do for a real sensor: across the look
a pixel is p metres, along it p / cos z, the mean GSD is p / sqrt(cos z), the scale sin z / p (DOMAIN section 2).
The image is the ground squeezed by cos z along the look and turned a little (roll), so north is nearly up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from geopose_dist import geometry
from geopose_dist.kernels.render import AffineCamera

EARTH_KM = 6371.0


@dataclass(frozen=True)
class CityOptics:
    """Distribution of a city's views: nadir pixel and height of the orbit, zenith angles, azimuths.

    Zenith angles are a normal draw cut to a range; an azimuth spread of None means the full circle.
    """

    nadir_gsd_m: float
    orbit_km: float
    zenith_deg: tuple[float, float]
    zenith_mean_deg: float
    zenith_sd_deg: float
    azimuth_deg: float = 0.0
    azimuth_sd_deg: float | None = None


OPTICS = {
    "ARG": CityOptics(0.310, 617, (6.0, 34.4), 25.5, 9.0),
    "ATL": CityOptics(0.462, 770, (9.0, 33.5), 17.0, 5.0, 228.0, 14.0),
    "JAX": CityOptics(0.310, 617, (6.0, 32.0), 22.5, 8.0),
    "OMA": CityOptics(0.310, 617, (4.0, 26.0), 17.0, 6.0),
}
"""Set so that GSD, elevation and scale fall into the challenge's ranges; tests hold the bounds."""


@dataclass(frozen=True)
class Camera:
    """One view: angles in radians, p in metres; the ground's x points east, its y south (image sense)."""

    zenith: float
    azimuth: float
    """Direction on the ground (from x towards y) along which the flow points, away from the satellite's side."""
    roll: float
    pixel_m: float
    centre_m: tuple[float, float]

    @property
    def gsd_m(self) -> float:
        """Mean ground metres per pixel."""
        return self.pixel_m / math.sqrt(math.cos(self.zenith))

    @property
    def scale_px_per_m(self) -> float:
        """Pixels of flow per metre of height."""
        return math.sin(self.zenith) / self.pixel_m

    @property
    def angle_rad(self) -> float:
        """Direction of the flow in the image: from the roof to the ground."""
        x, y = self.flow_on_ground()
        cos, sin = math.cos(self.roll), math.sin(self.roll)
        return geometry.angle_of(cos * x - sin * y, sin * x + cos * y)

    def direction(self) -> tuple[float, float]:
        """Unit vector (x, y) of the flow in the image."""
        return geometry.direction(self.angle_rad)

    def flow_on_ground(self) -> tuple[float, float]:
        """Unit vector (x, y) on the ground along which the flow points."""
        return math.cos(self.azimuth), math.sin(self.azimuth)

    def affine(
        self, size: tuple[int, int], cell_m: float, map_shape: tuple[int, int], level_m: float = 0.0
    ) -> AffineCamera:
        """The kernel's camera for an image of `size` (rows, cols) over a map whose middle is the place's origin.

        The image's middle sees `centre_m` at `level_m` above the map's zero: the height of the ground there.
        """
        f = np.array(self.flow_on_ground())
        squeeze = np.eye(2) - (1 - math.cos(self.zenith)) * np.outer(f, f)
        cos, sin = math.cos(self.roll), math.sin(self.roll)
        pixel_from_ground = np.array([[cos, -sin], [sin, cos]]) @ squeeze / self.pixel_m
        cell_from_pixel = np.linalg.inv(pixel_from_ground) / cell_m
        middle = np.array([(size[1] - 1) / 2, (size[0] - 1) / 2])
        origin = np.array([map_shape[1] / 2, map_shape[0] / 2]) + np.array(self.centre_m) / cell_m
        rise = math.tan(self.zenith) / cell_m * f
        offset = origin - cell_from_pixel @ middle - level_m * rise
        return AffineCamera(np.column_stack([cell_from_pixel, offset]), (float(rise[0]), float(rise[1])))


def slant_pixel_m(optics: CityOptics, zenith: float) -> float:
    """Pixel across the look, in metres: the nadir pixel times the ratio of slant range to orbit height."""
    off_nadir = math.asin(math.sin(zenith) * EARTH_KM / (EARTH_KM + optics.orbit_km))
    slant_km = (
        EARTH_KM * math.sin(zenith - off_nadir) / math.sin(off_nadir) if off_nadir > 1e-9 else optics.orbit_km
    )
    return optics.nadir_gsd_m * slant_km / optics.orbit_km


def ground_reach_m(city: str, size: int, tallest_m: float) -> float:
    """Half the side of the square of ground that any view of a tile of `size` pixels can meet, in metres."""
    optics = OPTICS[city]
    zenith = math.radians(optics.zenith_deg[1])
    along = slant_pixel_m(optics, zenith) * size / math.cos(zenith)
    # The stretched square reaches 1.04 of its stretched half side when the look runs diagonally, the roll adds 7 %.
    return 0.5 * along * 1.12 + centre_jitter_m(size) + tallest_m * math.tan(zenith) + 4.0


def centre_jitter_m(size: int) -> float:
    """How far the middle of a view may lie from the middle of its place, in metres."""
    return 0.01 * size


def draw_camera(city: str, size: int, rng: np.random.Generator) -> Camera:
    """A view of a city's distribution."""
    optics = OPTICS[city]
    low, high = optics.zenith_deg
    zenith = float(rng.normal(optics.zenith_mean_deg, optics.zenith_sd_deg))
    while not low <= zenith <= high:
        zenith = float(rng.normal(optics.zenith_mean_deg, optics.zenith_sd_deg))
    if optics.azimuth_sd_deg is None:
        azimuth = float(rng.uniform(0, 360))
    else:
        azimuth = optics.azimuth_deg + float(rng.normal(0, optics.azimuth_sd_deg))
    jitter = centre_jitter_m(size)
    z = math.radians(zenith)
    return Camera(
        zenith=z,
        azimuth=math.radians(azimuth),
        roll=math.radians(float(rng.uniform(-4, 4))),
        pixel_m=slant_pixel_m(optics, z),
        centre_m=(float(rng.uniform(-jitter, jitter)), float(rng.uniform(-jitter, jitter))),
    )
