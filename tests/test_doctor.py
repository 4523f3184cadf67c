"""The doctor tells what is there, and what to do about what is not."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from geopose_dist import cli, doctor
from geopose_dist.errors import FinishedWithFailures


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_this_machine_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "doctor.json"
    assert cli.main(["doctor", "--json", str(out)]) == 0
    facts, shown = json.loads(out.read_text()), capsys.readouterr().out
    found = {finding["name"]: finding for finding in facts["findings"]}
    for name in (
        "geopose-dist",
        "python",
        "kernels",
        "processor",
        "memory",
        "torch",
        "collectives",
        "codecs",
        "object stores",
        "web servers",
        "ray",
    ):
        assert found[name]["state"] == "ok", found[name]
        assert name in shown
    assert facts["machine"]["cores"] >= 1
    assert "_" in found["kernels"]["found"]
    assert str(Path.home()) not in out.read_text()


def test_json_goes_to_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json", "-"]) == 0
    assert "findings" in json.loads(capsys.readouterr().out)


def test_an_unbuilt_kernel_is_a_fault_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "geopose_dist"
    (package / "kernels").mkdir(parents=True)
    (package / "kernels" / "_new.pyx").write_text("")
    monkeypatch.setattr("geopose_dist.__file__", str(package / "__init__.py"))
    (finding,) = doctor.extension()
    assert (finding.state, finding.found) == ("fault", "not built: _new")
    assert "make setup" in finding.advice
    monkeypatch.setattr(doctor, "CHECKS", (doctor.extension,))
    with pytest.raises(FinishedWithFailures, match=r"_new.*make setup"):
        doctor.run(doctor.DoctorRecipe())


def test_small_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(path: Any) -> Usage:
        return Usage(64 << 20, 0, 64 << 20)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    findings = {finding.name: finding for finding in doctor.hardware()}
    assert findings["shared memory"].state == "warning"
    assert "--shm-size" in findings["shared memory"].advice


def test_missing_codecs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import imagecodecs

    monkeypatch.setattr(imagecodecs.QOI, "available", False)
    (finding,) = doctor.codecs()
    assert finding.state == "warning"
    assert "without QOI" in finding.found
