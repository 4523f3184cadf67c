"""`geopose order`: what it prints is what the loader reads, key by key, rank by rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from tars import write_shards

from geopose_dist import cli, config
from geopose_dist.data.loader import train_loader
from geopose_dist.data.manifest import open_split
from geopose_dist.data.order import OrderRecipe, run
from geopose_dist.data.recipe import DataRecipe
from geopose_dist.errors import UserError

TRAINING = """
seed: 4
out: runs/x
length: 3 steps
data: {shards: elsewhere, global_batch: 12, order: "block:2", crop_px: 32, on_damage: stop}
model: {encoder: resnet18}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("order")
    write_shards(folder, [7, 7, 6], (4, 4))
    return folder


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    run(config.parse(OrderRecipe, [str(w) for w in words], prog="geopose order", description=""))
    return capsys.readouterr().out.split()


def test_ranks_print_what_their_loaders_read(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "train.yaml").write_text(TRAINING)
    (tmp_path / "over.yaml").write_text("data: {micro_batch: 3}\n")
    recipe = DataRecipe(str(shards), global_batch=12, micro_batch=3, order="block:2", workers=0)
    files = ("--config", tmp_path / "train.yaml", f"--config={tmp_path / 'over.yaml'}", "--shards", shards)
    for world in (1, 3):
        for rank in range(world):
            steps = train_loader(open_split(shards, "train"), recipe, 4, rank, world, 0, 5)
            read = [key for step in steps for batch in step for key in batch.keys]
            where = ("--start", 0, "--count", 60, "--world-size", world, "--rank", rank)
            assert printed(capsys, *files, *where) == read
    everything = printed(capsys, *files, "--count", 60)
    assert everything[20:40] == printed(capsys, *files, "--epoch", 1)
    assert everything[25:33] == printed(capsys, *files, "--epoch", 1, "--start", 5, "--count", 8)
    assert sorted(everything[:20]) == sorted(everything[20:40])


def test_a_training_recipe_that_leaves_batches_out_has_trainings_defaults(shards: Path, tmp_path: Path):
    path = tmp_path / "train.yaml"
    path.write_text("model: {encoder: resnet18}\n")
    recipe = config.parse(OrderRecipe, ["--config", str(path)], prog="geopose order", description="")
    assert recipe.batches() == (DataRecipe().global_batch, DataRecipe().micro_batch)
    path.write_text("world_size: 4\n")
    recipe = config.parse(OrderRecipe, ["--config", str(path)], prog="geopose order", description="")
    assert recipe.batches() == (4, 1)
    path.write_text("model: {a: [}\n")
    with pytest.raises(UserError, match="not YAML"):
        config.parse(OrderRecipe, ["--config", str(path)], prog="geopose order", description="")


def test_without_a_recipe_ranks_take_turns(shards: Path, geopose):
    def keys(*words: object) -> list[str]:
        done = geopose("order", "--shards", shards, *words)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    everything = keys("--epoch", 0, "--start", 0, "--count", 20)
    assert len(set(everything)) == 20
    assert keys("--start", 2, "--count", 7, "--world-size", 3, "--rank", 1) == everything[4:9:3]
    assert keys("--seed", 1) != everything


def test_mistakes_are_one_sentence_and_exit_2(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for words, said in (
        (("--shards", shards, "--rank", 3, "--world-size", 3), "rank is 3; wanted 0 to 2"),
        (("--shards", tmp_path / "none"), "manifest.json: not found"),
        (("--shards", "pipe:cat /etc/passwd"), "pipe: is refused"),
        ((), "give the folder that `geopose pack` made"),
        (("--shards", shards, "--global-batch", 6, "--micro-batch", 4), "must be a positive multiple"),
        (("--shards", shards, "--order", "blocks"), "wanted full, or block:K"),
    ):
        assert cli.main(["order", *map(str, words)]) == 2
        told = capsys.readouterr()
        assert said in told.err
        assert told.err.count("\n") == 1
        assert told.out == ""


@pytest.mark.parametrize("order", ["full", "block:2"])
def test_a_part_of_the_split_is_visited_whole_again_and_again(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], order: str
):
    (tmp_path / "train.yaml").write_text(
        f'data: {{samples: 9, global_batch: 3, micro_batch: 3, order: "{order}"}}\n'
    )
    words = ("--config", tmp_path / "train.yaml", "--shards", shards, "--count", 18)
    keys = printed(capsys, *words)
    assert sorted(keys[:9]) == sorted(keys[9:])
    recipe = DataRecipe(str(shards), samples=9, global_batch=3, micro_batch=3, order=order, workers=0)
    opened = open_split(shards, "train").first(recipe.samples)
    steps = train_loader(opened, recipe, 0, 0, 1, 0, 6)
    assert [key for step in steps for batch in step for key in batch.keys] == keys
