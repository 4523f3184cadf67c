"""Labels after any augmentation are those that the warped image itself shows; each known fault has its test."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from geopose_dist import geometry
from geopose_dist.augment import Augmenter, AugmentRecipe, Draw, Tone, apply, draw
from geopose_dist.data.sample import Part, View, Window
from geopose_dist.errors import UserError

POSE = {"gsd_m": 0.5, "scale_px_per_m": 0.6, "angle_rad": 0.7}
quick = settings(max_examples=80, deadline=None, derandomize=True)


def keyed(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[*key, 0][:2]))


def view(rows=64, cols=90, **changes) -> View:
    rng = keyed(1)
    agl = np.zeros((rows, cols), np.float32)
    agl[rows // 4 : rows // 2, cols // 4 : cols // 2] = 12
    rgb = rng.integers(0, 256, (rows, cols, 3), dtype=np.uint8)
    return dataclasses.replace(View("JAX_a", "JAX", rgb, agl, **POSE), **changes)


OPERATION = st.one_of(
    st.tuples(st.just("rotate"), st.one_of(st.integers(0, 359), st.sampled_from([90, 180, 270])).map(float)),
    st.tuples(st.sampled_from(["flip_x", "flip_y", "transpose"]), st.just(1.0)),
    st.tuples(st.just("zoom"), st.floats(0.7, 1.4)),
)


def measured_map(original: View, drawn: Draw):
    """float64 [3, 2], source (x, y, 1) to output (x, y), measured: the source's coordinates are sent through as if
    they were heights, and a plane is fitted to where they arrive."""
    drawn = dataclasses.replace(drawn, heights=None)
    planes = np.mgrid[: original.rgb.shape[0], : original.rgb.shape[1]].astype(np.float32)
    out_row, out_col = (apply(dataclasses.replace(original, agl_m=plane), drawn).agl_m for plane in planes)
    seen = np.isfinite(out_row)
    rows, cols = np.nonzero(seen)
    known = np.column_stack([out_col[seen], out_row[seen], np.ones(seen.sum())])
    fit, *_ = np.linalg.lstsq(known, np.column_stack([cols, rows]), rcond=None)
    return fit


@quick
@given(st.lists(OPERATION, max_size=5), st.booleans())
def test_labels_are_those_of_the_warped_flow(operations, cropped):
    """Roof to ground in the source is the flow; roof to ground in the output must be what the new labels say."""
    zoom = math.prod(value for name, value in operations if name == "zoom")
    if not 0.5 < zoom < 2:
        operations = [operation for operation in operations if operation[0] != "zoom"]
        zoom = 1.0
    original = view(96, 120)
    drawn = Draw(operations=tuple(operations), window=(10, 20, 70, 70) if cropped else None)
    out = apply(original, drawn)
    flow = 10 * POSE["scale_px_per_m"] * np.array(geometry.direction(POSE["angle_rad"]))
    wanted = flow @ measured_map(original, drawn)[:2]
    found = 10 * out.scale_px_per_m * np.array(geometry.direction(out.angle_rad))
    np.testing.assert_allclose(found, wanted, atol=0.12)
    assert out.gsd_m == pytest.approx(POSE["gsd_m"] / zoom)
    assert 0 <= out.angle_rad < 2 * math.pi


@quick
@given(st.lists(OPERATION, max_size=4), st.floats(1, 2), st.sampled_from([None, (4, 6, 80, 100)]))
def test_labels_are_those_of_the_warped_flow_with_heights_raised(operations, factor, window):
    """Every pixel of the image tells, as its colour, where its surface stands on the ground; whatever is done then, an
    output pixel's flow is the way from it to that place on the ground of the output, and the labels must say so."""
    zoom = math.prod(value for name, value in operations if name == "zoom")
    if not 0.6 < zoom < 1.6:
        operations = [operation for operation in operations if operation[0] != "zoom"]
    # 12 m move by (6, 8) px: whole numbers, which colours can tell.
    original = view(96, 120, scale_px_per_m=10 / 12, angle_rad=math.atan2(3, 4))
    x, y = geometry.flow_xy(original.agl_m, original.scale_px_per_m, original.angle_rad)
    row, col = np.mgrid[:96, :120]
    told = np.stack([(col + x) * 2, (row + y) * 2, np.where(original.agl_m > 0, 255, 0)], axis=-1)
    original = dataclasses.replace(original, rgb=np.rint(told).astype(np.uint8))
    drawn = Draw(heights=factor, operations=tuple(operations), window=window)
    out = apply(original, drawn)
    roof = (out.rgb[..., 2] == 255) & np.isclose(out.agl_m, 12 * factor, rtol=1e-4)
    assume(roof.sum() >= 30)
    ground = np.column_stack([out.rgb[roof][:, :2] / 2, np.ones(roof.sum())]) @ measured_map(original, drawn)
    rows, cols = np.nonzero(roof)
    measured = (ground - np.column_stack([cols, rows])).mean(axis=0)
    labelled = 12 * factor * out.scale_px_per_m * np.array(geometry.direction(out.angle_rad))
    np.testing.assert_allclose(labelled, measured, atol=0.4)


