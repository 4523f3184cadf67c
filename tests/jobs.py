"""Prediction jobs over small tiles: in this process, or in one of its own that may be killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tifffile
import torch

from geopose_dist import cli
from geopose_dist.model.recipe import ModelRecipe
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.model.weights import save_weights


def save_tiny_net(path: Path, seed: int = 0, reduction: int = 2) -> Path:
    """A network with random weights: its answers mean nothing, but are the same every time."""
    recipe = ModelRecipe(encoder="tu-mobilenetv3_small_050", decoder_channels=[16, 16, 8, 8, 8])
    torch.manual_seed(seed)
    facts = {"reduction": reduction, "gsd_known": False}
    save_weights(path, GeoposeNet(recipe).state_dict(), recipe, facts)
    return path


def write_tiles(folder: Path, count: int) -> None:
    """Small tiles of noise, the fourth of another size."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    for i in range(count):
        size = (96, 130) if i == 3 else (128, 128)
        tifffile.imwrite(
            folder / f"JAX_tile{i:02}_RGB.tif", rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        )


def predict(source: Path, checkpoint: Path, out: Path, *options: str) -> int:
    """`geopose predict` in this process; its exit code."""
    words = ["--source", str(source), "--checkpoint", str(checkpoint), "--out", str(out), "--batch", "2"]
    words += ["--device", "cpu", "--threads", "1", *options]
    return cli.main(["predict", *words])


def outputs(folder: Path) -> dict[str, bytes]:
    """What a job wrote, by name."""
    return {
        path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")
    }


def start(source: Path, checkpoint: Path, out: Path, log: Path, *options: str) -> subprocess.Popen[bytes]:
    """`geopose predict` of two workers in a process of its own, which leads a session."""
    words = ["--source", source, "--checkpoint", checkpoint, "--out", out, "--batch", "2", "--device", "cpu"]
    words += ["--threads", "1", "--workers", "2", *options]
    command = [sys.executable, "-m", "geopose_dist", "predict", *map(str, words)]
    with log.open("wb") as file:  # no pipe: orphans of a killed driver would keep it open
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)


def wait_for_files(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    """Until so many tiles are written, or the process has ended."""
    for _ in range(2400):
        if len(list(folder.glob("*_AGL.tif"))) >= count or process.poll() is not None:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {count} tiles in {folder} within two minutes")


def children(pid: int) -> list[int]:
    """Processes below `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found += [int(stat.parent.name), *children(int(stat.parent.name))]
    return found


def actor_processes(pid: int, kind: str) -> list[int]:
    """Processes under `pid` that hold a worker: Ray calls them ray::_Worker, forkserver children are bare."""
    found = []
    for child in children(pid):
        try:
            words = (Path("/proc") / str(child) / "cmdline").read_bytes()
        except OSError:
            continue
        if (b"ray::_Worker" in words) if kind == "ray" else (b"forkserver" in words):
            found.append(child)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int], timeout_s: float = 60) -> None:
    """Until none of these processes runs."""
    end = time.monotonic() + timeout_s
    while any(map(alive, pids)):
        assert time.monotonic() < end, "they still run"
        time.sleep(0.05)
