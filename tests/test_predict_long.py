"""Long work lists: memory and items in flight that do not grow with them, and one bad tile among a thousand."""

import json
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from jobs import actor_processes, outputs, predict, start
from moody_workers import Patient

from geopose_dist.infer.dispatch import Dispatch
from geopose_dist.pool import Actors


class Counting(Actors):
    """Actors that note how many items are handed out and not answered yet."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.now = self.most = 0
        self._lock = threading.Lock()

    def _count(self, by: int) -> None:
        with self._lock:
            self.now += by
            self.most = max(self.most, self.now)

    def start(self, *given: Any, **named: Any) -> Any:
        actor = super().start(*given, **named)
        submit = actor.submit

        def counted(item: Any) -> Future[Any]:
            self._count(1)
            future: Future[Any] = submit(item)
            future.add_done_callback(lambda _: self._count(-1))
            return future

        actor.submit = counted  # type: ignore[method-assign]
        return actor


@pytest.mark.parametrize("kind", ["process", pytest.param("ray", marks=pytest.mark.soak)])
def test_items_in_flight_do_not_grow_with_the_list(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # Ray's processes must find moody_workers
    for count in (100, 2000):
        with Counting(kind, cpus=2, use_gpus=False) as actors:
            work = Dispatch(
                actors, Patient(), count=2, cpus=1, gpus=0, in_flight=3, attempts=2, timeout_s=60, split=list
            )  # fmt: skip
            answers = sum(1 for _ in work.results([0] * count))
        assert answers == count
        assert 2 <= actors.most <= 2 * 3


def write_j2k(folder: Path, count: int, side: int = 32) -> None:
    folder.mkdir()
    rng = np.random.default_rng(7)
    for i in range(count):
        rgb = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
        (folder / f"OMA_{i:04}_RGB.j2k").write_bytes(imagecodecs.jpeg2k_encode(rgb, codecformat="J2K"))


@pytest.mark.parametrize(
    ("kind", "count"),
    [pytest.param("process", 60, marks=pytest.mark.slow), pytest.param("ray", 1000, marks=pytest.mark.soak)],
)
def test_a_corrupt_j2k_among_many_is_named_and_all_others_are_written(
    kind: str, count: int, checkpoint: Path, tmp_path: Path
) -> None:
    source, out, log = tmp_path / "tiles", tmp_path / "out", tmp_path / "log"
    write_j2k(source, count)
    bad = source / f"OMA_{count // 2:04}_RGB.j2k"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 3])
    assert start(source, checkpoint, out, log, "--dispatch", kind).wait(timeout=900) == 1, log.read_text()
    told = log.read_text()
    assert f"{count - 1} of {count} tiles predicted" in told
    assert f"1 of {count} tiles failed" in told
    assert told.count(bad.name) == 1
    assert "this job" in told  # what bounds it
    assert len(list(out.glob("*_AGL.tif"))) == len(list(out.glob("*_VFLOW.json"))) == count - 1
    (line,) = (out / ".geopose-predict" / "failures.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == bad.name.removesuffix("_RGB.j2k")
    bad.write_bytes(whole)  # put right, run again: the whole dataset
    before = outputs(out)
    assert predict(source, checkpoint, out, "--dispatch", "inline") == 0
    assert len(outputs(out)) == 2 * count
    assert before.items() <= outputs(out).items()


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["process", "ray"])
def test_memory_does_not_grow_with_the_list(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    peaks: list[tuple[int, int]] = []
    for count in (100, 1200):
        source = tmp_path / f"tiles{count}"
        write_j2k(source, count, side=160)
        job = start(source, checkpoint, tmp_path / f"out{count}", tmp_path / "log", "--dispatch", kind)
        driver = workers = 0
        while job.poll() is None:
            driver = max(driver, held_mb(job.pid))
            workers = max([workers, *map(held_mb, actor_processes(job.pid, kind))])
            time.sleep(0.3)
        assert job.returncode == 0, (tmp_path / "log").read_text()
        assert min(driver, workers) > 50
        peaks.append((driver, workers))
    print(f"{kind}: peaks of the driver and of a worker: {peaks} MB for 100 and 1200 tiles")
    # Pixels and heights of 1100 tiles are 140 MB.
    assert peaks[1][0] - peaks[0][0] < 40, peaks
    assert peaks[1][1] - peaks[0][1] < 60, peaks


def held_mb(pid: int) -> int:
    """Memory of a process without the files that it maps, of which more is touched as time goes by; 0 if it is gone."""
    try:
        lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1000 for line in lines if line.startswith("RssAnon")), 0)
