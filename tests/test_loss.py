"""The loss: the benchmark's recorded terms, exact sums however the batch is cut, and finite without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geopose_dist.model import heads, loss
from geopose_dist.model.heads import Prediction
from geopose_dist.model.loss import TERMS, Targets
from geopose_dist.model.recipe import LossRecipe

RECORDED = Path(__file__).parents[2] / "shared" / "conformance" / "losses.npz"
EVERYTHING = LossRecipe(unit_weight=0.3, pixel_direction_weight=0.7, flow_weight=0.9)


@pytest.fixture
def recorded() -> dict[str, Tensor]:
    if not RECORDED.is_file():
        pytest.skip(
            f"{RECORDED} is not here: the recorded losses of the benchmark travel outside the repository"
        )
    with np.load(RECORDED) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def recorded_case(arrays: dict[str, Tensor]) -> tuple[Prediction, Targets]:
    agl = arrays["agl"][:, None]
    scale = heads.least_squares_scale(arrays["pred_agl"], arrays["pred_mag"], None, ridge=0.01)
    # The recorded scale, itself rounded in float32, is what the recorded terms were computed from.
    torch.testing.assert_close(scale, arrays["pred_scale"], rtol=1e-6, atol=0)
    prediction = Prediction(
        arrays["pred_agl"], arrays["pred_mag"], arrays["pred_xydir"], arrays["pred_scale"], None
    )
    targets = Targets(
        agl, torch.isfinite(agl), arrays["xydir"], arrays["scale"][:, 0], magnitude_px=arrays["mag"][:, None]
    )
    return prediction, targets


def total(recipe: LossRecipe, prediction: Prediction, targets: Targets) -> tuple[float, dict[str, float]]:
    value, terms = loss.combine(
        recipe, loss.numerators(recipe, prediction, targets), loss.denominators(recipe, targets)
    )
    return value.item(), dict(zip(TERMS, terms.tolist(), strict=True))


def test_terms_are_those_of_the_benchmark(recorded: dict[str, Tensor]) -> None:
    prediction, targets = recorded_case(recorded)
    value, terms = total(LossRecipe(), prediction, targets)
    for ours, theirs in (("agl", "agl"), ("mag", "mag"), ("angle", "angle"), ("scale", "scale")):
        assert terms[ours] == pytest.approx(float(recorded[f"loss_{theirs}"]), rel=1e-6)
    assert value == pytest.approx(float(recorded["loss_combined"]), rel=1e-6)


def test_reduction_per_image_is_the_mean_of_means(recorded: dict[str, Tensor]) -> None:
    prediction, targets = recorded_case(recorded)
    errors = [
        (p - t)[known].square().mean()
        for p, t, known in zip(prediction.agl_m, targets.agl_m, targets.known, strict=True)
        if known.any()
    ]
    _, terms = total(LossRecipe(reduction="per_image"), prediction, targets)
    assert terms["agl"] == pytest.approx(146.086, abs=5e-4)  # what the tutorial's text would give
    assert terms["agl"] == pytest.approx(
        sum(map(float, errors)) / 2, rel=1e-5
    )  # sample 2 of 3 knows no height


def made_up(batch: int, seed: int, known_share: float = 0.7) -> tuple[dict[str, Tensor], Targets]:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    parts = {
        "agl_m": noise(batch, 1, 8, 12).abs() * 9,
        "magnitude_px": noise(batch, 1, 8, 12).abs() * 4,
        "direction": noise(batch, 2),
        "scale": noise(batch).abs() + 0.1,
        "direction_map": noise(batch, 2, 8, 12),
    }
    known = torch.rand(batch, 1, 8, 12, generator=generator) < known_share
    agl = torch.where(known, noise(batch, 1, 8, 12).abs() * 9, torch.nan)
    direction = torch.nn.functional.normalize(noise(batch, 2))
    return parts, Targets(agl, known, direction, noise(batch).abs() + 0.2)


def rows(parts: dict[str, Tensor], targets: Targets, which: slice) -> tuple[Prediction, Targets]:
    prediction = Prediction(*(value[which] for value in parts.values()))
    return prediction, Targets(*(None if value is None else value[which] for value in targets))  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    cut=st.integers(1, 5),
    kind=st.sampled_from(["mse", "r2", "huber"]),
    direction=st.sampled_from(["mse", "cosine"]),
    scale=st.sampled_from(["mse", "log"]),
    reduction=st.sampled_from(["pooled", "per_image"]),
)
def test_any_cut_of_the_batch_gives_the_same_loss_and_gradient(
    seed: int, cut: int, kind: Any, direction: Any, scale: Any, reduction: Any
) -> None:
    recipe = LossRecipe(
        agl=kind, direction=direction, scale=scale, reduction=reduction,
        unit_weight=0.3, pixel_direction_weight=0.7, flow_weight=0.9,
    )  # fmt: skip
    parts, targets = made_up(6, seed)
    targets.known[:2] = False  # one share of the cut may know no height at all
    gradients = []
    values = []
    for cuts in ([slice(0, 6)], [slice(0, cut), slice(cut, 6)]):
        leaves = {name: value.clone().requires_grad_() for name, value in parts.items()}
        shares = [rows(leaves, targets, which) for which in cuts]
        counts = sum(loss.denominators(recipe, target) for _, target in shares)
        value = sum(loss.combine(recipe, loss.numerators(recipe, p, t), counts)[0] for p, t in shares)  # type: ignore[arg-type]
        value.backward()  # type: ignore[union-attr]
        values.append(value.item())  # type: ignore[union-attr]
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("without", ["heights", "poses", "both"])
def test_missing_labels_leave_a_finite_loss_and_gradient(without: str) -> None:
    parts, targets = made_up(3, seed=1)
    if without in ("heights", "both"):
        targets = targets._replace(
            agl_m=torch.full_like(targets.agl_m, torch.nan), known=targets.known & False
        )
    if without in ("poses", "both"):
        nothing = torch.full_like(targets.scale_px_per_m, torch.nan)
        targets = targets._replace(
            scale_px_per_m=nothing, direction=torch.full_like(targets.direction, torch.nan)
        )
    leaves = {name: value.clone().requires_grad_() for name, value in parts.items()}
    prediction, targets = rows(leaves, targets, slice(0, 3))
    value, terms = loss.combine(
        EVERYTHING, loss.numerators(EVERYTHING, prediction, targets), loss.denominators(EVERYTHING, targets)
    )
    value.backward()
    assert torch.isfinite(value)
    assert all(leaf.grad is None or torch.isfinite(leaf.grad).all() for leaf in leaves.values())
    absent = {"heights": ("agl", "mag", "flow"), "poses": ("angle", "scale", "mag", "flow"), "both": TERMS}[
        without
    ]
    assert all(terms[TERMS.index(name)] == 0 for name in absent)
    if without != "both":
        assert value > 0


def test_unknown_pixels_change_nothing() -> None:
    parts, targets = made_up(2, seed=5)
    prediction, targets = rows(parts, targets, slice(0, 2))
    before = total(EVERYTHING, prediction, targets)
    prediction.agl_m[~targets.known] = 1e4
    prediction.magnitude_px[~targets.known] = -1e4
    assert total(EVERYTHING, prediction, targets) == before


def test_r2_is_the_square_error_in_units_of_the_citys_variance() -> None:
    parts, targets = made_up(2, seed=8)
    prediction, targets = rows(parts, targets, slice(0, 2))
    alike = targets._replace(city_std_m=torch.tensor([3.0, 3.0]))
    _, squares = total(LossRecipe(agl="mse"), prediction, targets)
    _, relative = total(LossRecipe(agl="r2"), prediction, alike)
    assert relative["agl"] == pytest.approx(squares["agl"] / 9, rel=1e-5)
    towers = targets._replace(city_std_m=torch.tensor([3.0, 30.0]))
    _, lower = total(LossRecipe(agl="r2"), prediction, towers)
    assert lower["agl"] < relative["agl"]


def test_tiles_without_visible_lean_count_less_in_direction() -> None:
    parts, targets = made_up(2, seed=9)
    prediction, targets = rows(parts, targets, slice(0, 2))
    targets = targets._replace(city_std_m=torch.tensor([4.0, 4.0]), scale_px_per_m=torch.tensor([1.0, 0.05]))
    leaning, near_nadir = [
        total(LossRecipe(), Prediction(*(p[i : i + 1] for p in parts.values())), row)[1]["angle"]
        for i, row in ((i, Targets(*(None if t is None else t[i : i + 1] for t in targets))) for i in (0, 1))  # type: ignore[arg-type]
    ]
    # Leans of 4 px and 0.2 px against 2 px: weights 1 and 0.1.
    _, terms = total(LossRecipe(lean_px=2.0), prediction, targets)
    assert terms["angle"] == pytest.approx((leaning + 0.1 * near_nadir) / 1.1, rel=1e-5)


def test_perfect_prediction_costs_nothing() -> None:
    _, targets = made_up(4, seed=2, known_share=1.0)
    magnitude = targets.agl_m * targets.scale_px_per_m[:, None, None, None]
    field = targets.direction[:, :, None, None].expand(-1, -1, 8, 12)
    perfect = Prediction(targets.agl_m, magnitude, targets.direction, targets.scale_px_per_m, field)
    for scale in ("mse", "log"):
        recipe = LossRecipe(
            direction="cosine",
            scale=scale,
            unit_weight=1,
            pixel_direction_weight=1,
            flow_weight=1,  # type: ignore[arg-type]
        )
        assert total(recipe, perfect, targets)[0] == pytest.approx(0, abs=1e-5)


def test_least_squares_scale_in_fp16_regions_neither_overflows_nor_loses_its_gradient() -> None:
    """Heights of 200 m over 1024x1024: the sum of squares is 4e10, far over fp16's 65504."""
    agl = torch.full((1, 1, 1024, 1024), 200.0, dtype=torch.float16).requires_grad_()
    magnitude = (torch.full((1, 1, 1024, 1024), 84.0, dtype=torch.float16)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scale = heads.least_squares_scale(agl, magnitude, None, heads.LEAST_SQUARES_RIDGE)
    assert scale.item() == pytest.approx(0.42, rel=1e-3)
    scale.sum().backward()
    assert magnitude.grad is not None
    assert torch.isfinite(magnitude.grad).all()


def test_least_squares_scale_leaves_padding_out() -> None:
    agl, magnitude = torch.rand(1, 1, 8, 8) * 10 + 1, torch.zeros(1, 1, 8, 8)
    inside = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    inside[..., :4] = True
    magnitude[inside] = 0.3 * agl[inside]
    magnitude[~inside] = 1000
    assert float(heads.least_squares_scale(agl, magnitude, inside, 1e-6)) == pytest.approx(0.3, rel=1e-5)
