"""raise_heights against the same ground rendered again with higher buildings, and against its own algebra."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from geopose_dist.augment import raise_heights

BENCHMARK_ERROR_M = {
    0: {"1.3": 0.29, "2.0": 0.67},
    1: {"1.3": 0.16, "2.0": 0.44},
    2: {"1.3": 0.30, "2.0": 0.56},
    3: {"1.3": 0.22, "2.0": 0.77},
}
"""Mean errors of the benchmark's own warp, as recorded beside raised.npz."""
BORDER = 40


def measure(truth_agl, truth_rgb, before_rgb, agl, rgb):
    """(agreement, mean error in metres, RGB difference as a share of the unwarped image's)."""
    near = sliding_window_view(np.pad(truth_agl, 1, mode="edge"), (3, 3))
    looked_at = np.zeros(truth_agl.shape, bool)
    looked_at[BORDER:-BORDER, BORDER:-BORDER] = True
    looked_at &= truth_agl > 2
    with np.errstate(invalid="ignore"):
        agrees = (agl >= near.min((2, 3)) - 0.5) & (agl <= near.max((2, 3)) + 0.5)
    error = np.abs(agl - truth_agl)[looked_at].mean()
    difference = [np.abs(image.astype(float) - truth_rgb)[looked_at].mean() for image in (rgb, before_rgb)]
    return agrees[looked_at].mean(), error, difference[0] / difference[1]


@pytest.fixture(scope="module")
def scenes(shared):
    return np.load(shared / "conformance/raised.npz")


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("factor", ["1.3", "2.0"])
def test_equals_the_scene_rendered_higher(scenes, k, factor):
    scale, angle = float(scenes[f"s{k}_scale_px_per_m"]), float(scenes[f"s{k}_angle_rad"])
    before = scenes[f"s{k}_rgb"], scenes[f"s{k}_agl_m"]
    rgb, agl = raise_heights(*before, scale, angle, float(factor))
    truth = scenes[f"s{k}_f{factor}_agl_m"], scenes[f"s{k}_f{factor}_rgb"]
    agreement, error, difference = measure(*truth, before[0], agl, rgb)
    assert agreement >= 0.995
    assert error <= 0.9 * BENCHMARK_ERROR_M[k][factor]
    assert difference <= 0.65
    assert not np.isnan(agl[BORDER:-BORDER, BORDER:-BORDER]).any()


def test_mean_error_is_well_below_the_benchmarks(scenes):
    ratios = []
    for k, errors in BENCHMARK_ERROR_M.items():
        for factor, error_m in errors.items():
            scale, angle = float(scenes[f"s{k}_scale_px_per_m"]), float(scenes[f"s{k}_angle_rad"])
            before = scenes[f"s{k}_rgb"], scenes[f"s{k}_agl_m"]
            rgb, agl = raise_heights(*before, scale, angle, float(factor))
            truth = scenes[f"s{k}_f{factor}_agl_m"], scenes[f"s{k}_f{factor}_rgb"]
            ratios.append(measure(*truth, before[0], agl, rgb)[1] / error_m)
    assert np.mean(ratios) <= 0.6


def scene(rows=90, cols=130):
    """Flat ground, two blocks with walls as a camera at `angle` pi/2 sees them; colour tells places apart."""
    agl = np.zeros((rows, cols), np.float32)
    agl[20:60, 40:70] = 12
    ramp = 12 - np.arange(1, 7) * 2.0  # a wall 12 m high at 0.5 px/m is 6 px wide
    agl[20:60, 70:76] = ramp
    rgb = np.zeros((rows, cols, 3), np.uint8)
    rgb[..., 0] = np.arange(cols)
    rgb[..., 1] = np.arange(rows)[:, None]
    rgb[..., 2] = agl * 10
    return rgb, agl


def test_factor_1_is_the_identity():
    rgb, agl = scene()
    agl[5, 5] = np.nan
    out_rgb, out_agl = raise_heights(rgb, agl, 0.5, math.pi / 2, 1.0)
    np.testing.assert_array_equal(out_rgb, rgb)
    np.testing.assert_array_equal(out_agl, agl)
    assert out_agl is not agl


def test_a_factor_near_1_is_near_the_identity():
    rgb, agl = scene()
    _, out_agl = raise_heights(rgb, agl, 0.5, math.pi / 2, 1.0 + 1e-6)
    np.testing.assert_allclose(out_agl, agl, atol=1e-3)


def test_roofs_move_facades_stretch_and_ground_stays():
    rgb, agl = scene()
    out_rgb, out_agl = raise_heights(rgb, agl, 0.5, math.pi / 2, 2.0)
    # 12 m more at 0.5 px/m: the roof moves 6 px against the flow, to columns 34..63, and keeps its size.
    np.testing.assert_allclose(out_agl[40, 34:64], 24, atol=1e-4)
    np.testing.assert_array_equal(out_rgb[40, 35:64, 0], np.arange(41, 70))
    # The wall's foot stays at column 75 and the wall is twice as wide: 2 m per pixel, as before.
    np.testing.assert_allclose(out_agl[40, 64:76], 24 - 2 * np.arange(1, 13), atol=1e-3)
    # Elsewhere nothing moved, to the byte: no blur that tells a raised sample from another.
    still = np.ones(agl.shape, bool)
    still[20:60, 33:76] = False
    np.testing.assert_array_equal(out_rgb[still], rgb[still])
    np.testing.assert_array_equal(out_agl[still], 0)


