"""Batch size by itself, in real trainers: the probe finds what fits and leaves no trace, a smaller
micro-batch frees memory, and a run that ran out of it ends as one that began with the size that fits.

Allocations that fail are real ones (tests/capped_trainer.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from trl import SFTTrainer

from runner import launch
from runner.errors import OutOfMemory, RunnerError
from runner.plan import Geometry
from runner.settings import resolve
from runner.train import probe, rng
from runner.train import run as sequence
from runner.train.channel import Channel
from runner.train.data.collator import Collator
from runner.train.memory import is_out_of_memory
from runner.train.models.model import load_adapter
from runner.train.trainer import RunTrainer
from tests import warm
from tests.attempts import JOB, charts, merged, planned, run, steps
from tests.samples import chartqa, llava_next, png, rows, smolvlm, source

AUTO = {"training": {"per_device_train_batch_size": "auto"}}


def heavy(longest_edge: int, training: dict[str, Any]) -> dict[str, Any]:
    """One step over images of 1 + (longest_edge / 128)^2 tiles; with 37 of them a row takes near 90 MB. Some
    rows show one chart, and do not share the work."""
    return {
        "speed": {"encode_once": False, "share_prompt": False},
        "model": {"processor": {"size": {"longest_edge": longest_edge}}},
        "training": {"max_steps": 1, "gradient_checkpointing": False, **training},
    }


def capped(*caps: dict[str, Any]) -> list[str]:
    return warm.command("tests.capped_trainer", json.dumps(caps))


# --- the probe, in this process ---


class Done(Exception):
    """The probe is over; the rest of the attempt is other tests' business."""


@dataclass
class Probed:
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    cut: Geometry | None = None
    passes: list[int] = field(default_factory=list)
    """Rows of every forward and backward that was begun."""
    moments: list[int] = field(default_factory=list)
    """How many parameters had optimizer state at each of them."""


def everything(trainer: RunTrainer) -> dict[str, Any]:
    """Copies of what training starts from."""
    return {
        "parameters": {name: value.detach().clone() for name, value in trainer.model.named_parameters()},
        "buffers": {name: value.clone() for name, value in trainer.model.named_buffers()},
        "gradients": [name for name, one in trainer.model.named_parameters() if one.grad is not None],
        "trainable": [name for name, one in trainer.model.named_parameters() if one.requires_grad],
        "generators": rng.capture(),
        "metrics": {mode: dict(values) for mode, values in trainer._metrics.items()},
        "tokens": trainer._total_train_tokens,
        "optimizer": trainer.optimizer,
        "scheduler": trainer.lr_scheduler,
        "state": dict(vars(trainer.state)),
        "micro": list(trainer._micro),
        "arguments": trainer.args.to_json_string(),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


@pytest.fixture
def probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Probed]:
    """Runs an attempt up to the end of its probe, where passes above `fits` rows run out of memory."""

    def to_the_probe(changes: dict[str, Any], fits: int = 1 << 30) -> Probed:
        seen = Probed()
        step, fitting = RunTrainer.training_step, probe.fitting

        def counted(self: RunTrainer, model: torch.nn.Module, inputs: dict[str, Any], *more: Any) -> Any:
            seen.passes.append(len(inputs["row_index"]))
            seen.moments.append(len(self.optimizer.state))
            answer = step(self, model, inputs, *more)
            if seen.passes[-1] > fits:
                torch.empty(1 << 50, dtype=torch.uint8)
            return answer

        def watched(trainer: RunTrainer, *arguments: Any) -> Geometry:
            seen.before = everything(trainer)
            try:
                seen.cut = fitting(trainer, *arguments)
            finally:
                seen.after = everything(trainer)
            raise Done

        monkeypatch.setattr(RunTrainer, "training_step", counted)
        monkeypatch.setattr(probe, "fitting", watched)
        plan = planned(tmp_path, merged(AUTO, changes))
        with pytest.raises((Done, OutOfMemory)) as ended:
            sequence.train(plan, Channel(plan.attempt_dir, None))
        if ended.type is OutOfMemory:
            raise ended.value
        return seen

    return to_the_probe


QLORA = {
    "model": {"dtype": "bfloat16"},
    "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "lora": {"r": 64, "lora_dropout": 0.1, "use_dora": True},
    "training": {"optim": "adamw_bnb_8bit", "warmup_steps": 2},
}
WHOLE = {"lora": None, "training": {"gradient_checkpointing": False}}


@pytest.mark.parametrize("changes", [QLORA, WHOLE], ids=["DoRA on 4 bits, 8-bit optimizer", "full"])
def test_a_probe_leaves_no_trace(probed: Callable[..., Probed], changes: dict[str, Any]) -> None:
    seen = probed(changes, fits=4)
    assert seen.cut is not None
    assert (seen.cut.per_device, seen.cut.accumulation) == (4, 2)
    assert seen.passes == [1, 8, 4]
    for name in seen.before:
        assert same(seen.before[name], seen.after[name]), name
    assert seen.before["optimizer"] is None
    # The passes that decide run beside the optimizer's state of every parameter.
    assert seen.moments == [0, len(seen.before["trainable"]), len(seen.before["trainable"])]
    assert seen.moments[-1] > 0


