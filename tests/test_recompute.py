"""Gradient checkpointing: the same numbers from less memory."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from steps import FOUR, stepper_of, steps_of, watch_gradients
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from geopose_dist.model.unet import GeoposeNet
from geopose_dist.train import recompute


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


@pytest.mark.parametrize(
    "encoder", ["tu-mobilenetv3_small_050", pytest.param("resnet18", marks=pytest.mark.slow)]
)
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
