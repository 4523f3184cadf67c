"""The loaders that ours is measured beside, and the same tiles in their files.

`LooseTiles` is the public benchmark's: two LZW TIFFs and a JSON per tile, its augmentation, float32 batches.
`webdataset_pipeline` is what a WebDataset user writes: PNG by Pillow, float32 to the parent, a shuffle buffer.
`webdataset_ours` has our codecs, our kernels and our batches in that pipeline: what is left is the order.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from geopose_dist.augment import Augmenter
from geopose_dist.bench import baseline_kernels
from geopose_dist.data import codecs, manifest
from geopose_dist.data.batch import pack
from geopose_dist.data.sample import TileFacts, View
from geopose_dist.data.tile import tallest_m, unknown_px
from geopose_dist.geometry import agl_cm_from_m, direction

BATCH = 4
BUFFER = 100
"""Samples in WebDataset's shuffle buffer."""

Array = np.ndarray[Any, Any]
Tile = dict[str, Any]


class LooseTiles:
    """The public benchmark's data set: files of a folder, augmented one operation after another, float32."""

    def __init__(self, folder: Path, augmented: bool) -> None:
        self.files, self.augmented = sorted(folder.glob("*_RGB.tif")), augmented

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> Tile:
        import tifffile

        path = self.files[index * 7 % len(self.files)]
        key = path.name.removesuffix("_RGB.tif")
        rgb = tifffile.imread(path)
        agl_m = tifffile.imread(path.with_name(f"{key}_AGL.tif"))
        pose = json.loads(path.with_name(f"{key}_VFLOW.json").read_text())
        scale, angle = pose["scale"], pose["angle"]
        drawn = draws(np.random.Generator(np.random.Philox(key=[11, index])), agl_m) if self.augmented else {}
        rgb, agl_m, magnitude, scale, angle = baseline_kernels.augment(rgb, agl_m, scale, angle, drawn)
        return {
            "key": key,
            "rgb": unit_floats(rgb),
            "agl_m": agl_m,
            "magnitude_px": magnitude,
            "direction": np.array(direction(angle), np.float32),
            "scale": np.float32(scale),
        }


def draws(rng: np.random.Generator, agl_m: Array) -> dict[str, float]:
    """What the benchmark would do to a sample: each operation with probability .3."""
    happens = rng.random(5) < 0.3
    tallest = float(agl_m.max())  # NaN where one height is unknown, and then it raises nothing
    most = min(2.0, 200 / tallest) if tallest > 0 else 0.0
    drawn: dict[str, float] = {}
    if happens[0] and most > 1:
        drawn["heights"] = float(rng.uniform(1, most))
    if happens[1]:
        drawn["rotate"] = float(rng.integers(360))
    drawn |= {name: 1.0 for name, yes in zip(("flip_x", "flip_y"), happens[2:4], strict=True) if yes}
    if happens[4]:
        drawn["zoom"] = float(rng.uniform(0.7, 1))
    return drawn


def loose(folder: Path, augmented: bool) -> Iterator[Any]:
    """Loose TIFFs through a stock DataLoader with one worker."""
    from torch.utils.data import DataLoader

    tiles: Any = LooseTiles(folder, augmented)
    return iter(DataLoader(tiles, batch_size=BATCH, num_workers=1, multiprocessing_context="fork"))


def webdataset_pipeline(tar: Path) -> Iterator[Any]:
    """PNGs, decoded and normalised by what its users write, one worker."""
    return _webdataset(tar, _decode_png, _stack)


def webdataset_ours(tar: Path, cities: list[str], transform: Augmenter) -> Iterator[Any]:
    """Our members, decoders, augmentation and batches, in WebDataset's order."""
    made = functools.partial(_decode_ours, transform=transform)
    return _webdataset(tar, made, functools.partial(_pack, cities=cities))


def _webdataset(tar: Path, decode: Any, collate: Any) -> Iterator[Any]:
    import webdataset

    data = webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False)
    data = data.repeat().shuffle(BUFFER, initial=16).map(decode).batched(BATCH, collation_fn=collate)
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork")
    return iter(loader)


