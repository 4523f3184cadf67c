"""Every term of the loss against its formula in plain NumPy: its value, and its gradient by differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from geopose_dist.model import loss
from geopose_dist.model.city_spread import START_PIXELS, CitySpread
from geopose_dist.model.heads import Prediction
from geopose_dist.model.loss import TERMS, Targets
from geopose_dist.model.recipe import LossRecipe

F64 = npt.NDArray[np.float64]
OFF: dict[str, Any] = {
    "agl_weight": 0, "magnitude_weight": 0, "direction_weight": 0, "scale_weight": 0
}  # fmt: skip
STD, MEAN, MEAN_PX = np.array([3.0, 7.0, 2.0]), np.array([4.0, 9.0, 1.0]), np.array([2.0, 5.0, 0.5])
GSD = np.array([0.5, np.nan, 0.8])


class Case:
    """Three tiles of 5x6: labels with holes, one tile without a pose, and predictions."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.Generator(np.random.Philox(seed))
        self.known = rng.random((3, 5, 6)) < 0.8
        self.t = np.where(self.known, rng.gamma(2, 4, (3, 5, 6)), np.nan)
        angle = rng.uniform(0, 2 * np.pi, 3)
        self.u = np.stack([np.sin(angle), np.cos(angle)], 1)
        self.r = rng.uniform(0.2, 1.2, 3)
        self.u[2], self.r[2] = np.nan, np.nan
        self.posed = np.array([True, True, False])
        self.answers: dict[str, F64] = {
            "p": rng.gamma(2, 4, (3, 5, 6)),
            "m": rng.gamma(2, 3, (3, 5, 6)),
            "v": rng.normal(size=(3, 2)),
            "s": rng.uniform(0.2, 1.2, 3),
            "field": rng.normal(size=(3, 2, 5, 6)),
        }

    def torch(self) -> tuple[Prediction, Targets, dict[str, torch.Tensor]]:
        """The same for the program, with leaves that collect gradients."""
        leaves = {
            n: torch.tensor(v, dtype=torch.float32, requires_grad=True) for n, v in self.answers.items()
        }
        prediction = Prediction(
            leaves["p"][:, None], leaves["m"][:, None], leaves["v"], leaves["s"], leaves["field"]
        )

        def tensor(array: F64) -> torch.Tensor:
            return torch.tensor(array, dtype=torch.float32)

        targets = Targets(
            tensor(self.t)[:, None], torch.tensor(self.known)[:, None], tensor(self.u), tensor(self.r),
            city_std_m=tensor(STD), city_mean_m=tensor(MEAN), city_mean_px=tensor(MEAN_PX), gsd_m=tensor(GSD),
        )  # fmt: skip
        return prediction, targets, leaves

    @property
    def w(self) -> F64:
        return self.known.astype(np.float64)

    @property
    def t0(self) -> F64:
        return np.nan_to_num(self.t)

    @property
    def wf(self) -> F64:
        """Weight of pixels with height and pose."""
        return self.w * self.posed[:, None, None]


def maps(x: F64) -> F64:
    return x[:, None, None]


def agl_mse(c: Case, p: F64, **_: F64) -> float:
    return float((c.w * (p - c.t0) ** 2).sum() / c.w.sum())


def agl_r2(c: Case, p: F64, **_: F64) -> float:
    return float((c.w * (p - c.t0) ** 2 / maps(STD**2)).sum() / c.w.sum())


def agl_batch_r2(c: Case, p: F64, **_: F64) -> float:
    return float((c.w * (p - c.t0) ** 2).sum() / (c.w * (c.t0 - maps(MEAN)) ** 2).sum())


def agl_huber(c: Case, p: F64, **_: F64) -> float:
    e = np.abs(p - c.t0)
    return float((c.w * np.where(e <= 5, e**2 / 2, 5 * (e - 2.5))).sum() / c.w.sum())


def agl_per_image(c: Case, p: F64, **_: F64) -> float:
    return float(np.mean([((p[i] - c.t[i])[c.known[i]] ** 2).mean() for i in range(3)]))


def true_magnitude(c: Case) -> F64:
    return c.t0 * maps(np.nan_to_num(c.r))


def mag_mse(c: Case, m: F64, **_: F64) -> float:
    return float((c.wf * (m - true_magnitude(c)) ** 2).sum() / c.wf.sum())


def mag_batch_r2(c: Case, m: F64, **_: F64) -> float:
    n = true_magnitude(c)
    return float((c.wf * (m - n) ** 2).sum() / (c.wf * (n - maps(MEAN_PX)) ** 2).sum())


def angle_mse(c: Case, v: F64, **_: F64) -> float:
    return float(((v - c.u)[:2] ** 2).mean())


