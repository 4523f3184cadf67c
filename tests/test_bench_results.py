"""Work on results: comparing two files, the tables of PERFORMANCE.md, pictures."""

import json
import re
from pathlib import Path
from typing import Any

import imagecodecs
import pytest

from geopose_dist import cli
from geopose_dist.bench import cases_accuracy, compare, harness, plot, tables

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


def row(rate: float, spread: float | None = 0.02, codec: str = "qoi", **more: Any) -> dict[str, Any]:
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


def test_one_repeat_judges_nothing_and_a_ratio_has_its_baselines_noise_too() -> None:
    (alone,) = compare.compare([row(100.0, spread=None)], [row(1.0)])
    assert alone["verdict"].startswith("unknown")
    beside = [
        {"case": "k", "ms": 1.0, "speedup": ratio, "ratio": ratio, "spread": 0.02, "baseline_spread": 0.1}
        for ratio in (1.0, 1.2)
    ]
    noises = {one["quantity"]: one["noise"] for one in compare.compare(beside[:1], beside[1:])}
    assert noises == {"speedup": pytest.approx(0.24), "ms": pytest.approx(0.04)}


def test_compare_can_be_told_to_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [results(tmp_path / f"{rate}.json", [row(rate)]) for rate in (100.0, 101.0, 120.0)]
    assert cli.main(["bench", "compare", str(files[0]), str(files[1]), "--check", "true"]) == 0
    assert cli.main(["bench", "compare", str(files[0]), str(files[2]), "--check", "true"]) == 1
    assert (
        "loader, tiles_per_s: 100 and 120 differ by 20%, more than both spreads, 4%"
        in capsys.readouterr().err
    )


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


def test_titles_may_hold_the_words_of_the_block_itself(tmp_path: Path) -> None:
    results(tmp_path / "r.json", [row(2.0, speedup=4.0), {**row(1.0), "case": "other"}])
    block = "<!-- table r.json: speedup as times as fast as it, tiles_per_s as rate where it counts where loader -->"
    made = tables.filled(f"{block}\n<!-- end -->\n", tmp_path)
    assert "| times as fast as it | rate where it counts |\n|--:|--:|\n| 4 | 2 |\n" in made


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


def test_plot_draws_scaling_and_learning_as_curves(tmp_path: Path) -> None:
    scaling = [
        {"case": f"scaling, {kind}", "ranks": n, "tiles_per_s": 10.0 * n}
        for kind in ("a", "b")
        for n in (1, 2)
    ]
    learning = [
        {"case": "accuracy", "recipe": "train/base", "seed": 0, "curve": [{"minutes": 1.0, "r2": 0.2}]},
        {"case": "accuracy, median", "recipe": "train/base", "r2": 0.2},
    ]
    files = [results(tmp_path / "s.json", scaling), results(tmp_path / "l.json", learning)]
    (first,), (second,) = map(plot.panels, files)
    assert isinstance(first, plot.Curves)
    assert first.lines == {"a": [(1, 10.0), (2, 20.0)], "b": [(1, 10.0), (2, 20.0)]}
    assert isinstance(second, plot.Curves)
    assert second.lines == {"train/base, seed 0": [(1.0, 0.2)]}
    assert cli.main(["bench", "plot", *map(str, files), "--out", str(tmp_path / "x.svg")]) == 0
    assert "minutes of training" in (tmp_path / "x.svg").read_text()


def test_plot_writes_a_page_with_machine_and_command(tmp_path: Path) -> None:
    evil = "<script>a</script>"
    facts = {"baseline": evil, "baseline_tiles_per_s": 3.0}
    a = results(tmp_path / "a.json", [row(10.0, **facts), row(20.0, codec="webp")])
    assert cli.main(["bench", "plot", str(a), "--out", str(tmp_path / "a.html")]) == 0
    text = (tmp_path / "a.html").read_text()
    assert "<script>" not in text
    assert text.count("&lt;script&gt;a&lt;/script&gt;: 3") == 1
    assert "loader, webp: 20" in text
    assert "geopose bench loader" in text
    assert "a processor" in text


def test_plot_writes_a_file_for_each_figure(tmp_path: Path) -> None:
    a = results(tmp_path / "a.json", [row(10.0), {"case": "b", "ms": 3.0}])
    assert cli.main(["bench", "plot", str(a), "--out", str(tmp_path / "f"), "--format", "pdf"]) == 0
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["a_ms.pdf", "a_tiles_s.pdf"]


def test_accuracy_takes_what_is_finished_and_runs_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(harness, "keep_to", lambda threads: None)
    monkeypatch.setattr(cases_accuracy, "geopose", ran.append)
    for recipe, score in (("train/base", 0.5), ("train/benchmark", 0.1)):
        for seed in (0, 1):
            work = tmp_path / "work" / f"{recipe.replace('/', '-')}-{seed}"
            step = work / "run" / "checkpoints" / "step-00000750"
            step.mkdir(parents=True)
            (step / "state.json").write_text(json.dumps({"elapsed_s": 300.0}))
            status = "done" if seed == 0 else "preempted"
            (work / "run" / "state.json").write_text(json.dumps({"status": status}))
            (work / "run" / "metrics.jsonl").write_text('{"step": 10}\n{"step": 750}\n')
            checked = [{"step": 375, "r2": 0.1}, {"step": 750, "r2": 0.2}, {"step": 750, "r2": 0.3}]
            (work / "run" / "validation.jsonl").write_text("".join(json.dumps(one) + "\n" for one in checked))
            city = {"r2": score + seed / 100, "agl_r2": 0.4}
            (work / "score.json").write_text(json.dumps({"r2": score + seed / 100, "cities": {"JAX": city}}))
    words = [
        "--accuracy.recipes",
        "[train/base,train/benchmark]",
        "--accuracy.seeds",
        "2",
        "--accuracy.source",
        "S",
    ]
    words += [
        "--accuracy.truth",
        "T",
        "--accuracy.work",
        str(tmp_path / "work"),
        "--accuracy.overlay",
        "hardware/cpu",
    ]
    out = tmp_path / "a.json"
    assert cli.main(["bench", "accuracy", "--shards", "X", *words, "--json", str(out)]) == 0
    facts = json.loads(out.read_text())
    medians = {row["recipe"]: row["r2"] for row in facts["results"] if row["case"] == "accuracy, median"}
    assert medians == {"train/base": pytest.approx(0.505), "train/benchmark": pytest.approx(0.105)}
    assert "train/base is best: 0.505" in facts["verdict"]
    assert facts["results"][0]["curve"] == [{"minutes": 2.5, "r2": 0.1}, {"minutes": 5.0, "r2": 0.3}]
    assert [(one[0], one[2], one[-1]) for one in ran] == [
        ("train", "train/base", "1"),
        ("train", "train/benchmark", "1"),
    ]
    assert "hardware/cpu" in ran[0]