@pytest.mark.parametrize("count", range(6))
def test_right_angles_flips_and_transposes_are_numpys(count):
    original = view(31, 44)
    chains = list(itertools.product([0.0, 90.0, 180.0, 270.0], [False, True], [False, True], [False, True]))
    for degrees, flip_x, flip_y, transpose in chains[count::6]:
        operations = [("rotate", degrees)] if degrees else []
        rgb, agl = np.rot90(original.rgb, degrees // 90), np.rot90(original.agl_m, degrees // 90)
        if flip_x:
            operations, rgb, agl = [*operations, ("flip_x", 1.0)], rgb[:, ::-1], agl[:, ::-1]
        if flip_y:
            operations, rgb, agl = [*operations, ("flip_y", 1.0)], rgb[::-1], agl[::-1]
        if transpose:
            operations, rgb, agl = [*operations, ("transpose", 1.0)], rgb.transpose(1, 0, 2), agl.T
        out = apply(original, Draw(operations=tuple(operations)))
        np.testing.assert_array_equal(out.rgb, rgb)
        np.testing.assert_array_equal(out.agl_m, agl)
        assert out.inside is None


@pytest.mark.parametrize(
    "operations",
    [
        [("rotate", 90.0)] * 4,
        [("rotate", 180.0)] * 2,
        [("flip_x", 1.0)] * 2,
        [("flip_y", 1.0)] * 2,
        [("transpose", 1.0)] * 2,
        [("zoom", 1.0)],
        [("rotate", 90.0), ("rotate", 270.0)],
        [],
    ],
)
def test_exact_identities(operations):
    original = view(31, 44)
    out = original
    for operation in operations:  # one by one, so that every step is resampled
        out = apply(out, Draw(operations=(operation,)))
    together = apply(original, Draw(operations=tuple(operations), heights=1.0))
    for result in (out, together):
        np.testing.assert_array_equal(result.rgb, original.rgb)
        np.testing.assert_array_equal(result.agl_m, original.agl_m)
        assert result.scale_px_per_m == original.scale_px_per_m
        assert result.angle_rad == pytest.approx(original.angle_rad, abs=1e-12)


def test_fault_1_zoom_multiplies_scale_and_divides_gsd():
    """A wall of 12 m at .6 px/m shows 7.2 px; shrunk to .7 it shows 5.04 px, and the label must say so."""
    out = apply(view(), Draw(operations=(("zoom", 0.7),)))
    assert out.scale_px_per_m == pytest.approx(0.6 * 0.7)
    assert out.gsd_m == pytest.approx(0.5 / 0.7)
    roof = (out.agl_m == 12).sum(axis=1).max()
    assert roof == pytest.approx(0.7 * (view().agl_m == 12).sum(axis=1).max(), abs=1)


def _first_draw(key: tuple[int, ...]) -> Draw:
    return draw(AugmentRecipe("strong"), keyed(*key), view(), 32)


def test_fault_2_draws_depend_on_the_key_and_on_nothing_else():
    keys = [(seed, sample) for seed in range(2) for sample in range(8)]
    here = [_first_draw(key) for key in keys]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_first_draw, keys) == here, "whichever worker it is"
    assert len(set(map(str, here))) == len(keys), "no two samples or visits alike"


