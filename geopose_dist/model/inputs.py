"""What is known of a tile besides its pixels, GSD and city, as a vector beside its deepest features.

Both may be absent at will: an unknown GSD or city is an input of its own, and in training each is hidden
from some tiles at random (`model.input_dropout`), so that the network learns to do without. The draws come
from torch's generator, which training seeds by step and micro-batch before every forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

CITY_WIDTH, HIDDEN_WIDTH = 16, 64
TYPICAL_GSD_M = 0.6
"""Of the reduced tiles of the challenge; the input is the logarithm of the ratio to it."""


class TileInputs(nn.Module):
    """Maps (gsd_m [B], city [B]) to a vector [B, channels] that starts at zero.

    Args:
        channels: of the deepest features, to which the vector is added.
        gsd: whether the GSD is looked at.
        cities: number of known cities; 0 = the city is not looked at.
        dropout: probability with which each input is hidden from a tile in training.
    """

    def __init__(self, channels: int, *, gsd: bool, cities: int, dropout: float) -> None:
        super().__init__()
        self.gsd, self.cities, self.dropout = gsd, cities, dropout
        if cities:
            self.city = nn.Embedding(cities + 1, CITY_WIDTH)  # the last one is "unknown"
        self.hidden = nn.Linear(2 * gsd + CITY_WIDTH * (cities > 0), HIDDEN_WIDTH)
        self.out = nn.Linear(HIDDEN_WIDTH, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, gsd_m: Tensor, city: Tensor | None) -> Tensor:
        """Vectors [B, channels]; GSD NaN, and city None or outside 0 .. cities - 1, are unknown."""
        parts = []
        dropout = self.dropout if self.training else 0.0
        if self.gsd:
            known = torch.isfinite(gsd_m) & shown(gsd_m, dropout)
            ratio = torch.where(known, gsd_m / TYPICAL_GSD_M, 1.0).log()
            parts += [4 * ratio[:, None], known[:, None].to(ratio.dtype)]
        if self.cities:
            if city is None:
                city = torch.full_like(gsd_m, self.cities, dtype=torch.int64)
            known = (city >= 0) & (city < self.cities) & shown(gsd_m, dropout)
            parts.append(self.city(torch.where(known, city, self.cities)))
        vectors: Tensor = self.out(functional.silu(self.hidden(torch.cat(parts, dim=1))))
        return vectors


def shown(like: Tensor, dropout: float) -> Tensor:
    """bool [B]: of which tiles an input is not hidden; nothing is drawn where `dropout` is 0."""
    return torch.rand_like(like) >= dropout if dropout > 0 else torch.ones_like(like, dtype=torch.bool)


def city_numbers(known: Sequence[str], names: Sequence[str | None]) -> Tensor:
    """int64 [B]: position of each name among the known cities, -1 for any other and for None."""
    return torch.tensor([known.index(n) if n in known else -1 for n in names], dtype=torch.int64)


def gsd_tensor(gsds_m: Sequence[float | None]) -> Tensor:
    """float32 [B], NaN where unknown."""
    return torch.tensor([math.nan if gsd is None else gsd for gsd in gsds_m], dtype=torch.float32)