def angle_cosine(c: Case, v: F64, **_: F64) -> float:
    return float(np.mean(1 - (v * c.u).sum(1)[:2] / np.linalg.norm(v, axis=1)[:2]))


def lean(c: Case) -> F64:
    return np.minimum(1, STD * np.nan_to_num(c.r) / 4.0) * c.posed


def angle_leaning(c: Case, v: F64, **_: F64) -> float:
    error = 1 - (v * np.nan_to_num(c.u)).sum(1) / np.linalg.norm(v, axis=1)
    return float((lean(c) * error).sum() / lean(c).sum())


def unit(c: Case, v: F64, **_: F64) -> float:
    return float(((np.linalg.norm(v, axis=1) - 1) ** 2)[:2].mean())


def edges(c: Case) -> F64:
    g = np.zeros((3, 5, 6))
    g[:, :-1] += np.nan_to_num(np.abs(np.diff(c.t, axis=1)))
    g[:, :, :-1] += np.nan_to_num(np.abs(np.diff(c.t, axis=2)))
    return np.minimum(g, 3.0) * c.posed[:, None, None]


def pixel_angle(c: Case, field: F64, **_: F64) -> float:
    cosine = (field * np.nan_to_num(c.u)[:, :, None, None]).sum(1) / np.linalg.norm(field, axis=1)
    return float((edges(c) * (1 - cosine)).sum() / edges(c).sum())


def scale_mse(c: Case, s: F64, **_: F64) -> float:
    return float(((s - c.r)[:2] ** 2).mean())


def scale_log(c: Case, s: F64, **_: F64) -> float:
    return float((np.log(s / c.r)[:2] ** 2).mean())


def flow(c: Case, p: F64, v: F64, s: F64, **_: F64) -> float:
    """In pixels, over what a standard deviation of the city is in pixels: the formula's metres."""
    heading = v / np.linalg.norm(v, axis=1, keepdims=True)
    predicted = (p * maps(s))[:, None] * heading[:, :, None, None]
    truth = (c.t0 * maps(np.nan_to_num(c.r)))[:, None] * np.nan_to_num(c.u)[:, :, None, None]
    squares = ((predicted - truth) ** 2).sum(1) / maps((np.where(c.posed, c.r, 1.0) * STD) ** 2)
    return float((c.wf * squares).sum() / c.wf.sum())


def _focal(e: F64) -> F64:
    return (2 / (1 + np.exp(-0.3 * np.abs(e))) - 1) ** 2 * e**2


def focal(c: Case, p: F64, **_: F64) -> float:
    return float((c.w * _focal(p - c.t0)).sum() / c.w.sum())


def focal_mag(c: Case, m: F64, **_: F64) -> float:
    return float((c.wf * _focal(m - true_magnitude(c))).sum() / c.wf.sum())


def corners(c: Case) -> F64:
    """1 where a pixel and its neighbours below and right are known."""
    return (c.known[:, :-1, :-1] & c.known[:, 1:, :-1] & c.known[:, :-1, 1:]).astype(np.float64)


def slopes(h: F64) -> tuple[F64, F64]:
    return np.diff(h, axis=1)[:, :, :-1], np.diff(h, axis=2)[:, :-1]


def normal(c: Case, p: F64, **_: F64) -> float:
    spacing = maps(np.where(np.isnan(GSD), 0.7, GSD))

    def normals(h: F64) -> F64:
        down, right = slopes(h)
        n = np.stack([-down / spacing, -right / spacing, np.ones_like(down)])
        return np.asarray(n / np.linalg.norm(n, axis=0))

    return float((corners(c) * (1 - (normals(p) * normals(c.t0)).sum(0))).sum() / corners(c).sum())


def gradient(c: Case, p: F64, **_: F64) -> float:
    down, right = slopes(p - c.t0)
    logs = np.log((np.abs(down) + 0.5) / 0.5) + np.log((np.abs(right) + 0.5) / 0.5)
    return float((corners(c) * logs).sum() / corners(c).sum())


