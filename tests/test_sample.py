"""The facts of a tile as JSON: what is written is read, and what could not be right is refused by name."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geopose_dist.data.sample import TileFacts, View
from geopose_dist.errors import UserError
from geopose_dist.geometry import Pose

FACTS = TileFacts("JAX", "JAX-007", 0.35, 0.9, 1.25, (128, 192))


@given(
    st.builds(
        TileFacts,
        city=st.text(min_size=1, max_size=8),
        place=st.none() | st.text(max_size=8),
        gsd_m=st.none() | st.floats(1e-3, 100),
        scale_px_per_m=st.none() | st.floats(1e-6, 100),
        angle_rad=st.none() | st.floats(0, 6.28),
        size=st.tuples(st.integers(1, 65536), st.integers(1, 65536)),
    )
)
def test_facts_come_back_as_written(facts: TileFacts) -> None:
    assert TileFacts.from_json(facts.to_json(), "here") == facts


def test_the_same_facts_are_the_same_bytes() -> None:
    names = list(json.loads(FACTS.to_json()))
    assert names == sorted(names)
    assert FACTS.to_json() == TileFacts.from_json(FACTS.to_json(), "").to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"scale_px_per_m": 0},
        {"scale_px_per_m": -1.0},
        {"gsd_m": float("inf")},
        {"angle_rad": float("nan")},
        {"size": [0, 5]},
        {"size": [10**6, 5]},  # a decoder would be asked for a terabyte
        {"size": [1]},
        {"size": "big"},
        {"city": ...},
        {"gsd_m": "wide"},
    ],
)
def test_unusable_facts_are_refused_by_name(change: dict[str, object]) -> None:
    facts = {**json.loads(FACTS.to_json()), **change}
    facts = {name: value for name, value in facts.items() if value is not ...}
    with pytest.raises(UserError, match=r"^shard\.tar/JAX_1\.json"):
        TileFacts.from_json(json.dumps(facts).encode(), "shard.tar/JAX_1.json")


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b'{"city": "JAX"', b"\xff\xfe"])
def test_damaged_facts_say_what_to_do(data: bytes) -> None:
    with pytest.raises(UserError, match="pack again"):
        TileFacts.from_json(data, "x.json")


def test_a_pose_needs_scale_and_angle() -> None:
    rgb = np.zeros((4, 6, 3), np.uint8)
    view = View("JAX_1", "JAX", rgb, None, 0.4, 0.5, 1.0)
    assert view.pose == Pose(1.0, 0.5, 0.4)
    assert View("JAX_1", "JAX", rgb, None, 0.4, 0.5, None).pose is None
    assert View("JAX_1", "JAX", rgb, None, 0.4, None, 1.0).pose is None
