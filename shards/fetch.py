"""Shards of a store as local files for a while: one at a time, in a temporary folder that goes with the block."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from geopose_dist.data import manifest, stores, urls
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.errors import UserError

MAX_INDEX_BYTES = 1 << 36
"""An index of three thousand million samples; more is no index."""


def is_url(place: str) -> bool:
    """Whether shards at `place` have to be fetched (UserError for URLs that are refused)."""
    if not urls.is_url(place):
        return False
    urls.parse(place)
    return True


@contextlib.contextmanager
def local_copy(
    place: str, name: str, recipe: StoreRecipe, *, limit: int, scratch: str = ""
) -> Iterator[Path]:
    """A file of a place, for the time of the block; of a longer one its first `limit` bytes and one more.

    Raises `stores.Missing` if there is none.
    """
    with tempfile.TemporaryDirectory(prefix="geopose-fetch-", dir=scratch or None) as folder:
        path = Path(folder) / name
        left = limit + 1
        with path.open("wb") as file:
            for piece in stores.open_store(place, recipe).stream(name):
                file.write(piece[:left])
                left -= len(piece[:left])
                if left == 0:
                    break
        yield path


@contextlib.contextmanager
def described(place: str, recipe: StoreRecipe, scratch: str = "") -> Iterator[Path]:
    """A local folder that holds the manifest and index of a place."""
    if not is_url(place):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="geopose-fetch-", dir=scratch or None) as folder:
        store = stores.open_store(place, recipe)
        for name in (manifest.MANIFEST_NAME, manifest.INDEX_NAME):
            left = MAX_INDEX_BYTES
            try:
                with (Path(folder) / name).open("wb") as file:
                    for piece in store.stream(name):
                        left -= len(piece)
                        if left < 0:
                            raise UserError(
                                f"{urls.join(place, name)}: more than {MAX_INDEX_BYTES} bytes; refused"
                            )
                        file.write(piece)
            except stores.Missing:
                raise UserError(
                    f"{urls.join(place, name)}: not found; wanted shards of a finished `geopose pack`; run it again "
                    "to go on, or `geopose pack --index-only` for shards made elsewhere"
                ) from None
        yield Path(folder)
