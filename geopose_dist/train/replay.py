"""`geopose replay`: run a batch that met the guard once more, and say where the numbers went wrong.

The batch is as the network saw it, the weights are those saved beside it, and dropout is keyed by step and
micro-batch, so forward and backward pass are the ones that failed. Every module's output is looked at, then
the gradient of every output; the loss is told tile by tile and term by term.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geopose_dist import config
from geopose_dist.data.batch import Batch, to_device
from geopose_dist.errors import UserError
from geopose_dist.model import depthwise, loss, weights
from geopose_dist.model.city_spread import CitySpread
from geopose_dist.model.inputs import city_numbers
from geopose_dist.model.pretrained import read_state
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.runtime import choose_device
from geopose_dist.train import guard
from geopose_dist.train.recipe import ReplayRecipe, TrainRecipe
from geopose_dist.train.step import DTYPES, seed_dropout, targets_of


@dataclass
class Findings:
    """What one micro-batch showed.

    Attributes:
        keys: its tiles.
        terms: float32 [B, len(loss.TERMS)], each tile's numerators.
        value: the loss over these tiles.
        forward: names of modules whose output was not finite, in the order of computing.
        backward: names of modules at whose output the gradient was not finite, in the order of computing it.
        parameters: names of parameters whose gradient was not finite.
    """

    keys: list[str]
    terms: Tensor
    value: float
    forward: list[str]
    backward: list[str]
    parameters: list[str]


def run(recipe: ReplayRecipe) -> None:
    """Print the findings for every batch (UserError for a folder that holds none)."""
    for path in recipe.batch:
        folder = find_batch(path)
        ranks = (
            sorted(folder.glob("rank-*.json"))
            if recipe.rank is None
            else [folder / f"rank-{recipe.rank}.json"]
        )
        for told in ranks:
            if not told.is_file():
                raise UserError(f"{told}: not found; there is none of rank {recipe.rank} in {folder}")
            show(told, recipe, folder)


def find_batch(path: Path) -> Path:
    """The folder of a saved step that `path` means: itself, or the newest of a run folder (UserError)."""
    if any(path.glob("rank-*.json")):
        return path
    found = sorted(
        folder for folder in (path / guard.FOLDER).glob("step-*") if any(folder.glob("rank-*.json"))
    )
    if not found:
        raise UserError(
            f"{path}: no batch was saved there; wanted RUN/{guard.FOLDER}/step-NNNNNNNN, or a run folder that has one"
        )
    return found[-1]


def show(told: Path, recipe: ReplayRecipe, folder: Path) -> None:
    """Replay one rank's micro-batches and print what was found."""
    try:
        facts = json.loads(told.read_bytes())
        batches = read_batches(told, facts)
        trained = config.load_dict(TrainRecipe, facts["recipe"], where=str(told))
        step, cities = int(facts["step"]), list(facts["cities"])
        numbers = [int(one["micro_batch"]) for one in facts["batches"]]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{told}: not a batch that training saved ({error!r}); name another one") from error
    net, _ = weights.load_net(recipe.checkpoint or folder / weights.MODEL_NAME)
    bad = [name for name, value in net.state_dict().items() if not torch.isfinite(value.float()).all()]
    print(f"{told.with_suffix('')}: step {step + 1}, {sum(map(len, batches))} tiles")
    print(f"weights that are not finite: {listed(bad)}")
    for number, batch in zip(numbers, batches, strict=True):
        found = replay(net, trained, batch, cities, step, number, recipe)
        print_findings(number, found, trained)


def read_batches(told: Path, facts: dict[str, Any]) -> list[Batch]:
    """The micro-batches that `guard.save` wrote."""
    tensors = read_state(told.with_suffix(".safetensors"))
    batches = []
    for i, one in enumerate(facts["batches"]):
        told_of: dict[str, Any] = {name: tensors[f"{i}.{name}"] for name in guard.TENSORS}
        told_of |= {name: one[name] for name in ("keys", "positions", "visits")}
        batches.append(Batch(**told_of))
    return batches


def replay(
    net: GeoposeNet,
    trained: TrainRecipe,
    batch: Batch,
    cities: list[str],
    step: int,
    number: int,
    recipe: ReplayRecipe,
) -> Findings:
    """Forward and backward pass of one micro-batch, watched module by module."""
    device = choose_device(recipe.device)
    precision = recipe.precision or trained.precision
    net = net.to(device).train()
    if trained.channels_last:
        net.to(memory_format=torch.channels_last)
    if device.type == "cpu" and precision == "bf16":
        depthwise.keep_float32(net)
    batch = to_device(batch, device)
    targets = CitySpread(trained.loss, cities, device).describe(targets_of(batch), batch.city)
    city = city_numbers(net.recipe.cities, cities).to(device)[batch.city]
    seed_dropout(trained.seed, step, number)
    net.zero_grad()
    dtype = DTYPES[precision]
    with watched(net) as (forward, backward):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            prediction = net(batch.rgb, batch.gsd_m, targets.inside, city)
        numerators = loss.numerators(trained.loss, prediction, targets)
        value, _ = loss.combine(trained.loss, numerators, loss.denominators(trained.loss, targets))
        torch.autograd.backward(value)
    parameters = [
        name for name, p in net.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()
    ]
    terms = loss.per_tile(trained.loss, prediction, targets).cpu()
    return Findings(batch.keys, terms, value.item(), forward, backward, parameters)


@contextlib.contextmanager
def watched(net: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """Names of the modules whose outputs, and whose outputs' gradients, are not finite while the block runs.

    Leaf modules only, each in the order of its pass. Hooks on tensors instead of modules bear in-place layers.
    """
    forward: list[str] = []
    backward: list[str] = []

    def look(name: str) -> Any:
        def after_forward(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                note(forward, name, output)
                if output.requires_grad:
                    output.register_hook(lambda g: note(backward, name, g))  # type: ignore[no-untyped-call]

        return after_forward

    def note(found: list[str], name: str, values: Tensor) -> None:
        if not torch.isfinite(values).all():
            found.append(name)

    leaves = [(name, module) for name, module in net.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        yield forward, backward
    finally:
        for handle in handles:
            handle.remove()


def print_findings(number: int, found: Findings, trained: TrainRecipe) -> None:
    """One micro-batch's findings as text on stdout."""
    on = [name for name, weight in loss.weights(trained.loss).items() if weight > 0]
    columns = [loss.TERMS.index(name) for name in on]
    width = max([len("tile"), *map(len, found.keys)])
    print(f"\nmicro-batch {number}: loss {found.value:.6g} over its own labels; sums of each tile's terms:")
    print("  ".join([f"{'tile':<{width}}", *(f"{name:>11}" for name in on)]))
    for key, row in zip(found.keys, found.terms[:, columns].tolist(), strict=True):
        mark = "" if all(math.isfinite(value) for value in row) else "  <- not finite"
        print("  ".join([f"{key:<{width}}", *(f"{value:>11.5g}" for value in row)]) + mark)
    print(f"outputs that are not finite, first to last: {listed(found.forward)}")
    print(f"gradients of outputs that are not finite, from the loss back: {listed(found.backward)}")
    print(f"parameters whose gradient is not finite: {listed(found.parameters)}")


def listed(names: list[str], most: int = 5) -> str:
    """The first few of `names`."""
    if not names:
        return "none"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
