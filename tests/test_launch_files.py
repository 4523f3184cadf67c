"""Files for clusters: valid where a schema is to be had, and the commands that they would run."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import runs
import yaml
from hosts import two_hosts

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
KUBERNETES = sorted((LAUNCH / "k8s").glob("*.yaml"))
SPOKEN = (
    "NNODES",
    "NODE_RANK",
    "NPROC",
    "MASTER_",
    "RDZV_",
    "LOCAL_ADDR",
    "IFNAME",
    "CONFIG",
    "SHARDS",
    "OUT",
    "DEBUG",
)


def bare(**variables: str) -> dict[str, str]:
    """This environment without what steers a launcher, and with `variables`."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith((*SPOKEN, "SLURM", "RAY_"))
    }
    return {**kept, **variables}


def dry(script: str, *words: str, **variables: str) -> list[str]:
    """The words that a script would run."""
    command = [str(LAUNCH / script), *words]
    env = bare(DRY_RUN="1", **variables)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout, comments=True)


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def pods(node: Any) -> list[dict[str, Any]]:
    """Specifications of pods anywhere in a document."""
    if isinstance(node, list):
        return [pod for part in node for pod in pods(part)]
    if not isinstance(node, dict):
        return []
    if "containers" in node:
        return [node]
    return [pod for part in node.values() for pod in pods(part)]


