"""Packing at its limits: memory that does not grow, a disk that is full, kill -9 at any moment."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from packs import children, hashes, run_pack
from tiles import make_dataset

ROOT = Path(__file__).resolve().parents[1]

MEASURED = """
import re, sys
from geopose_dist import cli
code = cli.main(["pack", *sys.argv[1:]])
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
sys.exit(code)
"""


def peak_kb(pid: int) -> int:
    """Most memory that a process has held since it began; 0 if it has ended. (rusage would count its parent's.)"""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", (Path("/proc") / str(pid) / "status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


def many_tiles(folder: Path, count: int, size: int) -> None:
    """A plain folder of `count` tiles, six of them drawn and the rest links to these."""
    drawn = folder.with_name(f"{folder.name}-drawn")
    make_dataset(drawn, 6, size=size)
    folder.mkdir()
    keys = sorted(path.name.removesuffix("_RGB.j2k") for path in drawn.glob("train/*_RGB.j2k"))
    for number in range(count):
        for end in ("_RGB.j2k", "_AGL.tif", "_VFLOW.json"):
            os.link(drawn / "train" / f"{keys[number % 6]}{end}", folder / f"JAX_{number:04d}{end}")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_memory_is_flat_over_hundreds_of_tiles(tmp_path, workers):
    """Twenty times the tiles, which are 130 MB of pixels more, take no more memory."""
    peaks_mb = []
    for count in (20, 400):
        many_tiles(tmp_path / str(count), count, 256)
        words = ["--source", tmp_path / str(count), "--out", tmp_path / f"out-{count}", "--reduce", 1]
        words += ["--shard-samples", 10, "--workers", workers]
        command = [sys.executable, "-c", MEASURED, *map(str, words)]
        workers_kb = 0
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                workers_kb = max([workers_kb, *map(peak_kb, children(process.pid))])
                time.sleep(0.05)
            assert process.stdout is not None
            here_kb = int(process.stdout.read())
        assert process.returncode == 0
        peaks_mb.append((here_kb / 1e3, workers_kb / 1e3))
    print(f"peak MB, this process and the largest worker, of 20 and of 400 tiles: {peaks_mb}")
    assert peaks_mb[0][0] < 300  # no torch in a process that packs
    assert (peaks_mb[0][1] > 0) == (workers > 1)
    assert all(more < less + 12 for less, more in zip(*peaks_mb, strict=True)), peaks_mb


def small_files(limit: int):
    """What a process runs first, so that no file of it can grow beyond `limit` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def pack_command(source: Path, out: Path, *options: str) -> list[str]:
    words = ["--source", str(source), "--out", str(out), "--shard-samples", "3", *options]
    return [sys.executable, "-m", "geopose_dist", "pack", *words]


def assert_one_sentence_and_no_halves(done: subprocess.CompletedProcess[str], out: Path) -> None:
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("geopose pack: ")]
    assert len(said) == 1, done.stderr
    assert "the disk is full" in said[0]
    assert "run the same command again" in said[0]
    assert "Traceback" not in done.stderr
    left = [path.name for path in out.rglob("*") if path.is_file()]
    assert "manifest.json" not in left
    assert not [name for name in left if name.endswith(".tmp")]
    assert not list(out.glob("*.tar"))


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path):
    make_dataset(tmp_path / "data", 7)
    out = tmp_path / "out"
    command = pack_command(tmp_path / "data", out, "--workers", "1")
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=small_files(9000)
    )
    assert_one_sentence_and_no_halves(done, out)
    run_pack(tmp_path / "data", out)
    run_pack(tmp_path / "data", tmp_path / "whole")
    assert hashes(out) == hashes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("size_kb", [48, 200])
def test_a_disk_that_is_full(tmp_path, size_kb):
    """A real one: at the first shard and in the middle, what is whole stays and what is not goes."""
    make_dataset(tmp_path / "data", 24, size=128)
    run_pack(tmp_path / "data", tmp_path / "whole")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a disk of its own needs root and mount")
    try:
        out = disk / "out"
        command = pack_command(tmp_path / "data", out, "--workers", "2")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert_one_sentence_and_no_halves(done, out)
        kept = {p.name: p.stat().st_mtime_ns for p in (out / ".pack" / "shards").glob("*.tar")}
        assert bool(kept) == (size_kb == 200)
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        run_pack(tmp_path / "data", out)
        assert hashes(out) == hashes(tmp_path / "whole")
        assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    "rounds", [pytest.param(3, marks=pytest.mark.slow), pytest.param(30, marks=pytest.mark.soak)]
)
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path, rounds):
    make_dataset(tmp_path / "data", 36, size=192)
    began = time.monotonic()
    command = pack_command(tmp_path / "data", tmp_path / "whole", "--workers", "2")
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    whole_s = time.monotonic() - began
    rng = np.random.Generator(np.random.Philox(rounds))
    out, interrupted = tmp_path / "out", 0
    command = pack_command(tmp_path / "data", out, "--workers", "2")
    for _ in range(rounds):
        if (out / "manifest.json").exists():
            shutil.rmtree(out)
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.0) * whole_s)  # the moment is the point of this test
        os.killpg(process.pid, signal.SIGKILL)
        interrupted += process.wait() == -signal.SIGKILL
        if not (out / "manifest.json").exists():
            assert hashes(out) == {}, "shards took their places before all were there"
    assert interrupted, "every round was over before it could be killed"
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert not list(out.rglob("*.tmp"))
