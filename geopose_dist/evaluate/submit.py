"""`geopose submit`: predictions checked against the format folder, then packed as the challenge wants them.

Every file is checked first (name, size, dtype, finite, range) by worker processes, and all that is wrong is
listed at once. The archive then streams into a temporary file that takes its name when it is whole: regular
files at its root, sorted, without times or owners, so the same predictions give the same bytes.
"""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from geopose_dist import files as own_files
from geopose_dist import geometry, metrics_log
from geopose_dist.errors import FoundProblems, UserError
from geopose_dist.evaluate import predictions as files
from geopose_dist.pool import process_map


@dataclass(frozen=True)
class SubmitRecipe:
    """Check predictions against the challenge's format folder and pack them."""

    predictions: Path
    """Folder of KEY_AGL.tif (uint16 centimetres) and KEY_VFLOW.json (px/cm, radians)."""
    format: Path
    """The challenge's submission_format folder: names and sizes are taken from it."""
    out: Path
    """The archive to write, NAME.tar.gz."""
    level: int = 0
    """gzip level, 0 to 9. Heights are compressed already: 1 saves not one byte in a thousand at a fiftieth of the
    rate of 0, which only copies."""
    workers: int = 0
    """Worker processes of the check; 0 means one per core."""

    def __post_init__(self) -> None:
        if not str(self.out).endswith((".tar.gz", ".tgz")):
            raise ValueError(f"out is {self.out}; wanted a name that ends in .tar.gz")
        if not 0 <= self.level <= 9:
            raise ValueError(f"level is {self.level}; wanted 0 to 9")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; wanted 0 (one per core) or more")


@dataclass(frozen=True)
class _Check:
    tile: files.TileFiles
    model: Path | None
    """The format folder's AGL of this tile."""


def run(recipe: SubmitRecipe) -> None:
    """Check, pack, and tell the size."""
    members = check(recipe.predictions, recipe.format, workers=recipe.workers)
    size = pack(members, recipe.out, level=recipe.level)
    print(f"{recipe.out}: {len(members)} files, {size:,} bytes ({size / 1e6:.1f} MB)")


def check(predictions: Path, format_folder: Path, *, workers: int = 1) -> list[Path]:
    """The files to pack, sorted by name; whatever is wrong with any of them is FoundProblems."""
    wanted = files.list_folder(format_folder, "--format")
    found = files.list_folder(predictions, "--predictions")
    if not wanted.tiles:
        raise UserError(
            f"--format {format_folder}: no KEY_AGL.tif or KEY_VFLOW.json in it; is it the right folder?"
        )
    problems = [*wanted.problems, *found.problems]
    names = {path.name for tile in wanted.tiles.values() for path in _paths(tile)}
    have = {path.name: path for tile in found.tiles.values() for path in _paths(tile)}
    problems += [f"{predictions / name}: missing" for name in sorted(names - have.keys())]
    problems += [f"{have[name]}: not in the format folder; remove it" for name in sorted(have.keys() - names)]
    problems += [f"{path}: not in the format folder; remove it" for path in found.others]
    checks = [_Check(tile, wanted.tiles[key].agl) for key, tile in found.tiles.items() if key in wanted.tiles]
    for told in metrics_log.track(
        process_map(_check_one, checks, workers=workers), total=len(checks), label="check"
    ):
        problems += told
    if problems:
        raise FoundProblems(
            f"{len(problems)} problems keep these predictions from being submitted:", problems
        )
    return [have[name] for name in sorted(have)]


def _paths(tile: files.TileFiles) -> list[Path]:
    return [path for path in (tile.agl, tile.vflow) if path is not None]


def _check_one(check: _Check) -> list[str]:
    """What is wrong with one tile's files, one sentence each."""
    problems = []
    try:
        size = files.tiff_shape(check.model)[0] if check.model is not None else None
    except UserError as error:
        return [str(error)]
    if check.tile.agl is not None:
        try:
            problems += files.check_heights(files.read_tiff(check.tile.agl), check.tile.agl, size)
        except UserError as error:
            problems.append(str(error))
    if check.tile.vflow is not None:
        try:
            problems += geometry.check_label(
                *files.read_vflow(check.tile.vflow), "px/cm", str(check.tile.vflow)
            )
        except UserError as error:
            problems.append(str(error))
    return problems


def pack(members: Iterable[Path], out: Path, *, level: int = 0) -> int:
    """Write the files into `out`, a tar.gz with all of them at its root; returns its size in bytes."""
    paths = list(members)
    with (
        own_files.atomic_write(out) as file,
        gzip.GzipFile(filename="", mode="wb", compresslevel=level, fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for path in metrics_log.track(paths, total=len(paths), label="pack", unit="files"):
            facts = tarfile.TarInfo(
                path.name
            )  # time 0, owner 0, mode 644: the same files give the same bytes
            facts.size = path.stat().st_size
            with path.open("rb") as source:
                archive.addfile(facts, source)
    return out.stat().st_size
