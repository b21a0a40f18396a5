"""Verdicts: the rows of the docstrings' tables, and the summary."""

from __future__ import annotations

import pytest

from runner.train.evaluation.metrics import METRICS, exact_match, relaxed_accuracy, summarize

RELAXED = [
    ("42", ["40"], True),
    ("42.1", ["40"], False),
    ("38", ["40"], True),
    ("37.9", ["40"], False),
    ("-40", ["40"], False),
    ("50%", ["0.5"], True),
    ("50%", ["50"], False),
    ("5 %", ["5%"], True),
    ("0", ["0"], True),
    ("0.0", ["0"], False),
    ("0.01", ["0"], False),
    ("1,000", ["1000"], False),
    ("1,000", ["1,000"], True),
    ("1e3", ["1000"], True),
    ("yes", ["Yes"], True),
    ("Yes.", ["Yes"], False),
    (" blue ", ["Blue"], True),
    ("nan", ["nan"], True),
    ("inf", ["inf"], True),
    ("2019_21", ["2019_20"], False),
    ("", ["0"], False),
    ("blue", ["red", "blue"], True),
]


@pytest.mark.parametrize(("prediction", "answers", "right"), RELAXED)
def test_relaxed_accuracy_follows_its_table(prediction: str, answers: list[str], right: bool) -> None:
    assert relaxed_accuracy(prediction, answers) is right


@pytest.mark.parametrize(
    ("prediction", "answers", "right"),
    [
        ("14", ["14"], True),
        (" 14 ", ["14"], True),
        ("14.0", ["14"], False),
        ("yes", ["Yes"], False),
        ("blue", ["red", "blue"], True),
    ],
)
def test_exact_match_follows_its_table(prediction: str, answers: list[str], right: bool) -> None:
    assert exact_match(prediction, answers) is right


def test_no_accepted_answer_is_never_right() -> None:
    assert not relaxed_accuracy("", [])
    assert not exact_match("", [])


def test_docstring_has_every_row_of_the_table() -> None:
    lines = [line for line in (relaxed_accuracy.__doc__ or "").splitlines() if line.startswith("        ")]
    table = lines[1:]  # the first one is the head
    assert len(table) == len(RELAXED)
    for line, (prediction, answers, right) in zip(table, RELAXED, strict=True):
        said, truth, verdict = line[8:22].strip(), line[22:33].strip(), line[33:38].strip()
        assert (said.strip('"'), truth, verdict) == (prediction, ", ".join(answers), "yes" if right else "no")


def lmms_eval(prediction: str, target: str) -> bool:
    """lmms_eval/tasks/chartqa/utils.py, word for word but for the names."""

    def number(text: str) -> float | None:
        try:
            return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
        except ValueError:
            return None

    said, truth = number(prediction), number(target)
    if said is not None and truth:
        return abs(said - truth) / abs(truth) <= 0.05
    return prediction.lower() == target.lower()


def test_relaxed_accuracy_is_lmms_evals_but_for_the_rows_that_say_so() -> None:
    differ = {
        prediction
        for prediction, answers, right in RELAXED
        if any(lmms_eval(prediction.strip(), answer) for answer in answers) is not right
    }
    assert differ == {"nan", "inf", "2019_21"}


def record(relaxed: bool, exact: bool, group: str | None) -> dict[str, object]:
    return {"relaxed_accuracy": relaxed, "exact_match": exact, "group": group}


def test_summary_has_overall_and_every_group_that_occurs() -> None:
    records = [
        record(True, True, "human"),
        record(True, False, "augmented"),
        record(False, False, "augmented"),
    ]
    assert summarize(records) == {
        "relaxed_accuracy": {
            "overall": 2 / 3,
            "n": 3,
            "augmented": 0.5,
            "n_augmented": 2,
            "human": 1.0,
            "n_human": 1,
        },
        "exact_match": {
            "overall": 1 / 3,
            "n": 3,
            "augmented": 0.0,
            "n_augmented": 2,
            "human": 1.0,
            "n_human": 1,
        },
    }


def test_summary_of_nothing_is_null_and_rows_without_a_group_make_none() -> None:
    assert summarize([]) == {metric: {"overall": None, "n": 0} for metric in METRICS}
    assert summarize([record(True, True, None)])["exact_match"] == {"overall": 1.0, "n": 1}
