"""What a worker leaves to the device of one sample's augmentation: plain numbers and two small tables.

The worker reads, decodes and draws, cuts the part of the tile that the draw can reach, and writes the labels as
they will be; the pixels are made on the device (model/device_augment.py) from that part and these numbers. They
travel inside the batch's pickle, some two kilobytes a sample, and stay on the host until they are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Raising:
    """Heights to be raised; what `kernels.invert_flow` and `kernels.Raised` are told on the CPU.

    Attributes:
        px_per_m: pixels by which a metre moves against the flow, above 0.
        angle_rad: flow direction before any turning.
        facade_px_per_px: how fast a hidden facade comes down.
        agl_per_shift: new height in metres per pixel of movement.
        tallest_m: no height of the part is above this.
    """

    px_per_m: float
    angle_rad: float
    facade_px_per_px: float
    agl_per_shift: float
    tallest_m: float


@dataclass(frozen=True)
class Toning:
    """A change of colours.

    Attributes:
        table: uint8 [3, 256], what each value of each channel becomes.
        noise: int8 [256], what a random byte adds; None for no noise.
        noise_seed: what the random bytes are made from, 0 .. 2**63 - 1.
    """

    table: npt.NDArray[np.uint8]
    noise: npt.NDArray[np.int8] | None
    noise_seed: int


@dataclass(frozen=True)
class Deferred:
    """One sample's augmentation, to be done on the device.

    Attributes:
        size: rows and columns of the result.
        matrix: output (row, column, 1) to the place (row, column) in the tile: two rows of three numbers.
        part: rows and columns of the part shipped; a batch pads all parts to one size.
        origin: row and column of the tile that the part begins with: places count from the tile's corner, so that
            they round alike whatever is shipped.
        tile: rows and columns of the tile.
        raising: heights to be raised first, if any.
        toning: colours to be changed last, if any.
    """

    size: tuple[int, int]
    matrix: tuple[tuple[float, float, float], tuple[float, float, float]]
    part: tuple[int, int]
    origin: tuple[int, int]
    tile: tuple[int, int]
    raising: Raising | None = None
    toning: Toning | None = None
