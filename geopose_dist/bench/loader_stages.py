"""Where a loader worker's time goes: CPU milliseconds of a sample, stage by stage, in this process.

The stages are those of `data.samples`, called one by one on the same samples. `transfer` is what handing the
batch over costs the training process. Their sum is compared with what the whole takes in one call.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator

from geopose_dist.augment import Augmenter
from geopose_dist.data import reader as readers
from geopose_dist.data.batch import pack, pixel_bytes
from geopose_dist.data.members import parse_members
from geopose_dist.data.reader import Reader
from geopose_dist.data.ring import Ring
from geopose_dist.data.samples import generator_for
from geopose_dist.data.tile import Tile

STAGES = ("read", "crc", "parse", "draw", "decode", "apply", "pack", "transfer")


class Stopwatch:
    """CPU seconds of this thread by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count what the block takes."""
        began = time.thread_time()
        yield
        self.seconds[stage].append(time.thread_time() - began)

    def mean_ms(self, stage: str) -> float:
        """Mean of a stage, without the slowest twentieth: what else the machine did."""
        taken = sorted(self.seconds[stage])
        return 1e3 * statistics.fmean(taken[: max(1, len(taken) * 19 // 20)])


def stages(reader: Reader, transform: Augmenter, rounds: int) -> dict[str, float]:
    """Milliseconds by stage, over all samples and `rounds` visits of each; the first visit warms up.

    Colours and heights are decoded together; `decode_rgb` and `decode_agl` tell them apart.
    """
    watch = Stopwatch()
    size = reader.facts(0).size if transform.crop_px is None else (transform.crop_px, transform.crop_px)
    ring = Ring(2, pixel_bytes(1, *size))
    for visit in range(rounds + 1):
        if visit == 1:
            watch = Stopwatch()
        for index in range(len(reader)):
            sample(reader, transform, index, visit, ring, watch)
    return {stage: watch.mean_ms(stage) for stage in (*STAGES, "decode_rgb", "decode_agl")}


def sample(
    reader: Reader, transform: Augmenter, index: int, visit: int, ring: Ring, watch: Stopwatch
) -> None:
    """One sample through all stages."""
    name, offset, length, _ = reader._span(index)
    with watch("read"):
        data = reader.source.read(name, offset, length)
    with watch("crc"):
        readers.crc32(data)
    with watch("parse"):
        key, members = parse_members(data, reader.where(index))
        tile = Tile.of(key, members, "bench")
    with watch("draw"):
        drawn = transform.draw(tile.outline, generator_for(0, visit, index))
        window = transform.window(tile.outline, drawn)
    with watch("decode"):
        view = tile.view(window)
    part = None if view.part is None else window
    with watch("decode_rgb"):
        tile._rgb(part)
    with watch("decode_agl"):
        tile._agl_m(part)
    with watch("apply"):
        view = transform.apply(view, drawn)
    slot = ring.lend()
    assert slot is not None
    with watch("pack"):
        batch = pack([view], reader.shard_set.manifest.cities, [0], [0], room=ring.room(slot))
        call, arguments = ring.parked(slot, batch).__reduce__()
    with watch("transfer"):
        del batch
        call(*arguments)
