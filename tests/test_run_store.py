"""Runs kept in a store (moto's S3): complete or not there, found by listing, gone on with on another machine."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import runs
import s3_server
import stalling_relay
import torch

from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.data.stores import StoreFailure, open_store
from geopose_dist.errors import LostPeer, UserError
from geopose_dist.meeting import Meeting
from geopose_dist.model import run_store, weights
from geopose_dist.model.run_store import RunStore
from geopose_dist.runtime import World
from geopose_dist.train import beginning, checkpoint, opening, place
from geopose_dist.train.beginning import Beginning
from geopose_dist.train.checkpoint import Progress, Snapshot
from geopose_dist.train.recipe import TrainRecipe

SMALL = ("--data.global-batch=2", "--data.micro-batch=1", "--validation.every-epochs=0")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 server with the bucket `runs`; its credentials are in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.CREDENTIALS.items():
            patch.setenv(name, value)
        with s3_server.serve("runs", "shards") as address:
            yield address


def machine(folder: Path, s3: str, name: str = "a") -> StoreRecipe:
    """Settings of one of several machines."""
    return StoreRecipe(endpoint=s3, cache_dir=str(folder / name), retries=1, backoff_s=0.01)


def at(url: str, store: StoreRecipe) -> RunStore:
    return RunStore(url, store, run_store.working_copy(url, store))


def saved(run: RunStore, step: int, keep: int = 2, r2: float | None = None) -> None:
    """Write a checkpoint of a step into the working copy, and upload it."""
    tensor = torch.full((4, 3), float(step))
    snapshot = Snapshot({"weight": tensor}, {"state": {}, "param_groups": []}, {})
    folder = checkpoint.save(run.folder, TrainRecipe(), Progress(step=step, r2=r2), snapshot)
    run.save(folder, keep)


def objects(url: str, store: StoreRecipe) -> set[str]:
    return {name for name, _ in open_store(url, store).tree()}


def test_another_machine_finds_the_newest_complete_one(tmp_path: Path, s3: str) -> None:
    url = "s3://runs/deep/newest"
    here, there = (at(url, machine(tmp_path, s3, name)) for name in "ab")
    assert here.steps() == []
    assert here.bring("") is None
    (here.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    saved(here, 10)
    saved(here, 20)
    half = open_store(url, machine(tmp_path, s3))
    half.put_bytes("checkpoints/step-00000030/model.safetensors", b"and then the machine was lost")
    assert there.steps() == ["step-00000010", "step-00000020"]
    folder = there.bring("step-00000020")
    assert folder is not None
    assert torch.equal(checkpoint.load(folder).model["weight"], torch.full((4, 3), 20.0))
    assert checkpoint.read_progress(folder).step == 20
    there.bring_logs()
    assert (there.folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_what_is_here_and_not_in_the_store_counts_for_nothing(tmp_path: Path, s3: str) -> None:
    url = "s3://runs/believed"
    run = at(url, machine(tmp_path, s3))
    saved(run, 10)
    snapshot = Snapshot({"weight": torch.zeros(1)}, {}, {})
    checkpoint.save(run.folder, TrainRecipe(), Progress(step=20), snapshot)  # killed before the upload
    same = checkpoint.save(run.folder, TrainRecipe(), Progress(step=10), snapshot) / "model.safetensors"
    before = same.stat().st_ino
    run.bring("step-00000010")
    assert [folder.name for folder in weights.step_folders(run.folder)] == ["step-00000010"]
    other = at(url, machine(tmp_path, s3, "b"))
    saved(other, 10, r2=0.5)  # only its score is new
    run.bring("step-00000010")
    assert checkpoint.read_progress(run.folder / "checkpoints" / "step-00000010").r2 == 0.5
    assert before  # the file may be fetched again: what counts is the state
    fresh = at("s3://runs/never", machine(tmp_path, s3))
    fresh.folder.mkdir(parents=True)
    (fresh.folder / "metrics.jsonl").write_text("of a run that was deleted\n")
    fresh.bring("")
    assert not (fresh.folder / "metrics.jsonl").exists()


def test_old_ones_and_halves_go_and_the_best_stays(tmp_path: Path, s3: str) -> None:
    url, store = "s3://runs/kept", machine(tmp_path, s3)
    run = at(url, store)
    open_store(url, store).put_bytes("checkpoints/step-00000007/model.safetensors", b"half")
    for step, r2 in ((10, 0.1), (20, 0.9), (30, 0.2), (40, 0.3)):
        saved(run, step, keep=1, r2=r2)
    assert run.steps() == ["step-00000020", "step-00000040"]
    assert {name.split("/")[1] for name in objects(url, store)} == {"step-00000020", "step-00000040"}
    assert run.chosen() == "step-00000020"
    # Another machine learns the scores from the store.
    other = at(url, machine(tmp_path, s3, "b"))
    other.bring("step-00000040")
    saved(other, 50, keep=1, r2=0.4)
    assert other.steps() == ["step-00000020", "step-00000050"]


def test_a_checkpoint_that_is_being_removed_is_none(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state goes first: who lists in between sees no checkpoint rather than one without weights."""
    run = at("s3://runs/removed", machine(tmp_path, s3))
    saved(run, 10, keep=1)
    seen: list[list[str]] = []
    delete = run._store.delete
    monkeypatch.setattr(run._store, "delete", lambda name: (delete(name), seen.append(run.steps())))
    saved(run, 20, keep=1)
    assert len(seen) == 3
    assert all(steps == ["step-00000020"] for steps in seen)


