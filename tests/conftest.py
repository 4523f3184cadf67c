"""What all tests share: the environment, recorded data, running `geopose`, and what a machine cannot do.

Tests never reach a network: hubs are told to stay offline before anything imports them. Ray gets a token of
this run's own, so that it writes none into the home folder.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hosts
import numpy as np
import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_TOKEN=secrets.token_hex(32),
)

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run."""
    missing = {"gpu": _why_no_gpu, "multihost": hosts.why_not}
    for marker, why in missing.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = why() if marked else ""
        for item in marked if reason else []:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Recorded data beside the checkout; tests that want it are skipped where it is absent."""
    folder = ROOT.parent / "shared"
    if not (folder / "conformance").is_dir():
        pytest.skip(f"no recorded data at {folder}")
    return folder


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, whatever this one has."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run."""
    return np.random.Generator(np.random.Philox(20))


@pytest.fixture(scope="session")
def geopose() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `geopose WORDS...` as a process of its own and give back its exit code and output."""

    def run(
        *words: object, cwd: Path | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "geopose_dist", *map(str, words)]
        return subprocess.run(
            command, cwd=cwd or ROOT, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run


@pytest.fixture(scope="session")
def train_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 12 tiles to learn from and 4 to validate on, for tiny training runs."""
    import runs

    return runs.make_shards(tmp_path_factory.mktemp("train-data"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network with random weights that reduces by two."""
    import jobs

    return jobs.save_tiny_net(tmp_path_factory.mktemp("net") / "model.safetensors")


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """Seven small tiles of two sizes in a plain folder."""
    import jobs

    jobs.write_tiles(tmp_path / "tiles", 7)
    return tmp_path / "tiles"


@pytest.fixture(scope="session")
def undisturbed(train_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs.PLAIN` on two ranks of this host, which nothing disturbs: what other runs are compared with."""
    import runs

    out = tmp_path_factory.mktemp("undisturbed") / "run"
    code, said = runs.finish(runs.launch(runs.words(train_shards, out, *runs.PLAIN), 2))
    assert code == 0, said
    return out
