"""Launch files: clean shell, the promised command, and exit codes that a batch system can act on."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ROOT / "launch" / "torchrun.sh"
SCRIPTS = [
    *sorted(ROOT.glob("launch/**/*.sh")),
    ROOT / "launch" / "slurm.sbatch",
    *sorted(ROOT.glob("tools/*.sh")),
    ROOT / ".ci" / "run",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_is_clean(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


def dry(*words: str, **variables: str) -> list[str]:
    environment = {**os.environ, "DRY_RUN": "1", **variables}
    done = subprocess.run([TORCHRUN, *words], env=environment, capture_output=True, text=True, check=True)
    return shlex.split(done.stdout)


def test_without_variables_one_node_and_the_smoke_recipe() -> None:
    command = dry(NPROC="2")
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in command
    assert any(word.startswith("OMP_NUM_THREADS=") for word in command)
    assert "--standalone" in command
    assert command[command.index("--nproc-per-node") + 1] == "2"
    assert command[command.index("--config") + 1] == "smoke"
    assert "--signals-to-handle" in command
    assert int(command[command.index("--shutdown-timeout") + 1]) >= 60


def test_a_run_in_a_store_has_its_logs_in_a_folder() -> None:
    command = dry("--out", "s3://bucket/runs/a", NPROC="2")
    assert command[command.index("--log-dir") + 1] == "runs/a/logs"
    assert command[command.index("--out") + 1] == "s3://bucket/runs/a"


def test_preflight_is_the_training_with_another_verb() -> None:
    train, look = dry("--out", "o", NPROC="2"), dry("--out", "o", NPROC="2", PREFLIGHT="1")
    assert look == [
        word for part in train for word in (["doctor", "--distributed"] if part == "train" else [part])
    ]


def test_nodes_meet_at_the_named_address() -> None:
    first = dry(NPROC="8", NNODES="2", MASTER_ADDR="host0", RDZV_ID="job7", LOCAL_ADDR="10.0.0.1")
    assert "--standalone" not in first
    for option, value in (
        ("--nnodes", "2"),
        ("--rdzv-endpoint", "host0:29400"),
        ("--rdzv-id", "job7"),
        ("--rdzv-conf", "is_host=1,join_timeout=900"),
        ("--local-addr", "10.0.0.1"),
    ):
        assert first[first.index(option) + 1] == value
    second = dry(NPROC="8", NNODES="2", NODE_RANK="1", MASTER_ADDR="host0")
    assert second[second.index("--rdzv-conf") + 1] == "is_host=0,join_timeout=900"


def test_an_elastic_number_of_nodes_starts_lost_ranks_again() -> None:
    command = dry(NPROC="1", NNODES="1:2", MASTER_ADDR="host0", RDZV_CONF="last_call_timeout=5")
    assert command[command.index("--nnodes") + 1] == "1:2"
    assert int(command[command.index("--max-restarts") + 1]) > 0
    assert command[command.index("--rdzv-conf") + 1].endswith(",last_call_timeout=5")
    assert "--log-dir" in command
    fixed = dry(NPROC="1", NNODES="2", MASTER_ADDR="host0")
    assert fixed[fixed.index("--max-restarts") + 1] == "0"


def test_words_go_to_train_and_win_over_variables() -> None:
    command = dry(
        "--data.shards", "mine", "--out=there", "--length", "3", NPROC="1", SHARDS="other", OUT="else"
    )
    assert command[-5:] == ["--data.shards", "mine", "--out=there", "--length", "3"]
    assert "other" not in command
    assert "else" not in command
    assert dry(NPROC="1", SHARDS="s", OUT="o")[-4:] == ["--data.shards", "s", "--out", "o"]


# Stands for python -m torch.distributed.run: waits for SIGTERM, "saves", and exits 1 as torchrun does.
STAND_IN = """#!/usr/bin/env bash
out=$OUT_OF_TEST
case $BEHAVIOUR in
  done) exit 0 ;;
  fail) exit 1 ;;
esac
trap 'echo "{\\"status\\": \\"preempted\\", \\"step\\": 9}" > $out/state.json; exit 1' TERM
touch "$out/started"
while :; do sleep 0.05; done
"""


def launch(tmp_path: Path, behaviour: str) -> subprocess.Popen[bytes]:
    stand_in, out = tmp_path / "python", tmp_path / "run"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    variables = {"PYTHON": str(stand_in), "OUT_OF_TEST": str(out), "OUT": str(out), "BEHAVIOUR": behaviour}
    return subprocess.Popen([TORCHRUN], env={**os.environ, **variables, "NPROC": "1", "SHARDS": "s"})


def wait_for(path: Path) -> None:
    for _ in range(400):
        if path.exists():
            return
        time.sleep(0.02)  # another process makes the file; there is nothing to wait on
    pytest.fail(f"{path} did not appear")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_saves_and_exits_75(tmp_path: Path, number: signal.Signals) -> None:
    running = launch(tmp_path, "wait")
    wait_for(tmp_path / "run" / "started")
    running.send_signal(number)
    assert running.wait(30) == 75
    assert not list((tmp_path / "run").glob(".launched*"))


def test_other_ends_keep_their_code(tmp_path: Path) -> None:
    assert launch(tmp_path, "done").wait(30) == 0
    state = tmp_path / "run" / "state.json"
    state.write_text('{"status": "preempted", "step": 3}')
    os.utime(state, (1e9, 1e9))  # saved by a run before this one: no reason to queue a failing run for ever
    assert launch(tmp_path, "fail").wait(30) == 1
