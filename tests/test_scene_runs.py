"""Whole runs over scenes: killed drivers, memory, a real network by windows."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import actor_processes, wait_until_gone
from runs import wait_until
from scenes import NET, files_of, pixels, predict, read, write_large_scene, write_scene
from two_nodes import lose_a_node, two_nodes

from geopose_dist.infer.predictor import Predictor
from geopose_dist.infer.reach import reach_px
from geopose_dist.infer.recipe import NetRecipe
from geopose_dist.model.recipe import ModelRecipe
from geopose_dist.model.unet import GeoposeNet
from geopose_dist.model.weights import save_weights

rasterio = pytest.importorskip("rasterio", reason="the extra `scenes` is not installed")


def start(source: Path, checkpoint: Path, out: Path, log: Path, *options: str) -> subprocess.Popen[bytes]:
    words = ["--source", source, "--checkpoint", checkpoint, "--out", out, *NET, *options]
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "geopose_dist", "predict", *map(str, words)],
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def save_net(path: Path, encoder: str, reduction: int) -> GeoposeNet:
    recipe = ModelRecipe(encoder=encoder, decoder_channels=[16, 16, 8, 8, 8])
    torch.manual_seed(0)
    net = GeoposeNet(recipe)
    save_weights(path, net.state_dict(), recipe, {"reduction": reduction, "gsd_known": False})
    return net.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("ray", marks=pytest.mark.soak), "process"])
def test_a_killed_actor_and_a_killed_driver_leave_the_same_files(kind: str, tmp_path: Path) -> None:
    save_net(tmp_path / "net.safetensors", "tu-mobilenetv3_small_050", 2)
    source = write_scene(tmp_path / "ARG_k.tif", pixels(1600, 1700))
    log, out = tmp_path / "log", tmp_path / "out"
    options = ("--workers", "2", "--dispatch", kind, "--net.window", "256")
    whole = (*options, "--dispatch", "process")  # without Ray's start, and nothing may depend on who works
    undisturbed = start(source, tmp_path / "net.safetensors", tmp_path / "undisturbed", log, *whole)
    assert undisturbed.wait(timeout=300) == 0, log.read_text()
    first = start(source, tmp_path / "net.safetensors", out, log, *options)
    windows = out / ".geopose-predict" / "ARG_k" / "windows"
    wait_until(lambda: len(list(windows.glob("window-*.json"))) > 2, first)
    victims = actor_processes(first.pid, kind)
    assert victims
    os.kill(victims[-1], signal.SIGKILL)
    wait_until(lambda: len(list(windows.glob("window-*.json"))) > 8, first)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    wait_until_gone(victims)  # orphans notice that their driver is gone
    assert not (out / "ARG_k_VFLOW.json").exists(), "it was too fast to be killed in the middle"
    second = start(source, tmp_path / "net.safetensors", out, log, *options)
    assert second.wait(timeout=300) == 0, log.read_text()
    assert files_of(out) == files_of(tmp_path / "undisturbed")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = start(source, tmp_path / "net.safetensors", out, log, *options)
    assert again.wait(timeout=300) == 0, log.read_text()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.soak
def test_a_driver_killed_among_its_outputs_goes_on_to_the_same_files(tmp_path: Path) -> None:
    save_net(tmp_path / "net.safetensors", "tu-mobilenetv3_small_050", 4)
    source = write_scene(
        tmp_path / "ARG_k.tif", pixels(4100, 4200), blockxsize=256, blockysize=256
    )  # nine blocks
    log, out = tmp_path / "log", tmp_path / "out"
    options = ("--workers", "2", "--dispatch", "process", "--net.window", "512")
    undisturbed = start(source, tmp_path / "net.safetensors", tmp_path / "undisturbed", log, *options)
    assert undisturbed.wait(timeout=600) == 0, log.read_text()
    first = start(source, tmp_path / "net.safetensors", out, log, *options)
    scratch = out / ".geopose-predict" / "ARG_k" / "windows"
    wait_until(lambda: any(scratch.glob("block-*.npz")), first)
    os.kill(actor_processes(first.pid, "process")[-1], signal.SIGKILL)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not list(out.glob("*.tif")), "it was too fast to be killed in the middle"
    second = start(source, tmp_path / "net.safetensors", out, log, *options)
    assert second.wait(timeout=600) == 0, log.read_text()
    assert files_of(out) == files_of(tmp_path / "undisturbed")


@pytest.mark.soak
def test_a_node_dies_under_a_scene_and_the_files_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    save_net(tmp_path / "net.safetensors", "tu-mobilenetv3_small_050", 2)
    source = write_scene(tmp_path / "ARG_k.tif", pixels(2600, 2700))
    undisturbed, out, log = (tmp_path / name for name in ("undisturbed", "out", "log"))
    options = ("--workers", "2", "--net.window", "256")
    alone = start(source, tmp_path / "net.safetensors", undisturbed, log, *options, "--dispatch", "process")
    assert alone.wait(timeout=600) == 0, log.read_text()
    with two_nodes(monkeypatch) as (address, cluster):
        job = start(source, tmp_path / "net.safetensors", out, log, *options, "--ray-address", address)
        windows = out / ".geopose-predict" / "ARG_k" / "windows"
        wait_until(lambda: len(list(windows.glob("window-*.json"))) > 8, job)
        lose_a_node(cluster)
        assert job.poll() is None, "it was too fast to lose a node in the middle"
        assert job.wait(timeout=600) == 0, log.read_text()
    assert "windows, 2 ray actors" in log.read_text()
    assert files_of(out) == files_of(undisturbed)


@pytest.mark.soak
def test_a_worker_needs_little_memory_however_large_the_scene(tmp_path: Path) -> None:
    save_net(tmp_path / "net.safetensors", "tu-mobilenetv3_small_050", 2)
    peaks = []
    for side in (1000, 4200):
        source = write_scene(tmp_path / f"OMA_{side}.tif", pixels(side, side), blockxsize=256, blockysize=256)
        words = [
            "--source",
            source,
            "--checkpoint",
            tmp_path / "net.safetensors",
            "--out",
            tmp_path / str(side),
        ]
        words += ["--net.window=512", "--net.overlap=64", "--batch=1", "--threads=1", "--device=cpu"]
        code = (
            "import sys; from geopose_dist import cli; done = cli.main(sys.argv[1:]); "
            "print(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1]); sys.exit(done)"
        )
        command = [sys.executable, "-c", code, "predict", *map(str, words), "--dispatch=inline"]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr
        peaks.append(int(told.stdout.split()[-1]) / 1e6)
    assert peaks[1] < 3, peaks
    assert peaks[1] - peaks[0] < 0.6, peaks  # twenty times the pixels


@pytest.mark.slow
def test_a_real_network_by_windows_is_the_whole_within_a_centimetre(tmp_path: Path) -> None:
    net = save_net(tmp_path / "net.safetensors", "resnet18", 1)
    reach = reach_px(net, side=512, tolerance_m=0.01)
    assert 0 < reach <= 160, "the windows below are too small for this network"
    rgb = pixels(250, 1700)
    source = write_scene(tmp_path / "JAX_r.tif", rgb)
    checkpoint, options = tmp_path / "net.safetensors", ("--unit", "m", "--rectify", "false")
    wide = ("--net.window", "1280", "--net.overlap", str(4 * 160), *options)
    assert predict(source, checkpoint, tmp_path / "out", *wide) == 0
    (pose,) = Predictor.of_nets([net], [{}], NetRecipe(window=2048), batch=1).predict([rgb], [None])
    assert pose is not None
    np.testing.assert_allclose(read(tmp_path / "out" / "JAX_r_AGL.tif"), pose.agl_m, atol=0.01)


@pytest.mark.soak
@pytest.mark.parametrize("side", [8_000, 20_000])
def test_a_huge_scene_stays_under_3_gb_per_worker(side: int, tmp_path: Path) -> None:
    save_net(tmp_path / "net.safetensors", "tu-mobilenetv3_small_050", 2)
    write_large_scene(tmp_path / "JAX_huge.tif", side)
    out = tmp_path / "out"
    words = [
        "--source",
        tmp_path / "JAX_huge.tif",
        "--checkpoint",
        tmp_path / "net.safetensors",
        "--out",
        out,
    ]
    words += ["--device=cpu", "--threads=1", "--workers=1", "--batch=1", "--dispatch=process"]
    command = [sys.executable, "-m", "geopose_dist", "predict", *map(str, words)]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        peaks: dict[int, int] = {}
        while process.poll() is None:
            for pid in [process.pid, *descendants(process.pid)]:
                peaks[pid] = max(peaks.get(pid, 0), resident_kb(pid))
            time.sleep(0.5)
    told = (tmp_path / "log").read_text()
    assert process.returncode == 0, told
    print(
        f"{side} x {side}: peaks of processes in MB: {sorted(kb // 1000 for kb in peaks.values())}; {told[-300:]}"
    )
    assert max(peaks.values()) < 3_000_000
    with rasterio.open(out / "rectified" / "JAX_huge_RGB.tif") as file:
        assert file.shape == (side, side)


def descendants(pid: int) -> list[int]:
    found = []
    for children in (Path("/proc") / str(pid) / "task").glob("*/children"):
        try:
            below = [int(word) for word in children.read_text().split()]
        except OSError:
            continue
        found += below + [deeper for child in below for deeper in descendants(child)]
    return found


def resident_kb(pid: int) -> int:
    try:
        lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
