"""`runner health`: whether a supervisor looks around, whatever it waits for; never its trainer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner import cli, health
from runner.health import Heart, age
from runner.supervisor import final
from tests.machines import Bench, World, at, hasty

OLD = "1.4"
"""Seconds; every loop looks at least every half second, on a busy machine a little later."""


def quick() -> None:
    """In the forked command: every look is written."""
    health.EVERY = 0.0


def alive(bench: Bench) -> bool:
    return cli.main(["health", "--max-age", OLD, "--runs", str(bench.runs)]) == 0


def test_a_supervisor_that_stands_still_is_dead_and_a_trainer_that_hangs_is_not(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not alive(bench)
    assert "no supervisor has begun" in capsys.readouterr().err
    process = bench.start(at("step:3", "linger"), before=quick)
    bench.wait_for(bench.waiting(), process)
    time.sleep(float(OLD) + 0.3)  # what is tested is that nothing but the supervisor counts
    assert alive(bench)
    assert capsys.readouterr().out.startswith("alive: ")
    process.send(signal.SIGSTOP)
    bench.wait_for(lambda: not alive(bench))
    assert "looked around" in capsys.readouterr().err
    process.send(signal.SIGCONT)
    bench.wait_for(lambda: alive(bench), process)
    process.send(signal.SIGKILL)
    process.finish()
    bench.wait_for(lambda: not alive(bench))


def test_it_lives_from_the_first_wait_for_the_store_to_the_last(world: World) -> None:
    """Every swap takes longer than what is old: to take the run, to renew, to commit, to give it back."""
    fault = world.proxy.fail("PUT", "/HEAD", "1.7s", times=8)
    process = world.first.start(at("step:3", "wait"), before=quick, save=100)
    oldest = 0.0
    while process.poll() is None:
        oldest = max(oldest, age(world.first.runs, time.monotonic()) or 0.0)
        if world.first.waiting()() and not world.first.said("notice"):
            process.send(signal.SIGTERM)
            world.first.wait_for(lambda: bool(world.first.said("notice")), process)
        time.sleep(0.02)
    code, output = process.finish()
    assert code == 75, output
    assert world.head().state == "released" and fault.met >= 4
    assert 0 < oldest < float(OLD)


def test_it_lives_while_it_reads_all_that_a_run_ends_with(bench: Bench) -> None:
    """A large model on a slow disk: longer than a probe waits."""
    gather = final.gather

    def slow() -> None:
        quick()
        final.gather = lambda *given: (time.sleep(float(OLD) + 1), gather(*given))[1]

    process = bench.start(before=slow)
    oldest = 0.0
    while process.poll() is None:
        oldest = max(oldest, age(bench.runs, time.monotonic()) or 0.0)
        time.sleep(0.02)
    assert process.finish()[0] == 0
    assert 0 < oldest < float(OLD)


def test_an_evaluation_lives_too(bench: Bench) -> None:
    assert bench.train(verb="evaluate")[0] == 0
    assert alive(bench)


def test_it_lives_while_it_waits_for_another_owner(world: World) -> None:
    first, second = world.first, world.machine()
    owner = first.start(at("step:5", "wait"), before=hasty)
    first.wait_for(first.waiting(), owner)
    os.kill(owner.pid, signal.SIGSTOP)
    waiting = second.start(before=lambda: (hasty(), quick()))
    second.wait_for(lambda: "waiting for it" in waiting.output(), waiting)
    for _ in range(10):
        assert alive(second)
        time.sleep(0.05)
    assert not alive(first)
    assert waiting.finish()[0] == 0
    os.kill(owner.pid, signal.SIGKILL)


def test_the_youngest_of_several_counts_and_one_of_another_boot_does_not(tmp_path: Path) -> None:
    now = 1000.0
    for name, text in {"a": "400", "b/nodes/1": "990", "c": "2000", "d": "", "e": "never"}.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "alive").write_text(text)
    assert age(tmp_path, now) == 10
    assert age(tmp_path / "b", now) is None


@pytest.mark.parametrize("words", [["--max-age", "soon"], ["--max-age"]])
def test_what_is_no_age_is_64(words: list[str]) -> None:
    assert cli.main(["health", *words]) == 64


def test_a_heart_that_cannot_write_disturbs_nobody(tmp_path: Path) -> None:
    with Heart(tmp_path / "nowhere") as heart:
        heart.beat()
    (tmp_path / "alive").mkdir()
    with Heart(tmp_path) as heart:
        heart.beat()


def test_the_probe_loads_almost_nothing() -> None:
    script = (
        "import sys; from runner import cli; cli.main(['health', '--runs', 'nowhere']); "
        "print(*sorted(name for name in sys.modules if '.' not in name))"
    )
    ended = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    loaded = set(ended.stdout.split())
    assert {"pydantic", "yaml", "boto3", "rich", "torch", "http", "ssl"} & loaded == set()


def test_command_of_the_docs(bench: Bench) -> None:
    text = (Path(__file__).parents[1] / "docs" / "notices.md").read_text("utf-8")
    (line,) = re.findall(r"```bash\n(runner health .*)\n```", text)
    words = line.replace("/scratch/runs", str(bench.runs)).split()[1:]
    assert cli.main(words) == 1
    assert bench.train(before=quick)[0] == 0
    assert cli.main(words) == 0  # it has ended a moment ago
