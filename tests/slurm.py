"""A Slurm of one node for a test: munged, slurmctld and slurmd of Debian's slurm-wlm, in a folder of their own.

    with local_slurm() as slurm:
        job = slurm.submit("--partition", "low", "launch/slurm.sbatch", ...)

Jobs of partition `high` preempt those of `low`, which get SIGTERM and a minute. Ports and sockets are its own, so it
meets no other Slurm of this machine. `why_not()` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")

CONF = """
ClusterName=geopose-test
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmctldPort={controller}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
MailProg=/bin/true
# No control groups: containers have none to give.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=localhost CPUs={cores} State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str:
    """Why no Slurm can be started here; empty if it can."""
    if os.geteuid() != 0:
        return "a Slurm of our own needs root"
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"no {', '.join(missing)}: apt-get install slurm-wlm munge" if missing else ""


@dataclass(frozen=True)
class Slurm:
    """A running Slurm.

    Attributes:
        folder: its configuration, state and logs. env: environment in which its commands find it.
    """

    folder: Path
    env: dict[str, str]

    def call(self, *words: str | Path, **variables: str) -> str:
        """Standard output of one of its commands."""
        env = {**self.env, **variables}
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def submit(self, *words: str | Path, **variables: str) -> str:
        """Number of the job that `sbatch WORDS` makes."""
        return self.call("sbatch", "--parsable", *words, **variables)

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job, by its names (JobState, Restarts, ...)."""
        facts = self.call("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in facts.split() if "=" in word)

    def start_soon(self, number: str) -> None:
        """Let a requeued job begin in three seconds; Slurm would wait two minutes.

        Not at once: a node starts no job that ended on it within the same second.
        """
        self.call("scontrol", "update", f"JobId={number}", "StartTime=now+3")

    def wait_for(self, ready: Callable[[], bool], what: str, timeout_s: float = 240) -> None:
        """Poll until `ready`."""
        end = time.monotonic() + timeout_s
        while not ready():
            assert time.monotonic() < end, f"timed out waiting until {what}\n{self.logs()}"
            time.sleep(0.1)  # Slurm tells nobody of its changes

    def logs(self) -> str:
        """The last words of both daemons."""
        texts = [path.read_text()[-3000:] for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(texts)


@contextlib.contextmanager
def local_slurm() -> Iterator[Slurm]:
    """A Slurm of one node with this machine's cores; all its jobs and daemons end with the context."""
    # Not pytest's folder: names of sockets are 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        controller, node = _free_ports(2)
        conf = CONF.format(folder=folder, controller=controller, node=node, cores=os.cpu_count())
        (folder / "slurm.conf").write_text(conf)
        env = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
        # Were the tests themselves a job of a real Slurm, its variables would choose partitions and nodes here.
        env = {
            n: v for n, v in env.items() if n == "SLURM_CONF" or not n.startswith(("SLURM", "SBATCH", "SRUN"))
        }
        slurm = Slurm(folder, env)
        ends = {"socket": "sock", "pid-file": "pid", "seed-file": "seed", "key-file": "key"}
        files = [f"--{option}={folder}/munge.{end}" for option, end in ends.items()]
        daemons = [
            ["munged", "--foreground", "--force", *files],
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D", "-N", "localhost"],
        ]
        with contextlib.ExitStack() as running:
            for command in daemons:
                log = running.enter_context((folder / f"{command[0]}.log").open("ab"))
                running.enter_context(_daemon(command, env, log.fileno()))
                if command[0] == "munged":
                    slurm.wait_for((folder / "munge.sock").exists, "munged listens", 20)
            slurm.wait_for(lambda: _is_idle(env), "its node is idle", 60)
            try:
                yield slurm
            finally:
                subprocess.run(
                    ["scancel", "--full", "--signal=KILL", "--state=RUNNING"], env=env, check=False
                )
                subprocess.run(["scancel", "--user=root"], env=env, check=False)
                slurm.wait_for(lambda: _is_idle(env), "its jobs have ended", 60)


@contextlib.contextmanager
def _daemon(command: list[str], env: dict[str, str], log: int) -> Iterator[None]:
    process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_idle(env: dict[str, str]) -> bool:
    words = ["sinfo", "--noheader", "--format=%T", "--partition=low"]
    return (
        subprocess.run(words, env=env, capture_output=True, text=True, check=False).stdout.strip() == "idle"
    )


def _free_ports(count: int) -> list[int]:
    """Ports that nobody uses now, all different."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _path() -> str:
    """Where Debian puts daemons is not always in PATH."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
