"""How far a network looks: the margin from which windows give what the whole image would.

Measured, not computed: the theoretical field of a deep encoder is hundreds of pixels, of which the outer ones
hardly count, and global pooling (squeeze and excitation) makes it endless. Half of an image is replaced, and the
farthest column of the other half whose heights change is found.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def reach_px(net: nn.Module, *, side: int = 512, tolerance_m: float = 0.01, seed: int = 0) -> int:
    """Pixels beyond which other surroundings change no height by more than `tolerance_m`.

    At least half of `side` where every pixel sees every other. The image is noise in patches, so it stands for
    images with edges everywhere; `side` is a multiple of the network's `size_multiple`.
    """
    rng = np.random.default_rng(seed)
    one, other = (_patches(rng, side) for _ in range(2))
    half = side // 2
    other[:, half:] = one[:, half:]
    pair = torch.from_numpy(np.stack([one, other]).transpose(0, 3, 1, 2).copy())
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        answers = [net(image[None].to(device), torch.full((1,), torch.nan, device=device)) for image in pair]
    change = (answers[0].agl_m - answers[1].agl_m)[0, 0, :, half:].abs().amax(dim=0)
    changed = torch.nonzero(change > tolerance_m)
    return int(changed.max()) + 1 if len(changed) else 0


def _patches(rng: np.random.Generator, side: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """uint8 [side, side, 3]: patches of 16 pixels with noise."""
    coarse = rng.integers(30, 220, (side // 16 + 1, side // 16 + 1, 3)).repeat(16, 0).repeat(16, 1)
    noisy = coarse[:side, :side] + rng.integers(-20, 20, (side, side, 3))
    return noisy.clip(0, 255).astype(np.uint8)
