"""The supervisor: `train` and `evaluate` on this machine, with one trainer process.

    lock -> the same job? -> done already? -> open the checkpoints -> fetch -> recover what was published
    -> verify, plan, spawn, commit what is published -> verdict: once more | done | stop
    -> result.json

Everything of a run lies in `runs/<name>/`. Exit codes other than 0 are raised as exceptions
(`runner.errors`), after result.json says the same. How a child is watched and what follows when it ends is in
`runner.supervisor`; what is committed in `runner.checkpoint.local`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner import events
from runner.checkpoint.local import LocalStore
from runner.durable import disk, write_text
from runner.errors import DataError, Preempted, RunnerError
from runner.events import Event, EventLog
from runner.job.resolved import resolved_yaml
from runner.manifest import Job
from runner.plan import Fetched, Plan, geometry
from runner.settings import Resolved
from runner.supervisor import attempt, fetch, identity, result
from runner.supervisor.attempt import TRAINER, Ended
from runner.supervisor.batch import Batch
from runner.supervisor.evaluation import evaluate
from runner.supervisor.fetching import fetched
from runner.supervisor.identity import Identity
from runner.supervisor.progress import Screen, change_lines, duration
from runner.supervisor.ranks import Notices
from runner.supervisor.run_folder import RunFolder
from runner.supervisor.seen import Seen
from runner.supervisor.verdict import History, Outcome, Restart, final_error

__all__ = ["evaluate", "train"]


def train(resolved: Resolved, runs_dir: Path, *, trainer: Sequence[str] = TRAINER) -> int:
    """Train a job to its end, from wherever it is. Returns 0.

    Args:
        runs_dir: the parent of `runs/<name>`.
        trainer: the command that runs a plan; tests give their own.

    Raises:
        RunnerError: every other end, with its exit code.
    """
    job = resolved.job
    geometry(job)  # a size that cuts no global batch is told before anything is done
    folder = RunFolder((runs_dir / job.name).absolute())
    with folder.locked(), Notices() as notices, contextlib.closing(Screen()) as screen:
        stored = identity.read(folder.identity)
        if stored is not None:
            for line in identity.check_job(stored, job, folder.path):
                screen.line(line)
            kept = result.read(folder.result)
            if kept is not None and kept.outcome == "done" and _trained(kept, folder).is_dir():
                screen.line(f"run {job.name} is done already: {_trained(kept, folder)}")
                for line in change_lines(kept.metrics["before"], kept.metrics["after"]):
                    screen.line(line)
                return 0
        with disk("write the job", folder.job):
            write_text(folder.job, resolved_yaml(resolved))
        with EventLog(folder.events) as log:
            _Run(job, folder, stored, notices, screen, log, trainer).train()
    return 0


def _trained(kept: result.Result, folder: RunFolder) -> Path:
    """What a finished run made; by its name, because runs may be moved."""
    return folder.path / Path(kept.adapter or folder.adapter).name


class _Run:
    """One supervisor's work on one run, from the lock to result.json."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        stored: Identity | None,
        notices: Notices,
        screen: Screen,
        log: EventLog,
        trainer: Sequence[str],
    ) -> None:
        self._job = job
        self._folder = folder
        self._stored = stored
        self._notices = notices
        self._screen = screen
        self._log = log
        self._trainer = trainer
        self._batch = Batch(job)
        self._store = LocalStore(folder.checkpoints, job.checkpoints.keep_last, self._say)
        self._outcome: Outcome | None = None
        """Of the newest attempt, if it left one."""

    def train(self) -> None:
        try:
            self._say({"event": "start", "versions": identity.versions()})
            self._store.open(fresh=self._stored is None)
            sources = self._fetch()
            with disk("create the outbox", self._folder.outbox):
                self._folder.outbox.mkdir(exist_ok=True)
            self._store.recover(self._folder.outbox)
            self._attempts(sources)
        except RunnerError as error:
            self._screen.close()
            try:
                self._end(error.outcome, error.exit_code, str(error))
            except RunnerError as second:  # the disk, most likely for the same reason
                self._screen.line(f"warning: {second}")
            raise
        self._screen.close()
        self._report(self._end("done", 0, None))

    def _fetch(self) -> Fetched:
        """Get the sources, and make sure that they are those that the run began with."""
        stored, job = self._stored, self._job
        request = fetch.Request(job=job, train=True, pins={} if stored is None else stored.pins)
        answer = fetched(request, self._folder.fetch, self._notices, self._say)
        now = identity.versions()
        if stored is None:
            new = Identity(
                job=job.model_dump(mode="json"),
                pins=answer.pins,
                fingerprints=answer.fingerprints,
                versions=now,
            )
            identity.write(self._folder.identity, new)
        else:
            identity.check_sources(stored, answer.fingerprints, job, self._folder.path)
            if other := identity.changed_versions(stored, now):
                self._say({"event": "warning", "message": other})
        return answer.fetched

    def _attempts(self, sources: Fetched) -> None:
        """Start trainers until one finishes.

        Raises:
            RunnerError: one decided to stop, or was asked to, or they do not get on.
        """
        history = History()
        restart = self._former_end()
        while True:
            plan, ended, progressed = self._attempt(sources, restart)
            self._outcome = ended.outcome
            if ended.outcome is not None:
                final = final_error(ended.outcome)
                if isinstance(final, Preempted):
                    raise Preempted(self._stopped(str(final)))
                if final is not None:
                    raise final
                if ended.outcome.outcome == "done":
                    return
            if self._notices.first is not None:
                raise Preempted(self._stopped(f"the trainer ended {ended.seen.place} with {ended.reason}"))
            self._screen.line(ended.message(self._log.attempt))
            self._batch.note(ended.seen)
            if ended.out_of_memory:
                history = History() if progressed else history
                restart = self._batch.shrink(plan.geometry, ended)
            else:
                restart = history.decide(ended.crash(self._log.attempt, progressed))

    def _attempt(self, sources: Fetched, restart: Restart | None) -> tuple[Plan, Ended, bool]:
        """One trainer, from the newest whole checkpoint: how it ended, and whether it left a newer one."""
        if self._notices.first is not None:
            raise Preempted(self._stopped("before a trainer was started"))
        self._folder.sweep()
        restore = self._store.newest_valid()
        number, folder = attempt.new_folder(self._folder.attempts)
        self._log.attempt = number
        step = 0 if restore is None else restore.step
        if restart is not None:
            said = {"reason": restart.reason, "step": step, "per_device": restart.sizes}
            self._say({"event": "restart", **said})
            origin = "step 0" if restore is None else f"checkpoint {restore.id}, step {step}"
            smaller = ""
            if restart.sizes is not None:
                smaller = ", with {to} rows per device instead of {from}".format(**restart.sizes)
            self._screen.line(f"attempt {number} goes on from {origin}{smaller}")
        self._say({"event": "attempt", "restore": None if restore is None else restore.id, "step": step})
        cut, probe = self._batch.start(None if restore is None else restore.extra.get("batch"))
        plan = Plan(
            purpose="train",
            job=self._job,
            run_dir=self._folder.path,
            attempt=number,
            attempt_dir=folder,
            geometry=cut,
            probe=probe,
            fetched=sources,
            restore=None if restore is None else restore.folder,
            save_seconds=self._job.checkpoints.max_loss_seconds,
        )
        with disk("write the plan", self._folder.plan):
            write_text(self._folder.plan, plan.model_dump_json(indent=2) + "\n")
        before = self._store.newest
        ended = attempt.run(
            plan,
            trainer=self._trainer,
            environ=attempt.environ_of_trainer(os.environ),
            notices=self._notices,
            seen=Seen(),
            on_event=self._on_event,
            on_notice=self._on_notice,
            on_tick=self._screen.tick,
        )
        # What it published in its last moment, it did not live to tell.
        self._store.recover(self._folder.outbox)
        return plan, ended, self._store.newest != before

    def _on_event(self, event: Event) -> None:
        self._say(event)
        if event["event"] == "checkpoint":
            self._commit(event["id"])

    def _on_notice(self, reason: str) -> None:
        self._say({"event": "notice", "reason": reason})
        self._screen.line(f"{reason}: saving and stopping; a second one stops at once")

    def _commit(self, name: str) -> None:
        """Commit what the trainer has published."""
        folder = self._folder.outbox / Path(name).name
        try:
            sealed = self._store.commit(folder)
        except DataError as error:
            # The disk, between the trainer's hand and ours. The checkpoint before it still stands.
            self._say({"event": "warning", "message": f"not committed: {error}"})
            shutil.rmtree(folder, ignore_errors=True)
            return
        self._say({"event": "commit", "id": sealed.id, "step": sealed.step, "leftover": False})

    def _former_end(self) -> Restart | None:
        """Why the last attempt of an earlier command did not finish; None if there was none."""
        last = result.add_up(events.read(self._folder.events)).last
        if last is None or not attempt.last_number(self._folder.attempts):
            return None
        if last["event"] == "attempt":
            return Restart("killed together with its supervisor")
        return Restart(f"{last.get('outcome')}: {last.get('error')}")

    def _stopped(self, how: str) -> str:
        newest = self._store.newest
        kept = "nothing was committed yet" if newest is None else f"step {newest.step} is committed"
        return f"{self._notices.first or 'the trainer'}: {how}; {kept}; the same command goes on"

    def _end(self, outcome: str, exit_code: int, error: str | None) -> result.Result:
        """Write how it ended, for people's programs."""
        self._say({"event": "end", "outcome": outcome, "exit_code": exit_code, "error": error})
        record = result.add_up(events.read(self._folder.events))
        last, newest = self._outcome, self._store.newest
        kept = 0 if newest is None else newest.step
        facts: dict[str, Any] = {} if last is None else last.facts
        metrics: Mapping[str, Any] = {} if last is None else last.metrics
        written = result.Result(
            name=self._job.name,
            outcome=outcome,
            exit_code=exit_code,
            steps=last.step if outcome == "done" and last is not None and last.step is not None else kept,
            attempts=attempt.last_number(self._folder.attempts),
            metrics=result.merged_metrics(record, metrics),
            restarts=record.restarts,
            error=error,
            adapter=None if last is None else last.adapter,
            checkpoint=None if newest is None else newest.id,
            versions=identity.versions(),
            facts=facts,
            seconds=record.seconds,
        )
        result.write(self._folder.result, written)
        return written

    def _report(self, written: result.Result) -> None:
        for line in change_lines(written.metrics["before"], written.metrics["after"]):
            self._screen.line(line)
        count = len(written.restarts)
        restarts = f", {count} restart{'s' if count > 1 else ''}" if count else ""
        spent = f"{written.steps} steps in {duration(written.seconds)}{restarts}"
        self._screen.line(f"done: {spent}; {written.adapter}")

    def _say(self, event: Mapping[str, Any]) -> None:
        self._screen.show(self._log.write(event))
