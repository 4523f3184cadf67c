"""The flow algebra against arrays: a pose changes under an image operation as the flow itself does."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopose_dist import geometry
from geopose_dist.geometry import Pose

ANGLES = st.floats(-10, 10)
SCALES = st.floats(0.01, 3.0)


def test_angle_zero_points_down_and_a_quarter_turn_points_right() -> None:
    assert geometry.direction(0.0) == (0.0, 1.0)
    x, y = geometry.direction(math.pi / 2)
    assert x == 1.0
    assert abs(y) < 1e-15


@given(ANGLES)
def test_direction_and_angle_are_inverse(angle: float) -> None:
    back = geometry.angle_of(*geometry.direction(angle))
    assert 0 <= back < 2 * math.pi
    assert geometry.angle_difference_deg(back, angle) < 1e-9


@given(st.floats(-1e4, 1e4))
def test_wrapped_angles_are_in_one_turn(angle: float) -> None:
    wrapped = geometry.wrap_angle(angle)
    assert 0 <= wrapped < 2 * math.pi
    assert math.isclose(math.cos(wrapped), math.cos(angle), abs_tol=1e-9)
    assert geometry.wrap_angle(-1e-17) == 0.0


def roof_and_foot(shape: tuple[int, int], roof: tuple[int, int], foot: tuple[int, int]) -> np.ndarray:
    """An image [H, W] that marks where a roof point is seen (1) and its place on the ground (2)."""
    marked = np.zeros(shape, np.uint8)
    marked[roof], marked[foot] = 1, 2
    return marked


def found(marked: np.ndarray) -> tuple[float, float]:
    """Flow (dx, dy) from the roof to the foot, read off the array."""
    (roof_row, roof_column), (foot_row, foot_column) = (np.argwhere(marked == k)[0] for k in (1, 2))
    return float(foot_column - roof_column), float(foot_row - roof_row)


Operation = tuple[Callable[[np.ndarray], np.ndarray], Callable[[Pose], Pose]]
OPERATIONS: dict[str, Operation] = {
    "flip_x": (lambda image: image[:, ::-1], Pose.flipped_x),
    "flip_y": (lambda image: image[::-1], Pose.flipped_y),
    "transpose": (lambda image: image.T, Pose.transposed),
    # np.rot90 turns counter-clockwise as seen on the screen (rows down, columns right).
    "quarter turn": (np.rot90, lambda pose: pose.rotated(90)),
    "half turn": (lambda image: np.rot90(image, 2), lambda pose: pose.rotated(180)),
    "zoom": (
        lambda image: np.kron(image, np.array([[1, 0], [0, 0]], np.uint8)),
        lambda pose: pose.zoomed(2.0),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(
    points=st.lists(st.tuples(st.integers(0, 18), st.integers(0, 25)), min_size=2, max_size=2, unique=True)
)
@settings(max_examples=60, deadline=None)
def test_pose_follows_the_image(name: str, points: list[tuple[int, int]]) -> None:
    on_image, on_pose = OPERATIONS[name]
    marked = roof_and_foot((19, 26), points[0], points[1])  # not square: swapped rows and columns would show
    dx, dy = found(marked)
    height_m = 7.0
    pose = Pose(geometry.angle_of(dx, dy), math.hypot(dx, dy) / height_m, 0.5)
    after = on_pose(pose)
    flow = geometry.flow_xy(np.full((1, 1), height_m, np.float32), after.scale_px_per_m, after.angle_rad)
    assert [float(component[0, 0]) for component in flow] == pytest.approx(found(on_image(marked)), abs=1e-4)


@given(ANGLES, SCALES, st.floats(0.2, 4.0))
def test_zoom_keeps_the_camera(angle: float, scale: float, factor: float) -> None:
    pose = Pose(geometry.wrap_angle(angle), scale, 0.4)
    zoomed = pose.zoomed(factor)
    assert zoomed.scale_px_per_m == pytest.approx(scale * factor)  # fault 1 of the benchmark: scale / factor
    assert zoomed.gsd_m == pytest.approx(0.4 / factor)
    before, after = (geometry.zenith_from_scale(p.scale_px_per_m, p.gsd_m or 0) for p in (pose, zoomed))
    assert after == pytest.approx(before)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_zoom_refuses_what_is_no_factor(factor: float) -> None:
    with pytest.raises(ValueError, match="zoom factor"):
        Pose(0.0, 1.0).zoomed(factor)


@given(st.floats(1, 50))
def test_zenith_agrees_with_the_camera_model(degrees: float) -> None:
    z = math.radians(degrees)
    gsd = 0.4
    scale = math.sin(z) / (gsd * math.sqrt(math.cos(z)))
    assert geometry.zenith_from_scale(scale, gsd) == pytest.approx(z)


def test_heights_survive_the_files_and_unknown_stays_unknown() -> None:
    cm = np.array([[0, 1, 65534, 65535]], np.uint16)
    metres = geometry.agl_m_from_cm(cm)
    assert metres.dtype == np.float32
    assert np.isnan(metres[0, 3])
    back, clipped = geometry.agl_cm_from_m(metres, unknown_allowed=True)
    assert clipped == 0
    np.testing.assert_array_equal(back, cm)


def test_heights_outside_the_file_are_clipped_and_counted() -> None:
    cm, clipped = geometry.agl_cm_from_m(
        np.array([[-0.5, 655.36, 1e9, 3.0]], np.float32), unknown_allowed=False
    )
    assert cm.tolist() == [[0, 65534, 65534, 300]]  # fault 11: a cast to uint16 would wrap 655.36 m to 0
    assert clipped == 3


def test_a_prediction_without_a_height_is_refused() -> None:
    with pytest.raises(ValueError, match="1 NaN"):
        geometry.agl_cm_from_m(np.array([[np.nan, 1.0]], np.float32), unknown_allowed=False)


def test_angles_are_averaged_as_vectors() -> None:
    angles = np.radians([350.0, 20.0])
    assert math.degrees(geometry.mean_angle(angles)) == pytest.approx(5.0)  # fault 12: as numbers 185
    assert math.degrees(geometry.mean_angle(angles, np.array([1.0, 0.0]))) == pytest.approx(350.0)


@given(ANGLES, st.floats(0, 180))
def test_angle_differences_are_short_ways(angle: float, degrees: float) -> None:
    difference = geometry.angle_difference_deg(angle, angle - math.radians(degrees))
    assert difference == pytest.approx(degrees, abs=1e-6)


@pytest.mark.parametrize(
    ("scale", "angle", "unit", "said"),
    [
        (0.01, 1.0, "px/cm", None),
        (0.0001, 700.0, "px/cm", None),  # any finite angle, and scales far below the sensor's
        (1.0, 0.0, "px/cm", "looks like px/m"),
        (0.01, 0.0, "px/m", "looks like px/cm"),
        (math.nan, 0.0, "px/cm", "scale is nan"),
        (-0.01, 0.0, "px/cm", "above 0"),
        (0.01, math.inf, "px/cm", "angle is inf"),
    ],
)
def test_labels_are_judged_in_one_sentence(scale: float, angle: float, unit: str, said: str | None) -> None:
    problems = geometry.check_label(scale, angle, unit, "x.json")
    assert len(problems) == (said is not None)
    assert all(said is not None and said in problem and problem.startswith("x.json") for problem in problems)