def test_a_checkpoint_that_is_on_its_way_is_none(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state comes last: whatever else is there, nobody takes it for a checkpoint."""
    run = at("s3://runs/coming", machine(tmp_path, s3))
    seen: list[list[str]] = []
    put = run._store.put_file
    monkeypatch.setattr(
        run._store, "put_file", lambda name, path: (put(name, path), seen.append(run.steps()))
    )
    saved(run, 10)
    assert seen == [[], []]
    assert run.steps() == ["step-00000010"]


def test_what_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="web servers cannot be written to"):
        place.run_store(TrainRecipe(out="http://host/run"))
    with pytest.raises(UserError, match="no complete checkpoint there"):
        raise_from_empty(tmp_path)


def raise_from_empty(folder: Path) -> None:
    class Empty(RunStore):
        def steps(self) -> list[str]:
            return []

    Empty("s3://runs/x", StoreRecipe(endpoint="http://127.0.0.1:9"), folder).chosen()


def test_a_folder_that_machines_do_not_share_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0's newest checkpoint counts; a machine that does not see it must not begin anew beside it."""
    monkeypatch.setattr(beginning, "SHARED_S", 0.3)
    snapshot = Snapshot({"weight": torch.zeros(1)}, {}, {})
    checkpoint.save(tmp_path / "a", TrainRecipe(), Progress(step=10), snapshot)
    store = torch.distributed.HashStore()

    def rank(number: int, out: Path) -> str:
        start = Beginning(TrainRecipe(out=str(out), preflight="warn"))
        try:
            start.prepare(Meeting(number, 2, store, 20.0))
        except UserError as error:
            return str(error)
        return str(start.checkpoint)

    with ThreadPoolExecutor(2) as threads:
        told = list(threads.map(rank, (0, 1), (tmp_path / "a", tmp_path / "b")))
    assert told[0] == told[1]
    assert "rank 1 on" in told[0]
    assert f"{tmp_path}/b/checkpoints/step-00000010 is not there, but rank 0 on" in told[0]
    assert "--out must be a folder that all machines share" in told[0]


def test_ranks_with_different_checkpoints_do_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0, 3, 0, 3, torch.device("cpu"), hosts=("a", "a", "b"))
    opening.check_same_step(7, World(0, 1, 0, 1, torch.device("cpu")))
    monkeypatch.setattr(World, "gather", lambda self, mine: [mine, mine, mine + 2])
    with pytest.raises(LostPeer, match="rank 0 on a after step 7, rank 2 on b after step 9"):
        opening.check_same_step(7, world)


def options(s3: str, cache: Path, *more: str) -> tuple[str, ...]:
    store = (f"--data.store.endpoint={s3}", f"--data.store.cache-dir={cache}", "--data.store.retries=1")
    return (*SMALL, *store, *more)


