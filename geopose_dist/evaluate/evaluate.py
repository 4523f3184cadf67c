"""`geopose evaluate`: the official score of a folder of predictions, fail-closed.

Names are compared first, then every pair of tiles is read once, checked and reduced to its moments by
worker processes; whatever is wrong with any file is listed at once and nothing is scored. A benchmark city
that the truth lacks is named, and the printed table says which cities the final number covers.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geopose_dist import geometry, metrics_log
from geopose_dist.errors import FoundProblems, UserError
from geopose_dist.evaluate import bins, intervals
from geopose_dist.evaluate import predictions as files
from geopose_dist.evaluate.moments import Moments, TileMoments, tile_moments
from geopose_dist.files import write_bytes
from geopose_dist.pool import process_map, ray_map

SMALL_JOB_BYTES = 30_000_000
"""Below this many bytes of heights, starting worker processes takes longer than scoring."""


@dataclass(frozen=True)
class EvaluateRecipe:
    """Score predictions against truth."""

    predictions: Path
    """Folder of KEY_AGL.tif (uint16 centimetres, no 65535) and KEY_VFLOW.json (px/cm, radians)."""
    truth: Path
    """Folder of the same names; uint16 centimetres (65535 = unknown) and px/cm, or float metres and px/m."""
    json: Path | None = None
    """Also write the numbers to this file."""
    table: Path | None = None
    """Also write the figures of every tile, its own R2 included, to this .csv or .parquet file."""
    height_bins: bool = False
    """Also tell the errors by true height: a second look at every pixel."""
    intervals: int = intervals.ROUNDS
    """Rounds of the bootstrap behind the confidence intervals; 0: none."""
    groups: Path | None = None
    """Tiles that are not independent, {"45": [keys], ...} as in the challenge's clusters.json; unset: places.csv or
    clusters.json in or above the truth folder, else every tile alone."""
    rectify: Path | None = None
    """Also write predictions and truth moved to ground position, with their occlusion, into this folder."""
    workers: int = 0
    """Worker processes; 0 means one per core, or none for small jobs."""
    ray_address: str = ""
    """Score on the Ray cluster at this address, whose nodes see both folders at the same paths."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; wanted 0 (one per core) or more")
        if self.intervals < 0:
            raise ValueError(f"intervals is {self.intervals}; wanted 0 (none) or more rounds")
        if self.table is not None and self.table.suffix not in (".csv", ".parquet"):
            raise ValueError(f"table is {self.table}; wanted a file that ends in .csv or .parquet")


@dataclass(frozen=True)
class _Pair:
    prediction: files.TileFiles
    truth: files.TileFiles


def score(predictions_dir: str | Path, truth_dir: str | Path, *, workers: int = 1) -> dict[str, Any]:
    """The score of a folder of predictions: what `geopose evaluate --json` writes.

    Args:
        predictions_dir: KEY_AGL.tif (uint16 cm) and KEY_VFLOW.json (px/cm, radians) of every true tile.
        truth_dir: the true heights and poses; files with other names, such as images, are ignored here.
        workers: processes, on which no figure depends; 0 means one per core, or none for small jobs. With
            more than one, a script that calls this needs the usual `if __name__ == "__main__":`.

    Returns:
        `{"cities": {CITY: {...}}, "r2": final, "cities_missing": [...]}`; errors in degrees, px/m, px and m.

    Raises:
        FoundProblems: every missing, extra, damaged or wrong file by name. Nothing is scored then.
    """
    return gather(Path(predictions_dir), Path(truth_dir), workers=workers).scores()


def gather(
    predictions_dir: Path,
    truth_dir: Path,
    *,
    workers: int = 1,
    height_bins: bool = False,
    ray_address: str = "",
) -> Moments:
    """The moments of every tile of the truth, in the order of the keys; see `score`."""
    if ray_address:  # nodes of a cluster work in other folders
        predictions_dir, truth_dir = predictions_dir.resolve(), truth_dir.resolve()
    pairs, problems = _match(predictions_dir, truth_dir)
    moments = Moments()
    if workers == 0 and sum(_bytes(pair) for pair in pairs) < SMALL_JOB_BYTES:
        workers = 1
    one_pair = functools.partial(measure, height_bins=height_bins)
    if ray_address:
        measured = ray_map(one_pair, pairs, address=ray_address, workers=workers)
    else:
        measured = process_map(one_pair, pairs, workers=min(workers, len(pairs)) if pairs else 1)
    for found in metrics_log.track(measured, total=len(pairs), label="score"):
        if isinstance(found, TileMoments):
            moments.add(found)
        else:
            problems += found
    if not problems:
        known: dict[str, bool] = {}
        for tile in moments.tiles:
            known[tile.city] = known.get(tile.city, False) or tile["known"] > 0
        problems += [
            f"{truth_dir}: no tile of {city} has a known height; there is nothing to score; remove the city"
            for city, any_known in known.items()
            if not any_known
        ]
    if problems:
        raise FoundProblems(f"{len(problems)} problems keep these predictions from being scored:", problems)
    return moments


