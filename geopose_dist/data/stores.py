"""Object stores and HTTP servers behind one small interface: ranges, whole bodies, and writing.

`open_store(url)` gives a `Store`: s3://, gs:// and az:// by `object_store`, http(s):// by `http_store` (reading only).
Objects appear whole or not at all, as these stores promise: a killed upload leaves the old object or none.
An outage is a `StoreFailure` after the last retry, a refusal or a missing object a `UserError`; both name URL,
offset, what was answered and what to do, and neither ever holds a credential.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from geopose_dist.data import urls
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.errors import FinishedWithFailures, UserError

PIECE = 8 << 20
"""Bytes asked for at a time where a whole object is read, and sent at a time where one is written."""
MAX_PAUSE_S = 10.0
"""Longest pause before a retry."""


class StoreFailure(FinishedWithFailures):
    """A store did not answer as it should, after all retries: nobody's mistake, and no damage of a shard."""


class StoreRefusal(UserError):
    """A store answered that this user may not: for the user to mend, and no damage of a shard either."""


class Missing(UserError):
    """There is no object of that name."""


class NoRanges(UserError):
    """The server sends whole objects only."""


class Store(Protocol):
    """Objects below one prefix. Names are relative to it and may hold folders, such as `step-8/net.pt`."""

    url: str

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset` of an object."""
        ...

    def stream(self, name: str) -> Iterator[bytes]:
        """A whole object from its start, in pieces; the receiver counts and checks them."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of an object; None if there is none of that name."""
        ...

    def tree(self, folder: str = "") -> list[tuple[str, int]]:
        """Name and bytes of all objects below `folder`, however deep, sorted."""
        ...

    def list(self, suffix: str = "") -> list[tuple[str, int]]:
        """Name and bytes of the objects right below the prefix whose names end so, sorted."""
        ...

    def put_bytes(self, name: str, data: bytes) -> None:
        """Write a small object, whole or not at all."""
        ...

    def put_file(self, name: str, path: Path) -> None:
        """Write a local file as an object, in parts if it is large, whole or not at all."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is fine."""
        ...


def open_store(url: str, recipe: StoreRecipe | None = None) -> Store:
    """The store that a URL names; nothing is asked of it yet (UserError: no such kind of URL).

    Not to be carried into another process: open one there.
    """
    parsed, recipe = urls.parse(url), recipe or StoreRecipe()
    if parsed.scheme in ("http", "https"):
        from geopose_dist.data.http_store import HttpStore

        return HttpStore(parsed, recipe)
    from geopose_dist.data.object_store import ObjectStore

    return ObjectStore(parsed, recipe)


def read_small(store: Store, name: str, limit: int) -> bytes:
    """A whole object of at most `limit` bytes (UserError if it is larger, or missing)."""
    parts, length = [], 0
    for piece in store.stream(name):
        parts.append(piece)
        length += len(piece)
        if length > limit:
            raise UserError(
                f"{urls.join(store.url, name)}: more than {limit} bytes, which none of ours has; refused"
            )
    return b"".join(parts)


def failure(at: str, answered: str, recipe: StoreRecipe) -> StoreFailure:
    """What to raise where a store still fails after the last retry."""
    return StoreFailure(
        f"{at}: the store failed {recipe.retries + 1} times, at last with: {answered}; see that it is up and "
        "reachable from here, then run the same command again (store.retries and store.timeout_s wait longer)"
    )


def refused(at: str, answered: str) -> StoreRefusal:
    """What to raise where a store wants other credentials."""
    return StoreRefusal(
        f"{at}: refused: {answered}; set the credentials of this store in the environment (AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME and _KEY, or a role of "
        "the machine), or store.anonymous true for a public bucket"
    )


def missing(at: str) -> Missing:
    """What to raise where there is no such object."""
    return Missing(f"{at}: not found; wanted an object of that name: check the URL, upload it, or pack again")
