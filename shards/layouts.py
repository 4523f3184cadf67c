"""Datasets as they come: the challenge's layout, the US3D release, plain folders of `CITY_ID_RGB.*`.

`scan` lists the tiles and everything that is wrong, by file, without decoding a pixel; `read_layout` is the
same for callers that want a sound dataset or an error with the whole list. A tile is its files and what
other files say of it (GSD, place); `load_rgb`, `load_agl_m` and `load_pose` give the program's units.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from geopose_dist import geometry
from geopose_dist.errors import FoundProblems, UserError
from geopose_dist.geometry import F32
from shards import images, layouts_tables
from shards.archives import unpacked
from shards.layouts_tables import Problem

U8 = npt.NDArray[np.uint8]

_FILE = re.compile(r"(?P<key>.+)_(?P<kind>RGB|AGL|VFLOW)\.(?P<extension>\w+)")
_KEY = re.compile(r"[A-Za-z0-9_+=@-]{1,80}")
_SPLITS = {"train": "train", "train_nano": "train", "test_rgbs": "test", "val": None, "test": "test"}
"""Folders of a dataset, and the split that each suggests."""
_EXTENSIONS = {"RGB": images.RGB_EXTENSIONS, "AGL": images.TIFF, "VFLOW": ("json",)}


@dataclass(frozen=True)
class Tile:
    """One tile of a dataset, as files.

    Attributes:
        key: file name up to `_RGB`, such as JAX_abcdef.
        city: text before the first underscore.
        rgb: image file.
        agl: heights, if known.
        vflow: scale and angle, if known.
        gsd_m: ground metres per pixel, if known.
        place: name of the ground that several views share, if known.
        split: train or test where the layout says so.
        unit: "cm" (uint16 heights, px/cm) or "m" (float heights, px/m); empty: not looked at yet.
    """

    key: str
    city: str
    rgb: Path
    agl: Path | None = None
    vflow: Path | None = None
    gsd_m: float | None = None
    place: str | None = None
    split: str | None = None
    unit: str = "cm"


@dataclass(frozen=True)
class Layout:
    """What a look at a dataset found: tiles sorted by key, and problems, each with the key that it spoils."""

    tiles: list[Tile]
    problems: list[Problem]


def read_layout(source: Path) -> list[Tile]:
    """The tiles of a dataset, sorted by key; FoundProblems lists everything that is wrong with it."""
    layout = scan(source)
    if layout.problems:
        sentences = [problem.sentence for problem in layout.problems]
        raise FoundProblems(f"{source}: {len(sentences)} problems in this dataset:", sentences)
    return layout.tiles


def scan(source: Path, *, labels: bool = True) -> Layout:
    """Look at a dataset without decoding images (UserError if there is nothing to look at).

    Without `labels` no label file is opened: units of a plain folder stay empty, and what is wrong with a
    label is told by `load_labels`.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError(
            f"{source}: no such folder; wanted a dataset (a folder of CITY_ID_RGB.* or the challenge's)"
        )
    problems: list[Problem] = []
    tables = layouts_tables.read(source, problems)
    found: dict[str, Tile] = {}
    folders = _folders(source)
    for folder, split in folders:
        for tile in _tiles_of(folder, split, problems):
            if tile.key in found:
                first = found[tile.key].rgb
                problems.append(
                    Problem(f"{tile.rgb}: two files for one id; the other is {first}; remove one", tile.key)
                )
            else:
                found[tile.key] = tile
    if not found and not problems:
        names = sorted(path.name for path in source.iterdir())[:5]
        raise UserError(
            f"{source}: no images; wanted files named CITY_ID_RGB.{'|'.join(images.RGB_EXTENSIONS)}, or "
            f"the challenge's folders or archives; found: {', '.join(names) or 'nothing'}"
        )
    layouts_tables.check_rows(tables, {folder.name: folder for folder, _ in folders}, problems)
    tiles = [
        replace(tile, gsd_m=tables.gsd_m(key), place=tables.place(key)) for key, tile in sorted(found.items())
    ]
    if not labels:
        unit = "cm" if tables.is_challenge else ""
        return Layout([replace(tile, unit=unit) for tile in tiles], problems)
    if not tables.is_challenge:
        tiles = _judge_units(tiles, problems)
    for tile in tiles:
        problems += _label_problems(tile)
    return Layout(tiles, problems)


def _folders(source: Path) -> list[tuple[Path, str | None]]:
    """Folders of tiles and the splits that they suggest; archives are unpacked."""
    if any(_FILE.fullmatch(path.name) for path in source.iterdir()):
        return [(source, _SPLITS["test_rgbs"] if source.name == "test_rgbs" else None)]
    found: list[tuple[Path, str | None]] = []
    for name, split in _SPLITS.items():
        archive = source / f"{name}.tar.gz"
        if name == "train_nano" and any(folder.name == "train" for folder, _ in found):
            continue  # the hundred tiles of train_nano are tiles of train
        if (source / name).is_dir():
            found.append((source / name, split))
        elif archive.is_file():
            found.append((unpacked(archive), split))
    return found


