"""`geopose view`: one tile as a textured height mesh without its lean, to turn in a browser; one HTML file.

The mesh comes from `report/mesh.py`, is drawn by `view.js` with three.js (both stand in the page), and shows the
tile's labels, a prediction, or both side by side under one camera. Below it are the same pictures as in a
report, so a browser without WebGL shows something, too.
"""

from __future__ import annotations

import base64
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from geopose_dist.data.sample import U8
from geopose_dist.errors import UserError
from geopose_dist.evaluate.pictures import ERROR_MAP, HEIGHT_MAP, height_limit, reduced
from geopose_dist.evaluate.predictions import list_folder
from geopose_dist.evaluate.rectify import read_pose
from geopose_dist.geometry import F32, Pose, agl_cm_from_m, direction, zenith_from_scale
from geopose_dist.report import figures, mesh, page, panels
from geopose_dist.report.panels import Surface
from shards import layouts

TEXTURE_PX = 1024
"""Longer side of the picture on the mesh."""
GUESSED_GSD_M = 0.4
"""Ground metres per pixel where nothing tells them; the page says so."""
COLOURS = 64
"""Steps of the colours of heights and errors."""


@dataclass(frozen=True)
class ViewRecipe:
    """Which tile to show in three dimensions."""

    source: Path
    """Dataset with the tile's image, and its labels if no other truth is named."""
    key: str
    """Key of the tile, such as JAX_abcdef."""
    out: Path
    """The page, one HTML file."""
    predictions: Path | None = None
    """Folder of `geopose predict --out`: its tile stands beside the truth, or alone where there is none."""
    truth: Path | None = None
    """Folder of true KEY_AGL.tif and KEY_VFLOW.json; unset: the labels of the source, if it has any."""
    side: int = mesh.SIDE
    """Vertices of the mesh along the tile's longer side, at most."""
    gsd_m: float | None = None
    """Ground metres per pixel; unset: as the dataset says."""

    def __post_init__(self) -> None:
        if not 2 <= self.side <= 1024:
            raise ValueError(f"side is {self.side}; wanted 2 to 1024 vertices, or browsers run out of memory")
        if self.gsd_m is not None and not (math.isfinite(self.gsd_m) and self.gsd_m > 0):
            raise ValueError(f"gsd_m is {self.gsd_m}; wanted metres above 0")


def run(recipe: ViewRecipe) -> None:
    """Write the page (UserError if there is no such tile, or nothing that knows its heights)."""
    tile = _tile(recipe.source, recipe.key)
    gsd_m = recipe.gsd_m or tile.gsd_m
    surfaces = _surfaces(recipe, tile)
    rgb = layouts.load_rgb(tile)
    for name, surface in surfaces.items():
        if surface.agl_m.shape != rgb.shape[:2]:
            raise UserError(
                f"{tile.rgb}: {rgb.shape[:2]} pixels, its {name} has {surface.agl_m.shape}; they belong to "
                "different tiles; predict again, or name the right folders"
            )
    parts = [
        page.paragraph(_told(tile.key, surfaces, gsd_m)),
        *_stage(surfaces, rgb, gsd_m, recipe.side),
        page.heading("Pictures"),
        _pictures(rgb, surfaces),
    ]
    page.write(recipe.out, f"Tile {recipe.key}", parts, scripts=("three.min.js", "view.js"))
    print(recipe.out)


def _tile(source: Path, key: str) -> layouts.Tile:
    tiles = {tile.key: tile for tile in layouts.scan(source, labels=False).tiles}
    if key not in tiles:
        near = difflib.get_close_matches(key, tiles, n=3, cutoff=0.4) or list(tiles)[:3]
        raise UserError(
            f"--key {key}: no such tile among the {len(tiles)} of {source}; there are, for example: {', '.join(near)}"
        )
    return tiles[key]


def _surfaces(recipe: ViewRecipe, tile: layouts.Tile) -> dict[str, Surface]:
    """Truth and prediction of the tile, as far as they are asked for and known."""
    found: dict[str, Surface] = {}
    if recipe.truth is not None:
        found["truth"] = _from_folder(recipe.truth, "--truth", tile.key)
    elif tile.agl and tile.vflow:
        agl_m, pose = layouts.load_labels(tile)
        assert agl_m is not None
        assert pose is not None
        found["truth"] = Surface(agl_m, Pose(pose[1], pose[0]))
    if recipe.predictions is not None:
        found["prediction"] = _from_folder(recipe.predictions, "--predictions", tile.key)
    if not found:
        raise UserError(
            f"{tile.rgb}: no heights and scale beside it; give --predictions, or --truth with {tile.key}_AGL.tif "
            "and _VFLOW.json"
        )
    return found


def _from_folder(folder: Path, option: str, key: str) -> Surface:
    files = list_folder(folder, option).tiles.get(key)
    if files is None or files.agl is None or files.vflow is None:
        raise UserError(f"{option} {folder}: no {key}_AGL.tif with {key}_VFLOW.json; is it the right folder?")
    agl_m, scale_px_per_m, angle_rad = read_pose(files.agl, files.vflow)
    return Surface(agl_m, Pose(angle_rad, scale_px_per_m))


