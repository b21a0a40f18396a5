"""YAML text to plain values, with the place of every key and value. Strict, small, and never surprising.

Scalars are read as YAML 1.2's core schema reads them (`2e-4` is a number, `no` is a word), where PyYAML alone
would read YAML 1.1. What makes a file mean something that its reader does not see is refused: duplicate keys,
merge keys, tags, several documents, numbers that are not finite. PyYAML only splits the text into events; the
tree is built here, so that every node keeps its line and column, and so that depth and what aliases expand to
are bounded.

    parse(text) -> Document(value, marks, words, faults)
    scalar("2e-4") -> 0.0002
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]
"""Where a value stands: `("datasets", "train", 0, "split")`."""

MAX_CHARACTERS = 131_072
"""A job is a page or two; a file of this size is something else."""

MAX_DEPTH = 16
MAX_DIGITS = 300
MAX_FAULTS = 100
MAX_ANCHORS = 64
MAX_NODES = 4_096
"""Keys, items and values after aliases are expanded: nine aliases to nine aliases to ... end here."""

AMBIGUOUS = frozenset(
    word for base in ("yes", "no", "on", "off") for word in (base, base.capitalize(), base.upper())
)
"""Words that YAML 1.1 reads as booleans and YAML 1.2 as text."""

_NULLS = frozenset(("", "~", "null", "Null", "NULL"))
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

LOADER: type[Any] = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


@dataclass(frozen=True)
class Mark:
    """A place in the text, counted from one."""

    line: int
    column: int


@dataclass(frozen=True)
class Fault:
    """Something in the text that is refused."""

    path: Path
    mark: Mark
    reason: str
    remedy: str


@dataclass(frozen=True)
class Document:
    """What a YAML text says."""

    value: Any
    """dict (with str keys), list, str, int, float, bool or None."""
    keys: dict[Path, Mark] = field(default_factory=dict)
    """Where a key of a mapping, or an item of a list, starts."""
    values: dict[Path, Mark] = field(default_factory=dict)
    """Where its value starts."""
    words: dict[Path, str] = field(default_factory=dict)
    """Values written as a bare yes, no, on or off."""
    faults: tuple[Fault, ...] = ()
    empty: bool = False
    """Whether nothing at all was written, not even null."""


class _Refused(Exception):
    """The text cannot be read any further."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault


def parse(text: str) -> Document:
    """The document in `text`. Never raises: what is wrong is in `faults`; `value` is what was readable."""
    if len(text) > MAX_CHARACTERS:
        reason = f"a text of {len(text):,} characters; a job has at most {MAX_CHARACTERS:,}"
        return Document(None, faults=(Fault((), Mark(1, 1), reason, "name the job file, not a data file"),))
    if any("\ud800" <= character <= "\udfff" for character in text):
        fault = Fault((), Mark(1, 1), "bytes that are not UTF-8", "write the job in UTF-8")
        return Document(None, faults=(fault,))
    builder = _Builder(text)
    try:
        value = builder.document()
    except _Refused as refused:
        builder.faults.append(refused.fault)
        value = None
    return Document(value, builder.keys, builder.values, builder.words, tuple(builder.faults))


def parse_value(text: str) -> Document:
    """One value from a command line or an environment variable.

    Brackets, braces and quotes are YAML; anything else is one plain scalar, so that `prompt=Answer: briefly`
    and `target_modules=.*_proj` need no second layer of quotes.
    """
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'") or len(text) > MAX_CHARACTERS:
        return parse(text)
    fault = _not_finite((), text, Mark(1, 1))
    words: dict[Path, str] = {(): text} if text in AMBIGUOUS else {}
    return Document(None, faults=(fault,)) if fault else Document(scalar(text), words=words, empty=not text)


def scalar(text: str) -> Any:
    """A plain scalar by YAML 1.2's core schema. A number that is not finite, or absurdly long, stays text."""
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if len(text) > MAX_DIGITS:
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        return number if math.isfinite(number) else text
    return text


def show_path(path: Path) -> str:
    """`datasets.train[0].split`."""
    shown = ""
    for part in path:
        shown += f"[{part}]" if isinstance(part, int) else f".{part}" if shown else part
    return shown


