"""launch/ray on two hosts: a head, a worker, a token; the worker's host is lost in the middle of a prediction."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hosts import Host, two_hosts

from geopose_dist.model.recipe import ModelRecipe
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.model.weights import save_weights

RAY = Path(__file__).resolve().parents[1] / "launch" / "ray"
TILES = 30


def make_inputs(folder: Path) -> list[str]:
    """Tiles and a network with random weights; the words that predict them."""
    (folder / "tiles").mkdir()
    rng = np.random.default_rng(5)
    for i in range(TILES):
        tifffile.imwrite(
            folder / "tiles" / f"JAX_tile{i:03}_RGB.tif", rng.integers(0, 256, (256, 256, 3)).astype(np.uint8)
        )
    recipe = ModelRecipe(encoder="tu-mobilenetv3_small_050", decoder_channels=[16, 16, 8, 8, 8])
    torch.manual_seed(0)
    net = GeoposeNet(recipe).state_dict()
    save_weights(folder / "model.safetensors", net, recipe, {"reduction": 2, "gsd_known": False})
    words = ["--source", str(folder / "tiles"), "--checkpoint", str(folder / "model.safetensors")]
    return [
        "predict",
        *words,
        "--batch",
        "1",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--workers",
        "2",
        "--net.tta",
        "dihedral",
    ]


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*") if path.is_file()}


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def wait_for_node(node: subprocess.Popen[str]) -> None:
    """Read what a node says until it has joined."""
    assert node.stdout is not None
    said = []
    for line in node.stdout:
        said.append(line)
        if "Ray runtime started" in line:
            return
    raise AssertionError("".join(said))


@pytest.mark.multihost
@pytest.mark.slow
def test_a_lost_host_costs_no_tile_and_without_the_token_nobody_joins(tmp_path: Path) -> None:
    words, out = make_inputs(tmp_path), tmp_path / "out"
    local = [sys.executable, "-m", "geopose_dist", *words, "--dispatch", "inline"]
    subprocess.run([*local, "--out", str(tmp_path / "local")], check=True, capture_output=True)
    with tempfile.TemporaryDirectory(prefix="ray-") as temp, two_hosts() as (a, b):
        token = Path(temp) / "token"
        env = {
            "RAY_AUTH_TOKEN": "",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "TEMP_DIR": temp,
            "PYTHON": sys.executable,
            "NUM_CPUS": "1",
            "HOME": temp,
            "PYTHONUNBUFFERED": "1",
        }

        def start(host: Host, script: str, *words: str, **more: str) -> subprocess.Popen[str]:
            return host.start([str(RAY / script), *words], {**env, "NODE_ADDR": host.address, **more})

        head = start(a, "start-head.sh")
        wait_for_node(head)
        assert token.stat().st_mode & 0o777 == 0o600
        refused = start(b, "start-worker.sh", a.address, RAY_AUTH_TOKEN_PATH=f"{temp}/none")
        assert "no token in" in refused.communicate()[0]
        assert refused.returncode == 2
        worker = start(b, "start-worker.sh", a.address)
        wait_for_node(worker)
        # A driver that calls geopose without a script and without the token; Ray tries for 20 seconds.
        predict = [sys.executable, "-m", "geopose_dist", *words, "--out", str(tmp_path / "refused")]
        wrong = {"RAY_AUTH_TOKEN_PATH": f"{temp}/none"}
        driver = a.start([*predict, "--ray-address", f"{a.address}:6379"], {**env, **wrong})
        job = start(a, "submit.sh", *words, "--out", str(out), HEAD=a.address)
        # The worker's host has an actor, and tiles are being written.
        wait_for(lambda: any(words[0].startswith("ray::_Worker") for words in b.processes().values()), job)
        wait_for(lambda: len(list(out.glob("*.json"))) >= 4, job)
        b.die()
        assert len(list(out.glob("*.json"))) < TILES, "too fast to lose a host in the middle"
        said = job.communicate(timeout=240)[0]
        assert job.returncode == 0, said
        worker.communicate(timeout=20)
        assert worker.returncode != 0
        said = driver.communicate(timeout=120)[0]
        assert driver.returncode == 2, said
        assert f"--ray-address {a.address}:6379: cannot be joined" in said
        assert "with the same RAY_AUTH_TOKEN here and there" in said
        assert "Traceback" not in said
        head.terminate()
        head.communicate(timeout=60)
    assert outputs(out) == outputs(tmp_path / "local")
    assert len(outputs(out)) == 2 * TILES
    assert not outputs(tmp_path / "refused")