@pytest.mark.slow
def test_a_whole_run_and_what_starts_from_it(
    train_shards: Path,
    tmp_path: Path,
    s3: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All of a run is in the store; an outage in between costs nothing but a line."""
    url, tries = "s3://runs/whole", []
    save = RunStore.save

    def failing(self: RunStore, folder: Path, keep: int) -> None:
        tries.append(folder.name)
        if len(tries) == 1:
            raise StoreFailure("the store is away")
        save(self, folder, keep)

    monkeypatch.setattr(RunStore, "save", failing)
    words = options(s3, tmp_path / "a", "--length=3 steps", "--checkpoint.every-steps=1")
    assert runs.cli.main([*runs.words(train_shards, Path("x"), *words), f"--out={url}"]) == 0
    said = capsys.readouterr().err
    assert "step 1 is not saved: the store is away; training goes on" in said
    store = machine(tmp_path, s3, "b")
    names = objects(url, store)
    assert {"recipe.yaml", "metrics.jsonl", "state.json"} <= names
    lines = b"".join(open_store(url, store).stream("metrics.jsonl")).splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert json.loads(b"".join(open_store(url, store).stream("state.json")))["status"] == "done"
    start = options(s3, tmp_path / "c", "--length=1 steps", f"--init-from={url}")
    assert runs.train(train_shards, tmp_path / "next", *start) == 0
    assert f"starts from the weights of {url}" in capsys.readouterr().err
    words = [
        "predict",
        "--source",
        str(train_shards),
        "--split",
        "val",
        "--checkpoint",
        url,
        "--device",
        "cpu",
    ]
    words += ["--out", str(tmp_path / "poses"), "--dispatch", "inline", "--store.endpoint", s3]
    assert runs.cli.main(words) == 0
    assert len(list((tmp_path / "poses").glob("*_AGL.tif"))) == 4


def killed_while_uploading(
    shards: str, s3: str, folder: Path, ranks: int, url: str, whole: Path, *more: str
) -> stalling_relay.Relay:
    """Kill every process in the middle of the second upload, then go on on another machine: bit for bit the same."""
    first = sorted((whole / "checkpoints").glob("step-*"))[0]
    size = sum(file.stat().st_size for file in first.iterdir())
    length = ("--length=8 steps", "--checkpoint.every-steps=2", *more)
    with stalling_relay.relay(s3) as between:
        between.stall_after = int(1.5 * size)
        words = [
            *runs.words(Path(), Path(), *options(between.url, folder / "a", *length)),
            f"--data.shards={shards}",
        ]
        process = runs.launch([*words, f"--out={url}"], ranks)
        runs.wait_until(between.stalled.is_set, process)
        pids = runs.rank_processes(process) if ranks > 1 else {}
        process.send_signal(signal.SIGKILL)
        for pid in pids.values():
            runs.os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60)
    store = machine(folder, s3, "look")
    assert at(url, store).steps() == ["step-00000002"]  # the second one is in mid-upload: not there
    words = [*runs.words(Path(), Path(), *options(s3, folder / "b", *length)), f"--data.shards={shards}"]
    code, said = runs.finish(runs.launch([*words, f"--out={url}"], ranks))
    assert code == 0, said
    assert "goes on after step 2" in said
    copy = run_store.working_copy(url, machine(folder, s3, "b"))
    assert runs.numbers(copy) == runs.numbers(whole)
    newest = run_store.fetched_weights(url, machine(folder, s3, "c"))
    assert newest.name == "step-00000008"
    one, two = runs.final_weights(whole), runs.load_file(newest / "model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)
    stored = [
        torch.load(f / "training.pt", weights_only=True) for f in (newest, weights.step_folders(whole)[-1])
    ]
    assert str(stored[0]) == str(stored[1])
    return between


WHOLE = ("--length=8 steps", "--checkpoint.every-steps=2", "--checkpoint.keep=9", *SMALL)


@pytest.mark.slow
def test_killed_in_mid_upload(train_shards: Path, tmp_path: Path, s3: str) -> None:
    whole = tmp_path / "whole"
    code, said = runs.finish(runs.launch(runs.words(train_shards, whole, *WHOLE), 1))
    assert code == 0, said
    killed_while_uploading(str(train_shards), s3, tmp_path, 1, "s3://runs/one", whole)


@pytest.mark.extra
def test_two_ranks_stage_from_a_store_and_are_killed_in_mid_upload(
    train_shards: Path, tmp_path: Path, s3: str
) -> None:
    """Shards, checkpoints and logs all in the store; each shard is fetched once for both ranks."""
    whole = tmp_path / "whole"
    code, said = runs.finish(runs.launch(runs.words(train_shards, whole, *WHOLE), 2))
    assert code == 0, said
    s3_server.upload(train_shards, "s3://shards/tiles", s3)
    more = ("--data.store.stage=node",)
    between = killed_while_uploading("s3://shards/tiles", s3, tmp_path, 2, "s3://runs/two", whole, *more)
    tars = between.count("GET", ".tar")
    assert len(tars) == len(list(train_shards.glob("*.tar")))
    assert set(tars.values()) == {1}
