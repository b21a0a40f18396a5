"""GPU types and the bytes that a process can use of them."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20

USABLE = 0.97
"""Of what nvidia-smi reports, what PyTorch finds: the driver keeps the rest. The least of those in public
reports of CUDA out of memory, which name PyTorch's number: T4 14.56 GiB of 15,360 MiB (0.971), RTX 4090 23.52
GiB of 24,564 MiB (0.981), H100 79.11 GiB of 81,559 MiB (0.993)."""


@dataclass(frozen=True)
class Gpu:
    """A type of GPU."""

    total_mib: int
    """`memory.total` of nvidia-smi."""
    source: str

    @property
    def usable(self) -> int:
        """Bytes that a process can use, its CUDA context included."""
        return int(self.total_mib * MIB * USABLE)


_MODAL = "nvidia-smi, as listed in github.com/modal-labs/modal-client/pull/2797"
_REPORT = "nvidia-smi, in users' reports"

GPUS: dict[str, Gpu] = {
    "T4": Gpu(15_360, _MODAL),
    "L4": Gpu(23_034, _MODAL),
    "A10G": Gpu(23_028, _MODAL),
    "A100-40GB": Gpu(40_960, _MODAL),
    "A100-80GB": Gpu(81_920, _MODAL),
    "L40S": Gpu(46_068, _MODAL),
    "H100": Gpu(81_559, _MODAL),
    "H200": Gpu(143_771, _REPORT),
    "RTX 3090": Gpu(24_576, _REPORT),
    "RTX 4090": Gpu(24_564, "nvidia-smi, in github.com/RLinf/RLinf/issues/255"),
    "A6000": Gpu(49_140, _REPORT),
    "V100-16GB": Gpu(16_384, "data sheet"),
    "V100-32GB": Gpu(32_768, "data sheet"),
}
"""By the name that clouds use."""
