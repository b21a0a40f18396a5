"""`runner list`: a row for every run of this machine or under a URI, whatever is wrong with one of them.

What rights it needs is in tests/test_iam.py.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any, get_args

import pytest

from runner import cli
from runner.checkpoint.head import HEAD
from runner.checkpoint.place import open_store
from runner.checkpoint.store import BootClock, Patience, Store
from runner.status import rows, runs
from runner.status.rows import Row, Size, Trouble, ago, fitted, newest_first, table
from tests.machines import Bench, World, at
from tests.runs_in_store import Clock, Run, overwrite

DOCS = Path(__file__).parents[1] / "docs"

TOLD_APART = 3.0
"""Seconds between two writes whose order S3 can tell: an age is the difference of two whole seconds, and two
objects are read one after the other."""


def listed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """The rows by name, in order."""
    capsys.readouterr()
    assert cli.main(["list", *words, "--json"]) == code
    found = json.loads(capsys.readouterr().out)["runs"]
    return {one["name"]: one for one in found}


def status(capsys: pytest.CaptureFixture[str], where: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["status", where, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def store_of(place: str) -> Store:
    return open_store(place, Patience(60, BootClock(), lambda event: None))


# --- a bucket ---


def test_every_run_of_a_bucket_is_a_row_and_status_says_the_same(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One done, one stopped, one at work, and four that are broken in their ways."""
    first = world.first
    assert first.train()[0] == 0
    time.sleep(TOLD_APART)
    stopped = world.machine()
    stopped.job["name"] = "stopped"
    assert stopped.train(at("step:3", "crash:65"))[0] == 65
    time.sleep(TOLD_APART)
    stores = {name: store_of(f"{world.uri}/{name}") for name in ("live", "damaged", "lost", "denied")}
    for name, store in stores.items():
        Run(store, tmp_path, Clock(), name).taken().commit(2)
    overwrite(stores["damaged"], HEAD, b'{"format": 1}')
    stores["lost"].delete(HEAD)
    nothing = store_of(f"{world.uri}/no-run/of")
    nothing.create("ours", b"")
    world.proxy.clear()
    world.proxy.fail("GET", "/denied/HEAD", "403 AccessDenied", times=100)
    monkeypatch.setattr(runs, "TOGETHER", 1)  # what was answered for one run before says nothing of the next

    found = listed(capsys, world.uri)
    assert {method for method, _ in world.proxy.requests} == {"GET"}
    # The names; of each HEAD and size, or what else a place without HEAD has; a denial is not asked twice.
    assert len(world.proxy.requests) == 1 + 3 * 2 + 1 + 1 + 2 * 2
    states = {name: one["state"] for name, one in found.items()}
    assert states == {
        "bench": "done",
        "stopped": "failed",
        "live": "starting",
        "damaged": "broken",
        "lost": "broken",
        "denied": "denied",
    }
    assert list(found)[:3] == ["live", "stopped", "bench"]
    assert (
        "runner checkpoints adopt" in found["lost"]["problem"]
        and "AccessDenied" in found["denied"]["problem"]
    )
    assert found["live"]["bytes"] > 100 and found["live"]["bytes_whole"]
    for name in ("bench", "stopped"):
        detail = status(capsys, found[name]["where"])
        for key in ("place", "state", "step", "steps", "metrics", "exit_code"):
            assert found[name][key] == detail[key], (name, key)
    assert (found["stopped"]["step"], found["stopped"]["steps"], found["stopped"]["exit_code"]) == (2, 6, 65)

    assert cli.main(["list", world.uri]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^stopped +failed +2/6 +loss 0\.5000 +\d+s ago +[\d.]+ kB +s3://", out, re.MULTILINE)
    assert re.search(r"^damaged +broken +- +- +- +- +s3://.*/damaged$", out, re.MULTILINE)
    assert "denied: GetObject" in err and "damaged: s3://" in err

    assert set(listed(capsys, f"{world.uri}/bench")) == {"bench"}  # a run by its own address
    monkeypatch.chdir(stopped.path)
    here = listed(capsys, "runs", world.uri)  # its folder here is another way to the same run
    assert here["stopped"]["where"] == "runs/stopped" and here["stopped"]["place"] == f"{world.uri}/stopped"
    assert len(here) == 6
    assert status(capsys, "runs/stopped")["state"] == "failed"
    for store in (*stores.values(), nothing):
        store.close()


def test_a_silent_bucket_is_a_row_for_each_run_of_this_machine_and_is_asked_once(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = world.first
    for number in range(20):
        folder = first.runs / f"other-{number}"
        folder.mkdir(parents=True)
        (folder / "job.yaml").write_text(f"{{name: other-{number}, checkpoints: {{uri: '{world.uri}'}}}}")
    monkeypatch.setattr(runs, "PATIENCE", 0.4)
    monkeypatch.chdir(first.path)
    world.proxy.clear()
    world.proxy.fail("GET", "", "503", times=10_000)
    found = listed(capsys)
    assert len(found) == 20 and {one["state"] for one in found.values()} == {"silent"}
    assert len(world.proxy.requests) <= runs.TOGETHER
    world.proxy.clear()
    world.proxy.fail("GET", "", "503", times=10_000)
    assert cli.main(["list", "s3://bucket/other", "runs"]) == 74
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 21 and "503" in err


# --- folders ---


def test_runs_of_this_machine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(bench.path)
    assert cli.main(["list"]) == 0 and capsys.readouterr().out == "no runs in runs\n"
    assert bench.train()[0] == 0
    (bench.runs / "no-run").mkdir()
    (bench.runs / "begun").mkdir()
    (bench.runs / "begun" / ".lock").touch()
    (bench.runs / "torn").mkdir()
    (bench.runs / "torn" / "job.yaml").write_text("{")
    found = listed(capsys)
    assert {name: one["state"] for name, one in found.items()} == {
        "bench": "done",
        "begun": "empty",
        "torn": "broken",
    }
    one = found["bench"]
    assert (one["step"], one["steps"], one["where"], one["age"] < 60) == (6, 6, "runs/bench", True)
    assert 10_000 < one["bytes"] < 100_000  # newest/ and the end are linked, and counted once
    assert cli.main(["list", "runs/bench"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == list(rows.COLUMNS)
    assert re.search(r"^bench +done +6/6 +\S.* runs/bench$", out, re.MULTILINE)
    monkeypatch.setattr(runs, "COUNTED", 3)
    assert not listed(capsys)["bench"]["bytes_whole"]
    assert cli.main(["list", "nowhere", "runs"]) == 65
    out, err = capsys.readouterr()
    assert "bench" in out and err.startswith("list nowhere: no such folder")


def test_an_address_that_leads_nowhere_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "gs://bucket/x"]) == 64
    assert "gs:// is not spoken here" in capsys.readouterr().err


# --- the table ---

CHART = Row(
    "my-charts",
    "runs/my-charts",
    "/x/runs/my-charts/checkpoints",
    "done",
    20,
    20,
    {"before": {"relaxed_accuracy": {"overall": 0.0}}, "after": {"relaxed_accuracy": {"overall": 0.92}}},
    0.1,
    7300.0,
    Size(1_400_000, True),
)
SPOT = Row(
    "spot",
    "s3://bucket/runs/spot",
    "s3://bucket/runs/spot",
    "running",
    13,
    750,
    {"before": {"preference_accuracy": {"overall": 0.5, "low": 0.4, "high": 0.6}}, "after": None},
    0.412,
    4.2,
    Size(8_100_000, False),
)
FRESH = Row("fresh", "runs/fresh", "/x/runs/fresh/checkpoints", "starting", metrics=SPOT.metrics)


def test_the_table_is_aligned() -> None:
    assert table([CHART, SPOT, FRESH], None).splitlines() == [
        "NAME       STATE     STEP    METRIC                         UPDATED  SIZE     WHERE",
        "my-charts  done      20/20   relaxed accuracy 0.00 -> 0.92  2h ago   1.4 MB   runs/my-charts",
        "spot       running   13/750  loss 0.4120                    4s ago   >8.1 MB  s3://bucket/runs/spot",
        "fresh      starting  -       preference accuracy 0.50 -> -  -        -        runs/fresh",
    ]


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (100, "relaxed accuracy 0.00 -> 0.92  2h ago   1.4 MB   runs/my-charts"),
        (90, "0.00 -> 0.92  2h ago   1.4 MB   runs/my-charts"),
        (75, "0.00 -> 0.92  2h ago   1.4 MB   runs/my-charts"),
        (72, "0.00 -> 0.92  2h ago   1.4 MB   ...my-charts"),
        (10, "0.00 -> 0.92  2h ago   1.4 MB   ...my-charts"),
    ],
)
def test_the_table_fits_a_terminal_as_far_as_it_can(width: int, line: str) -> None:
    lines = table([CHART, SPOT, FRESH], width).splitlines()
    assert lines[1] == f"my-charts  done      20/20   {line}"
    assert width < 73 or max(map(len, lines)) <= width
    (long,) = fitted([["x" * 45, "done", "1/1", "loss 0.1", "1s ago", "1 B", "runs/x"]], 70)
    assert re.fullmatch(r"x+\.\.\.", long[0]) and len(table_of(long)) <= 70


def table_of(cells: list[str]) -> str:
    return rows.aligned([rows.COLUMNS, cells])[1]


def test_rows_are_newest_first_and_each_place_once() -> None:
    twice = Row("my-charts", "/elsewhere", CHART.place, "done", age=1.0)
    assert [row.where for row in newest_first([FRESH, CHART, SPOT, twice])] == [
        *("s3://bucket/runs/spot", "runs/my-charts", "runs/fresh")
    ]


def test_ages_in_words() -> None:
    ages = (None, 0.4, 89.0, 90.0, 5399.0, 5400.0, 172_799.0, 172_800.0)
    assert [ago(age) for age in ages] == [
        *("-", "0s ago", "89s ago", "1m ago", "89m ago", "1h ago", "47h ago", "2d ago")
    ]


def test_the_docs_name_every_state_and_key_of_a_row() -> None:
    text = (DOCS / "list.md").read_text("utf-8")
    states, keys = (
        set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", part, re.MULTILINE))))
        for part in text.split("`--json`")
    )
    assert states == set(get_args(Trouble))
    assert keys == set(rows.document([CHART])["runs"][0])