def _decode_png(sample: dict[str, Any]) -> Tile:
    from PIL import Image

    rgb = np.asarray(Image.open(io.BytesIO(sample["rgb.png"])).convert("RGB"))
    agl_cm = np.asarray(Image.open(io.BytesIO(sample["agl.png"]))).astype(np.uint16)
    pose = json.loads(sample["json"])
    labels = np.array([*direction(pose["angle_rad"]), pose["scale_px_per_m"]], np.float32)
    return {"key": sample["__key__"], "rgb": unit_floats(rgb), "agl_m": metres(agl_cm), "labels": labels}


def _decode_ours(sample: dict[str, Any], transform: Augmenter) -> View:
    key = sample["__key__"]
    facts = TileFacts.from_json(sample["json"], key)
    rgb_name, agl_name = (next(name for name in sample if name.startswith(kind)) for kind in ("rgb.", "agl."))
    rgb = codecs.decode_rgb(rgb_name[4:], sample[rgb_name], key, facts.size)
    agl_m = metres(codecs.decode_agl(agl_name[4:], sample[agl_name], key, facts.size))
    view = View(key, facts.city, rgb, agl_m, facts.gsd_m, facts.scale_px_per_m, facts.angle_rad)
    return transform(view, np.random.Generator(np.random.Philox()))


def _pack(views: list[View], cities: list[str]) -> Any:
    return pack(views, cities, [0] * len(views), [0] * len(views))


def _stack(tiles: list[Tile]) -> Any:
    from torch.utils.data import default_collate

    return default_collate(tiles)


def unit_floats(rgb: Array) -> Array:
    """uint8 [H, W, 3] to float32 [3, H, W] in 0..1."""
    floats = np.ascontiguousarray(rgb.transpose(2, 0, 1), np.float32)
    floats /= np.float32(255)
    return floats


def metres(agl_cm: Array) -> Array:
    """uint16 centimetres to float32 metres, NaN where unknown."""
    agl_m = agl_cm.astype(np.float32)
    agl_m /= np.float32(100)
    agl_m[agl_cm == 65535] = np.nan
    return agl_m


def write_loose(folder: Path, views: list[View]) -> None:
    """The views as the benchmark's files: RGB and heights in metres as LZW TIFFs, the pose as JSON."""
    import tifffile

    folder.mkdir()
    for view in views:
        tifffile.imwrite(folder / f"{view.key}_RGB.tif", view.rgb, compression="lzw", photometric="rgb")
        tifffile.imwrite(folder / f"{view.key}_AGL.tif", view.agl_m, compression="lzw")
        pose = {"scale": view.scale_px_per_m, "angle": view.angle_rad}
        (folder / f"{view.key}_VFLOW.json").write_text(json.dumps(pose))


def write_members(folder: Path, views: list[View], rgb_codec: str, agl_codec: str) -> None:
    """The views as a folder of one shard, as packing writes it; webdataset reads it, too."""
    from shards import index_only, tars
    from shards.pack_recipe import PackRecipe

    folder.mkdir()
    rgb_name = codecs.by_name(codecs.RGB_CODECS, rgb_codec).extension
    agl_name = codecs.by_name(codecs.AGL_CODECS, agl_codec).extension

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for view in views:
            assert view.agl_m is not None
            agl_cm = agl_cm_from_m(view.agl_m, unknown_allowed=True)[0]
            facts = TileFacts(
                view.city, view.place, view.gsd_m, view.scale_px_per_m, view.angle_rad, view.size,
                tallest_m(agl_cm), unknown_px(agl_cm),
            )  # fmt: skip
            yield (
                view.key,
                {
                    f"agl.{agl_name}": codecs.encode_agl(agl_codec, agl_cm),
                    "json": facts.to_json(),
                    f"rgb.{rgb_name}": codecs.encode_rgb(rgb_codec, view.rgb),
                },
            )

    with (folder / "train-000000.tar").open("wb") as file:
        tars.write_samples(file, samples())
    index_only.run(PackRecipe(out=str(folder), index_only=True, workers=1))
    assert manifest.open_split(folder, "train").manifest.cities
