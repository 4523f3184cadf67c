"""Work on results: comparing two files, the tables of PERFORMANCE.md, pictures."""

import json
import re
from pathlib import Path
from typing import Any

import imagecodecs
import pytest

from geopose_dist import cli
from geopose_dist.bench import compare, tables

ROOT = Path(__file__).parents[1]


def results(path: Path, rows: list[dict[str, Any]], cpu: str = "a processor") -> Path:
    facts = {
        "results": rows,
        "machine": {"cpu": cpu, "cores": 2, "gpus": []},
        "commit": "0123456789abcdef",
        "command": "geopose bench loader --json /somewhere/loader.json",
        "date": "2026-01-02",
    }
    path.write_text(json.dumps(facts))
    return path


def row(rate: float, spread: float = 0.02, codec: str = "qoi", **more: Any) -> dict[str, Any]:
    return {"case": "loader", "codec": codec, "tiles_per_s": rate, "spread": spread, **more}


def test_a_difference_counts_only_beyond_both_spreads() -> None:
    before = [row(100.0), row(50.0, codec="png"), row(10.0, codec="jph")]
    after = [row(130.0), row(51.0, codec="png"), row(7.0, codec="jph"), row(5.0, codec="new")]
    said = {
        (r["before"], r["after"]): (r["verdict"], round(r["ratio"], 2))
        for r in compare.compare(before, after)
    }
    assert said == {
        (100.0, 130.0): ("better", 1.3),
        (50.0, 51.0): ("same within noise", 1.02),
        (10.0, 7.0): ("worse", 0.7),
    }
    noisy = compare.compare([row(100.0, spread=0.2)], [row(130.0, spread=0.1)])
    assert noisy[0]["verdict"] == "same within noise"


def test_less_is_better_for_times() -> None:
    (one,) = compare.compare([{"case": "k", "ms": 10.0}], [{"case": "k", "ms": 5.0}])
    assert (one["ratio"], one["verdict"]) == (2.0, "better")


def test_compare_writes_json_and_warns_of_other_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = results(tmp_path / "a.json", [row(1.0)]), results(tmp_path / "b.json", [row(2.0)], cpu="another")
    assert cli.main(["bench", "compare", str(a), str(b), "--json", str(tmp_path / "c.json")]) == 0
    assert json.loads((tmp_path / "c.json").read_text())["results"][0]["ratio"] == 2.0
    assert "the machines differ in cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["compare", "a.json"], "takes two files of results, got 1"),
        (["compare", "a.json", "missing.json"], "no such file"),
        (["compare", "a.json", "broken.json"], "not a file of results"),
        (["compare", "a.json", "other.json"], "no measurement in common"),
        (["plot", "a.json", "--out", "x.bmp"], "wanted a file that ends in .png"),
        (["plot", "--out", "x.png"], "no results are named"),
        (["tables", "--page", "none.md"], "cannot be read"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    results(tmp_path / "a.json", [row(1.0)])
    results(tmp_path / "other.json", [row(1.0, codec="webp")])
    (tmp_path / "broken.json").write_text("{")
    assert cli.main(["bench", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_tables_are_made_from_results(tmp_path: Path) -> None:
    results(tmp_path / "r.json", [row(1234.5, spread=0.031, speedup=4.256), {**row(1.0), "case": "other"}])
    block = "<!-- table r.json: codec, tiles_per_s as tiles/s, spread, speedup where load* -->"
    page = f"text\n{block}\nold\n<!-- end -->\nmore\n"
    made = tables.filled(page, tmp_path)
    assert "| codec | tiles/s | spread | speedup |\n|---|--:|--:|--:|\n| qoi | 1,234 | 3% | 4.26 |\n" in made
    assert "`geopose bench loader --json loader.json`: a processor, 2 cores, no GPU; 2026-01-02" in made
    assert "old" not in made
    assert made.startswith("text\n")
    assert made.endswith("<!-- end -->\nmore\n")
    assert tables.filled(made, tmp_path) == made


def test_a_page_that_says_something_else_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "filled", lambda text: text.replace("1", "2"))
    page = tmp_path / "page.md"
    page.write_text("1")
    assert cli.main(["bench", "tables", "--page", str(page), "--check"]) == 1
    assert page.read_text() == "1"
    assert cli.main(["bench", "tables", "--page", str(page)]) == 0
    assert page.read_text() == "2"


def test_the_tables_of_this_repository_are_those_of_its_results() -> None:
    page = (ROOT / "PERFORMANCE.md").read_text()
    assert len(re.findall("<!-- table ", page)) == len(tables.BLOCK.findall(page))
    assert tables.filled(page) == page


def test_plot_draws_ours_and_the_baseline(tmp_path: Path) -> None:
    a = results(tmp_path / "a.json", [row(10.0, baseline="loose", baseline_tiles_per_s=3.0)])
    assert cli.main(["bench", "plot", str(a), "--out", str(tmp_path / "f" / "a.png")]) == 0
    pixels = imagecodecs.imread(tmp_path / "f" / "a.png")
    ours = (pixels[..., :3] == (0x2A, 0x6F, 0x97)).all(-1).sum()
    theirs = (pixels[..., :3] == (0xB8, 0xB8, 0xB8)).all(-1).sum()
    assert ours / theirs == pytest.approx(10 / 3, rel=0.2)
