"""Hosts for tests: network namespaces with a veth pair between them, made and removed by the test.

    with two_hosts(mbit=1000) as (a, b):
        process = a.start([...], env)      # runs in the namespace, on this machine's disk

Root and iproute2 are needed; `why_not()` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """One namespace.

    Attributes:
        name: of the namespace. address: in the pair's network. interface: its end of the pair.
    """

    name: str
    address: str
    interface: str

    def start(self, command: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
        """A process on this host; gloo and NCCL are told its interface."""
        env = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": self.interface,
            "NCCL_SOCKET_IFNAME": self.interface,
            **env,
        }
        words = ["ip", "netns", "exec", self.name, *command]
        return subprocess.Popen(
            words,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def why_not() -> str:
    """Why no hosts can be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "no `ip` and `tc`: apt-get install iproute2"
    probe = f"gp{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are not permitted here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


def ip(*words: str) -> None:
    """Run iproute2's ip."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_hosts(mbit: float | None = None) -> Iterator[tuple[Host, Host]]:
    """Two hosts joined by a link, limited to `mbit` megabits per second each way by tbf if given."""
    mark = uuid.uuid4().hex[:6]
    hosts = tuple(Host(f"gp{mark}{end}", f"10.77.0.{n}", f"gp{mark}{end}") for n, end in ((1, "a"), (2, "b")))
    try:
        for host in hosts:
            ip("netns", "add", host.name)
        ip("link", "add", hosts[0].interface, "type", "veth", "peer", "name", hosts[1].interface)
        for host in hosts:
            ip("link", "set", host.interface, "netns", host.name)
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            ip("-n", host.name, "link", "set", host.interface, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
            if mbit is not None:
                limit(host, mbit)
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            for pid in subprocess.run(
                ["ip", "netns", "pids", host.name], capture_output=True, text=True, check=False
            ).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)


def limit(host: Host, mbit: float) -> None:
    """Limit what leaves a host; the burst holds what the kernel sends between two of its ticks."""
    burst = max(int(mbit * 1e6 / 8 * 0.004), 65536)
    words = ["qdisc", "replace", "dev", host.interface, "root", "tbf", "rate", f"{mbit:g}mbit"]
    words += ["burst", str(burst), "latency", "50ms"]
    subprocess.run(["tc", "-n", host.name, *words], check=True, capture_output=True, text=True)
