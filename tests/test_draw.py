"""What is drawn for a sample: crops, probabilities, ranges, and what cannot be drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from views import keyed, view

from geopose_dist.augment import Augmenter, AugmentRecipe, Draw, apply, draw
from geopose_dist.errors import UserError


def test_crops_reach_every_pixel_and_avoid_padding():
    recipe = AugmentRecipe("none")
    places = [draw(recipe, keyed(5, i), view(40, 50), 32).window[:2] for i in range(400)]
    rows, cols = zip(*places, strict=True)
    assert (min(rows), max(rows), min(cols), max(cols)) == (0, 8, 0, 18)
    turned = AugmentRecipe("none", rotate_p=1.0)
    for i in range(40):
        out = Augmenter(turned, 32)(view(64, 90), keyed(6, i))
        assert out.inside is None, "a turned crop that fits into the tile has no padding"


def test_a_crop_larger_than_the_tile_names_both():
    with pytest.raises(UserError, match=r"JAX_a: the crop is 65 px, larger than the tile of 64 x 90 px"):
        Augmenter(AugmentRecipe("none"), 65)(view(), keyed(0))


def test_benchmark_probabilities_and_ranges():
    drawn = [draw(AugmentRecipe("benchmark"), keyed(9, i), view()) for i in range(3000)]
    names = [dict(d.operations) for d in drawn]
    for name in ("rotate", "flip_x", "flip_y", "zoom"):
        assert np.mean([name in chosen for chosen in names]) == pytest.approx(0.3, abs=0.03), name
    factors = [d.heights for d in drawn if d.heights is not None]
    assert len(factors) / len(drawn) == pytest.approx(0.3, abs=0.03)
    assert 1 <= min(factors) < 1.05
    assert 1.95 < max(factors) <= 2
    degrees = {chosen["rotate"] for chosen in names if "rotate" in chosen}
    assert all(value == int(value) and 0 < value < 360 for value in degrees)
    zooms = [chosen["zoom"] for chosen in names if "zoom" in chosen]
    assert 0.7 <= min(zooms) < 0.71
    assert 0.99 < max(zooms) <= 1
    orders = {tuple(chosen) for chosen in names}
    assert ("rotate", "flip_x", "flip_y", "zoom") in orders
    assert all(
        list(order) == sorted(order, key=["rotate", "flip_x", "flip_y", "zoom"].index) for order in orders
    )


def test_no_building_is_raised_above_200_m():
    tall = view()
    tall.agl_m[3, 3] = 160
    factors = [draw(AugmentRecipe("none", heights_p=1.0), keyed(i), tall).heights for i in range(200)]
    assert 1.2 < max(factors) <= 200 / 160
    tall.agl_m[3, 3] = 250
    drawn = draw(AugmentRecipe("none", heights_p=1.0), keyed(0), tall)
    assert drawn.heights is None
    assert drawn.skipped == ("heights: the tallest of JAX_a is 250.0 m already",)


def test_samples_without_labels_skip_what_needs_them_and_say_so():
    recipe = AugmentRecipe("strong", heights_p=1.0, zoom_p=1.0)
    for missing, said in (
        ({"agl_m": None}, "heights: JAX_a has no heights"),
        ({"scale_px_per_m": None, "angle_rad": None}, "heights: JAX_a has no pose"),
        ({"agl_m": np.full((64, 90), np.nan, np.float32)}, "heights: JAX_a has no known height above 0"),
    ):
        bare = view(**missing)
        drawn = draw(recipe, keyed(1), bare, 32)
        out = apply(bare, drawn)
        assert drawn.heights is None
        assert drawn.skipped == (said,)
        assert (out.agl_m is None) == (bare.agl_m is None)
        assert (out.pose is None) == (bare.pose is None)
        assert out.gsd_m == pytest.approx(0.5 / dict(drawn.operations)["zoom"])


def test_switching_one_operation_off_leaves_the_others_as_they_were():
    for i in range(50):
        all_on = draw(AugmentRecipe("strong"), keyed(i), view(), 32)
        without = draw(AugmentRecipe("strong", rotate_p=0.0, heights_p=0.0), keyed(i), view(), 32)
        assert [o for o in all_on.operations if o[1] % 90 == 0 or o[0] != "rotate"] == list(
            without.operations
        )
        assert all_on.tone == without.tone


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"preset": "odd"}, "preset is 'odd'; wanted one of none, dihedral"),
        ({"heights_p": 1.5}, "heights_p is 1.5; a probability"),
        ({"zoom_min": 2.0}, r"zoom_min .. zoom_max is 2.0 .. 1.4"),
        ({"order": ("rotate",)}, r"order is \['rotate'\]; wanted each of"),
        ({"heights_max_factor": 0.5}, "heights_max_factor is 0.5"),
        ({"noise": -1.0}, "noise is -1.0; it must be between 0 and 40"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        AugmentRecipe(**fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"heights": 0.9}, "heights is 0.9; wanted None or a factor from 1 to 10"),
        ({"heights": math.nan}, "heights is nan; wanted"),
        ({"operations": (("shear", 1.0),)}, "operations has 'shear'; wanted rotate, zoom"),
        ({"operations": (("zoom", 0.0),)}, "operations has zoom 0.0; wanted a finite number, above 0"),
        ({"operations": (("rotate", math.inf),)}, "operations has rotate inf"),
        ({"window": (0, 0, 0, 5)}, r"window is \(0, 0, 0, 5\); wanted row, column and at least 1"),
    ],
)
def test_draws_that_cannot_be_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Draw(**fields)
