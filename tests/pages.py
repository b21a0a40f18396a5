"""The pages that people read, as tests see them: commands, links and headings of Markdown."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from runner import cli
from runner.command import Group
from runner.schema.job_page import anchor

ROOT = Path(__file__).parents[1]

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

RUNNERS = ("runner", ".venv/bin/runner")

_FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The lines of its blocks of bash, without comments, each once."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(line.split("  #")[0].strip() for line in lines if line.strip()))


def links(text: str) -> list[str]:
    """Where its links lead, outside of code."""
    prose = re.sub(r"`[^`\n]*`", "", _FENCED.sub("", text))
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(text: str) -> set[str]:
    """What its headings are linked by; a second one of a name has a number."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.*)$", _FENCED.sub("", text), re.MULTILINE):
        base = anchor(heading)
        found.append(f"{base}-{found.count(base)}" if base in found else base)
    return set(found)


def dead_link(page: Path, link: str) -> str | None:
    """Why a link of a page leads nowhere; None: it does not, or leaves the repository."""
    if re.match(r"[a-z]+:", link):
        return None
    name, _, fragment = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if not target.exists():
        return f"{page.name}: {link}: no such file"
    if fragment and fragment not in anchors(target.read_text("utf-8")):
        return f"{page.name}: {link}: no such heading"
    return None


def dead_command(line: str, targets: set[str]) -> str | None:
    """Why a line of a shell does nothing: a verb or an option that `runner` does not know, or a target that
    make does not. None: it is well, or of another program.

    Args:
        targets: of the Makefile.
    """
    for part in re.split(r"\|\||&&|[|;]", re.sub(r'"\$\(.*?\)"', "x", line)):
        words = shlex.split(part.partition(" > ")[0])
        while words and re.match(r"\w+=", words[0]):
            del words[0]
        if words[:1] == ["make"]:
            unknown = [word for word in words[1:] if "=" not in word and word not in targets]
            if unknown:
                return f"{line}: make has no {', '.join(unknown)}"
        if words and words[0] in RUNNERS and (wrong := _wrong(words[1:])) is not None:
            return f"{line}: {wrong}"
    return None


def _wrong(words: list[str]) -> str | None:
    if words in (["--help"], ["--version"]):
        return None
    verbs = dict(cli.VERBS)
    while words and isinstance(group := verbs.get(words[0]), Group):
        verbs, words = dict(group.verbs()), words[1:]
    if not words or (verb := verbs.get(words[0])) is None:
        return f"no verb {' '.join(words[:1])}"
    assert not isinstance(verb, Group)
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False, add_help=False)
    verb.arguments(parser)
    try:
        parser.parse_intermixed_args(words[1:])
    except argparse.ArgumentError as error:
        return str(error)
    except SystemExit:
        return "argparse refuses it"
    return None
