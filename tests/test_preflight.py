"""Preflight under real torchrun: each thing that is wrong on one rank is found and named, with both values."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import torch

from geopose_dist import config
from geopose_dist.errors import FoundProblems
from geopose_dist.meeting import Meeting
from geopose_dist.train import preflight
from geopose_dist.train.recipe import TrainRecipe

RANK_1 = """\
#!/bin/sh
# Rank 1 runs on a machine of its own: another name, 64 MB of shared memory, a full disk.
if [ "$RANK" = 0 ]; then exec "$PYTHON" -m geopose_dist "$@"; fi
exec unshare --mount --uts sh -c '
  hostname hostb
  mount -t tmpfs -o size=64m tmpfs /dev/shm
  mount -t tmpfs -o size=64k tmpfs "$FULL_DISK"
  ulimit -n 200
  exec "$PYTHON" "$ANOTHER_TORCH" "$@" $ONLY_RANK_1' sh "$@"
"""
ANOTHER_TORCH = """\
import sys
import torch
torch.__version__ = "2.12.0"
from geopose_dist import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def two_ranks(script: Path, *words: str, **variables: str) -> tuple[int, str, str]:
    """Run a script, which takes the words of `geopose`, as two ranks: exit code, stdout, stderr."""
    torchrun = [
        "-m",
        "geopose_dist.torchrun",
        "--standalone",
        "--nproc-per-node=2",
        "--no-python",
        str(script),
    ]
    process = runs.python(*torchrun, *words, PYTHON=sys.executable, GLOO_SOCKET_IFNAME="lo", **variables)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def script_of(folder: Path, text: str) -> Path:
    path = folder / "rank.sh"
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def own_shards(shards: Path, folder: Path) -> Path:
    """The same shards but for the last one, which another packing made."""
    other = folder / "other-shards"
    shutil.copytree(shards, other)
    manifest = json.loads((other / "manifest.json").read_text())
    for shard in manifest["shards"]:
        if shard["split"] == "val":
            shard["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    return other


@pytest.mark.slow
@pytest.mark.multihost
@pytest.mark.parametrize("command", ["doctor", "train"])
def test_what_is_wrong_on_one_rank_is_named(
    train_shards: Path, tmp_path: Path, full_disk: Path, command: str
) -> None:
    """Another torch, another shard, another recipe, 64 MB of shared memory, few open files, full disks: all at once."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (tmp_path / "another.py").write_text(ANOTHER_TORCH)
    out = full_disk / "run"
    words = [*runs.words(train_shards, out)[1:], "--data.workers=1", "--data.store.stage=node"]
    words.append(f"--data.store.cache-dir={cache}")
    other = own_shards(train_shards, tmp_path)
    code, said, told = two_ranks(
        script_of(tmp_path, RANK_1), command, *words, *["--distributed"] * (command == "doctor"),
        FULL_DISK=str(cache), ANOTHER_TORCH=str(tmp_path / "another.py"),
        ONLY_RANK_1=f"--data.shards={other} --optim.lr=0.5",
    )  # fmt: skip
    assert code == 2, said + told
    host = os.uname().nodename
    found = [
        f"rank 1 on hostb: torch is 2.12.0, on rank 0 on {host} it is {torch.__version__}",
        f"rank 1 on hostb: optim.lr of the recipe is 0.5, on rank 0 on {host} it is 0.001",
        "rank 1 on hostb: shards of split val are ",
        f"(in {other}), on rank 0 on {host} they are ",
        "rank 1 on hostb: a process may open 200 files, wanted 256 at least",
    ]
    if command == "doctor":
        found += [
            "rank 1 on hostb: /dev/shm has 67 MB free, wanted 134 at least",
            f"rank 1 on hostb: {cache}: the disk has 0.000 GB free, and staged shards need",
            f"rank 0 on {host}: {out}: the disk has 0.00 GiB free and checkpoints need",
        ]
        assert "hostb" in said  # the table
    for sentence in found:
        assert told.count(sentence) == 1, (sentence, told)
    assert "Traceback" not in told
    assert not out.exists()


@pytest.mark.slow
def test_ranks_that_fit_are_measured(train_shards: Path, tmp_path: Path) -> None:
    plain = script_of(tmp_path, '#!/bin/sh\nexec "$PYTHON" -m geopose_dist "$@"\n')
    words = runs.words(train_shards, tmp_path / "run", f"--json={tmp_path / 'found.json'}")[1:]
    code, said, told = two_ranks(plain, "doctor", "--distributed", *words)
    assert code == 0, told
    assert "nothing is wrong" in said
    facts = json.loads((tmp_path / "found.json").read_text())
    assert facts["problems"] == []
    assert [row["host"] for row in facts["ranks"]] == [os.uname().nodename] * 2
    assert facts["ranks"][0]["shards"] == facts["ranks"][1]["shards"] != {}
    assert all(row["reading"]["mb_per_s"] > 0 for row in facts["ranks"])
    assert facts["measured"]["all_reduce"]["latency_us"] > 0
    assert facts["measured"]["all_reduce"]["bus_gb_per_s"] > 0
    assert facts["measured"]["clock_skew_s"][0] == 0
    assert abs(facts["measured"]["clock_skew_s"][1]) < 0.1  # one machine, one clock


def test_only_warned_if_that_is_wanted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "lacks", lambda _: ["too few open files"])
    preflight.check(TrainRecipe(preflight="warn"), Meeting(0, 1))
    assert "preflight: rank 0 on " in capsys.readouterr().err
    with pytest.raises(FoundProblems, match="too few open files"):
        preflight.check(TrainRecipe(), Meeting(0, 1))


def test_places_may_differ_and_values_may_not(tmp_path: Path) -> None:
    def facts(**changes: object) -> preflight.Facts:
        shared = {"versions": preflight.versions(), "shards": {"train": "abc"}, "place": "/data"}
        return {**shared, "recipe": preflight.own_recipe(TrainRecipe()), **changes}

    assert preflight.differences(facts(), facts(place="/elsewhere"), "a") == []
    words = ["--data.shards=/b", "--data.store.cache-dir=/nvme", "--data.workers=3", "--seed=1"]
    other = preflight.own_recipe(config.parse(TrainRecipe, words, prog="x", description=""))
    assert preflight.differences(facts(recipe=other), facts(), "a") == [
        "seed of the recipe is 1, on rank 0 on a it is 0"
    ]
    assert preflight.differences(facts(shards={}), facts(), "a") == [
        "shards of split train are none (in /data), on rank 0 on a they are abc (in /data)"
    ]


def test_small_shared_memory_matters_to_loader_processes_only() -> None:
    facts = {"shm_bytes": 64_000_000}
    data = [dataclasses.replace(TrainRecipe().data, workers=workers) for workers in (0, 2)]
    none, some = (preflight.small_shm(facts, TrainRecipe(data=one)) for one in data)
    assert none == []
    assert "has 64 MB free" in some[0]
