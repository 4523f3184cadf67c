"""Checkpoints: a step's folder exists whole or not at all.

`checkpoints/step-00000030/` holds `model.safetensors` (and `ema.safetensors`), `training.pt` (optimiser
and scaler, plain tensors), and `state.json`: the position, the clock, the score if taken, and what a run
that goes on must agree on. The folder is written under a dot-name, fsynced and renamed; the newest
complete one is found by listing.
"""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geopose_dist import config, files
from geopose_dist.errors import UserError
from geopose_dist.model import weights
from geopose_dist.model.pretrained import UNREADABLE, read_state
from geopose_dist.train.recipe import TrainRecipe

FREE_TO_DIFFER = (
    "out", "device", "log_every", "init_from", "allow_change", "on_nonfinite", "nonfinite_limit",
    "profile", "timeout_s", "preflight", "check", "checkpoint_activations", "data.shards", "data.store",
    "data.workers", "data.prefetch", "data.on_damage", "data.damage_limit", "validation", "checkpoint",
)  # fmt: skip
"""Fields that change nothing that is computed; shards are compared by fingerprint instead of by folder."""


@dataclass(frozen=True)
class Progress:
    """Where a run is: what `state.json` tells besides the recipe.

    Attributes:
        step: optimiser steps taken.
        elapsed_s: time trained, over all starts.
        fingerprint: of the training shards.
        r2: best final validation score among raw and averaged weights at this step, if taken.
        use: which weights that score belongs to.
        best: best score of any validation so far.
        stale: validations since then, none of which was better.
    """

    step: int = 0
    elapsed_s: float = 0.0
    fingerprint: str = ""
    r2: float | None = None
    use: str = "raw"
    best: float | None = None
    stale: int = 0


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds beyond `Progress`: everything that the future depends on.

    Order, augmentation and dropout are keyed by step, so there is no generator state to keep.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    ema: dict[str, Tensor] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    city_sums: Tensor | None = None


