"""The network over ranks: DDP with its options, normalisation over ranks, and what they cannot do together.

DDP averages gradients over ranks, in buckets, while the backward pass goes on. Our own averaging of running
buffers replaces its copying of rank 0's (see `step`).
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from geopose_dist.errors import UserError
from geopose_dist.runtime import World
from geopose_dist.train.recipe import DdpRecipe, TrainRecipe

Net = TypeVar("Net", bound=nn.Module)


def check_parallel(recipe: TrainRecipe, world: World) -> None:
    """Refuse what this device or number of ranks cannot do (UserError)."""
    if not recipe.sync_batchnorm:
        return
    if world.device.type == "cpu":
        raise UserError(
            "sync_batchnorm: torch's SyncBatchNorm has no CPU kernel and this run is on the CPU; set sync_batchnorm "
            "false, or model.decoder_norm groupnorm, which no cut of a batch can change"
        )
    micro_batches = recipe.data.global_batch // recipe.data.micro_batch
    if micro_batches % world.size:
        raise UserError(
            f"sync_batchnorm: {micro_batches} micro-batches of a step do not divide over {world.size} ranks, and a "
            "rank without one would keep the others waiting; choose data.global_batch / data.micro_batch as a "
            f"multiple of {world.size}"
        )


def normalise_over_ranks(net: Net) -> Net:
    """`net` with SyncBatchNorm for BatchNorm; names and numbers of its state stay as they are.

    timm's conversion and not torch's, which would drop the activations that timm's encoders fuse into their
    normalisation. With it W ranks of b tiles normalise like one rank of W * b: equal up to rounding.
    """
    converted: Net = convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
    return converted


def wrap(net: nn.Module, world: World, recipe: DdpRecipe) -> nn.Module:
    """`net` under DDP if there are several ranks; every parameter is used in every pass."""
    if world.size == 1:
        return net
    # Our own averaging replaces DDP's copying of rank 0's buffers; the argument was renamed in torch 2.13.
    parameters = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    options: dict[str, Any] = {
        name: False,
        "gradient_as_bucket_view": True,
        "bucket_cap_mb": recipe.bucket_mb,
        "static_graph": recipe.static_graph,
    }
    ids = [world.device.index] if world.device.type == "cuda" else None
    wrapped = nn.parallel.DistributedDataParallel(net, device_ids=ids, **options)
    if recipe.compression == "bf16":
        wrapped.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return wrapped
