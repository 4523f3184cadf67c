"""The network: shapes, heads, pretrained weights, saving and loading."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from geopose_dist import geometry
from geopose_dist.errors import UserError
from geopose_dist.model import depthwise, heads, inputs, pretrained, weights
from geopose_dist.model.recipe import ModelRecipe
from geopose_dist.model.unet import GeoposeNet

SMALL: dict[str, Any] = {"encoder": "tu-mobilenetv3_small_050", "decoder_channels": [16, 16, 8, 8, 8]}
BENCHMARK: dict[str, Any] = {
    "height": "linear", "magnitude": "separate", "direction": "pooled", "scale": "least_squares", "dropout": 0.5
}  # fmt: skip
UNKNOWN_GSD = torch.full((2,), math.nan)


def small(**changes: Any) -> GeoposeNet:
    torch.manual_seed(0)
    return GeoposeNet(ModelRecipe(**{**SMALL, **changes}))


@pytest.mark.parametrize("changes", [{}, BENCHMARK, {"decoder_norm": "groupnorm"}, {"decoder_norm": "none"}])
def test_shapes_of_every_head(changes: dict[str, Any]) -> None:
    net = small(**changes)
    rgb = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    prediction = net(rgb, UNKNOWN_GSD)
    assert prediction.agl_m.shape == prediction.magnitude_px.shape == (2, 1, 64, 96)
    assert prediction.direction.shape == (2, 2)
    assert prediction.scale_px_per_m.shape == (2,)
    assert all(part.dtype == torch.float32 for part in prediction if part is not None)
    if changes.get("decoder_norm") in ("groupnorm", "none"):
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.unet.decoder.modules())


def test_every_parameter_learns_so_that_ddp_never_waits() -> None:
    everything = {
        "gsd_input": True, "city_input": True, "cities": ["ARG"], "full_resolution_skip": 4,
        "direction_confidence": True,
    }  # fmt: skip
    for changes in ({}, BENCHMARK, {"gsd_input": True}, {"scale": "zenith"}, everything):
        net = small(**changes)
        prediction = net(
            torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), torch.tensor([0.5, math.nan])
        )
        sum(part.square().sum() for part in prediction if part is not None).backward()  # type: ignore[union-attr]
        assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_untrained_heads_start_at_the_datas_means() -> None:
    net = small(height_mean_m=6.5, scale_mean_px_per_m=0.31).eval()
    torch.nn.init.zeros_(net.unet.segmentation_head[0].weight)
    with torch.inference_mode():
        prediction = net(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), UNKNOWN_GSD)
    assert prediction.agl_m.mean().item() == pytest.approx(6.5, rel=1e-4)
    assert prediction.scale_px_per_m.tolist() == pytest.approx([0.31, 0.31], rel=1e-4)


def test_edge_weights_favour_steps_and_do_not_pass_gradients() -> None:
    agl = torch.zeros(1, 1, 16, 16)
    agl[..., 8:] = 10.0
    agl.requires_grad_()
    weight = heads.edge_weights(agl)
    assert not weight.requires_grad
    assert weight.sum().item() == pytest.approx(1.0, rel=1e-5)
    assert weight[0, 0, :, 7].sum() > 0.8


def test_unknown_encoder_offers_close_names() -> None:
    with pytest.raises(UserError, match="resnet34"):
        GeoposeNet(ModelRecipe(encoder="resnet43"))
    with pytest.raises(UserError, match="tu-tf_efficientnet_lite0"):
        GeoposeNet(ModelRecipe(encoder="tu-tf_efficientnet_lite00"))


def test_package_weights_land_in_every_tensor_of_the_encoder() -> None:
    pytest.importorskip(pretrained.PACKAGE, reason="the optional extra [pretrained] is not installed")
    recipe = ModelRecipe(
        encoder=pretrained.PACKAGE_ENCODER, weights="package", decoder_channels=[16, 16, 8, 8, 8]
    )
    net = GeoposeNet(recipe)
    before = {name: value.clone() for name, value in net.unet.encoder.state_dict().items()}
    assert "288 tensors" in pretrained.load_encoder(net)
    after = net.unet.encoder.state_dict()
    same = [name for name in before if torch.equal(before[name], after[name]) and "num_batches" not in name]
    assert same == []
    # ImageNet filters see edges and colours: the stem's filters differ far more from each other than random ones.
    stem = after["model.conv_stem.weight"].flatten(1)
    assert stem.abs().max() > 0.5


def test_package_weights_of_another_encoder_are_refused() -> None:
    with pytest.raises(UserError, match="tu-tf_efficientnet_lite0"):
        pretrained.load_encoder(small(weights="package"))


def test_local_encoder_weights_with_timm_names(tmp_path: Path) -> None:
    donor = small()
    state = {k.removeprefix("model."): v.contiguous() for k, v in donor.unet.encoder.state_dict().items()}
    torch.save(state, tmp_path / "encoder.pth")
    with torch.no_grad():
        net = small(weights=str(tmp_path / "encoder.pth"))
        for parameter in net.parameters():
            parameter.zero_()
    pretrained.load_encoder(net)
    for name, value in donor.unet.encoder.state_dict().items():
        assert torch.equal(value, net.unet.encoder.state_dict()[name]), name


def test_local_encoder_weights_from_a_checkpoint_of_ours(tmp_path: Path) -> None:
    donor = small(height="linear", decoder_channels=[32, 16, 8, 8, 8])
    weights.save_weights(tmp_path / "model.safetensors", donor.state_dict(), donor.recipe, {})
    net = small(weights=str(tmp_path / "model.safetensors"))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert "model.safetensors" in pretrained.load_encoder(net)
    for name, value in donor.unet.encoder.state_dict().items():
        assert torch.equal(value, net.unet.encoder.state_dict()[name]), name


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    donor = small(encoder="resnet18")
    weights.save_weights(tmp_path / "model.safetensors", donor.state_dict(), donor.recipe, {})
    with pytest.raises(UserError, match="not weights of tu-mobilenetv3_small_050"):
        pretrained.load_encoder(small(weights=str(tmp_path / "model.safetensors")))


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x80\x04\x95"])
def test_damaged_encoder_weights_are_one_sentence(tmp_path: Path, content: bytes) -> None:
    for suffix in (".pth", ".safetensors"):
        (tmp_path / f"bad{suffix}").write_bytes(content)
        with pytest.raises(UserError, match=f"bad{suffix}"):
            pretrained.load_encoder(small(weights=str(tmp_path / f"bad{suffix}")))
    with pytest.raises(UserError, match="no such file"):
        pretrained.load_encoder(small(weights=str(tmp_path / "absent.pth")))


def test_pickles_that_could_run_code_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth"):
        pretrained.load_encoder(small(weights=str(tmp_path / "evil.pth")))
    assert not (tmp_path / "ran").exists()


def test_weights_come_back_with_their_recipe_and_facts(tmp_path: Path) -> None:
    net = small(height_mean_m=5.0).eval()
    weights.save_weights(tmp_path / "model.safetensors", net.state_dict(), net.recipe, {"reduction": 2})
    again, facts = weights.load_net(tmp_path / "model.safetensors")
    assert facts == {"reduction": 2}
    assert again.recipe == net.recipe
    assert not again.training
    rgb = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        for ours, theirs in zip(net(rgb, UNKNOWN_GSD), again(rgb, UNKNOWN_GSD), strict=True):
            assert torch.equal(ours, theirs)


def write_step(run: Path, step: int, r2: float | None, use: str = "raw") -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    net = small()
    weights.save_weights(folder / "model.safetensors", net.state_dict(), net.recipe, {"step": step})
    weights.save_weights(folder / "ema.safetensors", net.state_dict(), net.recipe, {"step": step})
    (folder / "state.json").write_text(json.dumps({"r2": r2, "use": use}))
    return folder


def test_run_folder_means_its_best_else_its_newest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint there"):
        weights.find_checkpoint(tmp_path)
    first = write_step(tmp_path, 10, None)
    assert weights.find_checkpoint(tmp_path) == first / "model.safetensors"
    second = write_step(tmp_path, 20, None)
    assert weights.find_checkpoint(tmp_path) == second / "model.safetensors"
    third = write_step(tmp_path, 30, 0.4, use="ema")
    write_step(tmp_path, 40, 0.3)
    write_step(tmp_path, 50, None)
    assert weights.find_checkpoint(tmp_path) == third / "ema.safetensors"
    (tmp_path / "checkpoints" / "step-00000060").mkdir()  # unfinished: no state.json
    assert weights.find_checkpoint(tmp_path) == third / "ema.safetensors"
    assert weights.find_checkpoint(second) == second / "model.safetensors"


def test_damaged_checkpoints_are_one_sentence(tmp_path: Path) -> None:
    file = write_step(tmp_path, 10, None) / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        weights.load_net(tmp_path)


def test_depthwise_convolutions_in_float32_change_little_and_survive_copying() -> None:
    net = small().eval()
    rgb = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)

    def heights(network: GeoposeNet) -> torch.Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            agl: torch.Tensor = network(rgb, UNKNOWN_GSD).agl_m
        return agl

    plain = heights(net)
    seen: list[torch.dtype] = []
    assert depthwise.keep_float32(net) > 5
    first = next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1)
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    torch.testing.assert_close(heights(net), plain, rtol=0.1, atol=0.1)
    assert seen == [torch.float32]
    copied = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    torch.testing.assert_close(heights(copied), plain, rtol=0.1, atol=0.1)
    with torch.inference_mode():  # outside autocast nothing is touched
        assert copied(rgb, UNKNOWN_GSD).agl_m.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")


def randomised(net: GeoposeNet) -> GeoposeNet:
    """Inputs start without influence, so that a test must give them some."""
    torch.nn.init.normal_(net.inputs.out.weight)
    return net


RGB = torch.full((2, 3, 64, 64), 90, dtype=torch.uint8)


def scales(net: GeoposeNet, gsd: list[float], city: list[int] | None = None) -> list[float]:
    with torch.inference_mode():
        torch.nn.init.ones_(net.scale.linear.weight)
        cities = None if city is None else torch.tensor(city)
        found: list[float] = net(RGB, torch.tensor(gsd), None, cities).scale_px_per_m.tolist()
    return found


def test_gsd_is_an_input_and_may_be_unknown() -> None:
    net = randomised(small(gsd_input=True)).eval()
    near, far = scales(net, [0.35, 0.8])
    unknown, _ = scales(net, [math.nan, 0.35])
    assert len({round(value, 6) for value in (near, far, unknown)}) == 3
    assert all(math.isfinite(value) for value in (near, far, unknown))


def test_city_is_an_input_and_any_other_city_is_unknown() -> None:
    net = randomised(small(city_input=True, cities=["ARG", "JAX"])).eval()
    arg, jax = scales(net, [0.4, 0.4], [0, 1])
    absent, _ = scales(net, [0.4, 0.4])
    other, beyond = scales(net, [0.4, 0.4], [-1, 2])
    assert absent == other == beyond
    assert len({arg, jax, absent}) == 3
    assert inputs.city_numbers(["ARG", "JAX"], ["JAX", None, "XYZ", "ARG"]).tolist() == [1, -1, -1, 0]


def test_inputs_start_without_influence() -> None:
    plain, told = small(), small(gsd_input=True, city_input=True, cities=["ARG"])
    told.load_state_dict(plain.state_dict(), strict=False)
    with torch.inference_mode():
        for ours, theirs in zip(plain.eval()(RGB, UNKNOWN_GSD), told.eval()(RGB, UNKNOWN_GSD), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_hidden_inputs_follow_the_generator_and_only_in_training() -> None:
    net = randomised(small(gsd_input=True, input_dropout=0.5))
    gsd = torch.linspace(0.3, 0.6, 64)

    def vectors(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        found: torch.Tensor = net.inputs(gsd, None)
        return found

    net.train()
    assert torch.equal(vectors(1), vectors(1))
    assert not torch.equal(vectors(1), vectors(2))
    drawn = vectors(1)
    unknown = net.eval().inputs(torch.full((1,), math.nan), None)
    hidden = torch.isclose(drawn, unknown, atol=1e-4).all(dim=1)
    assert 15 < int(hidden.sum()) < 50
    assert torch.equal(vectors(1), vectors(2))


def test_skip_at_full_resolution_shows_the_heads_single_pixels() -> None:
    """The decoder's last block enlarges by repeating pixels: its 2x2 groups see one value, the skip sees four."""
    net = small(full_resolution_skip=4).eval()
    image = torch.zeros(1, 3, 64, 64)
    decoded = torch.zeros(1, 8, 64, 64)
    with torch.inference_mode():
        flat = net.full_resolution(image, decoded)
        image[..., 32, 32] = 5.0
        seen = (net.full_resolution(image, decoded) - flat).abs().sum(dim=1)[0] > 1e-6
    assert seen.any()
    rows, columns = torch.nonzero(seen).unbind(dim=1)
    assert rows.min() >= 29
    assert rows.max() <= 35
    assert columns.max() <= 35
    assert small().state_dict().keys() < net.state_dict().keys()