@pytest.mark.parametrize(
    ("total", "fits", "passes", "found"),
    [
        (8, 8, [1, 8], 8),
        (12, 3, [1, 6, 4, 3], 3),
        (8, 1, [1, 8, 4, 2, 1], 1),
        (64, 64, [1, 8], 8),
    ],
)
def test_sizes_are_tried_from_the_largest(
    probed: Callable[..., Probed], total: int, fits: int, passes: list[int], found: int
) -> None:
    """Without a GPU from the largest divisor up to 8."""
    seen = probed({"training": {"global_batch_size": total}}, fits=fits)
    tried = [size for size, next_ in zip(seen.passes, [*seen.passes[1:], 0], strict=True) if size != next_]
    assert tried == passes
    assert seen.cut == Geometry(
        global_batch_size=total, per_device=found, accumulation=total // found, world=1
    )


def test_one_row_that_does_not_fit_is_said_at_once(probed: Callable[..., Probed]) -> None:
    with pytest.raises(OutOfMemory, match="the longest row alone does not fit") as error:
        probed({}, fits=0)
    assert "can't allocate memory" in str(error.value)


def test_the_worst_rows_are_the_longest_and_the_largest(tmp_path: Path) -> None:
    processor = smolvlm()
    processor.image_processor.size = {"longest_edge": 512}
    questions = ["What?", "What? " * 200, "Which?", "Why? " * 30]
    shapes = [(64, 64), (64, 16), (128, 128), (64, 64)]
    pictures = [png(seed, *shape) for seed, shape in enumerate(shapes)]
    folder = chartqa(tmp_path / "charts", pictures, query=questions)
    prepared = rows(processor, (source(), folder), limit=4096)
    collate = Collator(processor, prepared.form, torch.float32)
    worst = probe.worst(prepared, collate)
    tokens = prepared.dataset["tokens"][:]
    assert worst.longest["index"] == tokens.index(max(tokens))
    pixels = [probe.pixels(collate([row])) for row in prepared.dataset]
    assert pixels[worst.largest["index"]] == max(pixels)
    assert worst.longest["index"] != worst.largest["index"]
    assert [[row["index"] for row in batch] for batch in worst.batches(1)] == [
        [worst.longest["index"]],
        [worst.largest["index"]],
    ]
    (batch,) = worst.batches(3)
    made = collate(batch)
    assert made["input_ids"].shape == (3, max(tokens))
    assert probe.pixels(made) >= 3 * max(pixels)


