"""What a stored tile costs: encoding, decoding and bytes of every codec of the registry, beside LZW TIFF.

The tiles are rendered ones (`geopose synth`), packed as the challenge's are: 2048 px, lossy JPEG 2000, reduced
twice by area. Every codec decodes through the reader's own door, on one thread, in turn with all others in every
repeat, so that a busy minute hits all alike; times are of the thread's CPU. What a lossless codec gives back is
compared pixel by pixel before anything is timed. `resolutions` asks whether one HTJ2K member could serve full
and half resolution both.
"""

from __future__ import annotations

import atexit
import functools
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from geopose_dist.bench.harness import Row, Timing, check, pinned, timing
from geopose_dist.data import codecs, resample
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.geometry import agl_cm_from_m

TILES = 4
"""One rendered tile of each city."""
TILE_PX = 2048
ENCODE_REPEATS = 3
"""Most repeats of encoding, which is slow and never in training's way."""
LOSSY_OFF = 8.0
"""Largest mean difference of a lossy codec's pixels, in levels."""
QUICK = {"TILE_PX": 256}
BASELINE = "tif-lzw"
"""The public benchmark's files."""

Pixels = npt.NDArray[Any]
Pair = tuple[Pixels, Pixels]
"""RGB uint8 [H, W, 3] and heights uint16 centimetres [H, W]."""


def codecs_case(repeats: int, shards: str | None = None) -> list[Row]:
    """Every codec of RGB and of heights beside LZW TIFF; without `shards`, on rendered tiles of 1024 px."""
    pairs = stored_tiles(shards) if shards else [reduced(tile) for tile in render()]
    facts = {"tile_px": "x".join(map(str, pairs[0][0].shape[:2])), "tiles": len(pairs), "threads": 1}
    found: list[Row] = []
    for kind, table in (("rgb", codecs.RGB_CODECS), ("agl", codecs.AGL_CODECS)):
        images = [pair[kind == "agl"] for pair in pairs]
        ways = {name: Way(kind, name, images) for name in [*codecs.names(table), BASELINE]}
        found += [{"kind": kind, **row, **facts} for row in measure(ways, repeats)]
    return found


class Way:
    """One codec and the tiles' bytes in it.

    Attributes:
        kept: how far pixels come back: exact, or the largest difference.
    """

    def __init__(self, kind: str, name: str, images: list[Pixels]) -> None:
        self.kind, self.name, self.images = kind, name, images
        self.members = [self.encoded(image) for image in images]
        self.bytes = sum(map(len, self.members)) / len(images)
        back = [self.decoded(data, image) for data, image in zip(self.members, images, strict=True)]
        worst = max(
            int(np.abs(a.astype(np.int32) - b.astype(np.int32)).max())
            for a, b in zip(back, images, strict=True)
        )
        lossless = name == BASELINE or self._codec().lossless
        check(worst == 0 or not lossless, f"{kind} {name} claims to be lossless, and gives back other pixels")
        off = max(
            float(np.abs(a.astype(np.float32) - b.astype(np.float32)).mean())
            for a, b in zip(back, images, strict=True)
        )
        check(off <= LOSSY_OFF, f"{kind} {name} gives back pixels that are {off:.1f} off in the mean")
        self.kept = "exact" if worst == 0 else f"off by up to {worst}"

    def _codec(self) -> codecs.Codec:
        return codecs.by_name(codecs.RGB_CODECS if self.kind == "rgb" else codecs.AGL_CODECS, self.name)

    def encoded(self, image: Pixels) -> bytes:
        """The bytes of a member."""
        if self.name == BASELINE:
            return lzw_tiff(image)
        return (codecs.encode_rgb if self.kind == "rgb" else codecs.encode_agl)(self.name, image)

    def decoded(self, data: bytes, image: Pixels) -> Pixels:
        """The pixels of a member, as the reader decodes them."""
        if self.name == BASELINE:
            return codecs.decode_tiff(data)
        door = codecs.decode_rgb if self.kind == "rgb" else codecs.decode_agl
        rows, columns = image.shape[:2]
        return door(self._codec().extension, data, self.name, (rows, columns))

    def encode_all(self) -> None:
        """Encode every tile."""
        for image in self.images:
            self.encoded(image)

    def decode_all(self) -> None:
        """Decode every tile."""
        for data, image in zip(self.members, self.images, strict=True):
            self.decoded(data, image)


def measure(ways: dict[str, Way], repeats: int) -> Iterator[Row]:
    """A row for each codec, the baseline's last; ratios are medians over the repeats."""
    tiles = len(next(iter(ways.values())).images)
    decoding = in_turn({name: way.decode_all for name, way in ways.items()}, repeats)
    encoding = in_turn({name: way.encode_all for name, way in ways.items()}, min(repeats, ENCODE_REPEATS))
    for name, way in ways.items():
        decode, encode = timing(decoding[name]), timing(encoding[name])
        row = {
            "codec": name,
            "decode_ms": decode.median_s / tiles * 1e3,
            "spread": decode.spread,
            "encode_ms": encode.median_s / tiles * 1e3,
            "kb_per_tile": way.bytes / 1e3,
            "tiles_per_s": tiles / decode.median_s,
            "round_trip": way.kept,
            "repeats": repeats,
        }
        if name != BASELINE:
            row |= {"baseline": BASELINE, "speedup": ratio(decoding[BASELINE], decoding[name]).median_s}
            row["verdict"] = (
                f"{way.kind} {name} decodes {row['speedup']:.1f} times as fast as {BASELINE}, in "
                f"{way.bytes / ways[BASELINE].bytes:.2f} of its bytes"
            )
        yield row


