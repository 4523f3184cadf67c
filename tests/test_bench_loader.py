"""`geopose bench loader`: its tiles, its clock, and the stages; test_bench_quick.py runs it whole."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tars import write_shards

from geopose_dist.augment import Augmenter, AugmentRecipe
from geopose_dist.bench import cases_loader, loader_baselines, loader_stages
from geopose_dist.data.manifest import open_split
from geopose_dist.data.reader import Reader

SIZE = (96, 64)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [6, 6], SIZE)
    return folder


@pytest.mark.slow
def test_stages_are_told_for_every_codec(shards: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cases_loader, "STAGE_TILES", 2)
    rows = cases_loader.stages(repeats=1, shards=shards)
    assert {row["name"] for row in rows} >= {"qoi+lerc", "gpz+gpz", "htj2k+htj2k", "png+png"}
    for row in rows:
        parts = sum(row[f"{stage}_ms"] for stage in loader_stages.STAGES)
        assert row["total_ms"] == pytest.approx(parts, abs=0.1)
        assert row["decode_ms"] > 0


def test_rewritten_tiles_are_the_same_tiles(shards: Path, tmp_path: Path):
    views = cases_loader.tiles_of(shards)
    for rgb, agl in cases_loader.PAIRS.values():
        loader_baselines.write_members(tmp_path / rgb, views, rgb, agl)
        reader = Reader(open_split(tmp_path / rgb, "train"))
        for index, view in enumerate(views):
            found = reader.view(index)
            assert (found.key, found.pose, found.city) == (view.key, view.pose, view.city)
            np.testing.assert_array_equal(found.rgb, view.rgb)
            np.testing.assert_array_equal(found.agl_m, view.agl_m)


def test_cpu_time_counts_every_descendant():
    """A grandchild burns; its parent, a fork server for one, does nothing."""
    burn = "import time\nwhile time.process_time() < 30: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    before = cases_loader.cpu_s()
    child = subprocess.Popen([sys.executable, "-c", parent], start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while cases_loader.cpu_s() < before + 0.3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(child.pid, 9)
        child.wait()


def test_a_stopwatch_leaves_the_slowest_out():
    watch = loader_stages.Stopwatch()
    watch.seconds["read"] = [0.001] * 19 + [1.0]
    assert watch.mean_ms("read") == pytest.approx(1.0)


def test_stages_hand_over_what_the_loader_would(shards: Path):
    spent = loader_stages.stages(
        Reader(open_split(shards, "train")), Augmenter(AugmentRecipe("strong"), 32), 1
    )
    assert set(loader_stages.STAGES) < set(spent)
    assert all(value >= 0 for value in spent.values())
