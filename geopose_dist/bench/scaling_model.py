"""What a step costs on many ranks: a model with few terms, fitted to a few measured ranks.

    step(W) = stragglers(W) * (k c + u) + exposed(W) + small(W)

k micro-batches of c seconds and an update of u; the slowest of W ranks is late by its spread times
sqrt(2 ln W) (the expected largest of W normal deviates, to first order). Gradients are averaged while the last
backward pass runs: of an all-reduce of A seconds, what exceeds the share o of that pass is exposed, at least
its last bucket. A is a ring's or a tree's, whichever is quicker (Thakur, Rabenseifner, Gropp 2005): 2 (W-1)/W bytes
over the bandwidth and 2 (W-1) latencies, or 2 bytes over the bandwidth and 2 log2 W latencies. Bandwidth is the
network's, of which a share e is reached, in series with what the host's own copying allows.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BACKWARD_SHARE = 2 / 3
"""Share of a micro-batch's time that its backward pass takes: twice the work of the forward pass."""
SMALL_EXCHANGES = 3
"""Exchanges of a few bytes a step: the stop request, the loss's denominators, BatchNorm's buffers."""


@dataclass(frozen=True)
class Network:
    """What ranks are joined by.

    Attributes:
        gbit_per_s: between two nodes, nominal; infinite on one host without a limit.
        latency_s: of a message.
        ranks_per_node: that share a node's link; those of one node exchange without it.
    """

    gbit_per_s: float
    latency_s: float = 0.0
    ranks_per_node: int = 1


@dataclass(frozen=True)
class Exchange:
    """One measured all-reduce: ranks, bytes, network, seconds."""

    ranks: int
    bytes: int
    network: Network
    seconds: float


@dataclass(frozen=True)
class Point:
    """One measured step.

    Attributes:
        ranks: in all. micro_batches: of this rank. network: between the ranks.
        micro_batch_s: c, one micro-batch without exchange, all ranks busy. update_s: u.
        spread: of a rank's step times, as a share.
        gradient_bytes: exchanged. bucket_bytes: of the last exchange, which nothing can hide.
        seconds: of the whole step, measured.
    """

    ranks: int
    micro_batches: int
    network: Network
    micro_batch_s: float
    update_s: float
    spread: float
    gradient_bytes: int
    bucket_bytes: int
    seconds: float


