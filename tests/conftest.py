"""The world that tests see: a home of their own, no settings of the person who runs them, no network.

pytest-socket (pyproject.toml) closes this process to all but the local machine; the variables set
here do the same for the child processes, and both inherit an empty home and empty caches. The
demo's data set is rendered once a session, into that home.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ("tests.machines",)

# A script's `make test &` and `nohup make test` begin with these ignored, and so would all that tests start
# and stop by them: a command leaves an ignored signal as it is.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

FOREIGN = (
    "ACCELERATE_",
    "AWS_",
    "BATCH_",
    "BNB_",
    "CUDA_",
    "DATASETS_",
    "DS_",
    "HF_",
    "HUGGING_FACE_",
    "JOB",
    "KUBERNETES_",
    "MAKE",
    "MFLAGS",
    "PYTHONWARNINGS",
    "PYTORCH_",
    "RUNNER_",
    "TORCH",
    "TRANSFORMERS_",
    "TRL_",
    "WANDB_",
    "XDG_",
)
"""Beginnings of variables that change what the runner or its libraries do; tests set their own."""

CLOSED_PORT = "http://127.0.0.1:9"
"""A proxy that refuses: the way out of child processes, which pytest-socket does not see."""


def pytest_configure(config: pytest.Config) -> None:
    """Before collection, because libraries read their environment when they are imported."""
    home = tempfile.TemporaryDirectory(prefix="runner-tests-")
    config.add_cleanup(home.cleanup)
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]
    os.environ |= {
        "HOME": home.name,
        "RUNNER_CACHE": str(Path(home.name, "cache")),
        "RUNNER_METADATA": "off",  # tests may run on a machine of a cloud
        "RUNNER_REPORT": "off",  # half a second for each of many runs; tests/test_report_end.py has it on
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # The same sums on every machine: float addition depends on how many threads share it. One, because
        # `make test` keeps every core busy with other files.
        "OMP_NUM_THREADS": "1",
        # As the supervisor sets it for trainers: no spinning where other work needs the core.
        "OMP_WAIT_POLICY": "PASSIVE",
        "HTTP_PROXY": CLOSED_PORT,
        "HTTPS_PROXY": CLOSED_PORT,
        "ALL_PROXY": CLOSED_PORT,
        "NO_PROXY": "127.0.0.1,localhost,::1",
        "LC_ALL": "C.UTF-8",
        "COLUMNS": "100",
    }
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "NO_COLOR", "FORCE_COLOR"):
        os.environ.pop(name, None)


MOST_WORKERS = 5
"""The longest file takes a fifth of the whole."""

LONGEST = (
    "strategies",
    "demos",
    "refused_strategies",
    "best",
    "resume",
    "submit_kubernetes",
    "submit_batch",
    "chaos",
    "faults",
    "damage",
    "batch",
    "architectures",
    "dpo",
    "jobs",
    "shipping",
    "readme",
    "bench",
    "request",
    "equality",
    "collection",
    "options",
    "report_page",
    "custody",
    "tracking",
    "terminal",
    "checkpoint_verbs",
    "demo",
    "fuzz",
    "iam",
    "ladder",
    "protocol_model",
    "export",
    "export_merging",
    "report",
)
"""Files that take ten seconds and more, longest first: what begins last should be short."""


def pytest_xdist_auto_num_workers() -> int:
    """Files that run at once: two more than cores, because two fifths of their time is waiting for others."""
    return min((os.cpu_count() or 1) + 2, MOST_WORKERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files, the longest first; the order inside each is its own."""
    rank = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True)
def environment_restored() -> Iterator[None]:
    """Libraries write to `os.environ` (TrainingArguments does); the next test must not see it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
