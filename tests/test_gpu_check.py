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
        pytest.param("doctor tests data epoch", ["epoch"], marks=pytest.mark.slow),
        pytest.param(
            "doctor tests data step epoch augment predict checkpoint",
            ["step", "epoch", "device_augment", "predict", "checkpoint"],
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
    assert json.loads((tmp_path / "out" / "doctor.json").read_text())


def test_a_part_that_fails_is_told_and_the_others_run(tmp_path: Path) -> None:
    done = check(tmp_path, GPU_CHECK_REHEARSAL="1", PARTS="doctor data", PYTHON="/bin/false")
    assert done.returncode == 1
    assert "gpu_check: doctor FAILED with 1" in done.stdout
    assert "gpu_check: doctor data failed on cpu" in done.stdout


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = check(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "torch sees no GPU here" in done.stderr