def shutdown_timeout_s() -> int:
    done = subprocess.run([LAUNCH / "env.sh"], env=bare(), capture_output=True, text=True, check=True)
    return int(re.findall(r"^SHUTDOWN_TIMEOUT=(\d+)$", done.stdout, re.MULTILINE)[0])


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
def test_core_kinds_and_pods_fit_the_schema(path: Path) -> None:
    version = kubernetes_validate.latest_version()
    found = 0
    for document in documents(path):
        if "." not in document["apiVersion"].split("/")[0]:  # others have no schema here, but their pods do
            kubernetes_validate.validate(document, version, strict=True)
        elif document["kind"] not in ("RayJob", "TrainJob", "TrainingRuntime"):
            pytest.fail(f"{document['kind']} is of no kind that was looked at")
        for spec in pods(document):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
            kubernetes_validate.validate(pod, version, strict=True)
            assert spec["securityContext"]["runAsNonRoot"]
            assert spec["securityContext"]["runAsUser"] == 10001
            shm = [volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shm"]
            assert shm[0]["medium"] == "Memory"
            assert all("/dev/shm" in str(one["volumeMounts"]) for one in spec["containers"])
            found += 1
    assert found
    told = "no schema of" in path.read_text()
    assert told == (path.name != "job.yaml")


def test_a_wrong_field_would_be_found() -> None:
    job = documents(LAUNCH / "k8s" / "job.yaml")[1]
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 360
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def policies(node: Any) -> list[dict[str, Any]]:
    """Job specifications with a podFailurePolicy anywhere in a document."""
    if isinstance(node, list):
        return [policy for part in node for policy in policies(part)]
    if not isinstance(node, dict):
        return []
    own = [node] if "podFailurePolicy" in node else []
    return own + [policy for part in node.values() for policy in policies(part)]


@pytest.mark.parametrize("name", ["job.yaml", "kubeflow-trainer.yaml"])
def test_exit_codes_mean_to_kubernetes_what_they_mean_here(name: str) -> None:
    (job,) = policies(documents(LAUNCH / "k8s" / name))
    container = job["template"]["spec"]["containers"][0]["name"]
    rules = [
        (
            rule["action"],
            rule.get("onExitCodes", {}).get("values"),
            rule.get("onExitCodes", {}).get("containerName"),
        )
        for rule in job["podFailurePolicy"]["rules"]
    ]
    assert rules == [("FailJob", [2], container), ("Ignore", [75], container), ("Ignore", None, None)]
    assert job["podFailurePolicy"]["rules"][2]["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] > shutdown_timeout_s()


def container_words(container: dict[str, Any], args: list[str], **variables: str) -> list[str]:
    """What a container's command would run in a pod with these variables."""
    given = {one["name"]: one["value"] for one in container.get("env", []) if "value" in one}
    command = [word.replace("/opt/geopose/launch", str(LAUNCH)) for word in container["command"]]
    env = bare(DRY_RUN="1", PYTHON=sys.executable, **given, **variables)
    done = subprocess.run([*command, *args], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_pods_of_the_indexed_job_meet_at_the_first() -> None:
    service, job = documents(LAUNCH / "k8s" / "job.yaml")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {one["name"]: one.get("value") for one in container["env"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert env["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert str(service["spec"]["ports"][0]["port"]) == env["MASTER_PORT"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None"
    assert env["NNODES"] == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])
    told = {"CONFIG": "train/base", "SHARDS": "/data/shards", "OUT": "/data/runs/a"}
    words = container_words(container, [], NODE_RANK="3", LOCAL_ADDR="10.0.0.3", **told)
    assert after(words, "--rdzv-endpoint") == "geopose-0.geopose:29400"
    assert after(words, "--rdzv-conf").startswith("is_host=0,")
    assert after(words, "--local-addr") == "10.0.0.3"
    assert after(words, "--nnodes") == "8"
    assert words[-4:] == ["--data.shards", "/data/shards", "--out", "/data/runs/a"]
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in words


def test_what_kubeflow_says_reaches_torchrun_once() -> None:
    runtime, job = documents(LAUNCH / "k8s" / "kubeflow-trainer.yaml")
    (pod,) = pods(runtime)
    pet = {
        "NNODES": "8",
        "NODE_RANK": "0",
        "NPROC_PER_NODE": "4",
        "MASTER_ADDR": "a-node-0-0.a",
        "MASTER_PORT": "29400",
    }
    told = {f"PET_{name}": value for name, value in pet.items()}
    words = container_words(
        pod["containers"][0], job["spec"]["trainer"]["args"], LOCAL_ADDR="10.0.0.1", **told
    )
    assert after(words, "--rdzv-endpoint") == "a-node-0-0.a:29400"
    assert after(words, "--rdzv-conf").startswith("is_host=1,")
    assert (after(words, "--nnodes"), after(words, "--nproc-per-node")) == ("8", "4")
    assert words[-2:] == ["--out", "/data/runs/a"]


def test_slurm_prints_its_step_and_what_the_first_node_runs() -> None:
    variables = {"SLURM_JOB_ID": "10042", "SLURM_JOB_NUM_NODES": "4", "SLURMD_NODENAME": "gpu01"}
    variables |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_RESTART_COUNT": "3", "SLURM_CPUS_PER_TASK": "96"}
    words = dry(
        "slurm.sbatch", "--out", "runs/a", NPROC="8", CONTAINER="apptainer exec --nv x.sif", **variables
    )
    assert after(words, "srun") == "--nodes"
    for option, value in (
        ("--nodes", "4"),
        ("--ntasks-per-node", "1"),
        ("--cpus-per-task", "96"),
        ("--cpu-bind", "none"),
    ):
        assert after(words, option) == value
    step = words.index("apptainer")
    assert words[step : step + 6] == [
        "apptainer", "exec", "--nv", "x.sif", "bash", "-c",
    ]  # fmt: skip
    assert words[step + 6 : step + 11] == [
        'NODE_RANK=$SLURM_NODEID exec "$@"', "geopose", str(LAUNCH / "torchrun.sh"), "--out", "runs/a",
    ]  # fmt: skip
    assert after(words, "--rdzv-endpoint") == "gpu01:20042"
    assert after(words, "--rdzv-id") == "10042.3"
    assert after(words, "--rdzv-conf").startswith("is_host=1,")
    lead = re.findall(r"^#SBATCH --signal=B:USR2@(\d+)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    assert int(lead[0]) > shutdown_timeout_s()


def test_slurm_outside_a_job_and_far_from_the_checkout(tmp_path: Path) -> None:
    assert "srun" in dry("slurm.sbatch", NPROC="8")
    alone = subprocess.run([LAUNCH / "slurm.sbatch"], env=bare(), capture_output=True, text=True, check=False)
    assert "submit this file by sbatch" in alone.stderr
    far = subprocess.run(
        [LAUNCH / "slurm.sbatch"],
        env=bare(SLURM_JOB_ID="1", SLURM_SUBMIT_DIR=str(tmp_path)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert far.returncode == 2
    assert "submit from the checkout, or set CHECKOUT" in far.stderr


def test_ray_scripts_print_their_commands_and_no_token(tmp_path: Path) -> None:
    secret = "f00d" * 16
    head = dry("ray/start-head.sh", NODE_ADDR="10.0.0.1", RAY_AUTH_TOKEN=secret, HOME=str(tmp_path))
    worker = dry("ray/start-worker.sh", "node0", NUM_CPUS="4", HOME=str(tmp_path))
    job = dry("ray/submit.sh", "predict", "--out", "o", HEAD="node0", PORT="7000", HOME=str(tmp_path))
    assert all("RAY_AUTH_MODE=token" in words for words in (head, worker, job))
    assert not any(secret in word for word in head)
    assert after(head, "--node-ip-address") == "10.0.0.1"
    assert {"start", "--head", "--block", "--disable-usage-stats"} <= set(head)
    assert after(worker, "--address") == "node0:6379"
    assert after(worker, "--num-cpus") == "4"
    assert f"RAY_AUTH_TOKEN_PATH={tmp_path}/.ray/auth_token" in worker
    assert job[-5:] == ["predict", "--out", "o", "--ray-address", "node0:7000"]
    assert not list(tmp_path.iterdir())


def test_ray_scripts_refuse_what_cannot_work(tmp_path: Path) -> None:
    def said(script: str, *words: str, **variables: str) -> str:
        env = bare(HOME=str(tmp_path), **variables)
        done = subprocess.run(
            [LAUNCH / "ray" / script, *words], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        return done.stderr

    assert "no token in" in said("start-worker.sh", "node0")
    assert "no token in" in said("submit.sh", "predict")
    assert "train does not run on Ray" in said("submit.sh", "train", RAY_AUTH_TOKEN="x")


@pytest.mark.slow
def test_ray_knows_the_cluster_file() -> None:
    code = (
        "import sys, yaml\n"
        "from ray.autoscaler._private.util import prepare_config, validate_config\n"
        "validate_config(prepare_config(yaml.safe_load(open(sys.argv[1]))))\n"
    )
    subprocess.run([sys.executable, "-c", code, LAUNCH / "ray" / "cluster.yaml"], check=True)
    (mount,) = documents(LAUNCH / "ray" / "cluster.yaml")[0]["file_mounts"].items()
    assert mount == ("~/.ray/auth_token", "~/.ray/auth_token")


def test_settings_are_defaults_that_the_environment_overrides() -> None:
    def settings(**variables: str) -> dict[str, str]:
        done = subprocess.run(
            [LAUNCH / "env.sh"], env=bare(**variables), capture_output=True, text=True, check=True
        )
        return dict(line.replace("\\", "").split("=", 1) for line in done.stdout.splitlines())

    plain = settings(OMP_NUM_THREADS="")
    assert plain["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert plain["NCCL_DEBUG"] == "WARN"
    assert "GLOO_SOCKET_IFNAME" not in plain
    assert "NCCL_SOCKET_IFNAME" not in plain
    assert "USR2" in plain["HANDLED_SIGNALS"]
    chosen = settings(OMP_NUM_THREADS="7", NCCL_DEBUG="TRACE", SHUTDOWN_TIMEOUT="60", IFNAME="ib0", NPROC="4")
    assert (chosen["OMP_NUM_THREADS"], chosen["NCCL_DEBUG"], chosen["SHUTDOWN_TIMEOUT"]) == (
        "7",
        "TRACE",
        "60",
    )
    assert (chosen["GLOO_SOCKET_IFNAME"], chosen["NCCL_SOCKET_IFNAME"]) == ("ib0", "ib0")
    assert settings(DEBUG="1")["NCCL_DEBUG"] == "INFO"


def test_a_node_that_finds_no_first_one_says_where_it_looked(tmp_path: Path) -> None:
    env = bare(
        NNODES="2", NODE_RANK="1", NPROC="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1", MEET_TIMEOUT="1"
    )
    words = ["--data.shards", "s", "--out", str(tmp_path)]
    script = LAUNCH / "torchrun.sh"
    done = subprocess.run([script, *words], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "node 1 reaches nobody at 127.0.0.1:1 (Connection refused), 1 s long" in done.stderr


@pytest.mark.multihost
def test_each_host_finds_the_interface_to_the_first() -> None:
    with two_hosts() as (a, b):
        for host, master in ((a, a.address), (b, a.address), (b, a.name)):
            told = {
                "NNODES": "2",
                "MASTER_ADDR": master,
                "NPROC": "1",
                "DRY_RUN": "1",
                "GLOO_SOCKET_IFNAME": "",
            }
            said = host.start([str(LAUNCH / "torchrun.sh")], told).communicate()[0]
            words = shlex.split(said)
            assert f"GLOO_SOCKET_IFNAME={host.interface}" in words, said
            assert after(words, "--local-addr") == host.address


@pytest.mark.slow
def test_signals_after_the_first_do_not_cut_a_save_short(tmp_path: Path) -> None:
    """Slurm sends them to torchrun and to its script, which passes them on: torchrun of its own leaves at the third."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    for number in (signal.SIGTERM, signal.SIGUSR2):\n"
        "        signal.signal(number, signal.SIG_IGN)\n"
        "    time.sleep(3)\n"
        "    pathlib.Path(sys.argv[1], 'saved').touch()\n"
        "    sys.exit(75)\n"
        "for number in (signal.SIGTERM, signal.SIGUSR2):\n"
        "    signal.signal(number, save)\n"
        "pathlib.Path(sys.argv[1], 'started').touch()\n"
        "time.sleep(60)\n"
    )
    words = [
        "--standalone",
        "--nproc-per-node=1",
        "--signals-to-handle=SIGTERM,SIGUSR2",
        "--shutdown-timeout=30",
    ]
    process = runs.python("-m", "geopose_dist.torchrun", *words, str(script), str(tmp_path))
    runs.wait_until((tmp_path / "started").exists, process)
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.2)  # one at a time, as they come from different senders
    process.wait(60)
    saved = (tmp_path / "saved").exists()  # by then; a rank alone would save later, too
    runs.finish(process)
    assert saved


def test_the_image_is_built_from_what_is_there_and_runs_as_nobody_special() -> None:
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    bases = [rest for word, rest in lines if word == "FROM"]
    assert bases == ["nvidia/cuda:${CUDA} AS build", "nvidia/cuda:${CUDA}"]  # names, no host of a registry
    assert [rest for word, rest in lines if word == "USER"] == ["10001:10001"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    copied: set[str] = set()
    for word, rest in lines:
        if word == "COPY" and not rest.startswith("--from"):
            copied |= set(rest.split()[:-1])
    assert copied == kept
    built = next(rest for word, rest in lines if word == "RUN" and "pip wheel" in rest)
    extras = re.findall(r"\[([a-z,]+)\]", built)[0].split(",")
    assert all(
        re.search(rf"^{extra} = ", (ROOT / "pyproject.toml").read_text(), re.MULTILINE) for extra in extras
    )
    assert "not built where it was written" in text
    assert not any(
        fnmatch.fnmatch(name, pattern) for name in kept for pattern in ignored if pattern.startswith("**")
    )