def test_confidence_chooses_which_pixels_tell_the_direction() -> None:
    net = small(direction_confidence=True).eval()
    maps = torch.zeros(1, 4, 32, 32)
    maps[:, 1, :, :16], maps[:, 2, :, 16:] = 1.0, 1.0  # x on the left, y on the right
    maps[:, 3, :, :16], maps[:, 3, :, 16:] = 20.0, -20.0
    deepest = torch.zeros(1, net.unet.encoder.out_channels[-1], 1, 1)
    with torch.inference_mode():
        direction = net._heads(maps, deepest, UNKNOWN_GSD, None).direction[0]
    assert direction.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"direction": "pooled", "direction_confidence": True}, "direction_confidence"),
        ({"full_resolution_skip": -1}, "full_resolution_skip"),
        ({"input_dropout": 1.0}, "input_dropout"),
    ],
)
def test_impossible_models_are_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ModelRecipe(**changes)


def test_hub_without_a_network_warns_and_goes_on_or_stops_on_request() -> None:
    """The tests' environment forbids the hub (conftest.py), as a cluster's nodes often do."""
    net = small(encoder="resnet18", weights="hub")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    said = pretrained.load_encoder(net)
    assert said.startswith("WARNING")
    assert "resnet18" in said
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    with pytest.raises(UserError, match="weights_required"):
        pretrained.load_encoder(small(encoder="resnet18", weights="hub", weights_required=True))


