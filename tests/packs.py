"""Packing in tests: a short call, the hashes of what it left, and five ways to damage a data set."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import tifffile

from shards import pack
from shards.pack import PackRecipe


def run_pack(source: Path, out: Path | str, **options) -> None:
    options = {"workers": 1, "shard_samples": 3} | options
    pack.run(PackRecipe(source=str(source), out=str(out), **options))


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def spoil(dataset: Path) -> dict[str, str]:
    """Damage five tiles, each in its own way; what is said of each key."""
    keys = sorted(path.name.removesuffix("_RGB.j2k") for path in (dataset / "train").glob("*_RGB.j2k"))
    folder = dataset / "train"
    image = folder / f"{keys[0]}_RGB.j2k"
    image.write_bytes(image.read_bytes()[:-300])
    heights = folder / f"{keys[1]}_AGL.tif"
    heights.write_bytes(heights.read_bytes()[: heights.stat().st_size // 2])
    (folder / f"{keys[2]}_VFLOW.json").write_text('{"scale": 0.8, "angle": 1}')
    tifffile.imwrite(folder / f"{keys[3]}_AGL.tif", np.zeros((64, 62), np.uint16))
    tifffile.imwrite(folder / f"{keys[4]}_AGL.tif", np.zeros((64, 64), np.float32))
    said = [
        "_RGB.j2k: damaged or cut short",
        "_AGL.tif: damaged",
        "_VFLOW.json: scale is 0.8, which looks like px/m",
        "_AGL.tif: 64 x 62 pixels, but its image",
        "_AGL.tif: heights are float32",
    ]
    return dict(zip(keys, said, strict=False))


def children(pid: int) -> list[int]:
    """Processes under `pid`, at any depth."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, unseen = [], [pid]
    while unseen:
        below = parents.get(unseen.pop(), [])
        found += below
        unseen += below
    return found


def command_line(pid: int) -> bytes:
    """Words of a process; empty if it has ended."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes()
    except OSError:
        return b""
