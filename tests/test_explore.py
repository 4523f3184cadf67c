"""Exploring large data sets: each file is opened once, in parallel, with progress, in memory that does not grow."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import tifffile
import tiles

from geopose_dist import geometry

ROOT = Path(__file__).resolve().parents[1]

# Python reads this module at the start of every process. Each opened file of the data set becomes a line of the log,
# with the process and the most memory that it has had, in KiB.
WATCH = """
import os, resource, sys
def watch(event, words):
    if event == "open" and isinstance(words[0], (str, bytes)):
        path = os.fsdecode(words[0])
        if path.startswith(os.environ["WATCHED"]) and os.path.isfile(path):
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            log = os.open(os.environ["OPENED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(log, f"{os.getpid()} {most} {path}\\n".encode())
            os.close(log)
sys.addaudithook(watch)
"""


@dataclass
class Seen:
    """What a watched run of explore did: opened files by name, by process, memory in MiB by process, its words."""

    opened: Counter[str]
    by_process: dict[int, list[tuple[str, float]]]
    parent_mib: float
    told: str


def explore(source: Path, folder: Path, *words: str) -> Seen:
    """Run `geopose explore` on two processes and watch every file of the source that any process opens."""
    (folder / "watch").mkdir(exist_ok=True)
    (folder / "watch" / "sitecustomize.py").write_text(WATCH)
    log = folder / "opened.txt"
    log.unlink(missing_ok=True)
    code = (
        "import resource, sys; from geopose_dist import cli; code = cli.main(sys.argv[1:]); "
        "print('MiB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024); sys.exit(code)"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "explore",
        "--source",
        str(source),
        "--out",
        str(folder / "e.html"),
    ]
    variables = {
        "PYTHONPATH": f"{folder / 'watch'}:{ROOT}",
        "WATCHED": f"{source}{os.sep}",
        "OPENED": str(log),
    }
    done = subprocess.run(
        [*command, "--workers", "2", *words],
        env={**os.environ, **variables}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    by_process: dict[int, list[tuple[str, float]]] = {}
    for line in log.read_text().splitlines():
        pid, most, path = line.split(" ", 2)
        by_process.setdefault(int(pid), []).append((Path(path).name, int(most) / 1024))
    opened = Counter(name for files in by_process.values() for name, _ in files)
    return Seen(opened, by_process, float(done.stdout.split()[-1]), done.stderr)


def labels(source: Path) -> set[str]:
    return {path.name for path in source.rglob("*") if path.name.endswith(("_AGL.tif", "_VFLOW.json"))}


@pytest.mark.slow
def test_every_label_is_opened_once_and_images_only_for_examples(tmp_path: Path) -> None:
    source = tmp_path / "data"
    keys = tiles.make_dataset(source, 24, 48, cities=("ARG", "JAX"), codec="png")
    seen = explore(source, tmp_path, "--examples", "1")
    images = {name for name in seen.opened if name.endswith("_RGB.png")}
    assert len(images) == 2
    assert set(seen.opened) == labels(source) | images | {"geopose_train.csv", "metadata.csv", "places.csv"}
    assert set(seen.opened.values()) == {1}
    readers = {pid for pid, files in seen.by_process.items() if any("_AGL" in name for name, _ in files)}
    assert len(readers) == 2
    assert "explore: 24/24 tiles" in seen.told
    assert f"{len(keys)} tiles of 2 cities" in (tmp_path / "e.html").read_text()


def test_a_plain_folder_in_metres_is_judged_by_what_is_read_anyway(tmp_path: Path) -> None:
    """Units are told by the kind of numbers, and where there are none by the size of the scale."""
    from geopose_dist.report.dataset_sums import look
    from shards import layouts

    rgb, agl_cm, scale, angle = tiles.make_tile(1)
    for key, heights, factor in (
        ("A_cm", agl_cm, 1),
        ("A_m", geometry.agl_m_from_cm(agl_cm), 100),
        ("A_bare", None, 100),
    ):
        tiles.write_rgb(tmp_path / f"{key}_RGB.png", rgb)
        (tmp_path / f"{key}_VFLOW.json").write_text(json.dumps({"scale": scale * factor, "angle": angle}))
        if heights is not None:
            tifffile.imwrite(tmp_path / f"{key}_AGL.tif", heights)
    unjudged = layouts.scan(tmp_path, labels=False)
    assert [tile.unit for tile in unjudged.tiles] == ["", "", ""]
    judged = {tile.key: tile for tile in layouts.scan(tmp_path).tiles}
    for tile in unjudged.tiles:
        seen = look((tile, False, 0))
        assert seen.problem == ""
        assert seen.pose == layouts.load_pose(judged[tile.key])
        assert seen.pose == pytest.approx((100 * scale, angle))
        assert seen.counts is None or seen.top_m == pytest.approx(agl_cm[agl_cm < 65535].max() / 100)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_six_thousand_tiles_in_the_memory_of_six_hundred(tmp_path: Path) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    for source, count in ((few, 600), (many, 6000)):
        tiles.make_dataset(source, count, 32, codec="png")
    small, large = explore(few, tmp_path), explore(many, tmp_path)
    assert labels(many) <= set(large.opened)
    assert max(large.opened.values()) == 1
    assert len(labels(many)) == 12_000
    # 5,400 tiles more are their paths, keys and three numbers each: some kilobytes, not their counts of heights.
    assert large.parent_mib - small.parent_mib < 40
    readers = [
        files for files in large.by_process.values() if sum("_AGL" in name for name, _ in files) > 1000
    ]
    assert len(readers) == 2
    for files in readers:
        assert files[-1][1] - files[len(files) // 4][1] < 20
    assert "explore: 6000/6000 tiles" in large.told
