"""What a crop of a large tile costs: members that decode a window alone, beside decoding the whole tile.

Two rendered tiles of the challenge's size (2048 px, `geopose synth`). `window` takes whole samples the way a loader's
worker makes them (read, crc32, draw, decode, augment, pack) from shards of each kind; its baseline decodes the
tile and then draws, in the same round. `window-members` times decoding alone, by format, compression and side of the
tiles. All on one thread, in turn, CPU time; pixels are compared with the baseline's before anything is timed.
"""

from __future__ import annotations

import functools
import io
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from geopose_dist.augment import Augmenter, AugmentRecipe
from geopose_dist.bench.cases_codecs import in_turn, ratio
from geopose_dist.bench.harness import Row, check, timing
from geopose_dist.data import codecs, tiff
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.data.recipe import DataRecipe
from geopose_dist.data.sample import Window
from geopose_dist.data.samples import Failure, Request, Samples, generator_for
from shards.pack_recipe import CodecRecipe, PackRecipe

Pixels = npt.NDArray[Any]

TILES = 2
TILE_PX = 2048
CROPS_PX = (512, 768, 1024)
VISITS = 6
"""Draws of each tile in a round; the same for every way."""
QUICK = {"TILE_PX": 192, "CROPS_PX": (64,), "VISITS": 2}
WHOLE = "qoi + lerc, whole tile"
"""The baseline: decode the tile, then draw and crop, with the codecs that are the default."""
KINDS = {
    "qoi + lerc": CodecRecipe("qoi", "lerc"),
    "tiled": CodecRecipe("tiled", "tiled"),
    "gpz": CodecRecipe("gpz", "gpz"),
}


def window(repeats: int) -> list[Row]:
    """Samples for crops of several sides and for whole tiles, from shards of each kind; preset strong."""
    with tempfile.TemporaryDirectory() as folder:
        sets = {name: _packed(Path(folder), name) for name in KINDS}
        by_side = {side: _ways(sets, side) for side in (*CROPS_PX, None)}
        for ways in by_side.values():
            _check_equal(ways)
        calls: dict[str, Callable[[], object]] = {
            f"{side} {name}": way.all for side, ways in by_side.items() for name, way in ways.items()
        }
        seconds = in_turn(calls, repeats)
        peaks = {label: _peak(call) for label, call in calls.items()}
    rows: list[Row] = []
    for side, ways in by_side.items():
        for name, way in ways.items():
            mine, crop = seconds[f"{side} {name}"], str(side or "whole")
            measured, whole = timing(mine), by_side[None][name]
            row: Row = {
                "crop_px": crop,
                "members": name,
                "ms": measured.median_s / way.count * 1e3,
                "spread": measured.spread,
                "samples_per_s": way.count / measured.median_s,
                "kb_per_tile": way.kb_per_tile,
                "needed_share": way.needed,
                "cost_share": ratio(mine, seconds[f"None {name}"]).median_s * whole.count / way.count,
                "peak_mb": peaks[f"{side} {name}"] / 1e6,
                "checked": "same pixels, heights and labels",
                "repeats": repeats,
            }
            if name != WHOLE:
                times = ratio(seconds[f"{side} {WHOLE}"], mine).median_s
                row |= {"baseline": WHOLE, "speedup": times}
                row["verdict"] = f"crop {crop}: {name} {times:.1f} times as fast as {WHOLE}"
            rows.append(row)
    return rows


