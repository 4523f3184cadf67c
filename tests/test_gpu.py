"""What only a GPU can show: its arithmetic against the CPU's, compiled steps, and NCCL with one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import torch
import torch.distributed as dist
from steps import FOUR, stepper_of, steps_of, watch_gradients
from torch import Tensor, nn

from geopose_dist.data.batch import to_device
from geopose_dist.model import heads
from geopose_dist.runtime import World

pytestmark = pytest.mark.gpu

DEVICE = "cuda"

FIXED = ("--model.dropout=0", "--augment.preset=none")


def first_step(shards: Path, device: str, *options: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a first step of four tiles, GroupNorm in the network, on the CPU again."""
    recipe = runs.recipe(shards, *FOUR, *FIXED, *options)
    stepper = stepper_of(recipe, World(0, 1, 0, 1, torch.device(device)), norms=False)
    seen = watch_gradients(stepper.net)
    batches = [to_device(batch, torch.device(device)) for batch in steps_of(shards, recipe)[0]]
    loss = float(stepper.step(batches, 0, 0).loss)
    scale = stepper.scaler.get_scale() if recipe.precision == "fp16" else 1.0
    return loss, {name: value.float().cpu() / scale for name, value in seen.items()}


def direction_off(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """1 - cosine between two gradients."""
    a, b = (torch.cat([one[name].flatten().double() for name in sorted(one)]) for one in (ours, theirs))
    return 1 - float(nn.functional.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize(
    ("precision", "loss_off", "gradient_off"),
    [("fp32", 1e-4, 1e-4), ("tf32", 0.01, 0.01), ("bf16", 0.05, 0.1), ("fp16", 0.03, 0.03)],
)
def test_a_step_agrees_with_the_cpu(
    train_shards: Path, precision: str, loss_off: float, gradient_off: float
) -> None:
    wanted, gradients = first_step(train_shards, "cpu", "--precision=fp32")
    loss, found = first_step(train_shards, DEVICE, f"--precision={precision}")
    assert loss == pytest.approx(wanted, rel=loss_off)
    assert direction_off(found, gradients) <= gradient_off


def test_a_compiled_step_is_the_step(train_shards: Path) -> None:
    wanted, gradients = first_step(train_shards, DEVICE, "--precision=fp32")
    loss, found = first_step(train_shards, DEVICE, "--precision=fp32", "--compile=default")
    assert loss == pytest.approx(wanted, rel=1e-3)
    assert direction_off(found, gradients) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scale_of_tall_tiles_does_not_overflow(dtype: torch.dtype) -> None:
    """1024 x 1024 heights of 200 m: their sum of squares is 4e10, and fp16 ends at 65504."""
    agl_m = torch.full((1, 1, 1024, 1024), 200.0, dtype=dtype, device=DEVICE, requires_grad=True)
    magnitude_px = torch.full((1, 1, 1024, 1024), 100.0, dtype=dtype, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, dtype=dtype):
        scale = heads.least_squares_scale(agl_m, magnitude_px, None, heads.LEAST_SQUARES_RIDGE)
    assert scale.dtype == torch.float32
    assert scale.item() == pytest.approx(0.5, rel=1e-3)
    torch.autograd.backward(scale.sum())
    assert agl_m.grad is not None
    assert torch.isfinite(agl_m.grad).all()


@pytest.mark.filterwarnings("ignore:Grad strides do not match")  # a hint about speed
def test_one_rank_of_nccl_exchanges_and_changes_nothing(train_shards: Path) -> None:
    place = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    recipe = runs.recipe(train_shards, *FOUR, *FIXED, "--precision=fp32")
    batch = to_device(steps_of(train_shards, recipe)[0][0], place)
    dist.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
        device_id=place if DEVICE == "cuda" else None,
    )
    try:
        total = torch.arange(5.0, device=place)
        dist.all_reduce(total)
        assert total.tolist() == [0, 1, 2, 3, 4]
        gradients = []
        for wrapped in (False, True):
            net = stepper_of(recipe, World(0, 1, 0, 1, place), norms=False).net
            module = nn.parallel.DistributedDataParallel(net) if wrapped else net
            answer = module(batch.rgb, batch.gsd_m, None)
            torch.autograd.backward(torch.stack([part.sum() for part in answer if part is not None]).sum())
            gradients.append({name: p.grad.cpu() for name, p in net.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        assert direction_off(*gradients) <= 1e-6
    finally:
        dist.destroy_process_group()
