"""Hosts for tests: network namespaces with a veth pair between them, made and removed by the test.

    with two_hosts(mbit=1000) as (a, b):
        process = a.start([...], env)      # runs in the namespace, on this machine's disk
        b.unplug()                         # and b.plug(); b.die() is a power cut

Every host has a name of its own, which resolves on both. Root and iproute2 are needed; `why_not()` says what is
missing. Between `two_far_hosts()` is a third namespace, in which tests/relay.py carries every packet, late or not
at all: kernels without netem are common.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RELAY = Path(__file__).with_name("relay.py")
NAMES = Path("/etc/netns")
"""`ip netns exec` mounts the files of NAMES/NAMESPACE over those of /etc."""


@dataclass(frozen=True)
class Host:
    """One namespace.

    Attributes:
        name: of the namespace and of the host. address: in the pair's network. interface: its end of the pair.
    """

    name: str
    address: str
    interface: str

    def start(
        self, command: list[str], env: dict[str, str], cwd: Path | None = None
    ) -> subprocess.Popen[str]:
        """A process on this host; gloo and NCCL are told its interface."""
        env = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": self.interface,
            "NCCL_SOCKET_IFNAME": self.interface,
            **env,
        }
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *named, *command],
            env=env,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def processes(self) -> dict[int, list[str]]:
        """Process ids on this host, with the words of each."""
        found: dict[int, list[str]] = {}
        listed = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False
        )
        for pid in listed.stdout.split():
            with contextlib.suppress(OSError):  # one that has just ended
                found[int(pid)] = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
        return found

    def kill(self) -> None:
        """SIGKILL every process of this host; the kernel closes their connections, and the other host hears it."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def die(self) -> None:
        """As a power cut does it: nothing more is heard of this host."""
        self.unplug()
        self.kill()

    def unplug(self) -> None:
        """Pull the cable."""
        ip("-n", self.name, "link", "set", self.interface, "down")

    def plug(self) -> None:
        """Put the cable back."""
        ip("-n", self.name, "link", "set", self.interface, "up")


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
    named = subprocess.run(["ip", "netns", "exec", probe, "unshare", "--uts", "hostname", "gp"], check=False)
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return "hosts may not have names of their own here (unshare --uts)" if named.returncode else ""


def ip(*words: str) -> None:
    """Run iproute2's ip."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Cable:
    """What is between two hosts that were far from each other."""

    def __init__(self, namespace: str, ends: list[str]) -> None:
        words = ["ip", "netns", "exec", namespace, sys.executable, str(RELAY), *ends]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer("ready")

    def set(self, delay_ms: float, loss: float) -> None:
        """Let packets come so much later from now on, and this share of them not at all, in each direction."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{delay_ms} {loss}\n")
        self.process.stdin.flush()
        self._answer("changed")

    def _answer(self, wanted: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{wanted}\n"

    def close(self) -> None:
        """End the relay."""
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def two_hosts(mbit: float | None = None) -> Iterator[tuple[Host, Host]]:
    """Two hosts joined by a link, limited to `mbit` megabits per second each way by tbf if given."""
    with _hosts() as hosts:
        connect(hosts[0].name, hosts[0].interface, hosts[1].name, hosts[1].interface)
        _address(hosts)
        if mbit is not None:
            for host in hosts:
                limit(host, mbit)
        yield hosts


@contextlib.contextmanager
def two_far_hosts() -> Iterator[tuple[Host, Host, Cable]]:
    """Two hosts, and the cable between them, which may be long and bad."""
    with _hosts() as hosts:
        between = f"{hosts[0].name}r"
        ip("netns", "add", between)
        cable = None
        try:
            for host in hosts:
                connect(host.name, host.interface, between, f"{host.interface}r")
                plain = [sys.executable, str(RELAY), "--plain", host.interface]
                subprocess.run(["ip", "netns", "exec", host.name, *plain], check=True)
            _address(hosts)
            cable = Cable(between, [f"{host.interface}r" for host in hosts])
            yield *hosts, cable
        finally:
            if cable is not None:
                cable.close()
            subprocess.run(["ip", "netns", "del", between], capture_output=True, check=False)


@contextlib.contextmanager
def _hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts without a link, which know each other's names; whatever runs on them ends with the block."""
    mark = uuid.uuid4().hex[:6]
    first, second = (
        Host(f"gp{mark}{end}", f"10.77.0.{n}", f"gp{mark}{end}") for n, end in ((1, "a"), (2, "b"))
    )
    names = f"127.0.0.1 localhost\n{first.address} {first.name}\n{second.address} {second.name}\n"
    try:
        for host in (first, second):
            ip("netns", "add", host.name)
            ip("-n", host.name, "link", "set", "lo", "up")
            (NAMES / host.name).mkdir(parents=True)
            (NAMES / host.name / "hosts").write_text(names)
        yield first, second
    finally:
        for host in (first, second):
            host.kill()
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)
            shutil.rmtree(NAMES / host.name, ignore_errors=True)
        with contextlib.suppress(OSError):
            NAMES.rmdir()  # if nobody else's hosts are there


def connect(here: str, end: str, there: str, other_end: str) -> None:
    """A cable between two namespaces: `end` in `here`, `other_end` in `there`."""
    ip("link", "add", end, "netns", here, "type", "veth", "peer", "name", other_end, "netns", there)
    for namespace, one in ((here, end), (there, other_end)):
        ip("-n", namespace, "link", "set", one, "up")


def _address(hosts: tuple[Host, Host]) -> None:
    for host in hosts:
        ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)


def limit(host: Host, mbit: float) -> None:
    """Limit what leaves a host; the burst holds what the kernel sends between two of its ticks."""
    burst = max(int(mbit * 1e6 / 8 * 0.004), 65536)
    words = ["qdisc", "replace", "dev", host.interface, "root", "tbf", "rate", f"{mbit:g}mbit"]
    words += ["burst", str(burst), "latency", "50ms"]
    subprocess.run(["tc", "-n", host.name, *words], check=True, capture_output=True, text=True)
