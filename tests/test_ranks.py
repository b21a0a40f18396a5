"""A child process from start to end: what it begins with, what ends it, and what wakes its supervisor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.errors import Preempted, RunnerError
from runner.events import Event
from runner.manifest import Job
from runner.supervisor import fetching, ranks
from runner.supervisor.fetch import Request
from runner.supervisor.notices import Notices
from runner.supervisor.ranks import SHIM, Child, Exit, watch
from tests.small_job import SMALL

SLEEP = "import signal; signal.pause()"

FACTS = """
import ctypes, json, os, signal
number = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(number), 0, 0, 0)  # PR_GET_PDEATHSIG
ignored = next(line for line in open("/proc/self/status") if line.startswith("SigIgn:"))
told = {
    "pdeathsig": number.value,
    "oom_score_adj": int(open("/proc/self/oom_score_adj").read()),
    "leader": os.getsid(0) == os.getpid(),
    "parent": os.getppid(),
    "word": os.environ.get("WORD"),
    "arguments": os.sys.argv[1:],
    "stdin": os.read(0, 1).decode(),
}
os.write(int(os.environ["RUNNER_EVENTS_FD"]), json.dumps({"event": "told", **told}).encode())
"""


class Watch:
    """`watch` with what its callbacks were given."""

    def __init__(self, path: Path, notices: Notices, program: str | list[str]) -> None:
        self._notices = notices
        self._command = [sys.executable, "-c", program] if isinstance(program, str) else program
        self.log = path / "log"
        self.events: list[Event] = []
        self.asked: list[str] = []
        self.ticks = 0

    def run(
        self, tick: Callable[[], str | None] = lambda: None, ends_at_notice: bool = False, **environ: str
    ) -> Exit:
        def on_notice(reason: str) -> bool:
            self.asked.append(reason)
            return ends_at_notice

        def on_tick() -> str | None:
            self.ticks += 1
            return tick()

        return watch(
            [Child(self._command, {**os.environ, **environ}, self.log)],
            notices=self._notices,
            on_event=self.events.append,
            on_notice=on_notice,
            on_tick=on_tick,
        )


@pytest.fixture
def notices() -> Iterator[Notices]:
    with Notices() as notices:
        yield notices


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tick by time: what does not wake the loop fails by being late."""
    monkeypatch.setattr(ranks, "TICK", 60.0)


def soon(began: float) -> bool:
    return time.monotonic() - began < 30


# --- the start ---


