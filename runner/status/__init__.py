"""`runner status JOB | URI`: where a run stands, from its store, on any machine that may read there.

    runner.status.standing    what HEAD, the newest manifest and the events say, as data. Pure
    runner.status.verb        reads them, and prints

Nothing is written, and what nobody has written down is said to be unknown. Where a job is named that says on
which cluster or queue it runs, that one is asked too; without its answer the store's still stands.
"""

from __future__ import annotations

import argparse

from runner.command import Verb


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="JOB key=value | URI",
        help="the job, or where it keeps its checkpoints: s3://bucket/prefix/name, or runs/name",
    )
    parser.add_argument("--json", action="store_true", help="for programs (docs/status.md)")
    parser.add_argument("--context", metavar="NAME", help="of kubectl (default: the current one)")
    parser.add_argument("--expected-bucket-owner", metavar="ACCOUNT", help="account that must own the bucket")


def _status(arguments: argparse.Namespace) -> int:
    from runner.status.verb import status

    return status(arguments)


STATUS = Verb(
    "Say where a run stands, from its store, and what its cluster says; nothing is written.",
    "  runner status s3://bucket/prefix/my-charts\n"
    "  runner status jobs/demo-sft.yaml checkpoints.uri=s3://bucket/prefix\n"
    "  runner status runs/my-charts --json\n",
    _arguments,
    _status,
)
