"""A value against a JSON Schema, in words: what is wrong, why, and what to write instead. Pure.

It knows the keywords that runner/schema/job.json uses and judges Python values strictly: "8" is not a whole
number, true is not 1. A generic validator would say "is not valid under any of the given schemas"; this one
follows the branch of a union that the value's type picks.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from runner.job.secrets import mask
from runner.job.yaml_source import AMBIGUOUS, Path, scalar

KINDS = {
    "null": "null",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "array": "a list",
    "object": "a mapping",
}
"""JSON types, as a person calls them."""

LONGEST_SHOWN = 60
MOST_CHOICES = 12
MAX_FINDINGS = 200
"""A file with more problems than this is not a job; what follows is not looked at."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, not yet located in its source."""

    path: Path
    reason: str
    remedy: str
    suggestion: Path = ()
    """The path that was probably meant."""
    at_key: bool = False
    """Whether the key, and not its value, is wrong."""

    def say(self, suggestion: str) -> str:
        """The remedy, with the suggestion as its source would write it."""
        return f"did you mean {suggestion}? {self.remedy}".strip() if self.suggestion else self.remedy


Explain = Callable[[Path, list[str]], Finding]
"""Words the finding for an unknown key, from its path and the keys that are known there."""


@dataclass(frozen=True)
class Judge:
    """One judgement: the schema's definitions, the bare yes/no words, and who explains unknown keys."""

    definitions: dict[str, Any]
    words: dict[Path, str]
    explain: Explain

    def findings(self, value: Any, schema: dict[str, Any], path: Path = ()) -> Iterator[Finding]:
        """Everything that is wrong with `value`."""
        if "$ref" in schema:
            described = {key: text for key, text in schema.items() if key == "description"}
            schema = {**self.definitions[schema["$ref"].rpartition("/")[2]], **described}
        if "anyOf" in schema:
            yield from self._union(value, schema, path)
        elif "enum" in schema or "const" in schema:
            yield from _choice(value, schema, path)
        elif (names := _types(schema)) and not any(_is(value, name) for name in names):
            yield Finding(path, _not_wanted(value, names), _other_type(value, names, schema))
        elif isinstance(value, dict):
            yield from self._mapping(value, schema, path)
        elif isinstance(value, list):
            if len(value) < schema.get("minItems", 0):
                yield Finding(path, "the list is empty", _described(schema))
            for index, item in enumerate(value):
                yield from self.findings(item, schema.get("items", {}), (*path, index))
        elif isinstance(value, str):
            yield from self._text(value, schema, path)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield from _range(value, schema, path)

    def _union(self, value: Any, schema: dict[str, Any], path: Path) -> Iterator[Finding]:
        branches = [self._resolved(branch) for branch in schema["anyOf"]]
        told = schema.get("description", "")
        fitting = [branch for branch in branches if any(_is(value, name) for name in _types(branch))]
        verdicts = [list(self.findings(value, {"description": told, **branch}, path)) for branch in fitting]
        if not fitting:
            names = [name for branch in branches for name in _types(branch)]
            yield Finding(path, _not_wanted(value, names), _other_type(value, names, schema))
        elif all(verdicts):
            values = [value for branch in branches for value in _values(branch)]
            is_choice = isinstance(value, str) and any(_values(branch) for branch in fitting)
            yield from _choice(value, {**schema, "enum": values}, path) if is_choice else verdicts[-1]

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = (
            self.definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        )
        return found

    def _mapping(self, value: dict[str, Any], schema: dict[str, Any], path: Path) -> Iterator[Finding]:
        known: dict[str, Any] = schema.get("properties", {})
        rest = schema.get("additionalProperties", True)
        for key, entry in value.items():
            if key in known:
                yield from self.findings(entry, known[key], (*path, key))
            elif rest is False:
                yield self.explain((*path, key), list(known))
            else:
                yield from self.findings(entry, rest if isinstance(rest, dict) else {}, (*path, key))
        for key in schema.get("required", ()):
            if key not in value:
                told = _described(self._resolved(known[key]))
                yield Finding((*path, key), "the key is missing", f"add it: {told}", at_key=True)

    def _text(self, value: str, schema: dict[str, Any], path: Path) -> Iterator[Finding]:
        if path in self.words:
            reason = f"a bare {value} is text in YAML 1.2 and true or false in YAML 1.1"
            remedy = (
                f'write "{value}" in quotes'
                if _types(schema)
                else f'write true, false, or "{value}" in quotes'
            )
            yield Finding(path, reason, remedy)
        elif len(value) < schema.get("minLength", 0):
            yield Finding(path, "the text is empty", _described(schema))
        elif len(value) > schema.get("maxLength", len(value)):
            yield Finding(path, f"{len(value)} characters; at most {schema['maxLength']}", _described(schema))
        elif "pattern" in schema and not re.search(schema["pattern"], value):
            yield Finding(path, f"{show(value)} does not fit", _described(schema))


