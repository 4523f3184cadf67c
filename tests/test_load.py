"""What bounds a prediction job: counted right, and named right when the network or the hands are the slow ones."""

import threading
import time
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from test_infer import Pointer

from geopose_dist.infer.dispatch import Dispatch
from geopose_dist.infer.load import Load, Loads, Stopwatch
from geopose_dist.infer.predictor import Predictor
from geopose_dist.infer.recipe import NetRecipe
from geopose_dist.infer.work import TileSource, WorkSpec, fix_batches
from geopose_dist.pool import Actors
from shards import layouts


def test_shares_are_those_between_the_first_and_last_report_of_each_actor() -> None:
    loads = Loads()
    assert loads.shares() is None
    assert loads.in_words() == ""
    loads.add(None)
    loads.add(Load("a", 100.0, 50.0, 300.0, 4))  # a long warm-up, which does not count
    assert loads.bottleneck() is None
    loads.add(Load("a", 120.0, 68.0, 340.0, 4))
    loads.add(Load("a", 110.0, 59.0, 320.0, 4))  # late
    loads.add(Load("b", 5000.0, 1.0, 1.0, 4))  # another machine's clock
    loads.add(Load("b", 5020.0, 21.0, 41.0, 4))
    assert loads.shares() == pytest.approx(((18 + 20) / 40, (40 + 40) / 160))
    assert loads.bottleneck() == ("network", pytest.approx(0.95))
    assert loads.in_words().endswith("the network bounds this job")


@pytest.mark.parametrize(
    ("network_s", "hands_s", "words"),
    [(1.0, 38.0, "reading and writing bound this job"), (3.0, 20.0, "neither bounds this job")],
)
def test_hands_and_neither(network_s: float, hands_s: float, words: str) -> None:
    loads = Loads()
    for clock in (0.0, 10.0):
        loads.add(Load("a", clock, network_s * clock / 10, hands_s * clock / 10, 4))
    assert words in loads.in_words()


def test_spans_count_while_they_run_and_in_every_thread() -> None:
    watch = Stopwatch(2)
    begun, finish = threading.Event(), threading.Event()

    def work() -> None:
        with watch.span("hands"):
            begun.set()
            finish.wait()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    begun.wait()
    time.sleep(0.1)
    running = watch.load()
    finish.set()
    for thread in threads:
        thread.join()
    assert running.network_s == 0
    assert 0.1 < running.hands_s <= watch.load().hands_s < 2 * (watch.load().clock_s - running.clock_s + 60)


def job(folder: Path, monkeypatch: pytest.MonkeyPatch, network_s: float, reading_s: float) -> Loads:
    """A whole job of one actor with two hands over 12 J2K tiles; the network and reading take so long at least."""

    class Slow(Pointer):
        def forward(self, rgb_u8: Any, gsd_m: Any) -> Any:
            time.sleep(network_s)
            return super().forward(rgb_u8, gsd_m)

    def load_net(path: Path) -> tuple[Any, dict[str, Any]]:
        return Slow(), {"reduction": 2}

    load_rgb = layouts.load_rgb

    def slow_rgb(tile: layouts.Tile) -> Any:
        time.sleep(reading_s)
        return load_rgb(tile)

    monkeypatch.setattr("geopose_dist.infer.predictor.load_net", load_net)
    monkeypatch.setattr(layouts, "load_rgb", slow_rgb)
    sources = []
    for i in range(12):
        path = folder / f"JAX_{i:02}_RGB.j2k"
        rgb = np.full((64, 64, 3), 10 * i, np.uint8)
        path.write_bytes(imagecodecs.jpeg2k_encode(rgb, codecformat="J2K"))
        sources.append(TileSource(f"JAX_{i:02}", layouts.Tile(f"JAX_{i:02}", "JAX", path)))
    spec = WorkSpec((path,), NetRecipe(), 2, folder, "cm", "", "", 1, "cpu", 2)
    loads = Loads()
    with Actors("inline", cpus=2, use_gpus=False) as actors:
        work = Dispatch(
            actors, spec, count=1, cpus=2, gpus=0, in_flight=spec.in_flight, attempts=1, timeout_s=60,
            split=lambda item: item.parts(),
        )  # fmt: skip
        for _, report in work.results(fix_batches(sources, 2)):
            assert not report.failures
            loads.add(report.load)
    assert len(list(folder.glob("*_AGL.tif"))) == 12
    return loads


@pytest.mark.parametrize(
    ("network_s", "reading_s", "bound"), [(0.1, 0.005, "network"), (0.005, 0.1, "reading and writing")]
)
def test_the_bottleneck_is_named_and_busy_in_a_whole_job(
    network_s: float, reading_s: float, bound: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = job(tmp_path, monkeypatch, network_s, reading_s).bottleneck()
    assert found is not None
    assert found[0] == bound
    assert found[1] >= 0.85


def test_the_network_thread_does_nothing_tile_by_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reducing and enlarging a tile took longer than a GPU's network: they are done beside it."""
    names: dict[str, set[str]] = {}
    for method in ("reduced", "finish", "answers_of_reduced"):
        original = getattr(Predictor, method)

        def noting(self: Any, *given: Any, _to: Any = original, _as: str = method, **named: Any) -> Any:
            names.setdefault(_as, set()).add(threading.current_thread().name)
            return _to(self, *given, **named)

        monkeypatch.setattr(Predictor, method, noting)
    job(tmp_path, monkeypatch, 0.0, 0.0)
    assert len(names["answers_of_reduced"]) == 1
    assert not names["answers_of_reduced"] & (names["reduced"] | names["finish"])
