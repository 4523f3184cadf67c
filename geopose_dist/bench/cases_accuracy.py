"""`geopose bench accuracy`: the score on unseen places against time, for several recipes and seeds.

Each run is the real commands: `geopose train` on the shards, `geopose predict` and `geopose evaluate` on tiles
whose places training never saw. Runs stay in `accuracy.work`, and one that is finished is not run again, so the
case may be interrupted. The points of a curve are the run's own validations; a validation's time is the run's
training time shared out by steps.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from geopose_dist.bench.harness import Row
from geopose_dist.bench.recipe import AccuracyRecipe, BenchRecipe
from geopose_dist.errors import FinishedWithFailures, UserError

PREDICT_CONFIG = {"cpu": "predict/cpu", "cuda": "predict/gpu"}


def accuracy(recipe: BenchRecipe, shards: str) -> list[Row]:
    """Final score of every recipe and seed, their medians, and the points of their curves."""
    asked = recipe.accuracy
    if not (asked.recipes and asked.source and asked.truth):
        raise UserError(
            "bench accuracy needs --accuracy.recipes [train/base,...], --accuracy.source (tiles of unseen places) and "
            "--accuracy.truth (their answers)"
        )
    rows: list[Row] = []
    for name in asked.recipes:
        found = [one_run(asked, shards, name, seed) for seed in range(asked.seeds)]
        rows += found
        scores = [row["r2"] for row in found]
        rows.append(
            {
                "case": "accuracy, median",
                "recipe": name,
                "r2": statistics.median(scores),
                "lowest": min(scores),
                "highest": max(scores),
                "seeds": len(scores),
                "train_minutes": statistics.median(row["train_minutes"] for row in found),
                "length": asked.length,
            }
        )
    best = max((row for row in rows if row["case"] == "accuracy, median"), key=lambda row: row["r2"])
    rows[-1]["verdict"] = f"{best['recipe']} is best: {best['r2']:.3f}, the median of {best['seeds']} seeds"
    return rows


def one_run(asked: AccuracyRecipe, shards: str, name: str, seed: int) -> Row:
    """Train, predict and evaluate, or take what is there; the run's row with its curve."""
    work = Path(asked.work) / f"{name.replace('/', '-')}-{seed}"
    run, predictions, score = work / "run", work / "predictions", work / "score.json"
    if status(run) != "done":
        overlay = ["--config", asked.overlay] if asked.overlay else []
        words = ["train", "--config", name, *overlay, "--data.shards", shards, "--out", str(run)]
        geopose([*words, "--length", asked.length, "--seed", str(seed), *asked.options])
    if not score.is_file():
        config = PREDICT_CONFIG["cuda" if has_gpu() else "cpu"]
        words = ["predict", "--config", config, "--source", asked.source, "--checkpoint", str(run)]
        geopose([*words, "--out", str(predictions)])
        words = ["evaluate", "--predictions", str(predictions), "--truth", asked.truth]
        geopose([*words, "--json", str(score)])
    scores = json.loads(score.read_text())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    minutes = elapsed_s(run) / 60
    row: Row = {"case": "accuracy", "recipe": name, "seed": seed, "r2": scores["r2"]}
    row |= {f"r2_{city}": facts["r2"] for city, facts in scores["cities"].items()}
    row |= {f"height_r2_{city}": facts["agl_r2"] for city, facts in scores["cities"].items()}
    row |= {"steps": steps[-1]["step"], "train_minutes": minutes, "length": asked.length}
    row["curve"] = curve(run, steps[-1]["step"], minutes)
    return row


def geopose(words: list[str]) -> None:
    """One command of ours; what it says goes to our stderr (FinishedWithFailures if it fails)."""
    print(f"bench: geopose {' '.join(words[:3])} ...", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "geopose_dist", *words], stdout=sys.stderr, check=False)
    if done.returncode:
        raise FinishedWithFailures(
            f"geopose {words[0]} ended with {done.returncode}; see above, and run the same command again to go on"
        )


def has_gpu() -> bool:
    """Whether prediction has a GPU here."""
    import torch

    return torch.cuda.is_available()


def status(run: Path) -> str:
    """How a run stands, by its state.json."""
    path = run / "state.json"
    return str(json.loads(path.read_text())["status"]) if path.is_file() else "none"


def elapsed_s(run: Path) -> float:
    """Seconds trained, by the newest checkpoint."""
    states = sorted((run / "checkpoints").glob("step-*/state.json"))
    return float(json.loads(states[-1].read_text())["elapsed_s"])


def curve(run: Path, steps: int, minutes: float) -> list[dict[str, Any]]:
    """Validations of a run: the better of its weights by minutes."""
    path = run / "validation.jsonl"
    if not path.is_file():
        return []
    best: dict[int, float] = {}
    for line in path.read_text().splitlines():
        found = json.loads(line)
        best[found["step"]] = max(found["r2"], best.get(found["step"], -1e9))
    return [{"minutes": minutes * step / steps, "r2": r2} for step, r2 in sorted(best.items())]


CASES = {"accuracy": accuracy}
