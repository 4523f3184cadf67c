"""Recipes: YAML files and dotted options in, frozen dataclasses out, and back.

A recipe is a tree of frozen dataclasses, each beside the code that it steers, each field documented by
the text under it and checked in `__post_init__`. jsonargparse reads them; this module adds the names of
shipped recipes (`--config smoke`), dashes for underscores, and one-sentence errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from geopose_dist.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Recipe = TypeVar("Recipe")

_PACKAGE = Path(__file__).resolve().parent
_OPTION = re.compile(r"(?<![\w-])--[A-Za-z][\w.]*")


def recipes_folder() -> Path:
    """Where the shipped recipes are: inside an installed package, beside it in a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def find_recipe(name: str) -> Path:
    """The recipe file that `name` means: a path, or a shipped recipe such as `smoke` or `train/base`."""
    folder = recipes_folder()
    for candidate in (Path(name), folder / name, folder / f"{name}.yaml", folder.parent / name):
        if candidate.is_file():
            return candidate
    shipped = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
    stem = name.removeprefix("configs/").removesuffix(".yaml")
    near = difflib.get_close_matches(stem, shipped, n=3, cutoff=0.5) or shipped
    raise UserError(
        f"--config {name}: no such file or shipped recipe; did you mean one of: {', '.join(near)}?"
    )


def read_file(path: Path) -> tuple[str, Any]:
    """Text and values of a recipe file, for `adapt_config` (UserError: not YAML)."""
    text = path.read_text()
    try:
        return text, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not YAML ({' '.join(str(error).split())}); mend it") from error


def parser_for(recipe: type[Any], prog: str, description: str) -> ArgumentParser:
    """The argument parser of a recipe class, `--help` included."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class Parser(jsonargparse.ArgumentParser):
        def format_help(self, formatter: Any = None) -> str:
            # Options are shown with dashes, as they are usually typed; underscores are accepted too.
            return _OPTION.sub(lambda match: match.group().replace("_", "-"), super().format_help(formatter))

    parser = Parser(
        prog=prog,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        epilog="--config may be given several times, later files win, and options win over files; in YAML the "
        "same names are written with underscores and nested at the dots. --print-config shows the result.",
    )
    parser.add_argument("--config", action="config", help="recipe: a YAML file or the name of a shipped one")
    parser.add_class_arguments(recipe, nested_key=None, as_group=False)
    return parser


def parse(recipe: type[Recipe], argv: Sequence[str], *, prog: str, description: str) -> Recipe:
    """The recipe that the command line `argv` describes; mistakes are UserErrors of one sentence."""
    import jsonargparse

    parser = parser_for(recipe, prog, description)
    try:
        parts = _instantiated(parser, parser.parse_args(_normalised(argv, recipe)), recipe)
    except jsonargparse.ArgumentError as error:
        raise UserError(_one_sentence(error, prog, parser)) from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    return _build(recipe, parts, prog)


def _instantiated(parser: ArgumentParser, parsed: Any, recipe: type[Any]) -> Any:
    """Parsed values with each nested recipe as an object (UserError for one value in a group's place)."""
    for field in dataclasses.fields(recipe):
        value, group = parsed.get(field.name), _is_group(field)
        if group and isinstance(value, str | int | float | list):
            raise UserError(f"{field.name} is {value!r}; wanted its fields, one by one, below the name")
    if hasattr(parser, "instantiate"):
        return parser.instantiate(parsed)
    return parser.instantiate_classes(parsed)  # jsonargparse before 4.50


def _is_group(field: dataclasses.Field[Any]) -> bool:
    return dataclasses.is_dataclass(field.default_factory)


def _build(recipe: type[Recipe], parts: Any, where: str) -> Recipe:
    try:
        return recipe(**{field.name: parts[field.name] for field in dataclasses.fields(recipe)})  # type: ignore[arg-type]
    except UserError:
        raise
    except ValueError as error:  # what __post_init__ found wrong with a value is the user's to mend
        raise UserError(str(error)) from error


def _list_fields(recipe: type[Any]) -> set[str]:
    """Options of a recipe that take several words."""
    return {f.name for f in dataclasses.fields(recipe) if str(f.type).startswith(("list[", "tuple["))}


def _flags(recipe: type[Any]) -> set[str]:
    """Options of a recipe that may stand alone and then mean true, such as `--deep`."""
    return {f.name for f in dataclasses.fields(recipe) if str(f.type) == "bool"}


def _normalised(argv: Sequence[str], recipe: type[Any]) -> list[str]:
    """Options with underscores, recipe names as paths, `--list a b` as one JSON list, other names as the field's.

    A recipe class may have `ALIASES: ClassVar[Mapping[str, str]]`, another name of an option -> its field
    (`--from` cannot be a field's name, because `from` is a word of Python).

    `adapt_config(path: Path) -> str` of a recipe class turns a recipe file, perhaps of another verb, into
    YAML of this class.
    """
    lists, flags = _list_fields(recipe), _flags(recipe)
    aliases: Mapping[str, str] = getattr(recipe, "ALIASES", {})
    adapt: Callable[[Path], str] = getattr(recipe, "adapt_config", str)
    result: list[str] = []
    expects_recipe = False
    words = list(argv)
    while words:
        word = words.pop(0)
        if expects_recipe:
            result.append(adapt(_checked(find_recipe(word))))
            expects_recipe = False
        elif word[:2] == "--" and word[2:].replace("-", "_") in lists:
            items = []
            while words and not words[0].startswith("--"):
                items.append(words.pop(0))
            one_list = len(items) == 1 and items[0].startswith("[")
            result.append(f"--{word[2:].replace('-', '_')}={items[0] if one_list else json.dumps(items)}")
        elif word.startswith("--"):
            option, equals, value = word.partition("=")
            option = "--" + option[2:].replace("-", "_")
            option = "--" + aliases.get(option[2:], option[2:])
            if option == "--config" and equals:
                value = adapt(_checked(find_recipe(value)))
            if option[2:] in flags and not equals and (not words or words[0].startswith("--")):
                equals, value = "=", "true"
            expects_recipe = option == "--config" and not equals
            result.append(option + equals + value)
        else:
            result.append(word)
    return result


def _checked(path: Path) -> Path:
    """The path of a file that is YAML with names in it (UserError that names the file; the parser's would not)."""
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not YAML ({' '.join(str(error).split())}); mend it") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: holds {type(values).__name__}; wanted names with values")
    return path


