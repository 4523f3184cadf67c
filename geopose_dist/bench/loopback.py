"""A web server on loopback that honours ranges after a pause, like a store some kilometres away.

`python -m geopose_dist.bench.loopback FOLDER LATENCY_MS` prints its address and serves until its input ends: a
process of its own, so that what it costs is not taken for the reader's.
"""

from __future__ import annotations

import contextlib
import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files by ranges; every answer waits for `latency_s`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, latency_s: float, *args: object, directory: str) -> None:
        self.latency_s = latency_s
        super().__init__(*args, directory=directory)  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer with a range of a file, or all of it."""
        time.sleep(self.latency_s)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        first, last = 0, size - 1
        wanted = self.headers.get("Range", "")
        if wanted:
            first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
            last = min(last, size - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.flush()
        with path.open("rb") as file, contextlib.suppress(ConnectionError):
            self.connection.sendfile(file, first, last - first + 1)


@contextlib.contextmanager
def serving(folder: Path, latency_ms: float) -> Iterator[str]:
    """The address of such a server for the time of the block."""
    command = [sys.executable, "-m", "geopose_dist.bench.loopback", str(folder), str(latency_ms)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(timeout=20)


def main(folder: str, latency_ms: str) -> None:
    """Serve until the input ends."""
    handler = partial(Handler, float(latency_ms) / 1000, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
