"""What a training process of either side says about itself when it is done: its peak memory and its card.

Imported by `plain_trl.py` and `measured_trainer.py`, so that both are measured by the same reading.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any


def process_facts() -> dict[str, Any]:
    """The facts of this process.

    peak_bytes        most bytes in use: allocated on the GPU where there is one, else resident
    reserved_bytes    most bytes that PyTorch's allocator held on the GPU; None without one
    card              name of the GPU; None without one
    """
    import torch

    if torch.cuda.is_available():
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "card": torch.cuda.get_device_name(),
        }
    return {"peak_bytes": _resident(), "reserved_bytes": None, "card": None}


def _resident() -> int:
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss, which on Linux begins at what the process had before its exec: its parent's peak.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
