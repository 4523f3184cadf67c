"""One sample's bytes, checked and parsed, before its pixels are decoded.

A `Tile` tells what is known without decoding (`outline`): enough to draw an augmentation and to know which window
of the tile it will read. `view` then decodes the whole tile or that window; members in blocks (`tiled`, `gpz`)
decode only the blocks that it touches, others are decoded whole and cut. Shards packed before the tallest height
was told decode their heights first.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geopose_dist.data import codecs
from geopose_dist.data.sample import U8, Outline, Part, TileFacts, View, Window
from geopose_dist.errors import UserError
from geopose_dist.geometry import F32, Pose
from geopose_dist.kernels import planes

UNKNOWN_CM = 65535

U16 = npt.NDArray[np.uint16]


def tallest_m(agl_cm: U16) -> float:
    """The tallest known height of uint16 centimetres [H, W], as the float32 metres that a view holds; 0 for none."""
    # One more than each: 65535 becomes 0, the least, without a mask.
    most = max(int((agl_cm + np.uint16(1)).max(initial=0)) - 1, 0)
    return float(planes.metres(np.array([[most]], np.uint16))[0, 0])


def unknown_px(agl_cm: U16) -> int:
    """How many heights are unknown."""
    return int(np.count_nonzero(agl_cm == UNKNOWN_CM))


@dataclass(frozen=True)
class Tile:
    """A sample read and checked, not decoded.

    Attributes:
        key: name of the tile.
        where: shard, offset and key, for messages.
        facts: what its `.json` tells.
        members: the bytes of its members by extension.
    """

    key: str
    where: str
    facts: TileFacts
    members: dict[str, memoryview]

    @classmethod
    def of(cls, key: str, members: dict[str, memoryview], where: str) -> Tile:
        """A tile of a sample's members (UserError without or with unusable facts); `where` names shard and offset."""
        where = f"{where}, {key}"
        if "json" not in members:
            raise UserError(f"{where}: no .json member among {', '.join(members)}; pack again")
        return cls(key, where, TileFacts.from_json(bytes(members["json"]), f"{where}.json"), members)

    @functools.cached_property
    def outline(self) -> Outline:
        """What can be known before decoding (UserError if heights have to be decoded for it and are damaged)."""
        facts, extension = self.facts, self._only("agl.")
        tallest, unknown = facts.tallest_m, facts.unknown_px
        if extension is not None and (tallest is None or unknown is None):
            tallest, unknown = tallest_m(self._all_heights), unknown_px(self._all_heights)
        pose = None
        if facts.scale_px_per_m is not None and facts.angle_rad is not None:
            pose = Pose(facts.angle_rad, facts.scale_px_per_m, facts.gsd_m)
        known = extension is not None and unknown == 0
        return Outline(self.key, facts.size, extension is not None, pose, tallest or 0.0, known)

    def view(self, window: Window | None = None) -> View:
        """The decoded sample, or a window of it; heights in metres, NaN where unknown (UserError)."""
        facts, part = self.facts, None
        if window is not None:
            stops = window.row + window.rows, window.col + window.cols
            if min(window) < 0 or min(window[2:]) < 1 or stops[0] > facts.size[0] or stops[1] > facts.size[1]:
                raise ValueError(f"window is {window}; wanted a part of the tile of {facts.size}")
        if window is not None and window != (0, 0, *facts.size):
            part = Part(window, facts.size, self.outline.tallest_m)
        return View(
            key=self.key,
            city=facts.city,
            rgb=self._rgb(None if part is None else window),
            agl_m=self._agl_m(None if part is None else window),
            gsd_m=facts.gsd_m,
            scale_px_per_m=facts.scale_px_per_m,
            angle_rad=facts.angle_rad,
            place=facts.place,
            part=part,
        )

    def _rgb(self, window: Window | None) -> U8:
        extension = self._only("rgb.")
        if extension is None:
            raise UserError(f"{self.where}: no .rgb.* member among {', '.join(self.members)}; pack again")
        name, data = extension.removeprefix("rgb."), self.members[extension]
        return codecs.decode_rgb(name, data, f"{self.where}.{extension}", self.facts.size, window)

    def _agl_m(self, window: Window | None) -> F32 | None:
        if self._only("agl.") is None:
            return None
        if "_all_heights" in self.__dict__:
            agl_cm = self._all_heights if window is None else self._all_heights[window.slices]
        else:
            agl_cm = self._agl_cm(window)
        told = self.facts.tallest_m
        if window is not None and told is not None and tallest_m(agl_cm) > told:
            # The window was chosen by what was told: with more, lines of sight would look beyond it.
            raise UserError(
                f"{self.where}.json: tallest_m is {told}, but its heights reach {tallest_m(agl_cm)} m; pack again"
            )
        return planes.metres(np.ascontiguousarray(agl_cm))

    @functools.cached_property
    def _all_heights(self) -> U16:
        return self._agl_cm(None)

    def _agl_cm(self, window: Window | None) -> U16:
        extension = self._only("agl.")
        assert extension is not None, "asked for before"
        name, data = extension.removeprefix("agl."), self.members[extension]
        return codecs.decode_agl(name, data, f"{self.where}.{extension}", self.facts.size, window)

    def _only(self, kind: str) -> str | None:
        """Extension of the only member of a kind (`rgb.` or `agl.`), if there is one."""
        found = [extension for extension in self.members if extension.startswith(kind)]
        if len(found) > 1:
            raise UserError(f"{self.where}: several members for one image: {', '.join(found)}; pack again")
        return found[0] if found else None
