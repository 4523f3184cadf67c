"""Checkpoints: whole or absent whatever happens, written in the background, refused before any work."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch

from geopose_dist.data.recipe import DataRecipe
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.errors import UserError
from geopose_dist.model import weights
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.train import checkpoint
from geopose_dist.train.checkpoint import Progress, Snapshot
from geopose_dist.train.recipe import CheckpointRecipe, DdpRecipe, TrainRecipe
from geopose_dist.train.saving import Writer

SMALL = ("--data.global-batch=2", "--data.micro-batch=2")


class Gate:
    """Stands before `checkpoint.save`: a write begins, waits for `open`, and goes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Semaphore(0), threading.Semaphore(0)
        real = checkpoint.save

        def save(*arguments: Any) -> Path:
            self.reached.release()
            assert self.open.acquire(timeout=30)
            return real(*arguments)

        monkeypatch.setattr(checkpoint, "save", save)


def snapshot(value: float) -> Snapshot:
    tensor = torch.full((4, 3), value)
    state = {
        "state": {0: {"exp_avg": tensor.clone(), "step": torch.tensor(value)}},
        "param_groups": [{"lr": 0.1}],
    }
    sums = torch.full((2, 3), value, dtype=torch.float64)
    return Snapshot({"weight": tensor}, state, {"scale": value}, {"weight": tensor + 1}, city_sums=sums)


