"""Case `similarity`: does `split --by similarity` find the views of one place, and what does it cost?

Tiles of known places (`data.tiles`, else rendered here) are grouped by their looks alone: as they are; in windows of
three quarters of a side, each moved, hazed, blurred and clouded; and, from real orthophotos (`data.pictures`), as views
leant by their lidar heights, squeezed, turned, moved and hazed (their shadows stay, which real views' do not).
Precision and recall are of pairs of tiles in one group. Seconds are of one core, for tiles of 2048 px.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from geopose_dist.augment import raise_heights
from geopose_dist.bench.harness import BenchRecipe, Row
from geopose_dist.errors import UserError
from geopose_dist.geometry import F32
from shards import images, layouts, similarity
from shards.layouts import Tile
from shards.similarity_recipe import SimilarityRecipe

U8 = npt.NDArray[np.uint8]

EPOCH_TILES = 6000
WINDOW = 0.75
"""Side of a harsh view's window over the tile's: two windows share 44 % of their ground or more."""
FULL_SIZE = 4
"""How often a tile of full size is timed."""
PICTURE_VIEWS = 5
PICTURE_PX = 400
"""Small orthophotos are enlarged to this side before views are made."""
MOST_BLACK = 0.5
"""Parts of pictures with a larger share of black (no picture there) are left out."""


def similarity_case(recipe: BenchRecipe) -> list[Row]:
    """A row per set of tiles (UserError: tiles without places)."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tiles = [
            tile
            for tile in layouts.read_layout(Path(recipe.data.tiles) if recipe.data.tiles else render(work))
            if tile.place
        ]
        if not tiles:
            raise UserError(
                f"{recipe.data.tiles}: the place of no tile is known; wanted places.csv (id,place)"
            )
        rows.append(measured("as rendered", tiles, work))
        rows.append(measured("harsh windows", list(harsh_views(tiles, work / "harsh")), work))
        if recipe.data.pictures:
            views = list(picture_views(Path(recipe.data.pictures), work / "pictures"))
            rows.append(measured("real orthophotos", views, work))
    first = rows[0]
    rows[0]["verdict"] = (
        f"{EPOCH_TILES} tiles take about {first['minutes_6000']:.0f} minutes of one core; of pairs of one place "
        + ", ".join(f"{row['recall']:.1%} are found {row['tiles_are']}" for row in rows)
    )
    return rows


def render(work: Path) -> Path:
    """A small synthetic data set."""
    from shards import synth

    synth.run(synth.SynthRecipe(out=work / "tiles", places=12, views=4, size=768, test_places=0))
    return work / "tiles"


def measured(name: str, tiles: Sequence[Tile], work: Path) -> Row:
    """Group tiles and compare with their places."""
    recipe = SimilarityRecipe(workers=1)
    scratch = work / f"features {name}"
    scratch.mkdir()
    whole = full_size(tiles, work)
    paths = [scratch / f"{number}.npz" for number in range(FULL_SIZE)]
    began = time.process_time()
    for path in paths:
        similarity.make_features(similarity.FeatureJob(whole, path, recipe.keypoints, False))
    feature_s = (time.process_time() - began) / len(paths)
    found = similarity.find_places(tiles, scratch, recipe)
    # Features of full size have as many numbers; strangers and views of one place are both among these.
    kept = sorted(path for path in scratch.glob("*_*.npz") if ".mirror" not in path.name)[:12]
    pairs = tuple((one, other) for one in kept for other in kept if one != other)
    began = time.process_time()
    similarity.match_job(similarity.MatchJob(pairs))
    pair_s = (time.process_time() - began) / len(pairs)
    seconds = EPOCH_TILES * (feature_s + recipe.candidates * pair_s)
    return {
        "tiles_are": name,
        "tiles": len(tiles),
        "places": len({tile.place for tile in tiles}),
        "groups": len(set(found.groups.values())),
        **pair_scores({tile.key: str(tile.place) for tile in tiles}, found.groups),
        "threshold": found.threshold,
        "most_by_chance": max(found.chance, default=0),
        "feature_ms": 1000 * feature_s,
        "pair_ms": 1000 * pair_s,
        "minutes_6000": seconds / 60,
    }


def full_size(tiles: Sequence[Tile], work: Path) -> Tile:
    """A JPEG 2000 tile of the challenge's size, pieced together from these, to time."""
    from shards.synth_tiles import encode_j2k

    path = work / "ALL_whole_RGB.j2k"
    pieces = [layouts.load_rgb(tile)[:512, :512] for tile in tiles[:16]]
    whole = np.zeros((2048, 2048, 3), np.uint8)
    for number in range(16):
        piece = pieces[number % len(pieces)]
        row, column = number // 4 * 512, number % 4 * 512
        whole[row : row + piece.shape[0], column : column + piece.shape[1]] = piece
    path.write_bytes(encode_j2k(whole))
    return Tile("ALL_whole", "ALL", path)


def pair_scores(place_of: dict[str, str], group_of: dict[str, str]) -> Row:
    """Precision and recall of pairs of tiles said to show one place."""
    both = true = said = 0
    keys = sorted(place_of)
    for number, one in enumerate(keys):
        for other in keys[:number]:
            same, joined = place_of[one] == place_of[other], group_of[one] == group_of[other]
            true, said, both = true + same, said + joined, both + (same and joined)
    return {"pairs": true, "precision": both / max(1, said), "recall": both / max(1, true)}


