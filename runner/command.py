"""A table of verbs as a command line: help, usage errors, and words for a person on stdout.

`runner.cli` has the verbs of `runner`, `runner.checkpoint_verbs` those of `runner checkpoints`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from runner.errors import StorageError, UsageError


@dataclass(frozen=True)
class Verb:
    """A word of the command line: what it does, and how."""

    help: str
    examples: str
    arguments: Callable[[argparse.ArgumentParser], None]
    act: Callable[[argparse.Namespace], int]


@dataclass(frozen=True)
class Group:
    """A word that verbs of its own follow."""

    help: str
    examples: str
    verbs: Callable[[], Mapping[str, Verb]]
    """Loads them: they may import more than the command line does."""


class ReaderLeft(Exception):
    """Nobody reads stdout any more, as in `runner schema | head`: no failure."""


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print and exit with 2, which means nothing to an orchestrator."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}\n    remedy: see {self.prog} --help")


def run(program: str, verbs: Mapping[str, Verb | Group], words: list[str]) -> int:
    """Run the verb that the first of `words` names, or print its help.

    Raises:
        UsageError: there is no such verb, or its arguments are wrong.
    """
    word, words = words[0], words[1:]
    if word not in verbs:
        near = difflib.get_close_matches(word[:32], verbs, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"{program}: {word!r} is not a verb\n    remedy: {meant}the verbs are {', '.join(verbs)}"
        )
    verb, program = verbs[word], f"{program} {word}"
    return _run_group(program, verb, words) if isinstance(verb, Group) else _run_verb(program, verb, words)


def _run_group(program: str, group: Group, words: list[str]) -> int:
    verbs = group.verbs()
    if words and words[0] not in ("-h", "--help"):
        return run(program, verbs, words)
    say(
        f"usage: {program} VERB ...\n\n{group.help}\n\nverbs:\n{listed(verbs)}\n\n"
        f"examples:\n{group.examples}\n{program} VERB --help shows more."
    )
    return 0 if words else UsageError.exit_code


def _run_verb(program: str, verb: Verb, words: list[str]) -> int:
    parser = _parser(program, verb)
    if {"-h", "--help"} & set(words):
        say(parser.format_help())
        return 0
    return verb.act(parser.parse_intermixed_args(words))


def parsed(program: str, verb: Verb, words: list[str]) -> argparse.Namespace:
    """The words of a verb as it takes them.

    Raises:
        UsageError: it does not.
    """
    return _parser(program, verb).parse_intermixed_args(words)


def _parser(program: str, verb: Verb) -> _Parser:
    parser = _Parser(
        prog=program,
        description=verb.help,
        epilog=f"examples:\n{verb.examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.arguments(parser)
    return parser


def listed(verbs: Mapping[str, Verb] | Mapping[str, Verb | Group]) -> str:
    """The verbs with what they do, a line each."""
    return "\n".join(f"  {name:<11} {verb.help}" for name, verb in verbs.items())


def program(started: str) -> str:
    """What a person types to start this program again.

    started as                 it is                                     answer
    /x/.venv/bin/runner        the `runner` of the search path           runner
    .venv/bin/runner           another                                   .venv/bin/runner
    /x/runner/__main__.py      a module                                  python -m runner
    anything else              a program of somebody else's              runner

    Args:
        started: `sys.argv[0]`.
    """
    name = Path(started).name
    if name == "__main__.py":
        return "python -m runner"
    if name != "runner":
        return "runner"
    found = shutil.which("runner")
    return "runner" if found is not None and Path(found).samefile(started) else shlex.quote(started)


def say(text: str) -> None:
    """Print to stdout.

    Raises:
        ReaderLeft, StorageError: it cannot be written.
    """
    try:
        print(text.rstrip("\n"), flush=True)
    except BrokenPipeError as error:
        raise ReaderLeft from error
    except OSError as error:
        raise StorageError(
            f"write to standard output: {error.strerror}\n    remedy: free the disk"
        ) from error


def complain(message: str) -> None:
    """Print to stderr."""
    with contextlib.suppress(OSError):  # nobody reads; the exit code still tells
        print(message, file=sys.stderr, flush=True)