FORMULAS: list[tuple[str, dict[str, Any], Callable[..., float]]] = [
    ("agl", {"agl_weight": 1}, agl_mse),
    ("agl", {"agl_weight": 1, "agl": "r2"}, agl_r2),
    ("agl", {"agl_weight": 1, "agl": "batch_r2"}, agl_batch_r2),
    ("agl", {"agl_weight": 1, "agl": "huber"}, agl_huber),
    ("agl", {"agl_weight": 1, "reduction": "per_image"}, agl_per_image),
    ("mag", {"magnitude_weight": 1}, mag_mse),
    ("mag", {"magnitude_weight": 1, "magnitude": "batch_r2"}, mag_batch_r2),
    ("angle", {"direction_weight": 1}, angle_mse),
    ("angle", {"direction_weight": 1, "direction": "cosine"}, angle_cosine),
    ("angle", {"direction_weight": 1, "direction": "cosine", "lean_px": 4.0}, angle_leaning),
    ("unit", {"unit_weight": 1}, unit),
    ("pixel_angle", {"pixel_direction_weight": 1}, pixel_angle),
    ("scale", {"scale_weight": 1}, scale_mse),
    ("scale", {"scale_weight": 1, "scale": "log"}, scale_log),
    ("flow", {"flow_weight": 1}, flow),
    ("focal", {"focal_weight": 1, "focal_beta": 0.3, "focal_gamma": 2.0}, focal),
    ("focal_mag", {"focal_magnitude_weight": 1, "focal_beta": 0.3, "focal_gamma": 2.0}, focal_mag),
    ("normal", {"normal_weight": 1}, normal),
    ("gradient", {"gradient_weight": 1}, gradient),
]
IDS = [f"{name}-{formula.__name__}" for name, _, formula in FORMULAS]


@pytest.mark.parametrize(("name", "changes", "formula"), FORMULAS, ids=IDS)
def test_term_is_its_formula_and_its_gradient_the_formulas(
    name: str, changes: dict[str, Any], formula: Callable[..., float]
) -> None:
    recipe, case = LossRecipe(**{**OFF, **changes}), Case()
    prediction, targets, leaves = case.torch()
    value, terms = loss.combine(
        recipe, loss.numerators(recipe, prediction, targets), loss.denominators(recipe, targets)
    )
    value.backward()
    assert value.item() == pytest.approx(formula(case, **case.answers), rel=2e-5)
    assert terms[TERMS.index(name)].item() == pytest.approx(value.item())
    assert [other for other, term in zip(TERMS, terms, strict=True) if term != 0] == [name]
    for answer, values in case.answers.items():
        found = leaves[answer].grad
        wanted = by_differences(lambda x, a=answer: formula(case, **{**case.answers, a: x}), values)
        got = np.zeros_like(values) if found is None else found.numpy()
        np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-5, err_msg=f"gradient by {answer}")


def by_differences(formula: Callable[[F64], float], at: F64, step: float = 1e-5) -> F64:
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (formula(up) - formula(down)) / (2 * step)
    return gradient


EVERYTHING = LossRecipe(
    agl="r2", magnitude="batch_r2", direction="cosine", scale="log", unit_weight=0.3, pixel_direction_weight=0.7,
    flow_weight=0.9, focal_weight=0.05, focal_magnitude_weight=0.05, normal_weight=0.4, gradient_weight=0.2,
)  # fmt: skip


@pytest.mark.parametrize("agl", ["mse", "r2", "batch_r2", "huber"])
@pytest.mark.parametrize("nothing", ["heights", "poses", "all"])
def test_a_tile_without_labels_gives_no_gradient(agl: Any, nothing: str) -> None:
    """Beside two labelled tiles, and alone in its batch."""
    recipe = LossRecipe(**{**EVERYTHING.__dict__, "agl": agl})
    for alone in (False, True):
        case = Case()
        blank = slice(0, 3) if alone else slice(1, 2)
        if nothing in ("heights", "all"):
            case.known[blank], case.t[blank] = False, np.nan
        if nothing in ("poses", "all"):
            case.u[blank], case.r[blank] = np.nan, np.nan
        prediction, targets, leaves = case.torch()
        value, _ = loss.combine(
            recipe, loss.numerators(recipe, prediction, targets), loss.denominators(recipe, targets)
        )
        value.backward()
        assert torch.isfinite(value)
        silent = {"heights": ("p", "m"), "poses": ("v", "s", "m", "field"), "all": tuple(leaves)}[nothing]
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            assert torch.isfinite(leaf.grad).all(), name
            assert name not in silent or not leaf.grad[blank].any(), name
        assert value.item() == 0 or not (alone and nothing == "all")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_of_tall_tiles_do_not_overflow(dtype: torch.dtype) -> None:
    """Heights of 200 m predicted as 0 over 512x512: every sum is far above fp16's 65504."""
    t = torch.full((1, 1, 512, 512), 200.0)
    t[..., ::7] = torch.nan
    zeros = torch.zeros(1, 1, 512, 512, dtype=dtype, requires_grad=True)
    vector = torch.tensor([[0.1, 0.2]], dtype=dtype, requires_grad=True)
    scale = torch.tensor([0.3], dtype=dtype, requires_grad=True)
    field = torch.full((1, 2, 512, 512), 0.1, dtype=dtype, requires_grad=True)
    prediction = Prediction(zeros, zeros * 0.5, vector, scale, field)
    targets = Targets(t, torch.isfinite(t), torch.tensor([[0.6, 0.8]]), torch.tensor([0.4]))
    with torch.autocast("cpu", torch.bfloat16):
        value, terms = loss.combine(
            EVERYTHING,
            loss.numerators(EVERYTHING, prediction, targets),
            loss.denominators(EVERYTHING, targets),
        )
        value.backward()
    assert terms.dtype == torch.float32
    assert terms[TERMS.index("agl")].item() == pytest.approx(40_000, rel=1e-4)
    assert torch.isfinite(terms).all()
    for leaf in (zeros, vector, scale, field):
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()


