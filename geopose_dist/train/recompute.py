"""Gradient checkpointing: blocks keep their inputs alone and compute again in the backward pass.

A block is what an encoder or decoder repeats: a residual block, a stage, a decoder level. The second
computation draws the same dropout (torch restores the generators) and leaves the running buffers of
normalisation alone, which the first one has moved already. Names of parameters stay as they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def recompute_blocks(net: nn.Module) -> int:
    """Let every block of `net` forget what it computed until the backward pass; how many there are."""
    found = list(blocks(net))
    for block in found:
        block.forward = functools.partial(_forward, block, type(block).forward)
    return len(found)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that stand in a sequence or list, have parts of their own, and hold weights."""
    for child in module.children():
        if next(child.children(), None) is None:
            continue
        if isinstance(module, CONTAINERS) and not isinstance(child, CONTAINERS):
            if next(child.parameters(), None) is not None:
                yield child
        else:
            yield from blocks(child)


def _forward(block: nn.Module, forward: Any, *inputs: Any, **named: Any) -> Any:
    """`forward` of `block`; a module-level function of the block, so that copying a network copies it too."""
    if not (block.training and torch.is_grad_enabled()):
        return forward(block, *inputs, **named)
    contexts = functools.partial(_contexts, block)
    return checkpoint(forward, block, *inputs, use_reentrant=False, context_fn=contexts, **named)


def _contexts(block: nn.Module) -> tuple[Any, Any]:
    return contextlib.nullcontext(), _buffers_untouched(block)


@contextlib.contextmanager
def _buffers_untouched(block: nn.Module) -> Iterator[None]:
    """Let normalisation move copies of its running buffers."""
    owners = [module for module in block.modules() if module._buffers]
    kept = [dict(module._buffers) for module in owners]
    for module in owners:
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for module, buffers in zip(owners, kept, strict=True):
            module._buffers.update(buffers)