class _Builder:
    """Builds one tree from one stream of events."""

    def __init__(self, text: str) -> None:
        self.keys: dict[Path, Mark] = {}
        self.values: dict[Path, Mark] = {}
        self.words: dict[Path, str] = {}
        self.faults: list[Fault] = []
        self._anchors: dict[str, Any] = {}
        self._expanded = 0
        self._here: Path = ()
        self._events = self._guarded(text)

    def document(self) -> Any:
        self._next(), self._next()
        # An empty stream has no document: after its start comes its end, and there is nothing more to read.
        if isinstance(self._last, yaml.StreamEndEvent):
            return None
        value = self._node(self._next(), ())
        self._next()
        extra = self._next()
        if isinstance(extra, yaml.DocumentStartEvent):
            raise _Refused(
                Fault(
                    (),
                    _mark(extra),
                    "a second YAML document starts here",
                    "keep one job in one file; remove `---`",
                )
            )
        return value

    def _guarded(self, text: str) -> Iterator[Any]:
        try:
            yield from yaml.parse(text, Loader=LOADER)
        except yaml.MarkedYAMLError as error:
            place = error.problem_mark or error.context_mark
            reason = "; ".join(part for part in (error.context, error.problem) if part)
            raise _Refused(_syntax(self._here, place, reason, text)) from error
        except yaml.reader.ReaderError as error:
            before = text[: error.position] if isinstance(error.position, int) else ""
            mark = Mark(before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)
            reason = "a character that YAML does not allow (binary file?)"
            raise _Refused(Fault(self._here, mark, reason, "name a text file in UTF-8")) from error

    def _next(self) -> Any:
        self._last = next(self._events)
        return self._last

    def _node(self, event: Any, path: Path) -> Any:
        self._here = path
        if len(self.faults) >= MAX_FAULTS:
            raise _Refused(
                Fault(path, _mark(event), f"{MAX_FAULTS} faults so far; this is not a job", "start anew")
            )
        self.values[path] = _mark(event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, path)
        if event.tag is not None and event.tag != "!":
            reason = f"the tag {event.tag} changes how the value is read"
            self.faults.append(Fault(path, _mark(event), reason, "remove the tag"))
        if len(path) > MAX_DEPTH:
            raise _Refused(
                Fault(path[:3], _mark(event), f"nested deeper than {MAX_DEPTH} levels", "flatten it")
            )
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, path)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._sequence(path)
        else:
            value = self._mapping(path)
        if event.anchor is not None:
            # Only now, so that an alias inside its own anchor is unknown and no value contains itself.
            self._anchors[event.anchor] = value
        return value

    def _alias(self, event: Any, path: Path) -> Any:
        if event.anchor not in self._anchors:
            reason = f"the alias *{event.anchor} has no anchor &{event.anchor} before it"
            raise _Refused(Fault(path, _mark(event), reason, "write the value out"))
        value = self._anchors[event.anchor]
        nodes, height = _measure(value)
        self._expanded += nodes
        if self._expanded > MAX_NODES or len(self._anchors) > MAX_ANCHORS or len(path) + height > MAX_DEPTH:
            reason = f"the alias *{event.anchor} makes the job larger than a job is"
            raise _Refused(Fault(path, _mark(event), reason, "write out what you need"))
        return value

    def _scalar(self, event: Any, path: Path) -> Any:
        if event.style:
            return event.value
        if event.value in AMBIGUOUS:
            self.words[path] = event.value
        if fault := _not_finite(path, event.value, _mark(event)):
            self.faults.append(fault)
            return None
        return scalar(event.value)

    def _sequence(self, path: Path) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            here = (*path, len(items))
            self.keys[here] = _mark(event)
            items.append(self._node(event, here))
        return items

    def _mapping(self, path: Path) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            mark = _mark(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise _Refused(
                    Fault(path, mark, "a key that is not a word", "write `key: value`; quote braces")
                )
            key = event.value
            here = (*path, key)
            if fault := self._bad_key(event, here):
                self.faults.append(fault)
                # The value is read, so that what is wrong inside is reported, and dropped.
                self._node(self._next(), (*path, f"{key} (dropped)"))
                continue
            self.keys[here] = mark
            entries[key] = self._node(self._next(), here)
        return entries

    def _bad_key(self, event: Any, here: Path) -> Fault | None:
        key, mark = event.value, _mark(event)
        if not event.style and key == "<<":
            return Fault(here[:-1], mark, "the merge key << is not part of YAML 1.2", "write the keys out")
        if not event.style and not isinstance(scalar(key), str):
            return Fault(
                here[:-1], mark, f"the key {key or 'null'} is not a word", f"write '{key}' in quotes"
            )
        if here in self.keys:
            first = self.keys[here]
            reason = (
                f"the key stands here again; it already stands in line {first.line}, column {first.column}"
            )
            return Fault(here, mark, reason, "keep one of the two")
        return None


def _measure(value: Any) -> tuple[int, int]:
    """How many nodes a value has, and how deep it is."""
    if not isinstance(value, (dict, list)):
        return 1, 0
    inner = [_measure(item) for item in (value.values() if isinstance(value, dict) else value)]
    return 1 + sum(nodes for nodes, _ in inner), 1 + max((height for _, height in inner), default=0)


def _not_finite(path: Path, text: str, mark: Mark) -> Fault | None:
    value = scalar(text)
    if not isinstance(value, str) or not (_NOT_FINITE.fullmatch(value) or _FLOAT.fullmatch(value)):
        return None
    shown = value if len(value) <= 40 else f"a number of {len(value)} characters"
    return Fault(path, mark, f"{shown} is not a finite number", "write a usual number")


def _mark(event: Any) -> Mark:
    return Mark(event.start_mark.line + 1, event.start_mark.column + 1)


def _syntax(path: Path, place: Any, reason: str, text: str) -> Fault:
    mark = Mark(place.line + 1, place.column + 1)
    lines = text.split("\n")
    line = lines[place.line] if place.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return Fault(path, mark, "a tab in the indentation", "indent with spaces")
    return Fault(
        path, mark, f"not YAML: {reason}", "check the indentation, the quotes and the `key: value` pairs"
    )
