"""Where runs stand, from their stores, on any machine that may read there.

    runner status JOB | URI        one run, in detail
    runner list [DIR | URI ...]    a row for each

    runner.status.standing    what HEAD, the newest manifest and the events say, as data. Pure
    runner.status.verb        reads them, and prints
    runner.status.runs        finds runs and reads where each stands
    runner.status.rows        as rows. Pure
    runner.status.listing     `runner list`

Nothing is written, and what nobody has written down is said to be unknown. Where a job is named that says on
which cluster or queue it runs, that one is asked too; without its answer the store's still stands.
"""

from __future__ import annotations

import argparse

from runner.command import Verb
from runner.job_words import runs_argument


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="JOB key=value | URI",
        help="the job, or where it keeps its checkpoints: s3://bucket/prefix/name, or runs/name",
    )
    runs_argument(parser)
    parser.add_argument("--json", action="store_true", help="for programs (docs/status.md)")
    parser.add_argument("--context", metavar="NAME", help="of kubectl (default: the current one)")
    parser.add_argument("--expected-bucket-owner", metavar="ACCOUNT", help="account that must own the bucket")
    parser.set_defaults(kms_key_id=None, allow_unfenced=False)  # of who writes


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


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "places",
        nargs="*",
        metavar="DIR | URI",
        help="a folder of runs, or what jobs name in checkpoints.uri: s3://bucket/prefix (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="for programs (docs/list.md)")
    parser.add_argument("--expected-bucket-owner", metavar="ACCOUNT", help="account that must own the bucket")


def _list(arguments: argparse.Namespace) -> int:
    from runner.status.listing import list_runs

    return list_runs(arguments)


LIST = Verb(
    "List runs, newest first: those of this machine, or those under a URI.",
    "  runner list\n  runner list s3://bucket/prefix\n  runner list runs s3://bucket/prefix --json\n",
    _list_arguments,
    _list,
)
