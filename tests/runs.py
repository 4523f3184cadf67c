"""Tiny training runs for tests: shards of 64 px tiles, the smallest encoder, real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

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


def words(shards: Path, out: Path, *options: str) -> list[str]:
    """The words of a tiny `geopose train`."""
    return ["train", *TINY, f"--data.shards={shards}", f"--out={out}", *options]


def launch(command: list[str], ranks: int) -> subprocess.Popen[str]:
    """Start `geopose COMMAND` alone, or on `ranks` ranks by torchrun."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    )
    return subprocess.Popen(
        [sys.executable, *torchrun, "-m", "geopose_dist", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # One thread, as each of two ranks has on two cores: more would sum in another order.
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str]:
    """Exit code and all output of a process."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out + err


def lines(run: Path, kind: str = "metrics") -> list[dict[str, Any]]:
    """Objects of metrics.jsonl or validation.jsonl."""
    return [json.loads(line) for line in (run / f"{kind}.jsonl").read_text().splitlines()]


def numbers(run: Path) -> list[dict[str, float]]:
    """Metrics without what the clock decides."""
    timed = ("tiles_per_s", "data_wait_share")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines(run)]


def final_weights(run: Path, name: str = "model") -> dict[str, Tensor]:
    """Tensors of the newest checkpoint."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / f"{name}.safetensors")