@pytest.mark.skipif(sys.platform != "linux", reason="the lifeline does it elsewhere")
def test_a_child_begins_with_all_that_ties_it_to_us(tmp_path: Path, notices: Notices) -> None:
    one = Watch(tmp_path, notices, [sys.executable, "-c", FACTS, "a b", "", "ü"])
    assert one.run(WORD="said") == Exit(0)
    assert one.log.read_text() == ""
    (told,) = one.events
    assert told == {
        "event": "told",
        "pdeathsig": signal.SIGKILL,
        "oom_score_adj": 1000,
        "leader": True,
        "parent": os.getpid(),
        "word": "said",
        "arguments": ["a b", "", "ü"],
        "stdin": "",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_ignores_no_signal_that_we_do(tmp_path: Path, notices: Notices) -> None:
    """Python ignores SIGPIPE; of a shell's pipe that would make an endless writer."""
    one = Watch(tmp_path, notices, ["grep", "SigIgn", "/proc/self/status"])
    assert one.run() == Exit(0)
    ignored = int(one.log.read_text().split()[1], 16)
    assert not any(ignored & 1 << number - 1 for number in (signal.SIGPIPE, signal.SIGXFSZ))


def test_children_start_while_other_threads_work(tmp_path: Path, notices: Notices) -> None:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            json.dumps([bytearray(100).decode()] * 100)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert [Watch(tmp_path, notices, "pass").run() for _ in range(5)] == [Exit(0)] * 5
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_command_that_is_not_there_is_one_error(tmp_path: Path, notices: Notices) -> None:
    for command in ("no-such-program", str(tmp_path / "nothing"), str(tmp_path)):
        with pytest.raises(RunnerError) as caught:
            Watch(tmp_path, notices, [command, "x"]).run()
        assert str(caught.value) == f"start {command}: no such program; remedy: install the package again"


def test_a_command_that_cannot_be_executed_is_a_line_in_the_log(tmp_path: Path, notices: Notices) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    one = Watch(tmp_path, notices, [str(broken)])
    assert one.run() == Exit(127)
    assert one.log.read_text() == f"start {broken}: No such file or directory\n"


def test_a_child_of_a_supervisor_that_is_gone_does_not_start(tmp_path: Path) -> None:
    """As if it had died between the fork and the request for its signal."""
    made = tmp_path / "made"
    command = [sys.executable, "-I", "-S", str(SHIM), str(os.getpid() + 1), "touch", str(made)]
    assert subprocess.run(command).returncode == 1
    command[4] = str(os.getpid())
    assert not made.exists()
    assert subprocess.run(command).returncode == 0
    assert made.exists()


# --- what ends it ---


def test_a_reason_of_a_tick_ends_the_child_at_once(tmp_path: Path, notices: Notices) -> None:
    one = Watch(tmp_path, notices, SLEEP)
    reasons = iter([None, None, "seen enough", "and more"])
    end = one.run(lambda: next(reasons, None))
    assert end == Exit(-signal.SIGKILL, "seen enough")
    assert str(end) == "SIGKILL by its supervisor: seen enough"
    assert one.asked == []


def test_what_a_tick_raises_ends_the_child_and_passes_on(tmp_path: Path, notices: Notices) -> None:
    program = f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); {SLEEP}"

    def lost() -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyError("the lease")

    with pytest.raises(KeyError, match="the lease"):
        Watch(tmp_path, notices, program).run(lost)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_child_that_ended_before_our_kill_was_not_ended_by_us(tmp_path: Path, notices: Notices) -> None:
    """The reason comes with the tick at which the child is gone already."""
    one = Watch(tmp_path, notices, "raise SystemExit(3)")

    def late() -> str | None:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        return "too late"

    assert one.run(late) == Exit(3)


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (Exit(0), "exit code 0"),
        (Exit(3), "exit code 3"),
        (Exit(-signal.SIGSEGV), "SIGSEGV"),
        (Exit(-40), "signal 40"),
        (Exit(-signal.SIGKILL), "SIGKILL, often the kernel's answer to a lack of memory"),
        (Exit(-signal.SIGKILL, "a second notice"), "SIGKILL by its supervisor: a second notice"),
    ],
)
def test_an_end_in_words(end: Exit, text: str) -> None:
    assert str(end) == text


def test_a_second_notice_is_a_reason(tmp_path: Path, notices: Notices) -> None:
    notices.first, notices.hurry = "SIGINT", True
    one = Watch(tmp_path, notices, SLEEP)
    assert one.run() == Exit(-signal.SIGKILL, "a second notice")
    assert one.asked == ["SIGINT"]


def test_a_notice_that_ends_the_child_is_a_reason(tmp_path: Path, notices: Notices) -> None:
    notices.first = "SIGTERM"
    assert Watch(tmp_path, notices, SLEEP).run(ends_at_notice=True) == Exit(-signal.SIGKILL, "SIGTERM")


# --- waking ---


@pytest.mark.usefixtures("patient")
def test_another_thread_wakes_the_watch(tmp_path: Path, notices: Notices) -> None:
    done = threading.Event()
    began = time.monotonic()

    def ship() -> None:
        done.set()
        notices.wake()

    one = Watch(tmp_path, notices, SLEEP)
    threading.Timer(0.05, ship).start()
    assert one.run(lambda: "shipped" if done.is_set() else None).ended == "shipped"
    assert soon(began)


