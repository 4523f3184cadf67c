"""Which images of `--source` are scenes, read by window, and which are tiles, read whole.

A scene is a georeferenced TIFF, or one too large for a tile. A folder or a CSV list is one of scenes if all of
its images are; a folder with labels beside them holds tiles. `--scenes always` and `never` settle it.
"""

from __future__ import annotations

from pathlib import Path

from geopose_dist.data import manifest, urls
from geopose_dist.errors import UserError
from geopose_dist.infer import raster
from geopose_dist.infer.recipe import PredictRecipe
from geopose_dist.infer.sources import key_of, listed


def find_scenes(recipe: PredictRecipe) -> list[Path]:
    """The scenes that `--source`, `--scenes` and `--limit` mean, sorted by key; none if tiles are meant (UserError)."""
    if recipe.scenes == "never" or urls.is_url(recipe.source):
        return []
    source = Path(recipe.source)
    images = _images(source)
    if recipe.scenes == "auto" and not (images and all(map(raster.is_scene, images))):
        return []
    strangers = [path for path in images if path.suffix.lower() not in raster.TIFF_SUFFIXES]
    if strangers or not images:
        found = strangers[0].name if strangers else "no TIFF"
        raise UserError(
            f"--source {source}: {found}, where --scenes always wants GeoTIFFs; use --scenes auto"
        )
    by_key: dict[str, Path] = {}
    for path in images:
        if (other := by_key.setdefault(key_of(path), path)) != path:
            raise UserError(
                f"--source {source}: {other.name} and {path.name} are both {key_of(path)}; outputs take their names "
                "from it, so rename one"
            )
    return [by_key[key] for key in sorted(by_key)][: recipe.limit or None]


def _images(source: Path) -> list[Path]:
    """The images that could be scenes."""
    if source.is_dir():
        if (source / manifest.MANIFEST_NAME).is_file() or any(source.glob("*_AGL.*")):
            return []
        tiffs = [
            path
            for path in sorted(source.iterdir())
            if path.suffix.lower() in raster.TIFF_SUFFIXES and not path.name.startswith(".")
        ]
        named = [path for path in tiffs if path.stem.endswith("_RGB")]
        others = [path for path in source.glob("*_RGB.*") if path not in tiffs]
        return [] if others else named or tiffs
    if source.suffix.lower() == ".csv" and source.is_file():
        return [tile.tile.rgb for tile in listed(source) if tile.tile is not None]
    return [source] if source.is_file() else []
