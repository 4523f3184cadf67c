"""The bench harness: cases by name, arguments by need, a JSON that says what it was taken with."""

import inspect
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geopose_dist import cli
from geopose_dist.bench import harness, machine
from geopose_dist.bench.recipe import BenchRecipe
from geopose_dist.errors import UserError


def plain(repeats: int) -> dict[str, Any]:
    found = harness.measure(lambda: None, repeats)
    return {"tiles_per_s": 2.0, "spread": found.spread, "repeats": repeats}


def beside_a_baseline() -> list[dict[str, Any]]:
    return [
        {
            "case": "ours",
            "tiles_per_s": np.float32(6.0),
            "spread": 0.01,
            "baseline": "theirs",
            "speedup": 3.0,
        },
        {"case": "theirs", "tiles_per_s": 2.0, "spread": 0.01},
    ]


def reads(shards: str, recipe: BenchRecipe) -> dict[str, Any]:
    return {"tiles_per_s": 1.0, "spread": 0.0, "shards": shards, "verdict": "it reads"}


CASES: dict[str, Callable[..., Any]] = {"plain": plain, "beside": beside_a_baseline, "reads": reads}


SHIPPED = harness.collect


def test_shipped_cases_are_functions_of_what_is_offered() -> None:
    for name, case in SHIPPED().items():
        for parameter in inspect.signature(case).parameters.values():
            offered = parameter.name in ("repeats", "shards", "recipe", "run")
            assert offered or parameter.default is not parameter.empty, f"{name} wants {parameter.name}"


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "collect", lambda: CASES)
    monkeypatch.setattr(harness, "keep_to", lambda threads: None)


def bench(tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "bench.json"
    assert cli.main(["bench", *words, "--json", str(out)]) == 0
    facts: dict[str, Any] = json.loads(out.read_text())
    return facts


def test_results_say_what_they_were_taken_with(tmp_path: Path) -> None:
    facts = bench(tmp_path, "plain", "beside", "--repeats", "3")
    assert [row["case"] for row in facts["results"]] == ["plain", "ours", "theirs"]
    assert facts["results"][0]["repeats"] == 3
    assert facts["results"][1]["tiles_per_s"] == 6.0
    assert facts["verdict"] == "ours is 3.00 times as fast as theirs"
    assert {"cpu", "cores", "memory_gib", "gpus", "versions"} <= facts["machine"].keys()
    assert facts["command"].startswith("geopose ")
    assert time.strptime(facts["date"], "%Y-%m-%d")
    assert isinstance(facts["commit"], str)


@pytest.mark.parametrize("option", ["--shards", "--data.shards"])
def test_shards_have_two_names(tmp_path: Path, option: str) -> None:
    facts = bench(tmp_path, "reads", option, "some/shards")
    assert facts["results"][0]["shards"] == "some/shards"
    assert facts["verdict"] == "it reads"


def test_without_names_all_run_that_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = bench(tmp_path)
    assert [row["case"] for row in facts["results"]] == ["plain", "ours", "theirs"]
    assert "reads is left out" in capsys.readouterr().err


def test_unknown_and_unable_cases_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "plian"]) == 2
    said = capsys.readouterr().err
    assert "beside, plain, reads" in said
    assert "did you mean plain" in said
    assert cli.main(["bench", "reads"]) == 2
    assert "needs --shards" in capsys.readouterr().err


