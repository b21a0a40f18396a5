"""The three sources of a job, each as one tree whose values remember where they were written.

A `Layer` says what a source contains; what wins is `runner.settings`' business. The file is a tree with line
and column; command line and environment are assignments to paths. A name that is almost a source is reported,
because a variable that is silently ignored costs a day of GPU time. Nothing of the environment but JOB_FILE,
JOB_YAML and JOB__* is ever read or printed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runner.errors import Problem, UsageError
from runner.job import check
from runner.job.file import read_job_file
from runner.job.secrets import mask
from runner.job.shape import kind_of
from runner.job.yaml_source import Document, Path, parse, parse_value, show_path

PREFIX = "JOB__"
DELIMITER = "__"

WHOLE = -1
"""Key of an opened list that replaces weaker lists, where a few indices only change some of their items."""


@dataclass(frozen=True)
class Assignment:
    """One value from a command line or an environment variable."""

    path: Path
    value: Any
    label: str
    """`command line lora.r`, `environment JOB__LORA__R`."""
    document: Document


@dataclass(frozen=True)
class Layer:
    """One source: a tree, and the places of its values. An int key addresses an item of a weaker list."""

    kind: str
    """`command line`, `environment`, or the name of the file."""
    tree: dict[Any, Any]
    assignments: tuple[Assignment, ...] = ()
    document: Document | None = None

    def says(self, path: Path) -> bool | None:
        """True: it has a value at `path`. False: what it has there replaces weaker sources. None: nothing."""
        node: Any = self.tree
        replaces = False
        for part in path:
            if isinstance(node, list):
                node = dict(enumerate(node)) | {WHOLE: len(node)}
            if not isinstance(node, dict):
                return False
            replaces = replaces or WHOLE in node
            if part not in node:
                return False if replaces else None
            node = node[part]
        return True


def command_line(overrides: list[str]) -> Layer:
    assignments = []
    for override in overrides:
        key, equals, text = override.partition("=")
        path = _key_path(key)
        if not equals or not path:
            raise UsageError(
                f"read the override {mask(override)!r}: not key=value\n"
                "    remedy: write it as training.learning_rate=1e-5 or datasets.train.0.split=val"
            )
        assignments.append(_assignment(path, text, f"command line {mask(key)}"))
    return Layer("command line", _planted(assignments), tuple(assignments))


def _key_path(key: str) -> Path:
    """`datasets.train.0.split` or `datasets.train[0].split` as a path; () when it is neither."""
    if not re.fullmatch(r"\w[\w-]*(\.\w[\w-]*|\[\d+\])*", key):
        return ()
    return tuple(int(part) if part.isdecimal() else part for part in re.findall(r"[\w-]+", key))


def environment(environ: Mapping[str, str]) -> Layer:
    assignments = []
    for name in sorted(environ):
        parts = name.removeprefix(PREFIX).lower().split(DELIMITER)
        if name.startswith(PREFIX) and all(parts):
            path: Path = tuple(int(part) if part.isdecimal() else part for part in parts)
            assignments.append(_assignment(path, environ[name], f"environment {mask(name)}"))
    return Layer("environment", _planted(assignments), tuple(assignments))


def _assignment(path: Path, text: str, label: str) -> Assignment:
    document = parse_value(text)
    return Assignment(path, document.value, label, document)


def _planted(assignments: list[Assignment]) -> dict[Any, Any]:
    """The tree that the assignments make, in order; a later one wins."""
    tree: dict[Any, Any] = {}
    for assignment in assignments:
        node = tree
        for part in assignment.path[:-1]:
            child = node.get(part)
            if isinstance(child, list):
                child = opened_list(child)
            else:
                child = dict(child) if isinstance(child, dict) else {}
            node[part] = child
            node = child
        node[assignment.path[-1]] = assignment.value
    return tree


def opened_list(items: list[Any]) -> dict[int, Any]:
    """A list as {index: item}, so that mappings merge into it."""
    return {WHOLE: len(items), **dict(enumerate(items))}


def file(job_file: str | None, environ: Mapping[str, str]) -> Layer:
    name = job_file or environ.get("JOB_FILE")
    if name:
        document = parse(read_job_file(name))
    elif text := environ.get("JOB_YAML"):
        name, document = "JOB_YAML", parse(text)
    else:
        return Layer("no file", {})
    return Layer(name, document.value if isinstance(document.value, dict) else {}, document=document)


def nothing(layer: Layer) -> Problem:
    remedy = "start from jobs/demo-sft.yaml; a job needs name, model and datasets"
    if layer.document is None:
        return Problem("", "no job was given", "name a file, or set JOB_FILE or JOB_YAML")
    if layer.document.value in (None, {}):
        return Problem("", "the job is empty", remedy, layer.kind)
    what = kind_of(layer.document.value)
    return Problem("", f"the job is {what}, not a mapping of keys to values", remedy, f"{layer.kind}:1:1")


def faults(layer: Layer) -> Iterator[Problem]:
    """What the YAML itself has wrong."""
    if layer.document is not None:
        for fault in layer.document.faults:
            where = f"{layer.kind}:{fault.mark.line}:{fault.mark.column}"
            yield Problem(mask(show_path(fault.path)), mask(fault.reason), fault.remedy, where)
        if (
            layer.document.value is not None
            and layer.tree == {}
            and not isinstance(layer.document.value, dict)
        ):
            yield nothing(layer)
    for assignment in layer.assignments:
        shown = show_path(assignment.path)
        for fault in assignment.document.faults:
            yield Problem(shown, mask(fault.reason), fault.remedy, assignment.label)
        if assignment.value is None and not assignment.document.faults and assignment.document.empty:
            yield Problem(shown, "no value", "write null for null, or leave the key out", assignment.label)


def near_misses(environ: Mapping[str, str]) -> Iterator[Problem]:
    """Variables that are almost ours, and cannot mean something else, as JOB_NAME and JOB_ID do."""
    for name in sorted(environ):
        upper = name.upper()
        right = None
        if name in ("JOB_FILE", "JOB_YAML"):
            continue
        if upper in ("JOB__FILE", "JOB__YAML"):
            right = upper.replace("__", "_")
        elif upper.startswith(PREFIX):
            if not name.startswith(PREFIX):
                right = upper
            elif not all(name.removeprefix(PREFIX).split(DELIMITER)):
                right = f"{PREFIX}SECTION{DELIMITER}KEY, as JOB__LORA__R"
        elif upper.startswith("JOB_") and (path := check.known_path(upper.removeprefix("JOB_").lower())):
            right = PREFIX + DELIMITER.join(map(str, path)).upper()
        elif re.match(r"JOBS?_{1,3}[A-Z]+__[A-Z0-9_]+$", upper):
            right = re.sub(r"^JOBS?_{1,3}", PREFIX, upper)
        elif upper.startswith("JOB") and (close := _close(upper, ["JOB_FILE", "JOB_YAML"])):
            right = close
        if right:
            yield Problem(
                "", f"the variable {name} is not read", f"did you mean {right}?", f"environment {name}"
            )


def _close(name: str, names: list[str]) -> str | None:
    # 0.87 takes JOB_YML, JOBFILE and JOB_FIEL, and leaves JOB_TITLE and JOB_PROFILE alone.
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.87) if len(name) < 16 else []
    return found[0] if found else None
