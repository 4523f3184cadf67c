"""The mesh of the 3D view: walls stand upright where they are, and nothing is stretched across what was hidden."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopose_dist import kernels
from geopose_dist.geometry import Pose
from geopose_dist.report import mesh

SCALE = 1.5
"""Pixels per metre: the house of 10 m leans by 15 pixels."""


def house() -> np.ndarray:
    """Heights [64, 64] of a flat roof of 10 m over ground rows 40 to 55, columns 20 to 40, the flow pointing down.

    The camera sees the roof 15 rows above its place, and below it the wall whose foot is row 55.
    """
    agl_m = np.zeros((64, 64), np.float32)
    agl_m[25:40, 20:40] = 10
    agl_m[40:55, 20:40] = ((55 - np.arange(40, 55) - 0.5) / SCALE)[:, None]
    return agl_m


def corners_of(built: mesh.Mesh) -> np.ndarray:
    """Vertex numbers int [n, 3] of the triangles that are drawn."""
    rows, columns = built.agl_m.shape
    number = np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = number[:-1, :-1], number[:-1, 1:], number[1:, :-1], number[1:, 1:]
    both = np.stack([np.stack([a, c, b], -1), np.stack([d, b, c], -1)], axis=-2)
    return both[built.kept]


def longest_px(built: mesh.Mesh, pose: Pose) -> float:
    """The longest edge on the ground of a triangle that is drawn."""
    y, x = (
        plane.ravel()[corners_of(built)]
        for plane in mesh.ground(built.agl_m, built.rows, built.columns, pose)
    )
    return float(np.hypot(y - np.roll(y, 1, axis=1), x - np.roll(x, 1, axis=1)).max())


def test_a_house_stands_on_its_ground() -> None:
    pose = Pose(0.0, SCALE)
    built = mesh.build(house(), pose)
    y, x = mesh.ground(built.agl_m, built.rows, built.columns, pose)
    roof, wall = built.agl_m == 10, (built.agl_m > 0) & (built.agl_m < 10)
    assert y[roof].min() == 40.5
    assert y[roof].max() == 54.5
    np.testing.assert_allclose(y[wall], 55, atol=1e-5)  # the wall that was seen stands upright on one line
    np.testing.assert_array_equal(x, np.broadcast_to(built.columns, x.shape))  # nothing moved sideways
    # Behind the roof, ground rows 25 to 40 were hidden: no triangle is drawn over their inside.
    centre_y = y.ravel()[corners_of(built)].mean(axis=1)
    centre_x = x.ravel()[corners_of(built)].mean(axis=1)
    hidden = (centre_y > 26) & (centre_y < 40) & (centre_x > 21) & (centre_x < 39)
    assert not hidden.any()
    assert longest_px(built, pose) <= np.sqrt(2) + mesh.SLACK_PX


def test_walls_are_put_under_edges_that_hide_something_and_nowhere_else() -> None:
    pose = Pose(0.0, SCALE)
    built = mesh.build(house(), pose)
    row, column = np.divmod(built.walls, 64)
    assert len(built.walls) >= 19
    behind = (row == 25).all(axis=1)  # the roof's far edge, the whole width of it
    assert set(column[behind].ravel()) == set(range(20, 40))
    # The others stand at the two sides, where the roof and the wall hide the street beside them.
    assert ((row == 25).all(axis=1) | np.isin(column, (19, 20, 39, 40)).all(axis=1)).all()
    assert not np.isin(row, (54, 55)).all(axis=1).any()  # none where the wall meets the street


@pytest.mark.parametrize("turns", range(4))
def test_the_mesh_agrees_with_rectification(turns: int) -> None:
    """No vertex stands above the surface that the kernel finds at its ground pixel."""
    agl_m = np.ascontiguousarray(np.rot90(house(), turns))
    pose = Pose(0.0, SCALE).rotated(90 * turns)
    _, flat_m, occluded = kernels.rectify(
        np.zeros((64, 64, 3), np.uint8), agl_m, pose.scale_px_per_m, pose.angle_rad
    )
    built = mesh.build(agl_m, pose)
    y, x = (
        np.clip(plane.astype(int), 0, 63)
        for plane in mesh.ground(built.agl_m, built.rows, built.columns, pose)
    )
    roof = built.agl_m == 10
    assert not occluded[y, x][roof].any()
    np.testing.assert_array_equal(flat_m[y, x][roof], 10)


@given(st.integers(0, 2**32), st.floats(0, 6.28), st.floats(0.1, 3), st.integers(2, 40))
@settings(max_examples=40, deadline=None)
def test_nothing_is_stretched_far_and_nothing_unknown_is_drawn(
    seed: int, angle: float, scale: float, side: int
) -> None:
    rng = np.random.Generator(np.random.Philox(seed))
    agl_m = rng.gamma(0.5, 20, (37, 52)).astype(np.float32)
    agl_m[rng.random(agl_m.shape) < 0.3] = np.nan
    pose = Pose(angle, scale)
    built = mesh.build(agl_m, pose, side)
    rows, columns = built.agl_m.shape
    assert max(rows, columns) <= side
    vertices = corners_of(built)
    assert np.isfinite(built.agl_m.ravel()[vertices]).all()
    assert np.isfinite(built.agl_m.ravel()[built.walls]).all()
    if len(vertices):
        step = np.hypot(np.diff(built.rows).max(), np.diff(built.columns).max())
        assert longest_px(built, pose) <= step + max(mesh.SLACK_PX, step) + 1e-6
        y, x = mesh.ground(built.agl_m, built.rows, built.columns, pose)
        drawn = vertices.ravel()
        assert y.ravel()[drawn].min() >= 0
        assert x.ravel()[drawn].max() <= 52
    assert len(np.unique(np.sort(built.walls, axis=1), axis=0)) == len(built.walls)


def test_specks_are_closed_and_holes_stay() -> None:
    agl_m = np.full((40, 40), 3, np.float32)
    agl_m[5, 5] = agl_m[9, 9:11] = np.nan
    agl_m[20:30, 20:30] = np.nan
    built = mesh.build(agl_m, Pose(0.0, 1.0))
    assert np.isfinite(built.agl_m[:15]).all()
    assert np.isnan(built.agl_m[22:28, 22:28]).all()
    assert np.isnan(agl_m[5, 5])  # the caller's heights are left alone
