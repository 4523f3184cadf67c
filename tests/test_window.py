"""A crop's sample from the window that its draw reads: same draws, same pixels, same labels as from the whole tile."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import tile as random_tile
from views import assert_same, keyed

from geopose_dist import geometry, kernels
from geopose_dist.augment import Augmenter, AugmentRecipe, Draw, apply, draw, needed_window
from geopose_dist.augment.window import map_of
from geopose_dist.data import codecs
from geopose_dist.data.sample import Outline, Part, TileFacts, View, Window
from geopose_dist.data.tile import Tile, tallest_m, unknown_px
from geopose_dist.errors import UserError

quick = settings(max_examples=60, deadline=None, derandomize=True)
PRESETS = ["none", "dihedral", "benchmark", "strong", "faithful"]
ROWS, COLS = 150, 170


def tile(seed: int, gaps: float = 0.0, codec: str = "tiled", rows: int = ROWS, cols: int = COLS) -> Tile:
    """A tile of towers on rough ground as the reader has it: bytes, and facts as `geopose pack` tells them."""
    rng = keyed(seed, 5)
    agl_cm = rng.integers(0, 60, (rows, cols)).astype(np.uint16)
    for _ in range(12):
        top, left = rng.integers(0, rows), rng.integers(0, cols)
        agl_cm[top : top + 22, left : left + 18] = rng.integers(300, 4000)
    agl_cm[rng.random(agl_cm.shape) < gaps] = 65535
    if gaps:
        agl_cm[rows // 3 : rows // 2, cols // 4 : cols // 2] = 65535
    rgb = rng.integers(0, 256, (rows, cols, 3), dtype=np.uint8)
    told = tallest_m(agl_cm), unknown_px(agl_cm)
    facts = TileFacts("JAX", None, 0.5, 0.9, float(rng.uniform(0, 6.28)), (rows, cols), *told)
    return tile_of(facts, rgb, agl_cm, codec)


def tile_of(facts: TileFacts, rgb: np.ndarray, agl_cm: np.ndarray | None, codec: str) -> Tile:
    members = {
        f"rgb.{codecs.by_name(codecs.RGB_CODECS, codec).extension}": codecs.encode_rgb(codec, rgb),
        "json": facts.to_json(),
    }
    if agl_cm is not None:
        name = codec if codec in codecs.AGL_CODECS else "lerc"
        members[f"agl.{codecs.by_name(codecs.AGL_CODECS, name).extension}"] = codecs.encode_agl(name, agl_cm)
    return Tile.of("JAX_a", {name: memoryview(data) for name, data in members.items()}, "s.tar, offset 0")


@quick
@given(
    st.integers(0, 10**6),
    st.sampled_from(PRESETS),
    st.sampled_from([16, 48, 100]),
    st.sampled_from([0.0, 0.02]),
)
def test_the_window_gives_the_bytes_of_the_whole_tile(
    seed: int, preset: str, crop_px: int, gaps: float
) -> None:
    packed = tile(seed % 4, gaps)
    recipe = AugmentRecipe(preset, heights_p=None if preset in ("none", "dihedral") else 0.7)
    augmenter = Augmenter(recipe, crop_px)
    drawn = augmenter.draw(packed.outline, keyed(seed))
    assert drawn == draw(recipe, keyed(seed), packed.view(), crop_px), "the decoded tile draws the same"
    part = packed.view(augmenter.window(packed.outline, drawn))
    assert_same(apply(part, drawn), apply(packed.view(), drawn))


@quick
@given(
    st.integers(0, 10**6),
    st.sampled_from([16, 48]),
    st.sampled_from([0, 90, 270, 33]),
    st.sampled_from([1.0, 0.5, 1.3]),
)
def test_nothing_outside_the_window_is_read(seed: int, crop_px: int, degrees: int, zoom: float) -> None:
    """Held against kernels that see all of the tile, with everything outside of the window made to glare.

    Masts as high as the tallest tower stand everywhere, so that most lines of sight look as far as they may.
    """
    whole = tile(seed % 4).view()
    whole.agl_m[keyed(seed, 6).random(whole.agl_m.shape) < 0.2] = whole.tallest_m
    drawn = draw(AugmentRecipe("none", heights_p=1.0), keyed(seed), whole, crop_px)
    operations = (*((("rotate", float(degrees)),) if degrees else ()), ("zoom", zoom))
    drawn = dataclasses.replace(drawn, operations=operations, heights=(None, drawn.heights)[seed % 2])
    window = needed_window(drawn, whole.size, whole.pose, whole.tallest_m)
    matrix, size = map_of(whole.size, drawn)
    raised = None
    if drawn.heights is not None:
        per_m = whole.scale_px_per_m * (drawn.heights - 1)
        shift = kernels.invert_flow(whole.agl_m, per_m, whole.angle_rad, facade_px_per_px=drawn.heights - 1)
        raised = kernels.Raised(shift, whole.angle_rad, drawn.heights / per_m)
    wanted = kernels.gather(whole.rgb, whole.agl_m, matrix, size, raised)
    glaring = dataclasses.replace(
        whole, rgb=np.full_like(whole.rgb, 255), agl_m=np.full_like(whole.agl_m, whole.tallest_m)
    )
    glaring.rgb[window.slices] = whole.rgb[window.slices]
    glaring.agl_m[window.slices] = whole.agl_m[window.slices]
    found = apply(glaring, drawn)
    np.testing.assert_array_equal(found.rgb, wanted[0])
    np.testing.assert_array_equal(found.agl_m, wanted[1])
    if raised is not None:
        narrower = dataclasses.replace(whole, part=Part(_shrunk(window, whole), whole.size, whole.tallest_m))
        narrower = dataclasses.replace(
            narrower,
            rgb=whole.rgb[narrower.part.window.slices],
            agl_m=whole.agl_m[narrower.part.window.slices],
        )
        if narrower.part.window != window:
            with pytest.raises(ValueError, match=r"view.part is Window\(.*; wanted one that holds Window\("):
                apply(narrower, drawn)


def _shrunk(window: Window, view: View) -> Window:
    return Window(window.row + 1, window.col, window.rows - 1, window.cols)


def test_the_window_is_no_larger_than_what_can_be_met() -> None:
    """Crop of 100 at 20, 30; towers of 40 m at .9 px/m, raised by half: 18 px toward where they lean from."""
    size, pose = (300, 300), geometry.Pose(math.pi / 2, 0.9)
    crop = Draw(window=(20, 30, 100, 100))
    assert needed_window(crop, size, pose, 40.0) == Window(19, 29, 102, 102)
    raised = dataclasses.replace(crop, heights=1.5)
    assert needed_window(raised, size, pose, 40.0) == Window(17, 27, 106, 106 + 18)
    turned = Draw(window=(100, 100, 100, 100), operations=(("rotate", 45.0),))
    reach = math.ceil(149.5 + 99 * math.sqrt(2) / 2)  # half the diagonal, down and right of the centre
    assert needed_window(turned, size, pose, 40.0) == Window(
        *[299 - reach - 1] * 2, *[2 * reach - 299 + 3] * 2
    )
    assert needed_window(Draw(), size, None, 0.0) == Window(0, 0, 300, 300)
    assert needed_window(Draw(window=(900, 900, 5, 5)), size, pose, 0.0) == Window(299, 299, 1, 1)


GOLDEN = {
    "none": "f169ce2d1b6adc7c",
    "dihedral": "fdbb7ba207931954",
    "benchmark": "090ae44d918b35cb",
    "strong": "cfb174498d5cecf4",
    "faithful": "a9ecba35a7e00849",
}
"""Digests of 200 draws each, made by the commit before draws came before decoding (6fe0c62), of the outline below."""


@pytest.mark.parametrize("preset", PRESETS)
def test_draws_are_those_of_before_windows(preset: str) -> None:
    """A run that was begun before goes on with the same numbers."""
    outline = Outline("JAX_a", (64, 90), True, geometry.Pose(0.7, 0.6, 0.5), 12.0, True)
    recipe = AugmentRecipe(preset)
    told = [draw(recipe, keyed(i), outline, (None, 32)[i % 2]).to_json() for i in range(200)]
    assert hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16] == GOLDEN[preset]


@quick
@given(st.integers(0, 10**6), st.sampled_from(PRESETS), st.sampled_from(["all", "pose", "heights", "known"]))
def test_the_outline_and_the_decoded_tile_draw_alike(seed: int, preset: str, missing: str) -> None:
    rgb, agl_cm, facts = random_tile(seed, (40, 50))
    if missing == "known":
        agl_cm = np.full_like(agl_cm, 65535)
    if missing == "pose":
        facts = dataclasses.replace(facts, scale_px_per_m=None, angle_rad=None)
    agl_cm = None if missing == "heights" else agl_cm
    told = (
        facts
        if agl_cm is None
        else dataclasses.replace(facts, tallest_m=tallest_m(agl_cm), unknown_px=unknown_px(agl_cm))
    )
    recipe = AugmentRecipe(preset, heights_p=1.0)
    draws = []
    for each in (facts, told):  # a shard of before, and one that tells the tallest height
        packed = tile_of(each, rgb, agl_cm, "gpz")
        draws.append(draw(recipe, keyed(seed), packed.outline, 20))
        view = packed.view()
        assert packed.outline == Outline(
            view.key, view.size, view.has_heights, view.pose, view.tallest_m, view.all_known
        )
    assert draws[0] == draws[1] == draw(recipe, keyed(seed), packed.view(), 20)


@pytest.mark.parametrize("codec", codecs.RGB_CODECS)
def test_every_codec_gives_the_window_of_its_tile(codec: str) -> None:
    packed = tile(1, 0.02, codec, 300, 290)
    whole = packed.view()
    for window in (
        Window(0, 0, 300, 290),
        Window(250, 100, 50, 190),
        Window(17, 255, 240, 2),
        Window(299, 289, 1, 1),
    ):
        part = packed.view(window)
        np.testing.assert_array_equal(part.rgb, whole.rgb[window.slices])
        np.testing.assert_array_equal(part.agl_m, whole.agl_m[window.slices])
        assert part.size == whole.size
        assert part.tallest_m == whole.tallest_m
    assert packed.view(Window(0, 0, 300, 290)).part is None
    for outside in (Window(-1, 0, 5, 5), Window(0, 280, 5, 11), Window(4, 4, 0, 5)):
        with pytest.raises(
            ValueError, match=r"window is Window\(.*; wanted a part of the tile of \(300, 290\)"
        ):
            packed.view(outside)


def test_heights_above_what_the_facts_tell_are_refused() -> None:
    """The window was chosen by the facts: a taller tower would be met outside of it."""
    rgb, agl_cm, facts = random_tile(0, (40, 50))
    low = tile_of(
        dataclasses.replace(facts, tallest_m=1.0, unknown_px=unknown_px(agl_cm)), rgb, agl_cm, "gpz"
    )
    with pytest.raises(
        UserError, match=r"JAX_a\.json: tallest_m is 1\.0, but its heights reach 39\.\d+ m; pack again"
    ):
        low.view(Window(2, 2, 30, 30))


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"tallest_m": -1, "unknown_px": 0}, "tallest_m is -1.0; wanted a finite number of at least 0"),
        ({"tallest_m": 3}, "tallest_m and unknown_px are told together"),
        ({"tallest_m": "tall", "unknown_px": 0}, "not a tile's facts"),
    ],
)
def test_facts_that_cannot_be_are_refused(facts: dict[str, object], said: str) -> None:
    plain = json.loads(TileFacts("JAX", None, None, None, None, (4, 5)).to_json())
    assert "tallest_m" not in plain
    with pytest.raises(UserError, match=said):
        TileFacts.from_json(json.dumps(plain | facts).encode(), "K.json")
