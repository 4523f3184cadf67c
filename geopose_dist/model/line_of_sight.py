"""Where surfaces come to lie when each moves against the flow, in torch: the twin of `kernels.invert_flow`.

The same steps along the same lines as the compiled kernel: a pixel takes the last step k whose surface is at
least k steps tall, and the crossing behind it on a straight line. A step is the whole tile compared with itself,
moved by whole pixels known to the host, so nothing waits for the device and no index is computed. Unknown heights are
filled along lines that are made columns by a shear.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geopose_dist.geometry import direction
from geopose_dist.kernels import MAX_SHIFT_PX


def invert_flow(
    agl_m: Tensor,
    px_per_m: float,
    angle_rad: float,
    facade_px_per_px: float,
    tallest_m: float,
    origin: tuple[int, int] = (0, 0),
) -> Tensor:
    """Shift of the surface seen at each pixel after every surface moved against the flow.

    Args:
        agl_m: float32 [H, W] metres, NaN = unknown, below 0 counts as 0.
        px_per_m: pixels of movement per metre, above 0.
        angle_rad: flow direction.
        facade_px_per_px: how fast the shift falls along a facade hidden in an unknown stretch.
        tallest_m: no height is above this; known to the host, so that it need not ask.
        origin: row and column of the tile that agl_m begins with, if it is a part of a tile.

    Returns:
        float32 [H, W] pixels >= 0; NaN where the line of sight leaves the tile.
    """
    rows, cols = agl_m.shape
    x, y = direction(angle_rad)
    length = 1 / max(abs(y), abs(x))
    most_px = 2.0 * max(rows, cols)  # nothing is met from farther away
    shift = (agl_m * px_per_m).clamp(min=0)
    shift = fill_unknown(shift, y, x, facade_px_per_px * length, origin).clamp(max=MAX_SHIFT_PX)
    steps = int(min(max(tallest_m, 0.0) * px_per_m, most_px) / length) + 2
    down = [_half_up(k * length * y) for k in range(steps + 2)]
    right = [_half_up(k * length * x) for k in range(steps + 2)]
    along = torch.arange(steps + 2, dtype=torch.float32) * torch.tensor(length, dtype=torch.float32)
    last = torch.zeros(rows, cols, dtype=torch.int32, device=agl_m.device)
    for k, tall in enumerate(along[: steps + 1].tolist()):
        here, there = _overlap(rows, down[k]), _overlap(cols, right[k])
        if k and here and there:
            met = shift[here[1], there[1]] >= tall
            last[here[0], there[0]].masked_fill_(met, k)
    return _crossing(shift, last, _host(along, agl_m), _host(down, agl_m), _host(right, agl_m))


def _crossing(shift: Tensor, last: Tensor, along: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Where between the last step and the next one the line of sight meets the surface."""
    rows, cols = shift.shape
    row = torch.arange(rows, device=shift.device)[:, None]
    col = torch.arange(cols, device=shift.device)
    k = last.long()
    lo = shift[row + down[k], col + right[k]]
    next_row, next_col = row + down[k + 1], col + right[k + 1]
    on_tile = (next_row >= 0) & (next_row < rows) & (next_col >= 0) & (next_col < cols)
    hi = shift[next_row.clamp(0, rows - 1), next_col.clamp(0, cols - 1)]
    short, over = lo - along[k], along[k + 1] - hi
    met = lo + short / (short + over) * (hi - lo)
    at_the_edge = lo.masked_fill(short > 0.5 * along[1], math.nan)
    return torch.where(on_tile, met, at_the_edge)


def fill_unknown(
    shift: Tensor, dir_y: float, dir_x: float, drop: float, origin: tuple[int, int] = (0, 0)
) -> Tensor:
    """`shift` [H, W] with its NaN filled along the line of sight as the compiled `_sight.fill_unknown` does.

    Between a known L before and a known R behind: max(min(L, R), L - drop * steps); else the one known; else 0.
    """
    if abs(dir_y) < abs(dir_x):
        return fill_unknown(shift.T, dir_x, dir_y, drop, origin[::-1]).T
    rows, cols = shift.shape
    # Lines become columns: pixel (y, x) stands in column x - moved[y] + most.
    moved = [_half_up(dir_x / dir_y * (origin[0] + row)) for row in range(rows)]
    lines, most = cols + max(moved) - min(moved), max(moved)
    across = _host(moved, shift)[:, None] - most
    col = torch.arange(lines, device=shift.device) + across
    beside = (col < 0) | (col >= cols)
    sheared = shift.gather(1, col.clamp(0, cols - 1)).masked_fill(beside, math.nan)
    filled = _fill_columns(sheared if dir_y >= 0 else sheared.flip(0), drop)
    filled = filled if dir_y >= 0 else filled.flip(0)
    return filled.gather(1, (torch.arange(cols, device=shift.device) - across).expand(rows, cols))


def _fill_columns(shift: Tensor, drop: float) -> Tensor:
    """`fill_unknown` where the line of sight runs down the columns."""
    rows = shift.shape[0]
    row = torch.arange(rows, device=shift.device)[:, None].expand(shift.shape)
    unknown = shift.isnan()
    before_at = row.masked_fill(unknown, -1).cummax(0).values
    behind_at = row.masked_fill(unknown, rows).flip(0).cummin(0).values.flip(0)
    before = shift.gather(0, before_at.clamp(min=0)).nan_to_num(0.0)
    behind = shift.gather(0, behind_at.clamp(max=rows - 1)).nan_to_num(0.0)
    ramp = before - drop * (row - before_at)
    between = torch.maximum(torch.minimum(before, behind), ramp)
    one_known = torch.where(behind_at < rows, behind, before)  # both 0 where neither is known
    filled = torch.where((before_at >= 0) & (behind_at < rows), between, one_known)
    return torch.where(unknown, filled, shift)


def _half_up(value: float) -> int:
    return math.floor(value + 0.5)


def _overlap(side: int, moved: int) -> tuple[slice, slice] | None:
    """Of `side` pixels those whose place `moved` pixels on is inside, and these places; None if there are none."""
    first, stop = max(0, -moved), min(side, side - moved)
    return (slice(first, stop), slice(first + moved, stop + moved)) if first < stop else None


def _host(values: Tensor | list[int], like: Tensor) -> Tensor:
    """A few numbers on the device of `like`, without waiting for it."""
    return torch.as_tensor(values).to(like.device, non_blocking=True)
