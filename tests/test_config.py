"""Recipes: YAML and options in, dataclasses out, and back; mistakes in one sentence with close names."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from geopose_dist import config
from geopose_dist.errors import UserError


@dataclass(frozen=True)
class Part:
    """A nested part."""

    learning_rate: float = 0.1
    """Size of a step."""
    names: tuple[str, ...] = ("a", "b")
    """Some names."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; wanted a number above 0")


@dataclass(frozen=True)
class Whole:
    """A recipe."""

    part: Part = field(default_factory=Part)
    """The nested part."""
    out_folder: Path | None = None
    """Where to write."""
    files: list[Path] = field(default_factory=list)
    """What to read."""
    count: int = 3
    """How many."""


def parse(*argv: str) -> Whole:
    return config.parse(Whole, argv, prog="geopose try", description="a try")


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as refused:
        parse(*argv)
    sentence = str(refused.value)
    assert "\n" not in sentence
    return sentence


def test_defaults_options_and_dashes() -> None:
    assert parse() == Whole()
    given = parse("--part.learning-rate", "2", "--out-folder=x", "--count", "4")
    assert given == Whole(Part(2.0), Path("x"), [], 4)
    assert parse("--part.learning_rate", "2") == Whole(Part(2.0))


def test_a_list_takes_several_words() -> None:
    wanted = [Path("a b"), Path("c")]
    assert parse("--files", "a b", "c", "--count", "1").files == wanted
    assert parse('--files=["a b", "c"]').files == wanted
    assert parse("--files", "one").files == [Path("one")]


def test_later_recipes_win_and_options_win_over_them(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("part: {learning_rate: 5}\ncount: 7\n")
    second.write_text("count: 8\n")
    given = parse("--config", str(first), "--config", str(second))
    assert (given.part.learning_rate, given.count) == (5.0, 8)
    assert parse("--config", str(first), f"--config={second}", "--count", "9").count == 9
    assert parse("--count", "9", "--config", str(first)).count == 7  # written later, so it wins


def test_a_dumped_recipe_is_read_back(tmp_path: Path) -> None:
    recipe = Whole(Part(1e-5, ("x",)), Path("out"), [Path("a"), Path("b")], 1)
    written = tmp_path / "recipe.yaml"
    written.write_text(config.dump(recipe))
    assert parse("--config", str(written)) == recipe
    assert config.load_dict(Whole, config.to_dict(recipe), where="a checkpoint") == recipe


def test_small_floats_keep_their_value(tmp_path: Path) -> None:
    """YAML 1.1 reads `1e-4` as a string; a recipe must not."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("part: {learning_rate: 1e-4}\n")
    assert parse("--config", str(recipe)).part.learning_rate == 1e-4
    assert parse("--part.learning_rate", "1e-4").part.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--part.learning_rat", "1"], "part.learning_rate"),
        (["--learning-rate", "1"], "part.learning_rate"),
        (["--count", "some"], "count"),
        (["--count"], "count"),
        (["--part.learning-rate", "-1"], "wanted a number above 0"),
        (["--config", "no/such.yaml"], "no such file or shipped recipe"),
        (["stray"], "stray"),
    ],
)
def test_mistakes_are_one_sentence_with_what_was_meant(argv: list[str], said: str) -> None:
    assert said in refusal(*argv)


@pytest.mark.parametrize("text", ["part: {learnin_rate: 1}\n", "count: [1\n", "- 1\n", "part: 3\n"])
def test_broken_recipes_are_refused(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_text(text)
    assert refusal("--config", str(recipe))


def test_values_of_a_checkpoint_are_checked_by_name() -> None:
    values: dict[str, Any] = config.to_dict(Whole())
    values["part"]["learning_rate"] = -1
    with pytest.raises(UserError, match="wanted a number above 0"):
        config.load_dict(Whole, values, where="a checkpoint")
    values["part"] = {"unknown": 1}
    with pytest.raises(UserError, match=r"^a checkpoint"):
        config.load_dict(Whole, values, where="a checkpoint")


def test_shipped_recipes_are_found_by_name() -> None:
    shipped = sorted(config.recipes_folder().rglob("*.yaml"))
    assert shipped
    for path in shipped:
        name = str(path.relative_to(config.recipes_folder()).with_suffix(""))
        assert config.find_recipe(name) == path
        assert config.find_recipe(f"configs/{name}.yaml").samefile(path)
    with pytest.raises(UserError, match="did you mean one of: smoke"):
        config.find_recipe("smok")


def test_help_shows_dashes_and_the_text_under_each_field() -> None:
    shown = config.parser_for(Whole, "geopose try", "a try").format_help()
    assert "--part.learning-rate" in shown
    assert "Size of a step." in shown
    assert not re.search(r"--\w+_", shown)


def test_print_config_shows_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--count", "5", "--print-config")
    assert "count: 5" in capsys.readouterr().out
