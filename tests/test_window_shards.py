"""Windows of samples in real shards: the loader's batches, memory, damage, other readers, the commands."""

from __future__ import annotations

import gc
import io
import json
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tiles import make_dataset
from views import ALL_AT_ONCE, assert_same

from geopose_dist import cli
from geopose_dist.augment import Augmenter, AugmentRecipe, Deferrer, Draw, draw
from geopose_dist.data.loader import DataRecipe, open_shards, train_loader
from geopose_dist.data.reader import Reader
from geopose_dist.data.sample import Window
from geopose_dist.data.samples import Request, Samples, generator_for
from geopose_dist.errors import UserError
from geopose_dist.model import device_augment
from shards.pack import run as run_pack
from shards.pack_recipe import CodecRecipe, PackRecipe


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiles of 300 x 340 px in shards of each kind of member: in standard blocks, in our blocks, and not in blocks."""
    root = tmp_path_factory.mktemp("packed")
    make_dataset(root / "tiles", 6, (300, 340))
    folders = {}
    for rgb, agl in (("tiled", "tiled"), ("gpz", "gpz"), ("qoi", "lerc")):
        folders[rgb] = root / rgb
        run_pack(
            PackRecipe(
                source=str(root / "tiles"),
                out=str(folders[rgb]),
                reduce=1,
                workers=1,
                codec=CodecRecipe(rgb, agl),
            )
        )
    return folders


@pytest.mark.parametrize(
    "transform", [Augmenter(ALL_AT_ONCE, 64), Deferrer(ALL_AT_ONCE, 64)], ids=["workers", "device"]
)
def test_the_loader_gives_the_same_batches_whatever_is_decoded(
    packed: dict[str, Path], transform: Augmenter
) -> None:
    """Windows of tiled members, of gpz members, cut from whole ones, and whole tiles into a plain transform."""
    batches = {}
    for name, folder in packed.items():
        samples = Samples(Reader(open_shards(str(folder), "train")), DataRecipe(str(folder)), 7, transform)
        batches[name] = samples.__getitems__([Request(i, i // 3, i % 6) for i in range(8)])
    whole = Samples(samples.reader, samples.recipe, 7, lambda view, rng: transform(view, rng))
    batches["whole"] = whole.__getitems__([Request(i, i // 3, i % 6) for i in range(8)])
    wanted = device_augment.finish(batches.pop("whole"))
    assert wanted.rgb.shape == (8, 3, 64, 64)
    for batch in batches.values():
        found = device_augment.finish(batch)
        assert found.keys == wanted.keys
        for one in ("rgb", "agl_cm", "scale_px_per_m", "direction", "gsd_m"):
            np.testing.assert_array_equal(getattr(found, one).numpy(), getattr(wanted, one).numpy())


def test_the_order_does_not_depend_on_codec_or_crop(packed: dict[str, Path]) -> None:
    orders = []
    for folder, crop_px in ((packed["tiled"], 64), (packed["tiled"], 128), (packed["qoi"], 64)):
        recipe = DataRecipe(str(folder), crop_px=crop_px, global_batch=3, micro_batch=3, workers=0)
        steps = train_loader(
            open_shards(str(folder), "train"),
            recipe,
            0,
            0,
            1,
            0,
            4,
            Augmenter(AugmentRecipe("strong"), crop_px),
        )
        orders.append([key for step in steps for batch in step for key in batch.keys])
    assert orders[0] == orders[1] == orders[2]
    assert len(orders[0]) == 12


def test_a_window_costs_the_memory_of_a_window(packed: dict[str, Path], tmp_path: Path) -> None:
    reader = Reader(open_shards(str(packed["tiled"]), "train"))
    reader.view(0)  # what is imported at first use does not count

    def peak(window: Window | None) -> int:
        sample = reader.tile(0)
        tracemalloc.start()
        view = sample.view(window)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert view.rgb.shape[:2] == ((300, 340) if window is None else window[2:])
        return most

    # Beside the window itself: one tile of 256 x 256, decompressed and undone, of colours and of heights.
    assert peak(Window(10, 10, 64, 64)) < 64 * 64 * 7 + 2.2 * 256 * 256 * 3 < peak(None)


def test_damage_in_a_tile_is_named_whichever_part_is_read(packed: dict[str, Path], tmp_path: Path) -> None:
    """The crc32 is of the whole sample: a flipped byte far from the window stops it, too."""
    name = "train-000000.tar"
    for file in packed["tiled"].iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    reader = Reader(open_shards(str(tmp_path), "train"))
    with pytest.raises(UserError, match="crc32 is"):
        [reader.view(index, Window(0, 0, 8, 8)) for index in range(len(reader))]


def test_a_damaged_sample_is_replaced_alike_and_a_large_crop_is_no_damage(
    packed: dict[str, Path], tmp_path: Path
) -> None:
    """The replacement has its own draw and its own window."""
    for file in packed["tiled"].iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / "train-000000.tar").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "train-000000.tar").write_bytes(data)
    reader, recipe = (
        Reader(open_shards(str(tmp_path), "train")),
        DataRecipe(str(tmp_path), on_damage="substitute"),
    )
    requests = [Request(i, 0, i) for i in range(6)]
    made = []
    for transform in (Augmenter(ALL_AT_ONCE, 64), lambda view, rng: Augmenter(ALL_AT_ONCE, 64)(view, rng)):
        made.append(Samples(reader, recipe, 3, transform).__getitems__(requests))
    assert len(made[0].substitutions) == 1
    assert made[0].substitutions == made[1].substitutions
    np.testing.assert_array_equal(made[0].rgb.numpy(), made[1].rgb.numpy())
    large = Samples(reader, recipe, 3, Augmenter(ALL_AT_ONCE, 320)).__getitems__(requests[:1])
    assert large.users
    assert "the crop is 320 px, larger than the tile of 300 x 340 px" in large.sentence
    assert "drawn to replace" not in large.sentence


def test_any_reader_opens_tiled_members(packed: dict[str, Path]) -> None:
    """webdataset streams them; Pillow and GDAL decode what it hands over."""
    import rasterio
    from PIL import Image

    reader = Reader(open_shards(str(packed["tiled"]), "train"))
    views = {reader.key(index): reader.view(index) for index in range(len(reader))}
    shards = sorted(map(str, packed["tiled"].glob("*.tar")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves closing to the garbage collector
        samples = list(webdataset.WebDataset(shards, shardshuffle=False))
        gc.collect()
    warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)  # pytest brings the filters back
    for sample in samples:
        view = views[sample["__key__"]]
        rgb = np.asarray(Image.open(io.BytesIO(sample["rgb.tif"])))
        np.testing.assert_array_equal(rgb, view.rgb)
        with rasterio.MemoryFile(sample["agl.tif"]) as file, file.open() as dataset:
            agl_cm = dataset.read(1)
        np.testing.assert_array_equal(
            agl_cm, np.where(np.isnan(view.agl_m), 65535, np.rint(view.agl_m * 100))
        )
    assert len(samples) == 6


def test_whole_tiles_are_the_same_and_packing_tells_the_tallest_height(packed: dict[str, Path]) -> None:
    """What validation and prediction read."""
    qoi = Reader(open_shards(str(packed["qoi"]), "train"))
    for folder in packed.values():
        reader = Reader(open_shards(str(folder), "train"))
        for index in range(len(reader)):
            facts, view = reader.facts(index), reader.view(index)
            assert_same(view, qoi.view(index))
            assert facts.tallest_m == float(np.nanmax(view.agl_m))
            assert facts.unknown_px == int(np.isnan(view.agl_m).sum()) > 0


@pytest.mark.slow
def test_augment_shows_samples_of_tiled_members(packed: dict[str, Path], tmp_path: Path, capsys) -> None:
    reader = Reader(open_shards(str(packed["qoi"]), "train"))
    words = ["augment", "--shards", str(packed["tiled"]), "--key", reader.key(2), "--crop-px", "64"]
    assert cli.main([*words, "--out", str(tmp_path / "panel.png")]) == 0
    drawn = draw(AugmentRecipe(), generator_for(0, 0, 2), reader.view(2), 64)
    assert Draw.from_json(json.loads(capsys.readouterr().out)) == drawn
    assert (tmp_path / "panel.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_bench_compares_what_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both cases on small tiles: every way gives the baseline's samples, or the case itself fails."""
    from geopose_dist.bench import cases_window

    for name, value in (("TILE_PX", 192), ("CROPS_PX", (64,)), ("VISITS", 2)):
        monkeypatch.setattr(cases_window, name, value)
    rows = cases_window.window(1)
    assert [row["crop_px"] for row in rows] == ["64"] * 4 + ["whole"] * 4
    assert all(row["needed_share"] < 0.4 for row in rows[:4])
    assert all(row["cost_share"] == pytest.approx(1) for row in rows[4:])
    assert ["speedup" in row for row in rows[:4]] == [False, True, True, True]
    rows = cases_window.members(1)
    assert {row["kind"] for row in rows} == {"rgb", "agl"}
    assert min(row["kb_per_tile"] for row in rows) > 1
