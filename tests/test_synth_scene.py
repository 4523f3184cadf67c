"""The renderer's geometry: what a pixel shows is where the labels say, and light falls from the sun's side."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from geopose_dist import geometry
from geopose_dist.kernels import render, sensor
from shards import synth_camera, synth_city, synth_districts, synth_look, synth_scene
from shards.synth_districts import keyed

SIZE = 192


def one_box(cells: int = 400, height: float = 20.0) -> synth_city.Plan:
    """A single box of 20 x 20 m in the middle of bare ground, cells of 0.25 m."""
    plan = synth_city.Plan(cells * 0.25 / 2, 0.25)
    ground = plan.thing((120, 120, 120), grain=0, patch=0)
    plan.ids[:] = ground
    roof = plan.thing((200, 200, 200), wall=(150, 150, 150), grain=0, patch=0)
    plan.box(0, 0, 10, 10, 0.0, height, roof)
    return plan


def camera_at(zenith_deg: float, azimuth_deg: float, roll_deg: float = 0.0) -> synth_camera.Camera:
    zenith = math.radians(zenith_deg)
    pixel = synth_camera.slant_pixel_m(synth_camera.OPTICS["JAX"], zenith)
    return synth_camera.Camera(zenith, math.radians(azimuth_deg), math.radians(roll_deg), pixel, (0.0, 0.0))


def noon(bearing_deg: float, height_deg: float) -> render.Light:
    b, h = math.radians(bearing_deg), math.radians(height_deg)
    to_sun = (math.cos(h) * math.sin(b), -math.cos(h) * math.cos(b), math.sin(h))
    return render.Light(to_sun, (1.2, 1.2, 1.2), (0.25, 0.25, 0.25), disc_rad=0.0)


@pytest.mark.parametrize("seed", range(4))
def test_march_agrees_with_its_slow_twin_on_rough_ground(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height = np.kron(rng.gamma(1.0, 4.0, (30, 30)), np.ones((7, 7))).astype(np.float32)
    height[rng.random(height.shape) < 0.05] = 0
    terrain = render.Terrain(height)
    angle = rng.uniform(0, 2 * math.pi)
    lean = min(1.2, 40 / terrain.top)
    camera = render.AffineCamera(
        np.array([[0.9, 0.2, 60.3], [-0.2, 1.1, 70.7]]), (lean * math.cos(angle), lean * math.sin(angle))
    )
    agl, row, col, kind = render.trace(terrain, camera, 64, 64)
    slow = render.trace_slow(terrain, camera, 64, 64, step_m=0.01)
    # The twin misses a corner that a ray grazes for less than its step; it never sees what is not there.
    assert np.mean(np.abs(agl - slow) <= 0.011) > 0.985
    assert (agl >= slow - 0.001).all()
    on_top = (kind == render.TOP) & (np.abs(row % 1 - 0.5) < 0.49) & (np.abs(col % 1 - 0.5) < 0.49)
    assert np.allclose(height[row.astype(int), col.astype(int)][on_top], agl[on_top])
    assert (kind == render.WALL).any()


def test_a_ray_straight_down_sees_the_map() -> None:
    height = np.arange(80 * 80, dtype=np.float32).reshape(80, 80) % 17
    camera = render.AffineCamera(np.array([[1.0, 0, 8.5], [0, 1.0, 8.5]]), (0.0, 0.0))
    agl, *_ = render.trace(render.Terrain(height), camera, 60, 60)
    assert np.array_equal(agl, height[8:68, 8:68])


@pytest.mark.parametrize(("zenith", "azimuth", "roll"), [(20, 0, 0), (30, 130, 3), (12, 250, -4)])
def test_facade_ramps_from_the_foot_to_the_roof(zenith: float, azimuth: float, roll: float) -> None:
    plan = one_box()
    camera = camera_at(zenith, azimuth, roll)
    affine = camera.affine((SIZE, SIZE), plan.cell, plan.height.shape)
    agl, _, _, kind = render.trace(plan.terrain(), affine, SIZE, SIZE)
    assert agl.max() == 20.0
    dx, dy = geometry.direction(camera.angle_rad)
    wall = np.argwhere(kind == render.WALL)
    assert len(wall) > 300
    # From a facade pixel the foot of the wall lies agl * scale along the flow, and there the height is 0.
    for y, x in wall[:: len(wall) // 50]:
        reach = float(agl[y, x]) * camera.scale_px_per_m + 2.5
        assert agl[round(y + dy * reach), round(x + dx * reach)] == 0
    roof_px = np.sum((kind == render.TOP) & (agl == 20.0))
    roof_m2 = (plan.height > 0).sum() * plan.cell**2
    assert roof_px == pytest.approx(roof_m2 * math.cos(camera.zenith) / camera.pixel_m**2, rel=0.01)


@pytest.mark.parametrize("city", list(synth_districts.KINDS))
def test_flow_of_every_pixel_ends_on_the_generators_own_cell(city: str) -> None:
    plan = synth_districts.build(city, SIZE, seed=7, place=1)
    terrain = plan.terrain()
    camera = synth_camera.draw_camera(city, SIZE, keyed(11, 1))
    affine = camera.affine((SIZE, SIZE), plan.cell, plan.height.shape)
    agl, row, col, kind = render.trace(terrain, affine, SIZE, SIZE)
    inside = (kind == render.TOP) & (np.abs(row % 1 - 0.5) < 0.49) & (np.abs(col % 1 - 0.5) < 0.49)
    assert np.allclose(terrain.height[row.astype(int), col.astype(int)][inside], agl[inside], atol=1e-3)
    # Labels only: where the flow ends, an image of the bare ground shows the cell that the map says was seen.
    bare = render.Terrain(np.zeros_like(terrain.height))
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    dx, dy = geometry.flow_xy(agl, camera.scale_px_per_m, camera.angle_rad)
    to_y, to_x = np.rint(y + dy).astype(int), np.rint(x + dx).astype(int)
    ends = (to_y >= 0) & (to_y < SIZE) & (to_x >= 0) & (to_x < SIZE)
    _, bare_row, bare_col, _ = render.trace(bare, affine, SIZE, SIZE)
    off_row = bare_row[to_y[ends], to_x[ends]] - row[ends]
    off_col = bare_col[to_y[ends], to_x[ends]] - col[ends]
    error_px = np.hypot(off_row, off_col) * plan.cell / camera.gsd_m
    assert np.median(error_px) < 0.5
    assert error_px.max() < 1.0  # rounding to whole pixels, stretched by the look


def test_scale_gsd_and_angle_tell_one_story() -> None:
    for city in synth_camera.OPTICS:
        for k in range(20):
            camera = synth_camera.draw_camera(city, SIZE, keyed(1, k))
            assert geometry.zenith_from_scale(camera.scale_px_per_m, camera.gsd_m) == pytest.approx(
                camera.zenith
            )
            affine = camera.affine((SIZE, SIZE), 0.25, (800, 800))
            a = affine.cell_from_pixel[:, :2] * 0.25
            assert math.sqrt(abs(np.linalg.det(a))) == pytest.approx(camera.gsd_m)
            # The point 1 m above a ground point appears one scale against the flow.
            x, y = geometry.direction(camera.angle_rad)
            flow_m = a @ np.array([x, y]) * camera.scale_px_per_m
            assert flow_m == pytest.approx(np.array(affine.rise) * 0.25)


@pytest.mark.parametrize(("bearing", "height"), [(90, 45), (150, 30), (215, 60), (40, 50)])
def test_shadow_lies_away_from_the_sun_with_the_right_length(bearing: float, height: float) -> None:
    plan = one_box(height=20.0)
    light = noon(bearing, height)
    lit = render.shadow(plan.terrain(), light, plan.cell, 0.0)
    rows, cols = np.nonzero((lit == 0) & (plan.height == 0))
    middle = plan.side / 2 - 0.5
    away = np.array([-light.to_sun[0], -light.to_sun[1]]) / math.hypot(*light.to_sun[:2])
    along = ((cols - middle) * away[0] + (rows - middle) * away[1]) * plan.cell
    reach = 20.0 / math.tan(math.radians(height)) + 10 * (abs(away[0]) + abs(away[1]))
    assert along.max() == pytest.approx(reach, abs=0.6)
    assert np.median(along) > 0
    assert along.min() > -15.0  # beside the box, never before it
    assert lit[plan.height > 0].all()


def test_the_picture_is_lit_from_the_sun() -> None:
    plan = one_box()
    ground, gains = plan.ids[0, 0], np.ones((synth_look.MATERIALS, 3), np.float32)
    affine = camera_at(28, 0).affine(
        (SIZE, SIZE), plan.cell, plan.height.shape
    )  # roofs lean west, we see east walls
    terrain = plan.terrain()
    pictures = []
    for light in (noon(90, 40), noon(270, 40)):
        shade = render.shadow_heights(terrain, light, plan.cell)
        parts = (plan.ids, plan.objects(), gains, plan.around(), synth_city.noise_texture(), shade)
        looks = render.Looks(*parts, light, plan.cell)
        pictures.append(render.render(terrain, looks, affine, SIZE, SIZE))
    wall = pictures[0].kind == render.WALL
    assert pictures[0].radiance[wall].mean() > 1.8 * pictures[1].radiance[wall].mean()
    for picture in pictures:
        flat = (picture.seen == ground) & (picture.kind == render.TOP)
        bright, dark = (
            picture.radiance[flat & (picture.lit == 1)],
            picture.radiance[flat & (picture.lit == 0)],
        )
        assert len(dark) > 500
        assert np.median(bright) > 2 * np.median(dark)
    # The shadow falls west of the box in the morning, east of it in the evening.
    columns = [np.nonzero((p.seen == ground) & (p.lit == 0))[1].mean() for p in pictures]
    assert columns[0] < SIZE / 2 < columns[1]


def test_render_gives_the_same_from_two_threads() -> None:
    plan = synth_districts.build("OMA", 96, seed=1, place=0)
    day, camera = synth_look.draw_day("OMA", keyed(1)), synth_camera.draw_camera("OMA", 96, keyed(2))

    def shoot(_: int) -> bytes:
        picture = synth_look.take_picture(plan, plan.terrain(), plan.around(), camera, day, 96)
        return picture.radiance.tobytes() + picture.agl_m.tobytes()

    with ThreadPoolExecutor(2) as threads:
        results = set(threads.map(shoot, range(6)))
    assert len(results) == 1


def test_doors_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="finite and >= 0"):
        render.Terrain(np.full((8, 8), -1, np.float32))
    with pytest.raises(ValueError, match=r"\[rows, cols\]"):
        render.Terrain(np.zeros((0, 3), np.float32))
    camera = render.AffineCamera(np.array([[1.0, 0, 0], [0, 1.0, 0]]), (1.0, 0.0))
    with pytest.raises(ValueError, match="outside the map"):
        render.trace(render.Terrain(np.ones((20, 20), np.float32)), camera, 40, 40)
    with pytest.raises(ValueError, match="above the horizon"):
        render.Light((1.0, 0.0, 0.0), (1, 1, 1), (1, 1, 1))
    plan, day = one_box(), synth_look.draw_day("OMA", keyed(1))
    affine = camera_at(20, 0).affine((32, 32), plan.cell, plan.height.shape)
    terrain = plan.terrain()
    looks = synth_look.looks_of(plan, terrain, plan.around(), day)
    with pytest.raises(ValueError, match="there are 1 objects"):
        replace(looks, objects=plan.objects()[:1])
    with pytest.raises(ValueError, match="near has shape"):
        replace(looks, near=looks.near[1:])
    with pytest.raises(ValueError, match="shade has shape"):
        replace(looks, shade=looks.shade[1:])
    small = render.Terrain(np.zeros((400, 360), np.float32))
    with pytest.raises(ValueError, match="ids have shape"):
        render.render(small, looks, affine, 32, 32)
    with pytest.raises(ValueError, match="no cell of the ground"):
        render.Terrain(plan.height, plan.height + 1)


@pytest.mark.parametrize("bearing", [10, 60, 115, 200, 250, 341])
def test_shadow_heights_agree_with_their_twin_and_with_the_march(bearing: float) -> None:
    rng = np.random.default_rng(bearing)
    height = np.kron(rng.gamma(1.0, 3.0, (9, 8)), np.ones((5, 5))).astype(np.float32)
    height[rng.random(height.shape) < 0.3] = 0
    terrain, light = render.Terrain(height), replace(noon(bearing, 40), disc_rad=0.03)
    fast, slow = (f(terrain, light, 0.5) for f in (render.shadow_heights, render.shadow_heights_slow))
    lit = slow > -1e5  # what no shadow reaches is below any height, by how much does not matter
    assert np.allclose(fast[lit], slow[lit], atol=1e-3)
    assert (fast[~lit] < 0).all()
    again = render.shadow_heights(terrain, light, 0.5, np.full(2 * height.size + 5, 7, np.float32))
    assert np.array_equal(fast, again)
    # The exact march knows corners where the lines of cells know cells: they differ along edges only.
    march = render.shadow(terrain, replace(light, disc_rad=0.0), 0.5, 0.05)
    assert np.mean((height + 0.05 > fast.mean(axis=-1)) == (march == 1)) > 0.93


@pytest.mark.parametrize(
    ("disc", "cells"), [(0.03, 15 / math.sin(math.radians(30)) ** 2 * 0.03 / 0.25), (0.0, 0.0)]
)
def test_shadows_fade_over_what_the_suns_disc_makes_of_their_length(disc: float, cells: float) -> None:
    plan = one_box(height=15.0)
    shade = render.shadow_heights(plan.terrain(), replace(noon(90, 30), disc_rad=disc), plan.cell)
    # Along the middle row, west of the box: its shadow ends 15 / tan(30) m from the wall.
    row = shade[plan.side // 2, : plan.side // 2 - 45]
    faded = np.flatnonzero((row[:, 0] > 0) & (row[:, 1] < 0))
    assert len(faded) == pytest.approx(cells, abs=1.1)


@pytest.mark.parametrize("city", ["OMA", "ATL"])
def test_on_hills_the_flow_ends_on_the_ground_below_what_is_seen(city: str) -> None:
    """Both maps are known: the pixel moved by its label shows, on the bare hills, the cell that it saw before."""
    scene = synth_scene.build(city, SIZE, 3, 1, relief=2.0)
    assert scene.plan.ground is not None
    assert np.ptp(scene.plan.ground) > 4
    camera = synth_camera.draw_camera(city, SIZE, keyed(12, 1))
    affine = scene.affine(camera)
    agl, row, col, kind = render.trace(scene.terrain, affine, SIZE, SIZE)
    rows, cols = row.astype(int), col.astype(int)
    inside = (kind == render.TOP) & (np.abs(row % 1 - 0.5) < 0.49) & (np.abs(col % 1 - 0.5) < 0.49)
    above = scene.plan.height - scene.plan.ground
    assert np.allclose(above[rows, cols][inside], agl[inside], atol=1e-3)
    # A level roof over a slope has heights above ground that vary: the labels tell them cell by cell.
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    dx, dy = geometry.flow_xy(agl, camera.scale_px_per_m, camera.angle_rad)
    at_col, at_row = affine.cells(x + dx, y + dy, scene.plan.ground[rows, cols])
    error_px = np.hypot(at_col - col, at_row - row) * scene.plan.cell / camera.gsd_m
    assert np.median(error_px) < 0.5
    assert error_px.max() < 0.5
    # The middle of the picture stays where it is, however high the ground is there.
    assert (
        abs(
            affine.cells(np.array(SIZE / 2), np.array(SIZE / 2), scene.plan.ground_at(0, 0))[0]
            - scene.plan.side / 2
        )
        < 30
    )


def test_finishing_agrees_with_its_slow_twins() -> None:
    rng = np.random.default_rng(5)
    image = rng.gamma(2, 0.2, (40, 31, 3)).astype(np.float32)
    tone = (245 * np.linspace(0, 1.3, 131) ** 0.5).astype(np.float32)
    args = (image, (100.0, 90.0, 80.0), (-2.0, 3.0, 0.5), tone, 1.5, 77)
    assert np.abs(sensor.develop(*args).astype(int) - sensor.develop_slow(*args)).max() <= 1
    assert np.mean(sensor.develop(*args) == sensor.develop_slow(*args)) > 0.999
    noise = sensor.develop(np.full((256, 256, 3), 0.5, np.float32), *args[1:4], 2.0, 3).astype(float)
    assert noise.std(axis=(0, 1)) == pytest.approx([2.02] * 3, rel=0.03)
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.02
    scene = synth_scene.build("ARG", 96, 2, 0)
    day, camera = synth_look.draw_day("ARG", keyed(1)), synth_camera.draw_camera("ARG", 96, keyed(2))
    picture = scene.picture(camera, scene.looks(day))
    gone = (rng.random(len(scene.plan.objects())) < 0.1).astype(np.uint8)
    label = (picture, scene.holes.mask, 6.0, gone, 0.3, 0.05, 9)
    assert np.array_equal(sensor.label(*label), sensor.label_slow(*label))
    with pytest.raises(ValueError, match="speckle is 1"):
        sensor.label(*label[:5], 1.0)


def test_what_stands_in_the_middle_does_not_depend_on_the_size() -> None:
    small, large = (synth_districts.build("OMA", size, seed=2, place=3) for size in (96, 224))
    half = 80
    crops = [
        p.height[p.side // 2 - half : p.side // 2 + half, p.side // 2 - half : p.side // 2 + half]
        for p in (small, large)
    ]
    assert (np.abs(crops[0] - crops[1]) < 0.01).mean() > 0.97
