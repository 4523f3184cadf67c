"""Reducing and enlarging: registered to the reduced pixel's centre, no bleeding, no averaging over edges."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geopose_dist.data import resample


def plane(rows, columns, down, right, level=3.0):
    r, c = np.mgrid[:rows, :columns]
    return (level + down * r + right * c).astype(np.float32)


def centres(rows, columns, factor, down, right, level=3.0):
    r, c = np.mgrid[: rows // factor, : columns // factor] * factor + (factor - 1) / 2
    return level + down * r + right * c


SLOPES = st.floats(-4, 4)


@given(SLOPES, SLOPES, st.sampled_from([2, 3, 4]))
def test_a_plane_is_registered_to_the_reduced_centre(down, right, factor):
    agl = plane(24, 36, down, right)
    small = resample.reduce_agl(agl, factor)
    np.testing.assert_allclose(small, centres(24, 36, factor, down, right), atol=2e-4)
    back = resample.enlarge_agl(small, factor, (24, 36))
    np.testing.assert_allclose(back, agl, atol=5e-4)


def test_the_registration_is_that_of_the_rgb():
    ramp = plane(64, 64, 1.5, 0.75, level=0)
    rgb = np.repeat(ramp.astype(np.uint8)[:, :, None], 3, axis=2)
    small = resample.reduce_agl(ramp, 2)
    assert np.abs(resample.reduce_rgb(rgb, 2)[:, :, 0] - (small - 0.4375)).max() <= 0.75
    assert np.abs(ramp[::2, ::2] - small).min() > 1.1  # what plain subsampling would be off by


def test_a_ramp_in_rounded_centimetres_is_still_one_surface():
    agl = np.round(plane(64, 64, 1.237, -0.871, 80), 2).astype(np.float32)
    np.testing.assert_allclose(
        resample.reduce_agl(agl, 2), centres(64, 64, 2, 1.237, -0.871, 80), atol=0.0051
    )


@given(st.integers(0, 2**32), st.sampled_from([2, 4]), st.floats(0, 0.7))
def test_unknown_never_bleeds(seed, factor, share):
    rng = np.random.Generator(np.random.Philox(seed))
    agl = plane(16, 16, 0.3, 0.2)
    agl[rng.random(agl.shape) < share] = np.nan
    small = resample.reduce_agl(agl, factor)
    blocks = agl.reshape(16 // factor, factor, -1, factor).swapaxes(1, 2).reshape(16 // factor, -1, factor**2)
    unknown = np.isnan(blocks).sum(axis=2)
    np.testing.assert_array_equal(np.isnan(small), 2 * unknown >= factor**2)
    # Left-out pixels do not move what a plane gives at the centre.
    np.testing.assert_allclose(
        small[~np.isnan(small)], centres(16, 16, factor, 0.3, 0.2)[~np.isnan(small)], atol=1e-5
    )


@given(st.integers(0, 2**32), st.sampled_from([2, 3, 4]))
def test_no_height_lies_between_two_roofs(seed, factor):
    rng = np.random.Generator(np.random.Philox(seed))
    levels = np.array([0.0, 3.1, 7.7, 19.3, 46.0], np.float32)
    agl = np.zeros((24, 24), np.float32)
    for _ in range(8):
        top, left = rng.integers(0, 22, 2)
        agl[top : top + rng.integers(2, 12), left : left + rng.integers(2, 12)] = rng.choice(levels)
    agl[rng.random(agl.shape) < 0.1] = np.nan
    small = resample.reduce_agl(agl, factor)
    known = small[~np.isnan(small)]
    assert np.abs(known[:, None] - levels).min(axis=1).max(initial=0) < 1e-5


def test_an_edge_keeps_the_larger_surface_and_the_taller_of_equals():
    agl = np.zeros((4, 8), np.float32)
    agl[:, 3:] = 10  # cuts the second block in two
    agl[0, 0] = 10  # one pixel of four
    np.testing.assert_array_equal(resample.reduce_agl(agl, 2), [[0, 10, 10, 10], [0, 10, 10, 10]])


def test_reducing_commutes_with_flips():
    rng = np.random.Generator(np.random.Philox(5))
    agl = (rng.integers(0, 3, (32, 32)) * 5 + rng.random((32, 32)) * 0.2).astype(np.float32)
    agl[rng.random(agl.shape) < 0.2] = np.nan
    for flip in (np.fliplr, np.flipud, np.transpose):
        np.testing.assert_allclose(
            resample.reduce_agl(np.ascontiguousarray(flip(agl)), 2),
            flip(resample.reduce_agl(agl, 2)),
            atol=1e-6,
        )


@given(st.integers(0, 2**32))
def test_enlarging_never_overshoots_and_keeps_steps(seed):
    rng = np.random.Generator(np.random.Philox(seed))
    small = rng.choice(np.array([0, 4, 9, 30], np.float32), (9, 7))
    large = resample.enlarge_agl(small, 2, (18, 14))
    windows = np.pad(small, 1, mode="edge")
    low, high = (
        cv2.erode(windows, np.ones((3, 3)))[1:-1, 1:-1],
        cv2.dilate(windows, np.ones((3, 3)))[1:-1, 1:-1],
    )
    inner = np.s_[2:-2, 2:-2]  # a slope that leaves the tile is carried on
    assert (large >= low.repeat(2, 0).repeat(2, 1) - 1e-4)[inner].all()
    assert (large <= high.repeat(2, 0).repeat(2, 1) + 1e-4)[inner].all()
    np.testing.assert_allclose(large.reshape(9, 2, 7, 2).mean(axis=(1, 3)), small, atol=1e-5)


def test_enlarging_a_step_is_a_step():
    small = np.zeros((6, 6), np.float32)
    small[:, 3:] = 12
    large = resample.enlarge_agl(small, 2, (12, 12))
    np.testing.assert_array_equal(large, small.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(resample.reduce_agl(large, 2), small)


def test_unknown_stays_unknown_when_enlarged():
    small = plane(6, 6, 0.4, 0.2)
    small[2, 3] = np.nan
    large = resample.enlarge_agl(small, 3, (18, 18))
    assert np.isnan(large).sum() == 9
    np.testing.assert_allclose(resample.reduce_agl(large, 3), small, atol=1e-5)


def test_rgb_is_reduced_by_area():
    rng = np.random.Generator(np.random.Philox(3))
    rgb = rng.integers(0, 256, (18, 24, 3), dtype=np.uint8)
    for factor in (2, 3):
        mean = rgb.reshape(18 // factor, factor, -1, factor, 3).mean(axis=(1, 3))
        assert np.abs(resample.reduce_rgb(rgb, factor) - mean).max() <= 0.5
    assert resample.reduce_rgb(rgb, 1) is rgb


def test_odd_sizes():
    with pytest.raises(ValueError, match=r"7 x 8 pixels .* cannot be reduced by 2.*such as 6 x 8"):
        resample.reduce_agl(np.zeros((7, 8), np.float32), 2)
    with pytest.raises(ValueError, match="cannot be reduced by 2"):
        resample.reduce_rgb(np.zeros((8, 7, 3), np.uint8), 2)
    assert resample.pad_rgb(np.zeros((7, 9, 3), np.uint8), 4).shape == (8, 12, 3)
    assert resample.enlarge_agl(np.zeros((2, 3), np.float32), 4, (7, 9)).shape == (7, 9)
    with pytest.raises(ValueError, match="do not make"):
        resample.enlarge_agl(np.zeros((2, 3), np.float32), 4, (4, 9))
