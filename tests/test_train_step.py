"""A training step: exact over micro-batches, never waiting for its device, alike whether blocks are computed twice."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from steps import ALONE, FOUR, stepper_of, steps_of, watch_gradients
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from geopose_dist.data.batch import Batch
from geopose_dist.errors import UserError
from geopose_dist.model import heads
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.runtime import World
from geopose_dist.train import parallel
from geopose_dist.train.optim import AveragedWeights, make_optimizer
from geopose_dist.train.prefetch import DevicePrefetch
from geopose_dist.train.step import Stepper


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


def test_a_step_is_the_plain_loss_of_the_whole_batch(train_shards: Path) -> None:
    """Beside a few lines of plain torch on all four tiles at once: loss and gradients to 1e-5.

    With GroupNorm, as BatchNorm's statistics belong to a forward pass. The plain lines are the benchmark's means.
    """
    recipe = runs.recipe(train_shards, "--data.global-batch=4", "--data.micro-batch=1")
    cut = stepper_of(recipe, norms=False)
    gradients = watch_gradients(cut.net)
    (batches,) = steps_of(train_shards, recipe)
    result = cut.step(batches, 0, 0)

    net = stepper_of(recipe, norms=False).net
    (whole,) = steps_of(
        train_shards, runs.recipe(train_shards, "--data.global-batch=4", "--data.micro-batch=4")
    )
    (batch,) = whole
    predicted = net(batch.rgb, batch.gsd_m)
    cm = batch.agl_cm.to(torch.int32)
    known, truth, scale = cm < 65534, cm / 100, batch.scale_px_per_m
    assert 0 < int(known.any(dim=(1, 2, 3)).sum()) <= 4
    magnitude = truth * scale[:, None, None, None]
    loss = (
        (predicted.agl_m - truth)[known].square().mean()
        + 2 * (predicted.magnitude_px - magnitude)[known].square().mean()
        + 10 * (predicted.direction - batch.direction).square().mean()
        + 10 * (predicted.scale_px_per_m - scale).square().mean()
    )
    loss.backward()
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    plain = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert plain.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * largest)


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
