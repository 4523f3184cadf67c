"""The house's rules that a program can check: layers, one home for ray and for x and y, no strays in files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("geopose_dist/**/*.py"), *ROOT.glob("shards/**/*.py")])


def imports_of(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.slow
def test_imports_point_down() -> None:
    lint = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_pool_imports_ray() -> None:
    assert [path.name for path in SOURCES if "ray" in imports_of(path)] in (["pool.py"], [])


def test_torch_stays_out_of_what_runs_without_it() -> None:
    light = [
        ROOT / "geopose_dist/data" / f"{name}.py"
        for name in ("plan", "reader", "codecs", "manifest", "sample")
    ]
    light += [
        path for path in SOURCES if {"kernels", "augment", "shards"} & set(path.relative_to(ROOT).parts)
    ]
    assert [str(path) for path in light if path.exists() and "torch" in imports_of(path)] == []


def test_files_stay_short_and_say_what_they_are() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert len(text.splitlines()) <= 400, f"{path} is longer than 400 lines"
        if text and path.name != "__init__.py":
            assert ast.get_docstring(ast.parse(text)), f"{path} has no module docstring"


def test_no_global_seeds_and_no_blanket_excepts() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(r"np\.random\.(seed|rand|randn|randint|choice|shuffle)\(", text), path
        assert not re.search(r"^\s*except:\s*$", text, re.MULTILINE), path
