"""Reading one sample: exact pixels back, and every kind of damage or malice named before it does harm."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tars import CITIES, sample_spans, tile, write_shards

from geopose_dist.data import codecs, manifest, source
from geopose_dist.data.manifest import open_split
from geopose_dist.data.members import parse_members
from geopose_dist.data.reader import Reader, open_shards
from geopose_dist.errors import UserError

SIZE = (16, 24)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shards(tmp_path, [4, 3, 2], SIZE)
    return tmp_path


def reader_of(folder: Path) -> Reader:
    return Reader(open_split(folder, "train"))


def test_every_sample_comes_back_exactly(shards: Path):
    reader = reader_of(shards)
    for index in range(9):
        rgb, agl_cm, facts = tile(index, SIZE)
        view = reader.view(index)
        assert np.array_equal(view.rgb, rgb)
        assert np.array_equal(np.isnan(view.agl_m), agl_cm == 65535)
        known = agl_cm != 65535
        assert np.array_equal(np.rint(view.agl_m[known] * 100), agl_cm[known])
        assert (view.city, view.place, view.gsd_m) == (facts.city, facts.place, facts.gsd_m)
        assert (view.scale_px_per_m, view.angle_rad) == (facts.scale_px_per_m, facts.angle_rad)
        assert view.key == reader.key(index) == f"{facts.city}_{index:05d}"
        assert reader.facts(index) == facts


@pytest.mark.parametrize("place", [0, 100, 156, 300, 512, 700, -1])
def test_a_flipped_byte_is_found_wherever_it_is(shards: Path, place: int):
    path = shards / "train-000001.tar"
    start, end = sample_spans(path)[1]
    data = bytearray(path.read_bytes())
    data[start + place if place >= 0 else end - 1] ^= 1
    path.write_bytes(data)
    reader = reader_of(shards)
    with pytest.raises(
        UserError, match=rf"train-000001\.tar, offset {start}.*crc32 is .*geopose verify --deep"
    ):
        reader.view(5)
    assert reader.view(4)
    assert reader.view(6)


def test_the_key_of_a_damaged_sample_is_told_where_it_can_be_read(shards: Path):
    path = shards / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[sample_spans(path)[2][1] - 700] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=f", {tile(2, SIZE)[2].city}_00002: crc32"):
        reader_of(shards).view(2)


def test_truncated_missing_and_replaced_shards_are_named(shards: Path):
    path = shards / "train-000002.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5000])
    size = len(whole)
    with pytest.raises(
        UserError, match=rf"train-000002\.tar: {size - 5000} bytes, but the manifest says {size}.*truncated"
    ):
        reader_of(shards).view(7)
    path.write_bytes(whole + bytes(512))
    with pytest.raises(UserError, match=r"train-000002\.tar.*was replaced by another file"):
        reader_of(shards).view(7)
    path.unlink()
    with pytest.raises(UserError, match=r"train-000002\.tar: the shard is missing"):
        reader_of(shards).view(7)
    assert reader_of(shards).view(0)


def test_a_shard_of_the_same_name_and_size_from_another_packing_is_refused(shards: Path):
    """Two samples of equal length change places: every header is whole, every size is right."""
    path = shards / "train-000000.tar"
    whole = bytearray(path.read_bytes())
    start = sample_spans(path)[0][0]
    header = tarfile.TarInfo.frombuf(bytes(whole[start : start + 512]), "utf-8", "strict")
    header.name = header.name.replace("00000", "09999")
    whole[start : start + 512] = header.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"_09999: crc32 is .*belong to another packing"):
        reader_of(shards).view(0)


def test_a_shard_cut_while_it_is_open_is_named(shards: Path):
    reader = reader_of(shards)
    reader.view(8)
    os.truncate(shards / "train-000002.tar", 100)
    with pytest.raises(UserError, match="cut while in use"):
        reader.view(8)


def rewrite(folder: Path, data: bytes, shard: str = "train-000000.tar") -> Reader:
    """A folder of one shard with one sample, these tar bytes, whose index agrees with them."""
    folder.mkdir(exist_ok=True)
    if "/" not in shard:
        (folder / shard).write_bytes(data)
    row = np.array([(0, 0, 0, len(data), zlib.crc32(data))], manifest.INDEX_DTYPE)
    shards = [manifest.Shard(shard, "train", 1, len(data), "")]
    manifest.write(folder, manifest.Manifest(shards, CITIES, {}, {}), row)
    return reader_of(folder)


def tar(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    parts = []
    for info, data in members:
        form = tarfile.GNU_FORMAT if info.size < 0 else form  # ustar has no negative numbers
        parts += [info.tobuf(form), data, bytes(-len(data) % 512)]
    return b"".join(parts)


def member(name: str, data: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


HOSTILE = {
    "a symbolic link": [member("K.rgb.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
    "a hard link": [member("K.rgb.png", b"", type=tarfile.LNKTYPE, linkname="other")],
    "a folder": [member("K.rgb.png", b"", type=tarfile.DIRTYPE)],
    "of tar type b'6'": [member("K.rgb.png", b"", type=tarfile.FIFOTYPE)],
    "of tar type b'L'": [member("K.rgb.png", b"long name", type=tarfile.GNUTYPE_LONGNAME)],
    "points out of its folder": [member("../K.rgb.png")],
    "'/K.rgb.png' points out": [member("/K.rgb.png")],
    "points out of": [member("a\\..\\K.rgb.png")],
    "is not KEY.EXTENSION": [member("K")],
    "holds members of K and L": [member("K.json"), member("L.rgb.png")],
    "stands twice": [member("K.json"), member("K.json")],
    "claims 99999 bytes, more than its sample": [member("K.json", b"x", size=99999)],
    "extended header of 70000 bytes": [member("pax", bytes(70000), type=tarfile.XHDTYPE)],
    "claims -512 bytes; such shards are refused": [member("pax", b"", type=tarfile.XHDTYPE, size=-512)],
    "claims -1024 bytes": [member("K.json", b"x", size=-1024)],
    "that sets b''": [member("pax", b"9" * 5000 + b" path=x\n", type=tarfile.XHDTYPE)],
    "(RecursionError": [member("K.json", b"[" * 200_000)],
    "(OverflowError": [member("K.json", b'{"city": "A", "size": [1e999, 2]}')],
    "that sets b'size'": [member("pax", b"13 size=9999\n", type=tarfile.XHDTYPE), member("K.json")],
    "no .json member among pkl": [member("K.pkl", pickle.dumps(print))],
    "several members for one image": [
        member("K.json", tile(0, SIZE)[2].to_json()),
        member("K.rgb.png"),
        member("K.rgb.jpg"),
    ],
}


@pytest.mark.parametrize("problem", HOSTILE)
def test_hostile_tars_are_refused_by_name(tmp_path: Path, problem: str):
    reader = rewrite(tmp_path, tar(*HOSTILE[problem]))
    with pytest.raises(UserError) as caught:
        reader.view(0)
    assert problem in str(caught.value)
    assert "train-000000.tar" in str(caught.value)


def test_a_zeroed_header_is_no_end_of_archive(tmp_path: Path):
    data = tar(member("K.json"), member("K.rgb.png"))
    with pytest.raises(UserError, match=r"\+ 1024: no tar header"):
        rewrite(tmp_path, data[:1024] + bytes(512) + data[1536:]).view(0)


def test_pickled_members_are_never_unpickled(tmp_path: Path):
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "boom"),)

    rgb, _, facts = tile(0, SIZE)
    data = tar(
        member("K.json", facts.to_json()),
        member("K.pkl", pickle.dumps(Bomb())),
        member("K.rgb.png", codecs.encode_rgb("png", rgb)),
    )
    view = rewrite(tmp_path, data).view(0)
    assert view.agl_m is None  # a tile without heights is fine
    assert not (tmp_path / "boom").exists()


def test_sizes_that_disagree_are_named(tmp_path: Path):
    rgb, agl_cm, facts = tile(0, SIZE)
    png, tif = codecs.encode_rgb("png", rgb), codecs.encode_agl("tif", agl_cm)
    small = codecs.encode_agl("tif", agl_cm[:-1].copy())
    base = [member("K.json", facts.to_json())]
    with pytest.raises(UserError, match=r"K\.agl\.tif.*(15 x 24|\(15, 24\))"):
        rewrite(tmp_path, tar(*base, member("K.rgb.png", png), member("K.agl.tif", small))).view(0)
    cut = codecs.encode_rgb("png", rgb[:8].copy())
    with pytest.raises(UserError, match=r"K\.rgb\.png.*8 x 24"):
        rewrite(tmp_path, tar(*base, member("K.rgb.png", cut), member("K.agl.tif", tif))).view(0)


def test_what_webdataset_writes_by_default_is_read(tmp_path: Path):
    """With its default clock it puts an extended header before every member; long names are in one, too."""
    rgb, _, facts = tile(0, SIZE)
    stream = io.BytesIO()
    key = "K" * 120
    with webdataset.TarWriter(stream, encoder=False) as writer:
        writer.write({"__key__": key, "json": facts.to_json(), "rgb.png": codecs.encode_rgb("png", rgb)})
    data = stream.getvalue()
    while data.endswith(bytes(512)):
        data = data[:-512]
    reader = rewrite(tmp_path, data + bytes(-len(data) % 512))
    assert reader.key(0) == reader.view(0).key == key
    assert np.array_equal(reader.view(0).rgb, rgb)


def test_a_manifest_cannot_point_out_of_its_folder(tmp_path: Path):
    secret = tmp_path / "secret.tar"
    secret.write_bytes(tar(member("K.json")))
    reader = rewrite(tmp_path / "shards", secret.read_bytes(), shard="../secret.tar")
    with pytest.raises(UserError, match="no plain file name"):
        reader.view(0)


REFUSED = {
    "pipe:cat /etc/passwd": "pipe: is refused",
    "file:///srv/shards": "name the folder itself",
    "ftp://host/x": "ftp: is refused; wanted s3://",
    "s3://user:hunter2@bucket/x": r"s3://\*\*\*@bucket/x: a user or password",
    "https://user:hunter2@host/x": r"https://\*\*\*@host/x: a user or password",
    "https://host/x?X-Amz-Signature=hunter2": "a query or fragment in a URL of shards is refused",
    "http://host/a/../b": "'..', '.' and empty parts",
    "s3://bucket/a//b": "'..', '.' and empty parts",
    "s3:///x": "names no bucket",
    "https:///x": "names no host",
    "http://host:port/x": "not a URL",
    "http://host/a b": "blanks, backslashes and control",
    "http://host/a\nHost: other": "blanks, backslashes and control",
}


@pytest.mark.parametrize("place", REFUSED)
def test_urls_that_could_do_harm_are_refused_by_name(place: str):
    with pytest.raises(UserError, match=REFUSED[place]) as caught:
        open_shards(place, "train")
    assert "hunter2" not in str(caught.value)


def test_a_colon_in_a_folder_is_no_url(tmp_path: Path):
    write_shards(tmp_path / "run:1", [2])
    assert len(open_shards(str(tmp_path / "run:1"), "train")) == 2


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source, "MAX_OPEN_SHARDS", 3)
    write_shards(tmp_path, [1] * 12)
    reader = reader_of(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(4) as threads:
        keys = list(threads.map(reader.key, list(range(12)) * 20))
    assert keys == [reader.key(i) for i in range(12)] * 20
    assert len(os.listdir("/proc/self/fd")) - before <= 3
    del reader


def _key_in_child(reader: Reader, index: int, queue: multiprocessing.Queue) -> None:
    queue.put(reader.view(index).key)


@pytest.mark.parametrize("method", ["fork"])
def test_a_reader_works_in_another_process(shards: Path, method: str):
    reader = reader_of(shards)
    expected = reader.key(3)  # the file is open before the process starts
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_key_in_child, args=(reader, 3, queue))
    process.start()
    assert queue.get(timeout=60) == expected
    process.join()
    queue.close()
    assert reader.key(4)


def test_sending_a_reader_to_a_worker_does_not_send_the_index(shards: Path):
    write_shards(shards / "big", [1] * 40, (4, 4))
    assert len(pickle.dumps(reader_of(shards / "big"))) < len(pickle.dumps(reader_of(shards))) + 40 * 60
    assert pickle.loads(pickle.dumps(reader_of(shards))).key(0) == reader_of(shards).key(0)


def test_parsing_any_cut_of_a_sample_gives_an_error_or_fewer_members(shards: Path):
    """Cut anywhere, a sample never parses into members that were not whole."""
    data = reader_of(shards).raw(0)
    whole = parse_members(data, "here")[1]
    for cut in range(0, len(data), 97):
        try:
            found = parse_members(data[:cut], "here")[1]
        except UserError:
            continue
        assert all(bytes(found[name]) == bytes(whole[name]) for name in found)
