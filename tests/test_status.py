"""`runner status`: where a run stands, from its bucket alone, on another machine and without writing.

What rights it needs is in tests/test_iam.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

from runner import cli
from runner.checkpoint.head import Entry, Head, Owner
from runner.status.standing import State, standing, state_of
from runner.status.verb import document, text
from runner.supervisor.now import LOSSES, Now
from runner.supervisor.result import Record
from tests.machines import Bench, World, at, hasty


def status(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["status", *words, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def stopped_waiting(bench: Bench, process: Any) -> None:
    process.send(signal.SIGTERM)
    code, output = process.finish()
    assert code == 75, output


# --- whole runs ---


def test_a_life_seen_from_another_machine(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training, stopped, taken over, dead without a word, taken over again, done."""
    uri = f"{world.uri}/bench"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    def state() -> str:
        return str(status([uri], capsys)["state"])

    first = world.first
    process = first.start(at("step:4", "wait"), save=100, before=hasty)
    first.wait_for(first.waiting(), process)
    first.wait_for(lambda: status([uri], capsys)["step"] == 3, process)
    world.proxy.clear()
    seen = status([uri], capsys)
    assert {method for method, _ in world.proxy.requests if method != "GET"} <= {"PUT"}  # of the run itself
    assert seen["state"] == "running" and seen["phase"] == "train"
    assert (seen["step"], seen["steps"], seen["attempts"]) == (3, 6, 1)
    assert seen["loss"]["last"] == pytest.approx(1 / 3)
    assert seen["at_risk"] == pytest.approx(1.5)  # three steps of half a second, and nothing is committed
    assert seen["eta"] == pytest.approx(1.5)
    assert (seen["checkpoint"], seen["preemptions"], seen["error"]) == (None, 0, None)
    assert seen["lease_age"] < 5
    stopped_waiting(first, process)
    seen = status([uri], capsys)
    assert (seen["state"], seen["exit_code"], seen["checkpoint_step"]) == ("preempted", 75, 4)
    assert seen["step"] == 4 and seen["at_risk"] is None and seen["eta"] is None
    assert seen["error"].startswith("SIGTERM") and seen["checkpoint_age"] < 20
    assert [event["event"] for event in seen["events"]][-1] == "end"
    assert {"notice", "commit"} <= {event["event"] for event in seen["events"]}

    second = world.machine()
    process = second.start(at("step:6", "wait", attempt=2), before=hasty)
    second.wait_for(second.waiting(2), process)
    second.wait_for(lambda: state() == "running", process)
    os.kill(process.pid, signal.SIGKILL)
    process.finish()
    second.wait_for(lambda: state() == "lost")
    lost = status([uri], capsys)
    assert lost["step"] == lost["checkpoint_step"] == 4 and lost["at_risk"] == pytest.approx(0.5)

    third = world.machine()
    code, output = third.train(before=hasty)
    assert code == 0, output
    world.proxy.clear()
    seen = status([uri], capsys)
    assert {method for method, _ in world.proxy.requests} == {"GET"}
    assert (seen["state"], seen["step"], seen["attempts"]) == ("done", 6, 3)
    assert (seen["preemptions"], seen["noticed"], seen["lost"]) == (2, 1, 1)
    assert [one["step"] for one in seen["restarts"]] == [4, 4]
    assert list(elsewhere.iterdir()) == []
    assert cli.main(["status", uri]) == 0
    said = capsys.readouterr().out
    assert f"{uri}\n  done\n  step 6 of 6, loss 0.1667" in said
    assert "attempts 3, preemptions survived 2 (1 after a notice, 1 without)" in said
    assert "attempt 2 from step 4: preempted: SIGTERM" in said


def test_a_run_is_named_by_its_job_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.train(at("step:3", "crash:65"))[0] == 65
    monkeypatch.chdir(bench.path)
    seen = status(["job.yaml"], capsys)
    assert (seen["state"], seen["exit_code"], seen["step"]) == ("failed", 65, 2)
    assert "row 3 of data is bad" in seen["error"]
    by_folder = status(["runs/bench"], capsys)
    moving = ("lease_age", "checkpoint_age")
    assert {key: by_folder[key] for key in seen if key not in moving} == {
        key: seen[key] for key in seen if key not in moving
    }