def _tiles_of(folder: Path, split: str | None, problems: list[Problem]) -> list[Tile]:
    """The tiles of one folder; what is wrong with the names goes to `problems`."""
    files: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _FILE.fullmatch(path.name)
        if (
            match is None
            or path.name.startswith(".")
            or path.suffix[1:].lower() not in _EXTENSIONS[match["kind"]]
        ):
            continue
        of_key = files.setdefault(match["key"], {})
        if match["kind"] in of_key:
            other = of_key[match["kind"]].name
            problems.append(
                Problem(f"{path}: two files for one id; the other is {other}; remove one", match["key"])
            )
        of_key.setdefault(match["kind"], path)
    tiles = []
    for key, of_key in files.items():
        if "RGB" not in of_key:
            label = next(iter(of_key.values()))
            problems.append(
                Problem(
                    f"{label}: a label without its image; wanted {key}_RGB.* beside it; add it or remove it",
                    key,
                )
            )
        elif not _KEY.fullmatch(key):
            problems.append(
                Problem(
                    f"{of_key['RGB']}: the name {key!r} cannot be a key of a shard; wanted at most 80 "
                    "letters, digits, _, -, +, = or @, and no dots; rename the tile's files",
                    key,
                )
            )
        else:
            tiles.append(
                Tile(
                    key, key.split("_")[0], of_key["RGB"], of_key.get("AGL"), of_key.get("VFLOW"), split=split
                )
            )
    return tiles


def _judge_units(tiles: list[Tile], problems: list[Problem]) -> list[Tile]:
    """Units where no list of the challenge says: centimetres where AGL is uint16, metres where float."""
    units: dict[str, str] = {}
    for tile in tiles:
        if tile.agl is None:
            continue
        kind = images.tiff_kind(tile.agl)
        if kind is None:
            problems.append(
                Problem(
                    f"{tile.agl}: damaged or cut short: no TIFF header; fetch it again or remove it", tile.key
                )
            )
        else:
            units[tile.key] = "cm" if kind[1].kind == "u" else "m"
    common = set(units.values())
    judged = []
    for tile in tiles:
        unit = units.get(tile.key) or (common.copy().pop() if len(common) == 1 else _unit_by_label(tile))
        judged.append(replace(tile, unit=unit))
    return judged


def _unit_by_label(tile: Tile) -> str:
    """Without heights to judge by, a scale above the bound between px/cm and px/m is px/m."""
    try:
        scale = read_label(tile.vflow)[0] if tile.vflow else math.nan
    except UserError:
        return "cm"  # named when the labels are checked
    return _unit_of_scale(scale)


def _unit_of_scale(scale: float) -> str:
    return "m" if scale > geometry.SCALE_SUSPECT_PX_PER_CM else "cm"


def _label_problems(tile: Tile) -> list[Problem]:
    if tile.vflow is None:
        return []
    try:
        scale, angle = read_label(tile.vflow)
    except UserError as error:
        return [Problem(str(error), tile.key)]
    sentences = geometry.check_label(scale, angle, f"px/{tile.unit}", str(tile.vflow))
    return [Problem(sentence, tile.key) for sentence in sentences]


def read_label(path: Path) -> tuple[float, float]:
    """Scale and angle of a VFLOW file as written, unchecked (UserError if it is no such file)."""
    try:
        facts = json.loads(path.read_bytes())
        scale, angle = facts["scale"], facts["angle"]
        if isinstance(scale, str | bool) or isinstance(angle, str | bool):
            raise TypeError(f"scale {scale!r} and angle {angle!r} are not numbers")
        return float(scale), float(angle)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend or remove the file") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f'{path}: damaged or cut short ({why}); wanted JSON as in {{"scale": 0.01, "angle": 1.5}}; mend '
            "or remove the file"
        ) from error


def load_rgb(tile: Tile) -> U8:
    """uint8 [H, W, 3] (UserError)."""
    return images.read_rgb(tile.rgb)


def load_agl_m(tile: Tile) -> F32 | None:
    """Heights in metres [H, W], NaN = unknown; None without a file (UserError)."""
    return None if tile.agl is None else images.read_agl_m(tile.agl, tile.unit)


def load_pose(tile: Tile) -> tuple[float, float] | None:
    """Scale (px/m) and angle (radians in [0, 2 pi)) at full size; None without a file (UserError)."""
    return None if tile.vflow is None else _pose(tile.vflow, tile.unit)


def load_labels(tile: Tile) -> tuple[F32 | None, tuple[float, float] | None]:
    """Heights and pose as above, each file opened once; an empty unit is judged by them (UserError)."""
    agl_m, unit = (None, tile.unit) if tile.agl is None else images.read_heights(tile.agl, tile.unit)
    return agl_m, None if tile.vflow is None else _pose(tile.vflow, unit)


def _pose(vflow: Path, unit: str) -> tuple[float, float]:
    scale, angle = read_label(vflow)
    unit = unit or _unit_of_scale(scale)
    wrong = geometry.check_label(scale, angle, f"px/{unit}", str(vflow))
    if wrong:
        raise UserError(wrong[0])
    return geometry.px_per_m(scale) if unit == "cm" else scale, geometry.wrap_angle(angle)
