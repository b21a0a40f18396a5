"""Judges a merged job: all problems at once, each with a reason, a remedy and, where known, the right name.

    secrets   runner.job.secrets   what looks like a credential, by value or by key
    shape     runner.job.shape     unknown keys, types, choices and ranges, against runner/schema/job.json
    roles     here             columns that a format does not have
    trackers  here                 words of training.report_to that are no tracker
    matrix    runner.job.matrix    combinations that cannot work

Then the `Job` is built; its own validation repeats the shape in pydantic, and has the last word.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from runner.job import foreign, matrix
from runner.job.ownership import OWNED
from runner.job.secrets import has_secret, names_secret
from runner.job.shape import MAX_FINDINGS, Finding, Judge, closest
from runner.job.yaml_source import Path, show_path
from runner.manifest import ROLES, Job
from runner.schema import job_schema_text
from runner.schema.job import METHODS, of_method
from runner.tracking import choice


def check(tree: dict[str, Any], words: dict[Path, str]) -> tuple[Job | None, list[Finding]]:
    """The job that `tree` describes, or None, and everything that is wrong with it.

    Args:
        tree: the merged sources.
        words: the values that were written as a bare yes, no, on or off.
    """
    schema = of_method(job_schema(), tree.get("method", "sft"))
    judge = Judge(schema["$defs"], words, _unknown)
    secrets = list(_secrets(tree, ()))
    found = itertools.chain(
        judge.findings(tree, schema), _roles(tree), _processor(tree), _trackers(tree), matrix.refusals(tree)
    )
    hidden = [secret.path for secret in secrets]
    rest = [
        finding
        for finding in itertools.islice(found, MAX_FINDINGS)
        if not any(finding.path[: len(path)] == path for path in hidden)
    ]
    if secrets or rest:
        return None, [*secrets, *rest]
    try:
        return Job.model_validate(tree), []
    except ValidationError as error:
        return None, [
            Finding(one["loc"], one["msg"], "see `runner schema`")
            for one in error.errors(include_input=False, include_url=False, include_context=False)
        ]


@functools.cache
def job_schema() -> dict[str, Any]:
    """The generated JSON Schema of a job."""
    schema: dict[str, Any] = json.loads(job_schema_text())
    return schema


def known_path(name: str) -> Path:
    """`lora_r` -> ("lora", "r"): the key of a section whose path, joined with underscores, is `name`."""
    for key, places in _places().items():
        for place in places:
            if len(place) == 2 and f"{place[0]}_{key}" == name.replace("__", "_"):
                return place
    return ()


def _secrets(node: Any, path: Path) -> Iterator[Finding]:
    remedy = "remove it here and wherever it was committed; pass credentials in the environment of the runner"
    if isinstance(node, dict):
        for key, value in node.items():
            here = (*path, key)
            if names_secret(key) and value not in (None, "", {}, []):
                yield Finding(here, "a credential never stands in a job", remedy)
            elif has_secret(key):
                yield Finding(here, "a key that looks like a credential", remedy, at_key=True)
            else:
                yield from _secrets(value, here)
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from _secrets(item, (*path, index))
    elif isinstance(node, str) and has_secret(node):
        yield Finding(path, "the value looks like a credential", remedy)


def _unknown(path: Path, siblings: list[str]) -> Finding:
    """What to say about a key that is not known where it stands."""
    name, place = str(path[-1]), ".".join(part for part in path if isinstance(part, str))
    if answer := foreign.FOREIGN_AT.get(place):
        return _instead(path, f"{name} is not a key here", answer.use, answer.note)
    if owned := OWNED.get(str(path[0]), {}).get(name) or OWNED["training"].get(name):
        return _instead(path, f"the runner owns {name}: {owned.why}", owned.use, "")
    places = _places().get(name, ())
    if path in places:
        return Finding(
            path, f"{name} is a key of the other method", "remove it, or change method", at_key=True
        )
    elsewhere = [found for found in places if found[:-1] != path[:-1]]
    if len(elsewhere) == 1 and elsewhere[0][0] in ("training", "lora", "quantization"):
        return _instead(path, f"{name} does not stand here", show_path(elsewhere[0]), "")
    if answer := foreign.FOREIGN.get(name):
        return _instead(path, f"{name} is another tool's or an older name", answer.use, answer.note)
    near = closest(name, [*siblings, *OWNED.get(place.rpartition(".")[0], ())])
    if near in siblings:
        return Finding(path, f"{name} is not a key here", "", suggestion=(*path[:-1], near), at_key=True)
    if near:
        owned = OWNED[place.rpartition(".")[0]][near]
        return _instead(path, f"{name} is not a key here; {near} is the runner's: {owned.why}", owned.use, "")
    if elsewhere:
        return _instead(
            path, f"{name} does not stand here", " or ".join(show_path(one) for one in elsewhere[:3]), ""
        )
    if (near := closest(name, foreign.FOREIGN)) and foreign.FOREIGN[near].use:
        return _instead(
            path, f"{name} is not a key here", foreign.FOREIGN[near].use, foreign.FOREIGN[near].note
        )
    known = (
        ", ".join(siblings)
        if len(siblings) <= 16
        else "those of docs/training-options.md and `runner schema`"
    )
    return Finding(
        path, f"{name[:60]} is not a key here", f"remove it; the keys here are {known}", at_key=True
    )


def _instead(path: Path, reason: str, use: str, note: str) -> Finding:
    remedy = f"use {use}" if use else "remove it"
    return Finding(path, reason, f"{remedy} ({note})" if note else remedy, at_key=True)


@functools.cache
def _places() -> dict[str, list[Path]]:
    """Every key of a job -> where it may stand, under whichever method."""
    schema = job_schema()
    places: dict[str, list[Path]] = {}

    def walk(node: dict[str, Any], path: Path) -> None:
        for branch in [node, *node.get("anyOf", ())]:
            inner = schema["$defs"][branch["$ref"].rpartition("/")[2]] if "$ref" in branch else branch
            if "$ref" in branch.get("items", {}):
                walk(branch["items"], (*path, 0))
            for key, value in inner.get("properties", {}).items():
                if (*path, key) not in places.setdefault(key, []):
                    places[key].append((*path, key))
                walk(value, (*path, key))

    for method in METHODS:
        walk(of_method(schema, method), ())
    return places


def _roles(tree: dict[str, Any]) -> Iterator[Finding]:
    datasets = tree.get("datasets")
    for part in ("train", "eval"):
        sources = datasets.get(part) if isinstance(datasets, dict) else None
        for index, source in enumerate(sources if isinstance(sources, list) else ()):
            if (
                isinstance(source, dict)
                and isinstance(source.get("format"), str)
                and source["format"] in ROLES
            ):
                yield from _source_roles(source, ("datasets", part, index))


def _source_roles(source: dict[str, Any], path: Path) -> Iterator[Finding]:
    roles = ROLES[source["format"]]
    columns = source.get("columns")
    for role, column in columns.items() if isinstance(columns, dict) else ():
        if role in roles:
            continue
        where = (*path, "columns", role)
        reason = f"{role} is not a role of format {source['format']}"
        remedy = f"the roles are {', '.join(roles)}"
        if isinstance(column, str) and column in roles:
            yield Finding(where, reason, f"write role: column, {column}: {role}; {remedy}", at_key=True)
        elif near := closest(role, roles):
            yield Finding(where, reason, remedy, suggestion=(*where[:-1], near), at_key=True)
        else:
            yield Finding(where, reason, remedy, at_key=True)
    if isinstance(columns, dict) and {"image", "images"} <= set(columns):
        yield Finding(
            (*path, "columns", "images"), "the role image is named twice", "keep image or images", at_key=True
        )
    if source.get("prompt") is not None and source["format"] != "caption":
        reason = f"format {source['format']} reads its prompt from the row"
        yield Finding(
            (*path, "prompt"), reason, "remove it; only format caption has a fixed instruction", at_key=True
        )


def _processor(tree: dict[str, Any]) -> Iterator[Finding]:
    model = tree.get("model")
    processor = model.get("processor") if isinstance(model, dict) else None
    for key in processor if isinstance(processor, dict) else ():
        if answer := foreign.PROCESSOR.get(key):
            yield _instead(("model", "processor", key), f"the runner owns {key}", answer.use, answer.note)


def _trackers(tree: dict[str, Any]) -> Iterator[Finding]:
    training = tree.get("training")
    report_to = training.get("report_to") if isinstance(training, dict) else None
    words = report_to if isinstance(report_to, list) else [report_to]
    if any(not isinstance(word, str | None) for word in words):
        return  # the shape says it
    names = ", ".join(choice.TRACKERS)
    for word in choice.unknown(report_to):
        if word == "all":
            reason = "it would be whatever happens to be installed, here or on the next machine"
            remedy = f"name them: a list of {names}"
        elif word == choice.NONE:
            reason, remedy = "none stands beside a tracker", "remove it, or the others"
        else:
            near = closest(word, choice.TRACKERS)
            meant = f"did you mean {near}? " if near else ""
            reason, remedy = f"{word} is no tracker here", f"{meant}the trackers are {names}, or none"
        yield Finding(("training", "report_to"), reason, remedy)
