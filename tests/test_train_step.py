"""A training step: exact over micro-batches, never waiting for its device, alike whether blocks are computed twice."""

from __future__ import annotations

import copy
import itertools
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from geopose_dist.data import manifest
from geopose_dist.data.batch import Batch
from geopose_dist.data.loader import train_loader
from geopose_dist.errors import UserError
from geopose_dist.model import heads
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.runtime import World
from geopose_dist.train import parallel, recompute
from geopose_dist.train.optim import AveragedWeights, make_optimizer
from geopose_dist.train.prefetch import DevicePrefetch
from geopose_dist.train.recipe import TrainRecipe
from geopose_dist.train.step import Stepper

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
FOUR = ("--data.global-batch=4", "--data.micro-batch=2")


def stepper_of(recipe: TrainRecipe, world: World = ALONE, *, norms: bool = True) -> Stepper:
    """A network with the recipe's own seed, and what it takes to step."""
    torch.manual_seed(recipe.seed)
    net = GeoposeNet(recipe.model)
    if not norms:
        without_batch_norm(net)
    if recipe.checkpoint_activations:
        recompute.recompute_blocks(net)
    net.to(world.device).train()
    return Stepper(recipe, net, make_optimizer(recipe.optim, net, world.device), world)


def steps_of(shards: Path, recipe: TrainRecipe, count: int = 1) -> list[list[Batch]]:
    """The micro-batches of the first `count` steps."""
    return list(train_loader(manifest.open_split(shards, "train"), recipe.data, 0, 0, 1, 0, count))


