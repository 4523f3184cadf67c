"""`geopose augment`: one sample of a shard before and after augmentation, as a picture.

The draw is the one that a training run with this seed makes for this sample at this visit, and it is
printed, so a suspicious sample can be looked at again. Arrows are the flow by the labels before and after:
they must point from roofs to the foot of their walls in both pictures.
"""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geopose_dist import files
from geopose_dist.augment.recipe import AugmentRecipe
from geopose_dist.data import urls
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.errors import UserError

if TYPE_CHECKING:
    from geopose_dist.data.reader import Reader
    from geopose_dist.data.sample import View


PAGE = 256
"""Keys looked at together: over a network their reads are under way at once."""


@dataclass(frozen=True)
class AugmentPanelRecipe:
    """Which sample, which draw, and where to put the picture."""

    shards: str
    """Folder or URL of shards."""
    out: Path
    """The picture, a PNG file."""
    store: StoreRecipe = field(default_factory=StoreRecipe)
    """How shards behind a URL are reached and kept."""
    key: str | None = None
    """Key of the sample; default: the first of the train split, if there is one."""
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)
    """What may be drawn."""
    crop_px: int | None = None
    """Side of the random crop; null: the whole tile."""
    seed: int = 0
    """Seed of the run."""
    visit: int = 0
    """How many times the run has seen the sample before."""
    crop: int = 0
    """Which of several crops of one visit."""

    def __post_init__(self) -> None:
        if self.visit < 0 or self.crop < 0:
            raise ValueError(f"visit {self.visit} and crop {self.crop} must not be negative")
        if self.crop_px is not None and self.crop_px < 1:
            raise ValueError(f"crop_px is {self.crop_px}; wanted at least 1, or null for the whole tile")


def run(recipe: AugmentPanelRecipe) -> None:
    """Write the picture and print the draw as JSON (UserError if the shards have no such key)."""
    from geopose_dist.augment import apply, draw
    from geopose_dist.data.samples import generator_for

    reader, index = find(recipe.shards, recipe.key, recipe.store)
    view = reader.view(index)
    drawn = draw(
        recipe.augment, generator_for(recipe.seed, recipe.visit, index, recipe.crop), view, recipe.crop_px
    )
    after = apply(view, drawn)
    title = f"{view.key}, seed {recipe.seed}, visit {recipe.visit}, preset {recipe.augment.preset}"
    files.write_bytes(recipe.out, panel(view, after, title))
    print(json.dumps(dataclasses.asdict(drawn)))


def find(shards: str, key: str | None, store: StoreRecipe) -> tuple[Reader, int]:
    """Reader of the split that holds `key`, and its row there; the first sample for None (UserError)."""
    from geopose_dist.data.catalogue import read_manifest
    from geopose_dist.data.reader import Reader, open_shards

    splits = sorted(read_manifest(shards, store).splits(), key=lambda split: split != "train")
    for split in splits:
        reader = Reader(open_shards(shards, split, store))
        if key is None and len(reader):
            return reader, 0
        for first in range(0, len(reader), PAGE):
            keys = reader.keys(range(first, min(first + PAGE, len(reader))))
            if key in keys:
                return reader, first + keys.index(key)
    wanted = f"no sample {key!r} in" if key else "no samples in"
    raise UserError(
        f"{urls.shown(shards)}: {wanted} its splits {', '.join(splits)}; `geopose order --shards` lists keys"
    )


def panel(before: View, after: View, title: str) -> bytes:
    """PNG of both views: image with flow, height in metres, and what the labels say."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    figure.suptitle(title, fontsize=10)
    heights = [view.agl_m for view in (before, after) if view.agl_m is not None]
    grid = figure.subplots(2, 2, squeeze=False)
    top_m = _top(heights)
    for row, (name, view) in enumerate((("before", before), ("after", after))):
        _draw_image(grid[row, 0], view, name)
        _draw_heights(figure, grid[row, 1], view, top_m)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def _top(heights: list[Any]) -> float:
    from geopose_dist.evaluate.pictures import height_limit

    return max((height_limit(agl_m) for agl_m in heights), default=1.0)


def _draw_image(axes: Any, view: View, name: str) -> None:
    import numpy as np

    from geopose_dist.evaluate import pictures
    from geopose_dist.report import figures

    rgb, told = view.rgb, "no labels"
    if view.pose is not None:
        pose = view.pose
        told = f"scale {pose.scale_px_per_m:.3f} px/m, angle {np.degrees(pose.angle_rad):.0f} deg"
        if view.agl_m is not None:
            arrows = [(pose, view.agl_m, pictures.TRUE_COLOUR)]
            rgb, factor = figures.with_arrows(view.rgb, view.agl_m, arrows, side=640)
            told += f"; flow x {factor}"
    gsd = "unknown" if view.gsd_m is None else f"{view.gsd_m:.3f} m"
    rows, columns = view.rgb.shape[:2]
    axes.imshow(rgb, interpolation="nearest", extent=(-0.5, columns - 0.5, rows - 0.5, -0.5))
    axes.set_title(f"{name}: {told}; GSD {gsd}", fontsize=8)
    axes.set_xlabel("column, px", fontsize=8)
    axes.set_ylabel("row, px", fontsize=8)
    axes.tick_params(labelsize=7)


def _draw_heights(figure: Any, axes: Any, view: View, top_m: float) -> None:
    import matplotlib
    import numpy as np

    if view.agl_m is None:
        axes.set_axis_off()
        axes.set_title("no heights", fontsize=8)
        return
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#808080")
    shown = axes.imshow(
        np.ma.masked_invalid(view.agl_m), cmap=colours, vmin=0, vmax=top_m, interpolation="nearest"
    )
    unknown = float(np.isnan(view.agl_m).mean())
    outside = 0.0 if view.inside is None else float((~view.inside).mean())
    axes.set_title(f"{unknown:.1%} unknown (grey), {outside:.1%} outside the tile", fontsize=8)
    axes.set_xlabel("column, px", fontsize=8)
    axes.tick_params(labelsize=7)
    figure.colorbar(shown, ax=axes, label="height above ground, m", shrink=0.9)
