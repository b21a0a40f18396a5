"""What a cloud says about its machine: real HTTP servers drive real runs, and cannot disturb them.

The servers play the clouds and their faults (tests/metadata_servers.py), the supervisor is real, the trainer
is without torch. Every run that was disturbed ends with what one ends with that nobody disturbed.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from runner.errors import JobError
from runner.request import Reader
from runner.supervisor.metadata import sources, watch
from runner.supervisor.metadata.choose import AZURE_TAG, guessed, source
from runner.supervisor.metadata.http import Unusable, ask
from runner.supervisor.metadata.sources import Aws, Azure, Gce, Sign
from runner.supervisor.metadata.watch import Watch
from runner.supervisor.notices import Notices
from tests.machines import Bench, at
from tests.metadata_servers import MetadataServer, azure_event
from tests.test_team import Pair

CLOUDS = ("aws", "gce", "azure")


@pytest.fixture
def server() -> Iterator[MetadataServer]:
    with MetadataServer() as server:
        yield server


def soon(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def take(server: MetadataServer, cloud: str, seconds: float = 120) -> None:
    """The cloud takes the machine."""
    match cloud:
        case "aws":
            server.aws["spot/instance-action"] = {"action": "terminate", "time": iso(soon(seconds))}
        case "gce":
            server.gce["preempted"] = "TRUE"
        case "azure":
            at = format_datetime(soon(seconds), usegmt=True)
            server.azure.append(azure_event("Preempt", not_before=at))


def impatient() -> None:
    """In the forked command: questions come at once, and answers have to."""
    sources.SECONDS, watch.LONGEST = 0.3, 0.05
    Aws.pause = Gce.pause = Azure.pause = 0.02
    Azure.FIRST = 0.3


# --- whole runs ---


def notified(bench: Bench, server: MetadataServer, cloud: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run whose machine the cloud takes in step 3. Returns what it printed."""
    for name, value in server.environ(cloud).items():
        monkeypatch.setenv(name, value)
    process = bench.start(at("step:3", "wait"), before=impatient)
    bench.wait_for(bench.waiting(), process)
    take(server, cloud)
    code, output = process.finish()
    assert code == 75, output
    return output


