"""What `runner submit | logs | cancel` do, and the cluster's half of `runner status`.

submit      what `runner render` prints, under a new name, whole or not at all
logs        of the newest submission of a run, or of the one that is named
cancel      what is alive of it
describe    where a run is, what it does there, and what it waits for
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.cluster import aws_batch, batch_jobs, jobs, kubernetes
from runner.cluster.batch import Batch
from runner.cluster.following import follow
from runner.cluster.kubectl import Kubectl
from runner.cluster.waiting import State
from runner.command import complain, say
from runner.errors import JobError, Problem, UsageError
from runner.job.yaml_source import MAX_CHARACTERS
from runner.job_words import split
from runner.manifest import NAME_PATTERN, Job
from runner.settings import Resolved, resolve
from runner.targets import Submission, render, submission

_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
"""Of a submission's name: what makes no words and no mistakes, as Kubernetes names pods."""

_TARGETS = {"kubernetes": "kubernetes", "aws-batch": "aws_batch"}
"""Target -> the section of a job that is about it."""


@dataclass(frozen=True)
class Asked:
    """Which submissions a command is about."""

    target: str
    name: str
    """Of a run or a submission."""
    job: Job | None
    """None where a bare name was given."""


def submit(resolved: Resolved, target: str, context: str | None, watch: bool) -> int:
    """Submit a job; with `watch` the exit code is the run's."""
    run = resolved.job.name
    suffix = "".join(secrets.choice(_LETTERS) for _ in range(5))
    one = submission(resolved, f"{run}-{suffix}")
    documents = render(target, one)
    if target == "kubernetes":
        cluster = _kubectl(resolved.job, context)
        made = jobs.make(cluster, run, documents, _warn)
        cancels = f"runner cancel {made['metadata']['name']}{cluster.options}"
        follows = f"runner logs {made['metadata']['name']} --follow{cluster.options}"
        say(f"submitted {one.name} to {cluster.where}\n  {follows}\n  {cancels}")
        if not watch:
            return 0
        return _watched(one.name, lambda: kubernetes.look(cluster, one.name), kubernetes.PAUSE, cancels)
    batch = _batch(resolved.job)
    try:
        identity = batch_jobs.make(
            batch, run, documents, _for_the_store(one), resolved.job.checkpoints, _warn
        )
        queue = documents[1]["SubmitJob"]["jobQueue"]
        region = None if resolved.job.aws_batch is None else resolved.job.aws_batch.region
        where = "" if region is None else f"AWS_REGION={region} "
        cancels = f"{where}runner cancel {identity}"
        follows = f"{where}runner logs {identity} --follow"
        say(f"submitted {one.name} to queue {queue}: {identity}\n  {follows}\n  {cancels}")
        if not watch:
            return 0
        return _watched(identity, lambda: aws_batch.look(batch, identity), aws_batch.PAUSE, cancels)
    finally:
        batch.close()


def describe(job: Job, context: str | None = None) -> list[str]:
    """What a run does where its job's sections say that it runs, for `runner status`: a line for each
    submission that is alive, else for the newest that is remembered, with what keeps it waiting.

    Raises:
        RunnerError: a cluster or a cloud does not answer, or does not let us look.
    """
    lines = []
    if job.kubernetes is not None:
        lines += kubernetes.describe(_kubectl(job, context), job.name)
    if job.aws_batch is not None and job.aws_batch.queue is not None:
        batch = _batch(job)
        try:
            lines += aws_batch.describe(batch, job.aws_batch.queue, job.name)
        finally:
            batch.close()
    return lines


def logs(asked: Asked, context: str | None, namespace: str | None, follow: bool) -> int:
    """Print the log of a submission."""
    if asked.target == "kubernetes":
        for line in kubernetes.logs(_kubectl(asked.job, context, namespace), asked.name, follow):
            say(line)
        return 0
    batch = _batch(asked.job)
    try:
        identity = asked.name
        if asked.job is not None:
            identity = aws_batch.newest(batch, _queue(asked.job), asked.name)["jobId"]
        for line in aws_batch.logs(batch, identity, follow):
            say(line)
        return 0
    finally:
        batch.close()


def cancel(asked: Asked, context: str | None, namespace: str | None) -> int:
    """End what is alive of a run or a submission."""
    if asked.target == "kubernetes":
        kubernetes.cancel(_kubectl(asked.job, context, namespace), asked.name, say)
        return 0
    batch = _batch(asked.job)
    try:
        if asked.job is not None:
            aws_batch.cancel(
                batch, batch_jobs.submissions(batch, _queue(asked.job), asked.name), asked.name, say
            )
        else:
            aws_batch.cancel(batch, [aws_batch.known(batch, asked.name)], asked.name, say)
        return 0
    finally:
        batch.close()


def asked(words: Sequence[str], target: str | None, environ: Mapping[str, str]) -> Asked:
    """What the words of a command line name.

    one word                           --to         is
    a job id of AWS Batch              any          that submission there
    a name, and no file                not batch    a run or a submission on Kubernetes
    anything else, or no word          any          a job, whose run is meant, where --to or its section says

    Raises:
        UsageError: a bare name with --to aws-batch, which has no queue to look in.
        RunnerError: as `resolve`, of a job.
    """
    if len(words) == 1 and not Path(words[0]).exists():
        [word] = words
        if aws_batch.is_identity(word):
            return Asked("aws-batch", word, None)
        if re.fullmatch(NAME_PATTERN, word):
            if target == "aws-batch":
                raise UsageError(
                    f"{word}: a name alone does not say in which queue to look\n"
                    "    remedy: name the job file, or the id that submit printed"
                )
            return Asked("kubernetes", word, None)
    job = resolve(*split(list(words)), environ).job
    return Asked(target_of(job, target), job.name, job)


def target_of(job: Job, target: str | None) -> str:
    """Where a job is to run: as asked, else by the one section that it has.

    Raises:
        UsageError: it has none, or both.
    """
    if target is not None:
        return target
    has = [name for name, section in _TARGETS.items() if getattr(job, section) is not None]
    if len(has) == 1:
        return has[0]
    if has:
        raise UsageError(f"{job.name} has sections for {' and '.join(has)}\n    remedy: choose one with --to")
    of_google = "; runner render gcp-batch prints the job for gcloud" if job.gcp_batch is not None else ""
    raise UsageError(
        f"{job.name} says neither kubernetes: nor aws_batch:, so there is nowhere to submit it to\n"
        f"    remedy: add the section, with an image (docs/submit.md){of_google}"
    )


def _kubectl(job: Job | None, context: str | None, namespace: str | None = None) -> Kubectl:
    section = None if job is None else job.kubernetes
    return Kubectl(context, namespace or (None if section is None else section.namespace), _warn)


def _batch(job: Job | None) -> Batch:
    section = None if job is None else job.aws_batch
    return Batch(None if section is None else section.region)


def _queue(job: Job) -> str:
    if job.aws_batch is None or job.aws_batch.queue is None:
        raise JobError([Problem("aws_batch.queue", "the job names no queue", "set aws_batch.queue=...")])
    return job.aws_batch.queue


def _for_the_store(one: Submission) -> str:
    """The job as text that a container reads: with its sources, unless those make it too long."""
    return one.text if len(one.text) <= MAX_CHARACTERS else one.inline


def _watched(name: str, look: Callable[[], State], pause: float, cancels: str) -> int:
    try:
        return follow(name, look, pause, say)
    except KeyboardInterrupt:
        complain(f"the job itself goes on; {cancels} ends it")
        raise


def _warn(message: str) -> None:
    complain(f"warning: {message}")
