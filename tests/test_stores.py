"""Stores: a real S3 server and a web server that misbehaves; what passes by itself, what stops, and what it says."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import range_server
import s3_server
from range_server import Behaviour

from geopose_dist.data import catalogue, stores
from geopose_dist.data.store_recipe import StoreRecipe
from geopose_dist.data.stores import Missing, NoRanges, Store, StoreFailure, StoreRefusal, open_store
from geopose_dist.errors import UserError

QUICK = {"retries": 2, "timeout_s": 0.25, "backoff_s": 0.01}
BODY = bytes(range(256)) * 1000


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server with the bucket `tiles`; its credentials are in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (s3_server.CREDENTIALS | s3_server.GOOGLE_CREDENTIALS).items():
            patch.setenv(name, value)
        with s3_server.serve("tiles") as address:
            yield address


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Behaviour]]:
    """A web server with bucket/a.tar; s3, gs and az clients can read it, too: a GET of BUCKET/KEY is all they do."""
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "a.tar").write_bytes(BODY)
    with range_server.serve(tmp_path) as (address, acts):
        yield address, acts


def reached(kind: str, address: str, **fields: object) -> Store:
    """`bucket` of a web server by its own protocol or another's."""
    if kind == "http":
        return open_store(f"{address}/bucket", StoreRecipe(**QUICK | fields))
    recipe = StoreRecipe(endpoint=address, anonymous=True, **QUICK | fields)
    return open_store(f"{kind}://bucket", recipe)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_objects_are_written_listed_read_and_deleted(s3: str, scheme: str, tmp_path: Path):
    prefix = f"{scheme}://tiles/{scheme}/prefix"
    store = open_store(prefix, StoreRecipe(endpoint=s3))
    large = tmp_path / "large"
    large.write_bytes(os.urandom(2 * stores.PIECE + 12345))  # three parts
    store.put_file("step-8/large.tar", large)
    store.put_file("small.tar", _file(tmp_path / "s", b"abc"))
    store.put_bytes("manifest.json", b"{}")
    assert store.list() == [("manifest.json", 2), ("small.tar", 3)]
    assert store.list(".tar") == [("small.tar", 3)]
    assert open_store(f"{prefix}/step-8", StoreRecipe(endpoint=s3)).list() == [
        ("large.tar", large.stat().st_size)
    ]
    assert b"".join(store.stream("step-8/large.tar")) == large.read_bytes()
    assert store.read("step-8/large.tar", 1000, 77) == large.read_bytes()[1000:1077]
    assert store.size("small.tar") == 3
    store.put_bytes("small.tar", b"defg")
    assert stores.read_small(store, "small.tar", 10) == b"defg"
    with pytest.raises(UserError, match=rf"{prefix}/small\.tar: more than 3 bytes"):
        stores.read_small(store, "small.tar", 3)
    for _ in range(2):
        store.delete("small.tar")
    assert store.size("small.tar") is None
    with pytest.raises(Missing, match=rf"{prefix}/small\.tar: not found"):
        store.read("small.tar", 0, 1)


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../../x", "", ".", "a//b", "a\nb", "a?versionId=1", "a\\b"]
)
def test_names_that_lead_out_of_a_prefix_are_refused(web: tuple[str, Behaviour], name: str):
    for kind in ("http", "s3"):
        store = reached(kind, web[0])
        tries: list[Callable[[], object]] = [lambda s=store: s.read(name, 0, 1)]
        if kind == "s3":
            tries += [lambda s=store: s.put_bytes(name, b""), lambda s=store: s.delete(name)]
        for one in tries:
            with pytest.raises(UserError, match="points out of its place or is not plain"):
                one()
    assert web[1].asked == []


@pytest.mark.parametrize("kind", ["http", "s3", "gs", "az"])
def test_ranges_and_whole_bodies_are_read(
    web: tuple[str, Behaviour], kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "someone")
    store = reached(kind, web[0])
    assert store.read("a.tar", 100, 5000) == BODY[100:5100]
    assert store.read("a.tar", len(BODY) - 1, 1) == BODY[-1:]
    with pytest.raises(UserError, match="shorter than the index says"):
        store.read("a.tar", len(BODY) + 10, 5)
    with pytest.raises(Missing, match=r"bucket/none\.tar: not found; wanted"):
        store.read("none.tar", 0, 5)
    if kind == "http":
        assert b"".join(store.stream("a.tar")) == BODY
        assert store.size("a.tar") == len(BODY)
        assert store.size("none.tar") is None


