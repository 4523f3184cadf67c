"""Opening shards wherever they are: a folder, a URL, or a folder that names a URL.

`manifest.json` and `index.npy` of a URL are fetched once into the cache (a folder named by URL and content) and
opened there like those of a local folder, the index memory-mapped, so loader processes fetch neither.
Both are bounded before they are read: the index by the manifest, the manifest by MAX_MANIFEST_BYTES. A local folder
made by `geopose pack --index-only --source URL` holds them for shards that stay where they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from geopose_dist import files
from geopose_dist.data import cache, manifest, stores, urls
from geopose_dist.data.manifest import INDEX_DTYPE, INDEX_NAME, MANIFEST_NAME, Manifest, ShardSet
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.data.stores import Store
from geopose_dist.errors import UserError

MAX_MANIFEST_BYTES = 256 << 20
"""Some 1.3 million shards; a larger one is refused unread."""
MAX_NPY_HEADER_BYTES = 4096


def open_shards(shards: str, split: str, store: StoreRecipe | None = None) -> ShardSet:
    """One split of the shards at a folder or URL (UserError; StoreFailure if a store does not answer)."""
    recipe = store or StoreRecipe()
    folder, root, facts = locate(shards, recipe)
    return reopen(folder, root, split, recipe, facts)


def reopen(
    folder: Path, root: str, split: str, store: StoreRecipe, facts: Manifest | None = None
) -> ShardSet:
    """A split whose manifest and index lie in `folder` and whose shards are at `root`."""
    opened = manifest.open_split(folder, split, facts)
    return dataclasses.replace(opened, root=root, folder=str(folder), store=store)


def read_manifest(shards: str, store: StoreRecipe | None = None) -> Manifest:
    """The manifest of the shards at a folder or URL (UserError, StoreFailure)."""
    return locate(shards, store or StoreRecipe())[2]


def locate(shards: str, recipe: StoreRecipe) -> tuple[Path, str, Manifest]:
    """The local folder with manifest and index, the folder or URL with the shards, and the manifest."""
    check_place(shards)
    if urls.is_url(shards):
        folder = _fetched(shards, recipe)
        return folder, str(urls.parse(shards)), manifest.read_manifest(folder)
    facts = manifest.read_manifest(Path(shards))
    elsewhere = facts.recipe.get("shards_url")
    return Path(shards), str(urls.parse(str(elsewhere))) if elsewhere is not None else shards, facts


def check_place(shards: str) -> None:
    """Refuse what is neither a folder nor an allowed URL, before anything tries to open it (UserError)."""
    if not shards:
        raise UserError(
            "no shards are named; give the folder that `geopose pack` made, or its URL, as --data.shards"
        )
    if urls.is_url(shards):
        urls.parse(shards)


def cache_root(recipe: StoreRecipe) -> Path:
    """The folder of the cache."""
    return Path(recipe.cache_dir) if recipe.cache_dir else cache.default_root()


def data_set_name(shards: str, manifest_bytes: bytes) -> str:
    """Name of a data set's folder in the cache: another content of the same URL is another data set."""
    return hashlib.sha256(f"{shards}\n".encode() + manifest_bytes).hexdigest()[:24]


def cache_folder(shard_set: ShardSet) -> Path:
    """Where the cache keeps what was read of a set."""
    if Path(shard_set.folder).parent == cache_root(shard_set.store):
        return Path(shard_set.folder)
    text = (Path(shard_set.folder) / MANIFEST_NAME).read_bytes()
    return cache_root(shard_set.store) / data_set_name(shard_set.root, text)


def _fetched(shards: str, recipe: StoreRecipe) -> Path:
    """The folder in the cache that holds manifest and index of a URL."""
    store = stores.open_store(shards, recipe)
    try:
        data = stores.read_small(store, MANIFEST_NAME, MAX_MANIFEST_BYTES)
    except stores.Missing as error:
        raise UserError(
            f"{urls.join(store.url, MANIFEST_NAME)}: not found; wanted the manifest of a finished `geopose pack`; "
            "check the URL, or `geopose pack --index-only --source URL --out DIR` for shards made elsewhere"
        ) from error
    folder = cache_root(recipe) / data_set_name(store.url, data)
    try:
        if not (folder / MANIFEST_NAME).is_file():
            rows = _checked(data, urls.join(store.url, MANIFEST_NAME))
            _fetch_index(store, folder / INDEX_NAME, rows)
            files.write_bytes(folder / MANIFEST_NAME, data)  # last: a folder without it is unfinished
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); name a folder on a disk of this machine as "
            "store.cache_dir"
        ) from error
    return folder


def _checked(data: bytes, where: str) -> int:
    """Rows that the index of this manifest must have (UserError: not a manifest, or not one for a URL)."""
    facts = manifest.parse(data, where)
    if "shards_url" in facts.recipe:
        raise UserError(
            f"{where}: says that its shards are at another place; only a manifest in a local folder may; name that "
            "place itself"
        )
    return sum(shard.samples for shard in facts.shards)


def _fetch_index(store: Store, path: Path, rows: int) -> None:
    wanted = rows * INDEX_DTYPE.itemsize
    received = 0
    with files.atomic_write(path) as file:
        for piece in store.stream(INDEX_NAME):
            received += len(piece)
            if received > wanted + MAX_NPY_HEADER_BYTES:
                break
            file.write(piece)
        if not wanted < received <= wanted + MAX_NPY_HEADER_BYTES:
            raise UserError(
                f"{urls.join(store.url, INDEX_NAME)}: {received} bytes or more, wanted {wanted} and a header for the "
                f"manifest's {rows} samples; it does not belong to the manifest beside it; upload both again"
            )
