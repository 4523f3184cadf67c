"""What is to be predicted: a dataset folder, a CSV list, one image, or shards in a folder or an object store.

Everything ends as tiles sorted by key, so the work list does not depend on how a disk lists its files.
Whatever is wrong with a list is told at once, each entry by its line.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

from geopose_dist.data import catalogue, manifest, urls
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.errors import FoundProblems, UserError
from geopose_dist.infer.recipe import PredictRecipe
from geopose_dist.infer.work import TileSource
from shards import images, layouts, layouts_tables

RGB_COLUMNS = ("rgb", "path", "file")
"""Columns of a CSV list that may name the images, the first one that is there."""


@dataclass(frozen=True)
class Source:
    """What is to be predicted: tiles sorted by key, and how they are read.

    Attributes:
        tiles: the tiles.
        shards: folder or URL of shards, empty for files.
        split: split of the shards.
        reduced_by: how far the tiles were reduced already.
        store: how shards behind a URL are reached.
    """

    tiles: list[TileSource]
    shards: str = ""
    split: str = ""
    reduced_by: int = 1
    store: StoreRecipe = field(default_factory=StoreRecipe)


def find_source(recipe: PredictRecipe) -> Source:
    """The tiles that `--source`, `--split` and `--limit` mean (UserError)."""
    path, split = Path(recipe.source), recipe.split
    if urls.is_url(recipe.source) or (path / manifest.MANIFEST_NAME).is_file():
        source = _of_shards(recipe)
    elif path.is_file():
        source = Source(listed(path) if path.suffix.lower() == ".csv" else [_single(path)])
    else:
        found = layouts.read_layout(path)
        chosen = [tile for tile in found if tile.split == (split or "test")]
        if split == "all" or (not split and not chosen):
            chosen = found
        if not chosen:
            raise UserError(
                f"--source {path}: none of {len(found)} tiles is of split {split!r}; try --split all"
            )
        source = Source([TileSource(tile.key, tile) for tile in chosen])
    ordered = sorted(source.tiles, key=lambda tile: tile.key)
    return Source(
        ordered[: recipe.limit or None], source.shards, source.split, source.reduced_by, source.store
    )


def _of_shards(recipe: PredictRecipe) -> Source:
    facts = catalogue.read_manifest(recipe.source, recipe.store)
    split = recipe.split or "test"
    if not recipe.split and "test" not in facts.splits():
        raise UserError(
            f"--source {urls.shown(recipe.source)}: no split test in these shards; name one by --split: "
            f"{', '.join(facts.splits())}"
        )
    reader = Reader(open_shards(recipe.source, split, recipe.store))
    count = min(len(reader), 256)  # their headers are read together where that saves time
    keys = [
        key
        for i in range(0, len(reader), count)
        for key in reader.keys(range(i, min(i + count, len(reader))))
    ]
    tiles = [TileSource(key, index=i) for i, key in enumerate(keys)]
    place = recipe.source if urls.is_url(recipe.source) else str(Path(recipe.source).resolve())
    return Source(tiles, place, split, int(facts.recipe.get("reduce", 1)), recipe.store)


def _single(path: Path) -> TileSource:
    if path.suffix[1:].lower() not in images.RGB_EXTENSIONS:
        raise UserError(
            f"--source {path}: not an image by its name; wanted one of .{', .'.join(images.RGB_EXTENSIONS)}, a "
            "CSV list, a dataset folder, or a folder of shards"
        )
    key = key_of(path)
    return TileSource(key, layouts.Tile(key, key.split("_")[0], path))


def key_of(path: Path) -> str:
    """Name of the tile in an image file."""
    return path.name[: -len(path.suffix)].removesuffix("_RGB")


def listed(path: Path) -> list[TileSource]:
    """Tiles of a CSV list: a column with file names relative to it, and if known one with GSDs."""
    problems: list[str] = []
    tables = layouts_tables.read(path.parent, [])
    found: dict[str, TileSource] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            column = next((name for name in RGB_COLUMNS if name in names), None)
            if column is None:
                raise UserError(
                    f"--source {path}: columns {', '.join(names) or 'none'}; wanted one named "
                    f"{' or '.join(RGB_COLUMNS)} with the images' file names"
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                image = _image(path.parent, (row[column] or "").strip())
                key = key_of(image)
                gsd_m = _gsd_m(row.get("gsd"), tables.gsd_m(key))
                if not image.is_file():
                    problems.append(f"{where}: no file {image}; mend the list, or put the image there")
                elif image.suffix[1:].lower() not in images.RGB_EXTENSIONS:
                    problems.append(f"{where}: {image.name} is no image by its name; remove the line")
                elif key in found:
                    problems.append(f"{where}: a second tile named {key}; outputs take their names from it")
                elif gsd_m is not None and not (math.isfinite(gsd_m) and gsd_m > 0):
                    problems.append(f"{where}: gsd is {row['gsd']!r}; wanted metres above 0, or nothing")
                else:
                    tile = layouts.Tile(key, key.partition("_")[0], image, gsd_m=gsd_m)
                    found[key] = TileSource(key, tile)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"--source {path}: not a table of comma-separated UTF-8 text ({error}); mend the file"
        ) from error
    if problems:
        raise FoundProblems(f"--source {path}: {len(problems)} lines cannot be predicted:", problems)
    if not found:
        raise UserError(f"--source {path}: lists no image; wanted one file name per line")
    return list(found.values())


def _image(folder: Path, name: str) -> Path:
    """The file that a list beside or above the folders of images names."""
    places = [folder, *(folder / sub for sub in layouts_tables.FOLDERS)]
    return next((place / name for place in places if (place / name).is_file()), folder / name)


def _gsd_m(text: str | None, known: float | None) -> float | None:
    if text is None or not text.strip():
        return known
    try:
        return float(text)
    except ValueError:
        return math.nan