def test_waking_is_safe_whenever_it_comes() -> None:
    notices = Notices()
    notices.wake()
    with notices:
        for _ in range(1 << 17):  # a pipe holds 65536 bytes
            notices.wake()
    notices.wake()
    reader, writer = os.pipe()  # takes the numbers that were closed
    try:
        os.set_blocking(reader, False)
        notices.wake()
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
    finally:
        os.close(reader)
        os.close(writer)


def test_waking_from_many_threads_while_the_context_ends() -> None:
    failed: list[BaseException] = []

    def wake(notices: Notices, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                notices.wake()
        except OSError as error:
            failed.append(error)

    for _ in range(50):
        stop = threading.Event()
        with Notices() as notices:
            thread = threading.Thread(target=wake, args=(notices, stop))
            thread.start()
        stop.set()
        thread.join()
    assert failed == []


# --- the stop file ---


def test_a_stop_file_asks_the_child_and_is_taken_away(tmp_path: Path) -> None:
    file = tmp_path / "stop"
    with Notices(stop_file=file) as notices:
        one = Watch(tmp_path, notices, SLEEP)
        ticks = iter([None, file.touch, None])

        def touch() -> str | None:
            act: Any = next(ticks, None)
            if act is not None:
                act()
            return "asked" if one.asked else "not asked" if one.ticks > 10 else None

        assert one.run(touch).ended == "asked"
        assert one.asked == [f"stop file {file}"]
        assert notices.first == f"stop file {file}"
        assert not file.exists()
        assert not notices.hurry


def test_a_stop_file_that_is_there_from_the_start_counts_for_one_command(tmp_path: Path) -> None:
    file = tmp_path / "stop"
    file.touch()
    with Notices(stop_file=file) as notices:
        assert notices.first == f"stop file {file}"
        assert not file.exists()
    with Notices(stop_file=file) as notices:
        notices.poll()
        assert notices.first is None


@pytest.mark.parametrize(("seconds", "hurry"), [(0.4, False), (0.5, True), (60, True)])
def test_a_second_touch_hurries_as_a_second_signal_does(tmp_path: Path, seconds: float, hurry: bool) -> None:
    now = [100.0]
    file = tmp_path / "stop"
    with Notices(clock=lambda: now[0], stop_file=file) as notices:
        file.touch()
        notices.poll()
        now[0] += seconds
        notices.poll()
        assert not notices.hurry
        file.touch()
        notices.poll()
        assert notices.hurry is hurry


def test_a_signal_and_a_stop_file_are_two_notices(tmp_path: Path) -> None:
    now = [100.0]
    file = tmp_path / "stop"
    with Notices(clock=lambda: now[0], stop_file=file) as notices:
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 1
        file.touch()
        notices.poll()
        assert (notices.first, notices.hurry) == ("SIGTERM", True)


def test_a_stop_file_that_cannot_be_removed_counts_once(tmp_path: Path) -> None:
    now = [100.0]
    file = tmp_path / "stop"
    file.mkdir()
    with Notices(clock=lambda: now[0], stop_file=file) as notices:
        assert notices.first == f"stop file {file}"
        now[0] += 60
        notices.poll()
        assert not notices.hurry


@pytest.mark.parametrize("missing", ["nowhere/stop", "a file/stop"])
def test_no_stop_file_no_request(tmp_path: Path, missing: str) -> None:
    (tmp_path / "a file").touch()
    with Notices(stop_file=tmp_path / missing) as notices:
        notices.poll()
        assert notices.first is None


# --- fetching ---


def test_a_fetch_ends_with_what_its_tick_raises_or_says(
    tmp_path: Path, notices: Notices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "FETCHER", (sys.executable, "-c", SLEEP))
    request = Request(job=Job.model_validate(SMALL), train=True, pins={})

    def lost() -> None:
        raise Preempted("the lease is lost")

    with pytest.raises(Preempted, match="the lease is lost"):
        fetching.fetched(request, tmp_path, notices, lambda event: None, lost)
    with pytest.raises(RunnerError, match="ended with SIGKILL by its supervisor: enough; its last line"):
        fetching.fetched(request, tmp_path, notices, lambda event: None, lambda: "enough")
