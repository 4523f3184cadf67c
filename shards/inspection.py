"""What must hold of one sample's bytes; shared by `geopose verify` and `geopose pack --index-only`.

Shards may come from anywhere: nothing is unpickled or extracted, names and member types are judged by
`data.members`, sizes by the decoders' own checks, and members that only a pickle could read are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geopose_dist.data import codecs
from geopose_dist.data.members import parse_members
from geopose_dist.data.sample import TileFacts
from geopose_dist.data.tile import tallest_m, unknown_px
from geopose_dist.errors import UserError

PICKLES = ("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "cls")
"""Extensions that WebDataset's own decoders may hand to pickle or a like of it."""


@dataclass(frozen=True)
class Inspected:
    """A sample that is sound: its key, facts, and heights if it has any."""

    key: str
    facts: TileFacts
    agl_cm: npt.NDArray[np.uint16] | None


def inspect(data: bytes, where: str, *, decode_rgb: bool = True) -> Inspected:
    """Parse and decode one sample's bytes (UserError naming the member that is wrong)."""
    key, members = parse_members(data, where)
    for extension in members:
        if extension.rpartition(".")[2].lower() in PICKLES:
            raise UserError(
                f"{where}: member {key}.{extension} is a pickle or like one; such shards are refused"
            )
    where = f"{where}, {key}"
    if "json" not in members:
        raise UserError(
            f"{where}: no {key}.json beside {', '.join(members)}; wanted a tile's facts; pack again"
        )
    facts = TileFacts.from_json(bytes(members["json"]), f"{where}.json")
    rgb, agl = (_only(members, kind, where) for kind in ("rgb.", "agl."))
    if rgb is None:
        raise UserError(f"{where}: no {key}.rgb.* beside {', '.join(members)}; wanted an image; pack again")
    if decode_rgb:
        codecs.decode_rgb(rgb[4:], bytes(members[rgb]), f"{where}.{rgb}", facts.size)
    agl_cm = None
    if agl is not None:
        agl_cm = codecs.decode_agl(agl[4:], bytes(members[agl]), f"{where}.{agl}", facts.size)
    _check_told(facts, agl_cm, where)
    return Inspected(key, facts, agl_cm)


def _check_told(facts: TileFacts, agl_cm: npt.NDArray[np.uint16] | None, where: str) -> None:
    """What facts tell of heights, so that a loader need not decode them, must be true of them (UserError)."""
    if facts.tallest_m is None:
        return
    told = facts.tallest_m, facts.unknown_px
    found = (None, None) if agl_cm is None else (tallest_m(agl_cm), unknown_px(agl_cm))
    if told != found:
        raise UserError(
            f"{where}.json: tallest_m and unknown_px are {told[0]} and {told[1]}, but the heights say {found[0]} and "
            f"{found[1]}; pack again"
        )


def _only(members: dict[str, memoryview], kind: str, where: str) -> str | None:
    found = [extension for extension in members if extension.startswith(kind)]
    if len(found) > 1:
        raise UserError(f"{where}: {' and '.join(found)} for one image; wanted one of them; pack again")
    return found[0] if found else None
