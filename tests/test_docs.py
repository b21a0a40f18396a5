"""README.md and docs/: every link leads somewhere, every command exists, and what is told of tables is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runner import cli, events, exits
from runner.command import Group
from runner.manifest import Job
from tests.pages import PAGES, ROOT, anchors, commands, dead_command, dead_link, links

TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))

DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_is_dead(page: Path) -> None:
    assert [why for link in links(page.read_text("utf-8")) if (why := dead_link(page, link))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_is_dead(page: Path) -> None:
    text = page.read_text("utf-8")
    assert [why for line in commands(text) if (why := dead_command(line, TARGETS))] == []
    for verb, inner in re.findall(r"`runner ([a-z]+)(?: ([a-z]+))?", text):
        known = cli.VERBS.get(verb)
        assert known is not None, f"runner {verb}"
        if isinstance(known, Group) and inner:
            assert inner in known.verbs(), f"runner {verb} {inner}"


def test_what_is_dead_is_found() -> None:
    page = DOCS / "README.md"
    assert (
        dead_link(page, "nowhere.md") and dead_link(page, "status.md#nowhere") and dead_link(page, "#nowhere")
    )
    assert dead_link(page, "status.md#where-a-run-stands") is None
    assert links("[a](b.md) `[c](d.md)`\n```\n[e](f.md)\n```\n[g](h.md#i)") == ["b.md", "h.md#i"]
    assert anchors("# A `b.c` d\n## A\n## A\n```bash\n# no\n```") == {"a-bc-d", "a", "a-1"}
    assert commands("```bash\nrunner x \\\n  y   # why\n\n```\n```\nno\n```") == ["runner x    y"]
    for line in (
        *("runner trian a.yaml", "runner train a.yaml --fast", "A=1 .venv/bin/runner list --jsn"),
        *(
            "runner checkpoints lss x",
            "runner checkpoints pull x",
            "runner",
            "make nothing",
            "true && make nothing",
        ),
    ):
        assert dead_command(line, TARGETS), line
    for line in (
        "runner train a.yaml b.c=1 --quiet",
        "make test",
        'JOB_YAML="$(cat a | b)" runner validate',
        "ls -l",
    ):
        assert dead_command(line, TARGETS) is None, line


def test_the_index_has_every_page() -> None:
    named = {link for link in links((DOCS / "README.md").read_text("utf-8")) if not link.startswith("..")}
    assert named == {page.name for page in DOCS.glob("*.md")} - {"README.md"}


def test_the_page_of_exit_codes_is_the_table() -> None:
    text = (DOCS / "exit-codes.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+|any other) \| (.*?) \| (.*?) \|", text, re.MULTILINE)
    table = [(f"{code}", end.meaning, end.retried) for code, end in exits.EXITS.items()]
    assert rows == [*table, ("any other", exits.OTHERWISE.meaning, exits.OTHERWISE.retried)]


def test_the_page_of_the_store_has_every_promise() -> None:
    text = (DOCS / "checkpoints.md").read_text("utf-8")
    assert re.findall(r"^\| (P\d) \|", text, re.MULTILINE) == ["P1", "P2", "P3", "P4", "P5", "P6"]


def test_the_page_of_the_job_has_every_section() -> None:
    text = (DOCS / "job.md").read_text("utf-8")
    assert {f"`{name}`" for name in Job.model_fields} <= set(re.findall(r"`\w+`", text))
    assert "(#datasetstrain)" in text and "datasetstrain" in anchors(text)
    assert '| `max_loss` | duration: 90s, 2m, 1h | `"2m"` |' in text


def test_events_that_are_told_are_said() -> None:
    table = (DOCS / "operations.md").read_text("utf-8").split("| event | fields |")[1].split("\n\n")[0]
    told = {
        word
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for word in re.findall(r"`(\w+)`", row)
    }
    assert told <= set(re.findall(r"\w+", events.__doc__ or ""))
