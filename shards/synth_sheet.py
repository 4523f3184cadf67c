"""A contact sheet of a synthetic dataset: `python -m shards.synth_sheet DATASET OUT.png`.

One row per city: three tiles of three places as they are, and the heights of the third (dark is ground, bright
is tall, grey-blue is unknown), each `CELL` pixels wide, reduced by area if the tiles are larger.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

from geopose_dist import files, geometry
from geopose_dist.errors import UserError

CELL = 250
COLUMNS = 3
U8 = npt.NDArray[np.uint8]


def sheet(dataset: Path) -> U8:
    """The sheet of a folder that `geopose synth` wrote, uint8 [H, W, 3]."""
    with (dataset / "places.csv").open(newline="") as file:
        place = {row["id"]: row["place"] for row in csv.DictReader(file)}
    rows = []
    for city in sorted({name[:3] for name in place.values()}):
        one_each = {
            place[path.name[4:10]]: path for path in sorted((dataset / "train").glob(f"{city}_*_RGB.j2k"))
        }
        if len(one_each) < COLUMNS:
            raise UserError(
                f"{dataset} has {len(one_each)} train places of {city}; the sheet wants {COLUMNS}"
            )
        paths = [one_each[name] for name in sorted(one_each)[:COLUMNS]]
        cells = [_cell(imagecodecs.jpeg2k_decode(path.read_bytes())) for path in paths]
        cm = tifffile.imread(paths[-1].with_name(paths[-1].name.replace("RGB.j2k", "AGL.tif")))
        rows.append(np.hstack([*cells, _cell(_heights(cm))]))
    return np.vstack(rows)


def _cell(picture: U8) -> U8:
    size = min(picture.shape[:2])
    square = picture[:size, :size]
    small: U8 = cv2.resize(square, (CELL, CELL), interpolation=cv2.INTER_AREA).astype(np.uint8)
    small[0], small[:, 0] = 255, 255
    return small


def _heights(cm: npt.NDArray[np.uint16]) -> U8:
    known = cm != geometry.NO_DATA_CM
    top = max(float(np.percentile(cm[known], 99.5)), 500.0) if known.any() else 500.0
    grey = np.clip(cm / top, 0, 1) ** 0.6 * 255
    colour = np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)
    colour[~known] = (70, 90, 130)
    return colour


def main(argv: list[str]) -> int:
    """Write the sheet; the arguments are the dataset's folder and the PNG's name."""
    if len(argv) != 2:
        print("usage: python -m shards.synth_sheet DATASET OUT.png", file=sys.stderr)
        return 2
    try:
        picture = sheet(Path(argv[0]))
    except (UserError, FileNotFoundError) as error:
        print(f"synth_sheet: {error}", file=sys.stderr)
        return 2
    # Two bits less per colour: half the bytes, and no eye sees it on a sheet.
    files.write_bytes(Path(argv[1]), bytes(imagecodecs.png_encode((picture & 0xFC) | 0x02, level=9)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