@pytest.mark.parametrize("angle", [0.4, 1.9, 3.6, 5.5])
def test_no_direction_is_favoured(angle):
    """Rounding has no bias: the tile turned by 180 degrees and its negative flow give the turned answer."""
    rng = np.random.Generator(np.random.Philox(3))
    rgb, agl = scene()
    rgb = rng.integers(0, 256, rgb.shape, dtype=np.uint8)
    out_rgb, out_agl = raise_heights(rgb, agl, 0.7, angle, 1.6)
    turned = raise_heights(rgb[::-1, ::-1], agl[::-1, ::-1], 0.7, angle + math.pi, 1.6)
    same = np.isclose(turned[1][::-1, ::-1], out_agl, atol=1e-3, equal_nan=True)
    assert same.mean() > 0.999
    assert (np.abs(turned[0][::-1, ::-1].astype(int) - out_rgb).max(-1) <= 2)[same].mean() > 0.999


def test_rows_and_columns_are_not_swapped():
    """A tile that is not square, and its transpose with the transposed flow, give transposed answers."""
    rgb, agl = scene()
    angle = 0.5
    out_rgb, out_agl = raise_heights(rgb, agl, 0.7, angle, 1.6)
    swapped = raise_heights(rgb.transpose(1, 0, 2), agl.T, 0.7, math.pi / 2 - angle, 1.6)
    same = np.isclose(swapped[1].T, out_agl, atol=1e-3, equal_nan=True)
    assert same.mean() > 0.999
    assert (np.abs(swapped[0].transpose(1, 0, 2).astype(int) - out_rgb).max(-1) <= 2)[same].mean() > 0.999


def test_unknown_heights_do_not_switch_it_off():
    rgb, agl = scene()
    speckled = agl.copy()
    rng = np.random.Generator(np.random.Philox(4))
    speckled[rng.random(agl.shape) < 0.05] = np.nan
    out_rgb, whole = raise_heights(rgb, agl, 0.5, math.pi / 2, 2.0)
    speckled_rgb, out = raise_heights(rgb, speckled, 0.5, math.pi / 2, 2.0)
    assert 0.03 < np.isnan(out).mean() < 0.07, "each unknown surface stays about as large as it was"
    known = ~np.isnan(out)
    assert (np.abs(out - whole)[known] < 2.5).mean() > 0.99
    assert (np.abs(speckled_rgb.astype(int) - out_rgb).max(-1) <= 12).mean() > 0.98


def test_nan_only_where_the_line_of_sight_leaves_or_the_surface_is_unknown():
    agl = np.zeros((30, 60), np.float32)
    agl[:, 50:] = 10  # a roof that goes on beyond the tile's right side, which the flow points to
    rgb = np.full((30, 60, 3), 99, np.uint8)
    out_rgb, out = raise_heights(rgb, agl, 1.0, math.pi / 2, 1.5)
    np.testing.assert_array_equal(np.isnan(out).any(axis=0), np.arange(60) >= 55)
    np.testing.assert_array_equal(out_rgb[:, 55:], 0)
    np.testing.assert_array_equal(out_rgb[:, :55], 99)


def test_heights_and_magnitudes_agree():
    """The surface that came from p + shift has height shift / (scale * (f - 1)) * f: nothing is filtered apart."""
    rng = np.random.Generator(np.random.Philox(5))
    _, agl = scene()
    places = np.zeros((*agl.shape, 3), np.uint8)
    places[..., 0] = np.arange(agl.shape[1])
    scale, factor = 0.5, 1.75
    out_rgb, out_agl = raise_heights(
        places, agl + rng.uniform(0, 0.2, agl.shape).astype(np.float32), scale, math.pi / 2, factor
    )
    came_from = out_rgb[..., 0].astype(float)
    shift = came_from - np.arange(agl.shape[1])
    wanted = shift / (scale * (factor - 1)) * factor
    known = ~np.isnan(out_agl)
    assert (
        np.abs(out_agl - wanted)[known].max() <= 0.51 / (scale * (factor - 1)) * factor
    )  # bytes hold whole pixels


@pytest.mark.parametrize("factor", [0.99, 11, math.nan, math.inf, -1])
def test_a_factor_out_of_range_is_refused(factor):
    rgb, agl = scene()
    with pytest.raises(ValueError, match=r"factor is .*; wanted a finite number from 1 to 10"):
        raise_heights(rgb, agl, 0.5, 0.0, factor)


def test_other_wrong_arguments_are_named():
    rgb, agl = scene()
    with pytest.raises(ValueError, match="scale_px_per_m is nan"):
        raise_heights(rgb, agl, math.nan, 0.0, 1.0)
    with pytest.raises(ValueError, match="agl_m is float64"):
        raise_heights(rgb, agl.astype(float), 0.5, 0.0, 1.5)
    with pytest.raises(ValueError, match="wanted the size of rgb"):
        raise_heights(rgb, agl[:-1], 0.5, 0.0, 1.5)
