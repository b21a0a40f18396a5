"""The rules of reports, row by row as their docstrings have them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from runner.errors import UsageError
from runner.report import beside, compare, judge, marks, metrics, verdict
from runner.report.curves import curve, evaluated
from runner.report.history import History, Point, history
from runner.report.job_text import nested, values
from runner.report.marks import Mark
from runner.report.metrics import Estimate
from runner.report.read import Run, read, state_of
from runner.report.render import embedded
from runner.report.verb import named_runs
from runner.report.view import page
from runner.run_words import named
from runner.settings import resolve
from runner.supervisor.reporting import ENOUGH, wanted
from runner.train.evaluation import metrics as single
from runner.train.evaluation import pair_metrics as pair

GOOD = str(Path(__file__).parent / "data" / "good.yaml")


@pytest.mark.parametrize(
    ("before", "after", "answer"),
    [
        (True, True, "right"),
        (False, False, "wrong"),
        (False, True, "fixed"),
        (True, False, "broken"),
        (None, True, "right"),
        (None, False, "wrong"),
        (True, None, "right"),
        (False, None, "wrong"),
        (None, None, "wrong"),
    ],
)
def test_what_a_row_became(before: bool | None, after: bool | None, answer: str) -> None:
    assert judge.became(before, after) == answer


@pytest.mark.parametrize(
    ("record", "metric", "answer"),
    [
        ({"relaxed_accuracy": True, "exact_match": False}, "relaxed_accuracy", True),
        ({"relaxed_accuracy": True, "exact_match": False}, "exact_match", False),
        ({"relaxed_accuracy": "yes"}, "relaxed_accuracy", None),
        ({"logp_chosen": -1.0, "logp_rejected": -2.0}, "preference_accuracy", True),
        ({"logp_chosen": -2.0, "logp_rejected": -1.0}, "preference_accuracy", False),
        ({"logp_chosen": -1.0, "logp_rejected": -1.0}, "preference_accuracy", False),
        ({"logp_chosen": -1.0}, "preference_accuracy", None),
        ({}, "relaxed_accuracy", None),
    ],
)
def test_whether_a_record_is_right(record: dict[str, Any], metric: str, answer: bool | None) -> None:
    assert judge.right(record, metric) is answer


def test_rows_of_one_name_are_told_apart_by_what_they_ask() -> None:
    def asked(question: str, right: bool) -> dict[str, Any]:
        return {"row": "a row 1", "question": question, "prediction": "x", "exact_match": right}

    before, after = [asked("one?", True), asked("two?", False)], [asked("two?", True), asked("one?", False)]
    found = judge.predictions(before, after, "exact_match")
    assert [(one.question, one.became) for one in found] == [("two?", "fixed"), ("one?", "broken")]


@pytest.mark.parametrize(
    ("after", "reason", "per_device", "kind"),
    [
        ("trainer", "x", True, "batch"),
        ("notice", "x", False, "preemption"),
        ("lost", "x", False, "preemption"),
        ("trainer", "x", False, "restart"),
        ("failure", "x", False, "restart"),
        (None, "preempted: SIGTERM", False, "preemption"),
        (None, "killed together with its supervisor", False, "preemption"),
        (None, "SIGSEGV", False, "restart"),
    ],
)
def test_what_a_restart_is_a_mark_of(after: str | None, reason: str, per_device: bool, kind: str) -> None:
    assert marks.kind_of(after, reason, per_device) == kind


def test_marks_of_fidelity() -> None:
    changes = ["world 4 -> 2", "strategy ddp -> zero2", "per_device 8 -> 4", "the checkpoint does not say"]
    found = marks.of_fidelity(changes, 3, 7)
    assert [mark.title for mark in found] == ["world 4 → 2", "strategy ddp → zero2"]
    assert {(mark.step, mark.kind, mark.attempt) for mark in found} == {(7, "change", 3)}


def test_restarts_that_only_the_result_knows_are_marks_too() -> None:
    here = [Mark(6, "restart", "attempt 3 goes on from here", "", 3)]
    restarts = [
        {"attempt": 2, "reason": "preempted: SIGTERM: ...", "step": 4, "per_device": None},
        {"attempt": 3, "reason": "killed", "step": 6, "per_device": None},
        "no restart",
    ]
    assert [(mark.step, mark.kind) for mark in marks.merged(here, restarts)] == [
        (4, "preemption"),
        (6, "restart"),
    ]


END = {"event": "end", "outcome": "failed"}


@pytest.mark.parametrize(
    ("told", "result", "age", "answer"),
    [
        (History(began=1.0, end={"event": "end", "outcome": "done"}), {}, None, "done"),
        (History(began=1.0, end={"event": "end", "outcome": "preempted"}), {}, 1.0, "preempted"),
        (History(began=1.0, end=END), {"outcome": "done"}, None, "failed"),
        (History(began=1.0), {"outcome": "preempted"}, 1.0, "running"),
        (History(began=1.0), {"outcome": "preempted"}, 31.0, "interrupted"),
        (History(began=1.0), {}, -5.0, "interrupted"),
        (History(began=1.0), {}, None, "interrupted"),
        (History(), {"outcome": "done"}, None, "done"),
        (History(), {}, None, "begun"),
    ],
)
def test_what_a_run_is_at(told: History, result: dict[str, Any], age: float | None, answer: str) -> None:
    assert state_of(told, result, age) == answer


LOW, MIDDLE, HIGH = (
    Estimate(0.5, 240, 0.44, 0.56),
    Estimate(0.55, 240, 0.49, 0.61),
    Estimate(0.97, 240, 0.94, 0.99),
)


@pytest.mark.parametrize(
    ("metric", "before", "after", "answer"),
    [
        ("exact_match", LOW, HIGH, "better"),
        ("exact_match", HIGH, LOW, "worse"),
        ("exact_match", LOW, MIDDLE, "unclear"),
        ("exact_match", Estimate(0.5), Estimate(0.97), "better"),
        ("exact_match", Estimate(0.5), Estimate(0.5), "unclear"),
        ("exact_match", None, HIGH, "unknown"),
        ("exact_match", LOW, None, "unknown"),
        ("generated_rejected", HIGH, LOW, "better"),
        ("eval_loss", Estimate(0.5), Estimate(0.97), "worse"),
    ],
)
def test_what_training_made_of_a_metric(
    metric: str, before: Estimate | None, after: Estimate | None, answer: str
) -> None:
    assert metrics.change(metric, before, after) == answer


@pytest.mark.parametrize(
    ("stored", "metric", "value", "interval"),
    [
        ({"overall": 0.5, "n": 240}, "exact_match", 0.5, (0.4372, 0.5628)),
        ({"overall": 0.5, "n": 4, "low": 0.1, "high": 0.9}, "exact_match", 0.5, (0.1, 0.9)),
        ({"overall": 0.5, "n": 4}, "reward_margin", 0.5, None),
        ({"overall": 0.5, "n": 4, "low": 0.1, "high": None}, "reward_margin", 0.5, None),
        (0.7, "eval_loss", 0.7, None),
    ],
)
def test_a_stored_metric_as_an_estimate(
    stored: Any, metric: str, value: float, interval: tuple[float, float] | None
) -> None:
    found = metrics.estimate({metric: stored}, metric)
    assert found is not None and found.value == value
    if interval is None:
        assert (found.low, found.high) == (None, None)
    else:
        assert (found.low, found.high) == pytest.approx(interval, abs=5e-5)


@pytest.mark.parametrize("stored", [None, "0.5", True, {}, {"overall": None, "n": 0}, math.nan])
def test_a_metric_that_means_nothing_is_none(stored: Any) -> None:
    assert metrics.estimate({"exact_match": stored}, "exact_match") is None


def test_groups_have_their_own_interval() -> None:
    stored = {"exact_match": {"overall": 0.5, "n": 4, "human": 1.0, "n_human": 1, "low": 0.1, "high": 0.9}}
    whole, human = metrics.compared({}, stored)
    assert (whole.group, human.group) == (None, "human")
    assert human.after is not None and human.after.low == pytest.approx(0.2065, abs=5e-5)


@pytest.mark.parametrize(
    ("error", "what", "remedy"),
    [
        ("disk is full; remedy: free space", "disk is full", "free space"),
        ("it does not fit. Remedy: a smaller batch", "it does not fit", "a smaller batch"),
        ("a Remedy, the largest lever first: b", "a", "b"),
        ("training.x: 3\n    remedy: use 4", "training.x: 3", "use 4"),
        ("killed", "killed", None),
        (None, None, None),
    ],
)
def test_an_error_is_parted_from_its_remedy(error: str | None, what: str | None, remedy: str | None) -> None:
    assert verdict.split(error) == (what, remedy)


@pytest.mark.parametrize(
    ("low", "high", "peak", "where"),
    [(1, 2, 1, "inside"), (1, 2, 2, "inside"), (1, 2, 3, "above"), (2, 3, 1, "below"), (1, 2, None, None)],
)
def test_where_the_peak_lies(low: int, high: int, peak: int | None, where: str | None) -> None:
    assert beside.Room(low, high, peak, ()).where == where


@pytest.mark.parametrize(
    ("setting", "job", "left", "hurry", "answer"),
    [
        ("off", True, None, False, False),
        (None, False, None, False, False),
        (None, True, None, True, False),
        (None, True, ENOUGH - 1, False, False),
        (None, True, ENOUGH, False, True),
        ("on", True, None, False, True),
    ],
)
def test_whether_a_run_that_ends_gets_a_report(
    setting: str | None, job: bool, left: float | None, hurry: bool, answer: bool
) -> None:
    assert wanted(setting, job, left, hurry) is answer


def test_which_runs_words_name(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    a, b = marked(runs / "a"), "s3://bucket/prefix/b"
    assert named_runs([a, b, GOOD], runs) == [named("report", [one], runs) for one in (a, b, GOOD)]
    assert [one.job and one.job.name for one in named_runs([GOOD, "name=b"], runs)] == ["b"]
    with pytest.raises(UsageError, match="values change a job, and there are several runs"):
        named_runs([GOOD, a, "name=b"], runs)


def marked(folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "events.jsonl").touch()
    return str(folder)


# --- what events add up to ---


def step(number: int, **fields: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": 1.0 / number, "ids": [1, 2], **fields}


def test_steps_that_are_done_again_count_once() -> None:
    """Killed after step 5, with step 3 committed: 4 and 5 are forgotten until they are done again."""
    crash = {"event": "restart", "attempt": 2, "reason": "killed", "after": "trainer", "step": 3}
    told = history([*(step(n, tokens=1) for n in range(1, 6)), crash, {"event": "attempt", "step": 3}])
    assert [point.step for point in told.points] == [1, 2, 3]
    (mark,) = told.marks
    assert (mark.step, mark.kind) == (3, "restart") and "steps 4 to 5 were done again" in mark.text
    again = history(
        [*(step(n) for n in range(1, 6)), crash, {"event": "attempt", "step": 3}, step(4, loss=9.0)]
    )
    assert [(point.step, point.loss) for point in again.points][-1] == (4, 9.0)


def test_steps_of_another_machine_come_from_the_record() -> None:
    record = [{"step": 1, "loss": 5.0, "rows": [1, 2, 3]}, {"step": 2, "loss": 4.0}, {"no": "step"}]
    told = history([{"event": "attempt", "step": 2}, step(3)], record)
    assert [(point.step, point.loss) for point in told.points] == [(1, 5.0), (2, 4.0), (3, 1 / 3)]
    assert told.points[0].rows == 3


@pytest.mark.parametrize(
    "event",
    [
        {"event": "step", "step": "four", "loss": "low"},
        {"event": "step", "step": 4, "loss": math.inf, "ids": 7},
        {"event": "restart", "attempt": "x", "per_device": 3, "reason": None, "step": []},
        {"event": "evaluation", "step": 4, "metrics": [1]},
        {"event": "audit", "lines": {"a": 1}},
        {"event": "plan", "rows": None, "data": 3, "geometry": "8 x 2"},
        {"event": "fidelity", "changes": None},
        {"event": "commit", "step": 4},
        {"event": "start", "versions": 3, "time": "now"},
        {"event": "end"},
        {"event": "nobody knows"},
    ],
)
def test_no_event_is_too_odd(event: dict[str, Any]) -> None:
    told = history([step(1), event])
    assert told.points[0].step == 1


def test_a_long_curve_keeps_its_extremes() -> None:
    points = [Point(n, loss=100.0 if n == 777 else 1.0) for n in range(1, 10_001)]
    found = curve(points, "loss", most=100)
    assert len(found.steps) == 100 and found.steps[-1] == 10_000
    assert max(found.high) == 100.0 and min(found.low) == 1.0


def chose(folder: Path, best: int | None) -> Run:
    """A run of four steps that was evaluated at 2 and 4."""

    def measured(when: str, step: int, share: float) -> dict[str, Any]:
        return {"event": "evaluation", "when": when, "step": step, "metrics": {"exact_match": share}}

    kept = 4 if best is None else best
    shares = {2: 0.9, 4: 0.6}
    told = [
        measured("before", 0, 0.1),
        *(step(n) for n in range(1, 5)),
        measured("after", kept, shares[kept]),
    ]
    told.insert(3, measured("during", 3, 0.0) | {"metrics": {"eval_loss": 2.5}})
    lines = [
        {"step": at, "metrics": {"exact_match": share}, "best": at == best} for at, share in shares.items()
    ]
    chosen = None if best is None else {"step": best, "metric": "exact_match", "value": shares[best]}
    (folder / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told))
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    metrics = {"before": {"exact_match": 0.1}, "after": {"exact_match": shares[kept]}}
    result = {"outcome": "done", "steps": 4, "metrics": metrics, "best": chosen}
    (folder / "result.json").write_text(json.dumps(result))
    return read(folder)


@pytest.mark.parametrize(
    ("best", "answer"),
    [
        (2, [(0, "before", 0.1), (2, "after", 0.9), (4, "during", 0.6)]),
        (4, [(0, "before", 0.1), (2, "during", 0.9), (4, "after", 0.6)]),
        (None, [(0, "before", 0.1), (2, "during", 0.9), (4, "after", 0.6)]),
    ],
)
def test_what_was_measured_last_stands_at_the_step_that_was_kept(
    tmp_path: Path, best: int | None, answer: list[tuple[int, str, float]]
) -> None:
    """Else a curve that fell would end as if it had risen again."""
    run = chose(tmp_path, best)
    found = [(one.step, one.when, one.found.value) for one in evaluated(run, "exact_match")]
    assert found == answer
    (loss,) = evaluated(run, "eval_loss")
    assert (loss.step, loss.found.value) == (3, 2.5), "upstream's own, which the file does not know"
    told = {fact.name: (fact.value, fact.note) for fact in page(run).facts}
    if best is None:
        assert "Exported" not in told
    else:
        value, note = told["Exported"]
        assert value == f"step {best}" and note.startswith("the best of 2 by exact match: chosen on the rows")


def test_every_metric_that_is_measured_is_explained() -> None:
    assert sorted(metrics.MEANING) == sorted([*single.METRICS, *pair.METRICS])


def test_a_comparison_says_over_how_many_rows(tmp_path: Path) -> None:
    for name, n in (("a", 24), ("b", 320)):
        (tmp_path / name).mkdir()
        measured = {"exact_match": {"overall": 0.5, "n": n}}
        result = {"outcome": "done", "metrics": {"before": None, "after": measured}}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    rows = {row.name: row.cells for row in compare.compare([read(tmp_path / name) for name in "ab"]).outcome}
    assert rows["exact match after"] == ("0.50 [0.31, 0.69] n=24", "0.50 [0.45, 0.55] n=320")


def test_every_value_of_a_job_has_its_source() -> None:
    from runner.job.resolved import resolved_yaml

    resolved = resolve(GOOD, ["lora.r=16", "datasets.train.0.system_prompt=# no comment, 'x'"], {})
    data = resolved_yaml(resolved).encode()
    found = {one.key: one for one in values(data)}
    assert (found["lora.r"].value, found["lora.r"].source) == (16, "command line")
    assert found["datasets.train[0].system_prompt"].value == "# no comment, 'x'"
    assert {key: one.source for key, one in found.items()} == {
        key: source for key, source in resolved.sources.items() if key in found
    }
    assert nested(data) == json.loads(resolved.job.model_dump_json())
    assert values(b"name: [") == () and values(b"\xff\xfe") == ()


def test_embedded_json_cannot_end_its_element() -> None:
    text = embedded({"name": "</script><script>alert(1)</script>", "line": "\u2028"})
    assert "<" not in text and "\u2028" not in text
    assert json.loads(text)["name"] == "</script><script>alert(1)</script>"


def test_runs_of_one_name_are_called_by_their_place() -> None:
    class Named:
        def __init__(self, name: str, place: str) -> None:
            self.name, self.place = name, place

    runs: Any = [Named("a", "runs/a"), Named("a", "old/a"), Named("b", "runs/b")]
    assert compare.labelled(runs) == ("runs/a", "old/a", "b")


def test_the_sentence_of_a_verdict_is_plain_text_for_a_terminal() -> None:
    found = verdict.verdict("done", {}, "exact_match", LOW, HIGH, 5, 5)
    assert found.sentence == (
        "Exact match rose from 0.50 to 0.97; a clear gain: the 95 % intervals do not overlap."
    )
    assert verdict.verdict("running", {}, "exact_match", LOW, None, 5, 9).sentence == "Step 5 of 9."
