"""The table of exit codes: what `runner.errors` raises is in it, and what the command line's help says."""

from __future__ import annotations

import pytest

from runner import cli, errors, exits


def kinds(kind: type[errors.RunnerError] = errors.RunnerError) -> list[type[errors.RunnerError]]:
    return [kind, *(one for sub in kind.__subclasses__() for one in kinds(sub))]


def test_every_exception_has_a_row() -> None:
    raised = {kind.exit_code for kind in kinds() if kind.__module__ == "runner.errors"}
    assert raised - set(exits.EXITS) == {errors.RunnerError.exit_code} == {1}
    assert set(exits.EXITS) - raised == {0}


@pytest.mark.parametrize(
    ("kind", "retried"),
    [
        (errors.RunnerError, "counted"),
        (errors.UsageError, "no"),
        (errors.DataError, "no"),
        (errors.StorageError, "counted"),
        (errors.Preempted, "uncounted"),
        (errors.NotOwner, "no"),
        (errors.AccessDenied, "no"),
        (errors.JobError, "no"),
        (errors.NoProgress, "no"),
    ],
)
def test_what_follows_an_exception(kind: type[errors.RunnerError], retried: str) -> None:
    assert exits.of(kind.exit_code).retried == retried


@pytest.mark.parametrize("code", [1, 2, 126, 127, 134, 137, 139, 143, 255])
def test_any_other_code_is_a_crash(code: int) -> None:
    assert exits.of(code) is exits.OTHERWISE
    assert exits.of(code).retried == "counted"


def test_codes_are_sorted_and_zero_is_no_failure() -> None:
    assert exits.codes("no") == [64, 65, 76, 77, 78, 93]
    assert exits.codes("uncounted") == [75]
    assert exits.codes("counted") == [74]


def test_the_help_names_every_code() -> None:
    assert all(f"{code} " in cli.CODES for code in exits.EXITS)
