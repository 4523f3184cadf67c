"""Tiny datasets in the challenge's layout for tests: quick to write, cheap to read, different in every tile.

    make_dataset(folder, count=8)             tiles of 64 px, cities in turn, places of `views` tiles
    make_dataset(folder, 4, test=2, codec="png")

Every tile has ground, one flat roof, a facade ramp, a few unknown pixels, and its own colours.
"""

from __future__ import annotations

import json
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile

CITIES = ("ARG", "ATL", "JAX", "OMA")


def make_tile(number: int, size: int | tuple[int, int] = 64) -> tuple[np.ndarray, np.ndarray, float, float]:
    """RGB uint8 [H, W, 3], AGL uint16 cm [H, W], scale px/cm and angle of the tile of this number."""
    rows, columns = (size, size) if isinstance(size, int) else size
    rng = np.random.Generator(np.random.Philox(key=[number, 64]))
    agl = np.zeros((rows, columns), np.uint16)
    top, left = rng.integers(2, rows // 3), rng.integers(2, columns // 3)
    height = int(rng.integers(300, 3000))
    bottom, right = top + rows // 3, left + columns // 3
    agl[top:bottom, left:right] = height
    for step in range(4):  # the facade, below the roof
        agl[bottom + step, left:right] = height * (4 - step) // 5
    shade = rng.integers(30, 220, 3)
    rgb = np.broadcast_to(shade, (rows, columns, 3)).copy()
    rgb[agl > 0] = rng.integers(30, 220, 3)
    rgb += rng.integers(-8, 9, rgb.shape)
    agl[rng.random(agl.shape) < 0.02] = 65535
    return rgb.astype(np.uint8), agl, float(rng.uniform(0.004, 0.015)), float(rng.uniform(0, 2 * np.pi))


def write_rgb(path: Path, rgb: np.ndarray) -> None:
    """Write an image losslessly in the format of its extension."""
    if path.suffix == ".tif":
        tifffile.imwrite(path, rgb, compression="lzw")
    elif path.suffix == ".png":
        path.write_bytes(imagecodecs.png_encode(rgb, level=1))
    else:
        path.write_bytes(imagecodecs.jpeg2k_encode(rgb, reversible=True))


def write_tile(
    folder: Path,
    key: str,
    number: int,
    *,
    size: int | tuple[int, int] = 64,
    codec: str = "j2k",
    labelled: bool = True,
) -> None:
    """Write KEY_RGB, and KEY_AGL and KEY_VFLOW if `labelled`, in centimetres."""
    rgb, agl, scale, angle = make_tile(number, size)
    folder.mkdir(parents=True, exist_ok=True)
    write_rgb(folder / f"{key}_RGB.{codec}", rgb)
    if labelled:
        tifffile.imwrite(folder / f"{key}_AGL.tif", agl, compression="lzw")
        (folder / f"{key}_VFLOW.json").write_text(json.dumps({"scale": scale, "angle": angle}))


def name_of(number: int) -> str:
    """Six letters, as the challenge names its tiles."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "".join(letters[(number // 26**k * 7 + k) % 26] for k in range(6))


def make_dataset(
    folder: Path,
    count: int = 8,
    size: int | tuple[int, int] = 64,
    *,
    test: int = 0,
    views: int = 2,
    cities: tuple[str, ...] = CITIES,
    codec: str = "j2k",
    gsd_m: float | None = 0.4,
) -> list[str]:
    """Write `count` labelled and `test` unlabelled tiles with the challenge's lists; the keys, in order.

    Places are `views` consecutive tiles of one city; `gsd_m` None leaves metadata.csv out.
    """
    keys, train, tests, metadata, places = [], ["id,agl,json,rgb"], ["id,rgb"], ["id,city,gsd"], ["id,place"]
    for number in range(count + test):
        place = number // views
        city = cities[place % len(cities)]
        name, key = name_of(number), f"{city}_{name_of(number)}"
        labelled = number < count
        write_tile(
            folder / ("train" if labelled else "test_rgbs"),
            key,
            number,
            size=size,
            codec=codec,
            labelled=labelled,
        )
        if labelled:
            train.append(f"{name},{key}_AGL.tif,{key}_VFLOW.json,{key}_RGB.{codec}")
        else:
            tests.append(f"{name},{key}_RGB.{codec}")
        metadata.append(f"{name},{city},{gsd_m}")
        places.append(f"{name},{city}-{place:03d}")
        keys.append(key)
    tables = {"geopose_train.csv": train, "places.csv": places}
    tables |= {"geopose_test.csv": tests} if test else {}
    tables |= {"metadata.csv": metadata} if gsd_m is not None else {}
    for table, lines in tables.items():
        (folder / table).write_text("\n".join(lines) + "\n")
    return keys
