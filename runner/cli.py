"""The verbs, and the one place that catches everything: `runner VERB ...`.

A verb imports what it needs when it runs, so that `validate` answers in a fraction of a second and never
loads torch. Every failure is one message on stderr and an exit code of `runner.errors`; a failure that is
none of those is a defect of ours, and its traceback goes to a file that the message names.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar

from runner import __version__
from runner.again import again
from runner.cluster.verbs import VERBS as CLUSTER
from runner.command import Group, ReaderLeft, Verb, complain, listed, parsed, program, run, say
from runner.errors import JobError, RunnerError, UsageError
from runner.export.verb import EXPORT
from runner.health import HEALTH
from runner.job.secrets import without_secrets
from runner.job_words import SOURCES, job_arguments, runs_argument, split
from runner.last_words import spoken
from runner.render_verb import RENDER
from runner.report import REPORT
from runner.status import LIST, STATUS

INTERRUPTED = 130
"""What a shell reports for Ctrl-C. `train` handles the signal itself and leaves with 75."""

CODES = """\
exit codes:
  0 done   64 usage   65 bad data   74 storage   75 stopped, run again   76 not owner
  77 permission   78 bad job   93 no progress   1 and others: crash
"""


def entry() -> NoReturn:
    """The console script."""
    code = main(sys.argv[1:])
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError:
        # The interpreter would flush once more, fail, and replace the code with its own.
        os._exit(code)
    sys.exit(code)


def main(argv: list[str]) -> int:
    """Run one command and return its exit code."""
    try:
        return spoken(os.environ, lambda: _run(argv)) if argv[:1] == ["train"] else _run(argv)
    except ReaderLeft:
        return 0
    except JobError as error:
        count = len(error.problems)
        of_job = f"\n\n{count} problem{'s' if count != 1 else ''} in the job; nothing was started"
        complain(f"{error}{of_job if isinstance(VERBS[argv[0]], Verb) else ''}{_next(error, argv)}")
        return error.exit_code
    except RunnerError as error:
        complain(without_secrets(f"{error}{_next(error, argv)}", os.environ))
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 (the last resort, and the only one in this process)
        return _defect(error)


def _next(error: RunnerError, argv: list[str]) -> str:
    """What to type next, where a run was at work."""
    if argv[0] not in ("train", "evaluate"):
        return ""
    if isinstance(error, UsageError):  # what was typed cannot be read, and `again` has nothing to say
        return ""
    verb = VERBS[argv[0]]
    assert isinstance(verb, Verb)
    file = split(parsed(argv[0], verb, argv[1:]).words)[0] or os.environ.get("JOB_FILE")
    line = again(error.exit_code, program(sys.argv[0]), argv, file)
    return "" if line is None else f"\n{line}"


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        say(_overview())
        return 0 if argv else UsageError.exit_code
    if argv[0] in ("-V", "--version"):
        say(f"runner {__version__}")
        return 0
    return run("runner", VERBS, argv)


def _overview() -> str:
    return (
        "usage: runner VERB [JOB] [key=value ...]\n\n"
        "Fine-tunes a vision-language model as one YAML file says, and survives its machine.\n\n"
        f"verbs:\n{listed(VERBS)}\n\n{SOURCES}\n"
        f"runner VERB --help shows examples; runner --version the version.\n\n{CODES}"
    ).rstrip()


def _validate_arguments(parser: argparse.ArgumentParser) -> None:
    job_arguments(parser)
    parser.add_argument(
        "--resolved",
        action="store_true",
        help="print the complete job as YAML, with the source of every value",
    )


def _runs_arguments(parser: argparse.ArgumentParser) -> None:
    job_arguments(parser)
    runs_argument(parser)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _runs_arguments(parser)
    voice = parser.add_mutually_exclusive_group()
    voice.add_argument(
        "--quiet", dest="voice", action="store_const", const="quiet", help="warnings, errors and the verdict"
    )
    voice.add_argument(
        "--json", dest="voice", action="store_const", const="json", help="every event as a line of JSON"
    )
    parser.set_defaults(voice="lines")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _train_arguments(parser)
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="adapter folder, or `base` for the base model (default: runs/<name>/adapter)",
    )


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _runs_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document (docs/plan.md)")
    parser.add_argument(
        "--gpu", metavar="TYPE", help="type of GPU that memory is counted for, as L4 or A100-80GB, or cpu"
    )
    parser.add_argument(
        "--sample", type=_above_zero(int), metavar="N", help="look at N rows, drawn by seed (default: 1000)"
    )
    parser.add_argument(
        "--steps-per-second", type=_above_zero(float), metavar="N", help="optimizer steps, for the time"
    )
    parser.add_argument(
        "--price-per-hour", type=_above_zero(float), metavar="PRICE", help="of all machines of the job"
    )


T = TypeVar("T", int, float)


def _above_zero(kind: Callable[[str], T]) -> Callable[[str], T]:
    def number(text: str) -> T:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is no number above zero")
        return value

    number.__name__ = "number"  # argparse names it when `kind` refuses
    return number


def _schema_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # takes nothing


def _validate(arguments: argparse.Namespace) -> int:
    from runner.job.resolved import resolved_yaml
    from runner.settings import resolve
    from runner.supervisor.world import place
    from runner.tracking.choice import asked, missing, remedy

    resolved = resolve(*split(arguments.words), os.environ)
    place(resolved.job, gpus=0)  # refuses nodes that no machine could make do
    if absent := missing(asked(resolved.job.training.options.get("report_to"))):
        complain(f"warning: training.report_to: {', '.join(absent)} is not installed here: {remedy(absent)}")
    if arguments.resolved:
        say(resolved_yaml(resolved))
        return 0
    job = resolved.job
    bits = "4-bit " if (job.quantization or {}).get("load_in_4bit") else "8-bit " if job.quantization else ""
    how = f"LoRA r={job.lora.get('r', 8)}" if job.lora is not None else "full fine-tuning"
    changed = sum(
        1 for source in resolved.sources.values() if source.startswith(("command line", "environment"))
    )
    say(
        f"valid: {job.name} ({resolved.file or 'no file'}{f', {changed} overridden' if changed else ''})\n"
        f"  {job.method} of {job.model.name_or_path} ({bits}base, {how}), {job.model.dtype}\n"
        f"  train on {', '.join(f'{one.path} [{one.split}]' for one in job.datasets.train)}"
    )
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from runner.settings import resolve

    resolved = resolve(*split(arguments.words), os.environ)
    from runner.planning.verb import Asked, plan

    asked = Asked(
        runs=arguments.runs,
        gpu=arguments.gpu,
        sample=arguments.sample,
        steps_per_second=arguments.steps_per_second,
        price_per_hour=arguments.price_per_hour,
    )
    return plan(resolved, asked, arguments.json)


def _train(arguments: argparse.Namespace) -> int:
    from runner.settings import resolve

    resolved = resolve(*split(arguments.words), os.environ)  # a bad job is answered before more is loaded
    from runner import launch

    return launch.train(resolved, arguments.runs, voice=arguments.voice)


def _evaluate(arguments: argparse.Namespace) -> int:
    from runner.settings import resolve

    resolved = resolve(*split(arguments.words), os.environ)
    from runner import launch

    return launch.evaluate(resolved, arguments.runs, arguments.adapter, voice=arguments.voice)


def _schema(arguments: argparse.Namespace) -> int:
    del arguments
    from runner.schema import job_schema_text

    say(job_schema_text())
    return 0


def _checkpoints() -> Mapping[str, Verb]:
    from runner.checkpoint_verbs import VERBS as INNER

    return INNER


def _defect(error: Exception) -> int:
    text = "".join(traceback.format_exception(error))
    if os.environ.get("RUNNER_DEBUG") == "1":
        where = f"the traceback:\n{text}"
    else:
        with tempfile.NamedTemporaryFile("w", prefix="runner-defect-", suffix=".log", delete=False) as file:
            file.write(text)
        where = f"traceback: {file.name} (RUNNER_DEBUG=1 prints it)"
    complain(f"{type(error).__name__}: this is a defect of vlm-runner, please report it; {where}")
    return RunnerError.exit_code


VERBS: dict[str, Verb | Group] = {
    "validate": Verb(
        "Check a job: every problem at once, in a fraction of a second, nothing started.",
        "  runner validate jobs/demo-sft.yaml\n"
        "  runner validate jobs/demo-sft.yaml lora.r=16 'datasets.train.0.split=train[:10%]'\n"
        "  JOB__LORA__R=16 runner validate jobs/demo-sft.yaml --resolved\n",
        _validate_arguments,
        _validate,
    ),
    "plan": Verb(
        "Say what a job will be and need, and check what a GPU would wait for; no GPU, no weights.",
        "  runner plan jobs/demo-sft.yaml\n"
        "  runner plan jobs/demo-sft.yaml --steps-per-second 2.5 --price-per-hour 1.20\n"
        "  runner plan jobs/demo-sft.yaml --json --sample 200 training.global_batch_size=16\n",
        _plan_arguments,
        _plan,
    ),
    "train": Verb(
        "Train a job. The same command again resumes it.",
        "  runner train jobs/demo-sft.yaml\n"
        "  runner train jobs/demo-sft.yaml name=demo-2 training.learning_rate=1e-4\n"
        "  JOB_FILE=jobs/demo-sft.yaml runner train\n",
        _train_arguments,
        _train,
    ),
    "evaluate": Verb(
        "Evaluate a job's adapter, or the base model, by generation.",
        "  runner evaluate jobs/demo-sft.yaml\n"
        "  runner evaluate jobs/demo-sft.yaml --adapter runs/demo-sft/adapter evaluation.max_samples=50\n",
        _evaluate_arguments,
        _evaluate,
    ),
    "report": REPORT,
    "export": EXPORT,
    "render": RENDER,
    "checkpoints": Group(
        "List, verify, pull and clear what a run has committed.",
        "  runner checkpoints ls s3://bucket/prefix/my-charts\n"
        "  runner checkpoints pull runs/my-charts --to my-adapter\n",
        _checkpoints,
    ),
    **CLUSTER,
    "list": LIST,
    "status": STATUS,
    "health": HEALTH,
    "schema": Verb(
        "Print the JSON Schema of a job, for editors.",
        "  runner schema > job.schema.json\n"
        "  # first line of a job: # yaml-language-server: $schema=job.schema.json\n",
        _schema_arguments,
        _schema,
    ),
}
