"""What was really in force in a run: versions and memory, read from the process, not from the job."""

from __future__ import annotations

import resource
import sys
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    return {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}}


def peak_memory() -> int:
    """Most bytes in use so far: allocated on the GPU where there is one, else resident in this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss, which on Linux begins at what the process had before its exec: its parent's peak.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
