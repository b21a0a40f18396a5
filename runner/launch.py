"""The supervisor: `train` and `evaluate` on this machine, with one attempt at a time.

    lock -> open the store -> the same job? -> take the run -> done already? -> fetch -> restore
    -> other nodes are here -> plan, spawn, ship what is published, watch -> verdict: once more | done | stop
    -> result.json, and for a run that is done all that it ends with -> give the run back -> report.html

Everything on this machine lies in `runs/<name>/`; what counts is in the run's store. Exit codes other than 0
are raised as exceptions (`runner.errors`), after result.json says the same. The parts are in
`runner.supervisor`, the protocol of the store in `runner.checkpoint`. Of several nodes this is what node 0
does; the others follow it (`runner.supervisor.member`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

from runner import last_words
from runner.command import program
from runner.durable import disk, write_text
from runner.errors import Preempted, RunnerError
from runner.events import EventLog
from runner.health import Heart
from runner.job.resolved import resolved_yaml
from runner.job.secrets import without_secrets
from runner.plan import Fetched, geometry
from runner.settings import Resolved
from runner.supervisor import fetch, final, identity, result
from runner.supervisor.attempt import TRAINER
from runner.supervisor.attempts import Attempts
from runner.supervisor.custody import LOOK, Custody
from runner.supervisor.direct import grace_seconds
from runner.supervisor.display import Display, Voice, display
from runner.supervisor.ending import next_lines, verdict
from runner.supervisor.evaluation import evaluate
from runner.supervisor.fetch import Answer
from runner.supervisor.fetching import fetched
from runner.supervisor.follow import pause
from runner.supervisor.identity import Identity
from runner.supervisor.journal import Journal
from runner.supervisor.member import member
from runner.supervisor.metadata.choose import source as metadata_source
from runner.supervisor.metadata.watch import Watch
from runner.supervisor.metrics_file import MetricsFile
from runner.supervisor.notices import Notices
from runner.supervisor.opening import opening
from runner.supervisor.progress import near
from runner.supervisor.reporting import not_off, reported
from runner.supervisor.run_folder import RunFolder
from runner.supervisor.team import Team
from runner.supervisor.trackers import Trackers, need_packages
from runner.supervisor.world import Machine, place, processes
from runner.topology import topology

__all__ = ["evaluate", "train"]


def train(
    resolved: Resolved, runs_dir: Path, *, voice: Voice = "lines", trainer: Sequence[str] = TRAINER
) -> int:
    """Train a job to its end, from wherever it is. Returns 0.

    Args:
        runs_dir: the parent of `runs/<name>`.
        voice: who listens.
        trainer: the command that runs a plan; tests give their own.

    Raises:
        RunnerError: every other end, with its exit code.
    """
    job = resolved.job
    machine = Machine.here(os.environ)
    placement = place(job, machine.gpus)
    geometry(job, placement.world)  # a size that cuts no global batch is told before anything is done
    # A host's full name may take a look-up.
    here = topology(os.environ, job.launch.nodes, socket.getfqdn() if job.launch.nodes > 1 else "")
    if here.index > 0:
        code = member(job, (runs_dir / job.name).absolute(), here, machine, trainer, voice)
        last_words.write(os.environ, "done", code, "done, as node 0 says")
        return code
    need_packages(job)
    grace, source = grace_seconds(os.environ), metadata_source(os.environ)
    folder = RunFolder((runs_dir / job.name).absolute())
    with (
        folder.locked() as lock,
        Heart(folder.path) as heart,
        Notices(stop_file=folder.stop, beat=heart.beat) as notices,
        contextlib.closing(display(voice)) as screen,
        reported(folder, notices, screen),
        EventLog(folder.events) as log,
        Team(job, here, processes(job, machine.gpus), notices, screen.line) as team,
    ):
        journal = Journal(log, screen, notices.wake, MetricsFile(folder.metrics, job))
        for line in opening(resolved, folder.path, machine, placement):
            journal.line(line)

        def warn(text: str) -> None:
            journal.say({"event": "warning", "message": text})

        attempts = Attempts(job, folder, notices, screen, journal, grace, trainer, machine, placement, team)
        custody = Custody(
            job,
            folder,
            lock,
            notices,
            journal,
            geometry=lambda: attempts.batch_record,
            memory_peak=lambda: attempts.seen.memory_peak,
        )
        trackers = Trackers(job, folder, notices, journal.say, until=lambda: attempts.deadline)
        with contextlib.closing(trackers), contextlib.closing(custody), Watch(source, notices, warn):
            _Run(resolved, folder, notices, screen, journal, attempts, custody, team, trackers).train()
    return 0


class _Run:
    """One supervisor's work on one run, in its order."""

    def __init__(
        self,
        resolved: Resolved,
        folder: RunFolder,
        notices: Notices,
        screen: Display,
        journal: Journal,
        attempts: Attempts,
        custody: Custody,
        team: Team,
        trackers: Trackers,
    ) -> None:
        self._resolved = resolved
        self._job = resolved.job
        self._folder = folder
        self._notices = notices
        self._screen = screen
        self._journal = journal
        self._attempts = attempts
        self._custody = custody
        self._team = team
        self._trackers = trackers

    def train(self) -> None:
        try:
            stored = self._same_job()
            if not self._custody.is_done():
                self._custody.probe()
            answer = self._take(stored)
            if not self._custody.taken:
                self._done_already()
                self._team.dismiss(self._pause)
                return
            with disk("write the job", self._folder.job):
                write_text(self._folder.job, resolved_yaml(self._resolved))
            self._journal.say({"event": "start", "versions": identity.versions()})
            stored, sources = self._sources(stored or self._same_job(), answer)
            self._custody.restore()
            self._custody.leftovers()
            self._trackers.start(stored, self._journal.record)
            self._attempts.run(sources, stored, self._custody)
            self._screen.close()
            self._finish()
        except RunnerError as error:
            self._screen.close()
            self._fail(error)
            if (newest := self._custody.newest) is not None:
                error.kept = newest.step, newest.id
            raise

    def _pause(self) -> None:
        pause(self._notices)
        if self._notices.first is not None:
            raise Preempted(f"{self._notices.first}: waits for no other node")

    def _same_job(self) -> Identity | None:
        """The identity of the run, if it has begun; what changed since and may is said."""
        stored = self._custody.identity()
        if stored is not None:
            for line in identity.check_job(stored, self._job, self._custody.place):
                self._journal.line(line)
        return stored

    def _take(self, stored: Identity | None) -> Answer | None:
        """Take the run, and fetch what it needs while its former owner may still live."""
        answers: list[Answer] = []

        def fetch_meanwhile(look: Callable[[], str | None]) -> None:
            answers.append(self._fetched(stored, look))

        # Before the identity is known one might fetch another commit than the run began with.
        self._custody.take(fetch_meanwhile if stored is not None else lambda look: None)
        return answers[0] if answers else None

    def _fetched(self, stored: Identity | None, look: Callable[[], str | None]) -> Answer:
        request = fetch.Request(job=self._job, train=True, pins={} if stored is None else stored.pins)
        return fetched(request, self._folder.fetch, self._notices, self._journal.say, look)

    def _sources(self, stored: Identity | None, answer: Answer | None) -> tuple[Identity, Fetched]:
        """Get the sources, and make sure that they are those that the run began with."""
        if answer is None:
            answer = self._fetched(stored, self._custody.glance)
        now = identity.versions()
        if stored is None:
            new = Identity(
                job=self._job.model_dump(mode="json"),
                pins=answer.pins,
                fingerprints=answer.fingerprints,
                versions=now,
                id=uuid.uuid4().hex,
            )
            stored = self._custody.begin(new)
        identity.check_sources(stored, answer.fingerprints, self._job, self._custody.place)
        if other := identity.changed_versions(stored, now):
            self._journal.say({"event": "warning", "message": other})
        self._custody.mirror(stored)
        return stored, answer.fetched

    # --- the end ---

    def _finish(self) -> None:
        """Commit what the run ends with: it is done when that is in the store, and not before."""
        written = self._ended("done", 0, None)
        folder = self._gathered(written)
        self._custody.finish(folder)
        result.write(self._folder.result, written)
        last_words.write(os.environ, "done", 0, "done", written.steps, written.checkpoint)
        shutil.rmtree(folder, ignore_errors=True)
        self._last(written)

    def _gathered(self, written: result.Result) -> Path:
        """What the run ends with. It reads every byte of a model, and this process looks around meanwhile."""
        with ThreadPoolExecutor(1, "gather") as pool:
            doing = pool.submit(final.gather, self._folder, written)
            while not doing.done():
                self._notices.poll()
                wait_for([doing], LOOK)
        return doing.result()

    def _fail(self, error: RunnerError) -> None:
        """Keep what can be kept, and say how it ended."""
        if not self._custody.taken:
            return
        with contextlib.suppress(RunnerError):
            self._custody.drain(self._attempts.deadline)
        try:
            result.write(self._folder.result, self._ended(error.outcome, error.exit_code, str(error)))
        except RunnerError as second:  # the disk, most likely for the same reason
            self._screen.loud(f"warning: {second}")

    def _ended(self, outcome: str, exit_code: int, error: str | None) -> result.Result:
        """Say how it ended, and compose that for people's programs."""
        self._journal.say({"event": "end", "outcome": outcome, "exit_code": exit_code, "error": error})
        record = self._journal.record
        last, newest = self._attempts.outcome, self._custody.newest
        kept = 0 if newest is None else newest.step
        facts: dict[str, Any] = {} if last is None else last.facts
        metrics: Mapping[str, Any] = {} if last is None else last.metrics
        return result.Result(
            name=self._job.name,
            outcome=outcome,
            exit_code=exit_code,
            steps=last.step if outcome == "done" and last is not None and last.step is not None else kept,
            attempts=record.attempts,
            metrics=result.merged_metrics(record, metrics),
            restarts=record.restarts,
            error=None if error is None else without_secrets(error, os.environ),
            fidelity=record.fidelity,
            best=None if last is None else last.best,
            stopped_early=last is not None and last.stopped_early,
            adapter=None if last is None else last.adapter,
            checkpoint=None if newest is None else newest.id,
            versions=identity.versions(),
            facts=facts,
            seconds=record.seconds,
        )

    def _done_already(self) -> None:
        """Say so, and have on this machine what the run ended with."""
        kept = result.read(self._folder.result)
        if kept is None or kept.outcome != "done" or not _trained(kept, self._folder).is_dir():
            found = self._custody.fetch_final(self._folder.path)
            if found is not None:
                final.spread(found, self._folder)
                kept = result.read(self._folder.result)
        where = self._custody.place.store if kept is None else near(_trained(kept, self._folder))
        self._journal.loud(f"run {self._job.name} is done already: {where}")
        step, checkpoint = (None, None) if kept is None else (kept.steps, kept.checkpoint)
        last_words.write(os.environ, "done", 0, "done already", step, checkpoint)
        # Its events are of the command that did it.
        self._screen.show({"event": "end", "outcome": "done", "exit_code": 0, "error": None})
        if kept is not None:
            self._last(kept)

    def _last(self, ended: result.Result) -> None:
        """Tell a person what came of it."""
        for line in verdict(ended, _trained(ended, self._folder)):
            self._journal.loud(line)
        for line in next_lines(self._folder.path, program(sys.argv[0]), not_off(os.environ)):
            self._journal.line(line)


def _trained(kept: result.Result, folder: RunFolder) -> Path:
    """What a finished run made; by its name, because runs may be moved."""
    return folder.path / Path(kept.adapter or folder.adapter).name
