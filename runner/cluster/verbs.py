"""`runner submit | logs | cancel`: a job on a cluster, from a laptop; `runner.cluster.act` does it.

JOB is a job, as for every verb. A bare name is a run or a submission in kubectl's current namespace, or in
--namespace; a job id of AWS Batch is a submission there.
"""

from __future__ import annotations

import argparse
import os

from runner.command import Verb
from runner.job_words import job_arguments, split


def _place_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        choices=("kubernetes", "aws-batch"),
        help="where (default: the one section that the job has for it)",
    )
    parser.add_argument("--context", metavar="NAME", help="of kubectl (default: the current one)")


def _submit_arguments(parser: argparse.ArgumentParser) -> None:
    job_arguments(parser)
    _place_arguments(parser)
    parser.add_argument(
        "--watch",
        action="store_true",
        help="say what keeps it waiting and how it goes; end with the run's own exit code",
    )


def _named_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="JOB|SUBMISSION",
        help="the job file, and values that override it; or the name of a run or submission; or a job id",
    )
    _place_arguments(parser)
    parser.add_argument(
        "--namespace", metavar="NAME", help="of Kubernetes (default: the job's, else the context's)"
    )


def _logs_arguments(parser: argparse.ArgumentParser) -> None:
    _named_arguments(parser)
    parser.add_argument("--follow", action="store_true", help="go on until the job has ended")


def _submit(arguments: argparse.Namespace) -> int:
    from runner.settings import resolve

    resolved = resolve(*split(arguments.words), os.environ)
    from runner.cluster import act

    target = act.target_of(resolved.job, arguments.to)
    return act.submit(resolved, target, arguments.context, arguments.watch)


def _logs(arguments: argparse.Namespace) -> int:
    from runner.cluster import act

    asked = act.asked(arguments.words, arguments.to, os.environ)
    return act.logs(asked, arguments.context, arguments.namespace, arguments.follow)


def _cancel(arguments: argparse.Namespace) -> int:
    from runner.cluster import act

    asked = act.asked(arguments.words, arguments.to, os.environ)
    return act.cancel(asked, arguments.context, arguments.namespace)


VERBS = {
    "submit": Verb(
        "Run a job on Kubernetes or AWS Batch: what render prints, whole or not at all.",
        "  runner submit jobs/chartqa-sft.yaml\n"
        "  runner submit jobs/chartqa-sft.yaml kubernetes.queue=gpu-spot --watch\n"
        "  runner submit jobs/chartqa-sft.yaml --to aws-batch\n",
        _submit_arguments,
        _submit,
    ),
    "logs": Verb(
        "Print the log of a submission: the newest of a run, or the one that is named.",
        "  runner logs jobs/chartqa-sft.yaml --follow\n  runner logs chartqa-sft-x7k2q\n",
        _logs_arguments,
        _logs,
    ),
    "cancel": Verb(
        "End what is alive of a run, or a submission; what is committed stays.",
        "  runner cancel jobs/chartqa-sft.yaml\n  runner cancel chartqa-sft-x7k2q\n",
        _named_arguments,
        _cancel,
    ),
}
