"""Every case of `geopose bench` fails when what it measures gives a wrong output: one breakage for each."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiles import make_dataset

from geopose_dist import kernels
from geopose_dist.bench import (
    cases_codecs,
    cases_device,
    cases_infer,
    cases_kernels,
    cases_loader,
    cases_pack,
    cases_step,
    cases_train,
    harness,
)
from geopose_dist.bench.recipe import BenchRecipe
from geopose_dist.data import codecs, resample
from geopose_dist.data.batch import pack
from geopose_dist.errors import FinishedWithFailures
from geopose_dist.evaluate import predictions
from geopose_dist.infer import writer
from geopose_dist.model import device_augment
from geopose_dist.train import checkpoint
from geopose_dist.train.step import Stepper

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sizes of `--quick`, and drawn tiles in the place of rendered ones."""
    for module in CASES_OF.values():
        for name, value in getattr(module, "QUICK", {}).items():
            monkeypatch.setattr(module, name, value)
    make_dataset(tmp_path / "tiles", 3)
    for module in (cases_codecs, cases_pack):
        monkeypatch.setattr(module, "rendered_source", lambda: tmp_path / "tiles")


CASES_OF: dict[str, Any] = {
    "kernels": cases_kernels,
    "augment": cases_kernels,
    "codecs": cases_codecs,
    "resolutions": cases_codecs,
    "pack": cases_pack,
    "loader": cases_loader,
    "device_augment": cases_device,
    "step": cases_step,
    "checkpoint": cases_train,
    "score": cases_infer,
    "rectify": cases_infer,
    "predict": cases_infer,
}


def run(case: str) -> list[dict[str, Any]]:
    """The case, as the harness calls it, with a small recipe."""
    import runs

    recipe = runs.recipe(Path("unused"), "--data.crop-px=64", "--data.global-batch=2", "--data.micro-batch=2")
    offered = {"repeats": 1, "shards": None, "recipe": BenchRecipe(steps=1), "run": recipe}
    return list(harness.rows_of(case, CASES_OF[case].CASES[case], offered))


def changed(function: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """The function with another answer."""
    return lambda *given, **named: change(function(*given, **named))


def brighter(answer: Any) -> Any:
    """Pixels that are a little off: the first array of the answer."""
    first = answer[0] if isinstance(answer, tuple) else answer
    moved = (first.astype(np.int64) + 60).clip(0, 250).astype(first.dtype)
    return (moved, *answer[1:]) if isinstance(answer, tuple) else moved


def off_by(number: float, which: int | None = None) -> Callable[[Any], Any]:
    """An answer (or one part of it) with a number added."""

    def change(answer: Any) -> Any:
        if which is None:
            return answer + np.asarray(number, answer.dtype)
        return tuple(part + number if i == which else part for i, part in enumerate(answer))

    return change


def other_rgb(answer: Any) -> Any:
    """A sample or batch whose colours differ in a bit."""
    return dataclasses.replace(answer, rgb=answer.rgb ^ 1)


def flipped(answer: Any) -> Any:
    """Pixels upside down."""
    return np.ascontiguousarray(answer[::-1])


BREAKAGES: dict[str, tuple[str, Any, str, Callable[[Any], Any], str]] = {
    "kernels": ("kernels", kernels, "gather", brighter, "gathered pixels differ"),
    "kernels, flow": ("kernels", kernels, "invert_flow", off_by(1), "flow's inversion differs"),
    "augment": (
        "augment", cases_kernels, "apply", lambda v: dataclasses.replace(v, rgb=flipped(v.rgb)), "slow twins'"
    ),
    "codecs": ("codecs", codecs, "decode_rgb", brighter, "rgb .* gives back other pixels"),
    "codecs, heights": ("codecs", codecs, "decode_agl", brighter, "agl .* gives back other pixels"),
    "resolutions": ("resolutions", resample, "reduce_rgb", flipped, "levels off"),
    "pack": ("pack", resample, "reduce_rgb", brighter, "RGB is .* levels off"),
    "pack, heights": ("pack", resample, "reduce_agl", off_by(9), "heights are the baseline's at"),
    "device_augment": ("device_augment", device_augment, "finish", other_rgb, "other pixels than a worker"),
    "step": (
        "step", Stepper, "step", lambda r: dataclasses.replace(r, loss=r.loss * 1.2), "off float32's"
    ),
    "checkpoint": ("checkpoint", checkpoint, "training_state", None, "another optimiser"),
    "score": ("score", cases_infer, "score", None, "two scorers differ"),
    "rectify": ("rectify", kernels, "rectify", off_by(1, which=1), "rectifications agree"),
    "predict": ("predict", predictions, "heights_cm", lambda a: (a[0] + 5, a[1]), "heights written differ"),
    "predict, the job": ("predict", writer, "write_pose", None, "off the network's"),
}  # fmt: skip
"""Name -> (case, owner, attribute, change of its answer or None for a stand-in below, what the case says)."""


def halved(state: dict[str, Any]) -> dict[str, Any]:
    """A state whose first moments are half as large."""
    moments = {n: {**one, "exp_avg": one["exp_avg"] / 2} for n, one in state["optimizer"]["state"].items()}
    return {**state, "optimizer": {**state["optimizer"], "state": moments}}


def better(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores that are a little too good."""
    cities = {city: {**facts, "agl_r2": facts["agl_r2"] + 1e-3} for city, facts in scores["cities"].items()}
    return {**scores, "cities": cities}


def taller(right: Any) -> Any:
    """Files with heights a metre above the network's."""

    def write_pose(folder: Path, key: str, pose: Any, unit: str) -> None:
        right(folder, key, dataclasses.replace(pose, agl_m=pose.agl_m + 1), unit)

    return write_pose


STAND_INS = {
    "checkpoint": lambda right: changed(right, halved),
    "score": lambda right: changed(right, better),
    "predict, the job": taller,
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_wrong_output_fails_the_case(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, owner, attribute, change, said = BREAKAGES[name]
    right = getattr(owner, attribute)
    monkeypatch.setattr(owner, attribute, changed(right, change) if change else STAND_INS[name](right))
    with pytest.raises(FinishedWithFailures, match=f"wrong output: .*{said}"):
        run(case)


def test_no_case_is_forgotten() -> None:
    """The cases that stand beside a baseline; the loader's pipelines are processes, so its own test is below."""
    wanted = {"kernels", "codecs", "augment", "pack", "step", "checkpoint", "predict", "score", "rectify"}
    assert wanted <= {case for case, *_ in BREAKAGES.values()}
    assert wanted | {"loader"} <= harness.collect().keys()


@pytest.mark.parametrize(
    ("what", "said"), [("rgb", "delivers other pixels"), ("agl_cm", "delivers other heights")]
)
def test_a_loader_that_delivers_something_else_fails(what: str, said: str) -> None:
    views = cases_loader.tiles_of(None)[:2]
    right = pack(views, ["BEN"], [0, 1], [0, 0])
    cases_loader.check_equal({"ours": lambda: iter([right])}, views)
    wrong = dataclasses.replace(right, **{what: getattr(right, what) ^ 1})
    with pytest.raises(FinishedWithFailures, match=f"ours {said}"):
        cases_loader.check_equal({"ours": lambda: iter([wrong])}, views)
