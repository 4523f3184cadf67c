"""A job on two hosts for tests: launch/torchrun.sh on each with one core, what they say, their ranks' processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import runs
from hosts import Host

SCRIPT = str(runs.ROOT / "launch" / "torchrun.sh")
LISTENING = Path(__file__).with_name("listening.py")
QUICK = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1"
"""Rendezvous that notices a lost node after 3 s, and waits a second for more than the least number of nodes."""


class Node:
    """One host's launcher.

    Attributes:
        said: each line of it and its ranks so far, with the second in which it came.
        ended_s: when it was seen to have ended (time.monotonic).
    """

    def __init__(self, host: Host, command: list[str], env: dict[str, str]) -> None:
        self.host = host
        core = str(int(host.address.rsplit(".", 1)[1]) % (os.cpu_count() or 1))
        # One core: two threads would sum in another order than the two ranks of one host with one thread each.
        self.process = host.start(["taskset", "-c", core, *command], env, runs.ROOT)
        self.said, self.ended_s = "", 0.0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        began = time.monotonic()
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.said += f"{time.monotonic() - began:6.1f} {line}"
        self.process.wait()
        self.ended_s = time.monotonic()

    def ranks(self) -> list[int]:
        """Process ids of this host's ranks."""
        processes = self.host.processes().items()
        return [pid for pid, words in processes if "train" in words and "geopose_dist.torchrun" not in words
                and any(word.endswith("python") for word in words[:1])]  # fmt: skip

    def kill_rank(self) -> None:
        """SIGKILL this host's rank."""
        (pid,) = self.ranks()
        os.kill(pid, signal.SIGKILL)

    def kill_agent(self) -> None:
        """SIGKILL torchrun on this host, and leave its rank behind."""
        (pid,) = (pid for pid, words in self.host.processes().items() if "geopose_dist.torchrun" in words)
        os.kill(pid, signal.SIGKILL)

    def wait(self, timeout_s: float) -> int:
        """Exit code, which comes within `timeout_s`."""
        self._reader.join(timeout_s)
        assert not self._reader.is_alive(), f"no end within {timeout_s} s:\n{self.said}"
        return self.process.returncode


class Job:
    """The same command on both hosts."""

    def __init__(
        self, pair: tuple[Host, Host], shards: Path, out: Path, *options: str, **variables: str
    ) -> None:
        self.pair, self.out = pair, out
        self.words = runs.words(shards, out, *options)[1:]
        recipe = out.parent / "nothing.yaml"  # instead of the script's smoke recipe
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text("{}\n")
        self.variables = {
            "NNODES": "2", "MASTER_ADDR": pair[0].name, "NPROC": "1", "PYTHON": sys.executable, "CONFIG": str(recipe),
            "OMP_NUM_THREADS": "1", "RDZV_CONF": QUICK, "SHUTDOWN_TIMEOUT": "60", **variables,
        }  # fmt: skip
        self.nodes = [self.start(0), self.start(1)]

    def start(self, index: int) -> Node:
        """Run the command on one of the hosts."""
        return Node(self.pair[index], [SCRIPT, *self.words], {**self.variables, "NODE_RANK": str(index)})

    def wait_for(self, ready: Callable[[], bool], what: str, timeout_s: float = 200.0) -> None:
        """Until `ready`."""
        end = time.monotonic() + timeout_s
        while not ready():
            assert time.monotonic() < end, f"{what} did not come:\n{self.said()}"
            assert any(node.process.poll() is None for node in self.nodes), f"all ended:\n{self.said()}"
            time.sleep(0.02)  # other processes do it; there is nothing to wait on

    def reach(self, step: int) -> None:
        """Until `step` is logged."""
        self.wait_for(lambda: latest(self.out) >= step, f"step {step}")

    def said(self) -> str:
        """All that was said on both hosts."""
        return "\n".join(f"--- {node.host.name}\n{node.said}" for node in self.nodes)


def latest(run: Path) -> int:
    """The last step that was logged."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(lines[-1].split('"step": ')[1].split(",")[0]) if lines else 0


def heard_by(folder: Path, heard: Path, **variables: str) -> dict[str, str]:
    """Variables that make ranks note what they train on (tests/listening.py)."""
    python = folder / "listening-python"  # torchrun calls it with: -u -m geopose_dist WORDS
    python.write_text(f'#!/bin/sh\nshift 3\nexec "{sys.executable}" -u "{LISTENING}" "$@"\n')
    python.chmod(0o755)
    return {"PYTHON_EXEC": str(python), "HEARD": str(heard), "PYTHONPATH": str(runs.ROOT), **variables}


def order(heard: Path, count: int) -> list[str]:
    """The key at each of the first positions; a position that was trained on twice has the same one."""
    keys: dict[int, str] = {}
    for line in heard.read_text().splitlines():
        position, key, _ = line.split()
        assert keys.setdefault(int(position), key) == key, position
    return [keys[position] for position in range(count)]


def expected_order(shards: Path, count: int) -> list[str]:
    """What `geopose order` says of the same positions."""
    words = ["order", "--shards", str(shards), "--count", str(count), "--global-batch=2", "--micro-batch=1"]
    done = subprocess.run(
        [sys.executable, "-m", "geopose_dist", *words],
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()
