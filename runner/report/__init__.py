"""`runner report JOB | RUN | URI ...`: a run, or several side by side, as one HTML file that fetches nothing.

    read, stored        a run's folder, or its store -> data, whoever writes to it meanwhile
    job_text, history, marks, loose    what the files say, added up
    metrics, judge, verdict, beside, curves    what follows from it. Pure
    view, compare       what a page says. Pure
    render, templates/, vendor/    HTML; Observable Plot draws the curves in the reader's browser
    at_end              the report that a supervisor leaves when a run ends

Nothing here imports torch, decides anything about a run, or writes to it but `report.html`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from runner.command import Verb
from runner.job_words import job_arguments, runs_argument


def _arguments(parser: argparse.ArgumentParser) -> None:
    job_arguments(parser)
    parser.description = (
        f"{parser.description}\nA folder of a run or the address of its store may stand for JOB."
    )
    runs_argument(parser)
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FILE",
        help="where to write it (default: report.html in the run's folder; of several runs or a store, here)",
    )
    parser.add_argument("--expected-bucket-owner", metavar="ACCOUNT", help="account that must own the bucket")
    parser.set_defaults(kms_key_id=None, allow_unfenced=False)  # of who writes


def _report(arguments: argparse.Namespace) -> int:
    from runner.report.verb import report

    return report(arguments)


REPORT = Verb(
    "Write what became of a run as one HTML file, also while it trains; of several, what differs.",
    "  runner report jobs/demo-sft.yaml\n"
    "  runner report runs/demo-sft\n"
    "  runner report runs/demo-sft runs/demo-2 --to comparison.html\n"
    "  runner report s3://bucket/prefix/my-charts\n",
    _arguments,
    _report,
)
