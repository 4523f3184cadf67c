"""What two tiles are compared by: local features of a small image, and the matches that one plane explains.

Tiles of the challenge have north up, so features keep their orientation (upright SIFT: 128 numbers a keypoint, the
same in haze and in another season) and are spread over the image, because ground has few strong corners and roofs
many. The ground moves by one affine map between two views; roofs lean off it and are left out as outliers, as
shadows and cars are. The score of a pair is the number of matches that one plausible map explains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from geopose_dist import files
from geopose_dist.errors import UserError
from geopose_dist.geometry import F32
from shards import images, wavelet
from shards.layouts import Tile, load_rgb

U8 = npt.NDArray[np.uint8]

SMALL_PX = 512
"""A tile is reduced by the largest power of two that leaves its longer side this long: 1.2 to 2.4 m a pixel."""
GRID = 8
"""Keypoints are shared out over GRID x GRID cells."""
LARGEST_PX = 40.0
"""Diameter of the largest feature; larger ones see buildings lean."""
CODE = 512.0
"""Square roots of a descriptor's shares are kept as bytes, this many to one."""
RATIO = 0.92
"""Distance of the nearest descriptor over the second nearest, at most (Lowe 2004)."""
ZOOM = 1.7
"""Largest ratio of scales between two views: GSDs of one city differ by 1.3, views are squeezed by 0.56 at most."""
TURN_DEG = 20.0
"""Largest turn between two views."""
OFF_PX = 4.0
"""Distance from the common map within which a match counts as explained."""


@dataclass(frozen=True)
class Features:
    """Keypoints of one small image.

    Attributes:
        points: float32 [N, 2] column and row.
        sizes: float32 [N] diameters in pixels.
        codes: uint8 [N, 128], CODE times the square roots of a descriptor's shares.
    """

    points: F32
    sizes: F32
    codes: U8

    def descriptors(self) -> F32:
        """float32 [N, 128] of unit length."""
        found = self.codes.astype(np.float32)
        length = np.linalg.norm(found, axis=1, keepdims=True)
        return np.asarray(found / np.maximum(length, 1e-6), np.float32)


def small_grey(tile: Tile) -> U8:
    """uint8 [h, w] of a tile, its longer side between SMALL_PX and twice that where it has so many (UserError)."""
    size = images.image_size(tile.rgb)
    factor = 1
    while size is not None and max(size) >= 2 * SMALL_PX * factor:
        factor *= 2
    if factor > 1 and tile.rgb.suffix[1:].lower() in images.J2K and wavelet.can_reduce(tile.rgb, factor):
        rgb, _ = wavelet.read_rgb(tile.rgb, factor)
    else:
        rgb = load_rgb(tile)
        rows, columns = rgb.shape[:2]
        if factor > 1:
            rgb = np.asarray(
                cv2.resize(
                    rgb, (max(1, columns // factor), max(1, rows // factor)), interpolation=cv2.INTER_AREA
                ),
                np.uint8,
            )
    return np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), np.uint8)


def features_of(grey: U8, keypoints: int) -> Features:
    """At most `keypoints` upright SIFT features of uint8 [h, w], evened out in contrast against haze."""
    even = cv2.createCLAHE(clipLimit=4.0, tileGridSize=(8, 8)).apply(grey)
    sift = cv2.SIFT.create(contrastThreshold=0.02, edgeThreshold=12)
    found = [point for point in sift.detect(even, None) if point.size <= LARGEST_PX]
    # One place and size may be found with several orientations, which upright features have no use for.
    found.sort(key=lambda point: (-point.response, point.pt))
    kept, seen = [], set()
    room = np.full((GRID, GRID), max(1, keypoints // GRID**2))
    for point in found:
        column, row = point.pt
        known = (round(column, 1), round(row, 1), round(point.size, 1))
        cell = int(row * GRID / grey.shape[0]), int(column * GRID / grey.shape[1])
        if known in seen or room[cell] == 0:
            continue
        seen.add(known)
        room[cell] -= 1
        point.angle = 0.0
        kept.append(point)
    if not kept:
        return Features(np.zeros((0, 2), np.float32), np.zeros(0, np.float32), np.zeros((0, 128), np.uint8))
    described, descriptors = sift.compute(even, kept)
    shares = descriptors / np.maximum(descriptors.sum(axis=1, keepdims=True), 1e-9)
    return Features(
        np.array([point.pt for point in described], np.float32),
        np.array([point.size for point in described], np.float32),
        np.minimum(np.rint(CODE * np.sqrt(shares)), 255).astype(np.uint8),
    )


def save(path: Path, features: Features) -> None:
    """Write features to one file, whole or not at all."""
    with files.atomic_write(path) as file:
        np.savez(file, points=features.points, sizes=features.sizes, codes=features.codes)


def load(path: Path) -> Features:
    """Features as saved (UserError)."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return Features(found["points"], found["sizes"], found["codes"])
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); remove it and run again") from error


def matched(one: Features, other: Features) -> int:
    """How many keypoints of `one` lie in `other` where one affine map of the ground puts them."""
    if min(len(one.sizes), len(other.sizes)) < 4:
        return 0
    likeness = one.descriptors() @ other.descriptors().T
    rows = np.arange(len(likeness))
    nearest = likeness.argmax(axis=1)
    best = likeness[rows, nearest]
    mutual = likeness.argmax(axis=0)[nearest] == rows
    likeness[rows, nearest] = -1
    second = likeness.max(axis=1)
    # Squared distances of unit vectors are 2 - 2 cos.
    distinct = 1 - best < RATIO**2 * (1 - second)
    zoom = other.sizes[nearest] / one.sizes
    chosen = np.flatnonzero(mutual & distinct & (zoom < ZOOM) & (zoom > 1 / ZOOM))
    if len(chosen) < 4:
        return 0
    fit, explained = cv2.estimateAffine2D(
        one.points[chosen],
        other.points[nearest[chosen]],
        method=cv2.RANSAC,
        ransacReprojThreshold=OFF_PX,
        maxIters=1000,
        confidence=0.99,
    )
    if fit is None or not plausible(np.asarray(fit, np.float64)):
        return 0
    return int(explained.sum())


def plausible(fit: npt.NDArray[np.float64]) -> bool:
    """Whether the affine map [2, 3] can lie between two views with north up: no mirror, little turn and zoom."""
    across = fit[:, :2]
    if not np.isfinite(across).all() or np.linalg.det(across) <= 0:
        return False
    largest, least = np.linalg.svd(across, compute_uv=False)
    turn = math.degrees(math.atan2(across[1, 0] - across[0, 1], across[0, 0] + across[1, 1]))
    return bool(largest < ZOOM and least > 1 / ZOOM and abs(turn) < TURN_DEG)
