"""What a recipe may get wrong: one sentence that names it, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import runs

TWO = ("--length=1 steps", "--data.global-batch=2", "--data.micro-batch=2")


def refused(
    shards: Path, out: Path, options: list[str], sentences: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.train(shards, out, *TWO, *options) == 2
    said = capsys.readouterr().err
    for sentence in sentences:
        assert sentence in said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        (["--optim.learning-rate=1e-3"], ["optim.learning_rate"]),
        (["--optim.lrr=3"], ["Did you mean", "optim.lr"]),
        (["--optim.lr=fast"], ["optim.lr", "float", "fast"]),
        (["--optim.lr=-1"], ["optim.lr is -1.0"]),
        (["--optim.layer-decay=0"], ["optim.layer_decay is 0.0"]),
        (["--loss.agl=l1"], ["loss.agl", "batch_r2", "l1"]),
        (["--loss.agl-weight=-1"], ["loss.agl_weight is -1.0"]),
        (["--loss.focal-gamma=0.1"], ["loss.focal_gamma is 0.1"]),
        (["--data.global-batch=5", "--data.micro-batch=2"], ["global_batch", "5", "2"]),
        (["--data.crop-px=4096"], ["4096", "64"]),
        (["--data.samples=100"], ["data.samples is 100", "has 12"]),
        (["--data.samples=-1"], ["samples is -1"]),
        (['--data.city-weights={"XYZ": 1}'], ["XYZ", "ARG, ATL, JAX, OMA"]),
        (["--data.train-split=tren"], ["tren", "train"]),
        (["--model.encoder=resnet43"], ["resnet34"]),
        (["--model.encoder=tu-resnet18.nonsense"], ["tu-resnet18.a1_in1k"]),
        (["--model.encoder=tu-vit_base_patch16_224"], ["cannot be built as the encoder of a U-Net"]),
        (["--model.weights=absent.safetensors"], ["absent.safetensors: no such file"]),
        (["--model.weights=package"], ["tu-tf_efficientnet_lite0", "tu-mobilenetv3_small_050"]),
        (["--model.decoder-channels=[8,8]"], ["decoder_channels", "five"]),
        (["--model.scale=least_squares"], ["model.magnitude separate"]),
        (["--model.direction=pooled", "--model.direction-confidence=true"], ["model.direction edges"]),
        (["--validation.patience=-1"], ["validation.patience is -1"]),
        (["--on-nonfinite=ignore"], ["on_nonfinite", "skip"]),
        (["--init-from=nowhere"], ["nowhere", "no checkpoint there"]),
        (["--length=soon"], ["3000 steps"]),
        (["--config=train/bass"], ["train/base"]),
    ],
)
def test_a_mistake_is_one_sentence(
    options: list[str],
    sentences: list[str],
    train_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused(train_shards, tmp_path / "run", options, sentences, capsys)


def test_a_recipe_file_with_a_typo_or_a_wrong_type(
    train_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    for text, sentences in (
        ("model: {enconder: resnet18}\n", ["enconder", "encoder"]),
        ("optim: fast\n", ["optim", "fast"]),
        ("data: {workers: two}\n", ["data.workers", "two"]),
        ("model: [\n", ["mine.yaml"]),
    ):
        path.write_text(text)
        refused(train_shards, tmp_path / "run", [f"--config={path}"], sentences, capsys)


def test_gpu_that_is_not_there(
    train_shards: Path, tmp_path: Path, no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(train_shards, tmp_path / "run", ["--device=cuda"], ["GPU", "--device cpu"], capsys)


def test_shards_of_another_schema(
    train_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(train_shards, tmp_path / "shards")
    path = tmp_path / "shards" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    refused(tmp_path / "shards", tmp_path / "run", [], ["schema 99", "reads 1"], capsys)


@pytest.mark.slow
def test_checkpoint_of_another_model(
    train_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert runs.train(train_shards, other, *TWO, "--model.decoder-channels=[8,8,8,8,8]") == 0
    capsys.readouterr()
    refused(train_shards, tmp_path / "run", [f"--init-from={other}"], ["weights of another model"], capsys)
    assert runs.train(train_shards, other, *TWO) == 2
    assert "decoder_channels: the run has [8, 8, 8, 8, 8], the recipe says" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_itself_says_the_same(
    train_shards: Path, tmp_path: Path, geopose: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    words = runs.words(train_shards, tmp_path / "run", *TWO, "--model.encoder=resnet43")
    done = geopose(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("geopose train: model.encoder 'resnet43'")
    assert len(done.stderr.strip().splitlines()) == 1


def early(shards: Path, out: Path, *options: str) -> list[int]:
    """Steps of the validations of a run that ends after two without a better score."""
    words = (
        "--length=20 epochs", "--data.samples=2", "--data.global-batch=2", "--data.micro-batch=2", "--optim.lr=1e-30",
        "--validation.every-epochs=1", "--model.decoder-norm=none", *options,
    )  # fmt: skip
    assert runs.train(shards, out, *words) == 0
    return [line["step"] for line in runs.lines(out, "validation")]


@pytest.mark.slow
def test_a_run_that_gets_no_better_ends_early_and_stays_done(
    train_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without weight decay and at a rate of nothing only running buffers move, so scores stop rising soon."""
    run, still = tmp_path / "run", ("--optim.weight-decay=0", "--validation.patience=2")
    steps = early(train_shards, run, *still)
    assert 3 <= len(steps) < 20
    assert "ended early: no better score in 2 validations" in capsys.readouterr().err
    assert json.loads((run / "state.json").read_text())["status"] == "done"
    scores = [line["r2"] for line in runs.lines(run, "validation")]
    assert max(scores[:-2]) >= max(scores[-2:])
    before = (run / "metrics.jsonl").read_bytes()
    assert early(train_shards, run, *still) == steps
    assert "nothing to do" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before
    # More patience is a change that needs no permission: the run goes on where it ended.
    assert len(early(train_shards, run, "--optim.weight-decay=0", "--validation.patience=3")) > len(steps)
