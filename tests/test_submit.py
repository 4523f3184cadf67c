"""Submissions: everything wrong is refused by name and at once; what is packed is plain, small and repeatable."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tifffile

from geopose_dist import cli
from geopose_dist.evaluate import predictions as files

KEYS = ("ARG_aaaaaa", "JAX_bbbbbb", "OMA_cccccc")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A format folder in the challenge's layout and predictions that fit it."""
    form, pred = tmp_path / "submission_format", tmp_path / "pred"
    form.mkdir()
    pred.mkdir()
    rng = np.random.default_rng(0)
    for key in KEYS:
        tifffile.imwrite(form / f"{key}_AGL.tif", np.zeros((40, 56), np.uint16))
        (form / f"{key}_VFLOW.json").write_text('{"scale": 0, "angle": 0}')
        (pred / f"{key}_AGL.tif").write_bytes(
            files.encode_agl(rng.integers(0, 3000, (40, 56)).astype(np.uint16))
        )
        (pred / f"{key}_VFLOW.json").write_bytes(files.encode_vflow(0.9, 1.5))
    return pred, form


def submit(pred: Path, form: Path, out: Path, *options: str) -> int:
    return cli.main(
        [
            "submit",
            "--predictions",
            str(pred),
            "--format",
            str(form),
            "--out",
            str(out),
            "--workers",
            "1",
            *options,
        ]
    )


def test_a_good_folder_becomes_the_same_archive_every_time(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pred, _ = folders
    (pred / ".geopose-predict").mkdir()
    (pred / ".geopose-predict" / "made_by.json").write_text("{}")
    out, again = tmp_path / "a.tar.gz", tmp_path / "b.tar.gz"
    assert submit(*folders, out) == 0
    assert f"6 files, {out.stat().st_size:,} bytes" in capsys.readouterr().out
    for path in pred.glob("*.*"):  # other times, other rights
        path.chmod(0o600)
        path.touch()
    assert submit(*folders, again) == 0
    assert out.read_bytes() == again.read_bytes()
    assert out.read_bytes()[3:8] == bytes(5)  # neither a name nor a time in gzip's header
    with tarfile.open(out) as archive:
        members = archive.getmembers()
        assert [m.name for m in members] == sorted(
            f"{k}_{end}" for k in KEYS for end in ("AGL.tif", "VFLOW.json")
        )
        assert all(m.isreg() and m.mtime == m.uid == m.gid == 0 and m.uname == "" for m in members)
        for member in members:
            opened = archive.extractfile(member)
            assert opened is not None
            assert opened.read() == (pred / member.name).read_bytes()


def _heights(name: str, change):
    def spoil(pred: Path) -> None:
        path = pred / f"{name}_AGL.tif"
        tifffile.imwrite(path, change(tifffile.imread(path)))

    return spoil


def _unknown(heights: np.ndarray) -> np.ndarray:
    heights[1, 2] = 65535
    return heights


SPOILT = {
    "missing": (lambda pred: (pred / "JAX_bbbbbb_AGL.tif").unlink(), "JAX_bbbbbb_AGL.tif: missing"),
    "missing pose": (
        lambda pred: (pred / "JAX_bbbbbb_VFLOW.json").unlink(),
        "JAX_bbbbbb_VFLOW.json: missing",
    ),
    "extra tile": (
        lambda pred: shutil.copy(pred / "JAX_bbbbbb_AGL.tif", pred / "JAX_dddddd_AGL.tif"),
        "JAX_dddddd_AGL.tif: not in the format folder",
    ),
    "extra file": (lambda pred: (pred / "readme.md").write_text("x"), "readme.md: not in the format folder"),
    "extra folder": (lambda pred: (pred / "old").mkdir(), "old: not in the format folder"),
    "size": (
        _heights("OMA_cccccc", lambda h: h.T.copy()),
        "OMA_cccccc_AGL.tif: size 56 x 40; wanted 40 x 56",
    ),
    "dtype": (_heights("OMA_cccccc", lambda h: h.astype(np.int16)), "OMA_cccccc_AGL.tif: dtype int16"),
    "float": (_heights("OMA_cccccc", lambda h: h.astype(np.float32)), "OMA_cccccc_AGL.tif: dtype float32"),
    "infinity": (
        _heights("OMA_cccccc", lambda h: np.where(h > 1500, np.inf, h).astype(np.float32)),
        "pixels are NaN or infinite",
    ),
    "three channels": (
        _heights("OMA_cccccc", lambda h: np.stack([h] * 3, -1)),
        "OMA_cccccc_AGL.tif: size 40 x 56 x 3; wanted 40 x 56",
    ),
    "cut": (
        lambda pred: (pred / "OMA_cccccc_AGL.tif").write_bytes(
            (pred / "OMA_cccccc_AGL.tif").read_bytes()[:-90]
        ),
        "OMA_cccccc_AGL.tif: cannot be read",
    ),
    "NaN": (
        _heights("OMA_cccccc", lambda h: np.where(h > 1500, np.nan, h).astype(np.float32)),
        "pixels are NaN or infinite",
    ),
    "65535": (_heights("OMA_cccccc", _unknown), "OMA_cccccc_AGL.tif: 1 pixels are 65535"),
    "px/m": (
        lambda pred: (pred / "ARG_aaaaaa_VFLOW.json").write_text('{"scale": 0.5, "angle": 0}'),
        "ARG_aaaaaa_VFLOW.json: scale is 0.5, which looks like px/m",
    ),
    "NaN scale": (
        lambda pred: (pred / "ARG_aaaaaa_VFLOW.json").write_text('{"scale": NaN, "angle": 0}'),
        "ARG_aaaaaa_VFLOW.json: scale is nan",
    ),
    "scale 0": (
        lambda pred: (pred / "ARG_aaaaaa_VFLOW.json").write_text('{"scale": 0, "angle": 0}'),
        "ARG_aaaaaa_VFLOW.json: scale is 0",
    ),
    "NaN angle": (
        lambda pred: (pred / "ARG_aaaaaa_VFLOW.json").write_text('{"scale": 0.005, "angle": NaN}'),
        "ARG_aaaaaa_VFLOW.json: angle is nan",
    ),
    "no scale": (lambda pred: (pred / "ARG_aaaaaa_VFLOW.json").write_text('{"angle": 0}'), "'scale'"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_each_fault_is_refused_by_name(
    folders: tuple[Path, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, sentence = SPOILT[name]
    spoil(folders[0])
    out = tmp_path / "s.tar.gz"
    assert submit(*folders, out) == 2
    assert sentence in capsys.readouterr().err
    assert not out.exists()


def test_all_faults_are_told_at_once(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("missing", "extra file", "65535", "NaN angle"):
        SPOILT[name][0](folders[0])
    assert submit(*folders, tmp_path / "s.tar.gz") == 2
    told = capsys.readouterr().err
    assert "4 problems" in told
    for name in ("missing", "extra file", "65535", "NaN angle"):
        assert SPOILT[name][1] in told


def test_an_old_archive_survives_a_failure(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "s.tar.gz"
    assert submit(*folders, out) == 0
    before = out.read_bytes()
    SPOILT["65535"][0](folders[0])
    assert submit(*folders, out) == 2
    assert out.read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_wrong_folder_or_name_is_one_sentence(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(folders[0], tmp_path, tmp_path / "s.tar.gz") == 2
    assert submit(*folders, tmp_path / "s.zip") == 2
    told = capsys.readouterr().err
    assert "is it the right folder?" in told
    assert "ends in .tar.gz" in told
    assert json.loads((folders[0] / f"{KEYS[0]}_VFLOW.json").read_text())["scale"] == 0.009
