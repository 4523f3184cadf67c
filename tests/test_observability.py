"""What a run shows: image panels after validation, and a profiler's trace on request."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from geopose_dist.data.manifest import open_split
from geopose_dist.data.reader import Reader
from geopose_dist.evaluate.pictures import UNKNOWN
from geopose_dist.geometry import Pose
from geopose_dist.train import panels

TWO = ("--data.global-batch=2", "--data.micro-batch=2")


def board(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    return found


def test_tensorboard_shows_the_same_tiles_after_every_validation(train_shards: Path, tmp_path: Path) -> None:
    options = (
        "--length=2 epochs",
        "--data.samples=2",
        "--validation.every-epochs=1",
        "--validation.panels=2",
    )
    assert runs.train(train_shards, tmp_path / "run", *TWO, *options) == 0
    shown = board(tmp_path / "run")
    reader = Reader(open_split(train_shards, "val"))
    assert sorted(shown.Tags()["images"]) == [
        f"validation/0-{reader.key(0)}",
        f"validation/1-{reader.key(3)}",
    ]
    for tag in shown.Tags()["images"]:
        images = shown.Images(tag)
        assert [image.step for image in images] == [1, 2]
        assert (images[0].width, images[0].height) == (4 * 320, 320)
    assert "validation/r2" in shown.Tags()["scalars"]


def test_panels_change_no_number_and_may_be_left_out(train_shards: Path, tmp_path: Path) -> None:
    options = ("--length=2 steps", "--data.samples=2", "--validation.every-epochs=1", "--model.dropout=0.2")
    for name, count in (("with", 3), ("without", 0)):
        words = (*TWO, *options, f"--validation.panels={count}")
        assert runs.train(train_shards, tmp_path / name, *words) == 0
    assert runs.numbers(tmp_path / "with") == runs.numbers(tmp_path / "without")
    assert board(tmp_path / "without").Tags()["images"] == []


def test_a_panel_holds_picture_truth_prediction_and_error(train_shards: Path) -> None:
    view = Reader(open_split(train_shards, "val")).view(0)
    assert view.agl_m is not None
    agl_m = np.full_like(view.agl_m, 3.0)
    row = panels.panel(view, agl_m, Pose(1.0, 0.5))
    picture, truth, predicted, error = np.split(row, 4, axis=1)
    assert picture.shape == (320, 320, 3)
    # Each of the four is the tile enlarged five times; look at the middle of one of its pixels.
    middle = np.argwhere(np.isnan(view.agl_m))[0] * 5 + 2
    assert tuple(truth[tuple(middle)]) == tuple(error[tuple(middle)]) == UNKNOWN
    assert len(np.unique(predicted.reshape(-1, 3), axis=0)) == 1
    # Where the prediction is too high the error is red, on a tall roof it is blue.
    low, tall = (
        np.unravel_index(at, agl_m.shape) for at in (np.nanargmin(view.agl_m), np.nanargmax(view.agl_m))
    )
    too_high, too_low = (error[tuple(np.array(at) * 5 + 2)].astype(int) for at in (low, tall))
    assert too_high[0] > too_high[2]
    assert too_low[2] > too_low[0]
    unlabelled = dataclasses.replace(view, agl_m=None, scale_px_per_m=None, angle_rad=None)
    assert panels.panel(unlabelled, agl_m, Pose(1.0, 0.5)).shape == (320, 640, 3)


@pytest.mark.slow
def test_profile_traces_steps_five_to_ten(train_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert runs.train(train_shards, run, *TWO, "--length=11 steps", "--profile") == 0
    trace = json.loads(gzip.decompress((run / "profile" / "rank-0.json.gz").read_bytes()))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    assert steps == {f"ProfilerStep#{number - 1}" for number in range(5, 11)}  # it counts from 0
    assert any("convolution" in name for name in names)
    plain = tmp_path / "plain"
    assert runs.train(train_shards, plain, *TWO, "--length=11 steps") == 0
    assert not (plain / "profile").exists()
    assert runs.numbers(run) == runs.numbers(plain)


@pytest.mark.slow
def test_a_start_too_short_to_profile_says_so(
    train_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.train(train_shards, tmp_path / "run", *TWO, "--length=2 steps", "--profile") == 0
    assert "no trace: --profile looks at steps 5 to 10" in capsys.readouterr().err
