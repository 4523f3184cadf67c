"""Where a run is: `out` as a folder of this machine, and the store behind it if it is a URL."""

from __future__ import annotations

from pathlib import Path

from geopose_dist.data import urls
from geopose_dist.model.run_store import RunStore, working_copy
from geopose_dist.train.recipe import TrainRecipe


def local_folder(recipe: TrainRecipe) -> Path:
    """The folder of a run on this machine: `out` itself, or the working copy of the URL that it is."""
    if not urls.is_url(recipe.out):
        return Path(recipe.out)
    return working_copy(recipe.out, recipe.data.store)


def run_store(recipe: TrainRecipe) -> RunStore | None:
    """The store that a run is kept in; None if its `out` is a folder (UserError: one that cannot be written to)."""
    if not urls.is_url(recipe.out):
        return None
    return RunStore(recipe.out, recipe.data.store, local_folder(recipe))