@pytest.mark.parametrize("kind", ["http", "s3"])
@pytest.mark.parametrize(
    "fault", ["503", "429", "500", "cut", "hang", pytest.param("slow", marks=pytest.mark.slow)]
)
def test_what_passes_is_tried_again_and_what_stays_stops_in_time(
    web: tuple[str, Behaviour], kind: str, fault: str
):
    address, acts = web
    acts.script = [fault]
    assert reached(kind, address).read("a.tar", 512, 4096) == BODY[512:4608]
    assert acts.count(".tar") == 2
    acts.asked.clear()
    acts.always = fault
    began = time.monotonic()
    with pytest.raises(StoreFailure) as caught:
        reached(kind, address, retries=1).read("a.tar", 512, 4096)
    assert time.monotonic() - began < 2  # two tries of a quarter of a second
    assert acts.count(".tar") == 2
    said = str(caught.value)
    where = f"{address}/bucket/a.tar" if kind == "http" else "s3://bucket/a.tar"
    assert said.startswith(f"{where}, offset 512: the store failed 2 times, at last with: ")
    words = {"cut": "cut short", "hang": "within 0.25 s", "slow": "within 0.25 s"}
    assert words.get(fault, fault) in said
    assert "run the same command again" in said


def test_pauses_double_and_the_servers_wish_is_heeded(
    web: tuple[str, Behaviour], monkeypatch: pytest.MonkeyPatch
):
    from geopose_dist.data import http_store

    slept: list[float] = []
    monkeypatch.setattr(http_store.time, "sleep", slept.append)
    web[1].script = ["503"] * 6 + ["429 2"]
    reached("http", web[0], retries=7, backoff_s=1).read("a.tar", 0, 1)
    assert len(slept) == 7
    for pause, longest in zip(slept, (1, 2, 4, 8, 10, 10), strict=False):
        assert longest / 2 <= pause <= longest


def test_a_connection_is_used_again(web: tuple[str, Behaviour]):
    store = reached("http", web[0])
    for offset in range(0, 5000, 1000):
        store.read("a.tar", offset, 1000)
    assert web[1].connections == 1


def test_answers_that_are_not_what_was_asked_for(web: tuple[str, Behaviour]):
    address, acts = web
    acts.script = ["more"]
    assert reached("http", address).read("a.tar", 0, 100) == BODY[:100]
    acts.always = "zipped"
    with pytest.raises(UserError, match="compressed, which was not asked for; refused"):
        reached("http", address).read("a.tar", 0, 100)
    acts.always = "ok"
    acts.ranges = False
    for kind in ("http", "s3"):
        with pytest.raises(NoRanges, match="whole"):
            reached(kind, address).read("a.tar", 0, 100)
    acts.script = ["cut", "ok"]  # a whole body that breaks in the middle is taken up again, each byte once
    assert b"".join(reached("http", address).stream("a.tar")) == BODY


def test_redirects_stay_on_their_host(web: tuple[str, Behaviour], tmp_path: Path):
    address, acts = web
    store = reached("http", address)
    acts.script = ["redirect /bucket/a.tar"]
    assert store.read("a.tar", 3, 4) == BODY[3:7]
    with range_server.serve(tmp_path) as (other, theirs):
        for target in (
            f"{other}/bucket/a.tar",
            "http://169.254.169.254/latest",
            "file:///etc/passwd",
            "ftp://x/y",
        ):
            acts.script = [f"redirect {target}"]
            with pytest.raises(UserError, match=r"redirected to .*: other hosts are refused"):
                store.read("a.tar", 3, 4)
        assert theirs.asked == []
    acts.always = "redirect /bucket/a.tar"
    with pytest.raises(UserError, match="redirected more than 3 times"):
        store.read("a.tar", 3, 4)


def test_the_environments_proxy_is_used_and_its_password_is_not_told(
    web: tuple[str, Behaviour], monkeypatch: pytest.MonkeyPatch
):
    address, acts = web
    monkeypatch.setenv("http_proxy", address.replace("//", "//me:hunter2@"))
    monkeypatch.setenv("no_proxy", "")
    store = open_store("http://tiles.invalid/bucket", StoreRecipe(**QUICK))
    assert store.read("a.tar", 3, 4) == BODY[3:7]
    acts.always = "503"
    with pytest.raises(StoreFailure) as caught:
        store.read("a.tar", 3, 4)
    assert "hunter2" not in str(caught.value)


def test_refusals_tell_how_to_give_credentials_and_none_is_ever_told(
    web: tuple[str, Behaviour], monkeypatch: pytest.MonkeyPatch
):
    address, acts = web
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAHUNTER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    store = open_store("s3://bucket", StoreRecipe(endpoint=address, **QUICK))
    acts.always = "403"
    with pytest.raises(
        StoreRefusal, match=r"403.*set the credentials .*AWS_ACCESS_KEY_ID.*store\.anon"
    ) as caught:
        store.read("a.tar", 0, 1)
    said = [str(caught.value)]
    acts.always = "503"
    with pytest.raises(StoreFailure) as failed:
        store.read("a.tar", 0, 1)
    said.append(str(failed.value))
    assert not any("hunter" in text.lower() for text in said)
    assert acts.count() == 4  # a refusal is not tried again
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StoreRefusal, match="AccessKeyId; set the credentials"):
        open_store("s3://bucket", StoreRecipe(endpoint=address, **QUICK))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("kind", "said"), [("http", b"read"), ("s3", b"start it by forkserver or spawn")])
