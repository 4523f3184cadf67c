"""How a scene is cut: windows for the network among reduced pixels, blocks for the outputs at full resolution.

Pure integers and weights, the same on every machine. Windows overlap, start at multiples of 32 (where a
network that halves its maps five times answers alike), and their weights sum to one; the last ones reach
beyond the scene by less than 32 pixels, which are reflected, exactly as a whole prediction would pad.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from geopose_dist.geometry import F32
from geopose_dist.infer import tiles

STEP = 32
"""Windows start at multiples of this and are padded to them."""
BLOCK_PX = 2048
"""Side of an output block."""
SLOPE_PX = 3
"""Reduced pixels around a block that enlarging looks at, so that a block gets what the whole would."""


@dataclass(frozen=True)
class ScenePlan:
    """The cut of a scene.

    Attributes:
        rows, columns: of the scene.
        reduction: of the network.
        window, overlap: of the network's windows, in reduced pixels.
        block: side of an output block.
    """

    rows: int
    columns: int
    reduction: int
    window: int
    overlap: int
    block: int

    @property
    def small(self) -> tuple[int, int]:
        """Rows and columns of the reduced scene."""
        return -(-self.rows // self.reduction), -(-self.columns // self.reduction)

    @property
    def window_size(self) -> tuple[int, int]:
        """Rows and columns of every window."""
        rows, columns = (min(self.window, -(-side // STEP) * STEP) for side in self.small)
        return rows, columns

    @cached_property
    def starts(self) -> tuple[list[int], list[int]]:
        """First reduced rows and columns of the windows."""
        rows, columns = (
            tiles.window_starts(-(-side // STEP) * STEP, self.window, self.overlap, STEP)
            for side in self.small
        )
        return rows, columns

    @cached_property
    def weights(self) -> tuple[F32, F32]:
        """Weights [windows, side] of the windows along rows and columns of the reduced scene."""
        rows, columns = (
            tiles.window_weights(starts, side, window)
            for starts, side, window in zip(self.starts, self.small, self.window_size, strict=True)
        )
        return rows, columns

    @property
    def windows(self) -> int:
        """Number of windows."""
        return len(self.starts[0]) * len(self.starts[1])

    def split(self, window: int) -> tuple[int, int]:
        """Position of a window in the grid (row, column)."""
        return divmod(window, len(self.starts[1]))

    def inside(self, window: int) -> tuple[slice, slice]:
        """Reduced pixels of a window inside the scene."""
        pairs = zip(self.split(window), self.starts, self.window_size, self.small, strict=True)
        rows, columns = (slice(at[i], min(at[i] + size, side)) for i, at, size, side in pairs)
        return rows, columns

    def source(self, window: int) -> tuple[slice, slice]:
        """Pixels of the scene that a window is reduced from."""
        f = self.reduction
        pairs = zip(self.inside(window), (self.rows, self.columns), strict=True)
        rows, columns = (slice(part.start * f, min(part.stop * f, side)) for part, side in pairs)
        return rows, columns

    def meeting(self, rows: slice, columns: slice) -> list[int]:
        """Windows with any weight among these reduced pixels."""
        across = [
            np.flatnonzero(weights[:, part].any(axis=1))
            for weights, part in zip(self.weights, (rows, columns), strict=True)
        ]
        return [int(i) * len(self.starts[1]) + int(j) for i in across[0] for j in across[1]]

    @property
    def blocks(self) -> int:
        """Number of output blocks."""
        return -(-self.rows // self.block) * -(-self.columns // self.block)

    def core(self, block: int) -> tuple[slice, slice]:
        """Pixels of the scene that a block answers for."""
        row, column = divmod(block, -(-self.columns // self.block))
        return (
            slice(row * self.block, min((row + 1) * self.block, self.rows)),
            slice(column * self.block, min((column + 1) * self.block, self.columns)),
        )

    def around(self, core: tuple[slice, slice], margin: tuple[int, int]) -> tuple[slice, slice]:
        """`core` with a margin of rows and columns, inside the scene."""
        pairs = zip(core, margin, (self.rows, self.columns), strict=True)
        rows, columns = (slice(max(s.start - m, 0), min(s.stop + m, side)) for s, m, side in pairs)
        return rows, columns
