"""An HTTP server on loopback that serves a folder by ranges, and misbehaves on request.

Faults are words, used up one per request for a shard (`only` chooses which paths count as such); after the
script `always` goes on for ever. Every request is recorded, so a test can tell what was really asked.
`python tests/range_server.py FOLDER [DELAY_MS]` serves a folder until it is killed, and prints its address.
"""

from __future__ import annotations

import contextlib
import http.server
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

HANG_S = 60


@dataclass
class Behaviour:
    """How the server answers, changed by a test while it runs.

    Attributes:
        script: what to do with the next requests: ok, a status such as 503 (`503 2`: come back in 2 s), hang,
            cut, wrong, slow, more, zipped, or `redirect URL`.
        always: what to do once the script is used up.
        only: faults befall paths that end so.
        delay_s: before each answer's first byte.
        ranges: whether Range is honoured; a server without sends everything.
        asked: (method, path, Range) of every request.
        most_at_once: requests that were being answered at the same time.
    """

    script: list[str] = field(default_factory=list)
    always: str = "ok"
    only: str = ".tar"
    delay_s: float = 0.0
    ranges: bool = True
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    most_at_once: int = 0
    connections: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    def next_word(self, path: str) -> str:
        with self._lock:
            if not path.endswith(self.only):
                return "ok"
            return self.script.pop(0) if self.script else self.always

    @contextlib.contextmanager
    def counted(self, method: str, path: str, wanted: str) -> Iterator[None]:
        with self._lock:
            self.asked.append((method, path, wanted))
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1

    def count(self, suffix: str = "") -> int:
        """Requests so far for paths that end so."""
        return sum(path.endswith(suffix) for _, path, _ in self.asked)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    behaviour: Behaviour

    def log_message(self, *_: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.behaviour.connections += 1
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, wanted = unquote(urlsplit(self.path).path), self.headers.get("Range", "")
        with self.behaviour.counted(self.command, path, wanted):
            if self.behaviour.delay_s:
                time.sleep(self.behaviour.delay_s)
            self._answer(path, wanted, *self.behaviour.next_word(path).partition(" ")[::2])

    def _answer(self, path: str, wanted: str, word: str, argument: str) -> None:
        if word == "hang":
            self.behaviour.over.wait(HANG_S)
            self.close_connection = True
            return
        if word == "redirect":
            self.send_response(302)
            self.send_header("Location", argument)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        file = self.root / path.lstrip("/")
        if word.isdigit() or not file.is_file():
            self._refuse(int(word) if word.isdigit() else 404, argument)
            return
        size = file.stat().st_size
        first, stop = 0, size
        if wanted and self.behaviour.ranges:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, stop = int(begin), min(int(end) + 1 if end else size, size)
            if first >= size:
                self._refuse(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{size}")
        else:
            self.send_response(200)
        length = stop - first + (1000 if word == "more" else 0)
        self.send_header("Content-Length", str(length))
        self.send_header("Last-Modified", self.date_time_string(file.stat().st_mtime))
        self.send_header("ETag", f'"{size}-{file.stat().st_mtime_ns}"')
        if self.behaviour.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if word == "zipped":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if self.command != "HEAD":
            self._send(file, first, length, word)

    def _refuse(self, status: int, wait_s: str = "") -> None:
        body = b"<Error><Code>SlowDown</Code><Message>no, not now</Message></Error>"
        self.send_response(status)
        if wait_s:
            self.send_header("Retry-After", wait_s)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send(self, path: Path, first: int, length: int, word: str) -> None:
        with path.open("rb") as file:
            if word == "ok":
                file.seek(first)
                self.wfile.flush()
                with contextlib.suppress(ConnectionError):
                    self.request.sendfile(file, first, length)
                return
            file.seek(first)
            data = file.read(length).ljust(length, b"\0")
        if word == "wrong":
            middle = length // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        pieces = [data]
        if word == "cut":
            pieces, self.close_connection = [data[: length // 2]], True
        if word == "slow":  # a byte now and then, so that no single read ever times out
            pieces = [data[i : i + 1] for i in range(length)]
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                self.wfile.write(piece)
                self.wfile.flush()
                if word == "slow" and self.behaviour.over.wait(0.1):
                    return


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Clients that go away are what the tests want."""


@contextlib.contextmanager
def serve(root: Path, **behaviour: object) -> Iterator[tuple[str, Behaviour]]:
    """Serve a folder in a thread; yields its address, such as http://127.0.0.1:4711, and its behaviour."""
    acts = Behaviour(**behaviour)  # type: ignore[arg-type]
    handler = type("Bound", (Handler,), {"root": root, "behaviour": acts})
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", acts
        finally:
            acts.over.set()
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    with serve(Path(sys.argv[1]), delay_s=float((*sys.argv[2:], "0")[0]) / 1000) as (address, _):
        print(address, flush=True)
        threading.Event().wait()
