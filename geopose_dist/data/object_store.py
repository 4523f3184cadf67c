"""s3://, gs:// and az:// by obstore: one wheel without dependencies, its network code outside of the GIL.

It repeats by itself what failed for a reason that may pass (5xx, 429, timeouts, cut answers), and looks for
credentials in the environment and in the machine's role. Its errors, which hold addresses and bodies, become
sentences of ours here.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore import exceptions
from obstore.store import AzureStore, GCSStore, S3Store

from geopose_dist.data import stores, urls
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.data.urls import Url
from geopose_dist.errors import UserError

READS_AHEAD = 2
"""Pieces of an object that are read while another is used, where all of it is wanted."""
WRITES_AT_ONCE = 4
"""Parts of one upload under way at once: 32 MiB of memory."""


class ObjectStore:
    """s3://, gs:// or az:// by obstore, which repeats what failed (5xx, 429, timeouts, cut answers) by itself."""

    def __init__(self, url: Url, recipe: StoreRecipe) -> None:
        self.url, self.recipe = str(url), recipe
        with self._said("", ""):
            self._client = _client(url, recipe)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """See `Store`."""
        with self._said(name, f", offset {offset}"):
            data = obstore.get_range(
                self._client, urls.check_name(name, self.url), start=offset, length=length
            ).to_bytes()
        if len(data) != length:
            raise UserError(
                f"{self._at(name)}: {len(data)} bytes at offset {offset}, wanted {length}: the object is shorter "
                "than the index says; upload it again or pack again"
            )
        return data

    def stream(self, name: str) -> Iterator[bytes]:
        """See `Store`."""
        size = self.size(name)
        if size is None:
            raise stores.missing(self._at(name))
        waiting: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(READS_AHEAD) as threads:
            for offset in range(0, size, stores.PIECE):
                waiting.append(threads.submit(self.read, name, offset, min(stores.PIECE, size - offset)))
                if len(waiting) > READS_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def size(self, name: str) -> int | None:
        """See `Store`."""
        try:
            with self._said(name, ""):
                return int(obstore.head(self._client, name)["size"])
        except stores.Missing:
            return None

    def tree(self, folder: str = "") -> list[tuple[str, int]]:
        """See `Store`."""
        with self._said(folder, " (listing)"):
            pages = list(obstore.list(self._client, prefix=folder or None))
        return sorted((one["path"], int(one["size"])) for page in pages for one in page)

    def list(self, suffix: str = "") -> list[tuple[str, int]]:
        """See `Store`."""
        with self._said("", ""):
            found = obstore.list_with_delimiter(self._client)["objects"]
        return sorted((one["path"], int(one["size"])) for one in found if one["path"].endswith(suffix))

    def put_bytes(self, name: str, data: bytes) -> None:
        """See `Store`."""
        with self._said(name, " (writing)"):
            obstore.put(self._client, urls.check_name(name, self.url), data, use_multipart=False)

    def put_file(self, name: str, path: Path) -> None:
        """See `Store`."""
        # Parts grow with the file: S3 takes at most 10,000 of one object.
        part = max(stores.PIECE, -(-path.stat().st_size // 9000))
        with self._said(name, " (writing)"):
            obstore.put(
                self._client,
                urls.check_name(name, self.url),
                path,
                chunk_size=part,
                max_concurrency=WRITES_AT_ONCE,
            )

    def delete(self, name: str) -> None:
        """See `Store`."""
        with contextlib.suppress(stores.Missing), self._said(name, " (deleting)"):
            obstore.delete(self._client, urls.check_name(name, self.url))

    def _at(self, name: str) -> str:
        return urls.join(self.url, name) if name else self.url

    def _said(self, name: str, doing: str) -> _Translated:
        return _Translated(self._at(name), doing, self.recipe)


_process = 0
"""The process that obstore's threads belong to; 0: they have not been started."""


class _Translated:
    """A block in which obstore's errors become ours."""

    def __init__(self, at: str, doing: str, recipe: StoreRecipe) -> None:
        self.at, self.doing, self.recipe = at, doing, recipe

    def __enter__(self) -> None:
        global _process
        _process = _process or os.getpid()
        if (
            _process != os.getpid()
        ):  # its threads did not come along, and every call would wait for them for ever
            raise stores.StoreFailure(
                f"{self.at}: this process was forked from one that had used an object store already; start it by "
                "forkserver or spawn instead"
            )

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise stores.missing(self.at) from None
        if isinstance(error, exceptions.BaseError):
            raise self._ours(error) from None

    def _ours(self, error: BaseException) -> Exception:
        at, answered = self.at + self.doing, _answered(str(error), self.recipe)
        refused = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        if isinstance(error, refused) or re.match("40[13]|.*(credential|AccessKey|Account)", answered):
            return stores.refused(at, answered)
        if answered.startswith("416"):
            return UserError(
                f"{at}: {answered}: the object is shorter than the index says; upload it again or pack again"
            )
        if "non-partial" in answered:
            return stores.NoRanges(f"{self.at}: the store sends whole objects only, not ranges")
        if re.match("[34]", answered) and not re.match("408|429", answered):
            return stores.StoreRefusal(
                f"{at}: the store answered {answered}; check the URL, store.endpoint and store.region"
            )
        if answered.startswith("Generic"):  # none of what obstore tries again
            return stores.StoreFailure(f"{at}: {answered}; see that this is a store of that kind")
        return stores.failure(at, answered, self.recipe)


def _answered(text: str, recipe: StoreRecipe) -> str:
    """What the store said, in some words: no URL, no body but its error code, nothing signed."""
    status = re.search(r"status code: (\d{3}(?: [A-Z][A-Za-z -]+)?)", text)
    code = re.search(r"<Code>(\w{1,60})</Code>", text)
    if status:
        return status[1].strip() + (f" ({code[1]})" if code else "")
    if "kind: Timeout" in text or "TimedOut" in text:
        return f"no answer, or not all of it, within {recipe.timeout_s:g} s"
    if "kind: Connect" in text or "ConnectError" in text:
        message = re.search(r'message: "([^"]{1,80})"', text)
        return f"no connection{f' ({message[1]})' if message else ''}"
    if "IncompleteBody" in text or "UnexpectedEof" in text or "kind: Interrupted" in text:
        return "the answer was cut short"
    first = text.partition("\n")[0]
    return re.sub(r"\S+://\S+", "URL", first)[:200]


def _client(url: Url, recipe: StoreRecipe) -> Any:
    endpoint = recipe.endpoint
    if url.scheme == "s3":
        endpoint = (
            endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        )
    seconds = timedelta(seconds=recipe.timeout_s)
    options: Any = {
        "timeout": seconds,
        "connect_timeout": min(seconds, timedelta(seconds=5)),
        "allow_http": endpoint.startswith("http://"),
        "user_agent": "geopose-dist",
    }
    retry: Any = {
        "max_retries": recipe.retries,
        "retry_timeout": seconds * (recipe.retries + 1)
        + timedelta(seconds=stores.MAX_PAUSE_S * recipe.retries + 1),
        "backoff": {
            "init_backoff": timedelta(seconds=max(recipe.backoff_s, 0.001)),
            "max_backoff": timedelta(seconds=stores.MAX_PAUSE_S),
            "base": 2,
        },
    }
    both: Any = {"client_options": options, "retry_config": retry, "prefix": url.path or None}
    if recipe.anonymous:
        both["skip_signature"] = True
    if endpoint:
        both["base_url" if url.scheme == "gs" else "endpoint"] = endpoint
    if url.scheme == "gs":
        return GCSStore(url.host, **both)
    if url.scheme == "az":
        return AzureStore(url.host, **both)
    region = recipe.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return S3Store(url.host, region=region or "us-east-1", **both)