def test_median_and_spread() -> None:
    found = harness.timing([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.median_s, found.spread) == (3.0, pytest.approx(99 / 2 / 3))  # five repeats hide no outlier
    assert harness.timing([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 100.0]).spread == pytest.approx(6 / 2 / 5)
    assert harness.timing([2.0]).spread == 0.0
    calls: list[int] = []
    harness.measure(lambda: calls.append(1), repeats=4, warm_up=2)
    assert len(calls) == 6


@pytest.mark.parametrize("count", [5, 7, 9, 15])
def test_the_spread_holds_the_true_median(count: int) -> None:
    """Of crooked noise, too: at least 93 of 100 intervals do, and they are no wider than that takes."""
    rng = np.random.Generator(np.random.Philox(count))
    runs = rng.lognormal(0.0, 1.0, (4000, count))
    spare = harness.spare_at_an_end(count)
    ordered = np.sort(runs, axis=1)
    assert ((ordered[:, spare] <= 1) & (ordered[:, -1 - spare] >= 1)).mean() > 0.925
    narrower = (ordered[:, spare + 1] <= 1) & (ordered[:, -2 - spare] >= 1)
    assert narrower.mean() < 0.93
    # The median of another run lies as near as both spreads say.
    medians, spreads = zip(*((t.median_s, t.spread) for t in map(harness.timing, runs.tolist())), strict=True)
    off = np.abs(np.log(np.array(medians[::2]) / np.array(medians[1::2])))
    assert (off <= np.array(spreads[::2]) + np.array(spreads[1::2])).mean() > 0.97


def test_one_repeat_has_no_spread(tmp_path: Path) -> None:
    assert bench(tmp_path, "plain", "--repeats", "1")["results"][0]["spread"] is None


def test_a_wrong_output_is_told_and_the_other_cases_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half() -> Iterator[dict[str, Any]]:
        yield {"tiles_per_s": 5.0, "spread": 0.1}
        harness.check(False, "the second answer is 7, wanted 8")

    monkeypatch.setattr(harness, "collect", lambda: {"half": half, "plain": plain})
    out = tmp_path / "bench.json"
    assert cli.main(["bench", "--json", str(out)]) == 1
    assert "1 of 2 cases failed:\n  half: wrong output: the second answer is 7" in capsys.readouterr().err
    facts = json.loads(out.read_text())
    assert [row["case"] for row in facts["results"]] == ["half", "plain"]
    assert len(facts["failed"]) == 1


def test_what_was_measured_is_kept_when_the_machine_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies() -> Iterator[dict[str, Any]]:
        yield {"tiles_per_s": 5.0, "spread": 0.1}
        raise RuntimeError("out of memory")

    monkeypatch.setattr(harness, "collect", lambda: {"dies": dies})
    with pytest.raises(RuntimeError):
        cli.main(["bench", "dies", "--json", str(tmp_path / "bench.json")])
    assert len(json.loads((tmp_path / "bench.json").read_text())["results"]) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"speedup": 1e6}, "speedup 1e+06"),
        ({"ratio": 0.0}, "ratio 0"),
        ({"tiles_per_s": -1.0}, "tiles_per_s -1"),
        ({"ms": math.nan}, "ms nan"),
    ],
)
def test_quick_refuses_what_no_measurement_gives(
    row: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "collect", lambda: {"odd": lambda: dict(row)})
    assert cli.main(["bench", "odd", "--quick", "true"]) == 1
    assert said in capsys.readouterr().err
    assert cli.main(["bench", "odd"]) == 0


SIDE = 1024
QUICK = {"SIDE": 64}


def test_quick_sizes_end_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(harness, "collect", lambda: {"sized": sized(seen)})
    for words in (["--quick", "true"], []):
        assert cli.main(["bench", "sized", *words]) == 0
    assert seen == [64, 1024]


def sized(seen: list[int]) -> Callable[[], dict[str, Any]]:
    def case() -> dict[str, Any]:
        seen.append(SIDE)
        return {"ms": 1.0}

    return case


def test_a_copy_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEOPOSE_COMMIT", "abc+")
    assert machine.commit() == ("abc", True)


def test_pinning_ends_with_the_block() -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system cannot pin threads to cores")
    before = os.sched_getaffinity(0)
    with harness.pinned():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_the_commit_is_unknown_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "a" / "b" / "machine.py"))
    assert machine.commit() == ("unknown", False)


def test_the_commit_tells_of_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-m", "x")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "a" / "b" / "machine.py"))
    head, changed = machine.commit()
    assert len(head) == 40
    assert not changed
    (tmp_path / "f").write_text("2")
    assert machine.commit() == (head, True)


def test_a_case_that_fails_for_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> dict[str, Any]:
        raise UserError("no such weights")

    monkeypatch.setattr(harness, "collect", lambda: {"fails": fails})
    assert cli.main(["bench", "fails"]) == 2
