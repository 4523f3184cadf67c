"""Depthwise convolutions in float32 inside a bfloat16 network on the CPU.

oneDNN has no fast bfloat16 backward pass for strided depthwise convolutions: one of 672 channels took 42 ms
where float32 took 3.4 ms, and a training step of the demo's network spent half its time in five of them.
Hooks, not a subclass: they survive copying the network and change none of its names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def keep_float32(net: nn.Module) -> int:
    """Let every depthwise convolution of `net` compute in float32 under CPU autocast; how many there are."""
    found = [m for m in net.modules() if isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels]
    for module in found:
        module.register_forward_pre_hook(_enter)
        module.register_forward_hook(_leave, always_call=True)
    return len(found)


def _enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    module._under_autocast = torch.is_autocast_enabled("cpu")  # type: ignore[assignment]
    if not module._under_autocast:
        return inputs
    torch.set_autocast_enabled("cpu", False)
    return tuple(value.float() for value in inputs)


def _leave(module: nn.Module, _inputs: Any, output: Tensor | None) -> Tensor | None:
    if not module._under_autocast:
        return output
    torch.set_autocast_enabled("cpu", True)
    return None if output is None else output.to(torch.get_autocast_dtype("cpu"))