def _one_sentence(error: Exception, prog: str, parser: ArgumentParser) -> str:
    """The parser's complaint, with close names where an option or key is unknown."""
    text = " ".join(str(error).split())
    known = [action.dest for action in parser._actions if action.dest]
    unknown = re.search(
        r"(?:unrecognized arguments: --|accept (?:option|nested key|key) '|Option ')([\w.]+)", text
    )
    hint = ""
    if unknown:
        leaf = unknown.group(1)
        near = difflib.get_close_matches(leaf, known, n=3, cutoff=0.6)
        near += [
            name for name in known if name.rsplit(".", 1)[-1] == leaf.rsplit(".", 1)[-1] and name not in near
        ]
        hint = f" Did you mean {', '.join(near)}?" if near else ""
    return f"{text}{hint} See `{prog} --help`."


def to_dict(recipe: Any) -> dict[str, Any]:
    """A recipe as plain dicts, lists, strings and numbers."""
    plain: dict[str, Any] = yaml.safe_load(dump(recipe))
    return plain


def dump(recipe: Any) -> str:
    """A recipe as YAML that `parse` reads back to an equal recipe."""
    return yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def load_dict(recipe: type[Recipe], values: dict[str, Any], *, where: str) -> Recipe:
    """The recipe that plain `values` (from a checkpoint or manifest, named by `where`) describe."""
    import jsonargparse

    parser = parser_for(recipe, where, "")
    try:
        parts = _instantiated(parser, parser.parse_object(values), recipe)
    except jsonargparse.ArgumentError as error:
        raise UserError(f"{where}: {_one_sentence(error, 'geopose', parser)}") from error
    except UserError:
        raise
    except ValueError as error:  # what __post_init__ of a part found wrong
        raise UserError(f"{where}: {error}") from error
    return _build(recipe, parts, where)
