"""Run docs/tutorial/README.md: its blocks one after another in a folder, what they print against what the page says.

    python tools/run_tutorial.py --folder SCRATCH            run and compare, numbers within a quarter
    python tools/run_tutorial.py --folder SCRATCH --write    run and write outputs and pictures into the page
    ... --set STEPS=2 --set SIZE=128                         other sizes: then only words are compared

Blocks of `sh` and `python` are run; a block of `text` right after one is what it printed on stdout. Lines of
`sh` that only set variables hold for all later blocks. A folder that was begun is gone on with, as its commands do.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tutorial" / "README.md"
BLOCK = re.compile(r"```(?P<kind>sh|python)\n(?P<code>.*?)```\n(?:\n```text\n(?P<said>.*?)```\n)?", re.DOTALL)
SETTING = re.compile(r"\b([A-Z]+)=(\S+)")
NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
RELATIVE, ABSOLUTE = 0.25, 0.25
"""A number agrees within this share of it, or this much: training differs a little between processors."""
PICTURE = re.compile(r"!\[[^]]*\]\((?P<name>[\w.-]+)\)")


@dataclass(frozen=True)
class Block:
    """One block that is run; `said` is what the page says that it prints, None where it says nothing."""

    kind: str
    code: str
    said: str | None


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    return [Block(found["kind"], found["code"], found["said"]) for found in BLOCK.finditer(page)]


def settings_of(page: str, changed: dict[str, str]) -> dict[str, str]:
    """The page's variables, with some changed; a name that the page does not set is an error."""
    found: dict[str, str] = {}
    for block in blocks(page):
        for line in block.code.splitlines():
            if block.kind == "sh" and not SETTING.sub("", line).strip():
                found.update(SETTING.findall(line))
    unknown = changed.keys() - found.keys()
    if unknown:
        sys.exit(f"run_tutorial: the page sets no {', '.join(sorted(unknown))}; it sets {', '.join(found)}")
    return found | changed


def run_block(block: Block, folder: Path, settings: dict[str, str]) -> str:
    """What a block prints on stdout; ends the process if it fails."""
    if block.kind == "python":
        command = [sys.executable, "-c", block.code]
    else:
        lines = [line for line in block.code.splitlines() if SETTING.sub("", line).strip()]
        python = f"'{sys.executable}'"
        tools = f'geopose() {{ {python} -m geopose_dist "$@"; }}\npython() {{ {python} "$@"; }}\n'
        command = ["bash", "-euo", "pipefail", "-c", tools + "\n".join(lines)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        print(done.stdout, end="")
        sys.exit(f"run_tutorial: this block ended with {done.returncode}:\n{block.code}")
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


def differences(said: str, printed: str, numbers: bool) -> list[str]:
    """Lines of the page that the output does not agree with; `numbers`: these count, too."""
    theirs, ours = said.splitlines(), printed.splitlines()
    found = []
    if len(theirs) != len(ours):
        found.append(f"{len(theirs)} lines on the page, {len(ours)} printed")
    for one, other in zip(theirs, ours, strict=False):
        words = [NUMBER.sub("#", line).split() for line in (one, other)]
        values = [[float(value.replace(",", "")) for value in NUMBER.findall(line)] for line in (one, other)]
        if words[0] != words[1] or (
            numbers
            and any(
                abs(a - b) > max(ABSOLUTE, RELATIVE * max(abs(a), abs(b)))
                for a, b in zip(*values, strict=True)
            )
        ):
            found.append(f"page:    {one}\n  printed: {other}")
    return found


def written(page: str, outputs: list[str]) -> str:
    """The page with the outputs in its blocks of text."""
    remaining = iter(outputs)

    def fill(found: re.Match[str]) -> str:
        output = next(remaining)
        head = f"```{found['kind']}\n{found['code']}```\n"
        return head if found["said"] is None else f"{head}\n```text\n{output}```\n"

    return BLOCK.sub(fill, page)


def main() -> None:
    """Run the page; exit 1 if it says something else than what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="where to run: new, or begun by this command"
    )
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument(
        "--write", action="store_true", help="write what came out into the page, and its pictures"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a variable")
    asked = parser.parse_args()
    page = asked.page.read_text()
    settings = settings_of(page, dict(word.split("=", 1) for word in asked.set))
    asked.folder.mkdir(parents=True, exist_ok=True)
    outputs, wrong = [], []
    for number, block in enumerate(blocks(page), 1):
        print(f"run_tutorial: block {number}: {block.code.splitlines()[0]} ...", file=sys.stderr, flush=True)
        outputs.append(run_block(block, asked.folder, settings))
        if block.said is not None and not asked.write:
            wrong += differences(block.said, outputs[-1], numbers=not asked.set)
    pictures = [found["name"] for found in PICTURE.finditer(page)]
    for name in pictures:
        if not (asked.folder / name).is_file():
            sys.exit(f"run_tutorial: the page shows {name}, which no block has made")
    if asked.write:
        asked.page.write_text(written(page, outputs))
        for name in pictures:
            shutil.copyfile(asked.folder / name, asked.page.parent / name)
    if wrong:
        sys.exit("run_tutorial: the page says something else:\n  " + "\n  ".join(wrong))
    print(f"run_tutorial: {len(outputs)} blocks ran, {len(pictures)} pictures made")


if __name__ == "__main__":
    main()
