"""tools/gpu_check.sh, rehearsed on the CPU: the same commands as on a GPU machine, small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools" / "gpu_check.sh"


def check(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work"),
        "OMP_NUM_THREADS": "1", **variables,
    }  # fmt: skip
    return subprocess.run([str(SCRIPT)], env=env, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize(
    ("parts", "results"),
    [
        pytest.param("doctor tests data epoch", ["epoch"], marks=pytest.mark.extra),
        pytest.param(
            "doctor data step epoch submission tests augment checkpoint lossless epoch_large",
            [
                "step",
                "epoch",
                "submission",
                "device_augment",
                "checkpoint",
                "submission_lossless",
                "epoch_large",
            ],
            marks=pytest.mark.soak,
        ),
    ],
)
def test_the_rehearsal_leaves_every_result(tmp_path: Path, parts: str, results: list[str]) -> None:
    # Not `setup`: it compiles the kernels anew in this checkout, under the feet of other tests.
    done = check(tmp_path, GPU_CHECK_REHEARSAL="1", PARTS=parts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all parts done on cpu" in done.stdout
    for name in results:
        facts = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert facts["results"], name
        assert not facts["failed"], name
    assert len(list((tmp_path / "out").iterdir())) <= 8, "some machines give back a few files only"
    assert "shared memory" in (tmp_path / "out" / "log.txt").read_text()


def test_a_part_that_fails_is_told_and_the_others_run(tmp_path: Path) -> None:
    done = check(tmp_path, GPU_CHECK_REHEARSAL="1", PARTS="doctor data", PYTHON="/bin/false")
    assert done.returncode == 1
    assert "gpu_check: doctor LEFT OUT: it needs a working Python (/bin/false)" in done.stdout
    assert "not done on cpu after" in done.stdout
    assert "s: doctor data; see" in done.stdout


def test_a_part_says_which_modules_it_lacks_and_what_fails_is_kept_apart(tmp_path: Path) -> None:
    """A Python without imagecodecs that cannot run our commands either: one part is left out, the other fails."""
    python = tmp_path / "python"
    python.write_text(
        """#!/bin/sh
case "$*" in
  *find_spec*imagecodecs*) echo imagecodecs ;;
  *find_spec*ray*) echo ray ;;
  *find_spec*) ;;
  *) echo "a part says why" >&2; exit 3 ;;
esac
"""
    )
    python.chmod(0o755)
    done = check(tmp_path, GPU_CHECK_REHEARSAL="1", PARTS="doctor data setup", PYTHON=str(python))
    assert "Ray is not installed here: the same actors run in plain processes" in done.stdout
    assert "setup FAILED with 3" in done.stdout
    assert "doctor done" in done.stdout  # it tells of faults, and has none of its own
    assert "data LEFT OUT: it needs imagecodecs, which this machine lacks" in done.stdout
    assert "a part says why" in (tmp_path / "out" / "log.txt").read_text()


def test_parts_end_with_the_time_that_there_is(tmp_path: Path) -> None:
    done = check(tmp_path, GPU_CHECK_REHEARSAL="1", PARTS="doctor data", LIMIT_S="3")
    assert done.returncode == 1
    assert "data LEFT OUT: the 3 s of LIMIT_S are spent" in done.stdout


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = check(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "torch sees no GPU here" in done.stderr
