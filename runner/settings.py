"""Where a job comes from, and which source wins.

    strongest   command line     training.learning_rate=1e-5   datasets.train.0.split="train[:1%]"
                environment      JOB__TRAINING__LEARNING_RATE=1e-5   JOB__DATASETS__TRAIN__0__SPLIT=...
                the file         the argument, else JOB_FILE (path, s3://), else the text in JOB_YAML
    weakest     default          `runner.manifest`

Mappings are merged key by key; a list, and null, replace what is weaker; an index addresses one item of a
weaker list. Of argument, JOB_FILE and JOB_YAML exactly one is read, in this order. pydantic-settings orders
and merges the sources; `runner.job.layers` reads the sources, `runner.job.check`
judges the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.sources import InitSettingsSource

from runner.errors import JobError, Problem
from runner.job.check import check
from runner.job.layers import (
    DELIMITER,
    PREFIX,
    WHOLE,
    Layer,
    command_line,
    environment,
    faults,
    file,
    near_misses,
    nothing,
    opened_list,
)
from runner.job.secrets import mask
from runner.job.shape import Finding
from runner.job.yaml_source import Path, show_path
from runner.manifest import Job


@dataclass(frozen=True)
class Resolved:
    """A valid job and where every value of it comes from."""

    job: Job
    sources: dict[str, str]
    """`training.learning_rate` -> `jobs/a.yaml:12`, `environment JOB__...`, `command line` or `default`."""
    file: str | None
    """The file as it was named, `JOB_YAML`, or None when no file was given."""


class _Merged(BaseSettings):
    """The merge of the layers, still unjudged: a job is built from it by `runner.job.check`."""

    model_config = SettingsConfigDict(extra="allow")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(init_settings, InitSettingsSource)
        return tuple(_LayerSource(settings_cls, layer) for layer in init_settings.init_kwargs["layers"])


class _LayerSource(PydanticBaseSettingsSource):
    def __init__(self, settings_cls: type[BaseSettings], layer: Layer) -> None:
        super().__init__(settings_cls)
        self._layer = layer

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self._layer.tree.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        opened: dict[str, Any] = _opened(self._layer.tree, self.current_state)
        return opened


def resolve(job_file: str | None, overrides: list[str], environ: Mapping[str, str]) -> Resolved:
    """The job from all sources.

    Args:
        job_file: path, file: URL or s3://bucket/key; None to use JOB_FILE or JOB_YAML.
        overrides: `key=value`, as on the command line; the last of two equal keys wins.
        environ: the environment.

    Raises:
        UsageError: an override is not `key=value`.
        JobError: the job is wrong; every problem that was found.
        AccessDenied: the file may not be read.
        StorageError: it is in a bucket, which does not answer.
    """
    layers = (command_line(overrides), environment(environ), file(job_file, environ))
    problems = [*near_misses(environ), *(problem for layer in layers for problem in faults(layer))]
    merged = _Merged(layers=layers).model_extra or {}  # type: ignore[call-arg]
    findings: list[Finding] = []
    tree = _closed(merged, (), findings)
    unreadable = layers[2].document is not None and layers[2].document.value is None
    if unreadable and problems:
        raise JobError(_sorted(problems))
    if not tree:
        raise JobError(_sorted([*problems, nothing(layers[2])]))
    job, judged = check(tree, _words(layers))
    findings += judged
    problems += [problem for finding in findings for problem in _located(finding, layers)]
    if problems or job is None:
        raise JobError(_sorted(problems))
    return Resolved(job, _sources(job, layers), layers[2].kind if layers[2].document is not None else None)


def _opened(weaker: Any, stronger: Any) -> Any:
    """`weaker`, with the lists that `stronger` addresses by index as {index: item}, so that they merge."""
    if not isinstance(stronger, dict):
        return weaker
    if WHOLE in stronger:
        return {}
    if isinstance(weaker, list) and all(isinstance(key, int) for key in stronger):
        weaker = opened_list(weaker)
    if not isinstance(weaker, dict):
        return weaker
    return {key: _opened(value, stronger.get(key)) for key, value in weaker.items()}


def _closed(node: Any, path: Path, findings: list[Finding]) -> Any:
    """The inverse of `_opened`, after the merge."""
    if isinstance(node, list):
        return [_closed(item, (*path, index), findings) for index, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    indices = sorted(key for key in node if isinstance(key, int) and key != WHOLE)
    words = {
        key: _closed(value, (*path, key), findings) for key, value in node.items() if isinstance(key, str)
    }
    if not indices:
        return [] if WHOLE in node else words
    if words:
        reason = "an index, but this is a mapping and not a list"
        findings.append(Finding((*path, indices[0]), reason, "name a key instead of an index"))
        return words
    gap = next((index for position, index in enumerate(indices) if index != position), None)
    if gap is not None:
        have = indices.index(gap)
        reason = f"index {gap}, but the list has {have} item{'s' if have != 1 else ''}"
        findings.append(Finding((*path, gap), reason, f"use an index up to {have}; {have} adds an item"))
        indices = indices[:have]
    return [_closed(node[index], (*path, index), findings) for index in indices]


def _words(layers: tuple[Layer, ...]) -> dict[Path, str]:
    """The values that stand as a bare yes, no, on or off, after the merge."""
    words: dict[Path, str] = {}
    for layer in reversed(layers):
        words.update(layer.document.words if layer.document is not None else {})
        for assignment in layer.assignments:
            for path in [path for path in words if path[: len(assignment.path)] == assignment.path]:
                del words[path]
            words.update(
                {(*assignment.path, *path): word for path, word in assignment.document.words.items()}
            )
    return words


def _located(finding: Finding, layers: tuple[Layer, ...]) -> Iterator[Problem]:
    """The finding, once for each place that caused it."""
    path = mask(show_path(finding.path))
    layer = next((layer for layer in layers if layer.says(finding.path) is not None), None)
    for assignment in layer.assignments if layer else ():
        length = min(len(assignment.path), len(finding.path))
        if assignment.path[:length] == finding.path[:length]:
            right = (*finding.suggestion, *assignment.path[len(finding.path) :]) if finding.suggestion else ()
            is_variable = assignment.label.startswith("environment")
            shown = (
                PREFIX + DELIMITER.join(str(part).upper() for part in right)
                if is_variable
                else show_path(right)
            )
            yield Problem(path, finding.reason, finding.say(shown), assignment.label)
    if layer is None or layer.document is not None:
        yield Problem(
            path, finding.reason, finding.say(show_path(finding.suggestion)), _place(finding, layers[2])
        )


def _place(finding: Finding, file: Layer) -> str:
    """`file:line:column` of the finding, or of the nearest mapping that holds it."""
    if file.document is None:
        return ""
    marks = file.document.keys if finding.at_key else file.document.values
    for length in range(len(finding.path), 0, -1):
        near = finding.path[:length]
        mark = (marks if length == len(finding.path) else file.document.keys).get(near)
        if mark is not None:
            return f"{file.kind}:{mark.line}:{mark.column}"
    return f"{file.kind}:1:1" if file.document.values else file.kind


def _sorted(problems: list[Problem]) -> list[Problem]:
    """By line, file first; of several about one place only the first."""

    def order(problem: Problem) -> tuple[bool, int, int, str]:
        place = re.search(r":(\d+):(\d+)$", problem.where)
        return (place is None, int(place[1]) if place else 0, int(place[2]) if place else 0, problem.where)

    first = {(problem.where, problem.path): problem for problem in reversed(problems)}
    return sorted(first.values(), key=order)


def _sources(job: Job, layers: tuple[Layer, ...]) -> dict[str, str]:
    sources = {}
    for path in leaves(job.model_dump(mode="json")):
        layer = next((layer for layer in layers if layer.says(path) is not None), None)
        sources[show_path(path)] = _source(path, layer) if layer and layer.says(path) else "default"
    return sources


def _source(path: Path, layer: Layer) -> str:
    if layer.document is not None:
        # A value inside an alias has no line of its own.
        near = next(
            near for length in range(len(path), -1, -1) if (near := path[:length]) in layer.document.values
        )
        return f"{layer.kind}:{layer.document.values[near].line}"
    labels = [one.label for one in layer.assignments if path[: len(one.path)] == one.path]
    return labels[-1] if layer.kind == "environment" else layer.kind


def leaves(node: Any, path: Path = ()) -> Iterator[Path]:
    """The paths of all values that hold no other; an empty list or mapping is one."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    elif isinstance(node, list) and node:
        for index, value in enumerate(node):
            yield from leaves(value, (*path, index))
    else:
        yield path
