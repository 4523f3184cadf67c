"""The tables beside a dataset's tiles: metadata.csv, geopose_train.csv, geopose_test.csv, places.csv.

A table tells of tiles by id, which is `abcdef` or `JAX_abcdef`; both are understood. Tables may stand in the
dataset or, where `--source` is one of its folders, in the folder above. Whatever is wrong is collected.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

Value = TypeVar("Value")

LISTS = {"geopose_train.csv": ("train", ("rgb", "agl", "json")), "geopose_test.csv": ("test_rgbs", ("rgb",))}
"""Lists of the challenge: the folder of each, and the columns that name files."""
FOLDERS = ("train", "train_nano", "test_rgbs", "test", "val")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: a sentence naming the file, and the key of the tile that it spoils, if any."""

    sentence: str
    key: str | None = None


@dataclass(frozen=True)
class Tables:
    """What the tables say, by id.

    Attributes:
        gsd: ground metres per pixel.
        places: names of places.
        lists: rows of the lists that are there, by file name.
        paths: where these lists are, by file name.
    """

    gsd: dict[str, float] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    lists: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)

    @property
    def is_challenge(self) -> bool:
        """A list of the challenge settles the units."""
        return bool(self.lists)

    def gsd_m(self, key: str) -> float | None:
        """Ground metres per pixel of a tile, if known."""
        return self.gsd.get(key, self.gsd.get(key.partition("_")[2]))

    def place(self, key: str) -> str | None:
        """Place of a tile, if known."""
        return self.places.get(key, self.places.get(key.partition("_")[2]))


def read(source: Path, problems: list[Problem]) -> Tables:
    """The tables of a dataset, or of the dataset that `source` is a folder of."""
    tables = Tables()
    roots = [source] + [source.resolve().parent] * (source.resolve().name in FOLDERS)

    def find(name: str) -> Path | None:
        return next((root / name for root in roots if (root / name).is_file()), None)

    metadata, places = find("metadata.csv"), find("places.csv")
    if metadata is not None:
        tables.gsd.update(_by_id(metadata, "gsd", _gsd, problems))
    if places is not None:
        tables.places.update(_by_id(places, "place", str, problems))
    for name, (_, columns) in LISTS.items():
        path = find(name)
        if path is not None:
            tables.paths[name] = path
            tables.lists[name] = _rows(path, ("id", *columns), problems)
    return tables


def _gsd(text: str) -> float:
    gsd_m = float(text)
    if not (math.isfinite(gsd_m) and gsd_m > 0):
        raise ValueError(text)
    return gsd_m


def _rows(path: Path, columns: tuple[str, ...], problems: list[Problem]) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            lacking = [column for column in columns if column not in (reader.fieldnames or [])]
            if lacking:
                problems.append(
                    Problem(
                        f"{path}: no column {', '.join(lacking)}; "
                        f"it has {', '.join(reader.fieldnames or []) or 'none'}; "
                        "mend or remove the file"
                    )
                )
                return []
            rows = []
            for row in reader:
                if any(row[column] is None for column in columns):
                    problems.append(Problem(f"{path}, line {reader.line_num}: cut short; mend the file"))
                else:
                    rows.append({column: row[column].strip() for column in columns})
            return rows
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        problems.append(
            Problem(f"{path}: not a table of comma-separated UTF-8 text ({error}); mend the file")
        )
        return []


def _by_id(
    path: Path, column: str, parse: Callable[[str], Value], problems: list[Problem]
) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for row in _rows(path, ("id", column), problems):
        if not row[column]:
            continue  # not known, which is allowed
        try:
            value = parse(row[column])
        except ValueError:
            problems.append(
                Problem(
                    f"{path}: {column} of {row['id']} is {row[column]!r}; wanted a number above 0; mend it"
                )
            )
            continue
        if found.setdefault(row["id"], value) != value:
            problems.append(
                Problem(f"{path}: {row['id']} stands there twice, with different {column}; mend it")
            )
    return found


def check_rows(tables: Tables, folders: dict[str, Path], problems: list[Problem]) -> None:
    """Rows of the challenge's lists whose files are not there, and ids that stand there twice.

    A list whose whole folder is absent is no problem: test tiles are predicted without the training tiles.
    """
    for name, rows in tables.lists.items():
        folder = folders.get(LISTS[name][0])
        if folder is None:
            continue
        there = {path.name for path in folder.iterdir()}
        seen: set[str] = set()
        for row in rows:
            if row["id"] in seen:
                problems.append(
                    Problem(f"{tables.paths[name]}: id {row['id']} stands there twice; remove one row")
                )
            seen.add(row["id"])
            for column in LISTS[name][1]:
                file = PurePosixPath(row[column]).name
                if file and file not in there:
                    problems.append(
                        Problem(
                            f"{folder / file}: not found, but {name} lists it (id {row['id']}, "
                            f"column {column}); fetch it, or remove the row",
                            file.rpartition("_")[0] or None,
                        )
                    )
