"""The tutorial says what its commands do: its blocks run, in small here, and as written in a soak test."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from geopose_dist.cli import VERBS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial" / "README.md"
RUNNER = ROOT / "tools" / "run_tutorial.py"
SMALL = ("PLACES=12", "VIEWS=2", "SIZE=128", "STEPS=2", "CROP=64")


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_tutorial", RUNNER)
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_tutorial"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_is_whole(runner):
    page = PAGE.read_text()
    found = runner.blocks(page)
    code = "\n".join(block.code for block in found if block.kind == "sh")
    verbs = set(re.findall(r"^geopose (\w+)", code, re.MULTILINE))
    wanted = "synth explore split pack verify train predict convert submit evaluate rectify"
    assert verbs == set(wanted.split()) <= VERBS.keys()
    assert all(block.said is None or block.said.strip() for block in found), "run it with --write"
    assert page.count("```") == 2 * (len(found) + sum(block.said is not None for block in found))
    pictures = [PAGE.parent / match["name"] for match in runner.PICTURE.finditer(page)]
    assert len(pictures) >= 2
    assert sum(path.stat().st_size for path in pictures) < 1.5e6
    assert {path.name for path in PAGE.parent.iterdir()} == {"README.md", *(path.name for path in pictures)}


def test_numbers_agree_within_a_quarter_and_words_exactly(runner):
    said = "ARG  12 tiles, score  0.40\nfinal 0.31\n"
    assert runner.differences(said, "ARG 14 tiles, score 0.20\nfinal 0.31\n", numbers=True) == []
    assert len(runner.differences(said, "ARG 19 tiles, score 0.40\nfinal 0.31\n", numbers=True)) == 1
    assert runner.differences(said, "ARG 19 tiles, score -4.0\nfinal 7\n", numbers=False) == []
    assert len(runner.differences(said, "ATL 12 tiles, score 0.40\nfinal 0.31\n", numbers=False)) == 1
    assert runner.differences(said, "ARG 12 tiles, score 0.40\n", numbers=True) == [
        "2 lines on the page, 1 printed"
    ]


def test_outputs_are_written_where_the_page_wants_them(runner):
    page = "a\n```sh\nA=1\n```\n\n```sh\necho $A\n```\n\n```text\nold\n```\nb\n"
    one, two = runner.blocks(page)
    assert (one.said, two.said) == (None, "old\n")
    assert runner.settings_of(page, {"A": "5"}) == {"A": "5"}
    assert runner.written(page, ["", "5\n"]) == page.replace("old", "5")
    with pytest.raises(SystemExit, match="the page sets no B; it sets A"):
        runner.settings_of(page, {"B": "5"})


def test_a_block_that_fails_ends_the_run(runner, tmp_path, capsys):
    assert runner.run_block(runner.Block("sh", "echo $A  \n", ""), tmp_path, {"A": "7"}) == "7\n"
    with pytest.raises(SystemExit, match="ended with 3"):
        runner.run_block(runner.Block("sh", "echo said\n(exit 3)\necho more\n", None), tmp_path, {})
    assert capsys.readouterr().out == "said\n"


def run_page(folder: Path, *words: str, timeout: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUNNER), "--folder", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.extra
def test_the_tutorial_runs_in_small(tmp_path):
    done = run_page(tmp_path / "walk", *(word for one in SMALL for word in ("--set", one)), timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "blocks ran, 2 pictures made" in done.stdout


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_tutorial_says_what_it_does(tmp_path):
    done = run_page(tmp_path / "walk", timeout=3500)
    assert done.returncode == 0, done.stdout + done.stderr
