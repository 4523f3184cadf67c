"""The dot-folder beside predictions: who writes there, what made them, and what could not be done.

`.geopose-predict/` remembers the checkpoints and settings behind the outputs, so that a run goes on only with
the same ones; its lock keeps a second driver out; `failures.jsonl` lists what failed, `last_job.json` says how fast
the last tiles went and what bound them. A finished run that is
started again touches nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from geopose_dist import files
from geopose_dist.errors import UserError
from geopose_dist.infer import calibration

BOOKKEEPING = ".geopose-predict"


@contextlib.contextmanager
def only_driver(out: Path) -> Iterator[None]:
    """Keep a second driver out of the folder, and remove what killed actors left half-written."""
    folder = out / BOOKKEEPING
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--out {out}: another `geopose predict` is writing there; wait for it"
            ) from error
        for leftover in out.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        yield


def maker_of(checkpoints: Sequence[Path], facts: Mapping[str, object]) -> dict[str, Any]:
    """What makes predictions, as plain values: settings, and checkpoints and calibrations by their hashes."""
    maker: dict[str, Any] = json.loads(json.dumps(dict(facts)))
    maker["checkpoints"] = [calibration.sha256(path) for path in checkpoints]
    if maker["net"]["calibration"] != "none":
        for path in checkpoints:
            calibration.load(path)  # what is wrong with it is said before anything starts
        maker["calibrations"] = [calibration.sha256(calibration.path_for(path)) for path in checkpoints]
    return maker


def check_same_maker(out: Path, maker: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Whether `maker` made what is in the folder; unless that is overwritten, it must be so (UserError)."""
    path = out / BOOKKEEPING / "made_by.json"
    if not overwrite and not path.is_file() and any(out.glob("*_AGL.tif")):
        raise UserError(
            f"--out {out}: holds heights of unknown origin; give another folder, or --overwrite true"
        )
    before = json.loads(path.read_bytes()) if path.is_file() else {}
    differ = [name for name in maker if before.get(name) != maker[name]]
    if before and differ and not overwrite:
        raise UserError(
            f"--out {out}: predictions there have other {' and '.join(differ)}; give "
            "another folder, or --overwrite true to predict them again"
        )
    return not differ


def remember_maker(out: Path, maker: Mapping[str, Any]) -> None:
    """Say who makes what is in the folder from now on."""
    write_if_new(
        out / BOOKKEEPING / "made_by.json", (json.dumps(maker, indent=1, sort_keys=True) + "\n").encode()
    )


def forget(out: Path, keys: Collection[str], *, all_of_them: bool) -> None:
    """Remove predictions before they are made again, so that a run killed meanwhile never takes old ones for its own.

    With `all_of_them` those of other tiles go too, which other settings made; where nobody remembers who made
    them (UserError) they may be labels.
    """
    for path in sorted(out.glob("*_AGL.tif")):
        key = path.name.removesuffix("_AGL.tif")
        if key not in keys:
            if not all_of_them:
                continue
            if not (out / BOOKKEEPING / "made_by.json").is_file():
                raise UserError(f"{path}: of unknown origin, and not to be predicted now; give another --out")
        path.unlink()
        path.with_name(f"{key}_VFLOW.json").unlink(missing_ok=True)


def write_failures(out: Path, failures: Sequence[tuple[str, str]]) -> Path:
    """List (key, sentence) of what failed; the path of the list."""
    lines = [json.dumps({"key": key, "problem": sentence}) for key, sentence in sorted(failures)]
    path = out / BOOKKEEPING / "failures.jsonl"
    write_if_new(path, "".join(line + "\n" for line in lines).encode())
    return path


def write_if_new(path: Path, data: bytes) -> None:
    """Write a small file unless it holds this already."""
    if not path.is_file() or path.read_bytes() != data:
        files.write_bytes(path, data)
