"""`runner render TARGET JOB`: a job as an orchestrator's objects, on stdout, to be read, diffed and applied.

YAML documents for Kubernetes, one JSON document for the clouds. The same job makes the same text.
"""

from __future__ import annotations

import argparse
import json
import os

from runner.command import Verb, complain, say
from runner.job_words import job_arguments, split

NAMES = ("kubernetes", "jobset", "trainjob", "aws-batch", "gcp-batch")
"""Of `runner.targets.TARGETS`, which is loaded when the verb runs."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", choices=NAMES, metavar="TARGET", help=f"one of {', '.join(NAMES)}")
    job_arguments(parser)
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="name of the objects (default: the job's name and five characters of its hash)",
    )


def _render(arguments: argparse.Namespace) -> int:
    from runner.settings import resolve

    resolved = resolve(*split(arguments.words), os.environ)
    from runner.targets import gcp_batch, render, submission
    from runner.targets.documents import documents

    one = submission(resolved, arguments.name)
    objects = render(arguments.target, one)
    if arguments.target == "aws-batch":
        say(json.dumps({key: value for tree in objects for key, value in tree.items()}, indent=2))
    elif arguments.target == "gcp-batch":
        say(json.dumps(objects[0], indent=2))
        complain(f"submit it with: {gcp_batch.command(one, 'job.json')}")
    else:
        say(documents(objects))
    return 0


RENDER = Verb(
    "Print a job as a Kubernetes Job, JobSet, TrainJob, AWS Batch or GCP Batch job.",
    "  runner render kubernetes jobs/demo-sft.yaml kubernetes.image=... checkpoints.uri=s3://...\n"
    "  runner render jobset my-job.yaml | kubectl apply --filename -\n"
    "  runner render gcp-batch my-job.yaml > job.json\n",
    _arguments,
    _render,
)