def test_no_run_is_65_and_no_right_is_77(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.first.train()[0] == 0
    assert cli.main(["status", f"{world.uri}/other"]) == 65
    assert "no run is there" in capsys.readouterr().err
    assert cli.main(["status", world.uri]) == 65
    assert "below it are bench" in capsys.readouterr().err
    world.proxy.fail("GET", "/HEAD", "403 AccessDenied", times=100)
    assert cli.main(["status", f"{world.uri}/bench"]) == 77
    assert cli.main(["status", "nowhere.yaml"]) == 78


def test_a_lost_head_is_said_with_its_remedy(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.first.train()[0] == 0
    store = world.store()
    store.delete("HEAD")
    store.close()
    assert cli.main(["status", f"{world.uri}/bench"]) == 65
    assert "runner checkpoints adopt" in capsys.readouterr().err


# --- tables ---


def head(state: str, record: Mapping[str, Any] | None = None, **fields: Any) -> Head:
    owner = Owner(attempt="a", host="h")
    return Head(
        state=state,  # type: ignore[arg-type]
        epoch=2,
        owner=owner,
        seq=1,
        nonce="n",
        ttl_s=60,
        record={} if record is None else dict(record),
        **fields,
    )


ENDED = {"event": "end", "outcome": "failed", "exit_code": 93, "error": "no progress"}


@pytest.mark.parametrize(
    ("held", "age", "now", "last", "answer"),
    [
        ("done", 9000, None, None, "done"),
        ("removing", 1, None, None, "removing"),
        ("released", 9000, None, {**ENDED, "outcome": "preempted"}, "preempted"),
        ("released", 9000, None, ENDED, "failed"),
        ("released", 9000, None, None, "released"),
        ("released", 9000, None, {"event": "attempt"}, "released"),
        ("held", 61, Now(epoch=2, phase="train"), None, "lost"),
        ("held", 59, Now(epoch=2, phase="train"), None, "running"),
        ("held", None, Now(epoch=2, phase="load"), None, "running"),
        ("held", 1, Now(epoch=2, phase="wait"), None, "waiting"),
        ("held", 1, Now(epoch=2, phase="start"), None, "starting"),
        ("held", 1, Now(epoch=1, phase="train"), None, "starting"),  # what its predecessor left
        ("held", 1, Now(epoch=1, phase=None), ENDED, "starting"),
        ("held", 1, Now(epoch=2, phase=None), ENDED, "ending"),
    ],
)
def test_state_table(
    held: str, age: float | None, now: Now | None, last: dict[str, Any] | None, answer: State
) -> None:
    record = Record(last=last, now=now or Now())
    assert state_of(head(held), age, record) == answer
    seen = standing(head(held, record.model_dump(mode="json")), age, None, [])
    assert seen.state == answer
    assert (seen.error is not None) == (answer in ("preempted", "failed"))


def test_what_nobody_has_written_is_unknown() -> None:
    for record in ({}, {"attempts": "many"}):
        seen = standing(head("held", record), 1, None, [])
        assert seen.state == "starting"
        assert (seen.step, seen.steps, seen.loss, seen.eta, seen.at_risk) == (None,) * 5
        assert (seen.attempts, seen.preemptions) == (None, None)


def test_a_record_of_before_this_was_kept_is_read() -> None:
    seen = standing(
        head("released", {"attempts": 4, "last": {"event": "end", "outcome": "failed"}}), 1, None, []
    )
    assert (seen.state, seen.attempts, seen.steps, seen.exit_code) == ("failed", 4, None, None)


def step(number: int, loss: float = 1.0, seconds: float = 2.0) -> dict[str, Any]:
    return {"event": "step", "step": number, "steps": 50, "loss": loss, "seconds": seconds}


def after(*events: dict[str, Any]) -> Now:
    now = Now()
    for event in events:
        now = now.after(event)
    return now


def test_work_at_risk_is_what_no_commit_has() -> None:
    begin = {"event": "attempt", "step": 0}
    saved = {"event": "checkpoint", "id": "a"}
    committed = {"event": "commit", "id": "a"}
    assert after(begin, step(1), step(2)).at_risk == 4
    assert after(begin, step(1), saved, step(2)).at_risk == 4
    assert after(begin, step(1), saved, step(2), committed).at_risk == 2
    assert after(begin, step(1), {"event": "commit", "id": "leftover"}).at_risk == 2
    assert after(begin, step(1), saved, step(2), {"event": "attempt", "step": 1}).at_risk == 0


def test_a_commits_own_write_of_head_tells_of_no_work_that_it_committed() -> None:
    """The record in it is of the moment before."""
    now = after(step(1), step(2), {"event": "checkpoint", "id": "a"}, step(3))
    record = {"attempts": 1, "now": {**now.model_dump(), "epoch": 2, "phase": "wait"}}
    entry = Entry(id="a", step=2, key="manifests/a.json", manifest_sha256="0" * 64)
    assert standing(head("held", record, retained=(entry,)), 1, 1, []).at_risk == 2
    assert standing(head("held", record), 1, None, []).at_risk == 6


def test_losses_are_few_finite_and_of_the_steps_that_count() -> None:
    now = after(*(step(number, 1 / number) for number in range(1, 40)), step(40, float("nan")))
    assert len(now.losses) == LOSSES and now.losses[-1] == (39, 1 / 39) and now.step == 40
    assert Now.model_validate_json(now.model_dump_json()) == now
    assert after(step(1), step(2), {"event": "attempt", "step": 1}).losses == [(1, 1.0)]
    odd = after(step(1, seconds=float("inf")), step(2, seconds=-1.0))
    assert (odd.trained, odd.step_seconds) == (0, 0)


@pytest.mark.parametrize(
    ("losses", "trend"),
    [
        ([1.0], None),
        ([1.0, 0.9, 0.8], None),
        ([1.0, 1.0, 0.9, 0.9], "falling"),
        ([1.0, 1.0, 1.1, 1.1], "rising"),
        ([1.0, 1.0, 0.99, 1.0], "flat"),
    ],
)
def test_trend(losses: list[float], trend: str | None) -> None:
    record = Record(now=Now(steps=9, losses=list(enumerate(losses))))
    seen = standing(head("held", record.model_dump(mode="json")), 1, None, [])
    assert seen.loss is not None and (seen.loss.last, seen.loss.trend) == (losses[-1], trend)


def test_noise_is_left_out_of_the_last_events() -> None:
    events = [{"event": "owner"}, *({"event": "step"} for _ in range(30)), {"event": "commit", "id": "a"}]
    seen = standing(head("held"), 1, None, events)
    assert [event["event"] for event in seen.events] == ["owner", "commit"]


@pytest.mark.parametrize("time", [float("nan"), float("inf"), 10**400, "noon", None])
def test_what_is_odd_is_shown_as_far_as_it_goes(time: Any) -> None:
    record = {
        "last": {"event": "end", "outcome": "failed", "error": 3},
        "restarts": [{"step": 1}],
        "now": {"epoch": 2, "phase": "\x1b[2J"},
    }
    for state in ("held", "released"):
        odd = head(state, record).model_copy(update={"owner": Owner(attempt="a", host="h\x1b[2J")})
        said = text("place", standing(odd, 1, None, [{"event": "notice", "time": time}]))
        assert "    ?  notice" in said and "attempt None from step 1" in said
        assert "\x1b" not in said


def test_half_a_step_in_the_events_is_none() -> None:
    whole = after(step(1))
    for half in ({"step": 2}, {"step": 2, "steps": 50}, {**step(2), "loss": None}):
        assert whole.after({"event": "step", **half}) == whole


# --- the docs ---

DOCS = Path(__file__).parents[1] / "docs"


def test_commands_of_the_docs_do_what_they_say(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", (DOCS / "status.md").read_text("utf-8"), re.DOTALL)
    world.uri = "s3://bucket/prefix"
    in_bucket = world.machine()
    here = Bench.beside(in_bucket, tmp_path)
    for bench, uri in ((in_bucket, world.uri), (here, None)):
        bench.job |= {"name": "my-charts", "checkpoints": {"uri": uri}}
        code, output = bench.train()
        assert code == 0, output
    (tmp_path / "jobs").symlink_to(DOCS.parent / "jobs")
    monkeypatch.chdir(tmp_path)
    codes = [cli.main(line.split()[1:]) for line in block.splitlines()]
    assert codes == [0, 65, 0]  # nobody has trained demo-sft there
    assert capsys.readouterr().out.startswith("s3://bucket/prefix/my-charts\n  done\n")


def test_tables_of_the_docs_name_every_state_and_key() -> None:
    text = (DOCS / "status.md").read_text("utf-8")
    states, keys = (
        {
            word
            for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
            for word in re.findall(r"`(\w+)`", row)
        }
        for table in text.split("`--json`, null")
    )
    assert states == set(get_args(State))
    assert keys == set(document("place", standing(head("held"), 1, None, [])))