def show(value: Any) -> str:
    """The value for a message: short, on one line, without a secret in it."""
    if isinstance(value, (dict, list)):
        return kind_of(value)
    text = json.dumps(mask(value), ensure_ascii=False) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def kind_of(value: Any) -> str:
    """What a person calls the type of the value."""
    if isinstance(value, float):
        return "a number with a fraction"
    return next(word for name, word in KINDS.items() if _is(value, name))


def closest(name: str, names: Iterable[str], cutoff: float = 0.65) -> str | None:
    """The name that was probably meant; None when nothing is near, or the name is too long to be a slip."""
    if len(name) > 64:
        return None
    found = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=cutoff)
    return found[0] if found else None


def _is(value: Any, name: str) -> bool:
    match name:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case "string":
            return isinstance(value, str)
        case "array":
            return isinstance(value, list)
        case _:
            return isinstance(value, dict)


def _types(schema: dict[str, Any]) -> list[str]:
    """The types that the schema accepts; none means any."""
    if values := _values(schema):
        return list(dict.fromkeys(next(name for name in KINDS if _is(value, name)) for value in values))
    names = schema.get("type", [])
    return [names] if isinstance(names, str) else names


def _values(schema: dict[str, Any]) -> list[Any]:
    return [schema["const"]] if "const" in schema else schema.get("enum", [])


def _not_wanted(value: Any, names: list[str]) -> str:
    words = list(dict.fromkeys(KINDS[name] for name in names))
    wanted = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    what = kind_of(value)
    return (
        f"{what}, but it must be {wanted}"
        if what == show(value)
        else f"{show(value)} is {what}, but it must be {wanted}"
    )


def _other_type(value: Any, names: list[str], schema: dict[str, Any]) -> str:
    if isinstance(value, str):
        if "boolean" in names and value in AMBIGUOUS:
            return f"write true or false: {value} is a word in YAML 1.2, a boolean only in YAML 1.1"
        plain = scalar(value.strip().replace("_", ""))
        if plain is not None and not isinstance(plain, str) and any(_is(plain, name) for name in names):
            return f"write {json.dumps(plain)}, without quotes"
        if "array" in names and "string" not in names:
            return f"write a list: [{value}]" if len(value) <= LONGEST_SHOWN else "write a list"
    if isinstance(value, float) and value.is_integer() and "integer" in names:
        return f"write {int(value)}"
    if "string" in names and isinstance(value, (bool, int, float)):
        return f'write it in quotes: "{json.dumps(value)}"'
    if value is None and "default" in schema:
        return f"remove the key for the default, {show(schema['default'])}"
    return _described(schema)


def _choice(value: Any, schema: dict[str, Any], path: Path) -> Iterator[Finding]:
    values = _values(schema)
    if any(type(value) is type(one) and value == one for one in values):
        return
    near = None
    if isinstance(value, str):
        near = closest(value, [one for one in values if isinstance(one, str)], cutoff=0.6)
    shown = [one if isinstance(one, str) else json.dumps(one) for one in values]
    more = f", ... (`runner schema` has all {len(shown)})" if len(shown) > MOST_CHOICES else ""
    choices = ", ".join(shown[:MOST_CHOICES]) + more
    remedy = f"use one of {choices}" if len(shown) > 1 else f"use {choices}"
    reason = f"{show(value)} is not {'a choice' if len(shown) > 1 else 'possible'}"
    yield Finding(path, reason, f"did you mean {near}? {remedy}" if near else remedy)


def _range(value: float, schema: dict[str, Any], path: Path) -> Iterator[Finding]:
    for keyword, fits, reason, remedy in (
        ("minimum", value >= schema.get("minimum", value), "is below {}", "use {} or more"),
        ("maximum", value <= schema.get("maximum", value), "is above {}", "use {} or less"),
        (
            "exclusiveMinimum",
            value > schema.get("exclusiveMinimum", value - 1),
            "is not above {}",
            "use more than {}",
        ),
        (
            "exclusiveMaximum",
            value < schema.get("exclusiveMaximum", value + 1),
            "is not below {}",
            "use less than {}",
        ),
    ):
        if keyword in schema and not fits:
            limit = schema[keyword]
            yield Finding(path, f"{show(value)} {reason.format(limit)}", remedy.format(limit))


def _described(schema: dict[str, Any]) -> str:
    text = str(schema.get("description", "")).removesuffix(" Required.")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text or "see `runner schema`"
