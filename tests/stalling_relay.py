"""A relay before a server on this machine: it counts requests, and stops passing uploads on after so many bytes.

with relay(address) as between:
    between.url            # give this to the client
    between.stall_after = 1_000_000
    between.stalled.wait() # a client is in the middle of an upload now, and stays there
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

REQUEST = re.compile(rb"(GET|PUT|POST|HEAD|DELETE) (/[^ ]*) HTTP/1\.1\r\n")


@dataclass
class Relay:
    """What passes through.

    Attributes:
        url: where it listens.
        stall_after: bytes from clients, over all connections, after which no more are passed on; None: all are.
        stalled: set once that happened. asked: how often each (method, path) was requested.
    """

    url: str = ""
    stall_after: int | None = None
    passed: int = 0
    stalled: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)

    def count(self, method: str, ends: str) -> dict[str, int]:
        """How often each path that ends so was requested."""
        return {path: n for (verb, path), n in self.asked.items() if verb == method and path.endswith(ends)}


@contextlib.contextmanager
def relay(upstream: str) -> Iterator[Relay]:
    """Listen on a free port and pass everything on to `upstream`."""
    parts = urlsplit(upstream)
    with socket.create_server(("127.0.0.1", 0)) as server:
        between = Relay(f"http://127.0.0.1:{server.getsockname()[1]}")
        target = (str(parts.hostname), int(parts.port or 80))
        threading.Thread(target=_accept, args=(server, target, between), daemon=True).start()
        try:
            yield between
        finally:
            between.over.set()


def _accept(server: socket.socket, target: tuple[str, int], between: Relay) -> None:
    while True:
        try:
            client, _ = server.accept()
        except OSError:  # closed: the test is over
            return
        upstream = socket.create_connection(target)
        threading.Thread(target=_serve, args=(client, upstream, between), daemon=True).start()


def _serve(client: socket.socket, upstream: socket.socket, between: Relay) -> None:
    with client, upstream:
        down = threading.Thread(target=_pass, args=(upstream, client, False, between), daemon=True)
        down.start()
        _pass(client, upstream, True, between)
        down.join()


def _pass(source: socket.socket, sink: socket.socket, up: bool, between: Relay) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            if up:
                for method, path in REQUEST.findall(data):
                    between.asked[method.decode(), path.decode().partition("?")[0]] += 1
                if between.stall_after is not None and between.passed + len(data) > between.stall_after:
                    between.stalled.set()
                    between.over.wait()
                    return
                between.passed += len(data)
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
