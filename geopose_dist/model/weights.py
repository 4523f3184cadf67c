"""Weights on disk: one safetensors file that says by itself how to rebuild its network.

The file's metadata holds the model recipe and the facts that prediction must share with training (the
reduction of the tiles, whether GSDs were known). A run folder's best, else its newest, checkpoint is
found by listing, never by a pointer that could be stale.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from geopose_dist import config, files
from geopose_dist.errors import UserError
from geopose_dist.model.recipe import ModelRecipe
from geopose_dist.model.unet import GeoposeNet

MODEL_NAME = "model.safetensors"
EMA_NAME = "ema.safetensors"
STATE_NAME = "state.json"


def save_weights(path: Path, state: dict[str, Tensor], recipe: ModelRecipe, facts: dict[str, Any]) -> None:
    """Write a network's state with its recipe and facts to `path`, whole or not at all."""
    metadata = {"recipe": json.dumps(config.to_dict(recipe)), "facts": json.dumps(facts, sort_keys=True)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    files.write_bytes(path, safetensors.torch.save(tensors, metadata))


def load_net(path: Path) -> tuple[GeoposeNet, dict[str, Any]]:
    """The network of a checkpoint (file, step folder or run folder) in eval mode on the CPU, and its facts.

    Raises UserError if there is none, if it is damaged, or if it is not a checkpoint of this program.
    """
    file = find_checkpoint(path)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        recipe_values, facts = json.loads(metadata["recipe"]), json.loads(metadata["facts"])
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a checkpoint ({error}); name another one") from error
    except KeyError as error:
        raise UserError(
            f"{file}: is safetensors but holds no model recipe; wanted a file that training wrote"
        ) from error
    net = GeoposeNet(config.load_dict(ModelRecipe, recipe_values, where=str(file)))
    load_state(net, state, str(file))
    return net.eval(), facts


def read_facts(path: Path) -> dict[str, Any]:
    """What prediction must share with training, from a checkpoint's header alone (UserError)."""
    file = find_checkpoint(path)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            facts: dict[str, Any] = json.loads((opened.metadata() or {})["facts"])
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: cannot be read as a checkpoint ({error}); name another one") from error
    return facts


def load_state(net: GeoposeNet, state: dict[str, Tensor], where: str) -> None:
    """Fill `net` with `state`; another network's weights are a UserError naming the first difference."""
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{where}: weights of another model ({first[:300]})") from error


def step_folders(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first; a folder counts once its state.json is there."""
    found = (run / "checkpoints").glob("step-*")
    return sorted(folder for folder in found if (folder / STATE_NAME).is_file())


def find_checkpoint(path: Path) -> Path:
    """The weights file that `path` means: itself, or those of a step folder or of a run folder.

    A step folder means its averaged weights if they scored better than the raw ones there; a run folder
    means its best checkpoint by validation score, else its newest (UserError if there is none).
    """
    if path.is_file():
        return path
    if (path / STATE_NAME).is_file() and (path / MODEL_NAME).is_file():
        use = json.loads((path / STATE_NAME).read_bytes()).get("use", "raw")
        return path / (EMA_NAME if use == "ema" else MODEL_NAME)
    folders = step_folders(path)
    if not folders:
        raise UserError(
            f"--checkpoint {path}: no checkpoint there; wanted a .safetensors file, or a run folder of `geopose train` "
            "with at least one folder in checkpoints/"
        )
    scores = {folder: json.loads((folder / STATE_NAME).read_bytes()).get("r2") for folder in folders}
    scored = [folder for folder in folders if scores[folder] is not None]
    best = max(scored, key=lambda folder: scores[folder]) if scored else folders[-1]
    return find_checkpoint(best)
