"""What only a GPU shows: memory that is really full, bitsandbytes' own kernels, resumes on the device."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.attempts import merged, run, steps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

ON_GPU = {
    "model": {"dtype": "bfloat16", "attn_implementation": "eager"},
    "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "lora": {"lora_dropout": 0.1},
    "training": {"per_device_train_batch_size": 4, "optim": "paged_adamw_8bit"},
}
LARGE = {"model": {"processor": {"size": {"longest_edge": 768}, "do_image_splitting": True}}}

CAPPED = """
import sys, torch
from pathlib import Path
torch.cuda.set_per_process_memory_fraction(float(sys.argv[1]))
from runner.train.__main__ import main
sys.exit(main(Path(sys.argv[2])))
"""


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the supervisor hides the others: TRL refuses DataParallel."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


def test_a_full_gpu_makes_the_batch_smaller(tmp_path: Path) -> None:
    """The cap lies half way between what one row and what eight rows took; ids stay the same."""
    peaks, ids = {}, {}
    for size in (1, 8):
        training = {"per_device_train_batch_size": size, "max_steps": 2, "gradient_checkpointing": False}
        outcome, events = run(tmp_path / str(size), merged(LARGE, {"training": training}))
        assert outcome["outcome"] == "done"
        peaks[size], ids[size] = outcome["facts"]["peak_memory_bytes"], [one["ids"] for one in steps(events)]
    cap = (peaks[1] + peaks[8]) / 2 / torch.cuda.get_device_properties(0).total_memory
    training = {"per_device_train_batch_size": "auto", "max_steps": 2, "gradient_checkpointing": False}
    trainer = [sys.executable, "-c", CAPPED, str(cap)]
    outcome, events = run(tmp_path / "auto", merged(LARGE, {"training": training}), trainer=trainer)
    assert outcome["outcome"] == "done"
    assert 1 <= outcome["facts"]["geometry"]["per_device"] < 8
    assert [one["ids"] for one in steps(events)] == ids[1] == ids[8]


def test_a_resumed_run_ends_with_the_same_bytes_on_the_gpu(tmp_path: Path) -> None:
    changes = merged(ON_GPU, {"checkpoints": {"save_steps": 2}})
    outcome, events = run(tmp_path / "whole", changes)
    assert outcome["outcome"] == "done" and outcome["facts"]["device"].startswith("cuda")
    (middle,) = (
        path for path in (tmp_path / "whole" / "outbox").iterdir() if path.name.startswith("00000002")
    )
    (tmp_path / "resumed").mkdir()
    copied = shutil.copytree(middle, tmp_path / middle.name)
    outcome, later = run(tmp_path / "resumed", changes, attempt=2, restore=copied)
    assert outcome["outcome"] == "done"
    assert [one["loss"] for one in steps(later)] == [one["loss"] for one in steps(events)[2:]]
    ends = [tmp_path / one / "adapter" / "adapter_model.safetensors" for one in ("whole", "resumed")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_the_base_is_four_bits_on_the_gpu(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, merged(ON_GPU, {"training": {"max_steps": 1}}))
    parts = outcome["facts"]["parts"]
    assert parts["language_model"]["linear4bit"] > 0
    assert parts["vision_tower"]["linear4bit"] == parts["projector"]["linear4bit"] == 0
    assert outcome["facts"]["trainable_dtypes"] == ["float32"]
