"""Case `leak`: what a split that leaks does to the score, with the real commands on tiles of known places.

Two trainings differ in one thing: whether every second view of each validation place is among the tiles to learn
from (`geopose split --leak`). Both are validated on the same tiles, the other views, by the run itself. Runs stay in
`accuracy.work` and are not run again; recipes, overlay, length and seeds are those of `accuracy`.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from geopose_dist.bench.cases_accuracy import geopose, status
from geopose_dist.bench.harness import BenchRecipe, Row
from geopose_dist.errors import UserError

WAYS = ("leak-free", "leaky")
REDUCE = "2"
"""As the published benchmark reduces its tiles."""


def leak(recipe: BenchRecipe) -> list[Row]:
    """Scores on the same validation tiles by a run that saw their places and by one that did not."""
    asked = recipe.accuracy
    if not recipe.data.tiles:
        raise UserError(
            "bench leak needs --data.tiles, a dataset whose places are known, such as synth makes"
        )
    work = Path(asked.work)
    splits = make_splits(Path(recipe.data.tiles), work)
    name = (asked.recipes or ("train/base",))[0]
    overlay = ["--config", asked.overlay] if asked.overlay else []
    scores: dict[str, list[float]] = {way: [] for way in WAYS}
    rows: list[Row] = []
    for way in WAYS:
        words = ["pack", "--source", recipe.data.tiles, "--out", str(work / way / "shards")]
        geopose([*words, "--split", str(splits[way]), "--reduce", REDUCE])
        sets = json.loads(splits[way].read_text())
        for seed in range(asked.seeds):
            run = work / way / f"run-{seed}"
            if status(run) != "done":
                words = ["train", "--config", name, *overlay, "--data.shards", str(work / way / "shards")]
                words += ["--out", str(run), "--length", asked.length, "--seed", str(seed)]
                geopose([*words, *asked.options])
            scores[way].append(last_score(run))
            facts = {"seed": seed, "r2": scores[way][-1], "length": asked.length, "recipe": name}
            rows.append(
                {
                    "split": way,
                    **facts,
                    "train_tiles": len(sets["train"]),
                    "val_tiles": len(sets["val"]),
                }
            )
    gains = [leaky - free for free, leaky in zip(scores[WAYS[0]], scores[WAYS[1]], strict=True)]
    rows[-1]["verdict"] = (
        f"having seen other views of the validation places changes the score by {statistics.median(gains):+.3f} "
        f"(median of {len(gains)} seeds)"
    )
    return rows


def make_splits(source: Path, work: Path) -> dict[str, Path]:
    """The leaky split, and one that trains on no place of its validation tiles; both validate on the same tiles."""
    found = {}
    for way, more in (("leak-free", []), ("leaky", ["--leak", "true"])):
        path = work / f"{way}.json"
        geopose(["split", "--source", str(source), "--by", "place", "--out", str(path), *more])
        found[way] = path
    free, leaky = (json.loads(found[way].read_text()) for way in WAYS)
    # The views that the leaky run learns from are not for the other's validation either.
    free["unused"] = sorted(set(free["val"]) - set(leaky["val"]))
    free["val"] = leaky["val"]
    found["leak-free"].write_text(json.dumps(free, indent=1) + "\n")
    return found


def last_score(run: Path) -> float:
    """The score of the run's last validation: of its averaged weights where it has them."""
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    return float(max(line["r2"] for line in lines if line["step"] == lines[-1]["step"]))


CASES = {"leak": leak}