def test_hub_weights_that_nobody_published_are_named() -> None:
    with pytest.raises(UserError, match="nobody published weights of tu-mnasnet_050"):
        pretrained.load_encoder(small(encoder="tu-mnasnet_050", weights="hub"))


def test_unknown_tag_of_a_known_encoder_offers_the_published_ones() -> None:
    with pytest.raises(UserError, match=r"tu-resnet18\.a1_in1k"):
        GeoposeNet(ModelRecipe(encoder="tu-resnet18.nonsense"))


def test_zenith_scale_is_the_geometry_of_the_sensor() -> None:
    head = heads.ZenithScale(4, start_px_per_m=0.8, typical_gsd_m=0.5, dropout=0.0).eval()
    pooled = torch.zeros(3, 4)
    with torch.inference_mode():
        scale = head(pooled, torch.tensor([0.5, 1.0, math.nan])).tolist()
    # The start, at its GSD and where it is unknown; at twice the GSD a pixel is twice as many metres.
    assert scale == pytest.approx([0.8, 0.4, 0.8], rel=1e-5)
    with torch.no_grad():
        head.linear.bias.fill_(0.3)
        answer = head(pooled[:1], torch.tensor([0.5])).item()
    zenith = heads.MAX_ZENITH_RAD / (1 + math.exp(-0.3))
    assert geometry.zenith_from_scale(answer, 0.5) == pytest.approx(zenith, rel=1e-5)


def test_zenith_scale_hides_gsds_in_training_alone() -> None:
    head = heads.ZenithScale(4, 0.8, 0.5, dropout=0.5)
    gsd = torch.full((64,), 1.0)
    torch.manual_seed(0)
    hidden = int((head(torch.zeros(64, 4), gsd) > 0.6).sum())
    assert 15 < hidden < 50
    assert (head.eval()(torch.zeros(64, 4), gsd) < 0.6).all()