def without_batch_norm(net: nn.Module) -> None:
    """Exchange BatchNorm for GroupNorm, which looks at one tile at a time."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                norm = nn.GroupNorm(1, child.num_features)
                activation = nn.Sequential(norm, child.act) if hasattr(child, "act") else norm
                setattr(module, name, activation)


def watch_gradients(net: nn.Module) -> dict[str, torch.Tensor]:
    """By name, the gradient that each parameter last had before the step cleared it."""
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str, parameter: nn.Parameter) -> None:
        def keep(p: torch.Tensor) -> None:
            assert p.grad is not None
            seen[name] = p.grad.clone()

        parameter.register_post_accumulate_grad_hook(keep)

    for name, parameter in net.named_parameters():
        watch(name, parameter)
    return seen


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_accumulation_is_the_whole_batch(train_shards: Path, micro_batch: int) -> None:
    """The same global batch in one forward pass and in pieces: equal loss and gradients to 1e-5.

    Two of twelve tiles know no height, so some pieces know none at all.
    """
    results = []
    for size in (4, micro_batch):
        recipe = runs.recipe(train_shards, "--data.global-batch=4", f"--data.micro-batch={size}")
        stepper = stepper_of(recipe, norms=False)
        gradients = watch_gradients(stepper.net)
        (batches,) = steps_of(train_shards, recipe)
        result = stepper.step(batches, 0, 0)
        results.append((result.loss.item(), result.grad_norm.item(), gradients))
    (value, norm, gradients), (cut_value, cut_norm, cut_gradients) = results
    assert cut_value == pytest.approx(value, rel=1e-5)
    assert cut_norm == pytest.approx(norm, rel=1e-5)
    scale = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(cut_gradients[name], gradient, rtol=1e-4, atol=1e-5 * scale)


class NoWaiting(TorchDispatchMode):
    """Refuses every operation whose result the host has to read: on a GPU each of them waits for the device."""

    READS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "is_nonzero",
        "_unique2",
        "unique_dim",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.READS, f"{func} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            indices = [i for i in args[1] if i is not None]
            assert all(i.dtype != torch.bool for i in indices), f"{func} by a mask waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--precision=fp16",),
        ("--precision=bf16", "--ema-decay=0.9", "--checkpoint-activations=true"),
        ("--model.dropout=0.5", "--model.direction=pooled", "--loss.agl=r2", "--loss.flow-weight=1"),
    ],
)
def test_no_step_waits_for_the_device(
    train_shards: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither reading a result nor sending a number: both make the host wait for all that was asked for before."""
    recipe = runs.recipe(train_shards, *FOUR, *options)
    stepper = stepper_of(recipe)
    averaged = AveragedWeights(stepper.net, 0.9)
    first, second = steps_of(train_shards, recipe, 2)
    stepper.step(first, 0, 0)  # what is made once may be sent once

    def sent(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("a number of the host is sent to the device in every step")

    with monkeypatch.context() as patch:
        for name in ("tensor", "as_tensor", "from_numpy"):
            patch.setattr(torch, name, sent)
        with NoWaiting():
            result = stepper.step(second, 1, 0)
            averaged.update(stepper.net, 1)
    assert torch.isfinite(result.loss)
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        result.loss.item()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_waits_for_a_gpu(train_shards: Path, precision: str) -> None:
    """By CUDA's own account, copies to the device and looking ahead included."""
    device = torch.device("cuda", 0)
    recipe = runs.recipe(train_shards, *FOUR, f"--precision={precision}")
    stepper = stepper_of(recipe, World(0, 1, 0, 1, device))
    prefetch = DevicePrefetch(steps_of(train_shards, recipe, 5), device)
    for number in range(2):
        stepper.step(prefetch.take(), number, 0)
        prefetch.ahead()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(2, 5):
            result = stepper.step(prefetch.take(), number, 0)
            prefetch.ahead()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(result.loss)


@pytest.mark.gpu
def test_batches_ahead_are_the_batches(train_shards: Path) -> None:
    device = torch.device("cuda", 0)
    recipe = runs.recipe(train_shards, *FOUR)
    steps = steps_of(train_shards, recipe, 4)
    prefetch = DevicePrefetch(steps, device)
    for batches in steps:
        for there, here in zip(prefetch.take(), batches, strict=True):
            assert there.rgb.device == device
            assert torch.equal(there.rgb.cpu(), here.rgb)
            assert torch.equal(there.agl_cm.cpu(), here.agl_cm)
            assert there.keys == here.keys
        prefetch.ahead()
    with pytest.raises(StopIteration):
        prefetch.take()


def test_on_the_cpu_batches_pass_through(train_shards: Path) -> None:
    recipe = runs.recipe(train_shards, *FOUR)
    steps = steps_of(train_shards, recipe, 3)
    asked = itertools.count()

    def loader() -> Iterator[list[Batch]]:
        for batches in steps:
            next(asked)
            yield batches

    prefetch = DevicePrefetch(loader(), ALONE.device)
    for number, batches in enumerate(steps):
        assert prefetch.take() is batches
        prefetch.ahead()
        assert next(copy.copy(asked)) == number + 1  # nothing is loaded before it is needed
    with pytest.raises(StopIteration):
        prefetch.take()


class Live(TorchDispatchMode):
    """Counts the bytes of results that are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.held[storage.data_ptr()] = (weakref.ref(storage), storage.nbytes())
        return result

    def bytes(self) -> int:
        return sum(nbytes for storage, nbytes in self.held.values() if storage() is not None)


@pytest.mark.parametrize("encoder", ["tu-mobilenetv3_small_050", "resnet18"])
def test_blocks_computed_twice_change_no_number(train_shards: Path, encoder: str) -> None:
    """Gradients, running buffers and the loss, bit for bit, with dropout and drop-path on."""
    results = []
    for option in ("false", "true"):
        recipe = runs.recipe(
            train_shards, *FOUR, f"--model.encoder={encoder}", "--model.direction=pooled", "--model.dropout=0.5",
            f"--checkpoint-activations={option}",
        )  # fmt: skip
        stepper = stepper_of(recipe)
        for module in stepper.net.unet.modules():  # type: ignore[union-attr]
            if hasattr(module, "drop_path_rate"):
                module.drop_path_rate = 0.3
        stepper.net.unet.decoder.blocks[0].conv1.append(nn.Dropout(0.3))  # type: ignore[union-attr, index]
        gradients = watch_gradients(stepper.net)
        (batches,) = steps_of(train_shards, recipe)
        result = stepper.step(batches, 0, 0)
        buffers = {name: value.clone() for name, value in stepper.net.named_buffers()}
        results.append((result, gradients, buffers))
    (plain, gradients, buffers), (twice, same_gradients, same_buffers) = results
    assert torch.equal(plain.loss, twice.loss)
    assert gradients.keys() == same_gradients.keys()
    assert all(torch.equal(gradients[name], same_gradients[name]) for name in gradients)
    assert all(torch.equal(buffers[name], same_buffers[name]) for name in buffers)
    assert any("num_batches_tracked" in name and value == 2 for name, value in same_buffers.items())


def test_blocks_computed_twice_keep_little(train_shards: Path) -> None:
    held = {}
    for twice in (False, True):
        recipe = runs.recipe(train_shards, "--model.encoder=resnet18")
        net = GeoposeNet(recipe.model).train()
        count = recompute.recompute_blocks(net) if twice else 0
        rgb, gsd_m = torch.zeros(1, 3, 128, 128, dtype=torch.uint8), torch.full((1,), torch.nan)
        with Live() as live:
            prediction = net(rgb, gsd_m)
            held[twice] = live.bytes()
        assert prediction.agl_m.requires_grad
    assert count == 13  # eight residual blocks and five of the decoder
    assert held[True] < 0.5 * held[False]


def test_a_copied_network_computes_its_own_blocks(train_shards: Path) -> None:
    """Averaged weights are validated in a copy of the network: it must not answer with the original's weights."""
    net = GeoposeNet(runs.recipe(train_shards).model)
    names = list(net.state_dict())
    recompute.recompute_blocks(net)
    assert list(net.state_dict()) == names
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    rgb, gsd_m = torch.full((1, 3, 64, 64), 90, dtype=torch.uint8), torch.full((1,), torch.nan)
    for mode in (True, False):
        assert twin.train(mode)(rgb, gsd_m).agl_m.std() > 1e-3
        assert net.train(mode)(rgb, gsd_m).agl_m.std() < 1e-5


def test_normalising_over_ranks_keeps_names_and_needs_a_gpu_and_even_shares(train_shards: Path) -> None:
    recipe = runs.recipe(
        train_shards, "--data.global-batch=6", "--data.micro-batch=2", "--sync-batchnorm=true"
    )
    with pytest.raises(UserError, match="SyncBatchNorm has no CPU kernel"):
        parallel.check_parallel(recipe, ALONE)
    gpu = torch.device("cuda", 0)
    with pytest.raises(UserError, match="3 micro-batches of a step do not divide over 2 ranks"):
        parallel.check_parallel(recipe, World(0, 2, 0, 2, gpu))
    parallel.check_parallel(recipe, World(0, 3, 0, 3, gpu))
    net = GeoposeNet(recipe.model).eval()
    rgb, gsd_m = torch.full((1, 3, 64, 64), 90, dtype=torch.uint8), torch.full((1,), torch.nan)
    before, names = net(rgb, gsd_m).agl_m, list(net.state_dict())
    plain = sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    net = parallel.normalise_over_ranks(net)
    assert list(net.state_dict()) == names
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in net.modules()) == plain
    assert torch.equal(net(rgb, gsd_m).agl_m, before)  # activations inside timm's normalisation included


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scale_of_tall_tiles_does_not_overflow(dtype: torch.dtype) -> None:
    """1024 x 1024 heights of 200 m: their sum of squares is 4e10, and fp16 ends at 65504."""
    agl_m = torch.full((1, 1, 1024, 1024), 200.0, dtype=dtype, requires_grad=True)
    magnitude_px = torch.full((1, 1, 1024, 1024), 100.0, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        scale = heads.least_squares_scale(agl_m, magnitude_px, None, heads.LEAST_SQUARES_RIDGE)
    assert scale.dtype == torch.float32
    assert scale.item() == pytest.approx(0.5, rel=1e-3)
    (scale * 1e6).sum().backward()
    assert magnitude_px.grad is not None
    # d scale / d magnitude = h / sum h^2: 200 / 4.19e10 of each pixel
    assert float(magnitude_px.grad.float().mean()) == pytest.approx(1e6 * 200 / (1024**2 * 200**2), rel=0.01)
    assert torch.isfinite(agl_m.grad).all()  # type: ignore[arg-type]


def test_fp16_leaves_out_steps_that_overflow_and_goes_on(train_shards: Path) -> None:
    recipe = runs.recipe(train_shards, *FOUR, "--precision=fp16")
    stepper = stepper_of(recipe)
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    (batches,) = steps_of(train_shards, recipe)
    before = {name: value.clone() for name, value in stepper.net.state_dict().items()}
    stepper.step(batches, 0, 0)
    assert stepper.scaler.get_scale() == 2.0**39
    after = stepper.net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name, _ in stepper.net.named_parameters())
    stepper.scaler.update(new_scale=2.0**10)
    stepper.step(batches, 1, 0)
    assert stepper.scaler.get_scale() == 2.0**10
    assert any(not torch.equal(before[name], after[name]) for name, _ in stepper.net.named_parameters())
    assert all(torch.isfinite(value).all() for value in after.values())
    taken = {float(state["step"]) for state in stepper.optimizer.state.values()}
    assert taken == {1.0}  # a step left out is not counted by Adam