def test_fault_3_corners_of_a_rotation_are_unknown():
    out = apply(view(), Draw(operations=(("rotate", 30.0),)))
    assert out.inside is not None
    assert not out.inside[0, 0]
    np.testing.assert_array_equal(np.isnan(out.agl_m), ~out.inside)
    assert (out.rgb[~out.inside] == 0).all()


def test_fault_4_one_unknown_height_does_not_switch_raising_off():
    recipe = AugmentRecipe("none", heights_p=1.0)
    agl = view().agl_m.copy()
    agl[0, 0] = np.nan
    drawn = draw(recipe, keyed(3), view(agl_m=agl))
    assert drawn.heights is not None
    out = apply(view(agl_m=agl), drawn)
    assert np.nanmax(out.agl_m) == pytest.approx(12 * drawn.heights, rel=1e-5)


def test_fault_5_raised_samples_have_no_tell_tale():
    """Where nothing tall is, a raised sample is the original to the byte: not blurred, no holes."""
    out = apply(view(), Draw(heights=1.5))
    far = np.s_[40:60, 60:85]
    np.testing.assert_array_equal(out.rgb[far], view().rgb[far])
    assert out.scale_px_per_m == POSE["scale_px_per_m"]


def test_fault_6_tiles_need_not_be_square():
    original = view(40, 100)
    for operation in (("rotate", 20.0), ("zoom", 0.8), ("flip_x", 1.0)):
        assert apply(original, Draw(operations=(operation,))).rgb.shape == (40, 100, 3)
    for operation in (("rotate", 90.0), ("rotate", 270.0), ("transpose", 1.0)):
        assert apply(original, Draw(operations=(operation,))).agl_m.shape == (100, 40)
    assert apply(original, Draw(heights=1.7)).rgb.shape == (40, 100, 3)


@quick
@given(
    st.integers(0, 10**6),
    st.sampled_from(["none", "dihedral", "benchmark", "strong", "faithful"]),
    st.sampled_from([None, 32]),
)
def test_draws_survive_a_json_file_and_can_be_applied_again(seed, preset, crop_px):
    drawn = draw(AugmentRecipe(preset), keyed(seed), view(), crop_px)
    again = Draw.from_json(json.loads(json.dumps(drawn.to_json())))
    assert again == drawn
    first, second = apply(view(), drawn), apply(view(), again)
    np.testing.assert_array_equal(first.rgb, second.rgb)
    np.testing.assert_array_equal(first.agl_m, second.agl_m)
    if crop_px is not None:
        assert first.rgb.shape == (32, 32, 3)


@quick
@given(st.integers(0, 10**6))
def test_a_crop_is_the_cut_of_the_whole(seed):
    """Only the crop's pixels are computed, yet they are those of the whole tile's augmentation."""
    original = view(80, 70)
    drawn = draw(AugmentRecipe("strong", tone_p=0.0, heights_p=0.7), keyed(seed), original, 32)
    row, col, rows, cols = drawn.window
    out = apply(original, drawn)
    # A window as large as the tile about the same centre holds the crop in its middle.
    wider = dataclasses.replace(drawn, window=(row - 10, col - 10, rows + 20, cols + 20))
    whole = apply(original, wider)
    close = (
        np.abs(whole.rgb[10:-10, 10:-10].astype(int) - out.rgb).max(-1) <= 2
    )  # weights of 1/128 may round apart
    assert close.mean() > 0.99
    np.testing.assert_allclose(
        np.nan_to_num(whole.agl_m[10:-10, 10:-10], nan=-9), np.nan_to_num(out.agl_m, nan=-9), atol=0.01
    ) if close.all() else None


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