def test_each_tiles_terms_add_up_to_the_batchs() -> None:
    prediction, targets, _ = Case(3).torch()
    together = loss.numerators(EVERYTHING, prediction, targets)
    by_tile = loss.per_tile(EVERYTHING, prediction, targets)
    assert by_tile.shape == (3, len(TERMS))
    torch.testing.assert_close(by_tile.sum(dim=0), together.detach(), rtol=1e-5, atol=1e-5)


CITIES = ("ARG", "JAX")
SPREAD = {"city_std_m": {"ARG": 3.0, "JAX": 8.0}, "city_mean_m": {"ARG": 2.0, "JAX": 5.0}}


def test_fixed_spread_is_the_recipes() -> None:
    spread = CitySpread(LossRecipe(**SPREAD, city_mean_px={"JAX": 1.5}), CITIES, torch.device("cpu"))
    _, targets, _ = Case().torch()
    described = spread.describe(targets, torch.tensor([1, 0, 1]))
    assert described.city_std_m is not None
    assert described.city_mean_m is not None
    assert described.city_mean_px is not None
    assert described.city_std_m.tolist() == [8.0, 3.0, 8.0]
    assert described.city_mean_m.tolist() == [5.0, 2.0, 5.0]
    assert described.city_mean_px.tolist() == [1.5, 0.0, 1.5]
    assert spread.shares(targets, torch.tensor([1, 0, 1])).numel() == 0


def test_running_spread_becomes_that_of_the_labels_seen_however_they_were_cut() -> None:
    recipe = LossRecipe(city_spread="running", **SPREAD)
    cut, whole = (CitySpread(recipe, CITIES, torch.device("cpu")) for _ in range(2))
    city = torch.tensor([1, 0, 1])
    heights: dict[int, list[F64]] = {0: [], 1: []}
    flows: dict[int, list[F64]] = {0: [], 1: []}
    for seed in range(40):
        case = Case(seed)
        case.t *= 300  # against the start's weight of a tile, so that the labels decide
        _, targets, _ = case.torch()
        whole.add(whole.shares(targets, city))
        cut.add(sum(cut.shares(targets.rows(slice(i, i + 1)), city[i : i + 1]) for i in range(3)))  # type: ignore[arg-type]
        for i, c in enumerate(city.tolist()):
            heights[c].append(case.t[i][case.known[i]])
            if case.posed[i]:
                flows[c].append(case.t[i][case.known[i]] * case.r[i])
    torch.testing.assert_close(cut.sums, whole.sums, rtol=1e-14, atol=0)
    std, mean, mean_px = whole.table()
    for c, name in enumerate(CITIES):
        h, m = np.concatenate(heights[c]), np.concatenate(flows[c])
        n, start_mean, start_std = START_PIXELS, SPREAD["city_mean_m"][name], SPREAD["city_std_m"][name]
        expected = (n * start_mean + h.sum()) / (n + h.size)
        square = (n * (start_std**2 + start_mean**2) + (h**2).sum()) / (n + h.size)
        assert mean[c].item() == pytest.approx(expected, rel=1e-5)
        assert std[c].item() == pytest.approx(np.sqrt(square - expected**2), rel=1e-5)
        assert mean_px[c].item() == pytest.approx(m.sum() / (n + m.size), rel=1e-5)


def test_running_spread_of_flat_labels_stays_above_nothing() -> None:
    flat = LossRecipe(city_spread="running", city_std_m={"ARG": 0.1}, city_mean_m={"ARG": 0.0})
    spread = CitySpread(flat, ("ARG",), torch.device("cpu"))
    zeros = Targets(
        torch.zeros(1, 1, 600, 600), torch.ones(1, 1, 600, 600, dtype=torch.bool),
        torch.full((1, 2), torch.nan), torch.full((1,), torch.nan),
    )  # fmt: skip
    spread.add(spread.shares(zeros, torch.tensor([0])))
    assert spread.table()[0].item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("huber_m", 0.0), ("focal_beta", -1.0), ("focal_gamma", 0.5), ("spacing_m", 0.0), ("gradient_m", float("nan")),
     ("normal_weight", -1.0), ("city_std_m", {"ARG": 0.0}), ("lean_px", -1.0)],
)  # fmt: skip
def test_impossible_numbers_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"loss.{field}"):
        LossRecipe(**{field: value})
