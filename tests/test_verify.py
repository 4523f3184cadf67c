"""Verifying: whole shards pass, every damaged member is named, hostile ones are refused; the same for indexing."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tiles import make_dataset

from geopose_dist.data import codecs, manifest
from geopose_dist.data.reader import Reader
from geopose_dist.data.sample import TileFacts
from geopose_dist.errors import FinishedWithFailures, FoundProblems, UserError
from shards import index_only, pack, tars, verify
from shards.pack import PackRecipe
from shards.verify import VerifyRecipe


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    make_dataset(folder / "data", 8, test=2)
    pack.run(PackRecipe(source=str(folder / "data"), out=str(folder / "out"), shard_samples=4, workers=1))
    return folder / "out"


@pytest.fixture
def shards(packed, tmp_path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "shards", ignore=shutil.ignore_patterns(".pack")))


def check(folder: Path, deep: bool = False) -> str:
    with pytest.raises(FinishedWithFailures) as caught:
        verify.run(VerifyRecipe(str(folder), deep=deep, workers=1))
    return str(caught.value)


def index_again(folder: Path) -> None:
    index_only.run(PackRecipe(out=str(folder), index_only=True, workers=1))


def key_of(folder: Path, split: str, index: int) -> str:
    return Reader(manifest.open_split(folder, split)).key(index)


@pytest.mark.parametrize("deep", [False, True])
def test_whole_shards(shards, tmp_path, capsys, deep):
    verify.run(VerifyRecipe(str(shards), deep=deep, workers=1, json=str(tmp_path / "summary.json")))
    assert "whole: 10 samples (test 2, train 8) in 3 shards" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["samples"], summary["shards"], summary["problems"]) == (10, 3, [])


def test_the_command(shards, geopose):
    assert geopose("verify", "--shards", shards, "--deep", "--workers", 1).returncode == 0
    (shards / "train-000001.tar").unlink()
    result = geopose("verify", "--shards", shards, "--workers", 1)
    assert result.returncode == 1
    assert "train-000001.tar: missing (4 samples)" in result.stderr
    assert geopose("verify", "--shards", shards / "absent").returncode == 2


@pytest.mark.parametrize("deep", [False, True])
def test_every_damaged_member_is_named(shards, deep):
    split = manifest.open_split(shards, "train")
    damaged = []
    for index in (1, 3, 6):
        row = split.index[index]
        path = shards / split.manifest.shards[row["shard"]].name
        damaged.append(key_of(shards, "train", index))
        data = bytearray(path.read_bytes())
        data[int(row["offset"]) + 1500] ^= 4
        path.write_bytes(data)
    said = check(shards, deep)
    assert said.count("crc32 differs") == 3
    for key in damaged:
        assert said.count(key) == 1
    assert key_of(shards, "train", 0) not in said


@pytest.mark.parametrize("deep", [False, True])
def test_a_cut_shard(shards, deep):
    path = shards / "train-000001.tar"
    row = manifest.open_split(shards, "train").index[6]
    key = key_of(shards, "train", 6)
    path.write_bytes(path.read_bytes()[: int(row["offset"]) + 700])
    said = check(shards, deep)
    assert f"train-000001.tar: {row['offset'] + 700} bytes, the manifest says" in said
    assert f"{key}: lies behind the end of the file" in said
    assert said.count("behind the end") == 2


def test_another_shard_of_that_name(shards):
    (shards / "train-000000.tar").write_bytes((shards / "train-000001.tar").read_bytes())
    assert "another shard of that name" in check(shards)


def test_a_shard_that_the_manifest_does_not_know(shards):
    shutil.copy(shards / "train-000000.tar", shards / "train-000009.tar")
    assert "train-000009.tar: is not in the manifest" in check(shards)


def test_an_index_of_another_packing(shards):
    index = np.load(shards / "index.npy")
    index["offset"][3] += 512
    np.save(shards / "index.npy", index)
    assert "do not stand where the index says" in check(shards)
    np.save(shards / "index.npy", index[:-1])
    with pytest.raises(UserError, match="does not belong to the manifest"):
        verify.run(VerifyRecipe(str(shards), workers=1))


def test_a_manifest_that_points_elsewhere(shards):
    facts = json.loads((shards / "manifest.json").read_text())
    facts["shards"][0]["name"] = "../secret.tar"
    (shards / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="points out of the folder; refused"):
        verify.run(VerifyRecipe(str(shards), workers=1))


FACTS = TileFacts("JAX", None, None, None, None, (8, 8)).to_json()
IMAGE = codecs.encode_rgb("png", np.zeros((8, 8, 3), np.uint8))
GOOD = [("JAX_a.json", FACTS), ("JAX_a.rgb.png", IMAGE)]
LIES = TileFacts("JAX", None, None, None, None, (8, 8), tallest_m=5.0, unknown_px=0).to_json()
FLAT = codecs.encode_agl("png", np.zeros((8, 8), np.uint16))


def tar_of(path: Path, members: list) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data, *kind in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if kind:
                info.type, info.linkname, info.size = kind[0], "/etc/passwd", 0
            tar.addfile(info, io.BytesIO(data))


def bomb() -> bytes:
    data = bytearray(IMAGE)
    struct.pack_into(">II", data, 16, 1 << 20, 1 << 20)
    return bytes(data)


HOSTILE = [
    ([*GOOD, ("JAX_a.pkl", pickle.dumps("x"))], r"JAX_a\.pkl is a pickle"),
    ([*GOOD, ("JAX_a.weights.pth", b"x")], r"JAX_a\.weights\.pth is a pickle"),
    ([("/JAX_a.json", FACTS), ("/JAX_a.rgb.png", IMAGE)], "points out of its folder"),
    ([("../JAX_a.json", FACTS), ("../JAX_a.rgb.png", IMAGE)], "points out of its folder"),
    ([*GOOD, ("JAX_a.agl.tif", b"", tarfile.SYMTYPE)], "is a symbolic link"),
    ([*GOOD, ("JAX_a.agl.tif", b"", tarfile.LNKTYPE)], "is a hard link"),
    ([*GOOD, ("JAX_b", b"", tarfile.CHRTYPE)], "tar type"),
    ([("JAX_a.json", FACTS)], r"no JAX_a\.rgb\.\*"),
    ([("JAX_a.rgb.png", IMAGE)], r"no JAX_a\.json"),
    ([*GOOD, ("JAX_a.rgb.qoi", IMAGE)], "for one image"),
    ([*GOOD, ("JAX_a.agl.lerc", b"nothing")], r"agl\.lerc: damaged"),
    (
        [("JAX_a.json", LIES), GOOD[1], ("JAX_a.agl.png", FLAT)],
        "are 5.0 and 0, but the heights say 0.0 and 0",
    ),
    ([("JAX_a.json", LIES), GOOD[1]], "are 5.0 and 0, but the heights say None and None"),
    ([("JAX_a.json", b"{}"), GOOD[1]], "not a tile's facts"),
    ([("JAX_a.json", FACTS.replace(b"8, 8", b"8, 99999")), GOOD[1]], "size"),
    ([(f"JAX_a{'x' * 300}.json", FACTS), (f"JAX_a{'x' * 300}.rgb.png", IMAGE), *GOOD, *GOOD], "stands twice"),
]


@pytest.mark.parametrize(("members", "said"), HOSTILE)
def test_hostile_shards_are_not_indexed(tmp_path, members, said):
    tar_of(tmp_path / "train-000000.tar", members)
    with pytest.raises(FoundProblems, match=said):
        index_again(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("image", "said"), [(bomb(), "refused: its header claims"), (IMAGE[:-9], r"JAX_a\.rgb\.png: damaged")]
)
def test_what_only_a_deep_look_finds(tmp_path, image, said):
    tar_of(tmp_path / "train-000000.tar", [GOOD[0], ("JAX_a.rgb.png", image)])
    index_again(tmp_path)
    verify.run(VerifyRecipe(str(tmp_path), workers=1))
    with pytest.raises(FinishedWithFailures, match=said):
        verify.run(VerifyRecipe(str(tmp_path), deep=True, workers=1))


def test_giant_headers_are_refused(tmp_path):
    tar_of(tmp_path / "train-000000.tar", GOOD)
    data = bytearray((tmp_path / "train-000000.tar").read_bytes())
    data[124:136] = b"77777777777\0"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "train-000000.tar").write_bytes(data)
    with pytest.raises(FoundProblems, match="claims 8589934591 bytes, the file has"):
        index_again(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE])
def test_a_negative_size_is_no_endless_walk(tmp_path, kind):
    header = tarfile.TarInfo("JAX_a.json")
    header.type, header.size = kind, -512
    (tmp_path / "train-000000.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(FoundProblems, match=r"claims -512 bytes, .* cut short or hostile"):
        index_again(tmp_path)


@pytest.mark.parametrize("place", ["header", "middle", "end", "text"])
def test_damage_that_streaming_readers_do_not_notice(tmp_path, place):
    tar_of(tmp_path / "train-000000.tar", [*GOOD, ("JAX_b.json", FACTS), ("JAX_b.rgb.png", IMAGE)])
    path = tmp_path / "train-000000.tar"
    data = bytearray(path.read_bytes())
    if place == "header":
        data[2048] ^= 1  # in the name of the third member: the header's own checksum tells
    elif place == "middle":
        data[2048:2560] = bytes(512)
    elif place == "end":
        del data[2048:]
    else:
        data[:] = b"not a tar" * 1000
    path.write_bytes(data)
    with pytest.raises(FoundProblems, match=r"train-000000\.tar.*(damaged|cut short)"):
        index_again(tmp_path)


def test_shards_made_elsewhere_are_indexed_and_read_the_same_way(packed, tmp_path):
    for path in packed.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = [(m.name, tar.extractfile(m).read()) for m in tar]
        tar_of(tmp_path / path.name.replace("000000", "0"), members)
    pack.run(PackRecipe(out=str(tmp_path), index_only=True, workers=1))
    ours, theirs = manifest.read_manifest(packed), manifest.read_manifest(tmp_path)
    assert (theirs.splits(), theirs.cities, theirs.statistics) == (
        ours.splits(),
        ours.cities,
        ours.statistics,
    )
    for split in ("train", "test"):
        a, b = Reader(manifest.open_split(packed, split)), Reader(manifest.open_split(tmp_path, split))
        views = {view.key: view for view in map(b.view, range(len(b)))}
        for view in map(a.view, range(len(a))):
            np.testing.assert_array_equal(view.rgb, views[view.key].rgb)
    verify.run(VerifyRecipe(str(tmp_path), deep=True, workers=1))
    index_again(tmp_path)  # again is harmless
    with pytest.raises(UserError, match=r"has a manifest of `geopose pack` already"):
        index_again(packed)


def test_one_key_in_two_shards(packed, tmp_path):
    shutil.copy(packed / "train-000000.tar", tmp_path / "train-000000.tar")
    shutil.copy(packed / "train-000000.tar", tmp_path / "train-000001.tar")
    with pytest.raises(FoundProblems, match=r"stands in train-000000\.tar too") as caught:
        index_again(tmp_path)
    assert len(caught.value.problems) == 4


def test_spans_are_what_tarfile_sees(packed):
    path = packed / "train-000000.tar"
    found = list(tars.spans(path))
    with tarfile.open(path) as tar:
        names = [member.name for member in tar]
    assert [span.key for span in found] == list(dict.fromkeys(name.split(".")[0] for name in names))
    assert found[0].offset == 0
    assert all(a.offset + a.length == b.offset for a, b in itertools.pairwise(found))


def test_nothing_to_index(tmp_path):
    with pytest.raises(UserError, match=r"no \*\.tar in it"):
        index_again(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        index_again(tmp_path / "absent")
    tar_of(tmp_path / "train-000000.tar", [])
    with pytest.raises(FoundProblems, match="holds no sample"):
        index_again(tmp_path)