@dataclass(frozen=True)
class Way:
    """Samples of one kind of shards and one crop.

    Attributes:
        samples: what a worker holds.
        count: samples in a round.
        needed: mean share of a tile's pixels that the draws read.
        kb_per_tile: bytes of a sample / 1000.
    """

    samples: Samples
    count: int
    needed: float
    kb_per_tile: float

    def requests(self) -> list[Request]:
        """One after the other, as a micro-batch of one has them."""
        return [Request(i, i // TILES, i % TILES) for i in range(self.count)]

    def all(self) -> None:
        """Make all of them."""
        for request in self.requests():
            made = self.samples.__getitems__([request])
            assert not isinstance(made, Failure), made


def _ways(sets: dict[str, Reader], side: int | None) -> dict[str, Way]:
    augmenter = Augmenter(AugmentRecipe("strong"), side)
    count = TILES * (VISITS if side else 2)
    shares = []
    for request in (Request(i, i // TILES, i % TILES) for i in range(count)):
        outline = sets["gpz"].tile(request.index).outline
        drawn = augmenter.draw(outline, generator_for(0, request.visit, request.index))
        reach = augmenter.window(outline, drawn)
        shares.append(reach.rows * reach.cols / (outline.size[0] * outline.size[1]))
    ways = {}
    for name, reader in {WHOLE: sets["qoi + lerc"], **sets}.items():
        # A transform that is only a callable is given the decoded tile.
        transform: Any = (lambda view, rng: augmenter(view, rng)) if name == WHOLE else augmenter
        samples = Samples(reader, DataRecipe(reader.shard_set.root, crop_px=side), 0, transform)
        bytes_ = sum(len(reader.raw(index)) for index in range(TILES)) / TILES
        ways[name] = Way(samples, count, float(np.mean(shares)), bytes_ / 1e3)
    return ways


def _packed(folder: Path, name: str) -> Reader:
    from shards import pack

    out = str(folder / name.replace(" + ", "-"))
    pack.run(PackRecipe(source=str(_rendered(folder)), out=out, reduce=1, workers=1, codec=KINDS[name]))
    return Reader(open_shards(out, "train"))


def _rendered(folder: Path) -> Path:
    from shards import synth

    synth.run(synth.SynthRecipe(folder / "tiles", places=TILES, views=1, size=TILE_PX, test_places=0))
    return folder / "tiles"


def _check_equal(ways: dict[str, Way]) -> None:
    """Every way makes the baseline's samples."""
    for request in ways[WHOLE].requests():
        wanted: Any = ways[WHOLE].samples.__getitems__([request])
        for name, way in ways.items():
            found: Any = way.samples.__getitems__([request])
            for field in ("rgb", "agl_cm", "scale_px_per_m", "direction", "gsd_m"):
                same = np.array_equal(getattr(found, field).numpy(), getattr(wanted, field).numpy())
                check(same, f"{name} makes another {field} of {request}")


def _peak(call: Callable[[], object]) -> int:
    """Most bytes of Python and NumPy that were held at one time beyond what was held before."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


Decode = Callable[[bytes, Window], Pixels]


def members(repeats: int) -> list[Row]:
    """Decoding of windows by kind of member; `speedup` is that of the smallest crop over decoding all of it."""
    from shards import layouts, synth

    with tempfile.TemporaryDirectory() as folder:
        synth.run(synth.SynthRecipe(Path(folder) / "t", places=TILES, views=1, size=TILE_PX, test_places=0))
        tiles = layouts.read_layout(Path(folder) / "t")
        images = {
            "rgb": [layouts.load_rgb(tile) for tile in tiles],
            "agl": [_centimetres(tile) for tile in tiles],
        }
    return [row for kind in images for row in _members(kind, images[kind], repeats)]


def _centimetres(tile: Any) -> Pixels:
    from geopose_dist.geometry import agl_cm_from_m
    from shards import layouts

    agl_m = layouts.load_agl_m(tile)
    assert agl_m is not None
    return agl_cm_from_m(agl_m, unknown_allowed=True)[0]


def _members(kind: str, images: list[Pixels], repeats: int) -> list[Row]:
    rng = np.random.Generator(np.random.Philox(11))
    windows: dict[int, list[Window]] = {TILE_PX: [Window(0, 0, TILE_PX, TILE_PX)]}
    for side in CROPS_PX:
        places = rng.integers(0, TILE_PX - side + 1, (VISITS, 2)).tolist()
        windows[side] = [Window(row, col, side, side) for row, col in places]
    baseline = "qoi" if kind == "rgb" else "lerc"
    calls: dict[str, Callable[[], object]] = {}
    kilobytes: dict[str, float] = {}
    for name, (encode, decode) in _formats(kind).items():
        data = [encode(image) for image in images]
        kilobytes[name] = sum(map(len, data)) / len(data) / 1e3
        for one, image in zip(data, images, strict=True):
            cut = windows[CROPS_PX[0]][0]
            check(np.array_equal(decode(one, cut), image[cut.slices]), f"{name} gives other pixels")
        for side, cuts in windows.items():
            calls[f"{name} {side}"] = functools.partial(_decode_all, decode, data, cuts)
    seconds = in_turn(calls, repeats)
    rows: list[Row] = []
    for name, kb in kilobytes.items():
        row: Row = {"kind": kind, "member": name, "kb_per_tile": kb}
        for side, cuts in windows.items():
            each = timing(seconds[f"{name} {side}"])
            row[f"ms_{side}"] = each.median_s / len(cuts) / len(images) * 1e3
            row[f"spread_{side}"] = each.spread
        row |= {"baseline": f"{baseline}, whole"}
        row |= {
            "speedup": ratio(seconds[f"{baseline} {CROPS_PX[0]}"], seconds[f"{name} {CROPS_PX[0]}"]).median_s
        }
        row |= {
            "repeats": repeats,
            "verdict": f"{kind} {name}: a crop of {CROPS_PX[0]} px in {row[f'ms_{CROPS_PX[0]}']:.1f} ms",
        }
        rows.append(row)
    return rows


def _decode_all(decode: Decode, data: list[bytes], places: list[Window]) -> None:
    for one in data:
        for place in places:
            decode(one, place)


def _formats(kind: str) -> dict[str, tuple[Callable[[Pixels], bytes], Decode]]:
    """How to write and to read each kind of member: ours by the reader's door, other tiled TIFFs by tifffile."""
    encode, decode = (
        (codecs.encode_rgb, codecs.decode_rgb) if kind == "rgb" else (codecs.encode_agl, codecs.decode_agl)
    )
    table = codecs.RGB_CODECS if kind == "rgb" else codecs.AGL_CODECS

    def door(name: str) -> tuple[Callable[[Pixels], bytes], Decode]:
        extension = table[name].extension
        read: Any = decode
        return lambda image: encode(name, image), lambda data, cut: read(extension, data, name, None, cut)

    found = {name: door(name) for name in ("qoi" if kind == "rgb" else "lerc", "htj2k", "gpz", "tiled")}
    others: dict[str, dict[str, Any]] = {
        "png": {"compression": "png"},
        "webp": {"compression": "webp", "compressionargs": {"lossless": True, "method": 2}},
        "jpeg xl": {"compression": "jpegxl", "compressionargs": {"lossless": True, "effort": 1}},
        "jpeg 2000": {"compression": "jpeg2000", "compressionargs": {"reversible": True}},
    }
    for side in (128, 512):
        found[f"tiled, {side} px"] = (functools.partial(tiff.encode_tiled, side=side), tiff.decode)
    if kind == "agl":
        others = {"lerc": {"compression": "lerc"}}
    others["deflate"] = {"compression": "deflate", "predictor": True}
    for name, how in others.items():
        reads: Decode = tiff.decode if "predictor" in how else _by_tifffile
        found[f"tiff of {name} tiles"] = (functools.partial(_tiff, how=how), reads)
    return found


def _tiff(image: Pixels, how: dict[str, Any]) -> bytes:
    import tifffile

    buffer = io.BytesIO()
    kind = "rgb" if image.ndim == 3 else "minisblack"
    tifffile.imwrite(buffer, image, photometric=kind, metadata=None, tile=(tiff.SIDE, tiff.SIDE), **how)
    return buffer.getvalue()


def _by_tifffile(data: bytes, cut: Window) -> Pixels:
    """A window of a tiled TIFF of any compression, tile by tile."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as tif:
        page: Any = tif.pages.first
        side, across = page.tilelength, -(-page.imagewidth // page.tilelength)
        top, left = cut.row // side, cut.col // side
        bottom, right = (cut.row + cut.rows - 1) // side + 1, (cut.col + cut.cols - 1) // side + 1
        out = np.empty(((bottom - top) * side, (right - left) * side, *page.shape[2:]), page.dtype)
        for row in range(top, bottom):
            for col in range(left, right):
                number = row * across + col
                begin = page.dataoffsets[number]
                tile, _, _ = page.decode(data[begin : begin + page.databytecounts[number]], number)
                at = np.s_[
                    (row - top) * side : (row - top + 1) * side, (col - left) * side : (col - left + 1) * side
                ]
                out[at] = tile[0] if out.ndim == 3 else tile[0, ..., 0]
    first, near = cut.row - top * side, cut.col - left * side
    return out[first : first + cut.rows, near : near + cut.cols]


CASES = {"window": window, "window-members": members}
