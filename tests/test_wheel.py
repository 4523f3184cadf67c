"""An installed wheel works without the checkout: kernels built, recipes inside, `geopose` found."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(
    ".*",
    "build",
    "dist",
    "demo",
    "runs",
    "*.egg-info",
    "__pycache__",
    "*.so",
    "*.c",
    "tests",
    "docs",
    "bench.json",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel of this checkout is installed, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, so that the checkout's own build is neither used nor touched.
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    quiet = ["--quiet", "--no-deps"]
    run([*pip, "wheel", *quiet, "--no-build-isolation", "-w", str(folder), str(folder / "source")], folder)
    (wheel,) = folder.glob("*.whl")
    run([*pip, "install", *quiet, "--target", str(folder / "installed"), str(wheel)], folder)
    return folder / "installed"


def run(command: list[str], cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **variables}
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.extra
def test_recipes_and_kernels_travel_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    geopose = [sys.executable, "-m", "geopose_dist"]
    path = str(installed)
    where = run(
        [sys.executable, "-c", "import geopose_dist, shards; print(geopose_dist.__file__)"],
        tmp_path,
        PYTHONPATH=path,
    )
    assert where.startswith(path)
    shown = run([*geopose, "train", "--config", "smoke", "--print-config"], tmp_path, PYTHONPATH=path)
    assert "length:" in shown
    assert "kernels" in run([*geopose, "doctor", "--json", "-"], tmp_path, PYTHONPATH=path)
    recipes = {
        str(p.relative_to(installed / "geopose_dist"))
        for p in installed.glob("geopose_dist/configs/**/*.yaml")
    }
    source = installed.parent / "source"
    assert recipes == {str(p.relative_to(source)) for p in source.glob("configs/**/*.yaml")}


@pytest.mark.extra
def test_the_wheel_holds_the_program_and_nothing_else(installed: Path) -> None:
    tops = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"geopose_dist", "shards", "bin"}
    assert (installed / "bin" / "geopose").is_file()
    pages = {path.name for path in (installed / "geopose_dist" / "report").iterdir() if path.suffix != ".py"}
    assert pages - {"__pycache__"} == {"page.css", "page.js", "view.js", "three.min.js"}
    built = {path.name.split(".")[0] for path in (installed / "geopose_dist" / "kernels").glob("_*.so")}
    assert built == {path.stem for path in (installed.parent / "source/geopose_dist/kernels").glob("_*.pyx")}
