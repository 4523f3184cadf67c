"""What a measurement must say of the machine and the program that it was taken with.

Facts only, read from the kernel and from package metadata: no host name, no paths, no environment. Nothing
heavy is imported; GPUs are asked for only where torch is loaded already or the caller wants them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from geopose_dist.pool import usable_cores

PACKAGES = (
    "numpy",
    "torch",
    "torchvision",
    "segmentation-models-pytorch",
    "timm",
    "opencv-python-headless",
    "imagecodecs",
    "tifffile",
    "webdataset",
    "ray",
    "jsonargparse",
)


def cpu_name() -> str:
    """Model name of the processor, as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def memory_gib() -> float:
    """Memory that processes here may use: the machine's, or the container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no control groups, or the word "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return round(total / 2**30, 1)


def versions() -> dict[str, str]:
    """Installed versions of what speed and results depend on; absent packages are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpus() -> list[dict[str, Any]]:
    """Name, memory in GiB and compute capability of each CUDA device; imports torch."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": facts.name,
                "memory_gib": round(facts.total_memory / 2**30, 1),
                "capability": f"{facts.major}.{facts.minor}",
            }
        )
    return devices


def driver() -> str:
    """Version of the NVIDIA driver, as the kernel or nvidia-smi tells it; empty if neither does."""
    with contextlib.suppress(OSError):
        found = re.search(
            r"(?:Module|x86_64|aarch64)\s+(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text()
        )
        if found:
            return found[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        return told.strip().partition("\n")[0]
    return ""


def cuda() -> dict[str, str]:
    """Versions of driver, CUDA and NCCL, where there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    known = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if known else ""  # type: ignore[no-untyped-call]
    return {"driver": driver(), "cuda": torch.version.cuda or "", "nccl": nccl}


def describe() -> dict[str, Any]:
    """The `machine` of a benchmark's JSON."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_gib": memory_gib(),
        "gpus": gpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions() | cuda(),
    }


def commit() -> tuple[str, bool]:
    """The checkout's commit, and whether its tracked files differ from it; "unknown" outside a checkout.

    A copy of a checkout without its .git is told the commit by GEOPOSE_COMMIT, with a + behind it for changes.
    """
    if told := os.environ.get("GEOPOSE_COMMIT"):
        return told.removesuffix("+"), told.endswith("+")
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown", False
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False  # no git here, or a checkout of somebody else's
    return head, bool(changed)


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()
