"""Small folders of shards for the tests of order, reader and loader, written by webdataset itself."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from pathlib import Path

import numpy as np
import webdataset

from geopose_dist.data import codecs, manifest
from geopose_dist.data.sample import TileFacts

CITIES = ["ARG", "JAX", "OMA"]


def tile(number: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, TileFacts]:
    """RGB, heights in centimetres and facts of tile `number`; a fiftieth of the heights is unknown."""
    random = np.random.default_rng(number)
    rgb = random.integers(0, 256, (*size, 3), np.uint8)
    agl_cm = random.integers(0, 4000, size).astype(np.uint16)
    agl_cm[random.random(size) < 0.02] = 65535
    city = CITIES[0 if number % 4 else 1 + number // 4 % 2]  # half and more are ARG
    facts = TileFacts(city, f"{city}_p{number // 3}", 0.5, 0.4 + number / 1000, number / 10 % 6, size)
    return rgb, agl_cm, facts


def write_shards(
    folder: Path, counts: list[int], size: tuple[int, int] = (16, 24), split: str = "train"
) -> list[str]:
    """Shards of `counts` samples each, with manifest and index; returns the keys in the index's order."""
    folder.mkdir(parents=True, exist_ok=True)
    keys: list[str] = []
    shards: list[manifest.Shard] = []
    rows = []
    for shard, count in enumerate(counts):
        path = folder / f"{split}-{shard:06d}.tar"
        with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
            for _ in range(count):
                rgb, agl_cm, facts = tile(len(keys), size)
                keys.append(f"{facts.city}_{len(keys):05d}")
                members = {
                    "rgb.png": codecs.encode_rgb("png", rgb),
                    "agl.tif": codecs.encode_agl("tif", agl_cm),
                    "json": facts.to_json(),
                }
                writer.write({"__key__": keys[-1], **members})
        data = path.read_bytes()
        spans = sample_spans(path)
        assert len(spans) == count
        for offset, end in spans:
            city = CITIES.index(tile(len(rows), size)[2].city)
            rows.append((shard, city, offset, end - offset, zlib.crc32(data[offset:end])))
        digest = hashlib.sha256(data).hexdigest()
        shards.append(manifest.Shard(path.name, split, count, len(data), digest))
    index = np.array(rows, manifest.INDEX_DTYPE)
    manifest.write(folder, manifest.Manifest(shards, CITIES, {}, {}), index)
    return keys


def sample_spans(path: Path) -> list[tuple[int, int]]:
    """Start and end of each sample (its three members) of a tar."""
    with tarfile.open(path) as tar:
        starts = [member.offset for member in tar.getmembers()]
        last = tar.getmembers()[-1]
        end = last.offset_data + -(-last.size // 512) * 512
    firsts = starts[::3]
    return list(zip(firsts, [*firsts[1:], end], strict=True))