def _bytes(pair: _Pair) -> int:
    return sum(tile.agl.stat().st_size for tile in (pair.prediction, pair.truth) if tile.agl is not None)


def _match(predictions_dir: Path, truth_dir: Path) -> tuple[list[_Pair], list[str]]:
    """Tiles that have all four files, and a sentence for everything that has not or should not be there."""
    predicted = files.list_folder(predictions_dir, "--predictions")
    true = files.list_folder(truth_dir, "--truth")
    if not true.tiles:
        raise UserError(
            f"--truth {truth_dir}: no KEY_AGL.tif and KEY_VFLOW.json in it; is it the right folder?"
        )
    problems = [*true.problems, *predicted.problems]
    pairs = []
    for key, truth in true.tiles.items():
        complete = True
        for folder, tile, whose in (
            (truth_dir, truth, "truth"),
            (predictions_dir, predicted.tiles.get(key), "prediction"),
        ):
            for name, path in (
                (f"{key}_AGL.tif", tile.agl if tile else None),
                (f"{key}_VFLOW.json", tile.vflow if tile else None),
            ):
                if path is None:
                    complete = False
                    problems.append(f"{folder / name}: missing; every tile of the truth needs a {whose}")
        if complete:
            pairs.append(_Pair(predicted.tiles[key], truth))
    for key, tile in predicted.tiles.items():
        if key not in true.tiles:
            extra = [path.name for path in (tile.agl, tile.vflow) if path is not None]
            problems.append(
                f"{predictions_dir}: {' and '.join(extra)}: no such tile in the truth; remove, or add truth"
            )
    problems += [f"{path}: not a prediction's file name; remove it" for path in predicted.others]
    return pairs, problems


def measure(pair: _Pair, height_bins: bool = False) -> TileMoments | list[str]:
    """Read and check one tile: its moments, or what is wrong with it, one sentence each."""
    problems: list[str] = []
    heights, true_heights = (
        _read(files.read_tiff, tile.agl, problems) for tile in (pair.prediction, pair.truth)
    )
    pose, true_pose = (
        _read(files.read_vflow, tile.vflow, problems) for tile in (pair.prediction, pair.truth)
    )
    assert pair.prediction.agl is not None
    assert pair.truth.agl is not None
    true_cm = true_heights is None or true_heights.dtype == np.uint16
    if true_heights is not None and not true_cm and true_heights.dtype.kind != "f":
        problems.append(
            f"{pair.truth.agl}: dtype {true_heights.dtype}; wanted uint16 centimetres or float metres"
        )
    if true_heights is not None and true_heights.ndim != 2:
        problems.append(f"{pair.truth.agl}: shape {true_heights.shape}; wanted rows x columns")
    if heights is not None:
        size = None if true_heights is None else true_heights.shape
        problems += files.check_heights(heights, pair.prediction.agl, size)
    if pose is not None:
        problems += geometry.check_label(pose[0], pose[1], "px/cm", str(pair.prediction.vflow))
    if true_pose is not None:
        true_unit = "px/cm" if true_cm else "px/m"
        problems += geometry.check_label(true_pose[0], true_pose[1], true_unit, str(pair.truth.vflow))
    if (
        not problems
        and true_heights is not None
        and true_heights.dtype.kind == "f"
        and np.isinf(true_heights).any()
    ):
        problems.append(f"{pair.truth.agl}: infinite heights; unknown heights are NaN")
    if true_heights is not None and true_heights.dtype == np.float16:
        true_heights = true_heights.astype(np.float32)
    if problems or heights is None or true_heights is None or pose is None or true_pose is None:
        return problems
    tile = tile_moments(
        pair.truth.city,
        heights,
        geometry.px_per_m(pose[0]),
        pose[1],
        true_heights,
        geometry.px_per_m(true_pose[0]) if true_cm else true_pose[0],
        true_pose[1],
        predicted_unit_m=1 / geometry.CM_PER_M,
        true_unit_m=1 / geometry.CM_PER_M if true_cm else 1.0,
    )
    by_height = None
    if height_bins:
        by_height = bins.tile_bins(
            heights, true_heights, 1 / geometry.CM_PER_M, 1 / geometry.CM_PER_M if true_cm else 1.0
        )
    return dataclasses.replace(tile, key=pair.truth.key, bins=by_height)


