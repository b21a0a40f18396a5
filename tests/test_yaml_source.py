"""YAML as a job reads it: YAML 1.2 scalars, places, and nothing that means more than it shows."""

from __future__ import annotations

from typing import Any

import pytest

from runner.job.yaml_source import MAX_CHARACTERS, parse, parse_value, scalar, show_path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 0.0002),
        ("1e5", 100000.0),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
    ],
)
def test_plain_scalars(text: str, value: Any) -> None:
    assert scalar(text) == value and type(scalar(text)) is type(value)
    assert parse(f"a: {text}").value == {"a": value}


def test_quoted_scalars_are_text() -> None:
    assert parse("a: '8'\nb: \"true\"\nc: |\n  1\n").value == {"a": "8", "b": "true", "c": "1\n"}


def test_places_of_keys_and_values() -> None:
    document = parse("a:\n  - b: 1\n    c: x\n")
    key, value = document.keys[("a", 0, "c")], document.values[("a", 0, "c")]
    assert (key.line, key.column, value.line, value.column) == (3, 5, 3, 8)
    assert show_path(("a", 0, "c")) == "a[0].c"


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a: 1\na: 2\n", 2, "already stands in line 1"),
        ("a: {b: 1, b: 2}\n", 1, "already stands"),
        ("a: 1\nb: *x\n", 2, "no anchor"),
        ("a: &a [*a]\n", 1, "no anchor"),
        ("a: 1\n<<: {b: 2}\n", 2, "merge key"),
        ("a: !!python/object:os.system x\n", 1, "tag"),
        ("a: 1\n---\nb: 2\n", 2, "second YAML document"),
        ("a: .nan\n", 1, "finite"),
        ("a: 1e999\n", 1, "finite"),
        ("a: -.inf\n", 1, "finite"),
        (f"a: {'9' * 5000}\n", 1, "finite"),
        ("a:\n\t- b\n", 2, "tab"),
        ("a: 'x\n", 2, "not YAML"),
        ("a: b: c\n", 1, "not YAML"),
        ("1: x\n", 1, "not a word"),
        ("? [a]\n: b\n", 1, "not a word"),
        ("a: \x00\n", 1, "not allow"),
        ("a: \x07\n", 1, "not allow"),
        ("a: \udcff\n", 1, "UTF-8"),
        ("[" * 5000, 1, "deeper"),
        ("x" * (MAX_CHARACTERS + 1), 1, "characters"),
    ],
)
def test_what_is_refused(text: str, line: int, reason: str) -> None:
    faults = parse(text).faults
    assert len(faults) == 1
    assert reason in faults[0].reason and faults[0].mark.line == line and faults[0].remedy


def test_aliases_are_copies() -> None:
    document = parse("a: &x {b: [1]}\nc: *x\n")
    assert document.value == {"a": {"b": [1]}, "c": {"b": [1]}} and not document.faults


def test_a_billion_laughs_are_refused_at_once() -> None:
    wide = ['a0: &a0 ["lol"]'] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    assert "larger than a job" in parse("\n".join(wide)).faults[-1].reason
    deep = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 5000)]
    assert "larger than a job" in parse("\n".join(deep)).faults[-1].reason


def test_values_of_a_command_line_need_no_second_quotes() -> None:
    assert parse_value("Answer: briefly").value == "Answer: briefly"
    assert parse_value(".*_proj").value == ".*_proj"
    assert parse_value("train[:10%]").value == "train[:10%]"
    assert parse_value("[q_proj, v_proj]").value == ["q_proj", "v_proj"]
    assert parse_value("{a: 2e-4}").value == {"a": 0.0002}
    assert parse_value("'8'").value == "8"
    assert parse_value("").empty and not parse_value("null").empty
    assert parse_value("nan").value == "nan" and parse_value(".nan").faults