def _told(key: str, surfaces: dict[str, Surface], gsd_m: float | None) -> str:
    """One sentence for each surface, with what is known of the camera."""
    said = []
    for name, surface in surfaces.items():
        pose = surface.pose
        words = f"{name}: scale {pose.scale_px_per_m:.3f} px/m, angle {math.degrees(pose.angle_rad):.0f} deg"
        if gsd_m:
            elevation = 90 - math.degrees(zenith_from_scale(pose.scale_px_per_m, gsd_m))
            words += f", so a camera {elevation:.0f} deg above the horizon"
        unknown = float(np.isnan(surface.agl_m).mean())
        words += f"; {unknown:.1%} of the heights unknown" if unknown >= 0.0005 else ""
        said.append(words)
    ground = f"GSD {gsd_m:.3f} m" if gsd_m else f"GSD unknown, drawn as {GUESSED_GSD_M} m"
    return f"{key}, {ground}. {'. '.join(words[0].upper() + words[1:] for words in said)}."


def _pictures(rgb: U8, surfaces: dict[str, Surface]) -> str:
    if len(surfaces) == 2:
        return panels.compared(rgb, surfaces["truth"], surfaces["prediction"]).html()
    (surface,) = surfaces.values()
    return panels.labelled(rgb, surface).html()


def _stage(surfaces: dict[str, Surface], rgb: U8, gsd_m: float | None, side: int) -> list[str]:
    """The place where the mesh is drawn, its buttons, its legend, and what is drawn as data of the page."""
    facts = scene(surfaces, rgb, gsd_m or GUESSED_GSD_M, side)
    kinds = ["image", "height", *(["error"] if len(surfaces) == 2 else [])]
    buttons = "".join(
        f'<label><input type="radio" name="paint" value="{kind}"{" checked" if kind == "image" else ""}>{kind}</label>'
        for kind in kinds
    )
    names = "".join(f"<span>{page.text(name)}</span>" for name in surfaces)
    bars = figures.scale_bar(HEIGHT_MAP, "height 0 m", f"{facts['top_m']:.0f} m")
    if len(surfaces) == 2:
        most = facts["error_m"]
        bars += figures.scale_bar(ERROR_MAP, f"error -{most:.0f} m", f"+{most:.0f} m")
    return [
        f'<div id="view"><div class="names">{names}</div><p id="fallback">The 3D view needs a browser with WebGL 2 and '
        "scripts. The pictures below show the same tile.</p></div>",
        f'<div class="tools" hidden><fieldset><legend>colours</legend>{buttons}</fieldset>'
        '<button type="button" value="reset">camera\'s side</button><button type="button" value="above">from above'
        "</button></div>",
        bars,
        page.note(
            "Turn by dragging, or with the arrow keys; zoom by wheel or two fingers; shift, the right button or two "
            "fingers move. Every pixel of the image is moved to its ground position and raised by its height above "
            "ground, in true proportion, so relief of the ground itself is not shown. Walls that the camera did not "
            "see are drawn straight down from the edge above, in its colour but darker (grey beside colours of "
            "height). Plain ground was hidden, or its height is unknown; specks of a pixel or two are closed. What "
            "stands outside the tile's ground is left out."
            + (" Errors are predicted less true heights, pixel by pixel." if len(surfaces) == 2 else "")
        ),
        page.note("Drawn by three.js, MIT licence (its text stands in this page's source)."),
        page.data("scene", facts),
    ]


def scene(surfaces: dict[str, Surface], rgb: U8, gsd_m: float, side: int) -> dict[str, Any]:
    """What `view.js` draws; binary arrays are little-endian in base64.

    `rows` and `columns` are image positions of the grid; a surface has `agl` (uint16 cm, 65535 unknown), `kept`
    (two bits a cell, low bits first), `walls` (uint32 pairs of vertices), `shift` (ground pixels x, y per
    metre of height).
    """
    built = {name: mesh.build(surface.agl_m, surface.pose, side) for name, surface in surfaces.items()}
    first = next(iter(built.values()))
    top_m = max(height_limit(surface.agl_m) for surface in surfaces.values())
    facts: dict[str, Any] = {
        "size": list(rgb.shape[:2]),
        "gsd_m": gsd_m,
        "rows": first.rows.tolist(),
        "columns": first.columns.tolist(),
        "top_m": top_m,
        "texture": figures.data_uri(reduced(rgb, TEXTURE_PX), TEXTURE_PX),
        "maps": {"height": _colours(HEIGHT_MAP), "error": _colours(ERROR_MAP)},
        "surfaces": [_packed(name, built[name], surface.pose) for name, surface in surfaces.items()],
    }
    if len(surfaces) == 2:
        truth, predicted = (built[name].agl_m for name in ("truth", "prediction"))
        facts["error_m"] = height_limit(np.abs(predicted - truth), least_m=2.0)
    return facts


def _packed(name: str, built: mesh.Mesh, pose: Pose) -> dict[str, Any]:
    x, y = direction(pose.angle_rad)
    cm, _ = agl_cm_from_m(built.agl_m, unknown_allowed=True)
    return {
        "name": name,
        "shift": [pose.scale_px_per_m * x, pose.scale_px_per_m * y],
        "agl": _base64(cm.astype("<u2")),
        "kept": _base64(np.packbits(built.kept.ravel(), bitorder="little")),
        "walls": _base64(built.walls.astype("<u4")),
    }


def _base64(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _colours(map_name: str) -> Sequence[Sequence[int]]:
    import matplotlib

    stops: F32 = np.linspace(0, 1, COLOURS, dtype=np.float32)
    colours: Sequence[Sequence[int]] = matplotlib.colormaps[map_name](stops, bytes=True)[:, :3].tolist()
    return colours