def test_a_fork_reads_or_says_that_it_cannot(web: tuple[str, Behaviour], kind: str, said: bytes):
    reached(kind, web[0]).read("a.tar", 0, 9)
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            reached(kind, web[0]).read("a.tar", 0, 9)
            os.write(tell, b"read")
        except StoreFailure as failure:
            os.write(tell, str(failure).encode())
        finally:
            os._exit(0)
    os.close(tell)
    with open(told, "rb") as pipe:
        assert said in pipe.read()
    os.waitpid(child, 0)


def test_nothing_is_written_to_a_web_server(web: tuple[str, Behaviour], tmp_path: Path):
    store = reached("http", web[0])
    for one in (
        lambda: store.put_bytes("x", b""),
        lambda: store.put_file("x", tmp_path),
        lambda: store.delete("x"),
    ):
        with pytest.raises(UserError, match="for reading; write to s3://"):
            one()
    with pytest.raises(UserError, match=r"cannot be listed; name its shards, such as .*train-\{000000"):
        store.list()


BAD_RECIPES: dict[str, dict[str, object]] = {
    "timeout_s is 0": {"timeout_s": 0},
    "retries is -1": {"retries": -1},
    "backoff_s is 99": {"backoff_s": 99},
    "in_flight is 0": {"in_flight": 0},
    "cache_gb is -1": {"cache_gb": -1},
    "wanted http": {"endpoint": "minio:9000"},
    "holds a user, password or query": {"endpoint": "http://me:hunter2@minio:9000"},
}


@pytest.mark.parametrize("problem", BAD_RECIPES)
def test_settings_that_cannot_be_are_refused(problem: str):
    with pytest.raises(ValueError, match=problem) as caught:
        StoreRecipe(**BAD_RECIPES[problem])
    assert "hunter2" not in str(caught.value)


def folder_with(web: tuple[str, Behaviour], tmp_path: Path) -> tuple[str, Path, StoreRecipe]:
    from tars import write_shards

    write_shards(tmp_path / "x", [3, 2])
    return f"{web[0]}/x", tmp_path / "x", StoreRecipe(cache_dir=str(tmp_path / "cache"), **QUICK)


def test_hostile_manifests_and_indices_are_refused(
    web: tuple[str, Behaviour], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url, folder, recipe = folder_with(web, tmp_path)
    whole = (folder / "manifest.json").read_bytes()
    index = (folder / "index.npy").read_bytes()

    def refused(manifest: bytes, problem: str) -> None:
        (folder / "manifest.json").write_bytes(manifest)
        with pytest.raises(UserError, match=problem):
            catalogue.open_shards(url, "train", recipe)

    monkeypatch.setattr(catalogue, "MAX_MANIFEST_BYTES", 100_000)
    refused(b" " * 100_001, r"manifest\.json: more than 100000 bytes.*refused")
    refused(b"[" * 90_000, "not a manifest of shards")
    refused(pickle.dumps(print), "not a manifest of shards")
    refused(
        whole.replace(b'"recipe": {}', b'"recipe": {"shards_url": "http://h/x"}'),
        "only a manifest in a local folder",
    )
    refused(whole.replace(b'"samples": 3', b'"samples": 1e300'), "not a manifest of shards")
    refused(
        whole.replace(b'"samples": 3', b'"samples": 400000000'), r"index\.npy: \d+ bytes or more, wanted 88"
    )
    (folder / "index.npy").write_bytes(index + bytes(10_000_000))
    refused(whole, r"index\.npy: \d+ bytes or more, wanted 110")
    assert not list((tmp_path / "cache").glob("*/index.npy"))
    (folder / "index.npy").write_bytes(b"\x80\x04" + index[2:])
    refused(whole, r"index\.npy: cannot be read")


def test_a_missing_manifest_tells_what_to_do(web: tuple[str, Behaviour]):
    with pytest.raises(UserError, match=r"x/manifest\.json: not found; wanted .*--index-only --source URL"):
        catalogue.open_shards(f"{web[0]}/x", "train")


def test_settings_are_read_from_the_environment_but_never_credentials_into_recipes(
    web: tuple[str, Behaviour], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", web[0])
    for name, value in s3_server.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    store = open_store("s3://bucket", StoreRecipe(**QUICK))
    assert store.read("a.tar", 0, 9) == BODY[:9]
    assert not any("key" in field or "secret" in field for field in StoreRecipe.__dataclass_fields__)


@pytest.mark.slow
def test_the_bench_reads_its_own_store_or_yours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from geopose_dist.bench import cases_store

    monkeypatch.setattr(cases_store, "SAMPLES", 12)
    monkeypatch.setattr(cases_store, "SAMPLE_BYTES", 4096)
    rows = {row["name"]: row for row in cases_store.store(1)}
    assert rows["8 under way"]["speedup"] > 2  # 12 pauses of 30 ms one after another, or two times one
    assert rows["from the cache"]["speedup"] > 2
    assert rows[cases_store.ALONE]["tiles_per_s"] < 1 / 0.03
    cases_store.write_noise(tmp_path / "mine")
    assert cases_store.store(1, str(tmp_path / "mine"))[0]["tiles_per_s"] > 0