def harsh_views(tiles: Sequence[Tile], folder: Path) -> Iterator[Tile]:
    """A window of each tile, moved at random, under haze, blur, noise and a bank of cloud."""
    folder.mkdir()
    for number, tile in enumerate(tiles):
        rng = np.random.Generator(np.random.Philox(key=[number, 2]))
        rgb = layouts.load_rgb(tile)
        rows, columns = (round(WINDOW * side) for side in rgb.shape[:2])
        top, left = (
            int(rng.integers(0, side - kept + 1))
            for side, kept in zip(rgb.shape, (rows, columns), strict=False)
        )
        yield written(
            folder, tile.key, str(tile.place), clouded(rgb[top : top + rows, left : left + columns], rng)
        )


def clouded(rgb: U8, rng: np.random.Generator) -> U8:
    """Another gamma and colour cast, half the contrast or less, blur, noise, and cloud over a third."""
    rows, columns = rgb.shape[:2]
    light = (rgb.astype(np.float32) / 255) ** np.float32(rng.uniform(0.6, 1.6))
    light *= rng.uniform(0.85, 1.15, 3).astype(np.float32)
    haze = np.float32(rng.uniform(0.5, 0.75))
    light = light * (1 - haze) + haze * np.float32(0.7)
    light = np.asarray(cv2.GaussianBlur(light, (0, 0), float(rng.uniform(1, 2)) * rows / 512), np.float32)
    coarse = rng.normal(size=(6, 6)).astype(np.float32)
    bank = np.asarray(cv2.resize(coarse, (columns, rows), interpolation=cv2.INTER_CUBIC), np.float32)
    cover = np.clip((bank - np.quantile(bank, 0.67)) * 4, 0, 1)[..., None]
    light = light * (1 - cover) + cover * np.float32(0.95)
    light += rng.normal(0, 0.03, light.shape).astype(np.float32)
    return np.asarray(np.rint(np.clip(light, 0, 1) * 255), np.uint8)


def picture_views(source: Path, folder: Path) -> Iterator[Tile]:
    """Oblique views of real orthophotos; large pictures are cut into quarters, each a place."""
    folder.mkdir()
    for tile in layouts.read_layout(source):
        rgb, agl_m = layouts.load_rgb(tile), layouts.load_agl_m(tile)
        if agl_m is None:
            continue
        rows, columns = agl_m.shape
        parts = 2 if min(rows, columns) >= PICTURE_PX else 1
        for part in range(parts**2):
            down, right = divmod(part, parts)
            here = np.s_[
                down * rows // parts : (down + 1) * rows // parts,
                right * columns // parts : (right + 1) * columns // parts,
            ]
            if (rgb[here].max(axis=2) == 0).mean() > MOST_BLACK:
                continue
            place = f"{tile.key}-{part}"
            for view in range(PICTURE_VIEWS):
                rng = np.random.Generator(np.random.Philox(key=[part, view]))
                leant = oblique(np.ascontiguousarray(rgb[here]), np.nan_to_num(agl_m[here]), rng)
                yield written(folder, f"REAL_{place}-{view}", place, leant)


def oblique(rgb: U8, agl_m: F32, rng: np.random.Generator) -> U8:
    """A view from the side of an orthophoto: leant, squeezed, turned, moved, and seen through haze."""
    zoom = max(1, math.ceil(PICTURE_PX / max(agl_m.shape)))
    rgb = np.asarray(cv2.resize(rgb, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC), np.uint8)
    agl_m = np.asarray(cv2.resize(agl_m, None, fx=zoom, fy=zoom), np.float32)
    angle, zenith = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(6, 34))
    # Heights of 10 % raised tenfold: nearly all of the lean of a view that had none.
    rgb, _ = raise_heights(rgb, agl_m, float(zoom * math.tan(zenith) / 10), float(angle), 10.0)
    look = np.array([math.sin(angle), math.cos(angle)])
    turn = math.radians(rng.uniform(-4, 4))
    across = rng.uniform(0.85, 1.2) * np.array(
        [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    )
    across = across @ (np.eye(2) - (1 - math.cos(zenith)) * np.outer(look, look))
    rows, columns = agl_m.shape
    middle = np.array([columns / 2, rows / 2])
    moved = middle - across @ middle + rng.uniform(-0.08, 0.08, 2) * (columns, rows)
    seen = cv2.warpAffine(rgb, np.column_stack([across, moved]), (columns, rows))
    seen = seen[rows // 10 : -(rows // 10), columns // 10 : -(columns // 10)]
    light = (seen.astype(np.float32) / 255) ** np.float32(rng.uniform(0.7, 1.4))
    haze = np.float32(rng.uniform(0, 0.6))
    light = light * rng.uniform(0.85, 1.15, 3).astype(np.float32) * (1 - haze) + haze * np.float32(0.8)
    light = np.asarray(cv2.GaussianBlur(light, (0, 0), float(rng.uniform(0.5, 1.6))), np.float32)
    light += rng.normal(0, 0.02, light.shape).astype(np.float32)
    return np.asarray(np.rint(np.clip(light, 0, 1) * 255), np.uint8)


def written(folder: Path, key: str, place: str, rgb: U8) -> Tile:
    """The pixels as a tile of a known place."""
    path = folder / f"{key}_RGB.png"
    cv2.imwrite(str(path), np.ascontiguousarray(rgb[..., ::-1]), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert images.image_size(path) == rgb.shape[:2]
    return Tile(key, key.split("_")[0], path, place=place)


CASES = {"similarity": similarity_case}
