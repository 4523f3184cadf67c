"""Predicting again and stopping: plans, overwriting, signals, orphans, and what is said when much goes wrong."""

import os
import signal
from pathlib import Path

import pytest
from jobs import children, outputs, predict, save_tiny_net, start, wait_until_gone, write_tiles
from runs import wait_until

from geopose_dist import cli
from geopose_dist.infer import driver
from geopose_dist.infer.driver import not_here

INLINE = ("--dispatch", "inline")


def test_a_dry_run_tells_and_writes_nothing(
    tiles: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert predict(tiles, checkpoint, out, "--dry-run", "true") == 0
    assert (
        "7 tiles from JAX_tile00 to JAX_tile06; 0 are finished, 7 to do in 4 batches"
        in capsys.readouterr().out
    )
    assert not out.exists()
    assert predict(tiles, checkpoint, out, *INLINE, "--limit", "3") == 0
    assert "predict: 3 tiles, 0 of them finished; starting actors" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert predict(tiles, checkpoint, out, "--dry-run", "true") == 0
    assert "3 are finished, 4 to do in 3 batches" in capsys.readouterr().out
    assert predict(tiles, save_tiny_net(tmp_path / "b.safetensors", seed=1), out, "--dry-run", "true") == 2
    assert "other checkpoints" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_overwriting_that_was_cut_short_leaves_nothing_of_the_other_network(
    tiles: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other, out = save_tiny_net(tmp_path / "b.safetensors", seed=1), tmp_path / "out"
    assert predict(tiles, other, tmp_path / "wanted", *INLINE) == 0
    assert predict(tiles, checkpoint, out, *INLINE) == 0
    assert predict(tiles, other, out, *INLINE, "--limit", "2", "--overwrite", "true") == 0
    assert len(outputs(out)) == 4  # those of the first network are gone: nobody could tell them from new ones
    assert predict(tiles, other, out, *INLINE) == 0
    assert outputs(out) == outputs(tmp_path / "wanted")
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "ARG_x_AGL.tif").write_bytes(b"somebody's labels")
    capsys.readouterr()
    assert predict(tiles, other, labels, *INLINE, "--overwrite", "true") == 2
    assert "ARG_x_AGL.tif: of unknown origin" in capsys.readouterr().err
    assert (labels / "ARG_x_AGL.tif").read_bytes() == b"somebody's labels"


def test_tiles_reduced_otherwise_than_in_training_are_refused_before_anything_starts(
    train_shards: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = [str(checkpoint), str(save_tiny_net(tmp_path / "b.safetensors", reduction=4))]
    words = ["--source", str(train_shards), "--split", "val", "--out", str(tmp_path / "out"), *INLINE]
    assert cli.main(["predict", *words, "--checkpoint", *both]) == 2
    assert "trained at different reductions" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_many_failures_are_counted_on_the_terminal_and_listed_in_the_file(
    tiles: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(driver, "TOLD", 2)
    for i in range(4):
        (tiles / f"JAX_tile0{i}_RGB.tif").write_bytes(b"no image")
    assert predict(tiles, checkpoint, tmp_path / "out", *INLINE) == 1
    said = capsys.readouterr()
    assert "3 of 7 tiles predicted" in said.out
    assert "4 of 7 tiles failed" in said.err
    assert "JAX_tile01" in said.err
    assert "JAX_tile02" not in said.err
    assert "... and 2 more" in said.err
    assert len((tmp_path / "out" / ".geopose-predict" / "failures.jsonl").read_text().splitlines()) == 4


def test_tiles_written_on_another_machines_disk_are_missed(tmp_path: Path) -> None:
    (tmp_path / "A_AGL.tif").touch()
    ((key, sentence),) = not_here(tmp_path, ["A", "B"], patience_s=0)
    assert key == "B"
    assert "--out is to be a folder that all share" in sentence
    assert not_here(tmp_path, ["A"]) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "number"),
    [("process", signal.SIGTERM), pytest.param("ray", signal.SIGUSR2, marks=pytest.mark.soak)],
)
def test_a_batch_systems_signal_ends_a_job_with_75_and_it_goes_on(
    kind: str,
    number: int,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    source, out, log = tmp_path / "tiles", tmp_path / "out", tmp_path / "log"
    write_tiles(source, 300)
    first = start(source, checkpoint, out, log, "--dispatch", kind)
    wait_until(lambda: len(list(out.glob("*_AGL.tif"))) >= 6, first)
    workers = children(first.pid)
    os.kill(first.pid, number)
    assert first.wait(timeout=60) == 75, log.read_text()
    assert "what is finished is kept; run the same command again" in log.read_text()
    assert "Traceback" not in log.read_text()
    done = len(list(out.glob("*_AGL.tif")))
    assert done < 300
    wait_until_gone(workers)
    second = start(source, checkpoint, out, log, "--dispatch", kind)
    assert second.wait(timeout=300) == 0, log.read_text()
    assert len(outputs(out)) == 600
