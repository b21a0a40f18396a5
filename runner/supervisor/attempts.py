"""One trainer after another, until one finishes: each from the newest checkpoint that the store has.

    restore -> plan -> other nodes are ready
    -> spawn; what it publishes is shipped, what it says decides -> once more | done | stop

What a single attempt is stands in `runner.supervisor.attempt`, what follows from its end in `verdict`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner.checkpoint.files import Sealed
from runner.durable import disk, write_text
from runner.errors import Preempted
from runner.events import Event
from runner.manifest import Job
from runner.plan import Fetched, Geometry, Plan, batch_record, changes, geometry, recut
from runner.supervisor import attempt
from runner.supervisor.attempt import NEAR, Ended
from runner.supervisor.batch import Batch
from runner.supervisor.choice import capacity, chosen
from runner.supervisor.custody import Custody
from runner.supervisor.direct import Director
from runner.supervisor.display import Display
from runner.supervisor.fetch import cache_folder
from runner.supervisor.follow import pause
from runner.supervisor.identity import Identity
from runner.supervisor.journal import Journal
from runner.supervisor.notices import Notices
from runner.supervisor.pace import Pace
from runner.supervisor.references import references_file
from runner.supervisor.run_folder import RunFolder
from runner.supervisor.seen import Seen
from runner.supervisor.team import Team
from runner.supervisor.verdict import History, Outcome, Restart, final_error
from runner.supervisor.world import Machine, Placement, place


class Attempts:
    """The trainers of one supervisor.

    Args:
        grace: seconds from a notice until the machine is gone; None: unknown.
        trainer: the command that runs a plan.
        placement: the processes of each attempt, as far as this machine knows.
        team: the other nodes, which say how many they offer.
    """

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        notices: Notices,
        screen: Display,
        journal: Journal,
        grace: float | None,
        trainer: Sequence[str],
        machine: Machine,
        placement: Placement,
        team: Team,
    ) -> None:
        self._job = job
        self._folder = folder
        self._notices = notices
        self._screen = screen
        self._journal = journal
        self._trainer = trainer
        self._machine = machine
        self._placement = placement
        self._team = team
        self._batch = Batch(job, placement.world)
        self._pace = Pace(job.checkpoints.max_loss_seconds)
        self._director = Director(self._pace, grace, journal)
        self._cut: Geometry | None = None
        self.seen = Seen()
        """Of the newest attempt."""
        self.outcome: Outcome | None = None
        """Of the newest attempt, if it left one."""

    @property
    def deadline(self) -> float | None:
        """On the monotonic clock, when the store has to have everything; None: nobody knows."""
        return self._director.deadline

    @property
    def batch_record(self) -> dict[str, Any]:
        """How the global batch is cut now, for `HEAD`; empty before the first trainer."""
        if self._cut is None:
            return {}
        size = self.seen.per_device or self._cut.per_device
        return batch_record(self._job, recut(self._cut, size), self._placement.strategy)

    def run(self, sources: Fetched, identity: Identity, custody: Custody) -> None:
        """Start trainers until one finishes.

        Raises:
            RunnerError: one decided to stop, or was asked to, or they do not get on.
        """
        others = self._team.gather(lambda: self._wait(custody))
        self._placement = self._placed(sources, others)
        self._batch = Batch(self._job, self._placement.world)
        for line in self._placement.lines:
            self._journal.line(line)
        history = History()
        restart = self._after_predecessor(custody)
        while True:
            plan, ended, progressed = self._attempt(sources, identity, restart, custody)
            self.outcome = ended.outcome
            if ended.outcome is not None:
                final = final_error(ended.outcome)
                if isinstance(final, Preempted):
                    raise Preempted(self._stopped(str(final), custody))
                if final is not None:
                    raise final
                if ended.outcome.outcome == "done":
                    return
            if self._notices.first is not None:
                how = f"the trainer ended {ended.seen.place} with {ended.reason}"
                raise Preempted(self._stopped(how, custody))
            self._team.check()
            self._journal.loud(ended.message(self._journal.attempt))
            self._batch.note(ended.seen)
            if ended.out_of_memory:
                history = History() if progressed else history
                restart = self._batch.shrink(plan.geometry, ended)
            else:
                restart = history.decide(ended.crash(self._journal.attempt, progressed))

    def _placed(self, sources: Fetched, others: Sequence[int]) -> Placement:
        """The processes, and where it is left to the runner the strategy that their memory asks for."""
        placed = place(self._job, self._machine.gpus, others)
        cut = geometry(self._job, placed.world)
        has = capacity() if self._machine.gpus else None
        choice = chosen(self._job, cut, sources, self._folder.fetch, self._notices, has)
        if choice is None:
            return placed
        line = f"strategy {choice.strategy}: {choice.reason}"
        return Placement(placed.world, choice.strategy, (*placed.lines, line))

    def _attempt(
        self, sources: Fetched, identity: Identity, restart: Restart | None, custody: Custody
    ) -> tuple[Plan, Ended, bool]:
        """One trainer, from the newest whole checkpoint: how it ended, and whether it left a newer one."""
        if self._notices.first is not None:
            raise Preempted(self._stopped("before a trainer was started", custody))
        self._folder.sweep()
        restore = custody.restore()
        plan = self._planned(sources, identity, restore, custody)
        self._journal.begin_attempt(plan.attempt)
        self._say_start(plan, restore, restart)
        custody.renew()  # the attempt's number and its cut are known before it can take the machine down
        before = custody.newest
        share = self._team.begin(plan, identity, lambda: self._wait(custody))
        self._director.begin(plan.attempt_dir)

        def on_event(event: Event) -> None:
            self._pace.note(event)
            self._journal.say(event)
            if event["event"] == "checkpoint":
                custody.shipper.offer(self._folder.outbox / Path(event["id"]).name)

        def on_notice(reason: str) -> bool:
            left = self._notices.left
            self._journal.say({"event": "notice", "reason": reason, "seconds": left})
            return self._director.stop(reason, left)

        def on_tick() -> str | None:
            self._journal.show()
            self._screen.tick()
            custody.check()
            nothing_to_come = custody.shipper.idle  # before its commits are taken note of
            for entry, seconds in custody.shipper.committed():
                self._pace.committed(entry, seconds)
                self._team.progress(entry.step)
            if (advice := self._notices.advice()) is not None:
                self._director.save(advice)
            if self.seen.phase == "wait" and nothing_to_come and self._pace.behind:
                return "the checkpoint that it waits for was damaged before it was sent"
            return self._team.look() or self._director.look(self._notices.left)

        ended = attempt.run(
            plan,
            trainer=self._trainer,
            environ=os.environ,
            machine=self._machine,
            notices=self._notices,
            seen=self.seen,
            on_event=on_event,
            on_notice=on_notice,
            on_tick=on_tick,
            share=share,
        )
        ended = self._team.finish(ended, lambda: self._linger(custody))
        custody.offer_rest(self.deadline)
        if custody.newest is not None and custody.newest != before:
            self._team.progress(custody.newest.step)
        return plan, ended, custody.newest != before

    def _linger(self, custody: Custody) -> None:
        """Wait for other nodes, for a moment, and let a notice be."""
        pause(self._notices)
        self._screen.tick()
        custody.glance()

    def _wait(self, custody: Custody) -> None:
        """Wait for other nodes, for a moment, with no trainer at work.

        Raises:
            Preempted: asked to stop.
        """
        self._linger(custody)
        if self._notices.first is not None:
            raise Preempted(self._stopped("before a trainer was started", custody))

    def _planned(
        self, sources: Fetched, identity: Identity, restore: Sealed | None, custody: Custody
    ) -> Plan:
        number, folder = attempt.new_folder(self._folder.attempts, self._journal.record.attempts)
        self.seen = Seen()
        self._cut, probe = self._batch.start(None if restore is None else restore.extra.get("batch"))
        plan = Plan(
            purpose="train",
            job=self._job,
            run_dir=self._folder.path,
            epoch=custody.epoch,
            attempt=number,
            attempt_dir=folder,
            geometry=self._cut,
            strategy=self._placement.strategy,
            probe=probe,
            fetched=sources,
            restore=None if restore is None else restore.folder,
            references=references_file(self._job, sources, identity, cache_folder(os.environ)),
            save_seconds=self._pace.save_seconds,
        )
        with disk("write the plan", self._folder.plan):
            write_text(self._folder.plan, plan.model_dump_json(indent=2) + "\n")
        return plan

    def _say_start(self, plan: Plan, restore: Sealed | None, restart: Restart | None) -> None:
        id, step = (None, 0) if restore is None else (restore.id, restore.step)
        if restart is not None:
            said = {"reason": restart.reason, "after": restart.after, "step": step}
            self._journal.say({"event": "restart", **said, "per_device": restart.sizes})
            origin = "step 0" if id is None else f"checkpoint {id}, step {step}"
            smaller = ""
            if restart.sizes is not None:
                smaller = ", with {to} rows per device instead of {from}".format(**restart.sizes)
            self._journal.line(f"attempt {plan.attempt} goes on from {origin}{smaller}")
        self._journal.say({"event": "attempt", "restore": id, "step": step})
        if restore is not None:
            found = changes(restore.extra.get("batch"), plan.geometry, plan.strategy)
            self._journal.say(
                {"event": "fidelity", "fidelity": "close" if found else "exact", "changes": found}
            )

    def _after_predecessor(self, custody: Custody) -> Restart | None:
        """Why the last attempt of an earlier command did not finish; None if there was none.

        its owner     memory peak    restart
        gave back     -              with the reason that it wrote down
        did not       below `NEAR`   killed together with its supervisor
        did not       `NEAR`         the same, with the next smaller size: the kernel takes the whole group
        """
        last, before = self._journal.record.last, custody.predecessor
        if last is None or before is None or not self._journal.record.attempts:
            return None
        if last["event"] == "end" and before.state != "held":
            noticed = last.get("outcome") == Preempted.outcome
            reason = f"{last.get('outcome')}: {last.get('error')}"
            return Restart(reason, after="notice" if noticed else "failure")
        size = before.geometry.get("per_device")
        if (before.memory_peak or 0.0) >= NEAR and isinstance(size, int):
            how = f"killed together with its supervisor at {before.memory_peak:.0%} of the memory limit"
            return self._batch.shrink_after(size, how)
        return Restart("killed together with its supervisor", after="lost")

    def _stopped(self, how: str, custody: Custody) -> str:
        newest = custody.newest
        kept = "nothing was committed yet" if newest is None else f"step {newest.step} is committed"
        return f"{self._notices.first or 'the trainer'}: {how}; {kept}; the same command goes on"