def ratio(theirs: list[float], ours: list[float]) -> Timing:
    """The ratios of neighbouring runs."""
    return timing([b / a for a, b in zip(ours, theirs, strict=True)])


def in_turn(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each call, `repeats` times, all calls in every round; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with pinned():
        for round_ in range(repeats + 1):
            for name, call in calls.items():
                began = time.thread_time()
                call()
                if round_:
                    seconds[name].append(time.thread_time() - began)
    return seconds


def lzw_tiff(image: Pixels) -> bytes:
    """An image as the public benchmark stores it: TIFF, LZW, no predictor, strips of some rows."""
    import tifffile

    buffer = io.BytesIO()
    kind = "rgb" if image.ndim == 3 else "minisblack"
    tifffile.imwrite(buffer, image, compression="lzw", photometric=kind, rowsperstrip=8)
    return buffer.getvalue()


@functools.cache
def rendered_source() -> Path:
    """A folder with a rendered tile of each city, of the challenge's size, for the time of this process."""
    from shards import synth

    folder = tempfile.TemporaryDirectory(prefix="geopose-bench-")
    atexit.register(folder.cleanup)
    source = Path(folder.name) / "tiles"
    synth.run(synth.SynthRecipe(source, places=TILES, views=1, size=TILE_PX, test_places=0))
    return source


def render() -> list[Any]:
    """The tiles of `rendered_source` (`layouts.Tile`)."""
    from shards import layouts

    return layouts.read_layout(rendered_source())


def reduced(tile: Any) -> Pair:
    """A tile's stored pixels at half resolution."""
    from shards import layouts

    agl_m = layouts.load_agl_m(tile)
    assert agl_m is not None
    agl_cm, _ = agl_cm_from_m(resample.reduce_agl(agl_m, 2), unknown_allowed=True)
    return resample.reduce_rgb(layouts.load_rgb(tile), 2), agl_cm


def stored_tiles(shards: str) -> list[Pair]:
    """The first labelled tiles of a folder of shards."""
    reader = Reader(open_shards(str(shards), "train"))
    pairs: list[Pair] = []
    for index in range(len(reader)):
        view = reader.view(index)
        if view.agl_m is not None:
            pairs.append((view.rgb, agl_cm_from_m(view.agl_m, unknown_allowed=True)[0]))
        if len(pairs) == TILES:
            break
    return pairs


def resolutions(repeats: int) -> list[Row]:
    """Half-resolution pixels from a full-resolution HTJ2K member, beside members of their own."""
    import imagecodecs

    from shards import layouts

    full = [layouts.load_rgb(tile) for tile in render()]
    half = [resample.reduce_rgb(rgb, 2) for rgb in full]
    both = [codecs.encode_rgb("htj2k", rgb) for rgb in full]
    own = {name: [codecs.encode_rgb(name, rgb) for rgb in half] for name in ("qoi", "htj2k")}

    def skip_level(data: bytes) -> Pixels:
        pixels: Pixels = imagecodecs.htj2k_decode(data, skipres=1)
        return pixels

    def own_half(name: str) -> Callable[[], object]:
        extension = codecs.by_name(codecs.RGB_CODECS, name).extension
        return lambda: [codecs.decode_rgb(extension, data, name) for data in own[name]]

    calls: dict[str, Callable[[], object]] = {
        "half from the full member (htj2k)": lambda: [skip_level(data) for data in both],
        "half in its own member (htj2k)": own_half("htj2k"),
        "half in its own member (qoi)": own_half("qoi"),
    }
    seconds = in_turn(calls, repeats)
    full_bytes = sum(map(len, both)) / len(both)
    stored = dict.fromkeys(calls, full_bytes)
    for name, members in own.items():
        stored[f"half in its own member ({name})"] += sum(map(len, members)) / len(members)
    off = np.mean(
        [
            np.abs(skip_level(data).astype(np.int32) - rgb.astype(np.int32)).mean()
            for data, rgb in zip(both, half, strict=True)
        ]
    )
    check(float(off) < LOSSY_OFF, f"half of the full member is {off:.1f} levels off the reduced image")
    base = next(iter(calls))
    rows: list[Row] = []
    for name, spent in seconds.items():
        decode = timing(spent)
        row = {
            "storage": name,
            "decode_ms": decode.median_s / len(full) * 1e3,
            "spread": decode.spread,
            "tiles_per_s": len(full) / decode.median_s,
            "kb_full_and_half": stored[name] / 1e3,
            "off_area_levels": float(off) if name == base else 0.0,
            "repeats": repeats,
        }
        if name != base:
            speedup = ratio(seconds[base], spent).median_s
            more = stored[name] / stored[base]
            row |= {"baseline": base, "speedup": speedup}
            row["verdict"] = (
                f"{name}: {speedup:.2f} times as fast as {base}, {more:.2f} of its bytes for both resolutions"
            )
        rows.append(row)
    return rows


CASES = {"codecs": codecs_case, "resolutions": resolutions}
