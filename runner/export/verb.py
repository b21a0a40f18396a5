"""`runner export`: the command line. What it does is in `runner.export`'s other modules."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from runner.command import Verb, complain, say
from runner.errors import UsageError
from runner.job_words import runs_argument

if TYPE_CHECKING:
    from runner.export.build import Exported

DTYPES = ("bfloat16", "float16", "float32")
COMPARED = 100
"""Questions that a merged model is compared on."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    from runner.checkpoint_verbs import store_arguments

    parser.add_argument(
        "words",
        nargs="*",
        metavar="JOB|RUN|URI",
        help="a job file with its key=value, a run's folder runs/<name>, or s3://bucket/prefix/name",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--adapter", action="store_true", help="the adapter, for PEFT (default)")
    what.add_argument(
        "--merged", action="store_true", help="the adapter in the unquantized base, for transformers alone"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="with --merged: of its weights (default: the job's)")
    parser.add_argument(
        "--compare",
        type=_count,
        metavar="N",
        help="with --merged: questions that it must answer as base + adapter do, 0 for none "
        f"(default: {COMPARED})",
    )
    parser.add_argument("--step", type=_count, metavar="N", help="the checkpoint of this step")
    parser.add_argument("--license", metavar="ID", help="for the card, as apache-2.0 (default: none is said)")
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload it, as user/name; private")
    parser.add_argument("--public", action="store_true", help="with --push-to-hub: for everybody to see")
    runs_argument(parser)
    store_arguments(parser)


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below zero")
    return number


def _export(arguments: argparse.Namespace) -> int:
    _refuse_idle(arguments)
    from runner.checkpoint_verbs import closing

    return closing(_act)(arguments)


def _refuse_idle(arguments: argparse.Namespace) -> None:
    """
    Raises:
        UsageError: an option that nothing asks for.
    """
    for option, needs, idle in (
        ("--dtype", "--merged", arguments.dtype is not None and not arguments.merged),
        ("--compare", "--merged", arguments.compare is not None and not arguments.merged),
        ("--public", "--push-to-hub", arguments.public and arguments.push_to_hub is None),
    ):
        if idle:
            raise UsageError(f"export: {option} means nothing without {needs}\n    remedy: add {needs}")


def _act(arguments: argparse.Namespace) -> int:
    from runner.durable import disk
    from runner.export import hub
    from runner.export.build import Wanted, build, refuse_occupied
    from runner.export.source import find
    from runner.supervisor.notices import Notices
    from runner.supervisor.screen import Screen

    to = arguments.to.expanduser().absolute()
    refuse_occupied(to)
    if arguments.push_to_hub is not None:
        hub.check(arguments.push_to_hub)
    wanted = Wanted(
        to=to,
        merged=arguments.merged,
        dtype=arguments.dtype,
        compare=COMPARED if arguments.compare is None else arguments.compare,
        license=arguments.license,
        repo=arguments.push_to_hub,
    )
    with contextlib.ExitStack() as stack:
        with disk("make room for the export", to.parent):
            to.parent.mkdir(parents=True, exist_ok=True)
            work = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent))
            )
        trained = find(arguments, work)
        with Notices() as notices, contextlib.closing(Screen()) as screen:
            done = build(trained, wanted, work, notices, screen.show, screen.line)
    _tell(done, to, wanted.compare)
    if arguments.push_to_hub is not None:
        say(f"uploaded: {hub.push(to, arguments.push_to_hub, arguments.public)}")
    return 0


def _tell(done: Exported, to: Path, compare: int) -> None:
    """What it is, what it is worth, and how it is loaded here."""
    from runner.export.code import Base, load_lines
    from runner.supervisor.progress import change_lines

    card, made = done.card, done.card.made
    what = {"adapter": "adapter", "merged": f"merged model, {card.dtype},", "model": "model"}[card.kind]
    say(f"{what} of {card.trained.job.name}, step {card.trained.step}: {to}")
    if card.kind == "merged" and compare == 0:
        complain("warning: NOTHING WAS COMPARED: nobody knows whether it answers as base + adapter do")
    if made.compared is not None:
        n, run = made.compared.questions, made.metrics.get("run")
        quantized = card.trained.job.quantization is not None
        over = "quantized base + adapter, as the run measured it" if quantized else "as the run measured it"
        if run is None:
            say(f"over these {n} questions ({over}: unknown, the run has no predictions for them) -> merged:")
        else:
            say(f"over these {n} questions, {over} -> merged:")
        for line in change_lines(run, made.metrics.get("merged")):
            say(f"  {line}")
        if made.like_run is not None:
            say(f"  {made.like_run} of {n} answers are the run's own, word for word")
    base = Base(done.base) if card.kind == "adapter" else None
    lines = load_lines(card.kind, str(to), card.dtype, base, made.quantization)
    packages = "transformers and PEFT" if card.kind == "adapter" else "transformers"
    say(
        f"loaded with plain {packages} in a fresh process, where it answers as here. To load it:\n\n"
        + "\n".join(f"    {line}" for line in lines)
        + "\n"
    )


EXPORT = Verb(
    "Take what a run trained as a folder for PEFT, merged for transformers, or to the hub.",
    "  runner export jobs/demo-sft.yaml --to my-adapter\n"
    "  runner export runs/demo-sft --merged --dtype bfloat16 --to my-model\n"
    "  runner export s3://bucket/prefix/my-charts --step 120 --to my-adapter\n"
    "  runner export runs/my-charts --to my-adapter --push-to-hub me/my-charts --license apache-2.0\n",
    _arguments,
    _export,
)
