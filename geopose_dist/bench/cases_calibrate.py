"""Case `calibrate`: what height calibrations bring on places that they were not fitted on, by `geopose calibrate`.

The command itself fits them, on a copy of the weights, so that none is left beside the run. What it brings is told
out of fold; the row without a calibration is the baseline.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from geopose_dist.bench.harness import Row, check
from geopose_dist.bench.recipe import BenchRecipe
from geopose_dist.errors import UserError

METHODS = ("none", "factor", "curve")


def calibrate_case(recipe: BenchRecipe, shards: str) -> list[Row]:
    """Scores on the validation split of `shards` of the network in `data.checkpoint`, by kind of calibration."""
    from geopose_dist.infer import calibrate, calibration
    from geopose_dist.model.weights import find_checkpoint

    if not recipe.data.checkpoint:
        raise UserError("bench calibrate needs --data.checkpoint, a trained network")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "net.safetensors"
        shutil.copyfile(find_checkpoint(Path(recipe.data.checkpoint)), weights)
        calibrate.run(calibrate.CalibrateRecipe(run=weights, shards=shards))
        saved = next(path for path in Path(folder).iterdir() if path.name.endswith(calibration.NAME))
        facts = json.loads(saved.read_text())["facts"]
    honest = facts["out_of_fold"]
    check(honest.keys() >= set(METHODS), f"calibrate told of {', '.join(honest)} only")
    return [
        {
            "method": method,
            "r2": score["r2"],
            "agl_r2": score["agl_r2"],
            "vflow_r2": score["vflow_r2"],
            "gain": score["r2"] - honest["none"]["r2"],
            "tiles": facts["tiles"],
            "split": facts["split"],
            "folds": facts["folds"],
        }
        for method, score in ((method, honest[method]) for method in METHODS)
    ]


CASES = {"calibrate": calibrate_case}