def save(run: Path, recipe: TrainRecipe, progress: Progress, snapshot: Snapshot) -> Path:
    """Write the checkpoint of a step; returns its folder.

    A step that is there was written by this run, which computes the same again: only its score is new.
    """
    root = run / "checkpoints"
    final = root / f"step-{progress.step:08d}"
    state = json.dumps(dict(progress.__dict__, recipe=config.to_dict(recipe)), indent=1).encode()
    if (final / weights.STATE_NAME).is_file():
        files.write_bytes(final / weights.STATE_NAME, state)
        return final
    temporary = root / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        weights.save_weights(temporary / weights.MODEL_NAME, snapshot.model, recipe.model, snapshot.facts)
        if snapshot.ema is not None:
            weights.save_weights(temporary / weights.EMA_NAME, snapshot.ema, recipe.model, snapshot.facts)
        with files.atomic_write(temporary / "training.pt") as file:
            torch.save(training_state(snapshot), file)
        files.write_bytes(temporary / weights.STATE_NAME, state)
        shutil.rmtree(final, ignore_errors=True)  # without a state it is no checkpoint
        temporary.rename(final)
        files.fsync_folder(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def training_state(snapshot: Snapshot) -> dict[str, Any]:
    """What `training.pt` holds."""
    return {
        "optimizer": snapshot.optimizer, "scaler": snapshot.scaler, "city_sums": snapshot.city_sums
    }  # fmt: skip


def read_progress(folder: Path) -> Progress:
    """`state.json` of a step folder, without its recipe."""
    state = json.loads((folder / weights.STATE_NAME).read_bytes())
    return Progress(**{name: state[name] for name in Progress.__dataclass_fields__ if name in state})


def load(folder: Path) -> Snapshot:
    """Read a checkpoint back, on the CPU; nothing in it can run code (UserError if it is damaged)."""
    model = read_state(folder / weights.MODEL_NAME)
    ema = read_state(folder / weights.EMA_NAME) if (folder / weights.EMA_NAME).is_file() else None
    try:
        training = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
    except (*UNREADABLE, pickle.UnpicklingError) as error:
        raise UserError(
            f"{folder}/training.pt: cannot be read ({type(error).__name__}); remove {folder} to go on from the "
            "checkpoint before it"
        ) from error
    sums = training.get("city_sums")
    return Snapshot(model, training["optimizer"], training["scaler"], ema, city_sums=sums)


def check_same_run(folder: Path, recipe: TrainRecipe, fingerprint: str) -> None:
    """Refuse to go on with another recipe or other shards, printing both sides (UserError)."""
    state = json.loads((folder / weights.STATE_NAME).read_bytes())
    now = flat(config.to_dict(recipe))
    # A field that is younger than the run had the value that it has by default now.
    former = flat(_filled(state["recipe"], config.to_dict(TrainRecipe())))
    allowed = (*FREE_TO_DIFFER, *recipe.allow_change)
    changes = [
        f"{name}: the run has {former.get(name)!r}, the recipe says {now.get(name)!r}"
        for name in sorted(former.keys() | now.keys())
        if former.get(name) != now.get(name)
        and not any(name == a or name.startswith(f"{a}.") for a in allowed)
    ]
    if state["fingerprint"] != fingerprint and "data.shards" not in recipe.allow_change:
        changes.append(
            f"data.shards: the run has samples {state['fingerprint']}, these shards are {fingerprint}"
        )
    if changes:
        raise UserError(
            "\n  ".join(
                [
                    f"{recipe.out} holds a run of another recipe; train into another --out, or name what may "
                    "change with --allow-change FIELD ...",
                    *changes,
                ]
            )
        )


def _filled(tree: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`tree` with what it lacks of `defaults`, at every level."""
    both = {name: tree[name] for name in tree if isinstance(tree[name], dict) and defaults.get(name)}
    return defaults | tree | {name: _filled(value, defaults[name]) for name, value in both.items()}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested tables by their dotted names."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves.update(flat(value, f"{prefix}.{name}" if prefix else name))
    return leaves


def tidy(run: Path) -> None:
    """Remove what a killed run left half-written or half-removed."""
    for leftover in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover)


def size_bytes(net: nn.Module, averaged: bool) -> int:
    """Bytes of a checkpoint: the state, the averaged state, and Adam's two moments of every parameter."""
    state: int = sum(value.nbytes for value in net.state_dict().values())
    moments: int = 2 * sum(value.nbytes for value in net.parameters())
    return (2 if averaged else 1) * state + moments


def check_room(run: Path, each_bytes: int, keep: int) -> None:
    """Refuse a run whose checkpoints do not fit on its disk (UserError).

    There are at most `keep` newest ones, the best one, and the one being written.
    """
    there = sum(file.stat().st_size for file in (run / "checkpoints").glob("step-*/*"))
    wanted = each_bytes * (keep + 2) - there
    place = next(folder for folder in (run, *run.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise UserError(
            f"{run}: the disk has {free / 2**30:.2f} GiB free and checkpoints need {wanted / 2**30:.2f} GiB "
            f"({keep + 2} of {each_bytes / 2**30:.2f} GiB: checkpoint.keep {keep}, the best, the one being written); "
            "free some space, lower checkpoint.keep, or name another --out"
        )


def prune(run: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints and the best one."""
    folders = weights.step_folders(run)
    scores = {folder: read_progress(folder).r2 for folder in folders}
    scored = [folder for folder in folders if scores[folder] is not None]
    best = max(scored, key=lambda folder: scores[folder] or -float("inf")) if scored else None
    for folder in folders[:-keep]:
        if folder != best:
            aside = folder.with_name(f".{folder.name}.old")
            folder.rename(aside)  # a half-removed folder must not look like a checkpoint
            shutil.rmtree(aside)