def test_what_is_written_is_the_moment_of_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on and changes every tensor before the thread has written the first byte."""
    gate = Gate(monkeypatch)
    writer = Writer(tmp_path, TrainRecipe())
    now = snapshot(1.0)
    writer.save(Progress(step=1), now, wait=False)
    assert gate.reached.acquire(timeout=30)
    now.model["weight"].zero_()
    now.optimizer["state"][0]["exp_avg"].zero_()
    assert now.ema is not None
    now.ema["weight"].zero_()
    assert now.city_sums is not None
    now.city_sums.zero_()
    assert weights.step_folders(tmp_path) == []
    gate.open.release()
    writer.finish()
    (folder,) = weights.step_folders(tmp_path)
    stored, wanted = checkpoint.load(folder), snapshot(1.0)
    assert stored.ema is not None
    assert wanted.ema is not None
    assert torch.equal(stored.model["weight"], wanted.model["weight"])
    assert torch.equal(stored.ema["weight"], wanted.ema["weight"])
    assert torch.equal(stored.optimizer["state"][0]["exp_avg"], wanted.optimizer["state"][0]["exp_avg"])
    assert stored.optimizer["param_groups"] == [{"lr": 0.1}]
    assert stored.scaler == {"scale": 1.0}
    assert stored.city_sums is not None
    assert wanted.city_sums is not None
    assert torch.equal(stored.city_sums, wanted.city_sums)


def test_one_save_is_in_flight_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    writer = Writer(tmp_path, TrainRecipe())
    writer.save(Progress(step=1), snapshot(1.0), wait=False)
    second = threading.Thread(
        target=writer.save, args=(Progress(step=2), snapshot(2.0)), kwargs={"wait": True}
    )
    second.start()
    assert gate.reached.acquire(timeout=30)
    assert not gate.reached.acquire(timeout=0.2)  # the second has not begun
    gate.open.release(2)
    second.join(30)
    assert [checkpoint.read_progress(folder).step for folder in weights.step_folders(tmp_path)] == [1, 2]


def test_the_writers_error_is_raised_at_the_next_look(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder must be")
    writer = Writer(tmp_path, TrainRecipe())
    writer.check()  # nothing was written: nothing is wrong
    writer.save(Progress(step=1), snapshot(1.0), wait=False)
    writer.close()
    with pytest.raises(OSError, match="checkpoints"):
        writer.check()
    writer.check()  # told once


@pytest.mark.parametrize("asynchronous", [True, False])
def test_full_disk_ends_the_run_in_one_sentence(
    train_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    asynchronous: bool,
) -> None:  # fmt: skip
    """As a disk does it: the first checkpoint fits, the second does not; the first one is there to go on from."""
    real = weights.save_weights

    def save_weights(path: Path, *rest: Any) -> None:
        if "step-00000002" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, *rest)

    monkeypatch.setattr(weights, "save_weights", save_weights)
    options = ("--length=40 steps", *SMALL, "--checkpoint.every-steps=1")
    out = tmp_path / "run"
    code = runs.train(train_shards, out, *options, f"--checkpoint.asynchronous={asynchronous}")
    said = capsys.readouterr().err
    assert code == 2
    assert "the disk is full while writing" in said
    assert "Traceback" not in said
    assert runs.logged(out) < 10
    assert [folder.name for folder in weights.step_folders(out)] == ["step-00000001"]


def test_too_small_a_disk_is_refused_before_any_work(
    train_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    out = tmp_path / "run"
    assert runs.train(train_shards, out, "--length=2 steps", *SMALL) == 2
    said = capsys.readouterr().err
    assert "the disk has 0.00 GiB free and checkpoints need" in said
    assert "checkpoint.keep 2" in said
    assert not out.exists()


@pytest.mark.slow
def test_the_estimated_size_is_the_size(train_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert runs.train(train_shards, out, "--length=1 steps", *SMALL, "--ema-decay=0.9") == 0
    (folder,) = weights.step_folders(out)
    net, _ = weights.load_net(folder / "model.safetensors")
    written = sum(file.stat().st_size for file in folder.iterdir())
    # Names, shapes and torch's zip of many small tensors come on top: a large share of so small a network.
    assert checkpoint.size_bytes(net, averaged=True) == pytest.approx(written, rel=0.2)
    assert checkpoint.size_bytes(net, averaged=False) < 0.8 * checkpoint.size_bytes(net, averaged=True)


def test_a_step_saved_twice_only_changes_its_score(tmp_path: Path) -> None:
    recipe = TrainRecipe()
    checkpoint.save(tmp_path, recipe, Progress(step=3), snapshot(1.0))
    folder = checkpoint.save(tmp_path, recipe, Progress(step=3, r2=0.5, use="ema"), snapshot(1.0))
    assert checkpoint.read_progress(folder) == Progress(step=3, r2=0.5, use="ema")
    assert torch.equal(checkpoint.load(folder).model["weight"], torch.ones(4, 3))


def test_leftovers_of_a_killed_run_go(tmp_path: Path) -> None:
    leftovers = [tmp_path / "checkpoints" / name for name in (".step-00000009.tmp", ".step-00000001.old")]
    for folder in leftovers:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    whole = checkpoint.save(tmp_path, TrainRecipe(), Progress(step=1), snapshot(1.0))
    assert weights.step_folders(tmp_path) == [whole]
    checkpoint.tidy(tmp_path)
    assert not any(folder.exists() for folder in leftovers)
    assert weights.step_folders(tmp_path) == [whole]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    recipe = TrainRecipe(checkpoint=CheckpointRecipe(keep=2, asynchronous=False))
    writer = Writer(tmp_path, recipe)
    for step, r2 in ((1, 0.1), (2, 0.7), (3, None), (4, 0.2), (5, None)):
        writer.save(Progress(step=step, r2=r2), snapshot(float(step)), wait=False)
    assert [checkpoint.read_progress(folder).step for folder in weights.step_folders(tmp_path)] == [2, 4, 5]


@pytest.mark.slow
def test_written_in_the_background_or_not_is_the_same(train_shards: Path, tmp_path: Path) -> None:
    options = ("--length=3 steps", *SMALL, "--checkpoint.every-steps=1", "--checkpoint.keep=9")
    for name in ("true", "false"):
        assert runs.train(train_shards, tmp_path / name, *options, f"--checkpoint.asynchronous={name}") == 0
    for one, two in zip(*(weights.step_folders(tmp_path / name) for name in ("true", "false")), strict=True):
        assert one.name == two.name
        a, b = checkpoint.load(one), checkpoint.load(two)
        assert all(torch.equal(a.model[name], b.model[name]) for name in a.model)
        for moments, same in zip(a.optimizer["state"].values(), b.optimizer["state"].values(), strict=True):
            assert all(torch.equal(moments[name], same[name]) for name in moments)


def test_a_run_from_before_a_field_goes_on(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, TrainRecipe(), Progress(step=1, fingerprint="f"), snapshot(1.0))
    state = json.loads((folder / "state.json").read_text())
    del state["recipe"]["ddp"], state["recipe"]["optim"]["clip_norm"]
    (folder / "state.json").write_text(json.dumps(state))
    checkpoint.check_same_run(folder, TrainRecipe(), "f")
    with pytest.raises(UserError, match=r"ddp\.bucket_mb: the run has 25, the recipe says 7"):
        checkpoint.check_same_run(folder, TrainRecipe(ddp=DdpRecipe(bucket_mb=7)), "f")


def test_a_run_goes_on_where_its_shards_have_moved_to(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, TrainRecipe(), Progress(step=1, fingerprint="f"), snapshot(1.0))
    elsewhere = DataRecipe(
        shards="s3://tiles/v1", store=StoreRecipe(endpoint="http://minio:9000", cache_gb=500)
    )
    checkpoint.check_same_run(folder, TrainRecipe(data=elsewhere), "f")
    with pytest.raises(UserError, match="the run has samples f, these shards are g"):
        checkpoint.check_same_run(folder, TrainRecipe(data=elsewhere), "g")


def test_weights_of_another_model_are_refused(
    train_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = runs.recipe(train_shards, "--model.decoder-channels=[8,8,8,8,8]")
    donor = tmp_path / "other.safetensors"
    weights.save_weights(donor, GeoposeNet(recipe.model).state_dict(), recipe.model, {})
    out = tmp_path / "run"
    assert runs.train(train_shards, out, "--length=2 steps", *SMALL, f"--init-from={donor}") == 2
    said = capsys.readouterr().err
    assert "weights of another model" in said
    assert str(donor) in said
    assert "Traceback" not in said
    assert not out.exists()


def test_damaged_checkpoint_is_named(
    train_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert runs.train(train_shards, out, "--length=2 steps", *SMALL) == 0
    folder = weights.step_folders(out)[-1]
    (folder / "training.pt").write_bytes((folder / "training.pt").read_bytes()[:1000])
    assert runs.train(train_shards, out, "--length=2 steps", *SMALL) == 2
    said = capsys.readouterr().err
    assert f"remove {folder} to go on from the checkpoint before it" in said


def kill_and_go_on(shards: Path, folder: Path, rounds: int, rng: np.random.Generator) -> None:
    """SIGKILL a run `rounds` times while it writes checkpoints; the newest one always loads, and the end is right."""
    length = 8 * rounds
    options = (f"--length={length} steps", *SMALL, "--checkpoint.every-steps=1", "--ema-decay=0.9")
    options += ("--validation.every-epochs=0",)
    out, root = folder / "cut", folder / "cut" / "checkpoints"
    caught = 0
    for number in range(rounds):
        process = runs.launch(runs.words(shards, out, *options), 1)
        before = newest(out)
        runs.wait_until(lambda before=before: newest(out) > before, process)  # it got somewhere
        wait = write_begins(root, int(rng.integers(1, 4)))
        runs.wait_until(wait, process, pause_s=0.0005)
        threading.Event().wait(float(rng.uniform(0, 0.02)))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        caught += any(root.glob(".step-*"))
        last = weights.step_folders(out)[-1]
        assert checkpoint.read_progress(last).step == int(last.name[5:]), number
        stored = checkpoint.load(last)
        assert stored.ema is not None
        net, _ = weights.load_net(last / "model.safetensors")
        assert all(torch.isfinite(value).all() for value in net.state_dict().values())
    print(f"{caught} of {rounds} kills left a half-written checkpoint")
    code, said = runs.finish(runs.launch(runs.words(shards, out, *options), 1))
    assert code == 0, said
    whole = folder / "whole"
    code, said = runs.finish(runs.launch(runs.words(shards, whole, *options), 1))
    assert code == 0, said
    assert runs.numbers(out) == runs.numbers(whole)
    for name in ("model", "ema"):
        one, two = runs.final_weights(out, name), runs.final_weights(whole, name)
        assert all(torch.equal(one[tensor], two[tensor]) for tensor in one)


def newest(run: Path) -> int:
    folders = weights.step_folders(run)
    return int(folders[-1].name[5:]) if folders else 0


def write_begins(root: Path, times: int) -> Callable[[], bool]:
    """A question that is answered yes once so many different half-written checkpoints have been seen."""
    seen: set[str] = set()

    def asked() -> bool:
        seen.update(folder.name for folder in root.glob(".step-*.tmp"))
        return len(seen) >= times

    return asked


@pytest.mark.slow
def test_killed_while_writing(train_shards: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    kill_and_go_on(train_shards, tmp_path, 1, rng)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_killed_while_writing_twenty_times(
    train_shards: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    kill_and_go_on(train_shards, tmp_path, 20, rng)
