"""A Ray cluster of two nodes with one core each, in a process of its own, which loses a node on request.

with two_nodes(monkeypatch) as (address, cluster):
    ...
    lose_a_node(cluster)
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The cluster's address and its process; its token is in the environment of the test."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    command = [sys.executable, str(Path(__file__).resolve())]
    pipe, noise = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=noise, text=True) as cluster:
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        try:
            yield cluster.stdout.readline().strip(), cluster
        finally:
            cluster.stdin.close()


def lose_a_node(cluster: subprocess.Popen[str]) -> None:
    """Kill the second node, with all that runs there."""
    assert cluster.stdout is not None
    print("kill", file=cluster.stdin, flush=True)
    assert cluster.stdout.readline() == "killed\n"


def main() -> None:
    """Print the address, kill a node at the first line on stdin, and end with stdin."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    print(cluster.address, flush=True)
    if sys.stdin.readline():
        second.kill_raylet(check_alive=False)
        print("killed", flush=True)
        sys.stdin.readline()
    cluster.shutdown()


if __name__ == "__main__":
    main()