@dataclass(frozen=True)
class Fit:
    """The fitted terms.

    Attributes:
        efficiency: e, reached share of the nominal bandwidth.
        host_bytes_per_s: what copying and adding on the host allow.
        latency_s: of a message beyond the network's own.
        overlap: o, share of the backward pass that hides an exchange.
        error: largest relative error of a measured step that was left out of the fit; None with too few points.
    """

    efficiency: float
    host_bytes_per_s: float
    latency_s: float
    overlap: float
    error: float | None = None

    def bytes_per_s(self, network: Network) -> float:
        """Bandwidth of one rank's share of the link, as an exchange sees it."""
        wire = self.efficiency * network.gbit_per_s * 1e9 / 8
        return 1 / (1 / wire + 1 / self.host_bytes_per_s)

    def all_reduce_s(self, ranks: int, size: float, network: Network) -> float:
        """Seconds of an all-reduce of `size` bytes: inside the nodes at the host's pace, then between them."""
        inside = min(ranks, network.ranks_per_node)
        nodes = -(-ranks // network.ranks_per_node)
        seconds = quicker(inside, size, self.host_bytes_per_s, self.latency_s)
        # NCCL and gloo hand a node's sum on in as many parts as it has ranks; together they fill the link once.
        return seconds + quicker(nodes, size, self.bytes_per_s(network), self.latency_s + network.latency_s)

    def exposed_s(self, point: Point) -> float:
        """Seconds of the gradients' exchange that the backward pass does not hide."""
        whole = self.all_reduce_s(point.ranks, point.gradient_bytes, point.network)
        last = self.all_reduce_s(point.ranks, point.bucket_bytes, point.network)
        return max(whole - self.overlap * BACKWARD_SHARE * point.micro_batch_s, last)

    def step_s(self, point: Point) -> float:
        """Predicted seconds of a step."""
        alone = point.micro_batches * point.micro_batch_s + point.update_s
        if point.ranks == 1:
            return alone
        late = 1 + point.spread * math.sqrt(2 * math.log(point.ranks))
        small = SMALL_EXCHANGES * self.all_reduce_s(point.ranks, 64, point.network)
        return alone * late + self.exposed_s(point) + small


def quicker(ranks: int, size: float, bytes_per_s: float, latency_s: float) -> float:
    """Seconds of a ring's or a tree's all-reduce, whichever is quicker."""
    if ranks == 1:
        return 0.0
    ring = 2 * (ranks - 1) / ranks * size / bytes_per_s + 2 * (ranks - 1) * latency_s
    tree = 2 * size / bytes_per_s + 2 * math.ceil(math.log2(ranks)) * latency_s
    return min(ring, tree)


def fit(exchanges: Sequence[Exchange], points: Sequence[Point]) -> Fit:
    """Fit bandwidth and latency to the exchanges, the overlap to the steps; the error by leaving each out."""
    wire = fit_wire(exchanges)
    several = [point for point in points if point.ranks > 1]
    found = dataclasses.replace(wire, overlap=fit_overlap(wire, several))
    errors = []
    for left_out in several:
        rest = [point for point in several if point is not left_out]
        if rest:
            other = dataclasses.replace(wire, overlap=fit_overlap(wire, rest))
            errors.append(abs(other.step_s(left_out) / left_out.seconds - 1))
    return dataclasses.replace(found, error=max(errors) if errors else None)


def fit_wire(exchanges: Sequence[Exchange]) -> Fit:
    """Efficiency, host's pace and latency by least squares of relative errors; perfect without exchanges.

    For a ring the seconds are linear in 1/e, 1/host and the latency; none of them can be negative.
    """
    measured = [one for one in exchanges if one.ranks > 1]
    if not measured:
        return Fit(1.0, math.inf, 0.0, 1.0)
    rows, limited = [], any(math.isfinite(one.network.gbit_per_s) for one in measured)
    for one in measured:
        moved = 2 * (one.ranks - 1) / one.ranks * one.bytes
        messages = 2 * (one.ranks - 1)
        wire = moved * 8e-9 / one.network.gbit_per_s if math.isfinite(one.network.gbit_per_s) else 0.0
        rows.append(np.array([wire, moved, messages]) / one.seconds)
    known = [2 * (one.ranks - 1) * one.network.latency_s / one.seconds for one in measured]
    inverse_e, inverse_host, latency = least_squares(np.array(rows), np.maximum(1 - np.array(known), 0))
    return Fit(
        efficiency=min(1 / inverse_e, 1.0) if limited and inverse_e > 0 else 1.0,
        host_bytes_per_s=1 / inverse_host if inverse_host > 0 else math.inf,
        latency_s=latency,
        overlap=1.0,
    )


def least_squares(rows: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> list[float]:
    """The non-negative x [3] with the least |rows x - target|: the best of all choices of terms that stay."""
    scale = np.abs(rows).max(axis=0) + 1e-300
    best, least = np.zeros(rows.shape[1]), math.inf
    for kept in itertools.product((False, True), repeat=rows.shape[1]):
        columns = np.flatnonzero(kept)
        x = np.zeros(rows.shape[1])
        x[columns] = np.linalg.lstsq(
            rows[:, columns] / scale[columns], np.full(len(rows), target), rcond=None
        )[0]
        wrong = float(np.square((rows / scale) @ x - target).sum())
        if (x >= 0).all() and wrong < least - 1e-15:
            best, least = x / scale, wrong
    return [float(value) for value in best]


def fit_overlap(wire: Fit, points: Sequence[Point]) -> float:
    """The overlap between 0 and 1 with the least sum of squared relative errors of the steps."""
    if not points:
        return 1.0
    shares = np.linspace(0, 1, 101)
    models = [dataclasses.replace(wire, overlap=float(share)) for share in shares]
    wrong = [sum((model.step_s(point) / point.seconds - 1) ** 2 for point in points) for model in models]
    return float(shares[int(np.argmin(wrong))])
