"""GSD, city and running city spread in whole runs: exact over restarts and ranks, and at hand in prediction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from tiles import make_dataset

from geopose_dist import cli
from geopose_dist.infer.predictor import Predictor
from geopose_dist.infer.recipe import NetRecipe
from geopose_dist.model import weights
from geopose_dist.model.recipe import ModelRecipe
from geopose_dist.model.unet import GeoposeNet

TOLD = (
    "--model.gsd-input=true", "--model.city-input=true", "--model.input-dropout=0.5", "--loss.city-spread=running",
    "--loss.agl=r2", "--loss.magnitude=batch_r2", "--loss.focal-weight=0.05", "--loss.normal-weight=0.1",
    "--loss.gradient-weight=0.1", "--loss.flow-weight=0.1",
)  # fmt: skip


@pytest.mark.slow
def test_hidden_inputs_and_running_spread_survive_a_stop_bit_for_bit(
    train_shards: Path, tmp_path: Path
) -> None:
    options = ("--length=6 steps", "--data.global-batch=4", "--data.micro-batch=2", *TOLD)
    assert runs.train(train_shards, tmp_path / "whole", *options) == 0
    watcher = runs.stop_after(tmp_path / "cut", 2)
    assert runs.train(train_shards, tmp_path / "cut", *options) == 75
    watcher.join()
    assert runs.train(train_shards, tmp_path / "cut", *options) == 0
    assert runs.numbers(tmp_path / "cut") == runs.numbers(tmp_path / "whole")
    sums = [newest_training(tmp_path / name)["city_sums"] for name in ("whole", "cut")]
    assert torch.equal(*sums)
    assert sums[0][:, 0].min() > 2**16  # every city's labels were counted beyond the start
    whole, cut = runs.final_weights(tmp_path / "whole"), runs.final_weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert any(name.startswith("inputs.city") for name in whole)
    facts = weights.load_net(tmp_path / "whole")[1]
    assert facts["gsd_known"] is True


def newest_training(run: Path) -> dict[str, torch.Tensor]:
    folder = sorted((run / "checkpoints").glob("step-*"))[-1]
    found: dict[str, torch.Tensor] = torch.load(folder / "training.pt", weights_only=True)
    return found


@pytest.mark.slow
def test_two_ranks_are_one_rank_with_two_accumulations_with_every_term(
    train_shards: Path, tmp_path: Path
) -> None:
    options = ("--length=8 steps", "--data.global-batch=2", "--data.micro-batch=1", *TOLD)
    for name, ranks in (("one", 1), ("two", 2)):
        code, said = runs.finish(runs.launch(runs.words(train_shards, tmp_path / name, *options), ranks))
        assert code == 0, said
    one, two = runs.numbers(tmp_path / "one"), runs.numbers(tmp_path / "two")
    for alone, shared_out in zip(one, two, strict=True):
        assert shared_out["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    first, second = runs.final_weights(tmp_path / "one"), runs.final_weights(tmp_path / "two")
    learned = [name for name in first if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(first[name], second[name]) for name in learned)
    sums = [newest_training(tmp_path / name)["city_sums"] for name in ("one", "two")]
    torch.testing.assert_close(*sums, rtol=1e-14, atol=0)


def city_net() -> GeoposeNet:
    torch.manual_seed(0)
    net = GeoposeNet(
        ModelRecipe(
            encoder="tu-mobilenetv3_small_050", decoder_channels=[16, 16, 8, 8, 8], city_input=True, gsd_input=True,
            cities=["ARG", "JAX"], height_mean_m=5.0, height_unit_m=5.0, scale_mean_px_per_m=0.5,
        )
    )  # fmt: skip
    torch.nn.init.normal_(net.inputs.out.weight)
    torch.nn.init.normal_(net.scale.linear.weight, std=0.005)
    return net


def test_prediction_tells_the_network_the_city_in_each_slot() -> None:
    net, batch = city_net(), 3
    predictor = Predictor.of_nets([net], [{"gsd_known": True}], NetRecipe(), batch=batch)
    rgb = np.full((64, 64, 3), 90, np.uint8)

    def scales(cities: list[str | None] | None, slots: list[int]) -> list[float]:
        poses = predictor.predict([rgb] * len(slots), [0.4] * len(slots), slots=slots, cities=cities)
        return [pose.scale_px_per_m for pose in poses if pose is not None]

    arg, jax, other = scales(["ARG", "JAX", "XYZ"], [0, 1, 2])
    assert len({arg, jax, other}) == 3
    assert scales(None, [2]) == [other]
    assert scales([None], [1]) == [pytest.approx(other)]
    assert scales(["JAX", "ARG"], [0, 2]) == [pytest.approx(jax), pytest.approx(arg)]


def test_the_predict_command_takes_the_city_from_the_tiles_names(tmp_path: Path) -> None:
    """The same picture under three names: two known cities and one that the network never heard of."""
    net = city_net()
    weights.save_weights(tmp_path / "net.safetensors", net.state_dict(), net.recipe, {"reduction": 1})
    (tmp_path / "tiles").mkdir()
    key = make_dataset(tmp_path / "made", 1)[0]
    picture = (tmp_path / "made" / "train" / f"{key}_RGB.j2k").read_bytes()
    for name in ("ARG_a", "JAX_a", "XYZ_a", "XYZ_b"):
        (tmp_path / "tiles" / f"{name}_RGB.j2k").write_bytes(picture)
    words = [
        "predict",
        "--source",
        str(tmp_path / "tiles"),
        "--checkpoint",
        str(tmp_path / "net.safetensors"),
    ]
    words += ["--out", str(tmp_path / "out"), "--dispatch", "inline", "--device", "cpu", "--batch", "1"]
    assert cli.main(words) == 0
    scale = {
        name: json.loads((tmp_path / "out" / f"{name}_VFLOW.json").read_text())["scale"]
        for name in ("ARG_a", "JAX_a", "XYZ_a", "XYZ_b")
    }
    assert scale["XYZ_a"] == scale["XYZ_b"]
    assert len(set(scale.values())) == 3