@pytest.mark.parametrize("cloud", CLOUDS)
def test_machine_that_is_taken_commits_its_step_and_leaves_with_75(
    bench: Bench, undisturbed: str, server: MetadataServer, cloud: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = notified(bench, server, cloud, monkeypatch)
    assert "takes this machine" in output
    assert "step 3 is committed; the same command goes on" in output
    assert (bench.head().state, bench.head().newest.step) == ("released", 3)
    notice = bench.said("notice")[0]
    assert "takes this machine" in notice["reason"]
    known = notice["seconds"] is not None and 100 < notice["seconds"] <= 120
    assert known is (cloud != "gce")
    monkeypatch.setenv("RUNNER_METADATA", "off")
    code, output = bench.train()
    assert code == 0, output
    assert bench.weights() == undisturbed


FAULTS = ("absent", "slow", "drip", "garbage", "closed", "nonsense", "flapping", "401", "404", "500")


def played(server: MetadataServer, cloud: str, how: str) -> dict[str, str]:
    """The variables that lead to a server that does this wrong."""
    server.how = how
    environ = server.environ(cloud)
    if how != "absent":
        return environ
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
    return {name: value.replace(server.host, nobody) for name, value in environ.items()}


@pytest.mark.parametrize(
    ("how", "cloud"), [(how, CLOUDS[number % len(CLOUDS)]) for number, how in enumerate(FAULTS)]
)
def test_a_service_that_is_none_disturbs_nothing_and_is_said_once(
    bench: Bench,
    undisturbed: str,
    server: MetadataServer,
    cloud: str,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in played(server, cloud, how).items():
        monkeypatch.setenv(name, value)
    process = bench.start(at("step:3", "hold"), before=impatient)
    bench.wait_for(bench.waiting(), process)
    if how != "flapping":
        bench.wait_for(lambda: bool(bench.said("warning")), process)
    asked = len(server.asked)
    if how != "absent":
        bench.wait_for(lambda: len(server.asked) > asked + 2, process)
    (bench.run / "attempts" / "1" / "go").touch()
    code, output = process.finish()
    assert code == 0, output
    assert bench.weights() == undisturbed
    assert bench.result()["restarts"] == []
    assert bench.said("notice") == bench.said("advice") == []
    warnings = [event["message"] for event in bench.said("warning")]
    assert len(warnings) == 1 or (how == "flapping" and not warnings)
    assert all("cannot be used" in text and "remedy" in text for text in warnings)
    assert "Traceback" not in output


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("how", FAULTS)
def test_every_fault_of_every_service_is_an_unusable_one(
    server: MetadataServer, cloud: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SECONDS", 0.2)
    monkeypatch.setattr(Azure, "FIRST", 0.2)
    asked = source(played(server, cloud, how), tmp_path)
    assert asked is not None
    failures = 0
    began = time.monotonic()
    for _ in range(2):
        try:
            assert asked.look() == []
        except Unusable:
            failures += 1
    assert failures == 2
    assert time.monotonic() - began < 2


def test_a_flapping_service_still_takes_the_machine(
    bench: Bench, server: MetadataServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.how = "flapping"
    assert "step 3 is committed" in notified(bench, server, "azure", monkeypatch)


def test_a_token_that_cannot_cross_the_hops_is_named(
    bench: Bench, server: MetadataServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.environ("aws").items():
        monkeypatch.setenv(name, value)
    server.how = "no hops"
    process = bench.start(at("step:3", "hold"), before=impatient)
    bench.wait_for(bench.waiting(), process)
    bench.wait_for(lambda: bool(bench.said("warning")), process)
    (bench.run / "attempts" / "1" / "go").touch()
    code, output = process.finish()
    assert code == 0, output
    assert "HttpPutResponseHopLimit 2" in output
    assert all(asked.startswith("PUT") for asked in server.asked)


ADVICE: dict[str, Callable[[MetadataServer], object]] = {
    "aws": lambda server: server.aws.update(
        {"events/recommendations/rebalance": {"noticeTime": "2026-11-27T08:22:00Z"}}
    ),
    "gce": lambda server: server.gce.update({"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}),
    "azure": lambda server: server.azure.append(azure_event("Redeploy")),
}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_an_advice_saves_once_and_goes_on(
    bench: Bench, undisturbed: str, server: MetadataServer, cloud: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.environ(cloud).items():
        monkeypatch.setenv(name, value)
    before = (
        impatient if cloud != "gce" else lambda: (impatient(), setattr(Gce.__init__, "__defaults__", (0,)))
    )
    process = bench.start(at("step:2", "hold"), before=before, save=100)
    bench.wait_for(bench.waiting(), process)
    ADVICE[cloud](server)
    bench.wait_for(lambda: Reader(bench.run / "attempts" / "1").now().saves == 1, process)
    asked = len(server.asked)
    bench.wait_for(lambda: len(server.asked) > asked + 4, process)  # it is said again and again
    (bench.run / "attempts" / "1" / "go").touch()
    code, output = process.finish()
    assert code == 0, output
    assert [event["step"] for event in bench.said("checkpoint")] == [2, 6]
    assert len(bench.said("advice")) == 1 and bench.said("notice") == []
    assert "saving now, and going on" in output
    assert bench.weights() == undisturbed


def test_a_notice_on_any_node_reaches_node_0(
    bench: Bench, tmp_path: Path, server: MetadataServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node 1 alone asks its cloud: an advice first, then the end."""
    ADVICE["aws"](server)
    for name, value in server.environ("aws").items():
        monkeypatch.setenv(name, value)
    pair = Pair(
        bench,
        tmp_path / "one",
        lambda index: impatient() if index else os.environ.update(RUNNER_METADATA="off"),
    )
    zero, one = pair.start({**at("step:4", "wait"), "rank": 0})
    try:
        bench.wait_for(lambda: bool(bench.said("advice")), zero)
        take(server, "aws")
        assert zero.finish()[0] == one.finish()[0] == 75, zero.output() + one.output()
    finally:
        for command in pair.commands:
            if command.poll() is None:
                command.send(signal.SIGKILL)
    assert bench.said("advice")[0]["reason"].endswith(" on node 1")
    notice = bench.said("notice")[0]
    assert notice["reason"].endswith(" on node 1") and 100 < notice["seconds"] <= 120


# --- what is asked, and what counts ---


@pytest.mark.parametrize(
    ("environ", "dmi", "cloud"),
    [
        ({}, {}, None),
        ({}, {"sys_vendor": "LENOVO", "product_name": "20XW"}, None),
        ({}, {"sys_vendor": "Microsoft Corporation", "product_name": "Virtual Machine"}, None),  # Hyper-V
        ({}, {"sys_vendor": "Amazon EC2"}, "aws"),
        ({}, {"sys_vendor": "Xen", "bios_version": "4.11.amazon"}, "aws"),
        ({}, {"sys_vendor": "Google", "product_name": "Google Compute Engine"}, "gce"),
        ({}, {"sys_vendor": "Google", "product_name": "Coral"}, None),
        ({}, {"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": AZURE_TAG}, "azure"),
        ({"AWS_BATCH_JOB_ID": "a"}, {}, "aws"),
        ({"AWS_BATCH_JOB_ID": "a", "AWS_EXECUTION_ENV": "AWS_ECS_FARGATE"}, {}, None),
        ({"BATCH_TASK_INDEX": "0", "BATCH_TASK_COUNT": "1"}, {}, "gce"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {"sys_vendor": "Amazon EC2"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "AWS_BATCH_JOB_ID": "a"}, {}, None),  # Batch on EKS
    ],
)
def test_cloud_is_known_without_a_network(
    tmp_path: Path, environ: dict[str, str], dmi: dict[str, str], cloud: str | None
) -> None:
    for name, value in dmi.items():
        (tmp_path / name).write_text(f"{value}\n")
    assert guessed(environ, tmp_path) == cloud
    kind = {None: type(None), "aws": Aws, "gce": Gce, "azure": Azure}[cloud]
    assert type(source(environ, tmp_path)) is kind


@pytest.mark.parametrize(
    ("environ", "kind"),
    [
        ({"RUNNER_METADATA": "off", "AWS_BATCH_JOB_ID": "a"}, None),
        ({"RUNNER_METADATA": "aws", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, Aws),
        ({"RUNNER_METADATA": "aws", "AWS_EC2_METADATA_DISABLED": "true"}, None),
        ({"RUNNER_METADATA": "aws", "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "IPv6"}, Aws),
        ({"RUNNER_METADATA": "gce"}, Gce),
        ({"RUNNER_METADATA": "azure"}, Azure),
    ],
)
def test_what_is_said_is_asked(tmp_path: Path, environ: dict[str, str], kind: type | None) -> None:
    found = source(environ, tmp_path)
    assert found is None if kind is None else type(found) is kind


def test_word_that_is_none_is_78(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_METADATA", "amazon")
    code, output = bench.train()
    assert code == JobError.exit_code
    assert "RUNNER_METADATA='amazon'" in output and "write auto, off, aws, gce or azure" in output


@pytest.mark.parametrize(
    ("kind", "sign"),
    [("Preempt", "stop"), ("Terminate", "stop"), ("Reboot", "save"), ("Redeploy", "save"), ("Freeze", None)],
)
def test_azure_events(server: MetadataServer, kind: str, sign: str | None) -> None:
    azure = Azure(f"http://{server.host}")
    server.azure = [azure_event(kind, "gpu-set_4"), azure_event(kind, status="Completed")]
    assert azure.look() == []
    server.azure.append(azure_event(kind, not_before=format_datetime(soon(40), usegmt=True)))
    found = azure.look()
    assert [one.kind for one in found] == ([] if sign is None else [sign])
    if sign == "stop":
        assert 30 < (found[0].seconds or 0) <= 40
        server.azure[-1] = azure_event(kind, status="Started")
        assert [one.seconds for one in azure.look()] == [None]
    assert sum("compute/name" in asked for asked in server.asked) == 1


@pytest.mark.parametrize(
    ("action", "at", "seconds"),
    [
        ("terminate", 120, 120),
        ("stop", 60, 60),
        ("hibernate", 60, None),  # begins at once
        ("terminate", -5, None),  # has passed: the notice is known to be wrong
    ],
)
def test_aws_actions(server: MetadataServer, action: str, at: int, seconds: float | None) -> None:
    server.aws["spot/instance-action"] = {"action": action, "time": iso(soon(at))}
    (sign,) = Aws(f"http://{server.host}").look()
    assert sign.kind == "stop" and action in sign.reason
    assert sign.seconds == (None if seconds is None else pytest.approx(seconds, abs=3))


def test_aws_token_that_has_ended_is_fetched_anew(
    server: MetadataServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    aws = Aws(f"http://{server.host}")
    assert aws.look() == []
    monkeypatch.setattr("tests.metadata_servers.TOKEN", "another")
    assert aws.look() == []
    assert sum(asked.startswith("PUT") for asked in server.asked) == 2


def test_gce_waits_for_a_change(server: MetadataServer) -> None:
    gce = Gce(f"http://{server.host}")
    assert gce.look() == []
    threading.Timer(0.2, take, (server, "gce")).start()
    began = time.monotonic()
    assert [sign.kind for sign in gce.look()] == ["stop"]
    assert 0.1 < time.monotonic() - began < 5
    assert "wait_for_change=true" in server.asked[2]


@pytest.mark.parametrize("how", ["slow", "404", "500", "nonsense"])
def test_a_stop_is_heard_whatever_becomes_of_the_other_question(
    server: MetadataServer, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SECONDS", 0.3)
    take(server, "aws")
    take(server, "gce")
    well = server.answer

    def answer(request: BaseHTTPRequestHandler) -> None:
        server.how = how if request.path.endswith(("/rebalance", "/maintenance-event")) else "well"
        well(request)

    monkeypatch.setattr(server, "answer", answer)
    for asked in (Aws(f"http://{server.host}"), Gce(f"http://{server.host}")):
        assert [sign.kind for sign in asked.look()] == ["stop"]


def test_an_azure_event_is_heard_beside_one_that_is_none(server: MetadataServer) -> None:
    server.azure = [{"EventId": "x"}]
    azure = Azure(f"http://{server.host}")
    with pytest.raises(Unusable):
        azure.look()
    take(server, "azure")
    assert [sign.kind for sign in azure.look()] == ["stop"]


def test_a_google_machine_without_maintenance_events_is_asked_on(server: MetadataServer) -> None:
    well = server.answer

    def answer(request: BaseHTTPRequestHandler) -> None:
        server.how = "404" if request.path.endswith("/maintenance-event") else "well"
        well(request)

    server.answer = answer  # type: ignore[method-assign]
    gce = Gce(f"http://{server.host}", wait=0)
    assert [gce.look(), gce.look()] == [[], []]
    assert "wait_for_change" in server.asked[2]


@pytest.mark.parametrize("at", ["soon", "2026-11-27\ud80008:22:00Z", 3, None, "2026-99-99T00:00:00Z"])
def test_a_time_that_is_none_is_not_repeated(server: MetadataServer, at: object) -> None:
    server.aws["spot/instance-action"] = {"action": "terminate", "time": at}
    (sign,) = Aws(f"http://{server.host}").look()
    assert (sign.kind, sign.seconds, sign.reason) == ("stop", None, "AWS takes this machine: terminate")


@pytest.mark.parametrize("endpoint", ["http://host:port", "http://[bad", "http://host:99999", "host", ""])
def test_an_address_that_is_none_is_an_unusable_service(endpoint: str) -> None:
    for asked in (Aws(endpoint), Gce(endpoint), Azure(endpoint)):
        with pytest.raises(Unusable):
            asked.look()


def test_a_service_that_is_gone_for_days_is_asked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        name, pause = "gone", 1.0
        asked, enough = 0, threading.Event()

        def look(self) -> list[Sign]:
            self.asked += 1
            if self.asked == 1500:
                self.enough.set()
            raise Unusable("no answer")

    monkeypatch.setattr(watch, "LONGEST", 0.0)
    gone, said = Gone(), []
    with Notices() as notices, Watch(gone, notices, said.append):
        assert gone.enough.wait(10)
    assert len(said) == 1


def test_a_long_wait_that_ends_without_a_change_is_no_failure(server: MetadataServer) -> None:
    gce = Gce(f"http://{server.host}", wait=0)
    assert [gce.look() for _ in range(3)] == [[], [], []]


def test_time_of_an_answer_is_bounded_however_slowly_it_comes(server: MetadataServer) -> None:
    server.how = "drip"
    began = time.monotonic()
    with pytest.raises(Unusable, match=r"no answer within 0\.3 s"):
        ask("GET", f"http://{server.host}", "/", {}, 0.3)
    assert time.monotonic() - began < 2


def test_proxies_of_the_environment_are_not_asked(server: MetadataServer) -> None:
    assert os.environ["HTTP_PROXY"]  # a closed port
    assert Aws(f"http://{server.host}").look() == []


def test_nobody_is_told_anything_after_the_end(server: MetadataServer) -> None:
    class Late:
        name, pause = "late", 0.0
        asked, go = threading.Event(), threading.Event()

        def look(self) -> list[Sign]:
            self.asked.set()
            self.go.wait(10)
            return [Sign("stop", "x", "too late")]

    late, said = Late(), []
    with Notices() as notices:
        with Watch(late, notices, said.append):
            assert late.asked.wait(10)
        late.go.set()
        time.sleep(0.05)
        assert notices.first is None and said == []


def test_a_signal_after_the_cloud_hurries_nobody() -> None:
    """AWS says it two minutes before, and the orchestrator's SIGTERM follows: both mean the same end."""
    now = [0.0]
    with Notices(clock=lambda: now[0]) as notices:
        notices.hear("AWS takes this machine", 120)
        now[0] = 100.0
        os.kill(os.getpid(), signal.SIGTERM)
        assert (notices.first, notices.hurry, notices.left) == ("AWS takes this machine", False, 20)
        notices.hear("AWS takes this machine", 5)
        notices.hear("AWS takes this machine on node 2", 50)
        assert notices.left == 5
