"""A real S3 server (moto's) in a process of its own; `python tests/s3_server.py` prints its address.

Google's stores answer in the same XML to the same requests, signed by a bearer's token: gs:// is served, too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "GEOPOSETESTKEY", "AWS_SECRET_ACCESS_KEY": "no-secret-at-all"}
GOOGLE_CREDENTIALS = {
    "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(
        {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    )
}


@contextlib.contextmanager
def serve(*buckets: str) -> Iterator[str]:
    """An S3 server with these empty buckets; yields its address for `store.endpoint`."""
    # The server of worker processes keeps the environment that it was started with, perhaps by a test without
    # credentials; the next worker starts a new one.
    forkserver._forkserver._stop()
    command = [sys.executable, str(Path(__file__).resolve())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            for bucket in buckets:
                request = urllib.request.Request(f"{address}/{bucket}", method="PUT")
                urllib.request.urlopen(request, timeout=30).close()
            yield address
        finally:
            process.stdin.close()  # it ends with whoever started it, however that one ended
            process.wait(timeout=20)


def upload(folder: Path, url: str, endpoint: str) -> None:
    """Copy the files of a folder to a URL of the server."""
    from geopose_dist.data.store_recipe import StoreRecipe
    from geopose_dist.data.stores import open_store

    store = open_store(url, StoreRecipe(endpoint=endpoint))
    for path in sorted(folder.iterdir()):
        if path.is_file():
            store.put_file(path.name, path)


def take_bearers() -> None:
    """Let moto, which knows S3's signatures only, answer clients of Google's stores."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication

    answer = DomainDispatcherApplication.__call__

    def call(self: Any, environ: dict[str, Any], start_response: Any) -> Any:
        told = environ.get("HTTP_AUTHORIZATION", "")
        reads = environ["REQUEST_METHOD"] in (
            "GET",
            "HEAD",
        )  # they leave out an empty token, as the tests' is
        if told.startswith("Bearer") or (reads and not told):
            scope = "GEOPOSETESTKEY/20260101/us-east-1/s3/aws4_request"
            environ["HTTP_AUTHORIZATION"] = (
                f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0"
            )
        return answer(self, environ, start_response)

    DomainDispatcherApplication.__call__ = call


if __name__ == "__main__":
    from moto.server import ThreadedMotoServer

    take_bearers()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    print("http://{}:{}".format(*server.get_host_and_port()), flush=True)
    sys.stdin.read()
    threading.Thread(target=server.stop, daemon=True).start()
