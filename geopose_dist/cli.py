"""`geopose <verb>`: a table of verb -> (recipe class, function), imported when the verb is called.

`geopose --help` reads only this table, so it answers before torch could be imported.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from geopose_dist import __version__, config
from geopose_dist.errors import (
    EXIT_AGAIN,
    EXIT_DONE,
    EXIT_FAILURES,
    EXIT_USER,
    FinishedWithFailures,
    Preempted,
    UserError,
)


@dataclass(frozen=True)
class Verb:
    """One command: what it does in a line, its recipe class and its function, both as `module:name`."""

    summary: str
    recipe: str
    function: str
    positional: str | None = None
    """Field that takes the words before the first option."""


VERBS: dict[str, Verb] = {
    "doctor": Verb(
        "what this machine has: extension, GPUs, Ray, codecs, cores, shared memory",
        "geopose_dist.doctor:DoctorRecipe",
        "geopose_dist.doctor:run",
    ),
    "synth": Verb(
        "render a synthetic dataset in the challenge's layout", "shards.synth:SynthRecipe", "shards.synth:run"
    ),
    "explore": Verb(
        "look at a dataset: counts, label ranges, heights, example panels; one HTML page",
        "geopose_dist.report.explore:ExploreRecipe",
        "geopose_dist.report.explore:run",
    ),
    "split": Verb("make a leak-free train/validation split", "shards.split:SplitRecipe", "shards.split:run"),
    "pack": Verb(
        "pack tiles into WebDataset shards; parallel, resumable", "shards.pack:PackRecipe", "shards.pack:run"
    ),
    "verify": Verb(
        "check shards: hashes, counts, decodes; names every damaged member",
        "shards.verify:VerifyRecipe",
        "shards.verify:run",
    ),
    "stage": Verb(
        "keep the shards of a run on a disk of this machine, before it starts",
        "geopose_dist.data.stage_command:StageRecipe",
        "geopose_dist.data.stage_command:run",
    ),
    "order": Verb(
        "print the keys in the order in which a run reads them",
        "geopose_dist.data.order:OrderRecipe",
        "geopose_dist.data.order:run",
    ),
    "augment": Verb(
        "see a sample before and after augmentation, with its flow",
        "geopose_dist.report.augment_panel:AugmentPanelRecipe",
        "geopose_dist.report.augment_panel:run",
    ),
    "train": Verb(
        "train, alone or under torchrun; run the same command again to go on",
        "geopose_dist.train.recipe:TrainRecipe",
        "geopose_dist.train.loop:run",
    ),
    "replay": Verb(
        "run a batch that gave a loss that is not finite once more, and say where it went wrong",
        "geopose_dist.train.recipe:ReplayRecipe",
        "geopose_dist.train.replay:run",
        positional="batch",
    ),
    "predict": Verb(
        "predict poses of many tiles on Ray; challenge files out",
        "geopose_dist.infer.recipe:PredictRecipe",
        "geopose_dist.infer.driver:run",
    ),
    "calibrate": Verb(
        "fit a correction of heights on the validation split, and tell honestly what it brings",
        "geopose_dist.infer.calibrate:CalibrateRecipe",
        "geopose_dist.infer.calibrate:run",
    ),
    "evaluate": Verb(
        "the official score, per city and final",
        "geopose_dist.evaluate.evaluate:EvaluateRecipe",
        "geopose_dist.evaluate.evaluate:run",
    ),
    "rectify": Verb(
        "move images and heights to their ground position, occlusion masked",
        "geopose_dist.evaluate.rectify:RectifyRecipe",
        "geopose_dist.evaluate.rectify:run",
    ),
    "submit": Verb(
        "check predictions against the format folder and pack them",
        "geopose_dist.evaluate.submit:SubmitRecipe",
        "geopose_dist.evaluate.submit:run",
    ),
    "convert": Verb(
        "float metres and px/m to uint16 centimetres and px/cm",
        "geopose_dist.evaluate.convert:ConvertRecipe",
        "geopose_dist.evaluate.convert:run",
    ),
    "report": Verb(
        "curves, scores, best and worst tiles of a run; one HTML page",
        "geopose_dist.report.run_page:ReportRecipe",
        "geopose_dist.report.run_page:run",
    ),
    "view": Verb(
        "one tile in three dimensions, its lean removed, truth beside prediction; one HTML page",
        "geopose_dist.report.view:ViewRecipe",
        "geopose_dist.report.view:run",
    ),
    "bench": Verb(
        "measure kernels, loader and step, each beside its baseline",
        "geopose_dist.bench.recipe:BenchRecipe",
        "geopose_dist.bench.harness:run",
        positional="cases",
    ),
}


def usage() -> str:
    """The text of `geopose --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            f"geopose {__version__}: geocentric pose from oblique satellite images, trained and predicted at scale",
            "",
            "usage: geopose VERB [--config RECIPE]... [--dotted.option VALUE]...",
            "",
            *lines,
            "",
            "geopose VERB --help teaches a verb; exit codes: 0 done, 1 finished with named failures,",
            "2 a mistake to mend, 75 preempted: run the same command again.",
        ]
    )


def _load(path: str) -> object:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def _positional_first(verb: Verb, argv: list[str]) -> list[str]:
    """Turn `bench kernels loader --json F` into `bench --cases [kernels,loader] --json F`."""
    if verb.positional is None:
        return argv
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    return [f"--{verb.positional}=[{','.join(argv[:count])}]", *argv[count:]] if count else argv


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the return value is the process's exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_DONE if words else EXIT_USER
    if words[0] == "--version":
        print(__version__)
        return EXIT_DONE
    name, rest = words[0], words[1:]
    try:
        if name not in VERBS:
            raise UserError(f"geopose has no verb {name!r}; it has: {', '.join(VERBS)}")
        verb = VERBS[name]
        recipe: object = config.parse(
            _load(verb.recipe),  # type: ignore[arg-type]
            _positional_first(verb, rest),
            prog=f"geopose {name}",
            description=verb.summary,
        )
        _load(verb.function)(recipe)  # type: ignore[operator]
    except UserError as error:
        if not error.said:
            print(f"geopose {name}: {error}", file=sys.stderr)
        return EXIT_USER
    except FinishedWithFailures as failures:
        print(f"geopose {name}: {failures}", file=sys.stderr)
        return EXIT_FAILURES
    except Preempted as stop:
        print(f"geopose {name}: {stop}", file=sys.stderr)
        return EXIT_AGAIN
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `geopose order | head` is no error
        return EXIT_DONE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"geopose {name}: the disk is full while writing {error.filename or 'a file'}; free some space and "
            "run the same command again",
            file=sys.stderr,
        )
        return EXIT_USER
    except KeyboardInterrupt:
        return 130
    return EXIT_DONE
