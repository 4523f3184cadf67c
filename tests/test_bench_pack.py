"""The bench of codecs and packing: what it compares is the same, and what is not is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from packs import run_pack
from tiles import make_dataset

from geopose_dist.bench import cases_codecs, cases_pack
from geopose_dist.data import codecs
from geopose_dist.errors import FinishedWithFailures
from shards import layouts


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, tmp_path) -> Path:
    """Drawn tiles of 64 px in the place of rendered ones of 2048."""
    make_dataset(tmp_path / "tiles", 3)
    monkeypatch.setattr(cases_codecs, "rendered_source", lambda: tmp_path / "tiles")
    monkeypatch.setattr(cases_pack, "rendered_source", lambda: tmp_path / "tiles")
    return tmp_path / "tiles"


def test_every_codec_is_measured_beside_lzw():
    rows = cases_codecs.codecs_case(2)
    for kind, table in (("rgb", codecs.RGB_CODECS), ("agl", codecs.AGL_CODECS)):
        mine = {row["codec"]: row for row in rows if row["kind"] == kind}
        assert list(mine) == [*codecs.names(table), "tif-lzw"]
        for codec in table.values():
            row = mine[codec.name]
            assert (row["round_trip"] == "exact") == codec.lossless
            assert row["speedup"] > 0
            assert f"{kind} {codec.name} decodes" in row["verdict"]
        assert "speedup" not in mine["tif-lzw"]
        assert mine["tif-lzw"]["round_trip"] == "exact"
        assert all(row["tile_px"] == "32x32" and row["tiles"] == 3 for row in mine.values())


def test_a_codec_that_loses_pixels_may_not_call_itself_lossless(monkeypatch):
    jpg = codecs.RGB_CODECS["jpg"]
    monkeypatch.setitem(codecs.RGB_CODECS, "jpg", dataclasses.replace(jpg, lossless=True))
    with pytest.raises(FinishedWithFailures, match="rgb jpg claims to be lossless"):
        cases_codecs.codecs_case(1)


def test_stored_tiles_are_those_of_the_shards(tmp_path):
    make_dataset(tmp_path / "data", 5)
    run_pack(tmp_path / "data", tmp_path / "shards", reduce=1)
    rows = cases_codecs.codecs_case(1, tmp_path / "shards")
    assert {(row["tile_px"], row["tiles"]) for row in rows} == {("64x64", cases_codecs.TILES)}


def test_packing_stands_beside_the_benchmarks_files():
    area, wavelet, baseline = cases_pack.pack(1)
    assert area["baseline"] == wavelet["baseline"] == baseline["how"] == cases_pack.BASELINE
    assert area["speedup"] > 0
    assert area["baseline_tiles_per_s"] == baseline["tiles_per_s"]
    assert area["mb_per_tile"] > 0


def test_another_reduction_is_not_compared(tmp_path):
    """The check of the bench sees a baseline that packs other pixels."""
    tiles = cases_pack.render()
    cases_pack.packed(tmp_path / "tiles", tmp_path / "shards", "area")
    cases_pack.loose(tiles, tmp_path / "loose")
    cases_pack.check_same(tmp_path / "shards", tmp_path / "loose")
    (tmp_path / "flipped").mkdir()
    rgb = layouts.load_rgb(tiles[0])
    path = tmp_path / "flipped" / tiles[0].rgb.name
    path.write_bytes(imagecodecs.jpeg2k_encode(np.ascontiguousarray(rgb[::-1]), reversible=True))
    flipped = [dataclasses.replace(tiles[0], rgb=path), *tiles[1:]]
    cases_pack.loose(flipped, tmp_path / "other")
    with pytest.raises(FinishedWithFailures, match=tiles[0].key):
        cases_pack.check_same(tmp_path / "shards", tmp_path / "other")


def test_resolutions_and_what_the_wavelet_does():
    rows = cases_codecs.resolutions(1)
    assert rows[0]["storage"] == "half from the full member (htj2k)"
    assert rows[0]["off_area_levels"] > 0
    assert all(row["kb_full_and_half"] > rows[0]["kb_full_and_half"] for row in rows[1:])
    found = {(row["source"], row["low_band"]): row for row in cases_pack.wavelet_pixels()}
    assert len(found) == 4
    for source in ("9/7, lossy", "5/3, lossless"):
        moved, raw = found[source, "as packed"], found[source, "unmoved"]
        assert abs(moved["down_px"]) < abs(raw["down_px"])
        assert moved["mean_difference_levels"] < raw["mean_difference_levels"]