@pytest.mark.parametrize(
    ("error", "limited", "answer"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False, True),
        (MemoryError(), False, True),
        (RuntimeError("CUDA error: out of memory\nCompile with ..."), False, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), False, True),
        (RuntimeError("could not create a primitive"), False, False),
        (RuntimeError("could not create a primitive"), True, True),
        (RuntimeError("size mismatch"), True, False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False, False),
    ],
)
def test_out_of_memory_is_recognised(
    error: Exception, limited: bool, answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 1 << 40 if limited else -1  # RLIM_INFINITY
    monkeypatch.setattr("runner.train.memory.resource.getrlimit", lambda kind: (limit, -1))
    assert is_out_of_memory(error) is answer


def test_torch_says_it_so_on_a_cpu() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


# --- whole attempts ---


def test_a_run_that_found_its_size_is_the_run_that_was_given_it(tmp_path: Path) -> None:
    """Byte for byte, dropout and upstream's own log included."""
    changes = {"lora": {"lora_dropout": 0.2}, "training": {"max_steps": 2, "logging_steps": 1}}
    left = []
    for size in ("auto", 4):
        folder = tmp_path / str(size)
        wanted = merged(changes, {"training": {"per_device_train_batch_size": size}})
        outcome, events = run(folder, wanted, trainer=capped({"rows": 4}))
        assert outcome["outcome"] == "done", outcome["error"]
        assert outcome["facts"]["geometry"]["per_device"] == 4
        (checkpoint,) = (folder / "outbox").iterdir()
        kept = json.loads((checkpoint / "checkpoint.json").read_text())["extra"]["batch"]
        assert kept == {"per_device": 4, "asked": size, "world": 1, "strategy": "single"}
        log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        timeless = [{key: value for key, value in one.items() if "second" not in key} for one in log]
        adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        left.append((adapter, (folder / "steps.jsonl").read_bytes(), timeless))
        tried = [event["per_device"] for event in events if event["event"] == "probe"]
        assert tried == ([1, 8, 4] if size == "auto" else [])
    assert left[0] == left[1]


def test_a_smaller_micro_batch_frees_memory(tmp_path: Path) -> None:
    """1 x 8 takes seven rows of activations more than 8 x 1, whose other rows only wait."""
    peaks = {}
    for size in (1, 8):
        outcome, events = run(
            tmp_path / str(size),
            heavy(longest_edge=768, training={"per_device_train_batch_size": size}),
        )
        assert outcome["outcome"] == "done", outcome["error"]
        assert len(steps(events)) == 1
        peaks[size] = outcome["facts"]["peak_memory_bytes"]
    assert peaks[8] - peaks[1] > 300 << 20


def test_the_probe_goes_down_to_what_a_memory_limit_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of the system's own, which the run then keeps to the end."""
    # glibc keeps what it once had from the system; tensors of their own mappings go back.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 17))
    # A process of its own: one that is forked has room already, of what its parent gave back.
    trainer = [sys.executable, "-m", "tests.capped_trainer", json.dumps([{"room": 140}])]
    outcome, events = run(tmp_path, heavy(longest_edge=512, **AUTO), trainer=trainer)
    assert outcome["outcome"] == "done", outcome["error"]
    tried = [event["per_device"] for event in events if event["event"] == "probe"]
    assert tried[:2] == [1, 8]
    assert tried[-1] == outcome["facts"]["geometry"]["per_device"] < 8
    assert [len(step["ids"]) for step in steps(events)] == [8]


def test_a_run_that_runs_out_of_memory_ends_as_one_that_began_with_what_fits(tmp_path: Path) -> None:
    """At the first step, at step 7, and at the first step after the resume from 6: 8, 4, 2, then 1."""
    charts()
    training = {"num_train_epochs": 4, "max_steps": 8, "per_device_train_batch_size": "auto"}
    wanted = merged(JOB, {"training": training, "checkpoints": {"save_steps": 2}})
    job = tmp_path / "job.json"
    job.write_text(json.dumps(wanted))  # JSON is YAML
    caps = (
        {"rows": 4, "step": 1, "attempt": 1},
        {"rows": 2, "step": 7, "attempt": 2},
        {"rows": 1, "attempt": 3},
    )
    assert launch.train(resolve(str(job), [], {}), tmp_path / "runs", trainer=capped(*caps)) == 0
    folder = tmp_path / "runs" / "test"

    result = json.loads((folder / "result.json").read_text())
    assert (result["outcome"], result["exit_code"], result["attempts"]) == ("done", 0, 4)
    assert result["facts"]["geometry"] == {
        "global_batch_size": 8,
        "per_device": 1,
        "accumulation": 8,
        "world": 1,
    }
    told = [(one["attempt"], one["step"], one["per_device"]) for one in result["restarts"]]
    assert told == [
        (2, 0, {"from": 8, "to": 4}),
        (3, 6, {"from": 4, "to": 2}),
        (4, 6, {"from": 2, "to": 1}),
    ]
    places = (("in step 1", 8), ("in step 7", 4), ("in step 7", 2))
    for one, (place, size) in zip(result["restarts"], places, strict=True):
        assert one["reason"].startswith(f"out of memory {place}: a micro-batch of {size} does not fit")

    fitting = merged({"training": training}, {"training": {"per_device_train_batch_size": 1}})
    run(tmp_path / "fitting", fitting)
    ours, theirs = (
        [json.loads(line) for line in (path / "steps.jsonl").read_text().splitlines()]
        for path in (folder, tmp_path / "fitting")
    )
    assert len(ours) == 8
    assert [step["rows"] for step in ours] == [step["rows"] for step in theirs]
    assert all(len(step["rows"]) == 8 for step in ours)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_the_largest_row_is_found_among_many_longer_ones(tmp_path: Path) -> None:
    """With a processor whose tiles grow with the image."""
    processor = llava_next(smolvlm())
    questions = [*["What? " * 100] * 9, "What?"]
    folder = chartqa(tmp_path / "charts", [*[png(0, 40, 40)] * 9, png(1, 168, 168)], query=questions)
    prepared = rows(processor, (source(), folder), limit=4096)
    worst = probe.worst(prepared, Collator(processor, prepared.form, torch.float32))
    assert (worst.longest["index"], worst.largest["index"]) == (0, 9)


# --- where no micro-batch is to blame ---


def beyond(*_arguments: Any, **_options: Any) -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


def test_out_of_memory_while_the_trainer_is_built_is_no_bad_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SFTTrainer, "__init__", beyond)
    plan = planned(tmp_path, {})
    with pytest.raises(RunnerError, match="the model does not fit the device") as ended:
        sequence.train(plan, Channel(plan.attempt_dir, None))
    assert ended.value.exit_code == 1


def test_out_of_memory_while_an_adapter_is_loaded_is_no_bad_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeftModel, "from_pretrained", beyond)
    with pytest.raises(RuntimeError) as ended:
        load_adapter(torch.nn.Module(), tmp_path)
    assert is_out_of_memory(ended.value)