def _read(reader: Any, path: Path | None, problems: list[str]) -> Any:
    assert path is not None
    try:
        return reader(path)
    except UserError as error:
        problems.append(str(error))
        return None


def print_table(scores: dict[str, Any]) -> None:
    """The score as a table on stdout, and which cities the final number covers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Score by city (errors: mean / RMS)")
    for heading in ("city", "images", "R2 AGL", "R2 flow", "R2"):
        table.add_column(heading, justify="left" if heading == "city" else "right")
    measures = (
        ("angle deg", "angle_error_deg"),
        ("scale px/m", "scale_error"),
        ("magnitude px", "mag_error"),
        ("endpoint px", "epe"),
        ("AGL m", "agl_error"),
    )
    for heading, _ in measures:
        table.add_column(heading, justify="right")
    for city, facts in scores["cities"].items():
        errors = (f"{facts['mean_' + name]:.3f} / {facts['rms_' + name]:.3f}" for _, name in measures)
        r2 = (f"{facts[name]:.4f}" for name in ("agl_r2", "vflow_r2", "r2"))
        table.add_row(city, str(facts["images"]), *r2, *errors)
    # Wide enough for every column: a log file is no terminal, and a cut number is no number.
    Console(file=sys.stdout, width=130, soft_wrap=False).print(table)
    print(f"final R2 {scores['r2']:.4f}, the mean of {', '.join(scores['cities'])}")
    if scores["cities_missing"]:
        print(
            f"not covered: {', '.join(scores['cities_missing'])} (no truth given); this is no benchmark score"
        )


def print_bins(rows: list[dict[str, Any]]) -> None:
    """Errors by true height, as a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Height errors by true height, all cities (m)")
    for heading in ("true height", "share", "bias", "mean", "RMS"):
        table.add_column(heading, justify="right")
    for row in rows:
        errors = (row[name] for name in ("bias_m", "mean_error_m", "rms_error_m"))
        cells = ("" if error is None else f"{error:.2f}" for error in errors)
        table.add_row(row["height_m"], f"{row['share']:.1%}", *cells)
    Console(file=sys.stdout, width=80).print(table)


def tile_rows(moments: Moments) -> list[dict[str, Any]]:
    """Every tile's figures: those of a city, as if the tile were one; absent without known heights."""
    rows = []
    for tile in moments.tiles:
        figures = dict(Moments([tile]).scores()["cities"].get(tile.city, {}))
        figures.pop("images", None)
        rows.append({"key": tile.key, "city": tile.city, "known_pixels": int(tile["known"]), **figures})
    return rows


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as CSV or Parquet by the file's extension (UserError: Parquet without pyarrow)."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(path, text.getvalue().encode())
        return
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"--table {path}: Parquet is written by pyarrow, which is not installed: "
            "pip install 'geopose-dist[parquet]', or name a .csv file"
        ) from error
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, buffer)
    write_bytes(path, buffer.getvalue().to_pybytes())


def run(recipe: EvaluateRecipe) -> None:
    """Print the tables, write the files, write the rectified pictures."""
    groups = intervals.find_groups(recipe.truth, recipe.groups)
    moments = gather(
        recipe.predictions,
        recipe.truth,
        workers=recipe.workers,
        height_bins=recipe.height_bins,
        ray_address=recipe.ray_address,
    )
    scores = moments.scores()
    assert math.isfinite(scores["r2"])
    print_table(scores)
    if recipe.intervals:
        scores["intervals"] = intervals.bootstrap(moments, groups, recipe.intervals)
        print(intervals.in_words(scores["intervals"], scores["r2"]))
    if recipe.height_bins:
        scores["height_bins"] = bins.summary([tile.bins for tile in moments.tiles if tile.bins is not None])
        print_bins(scores["height_bins"])
    if recipe.json is not None:
        write_bytes(recipe.json, (json.dumps(scores, indent=1, allow_nan=False) + "\n").encode())
    if recipe.table is not None:
        write_table(recipe.table, tile_rows(moments))
    if recipe.rectify is not None:
        from geopose_dist.evaluate import rectify

        rectify.rectify_folder(recipe.truth, recipe.predictions, recipe.rectify, workers=recipe.workers)
