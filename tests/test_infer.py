"""From pixels to poses: windows without seams, symmetries mapped back, units across reductions."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from geopose_dist import geometry
from geopose_dist.errors import UserError
from geopose_dist.infer import tiles
from geopose_dist.infer.enlarge import enlarge
from geopose_dist.infer.predictor import Predictor
from geopose_dist.infer.recipe import NetRecipe, PredictRecipe


class Pointer(nn.Module):
    """A network that can be computed by hand: height and flow are written into the colours of the image.

    Height = red in metres; the direction points along the mean gradient of green (so it turns and mirrors
    with the image, as the flow does); scale = mean of blue / 100.
    """

    size_multiple = 32

    def forward(self, rgb_u8: torch.Tensor, gsd_m: torch.Tensor) -> SimpleNamespace:
        assert rgb_u8.dtype == torch.uint8
        assert rgb_u8.shape[2] % 32 == rgb_u8.shape[3] % 32 == 0
        pixels = rgb_u8.float()
        green = pixels[:, 1]
        x = (green[:, :, 1:] - green[:, :, :-1]).mean(dim=(1, 2))
        y = (green[:, 1:] - green[:, :-1]).mean(dim=(1, 2))
        self.seen_gsd = gsd_m.clone()
        return SimpleNamespace(
            agl_m=pixels[:, :1],
            direction=torch.stack([x, y], 1),
            scale_px_per_m=pixels[:, 2].mean(dim=(1, 2)) / 100,
        )


def leaning(rows: int, columns: int, right: float, down: float) -> np.ndarray:
    """Random heights, green growing by `right` and `down` per pixel, blue 40."""
    rng = np.random.default_rng(rows)
    green = 100 + right * np.arange(columns)[None] + down * np.arange(rows)[:, None]
    red = rng.integers(0, 200, (rows, columns))
    return np.stack([red, green, np.full_like(red, 40)], -1).round().astype(np.uint8)


def predictor(
    recipe: NetRecipe | None = None, *, reduction: int = 1, batch: int = 2, count: int = 1, **facts
) -> Predictor:
    nets = [Pointer() for _ in range(count)]
    return Predictor.of_nets(
        nets, [{"reduction": reduction, **facts}] * count, recipe or NetRecipe(), batch=batch
    )


@pytest.mark.parametrize("tta", ["none", "flips", "dihedral"])
@pytest.mark.parametrize("shape", [(96, 64), (70, 101)])
def test_symmetries_map_heights_and_direction_back(tta: str, shape: tuple[int, int]) -> None:
    rgb = leaning(*shape, 0.5, -0.25)
    (pose,) = predictor(NetRecipe(tta=tta)).predict([rgb], [None])
    assert pose is not None
    np.testing.assert_allclose(pose.agl_m, rgb[:, :, 0], atol=1e-4)
    if shape == (96, 64):  # no padding, whose reflection would bend the mean gradient
        assert pose.angle_rad == pytest.approx(geometry.angle_of(0.5, -0.25), abs=0.02)
    assert pose.scale_px_per_m == pytest.approx(0.4)


@pytest.mark.parametrize("number", range(8))
def test_each_symmetry_is_undone_and_agrees_with_geometry(number: int) -> None:
    way = tiles.symmetries("dihedral")[number]
    maps = np.random.default_rng(0).normal(size=(2, 3, 5, 7))
    np.testing.assert_array_equal(way.undo(way.apply(maps)), maps)
    pose = geometry.Pose(1.1, 0.5)
    turned = pose.flipped_y() if way.flip_rows else pose
    turned = turned.flipped_x() if way.flip_columns else turned
    turned = turned.transposed() if way.transpose else turned
    back = way.undo_direction(np.array(geometry.direction(turned.angle_rad)))
    np.testing.assert_allclose(back, geometry.direction(pose.angle_rad), atol=1e-12)
    assert len({(w.flip_rows, w.flip_columns, w.transpose) for w in tiles.symmetries("dihedral")}) == 8


@pytest.mark.parametrize(
    ("side", "window", "overlap"), [(100, 128, 32), (200, 128, 32), (1000, 128, 64), (129, 128, 0)]
)
def test_window_weights_sum_to_one_and_leave_borders_out(side: int, window: int, overlap: int) -> None:
    starts = tiles.window_starts(side, window, overlap)
    weights = tiles.window_weights(starts, side, window)
    np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-6)
    for start, row in zip(starts, weights, strict=True):
        assert not row[:start].any()
        assert not row[start + window :].any()
        if start:
            assert not row[start : start + overlap // 4].any()
    total = sum(w.weight.sum(dtype=np.float64) for w in tiles.windows((side, side + 7), window, overlap))
    assert total == pytest.approx(side * (side + 7), rel=1e-6)


class Blur(nn.Module):
    """A network with a receptive field of 9 pixels and no global pooling in its heights."""

    size_multiple = 32

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 5, padding=2),
            nn.Tanh(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(8, 1, 3, padding=1),
        )

    def forward(self, rgb_u8: torch.Tensor, gsd_m: torch.Tensor) -> SimpleNamespace:
        heights = 20 * self.layers(rgb_u8.float() / 255).abs()
        one = torch.ones(len(rgb_u8))
        return SimpleNamespace(agl_m=heights, direction=torch.stack([one, one], 1), scale_px_per_m=one)


def test_windows_give_what_the_whole_tile_gives() -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (256, 384, 3)).astype(np.uint8)
    whole = Predictor.of_nets([Blur()], [{}], NetRecipe(window=1024), batch=1).predict([rgb], [None])[0]
    cut = Predictor.of_nets([Blur()], [{}], NetRecipe(window=128, overlap=32), batch=1).predict(
        [rgb], [None]
    )[0]
    assert whole is not None
    assert cut is not None
    assert whole.agl_m.std() > 0.5
    np.testing.assert_allclose(cut.agl_m, whole.agl_m, atol=0.002)
    # With no margin at all the seams show, so the test above can fail.
    seams = Predictor.of_nets([Blur()], [{}], NetRecipe(window=128, overlap=0), batch=1).predict(
        [rgb], [None]
    )[0]
    assert seams is not None
    assert np.abs(seams.agl_m - whole.agl_m).max() > 0.1


def test_reduced_networks_answer_at_full_resolution() -> None:
    rgb = np.repeat(np.repeat(leaning(40, 64, 0.5, 0.5), 2, 0), 2, 1)[:79]  # odd: one row short
    twice = predictor(NetRecipe(enlarge="slopes"), reduction=2, gsd_known=True)
    poses = twice.predict([rgb, rgb], [0.3, None])
    assert poses[0] is not None
    assert poses[0].agl_m.shape == (79, 128)
    block_means = poses[0].agl_m[:78].reshape(39, 2, 64, 2).mean((1, 3))
    np.testing.assert_allclose(block_means[1:-1, 1:-1], rgb[:78:2, ::2, 0][1:-1, 1:-1], atol=1e-3)
    assert poses[0].scale_px_per_m == pytest.approx(0.8)  # 0.4 px/m among reduced pixels
    np.testing.assert_allclose(twice.nets[0].seen_gsd.numpy(), [0.6, np.nan])
    reduced = twice.predict([rgb[::2, ::2]], [0.6], reduced_by=2)[0]
    assert reduced is not None
    assert reduced.agl_m.shape == (80, 128)
    assert reduced.scale_px_per_m == pytest.approx(0.8)
    np.testing.assert_allclose(twice.nets[0].seen_gsd.numpy(), [0.6, np.nan])
    with pytest.raises(UserError, match="reduced by 3, the checkpoint wants 2"):
        twice.predict([rgb], [None], reduced_by=3)


def test_heights_return_along_the_edges_of_the_image() -> None:
    rgb = np.full((64, 64, 3), 60, np.uint8)
    rgb[:, 31:] = 200  # a roof whose edge falls inside a reduced pixel
    true_m = np.where(np.arange(64) < 31, 0, 20).astype(np.float32)[None].repeat(64, 0)
    reduced = true_m.reshape(32, 2, 32, 2).mean((1, 3)).astype(np.float32)
    error = {
        way: ((enlarge(reduced, 2, (64, 64), way, rgb) - true_m) ** 2).mean()
        for way in ("guided", "bilinear", "slopes")
    }
    assert error["guided"] < 0.6 * error["bilinear"]
    plain = np.full_like(rgb, 90)  # an image that says nothing
    smooth = enlarge(reduced, 2, (64, 64), "guided", plain)
    assert np.abs(smooth.mean(axis=0) - enlarge(reduced, 2, (64, 64), "bilinear").mean(axis=0)).max() < 7
    np.testing.assert_array_equal(
        enlarge(reduced, 2, (64, 64), "guided", None), enlarge(reduced, 2, (64, 64), "bilinear")
    )
    for way in ("guided", "bilinear", "slopes"):
        assert enlarge(reduced, 2, (63, 64), way, rgb[:63]).shape == (63, 64)
        np.testing.assert_array_equal(enlarge(reduced, 1, (32, 32), way, rgb[:32, :32]), reduced)
    with pytest.raises(ValueError, match="wanted one size"):
        enlarge(reduced, 2, (64, 64), "guided", rgb[:32])


def test_networks_that_never_saw_a_gsd_are_shown_none() -> None:
    blind = predictor()
    blind.predict([leaning(32, 32, 1, 0)], [0.3])
    assert torch.isnan(blind.nets[0].seen_gsd).all()


def test_heights_are_clipped_scales_limited_and_both_counted() -> None:
    rgb = leaning(32, 32, 1, 0)
    rgb[:, :, 0] = 30
    rgb[:4, :, 0] = 150
    pose = predictor(NetRecipe(agl_max_m=100)).predict([rgb], [None])[0]
    assert pose is not None
    assert pose.agl_m.max() == 100
    assert pose.clipped == 4 * 32
    assert not pose.scale_limited
    limited = predictor(NetRecipe(scale_min_px_per_m=0.5)).predict([rgb], [None])[0]
    assert limited is not None
    assert limited.scale_px_per_m == 0.5
    assert limited.scale_limited
    rgb[:, :, 2] = 0  # a scale of zero has no logarithm
    lowest = predictor().predict([rgb], [None])[0]
    assert lowest is not None
    assert lowest.scale_px_per_m == 0.01


class Fixed(nn.Module):
    """Always the same answer."""

    size_multiple = 32

    def __init__(self, agl_m: float, angle_rad: float, scale: float) -> None:
        super().__init__()
        self.answer = agl_m, angle_rad, scale

    def forward(self, rgb_u8: torch.Tensor, gsd_m: torch.Tensor) -> SimpleNamespace:
        agl_m, angle_rad, scale = self.answer
        count = len(rgb_u8)
        direction = 7 * torch.tensor([geometry.direction(angle_rad)] * count)  # any length
        return SimpleNamespace(
            agl_m=torch.full((count, 1, *rgb_u8.shape[2:]), agl_m),
            direction=direction,
            scale_px_per_m=torch.full((count,), scale),
        )


def test_several_checkpoints_are_averaged_each_in_its_own_way() -> None:
    nets = [Fixed(10, -0.1, 1.0), Fixed(20, 0.3, 0.25)]
    recipe = NetRecipe(weights=[1, 1])
    pose = Predictor.of_nets(nets, [{}, {}], recipe, batch=1).predict([leaning(32, 32, 1, 1)], [None])[0]
    assert pose is not None
    assert pose.agl_m[0, 0] == pytest.approx(15)
    assert pose.angle_rad == pytest.approx(0.1)  # across 0, where the mean of -0.1 + 2 pi and 0.3 would be pi
    assert pose.scale_px_per_m == pytest.approx(0.5)
    heavy = Predictor.of_nets(nets, [{}, {}], NetRecipe(weights=[3, 1]), batch=1)
    assert heavy.predict([leaning(32, 32, 1, 1)], [None])[0].agl_m[0, 0] == pytest.approx(12.5)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="trained at different reductions"):
        Predictor.of_nets(nets, [{"reduction": 2}, {}], recipe, batch=1)


def test_an_answer_that_is_not_finite_spoils_no_neighbour() -> None:
    class OneBad(Pointer):
        def forward(self, rgb_u8: torch.Tensor, gsd_m: torch.Tensor) -> SimpleNamespace:
            answer = super().forward(rgb_u8, gsd_m)
            answer.agl_m[0, 0, 3, 3] = math.nan
            return answer

    net = Predictor.of_nets([OneBad()], [{}], NetRecipe(), batch=2)
    poses = net.predict([leaning(32, 32, 1, 0)] * 2, [None, None])
    assert poses[0] is None
    assert poses[1] is not None


def test_the_answer_for_a_tile_does_not_depend_on_how_many_share_its_batch() -> None:
    rgbs = [leaning(64, 64, 1, 0), leaning(64, 64, 0, 1)]
    full = Predictor.of_nets([Blur()], [{}], NetRecipe(), batch=4)
    both = full.predict(rgbs, [None, None], slots=[1, 3])
    alone = full.predict(rgbs[1:], [None], slots=[3])
    np.testing.assert_array_equal(both[1].agl_m, alone[0].agl_m)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"window": 100}, "multiple of 32"),
        ({"overlap": 900}, "half of net.window"),
        ({"scale_max_px_per_m": 30.0}, "min < max"),
        ({"agl_max_m": 700.0}, "at most"),
        ({"weights": [1.0, 0.0]}, "above 0"),
    ],
)
def test_recipes_refuse_what_cannot_be_meant(wrong: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        NetRecipe(**wrong)


def test_weights_belong_to_checkpoints(tmp_path) -> None:
    with pytest.raises(ValueError, match="2 numbers for 1 checkpoints"):
        PredictRecipe(str(tmp_path), [tmp_path], tmp_path, net=NetRecipe(weights=[1.0, 2.0]))


@pytest.mark.slow
def test_a_compiled_network_answers_alike_and_is_compiled_before_the_first_tile() -> None:
    rgb = leaning(64, 96, 0.5, 0.5)
    net = Blur()
    plain = Predictor.of_nets([net], [{}], NetRecipe(), batch=1).predict([rgb], [None])[0]
    compiled = Predictor.of_nets([net], [{}], NetRecipe(compile="default"), batch=1)
    compiled.warm_up(64, 96)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before > 0
    answer = compiled.predict([rgb], [None])[0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert plain is not None
    assert answer is not None
    np.testing.assert_allclose(answer.agl_m, plain.agl_m, atol=1e-3)
