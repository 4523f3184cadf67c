"""What a loader worker does: a list of requests in, a packed batch out.

Read, draw, decode, augment, pack, with random numbers keyed by (seed, visit, sample, crop), so that it does not
matter which worker of which rank does it, or when. Drawing comes before decoding, which is then of the window that
the draw reads. Errors come back as values with the sample's name.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch.utils.data import Dataset

from geopose_dist.data import plan as plans
from geopose_dist.data.batch import Batch, Substitution, pack
from geopose_dist.data.permutation import fold
from geopose_dist.data.reader import Reader
from geopose_dist.data.recipe import DataRecipe
from geopose_dist.data.ring import Parked, Ring
from geopose_dist.data.sample import Outline, View, Window
from geopose_dist.data.stores import StoreFailure, StoreRefusal
from geopose_dist.errors import UserError

Transform = Callable[[View, np.random.Generator], View]


@runtime_checkable
class Windowed(Protocol):
    """A transform that draws before it sees pixels, so that only the window which it will read is decoded."""

    def draw(self, tile: Outline, rng: np.random.Generator) -> Any:
        """Everything random about a sample."""
        ...

    def window(self, tile: Outline, drawn: Any) -> Window:
        """What of the tile `apply` reads for it."""
        ...

    def apply(self, view: View, drawn: Any) -> View:
        """Do it; `view` holds at least the window."""
        ...


REPLACEMENTS = 16
"""Samples drawn in the place of a damaged one before giving up: then most of the data set is gone."""


@dataclass(frozen=True)
class Failure:
    """An error of a worker on its way to the main process; torch would wrap it into a page of text."""

    sentence: str
    details: str
    users: bool


@dataclass(frozen=True, slots=True)
class Request:
    """One sample to be made: its place in the stream and what stands there."""

    position: int
    visit: int
    index: int


def generator_for(seed: int, visit: int, index: int, crop: int = 0) -> np.random.Generator:
    """The random numbers that belong to one crop of one visit of one sample, whoever draws them."""
    key = (fold(seed, plans.PURPOSE_AUGMENT, visit), fold(index, crop))
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))


class Requests(list[Request]):
    """The samples of one micro-batch; `slot` of the ring is lent for it, if any.

    Attributes:
        later: indices that the same worker will be asked for next, where they have to come from afar.
    """

    slot: int | None = None
    later: Sequence[int] = ()


class Samples(Dataset[Any]):
    """Lists of requests to batches; what a worker process does.

    Attributes:
        ring: the memory in which workers leave their batches; None: they travel in memory of their own.
    """

    def __init__(
        self, reader: Reader, recipe: DataRecipe, seed: int, transform: Transform | Windowed | None
    ) -> None:
        self.reader, self.recipe, self.seed = reader, recipe, seed
        self._windowed = transform if isinstance(transform, Windowed) else None  # slow to tell for a protocol
        self._plain = None if isinstance(transform, Windowed) else transform
        self.ring: Ring | None = None

    def __getitems__(self, requests: list[Request]) -> Batch | Parked | Failure:
        at: Request = requests[0]
        slot = requests.slot if isinstance(requests, Requests) else None
        try:
            views: list[View] = []
            substitutions: list[Substitution] = []
            later = requests.later if isinstance(requests, Requests) else ()
            self.reader.prefetch([*(r.index for r in requests), *later])
            for at in requests:
                views.append(self._view(at, substitutions))
            positions, visits = [r.position for r in requests], [r.visit for r in requests]
            cities = self.reader.shard_set.manifest.cities
            if self.ring is None or slot is None:
                return pack(views, cities, positions, visits, substitutions)
            room = self.ring.room(slot)
            return self.ring.parked(slot, pack(views, cities, positions, visits, substitutions, room))
        except UserError as error:
            return Failure(f"{error} (position {at.position} of the stream)", "", users=True)
        except StoreFailure as error:  # an outage: nobody's mistake, and no damage that a policy may cover up
            return Failure(f"{error} (position {at.position} of the stream)", "", users=False)
        except (
            Exception
        ) as error:  # a bug must reach the user with its sample's name: the parent raises again
            sample = f"{self.about(at.index)}, position {at.position}"
            sentence = f"loading {sample} failed: {type(error).__name__}: {error}"
            return Failure(sentence, traceback.format_exc(), users=False)

    def _view(self, at: Request, substitutions: list[Substitution]) -> View:
        """The sample asked for or, by policy, the keyed replacement of a damaged one."""
        index, first = at.index, ""
        for attempt in range(1, REPLACEMENTS + 1):
            made = self._made(index, generator_for(self.seed, at.visit, index, attempt - 1))
            if isinstance(made, View):
                if first:
                    substitutions.append(Substitution(at.position, self._name(at.index), first, made.key))
                return made
            if self.recipe.on_damage == "stop" or isinstance(made, StoreRefusal):
                raise made
            first = first or str(made)
            index = fold(self.seed, plans.PURPOSE_SUBSTITUTE, at.position, attempt) % len(self.reader)
        raise UserError(f"{first}; and the {REPLACEMENTS} samples drawn to replace it cannot be read either")

    def _made(self, index: int, rng: np.random.Generator) -> View | UserError:
        """A sample as training wants it, or what is damaged about it; other mistakes, such as a crop larger than
        the tile, are raised."""
        drawn, window = None, None
        try:
            tile = self.reader.tile(index)
            outline = tile.outline if self._windowed else None
        except UserError as error:
            return error
        if self._windowed and outline:
            drawn = self._windowed.draw(outline, rng)
            window = self._windowed.window(outline, drawn)
        try:
            view = tile.view(window)
        except UserError as error:
            return error
        if self._windowed:
            return self._windowed.apply(view, drawn)
        return view if self._plain is None else self._plain(view, rng)

    def about(self, index: int) -> str:
        """Key, shard and offset of a sample, for messages."""
        return f"{self._name(index)} ({self.reader.where(index)})"

    def _name(self, index: int) -> str:
        try:
            return self.reader.key(index)
        except UserError:
            return f"sample {index}"
