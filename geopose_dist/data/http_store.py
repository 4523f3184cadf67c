"""http(s)://: reading from any web server, by ranges where it honours them, by urllib3.

obstore could read these, too, but follows redirects anywhere and cannot stream from a server without ranges;
urllib3 also takes less than half of its CPU time per range (docs/decisions.md). A request that failed for a
reason that may pass is repeated after a pause that doubles, or that the server names. Redirects are followed
on the same host only, and never from https to http.
"""

from __future__ import annotations

import contextlib
import random
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

from geopose_dist.data import stores, urls
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.data.urls import Url
from geopose_dist.errors import UserError

PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Statuses after which the same request may do better."""
MAX_REDIRECTS = 3
CHUNK = 1 << 18


Answer = TypeVar("Answer")


class _Fault(Exception):
    """One try failed in a way that the next may not; `pause_s` is what the server asked for."""

    def __init__(self, answered: str, pause_s: float = 0.0) -> None:
        super().__init__(answered)
        self.pause_s = pause_s


class HttpStore:
    """Files of a web server below one path."""

    def __init__(self, url: Url, recipe: StoreRecipe) -> None:
        self.url, self.recipe = str(url), recipe
        self._pool = _pool(url, recipe)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """See `stores.Store`; NoRanges from a server that would send the whole file."""
        return self._again(name, f", offset {offset}", lambda: self._range(name, offset, length))

    def stream(self, name: str) -> Iterator[bytes]:
        """See `stores.Store`. A cut answer is asked for again from its start, so pieces before it come twice.

        What was sent is skipped on the way, so the receiver sees each byte once.
        """
        sent = 0
        for attempt in range(self.recipe.retries + 1):
            at = 0
            try:
                for piece in self._whole(name):
                    at += len(piece)
                    if at > sent:
                        yield piece[len(piece) - (at - sent) :]
                        sent = at
                return
            except (_Fault, HTTPError, OSError) as error:
                self._pause(attempt, error, urls.join(self.url, name) + f", offset {at}")

    def size(self, name: str) -> int | None:
        """See `stores.Store`."""

        def head() -> int | None:
            with self._answer("HEAD", name, {}) as (response, _):
                text = response.headers.get("Content-Length", "")
            if not text.isdigit():
                raise UserError(f"{urls.join(self.url, name)}: the server does not tell its size; refused")
            return int(text)

        try:
            return self._again(name, "", head)
        except stores.Missing:
            return None

    def tree(self, folder: str = "") -> list[tuple[str, int]]:
        """A web server has no listing (UserError)."""
        return self.list()

    def list(self, suffix: str = "") -> list[tuple[str, int]]:
        """A web server has no listing (UserError)."""
        raise UserError(
            f"{self.url}: a web server cannot be listed; name its shards, such as {self.url}/"
            "train-{000000..000009}.tar"
        )

    def put_bytes(self, name: str, data: bytes) -> None:
        """A web server cannot be written to (UserError)."""
        raise UserError(
            f"{urls.join(self.url, name)}: http(s):// is for reading; write to s3://, gs:// or az://"
        )

    def put_file(self, name: str, path: Path) -> None:
        """A web server cannot be written to (UserError)."""
        self.put_bytes(name, b"")

    def delete(self, name: str) -> None:
        """A web server cannot be written to (UserError)."""
        self.put_bytes(name, b"")

    def _again(self, name: str, doing: str, one_try: Callable[[], Answer]) -> Answer:
        for attempt in range(self.recipe.retries + 1):
            try:
                return one_try()
            except (_Fault, HTTPError, OSError) as error:
                self._pause(attempt, error, urls.join(self.url, name) + doing)
        raise AssertionError("unreachable: the last pause raises")

    def _pause(self, attempt: int, error: Exception, at: str) -> None:
        """Sleep before the next try, or raise what the last one ended with."""
        if attempt == self.recipe.retries:
            raise stores.failure(at, _in_words(error, self.recipe), self.recipe) from None
        longest = min(self.recipe.backoff_s * 2**attempt, stores.MAX_PAUSE_S)
        asked = error.pause_s if isinstance(error, _Fault) else 0.0
        time.sleep(max(random.uniform(longest / 2, longest), min(asked, stores.MAX_PAUSE_S)))

    def _range(self, name: str, offset: int, length: int) -> bytes:
        last = offset + length - 1
        with self._answer("GET", name, {"Range": f"bytes={offset}-{last}"}) as (response, began):
            if response.status == 200:
                raise stores.NoRanges(f"{urls.join(self.url, name)}: the server sends whole files only")
            said = response.headers.get("Content-Range", "")
            if not said.startswith(f"bytes {offset}-"):
                raise _Fault(f"another range than asked for ({said[:60]!r})")
            return b"".join(_body(response, length, began, self.recipe.timeout_s))

    def _whole(self, name: str) -> Iterator[bytes]:
        with self._answer("GET", name, {}) as (response, began):
            text = response.headers.get("Content-Length", "")
            yield from _body(response, int(text) if text.isdigit() else None, began, self.recipe.timeout_s)

    @contextlib.contextmanager
    def _answer(
        self, method: str, name: str, headers: dict[str, str]
    ) -> Iterator[tuple[BaseHTTPResponse, float]]:
        """A good answer to a request, its body still unread, and when the request began."""
        at = urls.join(self.url, name)
        target = f"{self.url}/{quote(urls.check_name(name, self.url))}"
        began = time.monotonic()
        for _ in range(MAX_REDIRECTS + 1):
            response = self._pool.request(
                method,
                target,
                headers={"Accept-Encoding": "identity", "User-Agent": "geopose-dist", **headers},
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
            )
            try:
                if response.status in (301, 302, 303, 307, 308):
                    target = _redirected(at, target, response.headers.get("Location", ""))
                    response.drain_conn()
                    continue
                self._check(at, response)
                yield response, began
                # What is left of a body that was read to its end is nothing: the connection serves again.
                response.release_conn() if response.closed or method == "HEAD" else response.close()
                return
            except BaseException:
                response.close()
                raise
        raise UserError(f"{at}: redirected more than {MAX_REDIRECTS} times; give the final URL")

    def _check(self, at: str, response: BaseHTTPResponse) -> None:
        """Refuse an answer that cannot be used."""
        status = f"{response.status} {response.reason or ''}".strip()
        if response.status in PASSING:
            wait = response.headers.get("Retry-After", "")
            raise _Fault(status, float(wait) if wait.isdigit() and len(wait) < 6 else 0.0)
        if response.status in (404, 410):
            raise stores.missing(at)
        if response.status == 416:
            raise UserError(f"{at}: {status}: the file is shorter than the index says; upload it again")
        if response.status not in (200, 206):
            raise stores.StoreRefusal(
                f"{at}: the server answered {status}; wanted a file that anybody may read"
            )
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise UserError(f"{at}: the server sends it compressed, which was not asked for; refused")


def _body(response: BaseHTTPResponse, length: int | None, began: float, timeout_s: float) -> Iterator[bytes]:
    """The body in pieces; exactly `length` bytes if that is known, and each 8 MiB of it in time."""
    received = 0
    while piece := response.read1(CHUNK):
        received += len(piece)
        if time.monotonic() - began > timeout_s * (1 + received // stores.PIECE):
            raise _Fault(f"no answer, or not all of it, within {timeout_s:g} s")
        if length is not None and received > length:
            raise _Fault(f"more than the {length} bytes that were asked for")
        yield piece
    if length is not None and received < length:
        raise _Fault(f"the answer was cut short: {received} of {length} bytes")


def _redirected(at: str, target: str, location: str) -> str:
    """Where a redirect leads, if that is the same host (UserError)."""
    old, new = urlsplit(target), urlsplit(urljoin(target, location))
    same = new.hostname == old.hostname and (
        (new.scheme, new.port) == (old.scheme, old.port) or (old.scheme, new.scheme) == ("http", "https")
    )
    if not location or not same or "@" in new.netloc:
        to = urls.shown(f"{new.scheme}://{new.netloc}")
        raise UserError(
            f"{at}: redirected to {to}: other hosts are refused, because a redirect can lead into this network; "
            "give the URL of the server that holds the files"
        )
    return new.geturl()


def _pool(url: Url, recipe: StoreRecipe) -> urllib3.PoolManager:
    """Connections that are kept, through the proxy that the environment names for this host, if any."""
    kept = recipe.in_flight + 32  # a caller's own threads may read beside those of `prefetch`
    timeout = urllib3.Timeout(connect=min(recipe.timeout_s, 5.0), read=recipe.timeout_s)
    host = url.host.rpartition("@")[2]
    proxies = {} if urllib.request.proxy_bypass(host) else urllib.request.getproxies_environment()
    if proxy := proxies.get(url.scheme):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        user = f"{parts.username or ''}:{parts.password or ''}" if parts.username else None
        headers = urllib3.make_headers(proxy_basic_auth=user)
        plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        return urllib3.ProxyManager(
            plain, proxy_headers=headers, maxsize=kept, timeout=timeout, retries=False
        )
    return urllib3.PoolManager(maxsize=kept, timeout=timeout, retries=False)


def _in_words(error: Exception, recipe: StoreRecipe) -> str:
    """What went wrong, without addresses inside this process."""
    if isinstance(error, _Fault):
        return str(error)
    if isinstance(error, urllib3.exceptions.NewConnectionError):
        return f"no connection ({str(error).rpartition(': ')[2]})"
    if isinstance(error, urllib3.exceptions.ReadTimeoutError | urllib3.exceptions.ConnectTimeoutError):
        return f"no answer, or not all of it, within {recipe.timeout_s:g} s"
    if isinstance(error, urllib3.exceptions.ProtocolError):
        return "the answer was cut short"
    return f"{type(error).__name__} ({str(error)[:120]})"