def test_tone_changes_colours_and_nothing_else():
    tone = Tone(
        gamma=1.2, contrast=0.9, brightness=0.05, colour=(1.05, 1, 0.95), haze=0.1, noise=3, noise_seed=4
    )
    out = apply(view(), Draw(tone=tone))
    np.testing.assert_array_equal(out.agl_m, view().agl_m)
    assert out.pose == view().pose
    assert (out.rgb != view().rgb).mean() > 0.5
    np.testing.assert_array_equal(apply(view(), Draw(tone=tone)).rgb, out.rgb)
    flat = view(200, 200)
    flat.rgb[:] = 128
    noisy = apply(flat, Draw(tone=Tone(1, 1, 0, (1, 1, 1), 0, 6.0, 7))).rgb
    assert noisy.std() == pytest.approx(6, rel=0.05)
    assert noisy.mean() == pytest.approx(128, abs=0.2)


def test_padding_that_was_there_stays_padding():
    inside = np.ones((64, 90), bool)
    inside[:, :20] = False
    out = apply(view(inside=inside), Draw(operations=(("flip_x", 1.0),)))
    np.testing.assert_array_equal(out.inside, inside[:, ::-1])


def test_faithful_repeats_the_faults_it_names():
    out = apply(view(), Draw(operations=(("zoom", 0.7), ("rotate", 30.0)), faults=True))
    assert out.scale_px_per_m == pytest.approx(0.6 / 0.7)
    assert out.agl_m[0, 0] == 0
    agl = view().agl_m.copy()
    agl[0, 0] = np.nan
    drawn = [draw(AugmentRecipe("faithful", heights_p=1.0), keyed(i), view(agl_m=agl)) for i in range(3)]
    assert all(d.heights is None and d.faults for d in drawn)


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


def test_apply_leaves_its_view_alone():
    original = view()
    rgb, agl = original.rgb.copy(), original.agl_m.copy()
    for i in range(10):
        Augmenter(AugmentRecipe("strong"), 32)(original, keyed(i))
    np.testing.assert_array_equal(original.rgb, rgb)
    np.testing.assert_array_equal(original.agl_m, agl)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rgb": np.zeros((64, 90, 3), np.float32)},
            r"view.rgb is float32 \[64, 90, 3\]; wanted uint8 \[H, W, 3\]",
        ),
        ({"rgb": np.zeros((64, 90, 4), np.uint8)}, r"view.rgb is uint8 \[64, 90, 4\]; wanted uint8"),
        ({"rgb": None}, "view.rgb is a NoneType; wanted uint8"),
        (
            {"agl_m": np.zeros((64, 90))},
            r"view.agl_m is float64 \[64, 90\]; wanted float32 \[64, 90\] as rgb",
        ),
        (
            {"agl_m": np.zeros((64, 91), np.float32)},
            r"view.agl_m is float32 \[64, 91\]; wanted float32 \[64, 90\]",
        ),
        ({"inside": np.ones((3, 4), bool)}, r"view.inside is bool \[3, 4\]; wanted bool \[64, 90\]"),
        (
            {"part": Part(Window(0, 0, 64, 80), (64, 90), 1.0)},
            "view.part is Part.*; wanted the place of its pixels",
        ),
        (
            {"part": Part(Window(1, 0, 64, 90), (64, 90), 1.0)},
            "view.part is Part.*; wanted the place of its pixels",
        ),
    ],
)
def test_views_that_are_no_tiles_are_refused(changes, said):
    for drawn in (Draw(), Draw(operations=(("flip_x", 1.0),))):
        with pytest.raises(ValueError, match=said):
            apply(dataclasses.replace(view(), **changes), drawn)


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


@pytest.mark.parametrize(("missing", "said"), [("agl_m", "heights"), ("angle_rad", "pose")])
def test_raising_what_is_not_known_is_refused(missing, said):
    with pytest.raises(
        ValueError, match=rf"drawn.heights is 1.5; wanted None for JAX_a, which has no {said}"
    ):
        apply(view(**{missing: None}), Draw(heights=1.5))
