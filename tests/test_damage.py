"""Damaged samples in a run: replaced, written down once over ranks and starts, and never more than allowed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import runs
import torch

from geopose_dist.data.batch import Substitution, pack
from geopose_dist.data.loader import plan_of
from geopose_dist.data.manifest import open_split
from geopose_dist.data.reader import Reader
from geopose_dist.data.recipe import DataRecipe
from geopose_dist.data.sample import View
from geopose_dist.errors import UserError
from geopose_dist.runtime import World
from geopose_dist.train.damage import DAMAGE_LOG, Damage

GLOBAL = 4


def batch_with(*positions: int):
    view = View("K", "ARG", np.zeros((4, 4, 3), np.uint8), None, None, None, None)
    found = [Substitution(p, f"BAD_{p}", "crc32 differs", f"GOOD_{p}") for p in positions]
    return pack([view], ["ARG"], [0], [0], found)


def positions(run: Path) -> list[int]:
    return [json.loads(line)["position"] for line in (run / DAMAGE_LOG).read_text().splitlines()]


def one_rank(run: Path, step: int, limit: int = 9) -> Damage:
    return Damage(run, step, limit, World(0, 1, 0, 1, torch.device("cpu")))


def test_what_was_replaced_is_written_once_and_counted_over_starts(tmp_path: Path):
    first = one_rank(tmp_path, 0)
    first.note(1, [batch_with(3), batch_with()])
    first.note(2, [batch_with(7, 5)])
    first.agreed(first.total())
    first.agreed(first.total())
    assert positions(tmp_path) == [3, 5, 7]
    again = one_rank(tmp_path, 1)  # killed after step 2, whose checkpoint was that of step 1
    assert again.total() == 1
    again.agreed(1)
    again.note(2, [batch_with(7, 5)])
    again.agreed(again.total())
    assert positions(tmp_path) == [3, 5, 7]
    line = json.loads((tmp_path / DAMAGE_LOG).read_text().splitlines()[1])
    assert line == {
        "step": 2, "position": 5, "key": "BAD_5", "reason": "crc32 differs", "replaced_by": "GOOD_5",
    }  # fmt: skip
    with pytest.raises(
        UserError, match=r"3 damaged samples were replaced so far.*damage_limit 2.*damage\.jsonl"
    ):
        one_rank(tmp_path, 2, limit=2).agreed(3)


def test_the_limit_names_the_last(tmp_path: Path):
    damage = one_rank(tmp_path, 0, limit=0)
    damage.agreed(0)
    damage.note(1, [batch_with(1, 2)])
    with pytest.raises(
        UserError, match=r"^2 damaged samples .*damage_limit 0 allows.*the last: crc32 differs$"
    ):
        damage.agreed(2)
    assert positions(tmp_path) == [1, 2]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """Real shards with a byte flipped in two of their twelve samples, and these samples' keys."""
    shards = runs.make_shards(tmp_path_factory.mktemp("damaged"))
    reader = Reader(open_split(shards, "train"))
    bad = {reader.key(2), reader.key(9)}
    for index in (2, 9):
        name, offset, length, _ = reader._span(index)
        with (shards / name).open("r+b") as file:
            file.seek(offset + length // 2)
            byte = file.read(1)[0]
            file.seek(offset + length // 2)
            file.write(bytes([byte ^ 255]))
    return shards, bad


def options(*more: str) -> tuple[str, ...]:
    sizes = (f"--data.global-batch={GLOBAL}", "--data.micro-batch=2", "--data.crop-px=32")
    return (*sizes, "--data.on-damage=substitute", "--data.workers=1", *more)


@pytest.mark.extra
def test_two_ranks_write_what_the_plan_says_and_stop_past_the_limit_of_all_starts(
    damaged: tuple[Path, set[str]], tmp_path: Path
):
    """Two are replaced before the run is stopped, and two after; no rank alone replaces as many as are allowed."""
    shards, bad = damaged
    plan = plan_of(open_split(shards, "train"), DataRecipe(global_batch=GLOBAL, micro_batch=2), 0)
    reader = Reader(open_split(shards, "train"))
    wanted = [p for p in range(6 * GLOBAL) if reader.key(plan.sample_at(p).index) in bad]
    assert len(wanted) == 4
    first = runs.launch(runs.words(shards, tmp_path, *options("--length=3 steps")), 2)
    code, said = runs.finish(first)
    assert code == 0, said
    assert positions(tmp_path) == wanted[:2]
    counts = [sum(p < GLOBAL * step for p in wanted) for step in range(1, 7)]
    assert [line["replaced"] for line in runs.lines(tmp_path)] == counts[:3]
    further = options("--length=6 steps", "--allow-change", "length", "--data.damage-limit=3")
    code, said = runs.finish(runs.launch(runs.words(shards, tmp_path, *further), 2))
    assert code != 0
    assert "4 damaged samples were replaced so far, more than data.damage_limit 3 allows" in said
    assert positions(tmp_path) == wanted
    assert [line["replaced"] for line in runs.lines(tmp_path)] == counts[: wanted[3] // GLOBAL + 1]
