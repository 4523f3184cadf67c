"""The scheduler alone, over workers that raise, die and hang: who suffers, and who does not."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs import alive, wait_until_gone
from moody_workers import CannotStart, Moody, Sleepy

from geopose_dist.errors import FinishedWithFailures
from geopose_dist.infer.dispatch import Dispatch, SetAside
from geopose_dist.pool import Actors


def run(
    kind: str, make: Any, items: list[Any], *, count: int = 2, timeout_s: float = 60, in_flight: int = 2
) -> list[tuple[Any, Any]]:
    with Actors(kind, cpus=2, use_gpus=False) as actors:
        work = Dispatch(
            actors,
            make,
            count=count,
            cpus=1,
            gpus=0,
            in_flight=in_flight,
            attempts=2,
            timeout_s=timeout_s,
            split=lambda item: [[part] for part in item],
        )
        return list(work.results(items))


@pytest.mark.parametrize("kind", ["process", pytest.param("ray", marks=pytest.mark.slow)])
def test_poison_is_set_aside_and_nobody_else_suffers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # Ray's processes must find moody_workers
    items = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    answers = {str(item): answer for item, answer in run(kind, Moody(tmp_path), items)}
    aside = {key: answer for key, answer in answers.items() if isinstance(answer, SetAside)}
    assert sorted(aside) == ["[3]", "[5]"]
    assert "actor died" in aside["[3]"].reason
    assert "five is not liked" in aside["[5]"].reason
    good = {key: answer for key, answer in answers.items() if key not in aside}
    assert good == {
        "[0, 1]": [0, 2], "[2]": [4], "[4]": [8], "[6, 7]": [12, 14], "[8, 9]": [16, 18], "[10, 11]": [20, 22],
    }  # fmt: skip


def test_actors_that_die_with_many_items_in_hand_do_not_look_like_a_job_that_always_fails(
    tmp_path: Path,
) -> None:
    items = [[7, 0], [17, 0], *([number] for number in range(20, 60))]
    answers = run("process", Moody(tmp_path), items, count=1, in_flight=40)
    assert sorted(n for _, answer in answers for n in answer) == sorted(2 * n for item in items for n in item)


def test_work_that_always_fails_stops_instead_of_trying_everything(tmp_path: Path) -> None:
    with pytest.raises(FinishedWithFailures, match="failures in a row, the last: ValueError: five"):
        run("inline", Moody(tmp_path), [[5]] * 100)


def test_actors_that_cannot_start_say_why() -> None:
    with pytest.raises(FinishedWithFailures, match="could not start: no network here"):
        run("process", CannotStart(), [[1]], count=1)


def test_an_actor_that_never_answers_is_given_up(tmp_path: Path) -> None:
    answers = run("process", Sleepy(tmp_path), [0, 1, 2], count=1, timeout_s=2, in_flight=1)
    assert sorted(answer for _, answer in answers) == [0, 1, 2]


def test_processes_of_a_killed_driver_end() -> None:
    code = (
        "import moody_workers, time; from geopose_dist.pool import Actors\n"
        "if __name__ == '__main__':\n"
        "    with Actors('process', cpus=1, use_gpus=False) as actors:\n"
        "        actor = actors.start(moody_workers.Patient(), 0, cpus=1, gpus=0, in_flight=1)\n"
        "        print(actor.submit(0).result(), flush=True)\n"
        "        actor.submit(1)\n"
        "        time.sleep(100)\n"
    )
    command, here = [sys.executable, "-c", code], str(Path(__file__).parent)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=here, text=True
    ) as driver:
        assert driver.stdout is not None
        worker = int(driver.stdout.readline())
        assert alive(worker)
        driver.kill()
    wait_until_gone([worker], timeout_s=30)
