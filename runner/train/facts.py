"""What was really in force in a run: versions and memory, read from the process, not from the job."""

from __future__ import annotations

import resource
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from bitsandbytes.nn import Int8Params, Params4bit
from peft import PeftModel

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


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the base model as it lies in memory: parameters, scales of the quantized ones and buffers,
    without adapters."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    adapters = tuple(model.peft_config) if isinstance(model, PeftModel) else ()
    parameters = [
        parameter
        for name, parameter in base.named_parameters()
        if not any(part in adapters for part in name.split("."))
    ]
    return sum(map(_parameter_bytes, parameters)) + sum(buffer.nbytes for buffer in base.buffers())


def _parameter_bytes(parameter: torch.nn.Parameter) -> int:
    if isinstance(parameter, Params4bit) and parameter.quant_state is not None:
        scales = parameter.quant_state
        nested = [scales.state2.absmax, scales.offset] if scales.nested else []
        return int(parameter.nbytes + sum(one.nbytes for one in [scales.absmax, *nested]))
    if isinstance(parameter, Int8Params):
        return int(parameter.nbytes + 4 * parameter.shape[0])  # a float32 scale for every row
    return int(parameter.nbytes)
