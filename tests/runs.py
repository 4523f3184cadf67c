"""Tiny training runs for tests: shards of 64 px tiles, the smallest encoder, real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiles import make_dataset
from torch import Tensor

from geopose_dist import cli, config
from geopose_dist.train.recipe import TrainRecipe
from shards.pack import PackRecipe
from shards.pack import run as pack

ROOT = Path(__file__).resolve().parents[1]

TINY = (
    "--model.encoder=tu-mobilenetv3_small_050",
    "--model.decoder-channels=[16,16,8,8,8]",
    "--device=cpu",
    "--precision=fp32",
    "--data.workers=0",
    "--log-every=1",
    "--optim.warmup-steps=2",
    "--augment.preset=dihedral",
)

PLAIN = (
    "--length=20 steps", "--data.global-batch=2", "--data.micro-batch=1", "--augment.preset=benchmark",
    "--checkpoint.every-steps=2",
)  # fmt: skip
"""20 steps that the fixture `undisturbed` took on two ranks."""


def words(shards: Path, out: Path, *options: str) -> list[str]:
    """The words of a tiny `geopose train`."""
    return ["train", *TINY, f"--data.shards={shards}", f"--out={out}", *options]


def train(shards: Path, out: Path, *options: str) -> int:
    """A tiny `geopose train` in this process; its exit code."""
    return cli.main(words(shards, out, *options))


def recipe(shards: Path, *options: str) -> TrainRecipe:
    """The recipe of a tiny run."""
    return config.parse(TrainRecipe, words(shards, Path("unused"), *options)[1:], prog="test", description="")


def launch(command: list[str], ranks: int, *options: str, **variables: str) -> subprocess.Popen[str]:
    """Start `geopose COMMAND` alone, or on `ranks` ranks by torchrun with `options`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
    return python(*(torchrun if ranks > 1 else []), "-m", "geopose_dist", *command, **variables)


def python(*command: str, **variables: str) -> subprocess.Popen[str]:
    """Start this interpreter with `command` and `variables` in its environment."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # One thread, as each of two ranks has on two cores: more would sum in another order.
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )


def rank_processes(torchrun: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of the ranks that torchrun started, by rank, from /proc."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == torchrun.pid:
                words = (folder / "environ").read_bytes().split(b"\0")
                found |= {int(word[5:]): int(folder.name) for word in words if word.startswith(b"RANK=")}
        except (OSError, IndexError):
            continue  # a process that has just ended
    return found


def logged(run: Path) -> int:
    """Lines of metrics so far."""
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def finish(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str]:
    """Exit code and all output of a process."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out + err


def lines(run: Path, kind: str = "metrics") -> list[dict[str, Any]]:
    """Objects of metrics.jsonl or validation.jsonl."""
    return [json.loads(line) for line in (run / f"{kind}.jsonl").read_text().splitlines()]


def numbers(run: Path) -> list[dict[str, float]]:
    """Metrics without what the clock and the machine decide."""
    timed = ("tiles_per_s", "data_wait_share", "memory_gib")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines(run)]


def final_weights(run: Path, name: str = "model") -> dict[str, Tensor]:
    """Tensors of the newest checkpoint."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / f"{name}.safetensors")


def assert_same_weights(first: Path, second: Path, *, buffers: bool = True) -> None:
    """Bit for bit; running buffers of BatchNorm depend on how a batch was cut."""
    one, two = final_weights(first), final_weights(second)
    assert one.keys() == two.keys()
    for name in one:
        if buffers or not ("running" in name or "num_batches" in name):
            assert torch.equal(one[name], two[name]), name


def make_shards(folder: Path) -> Path:
    """12 tiles to learn from, of which two know no height, and 4 to validate on, in real shards."""
    keys = make_dataset(folder / "tiles", 16)
    for key in keys[2:4]:
        (folder / "tiles" / "train" / f"{key}_AGL.tif").unlink()
    table = folder / "tiles" / "geopose_train.csv"
    text = table.read_text()
    for key in keys[2:4]:
        text = text.replace(f"{key}_AGL.tif", "")
    table.write_text(text)
    (folder / "split.json").write_text(json.dumps({"train": keys[:12], "val": keys[12:]}))
    pack(
        PackRecipe(
            source=str(folder / "tiles"),
            out=str(folder / "shards"),
            split=str(folder / "split.json"),
            reduce=1,
        )
    )
    return folder / "shards"


def stop_after(run: Path, step: int) -> threading.Thread:
    """Send this process a real SIGTERM once the run has logged `step`."""

    def watch() -> None:
        for _ in range(6000):
            if (run / "metrics.jsonl").exists() and len(
                (run / "metrics.jsonl").read_text().splitlines()
            ) >= step:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def wait_until(
    ready: Callable[[], bool], process: Any, timeout_s: float = 240, pause_s: float = 0.02
) -> None:
    """Poll until `ready`, or fail with the process's output if it ended first."""
    end = time.monotonic() + timeout_s
    while not ready():
        assert process.poll() is None, finish(process)[1]
        assert time.monotonic() < end, "timed out"
        time.sleep(pause_s)