class Small(nn.Module):
    """The least that a step can train: so that compiling it takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1)
        )

    def forward(self, rgb_u8: torch.Tensor, *_: object) -> heads.Prediction:
        maps = self.layers(rgb_u8.float() / 255).float()
        pooled = maps.mean(dim=(2, 3))
        scale = nn.functional.softplus(pooled[:, 0])
        return heads.Prediction(maps[:, :1], maps[:, 1:2], pooled[:, 1:], scale, None)


@pytest.mark.slow
def test_compiled_steps_are_the_steps(train_shards: Path) -> None:
    """Two micro-batches a step, three steps: losses to 1e-4, and the names of the state as they were."""
    if not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    losses, names = {}, {}
    for mode in ("off", "default"):
        recipe = runs.recipe(train_shards, *FOUR, f"--compile={mode}")
        torch.manual_seed(0)
        net = Small().train()
        stepper = Stepper(recipe, net, make_optimizer(recipe.optim, net, ALONE.device), ALONE)
        steps = steps_of(train_shards, recipe, 3)
        losses[mode] = [stepper.step(batches, i, 0).loss.item() for i, batches in enumerate(steps)]
        names[mode] = list(net.state_dict())
    assert losses["default"] == pytest.approx(losses["off"], rel=1e-4)
    assert names["default"] == names["off"]


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["resnet18", "tu-mobilenetv3_small_050"])
def test_the_network_compiles_in_one_piece(train_shards: Path, encoder: str) -> None:
    """A graph break would cut the graph that max-autotune replays."""
    net = GeoposeNet(runs.recipe(train_shards, f"--model.encoder={encoder}").model).train()
    rgb, gsd_m = torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.full((2,), torch.nan)
    explained = torch._dynamo.explain(net)(rgb, gsd_m)
    assert explained.graph_break_count == 0, explained.break_reasons
    assert explained.graph_count == 1
