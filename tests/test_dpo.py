"""Direct preference optimization: TRL's own losses, the reference that is meant, resumes byte for byte."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from runner.errors import DataError, JobError
from runner.job import matrix
from runner.manifest import Job
from runner.request import Request
from runner.schema.generate import DPO_LOSSES
from runner.train import gathering, methods, state
from runner.train.callbacks import SaveAndStop
from runner.train.data.collator import Collator
from runner.train.data.rows import Rows, load
from runner.train.models import adapter
from runner.train.models import model as models
from tests.attempts import JOB, merged, pairs, run, steps
from tests.plain import plain_trl

FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
DPO = {
    "method": "dpo",
    "datasets": {"train": [{"path": "pairs.parquet", "split": "train[:16]", "format": "preference"}]},
}


def dpo_job(**changes: Any) -> Job:
    return Job.model_validate(merged(merged(JOB, DPO), changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs(tmp_path_factory.mktemp("pairs"))


def folder_of(job: Job) -> str:
    from runner.demo import resolve_model

    return str(resolve_model(job.model.name_or_path))


def rows_of(job: Job, data: Path) -> Rows:
    processor = models.load_processor(job, folder_of(job))
    return load(
        job.datasets.train,
        [str(data)],
        policy=job.datasets,
        seed=job.seed,
        processor=processor,
        limit=512,
        name="train",
    )


def built(job: Job, data: Path, *, start: Path | None = None, batch: int = 8, cut: int = 1) -> methods.DpoRun:
    """The trainer of a job in this process, ready for `training_step`."""
    set_seed(job.seed)
    model = adapter.adapted(models.load_base(job, folder_of(job)), job, start)
    processor = models.load_processor(job, folder_of(job))
    arguments = DPOConfig(
        output_dir=str(data.with_name("trainer")),
        use_cpu=True,
        bf16=False,
        max_length=None,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=cut,
        max_steps=1,
        report_to="none",
        remove_unused_columns=False,
        **job.training.options,
    )
    rows = rows_of(job, data)
    keeps_reference = adapter.keeps_reference(job)
    with adapter.values_kept(model) if keeps_reference else contextlib.nullcontext():
        trainer = methods.trainer(
            arguments,
            method="dpo",
            model=model,
            reference=None,
            keep_reference_adapter=keeps_reference,
            processor=processor,
            collator=Collator(processor, rows.form, torch.float32),
            rows=rows,
            eval_rows=None,
            control=SaveAndStop(
                save_steps=None, save_seconds=1e9, request=Request, tell_phase=lambda phase: None
            ),
        )
    assert isinstance(trainer, methods.DpoRun)
    return trainer


def micro_batches(trainer: methods.DpoRun, cut: int) -> list[dict[str, Any]]:
    rows = [trainer.train_dataset[index] for index in range(8)]
    size = len(rows) // cut
    return [trainer.data_collator(rows[start : start + size]) for start in range(0, len(rows), size)]


# --- the same losses as plain TRL ---


@pytest.mark.parametrize("quantization", [None, FOUR_BIT], ids=["float32", "4-bit"])
def test_our_losses_are_plain_trls(tmp_path: Path, data: Path, quantization: dict[str, Any] | None) -> None:
    theirs = plain_trl(tmp_path / "plain", quantization, {"beta": 0.2}, method="dpo", data=data)
    training = {"per_device_train_batch_size": 4, "beta": 0.2}
    _, events = run(
        tmp_path / "ours", merged(DPO, {"quantization": quantization, "training": training}), data=data
    )
    ours = [step["loss"] for step in steps(events)]
    assert len(ours) == 4
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[0] == pytest.approx(0.693147, abs=1e-5), "at step 1 the policy is the reference"
    assert ours[-1] < 0.6


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_every_loss_takes_a_step(data: Path, name: str) -> None:
    """Each on the same pairs: a finite loss, a gradient in every adapter pair, upstream's number."""
    options = {"loss_type": name, "label_smoothing": 0.1 if name in ("exo_pair", "robust") else 0.0}
    trainer = built(dpo_job(training=options), data)
    (batch,) = micro_batches(trainer, 1)
    for extra in ("row_index", "image_count"):
        del batch[extra]
    trainer._get_num_items_in_batch([batch], trainer.args.device)  # as the loop does, and the probe
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    moved = [value for key, value in trainer.model.named_parameters() if "lora_B" in key]
    assert torch.isfinite(loss) and moved
    assert all(value.grad is not None and bool(value.grad.abs().sum() > 0) for value in moved)
    trainer.loss_types, trainer.loss_weights = [name], [1.0]
    upstreams = DPOTrainer._compute_loss(trainer, trainer.model, batch, False)
    assert upstreams.item() == pytest.approx(loss.item())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loss_type": "exo_pair"}, "greater than 0.0"),
        ({"loss_type": "aot", "use_weighting": True}, "'aot' or 'aot_unpaired'"),
        (
            {"loss_type": "nca_pair", "f_divergence_type": "forward_kl"},
            re.escape(str(sorted(matrix.HAS_F_DIVERGENCE))),
        ),
    ],
)
def test_trl_refuses_what_the_matrix_does(data: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(JobError, match=reason):
        built(dpo_job(training=options), data)


def test_trl_refuses_a_bias(data: Path) -> None:
    with pytest.raises(JobError, match="only 1 adapter with bias"):
        built(dpo_job(lora={"bias": "all"}), data)


def test_trl_cannot_weight_its_sft_term(data: Path) -> None:
    trainer = built(dpo_job(training={"loss_type": "sft", "use_weighting": True}), data)
    (batch,) = micro_batches(trainer, 1)
    del batch["row_index"], batch["image_count"]
    trainer.loss_types, trainer.loss_weights = ["sft"], [1.0]
    with pytest.raises(RuntimeError, match="single memory location"):
        DPOTrainer._compute_loss(trainer, trainer.model, batch, False)


def test_the_sft_term_does_not_depend_on_the_cut(data: Path) -> None:
    """1 x 8, 2 x 4 and 8 x 1: one loss and one gradient; upstream's own differ between the cuts."""
    options = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    found = {}
    for cut in (1, 2, 8):
        trainer = built(dpo_job(training=options), data, batch=8 // cut, cut=cut)
        batches = micro_batches(trainer, cut)
        trainer._get_num_items_in_batch(batches, trainer.args.device)
        trainer.current_gradient_accumulation_steps = cut
        total = 0.0
        for one in batches:
            for extra in ("row_index", "image_count"):
                del one[extra]
            loss = trainer.compute_loss(trainer.model, one) / cut
            loss.backward()
            total += loss.item()
        norm = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm()
        found[cut] = (total, float(norm))
    assert found[2] == pytest.approx(found[1], abs=1e-5)
    assert found[8] == pytest.approx(found[1], abs=1e-5)


def test_a_global_batch_is_the_same_however_it_is_cut(tmp_path: Path, data: Path) -> None:
    """Through whole attempts, the sft term included: the cut changes the last digits only."""
    found = []
    for size in (8, 1):
        options = {"loss_type": ["sigmoid", "sft"], "per_device_train_batch_size": size, "max_steps": 2}
        _, events = run(tmp_path / str(size), merged(DPO, {"training": options}), data=data)
        found.append(steps(events))
    assert [step["ids"] for step in found[0]] == [step["ids"] for step in found[1]]
    losses = [[step["loss"] for step in one] for one in found]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# --- the reference ---


def test_the_reference_of_a_new_adapter_is_the_base_model(data: Path) -> None:
    """No second model, no copy: the disabled adapter."""
    trainer = built(dpo_job(quantization=FOUR_BIT), data)
    assert trainer.ref_model is None
    assert list(trainer.model.peft_config) == ["default"]
    assert not [name for name, _ in trainer.model.named_parameters() if ".ref." in name]
    (batch,) = micro_batches(trainer, 1)
    del batch["row_index"], batch["image_count"]
    with torch.no_grad():
        for name, value in trainer.model.named_parameters():
            if "lora_B" in name:
                value.add_(0.05)
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    base = built(dpo_job(quantization=FOUR_BIT), data)
    plain_chosen, plain_rejected = base.compute_ref_log_probs(base.model, batch)
    assert torch.equal(chosen, plain_chosen) and torch.equal(rejected, plain_rejected)


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished attempt of SFT, with its adapter and its last checkpoint."""
    folder = tmp_path_factory.mktemp("sft")
    outcome, _ = run(folder, {"quantization": FOUR_BIT, "training": {"per_device_train_batch_size": 8}})
    assert outcome["outcome"] == "done"
    return folder


@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
def test_an_adapter_goes_on_in_full_and_is_its_own_reference(sft_run: Path, data: Path, kind: str) -> None:
    start = sft_run / "adapter" if kind == "adapter" else next((sft_run / "outbox").iterdir())
    trained = load_file(sft_run / "adapter" / "adapter_model.safetensors")
    job = dpo_job(quantization=FOUR_BIT, lora={"init_from": str(start)})
    trainer = built(job, data, start=start)
    for name, value in gathering.trainable(trainer.model).items():
        saved = trained[name.replace(".default", "")]
        assert value.dtype == torch.float32 and torch.equal(value, saved), "not rounded on the way"
    reference = {name: value for name, value in trainer.model.named_parameters() if ".ref." in name}
    assert reference and not any(value.requires_grad for value in reference.values())
    for name, value in reference.items():
        assert torch.equal(value, trained[name.replace(".ref", "")])


INITIAL: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "pissa": ("pissa", None),
    "olora": ("olora", None),
    "olora, 4-bit": ("olora", FOUR_BIT),
    "random, 4-bit": (False, FOUR_BIT),
}
"""Initial weights that are not zero, or that move the base; the base's quantization."""


@pytest.mark.parametrize("case", INITIAL)
def test_an_adapter_that_does_not_begin_at_zero_is_its_own_reference(
    tmp_path: Path, data: Path, case: str
) -> None:
    """The baseline is what training starts from, and what is exported is what was trained: an evaluation of
    it over a new base agrees with the run's own."""
    initial, quantization = INITIAL[case]
    changes = merged(
        DPO,
        {
            "quantization": quantization,
            "lora": {"init_lora_weights": initial},
            "datasets": {"eval": DPO["datasets"]["train"]},
            "training": {"max_steps": 1, "per_device_train_batch_size": 8},
            "evaluation": {"batch_size": 16, "max_new_tokens": 2},
        },
    )
    outcome, events = run(tmp_path / "run", changes, data=data)
    assert outcome["outcome"] == "done"
    assert steps(events)[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert outcome["metrics"]["after"]["reward_accuracy"]["overall"] > 0.8
    exported = tmp_path / "run" / "adapter"
    assert json.loads((exported / "adapter_config.json").read_text())["init_lora_weights"] == initial
    again, _ = run(tmp_path / "again", changes, data=data, purpose="evaluate", adapter=exported)
    margins = [
        metrics["preference_margin"]["overall"]
        for metrics in (outcome["metrics"]["after"], again["metrics"]["adapter"])
    ]
    assert margins[0] == pytest.approx(margins[1], abs=1e-2)


def cut_short(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def configured(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (cut_short, "cannot load .*: Error while deserializing header"),
        (
            lambda folder: configured(folder, init_lora_weights="pissa"),
            "cannot load .*: Please initialize PiSSA",
        ),
        (
            lambda folder: configured(folder, target_modules=["q_proj"]),
            "are not this model's; the first of 48 is",
        ),
        (lambda folder: configured(folder, use_dora=True), "are not this model's; the first of 28 is"),
    ],
)
def test_an_adapter_that_does_not_fit_whole_is_refused(
    tmp_path: Path, sft_run: Path, change: Callable[[Path], object], reason: str
) -> None:
    start = shutil.copytree(sft_run / "adapter", tmp_path / "start")
    change(start)
    job = dpo_job(lora={"init_from": str(start)}, quantization=FOUR_BIT)
    with pytest.raises(DataError, match=f"lora.init_from: .*{reason}"):
        adapter.adapted(models.load_base(job, folder_of(job)), job, start)


def test_a_checkpoint_of_another_rank_is_refused(tmp_path: Path, sft_run: Path) -> None:
    """Of rank 1 it would be broadcast."""
    values = load_file(next((sft_run / "outbox").iterdir()) / state.PARAMETERS)
    cut = {name: value[:1] if "lora_A" in name else value[:, :1] for name, value in values.items()}
    save_file({name: value.contiguous() for name, value in cut.items()}, tmp_path / state.PARAMETERS)
    job = dpo_job(lora={"init_from": str(tmp_path)})
    with pytest.raises(DataError, match="parameters are not this model's; the first is"):
        adapter.adapted(models.load_base(job, folder_of(job)), job, tmp_path)


def test_only_the_trained_adapter_is_exported(tmp_path: Path, sft_run: Path, data: Path) -> None:
    start = str(sft_run / "adapter")
    changes = merged(
        DPO, {"quantization": FOUR_BIT, "lora": {"init_from": start}, "training": {"max_steps": 1}}
    )
    outcome, events = run(tmp_path / "run", changes, data=data, init_from=start)
    assert outcome["outcome"] == "done"
    assert steps(events)[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    folder = tmp_path / "run" / "adapter"
    assert not (folder / "ref").exists()
    before, after = (load_file(one / "adapter_model.safetensors") for one in (sft_run / "adapter", folder))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert PeftModel.from_pretrained(models.load_base(dpo_job(), folder_of(dpo_job())), str(folder))


def test_other_keys_of_lora_must_be_those_of_the_adapter(tmp_path: Path, sft_run: Path, data: Path) -> None:
    start = str(sft_run / "adapter")
    changes = merged(DPO, {"lora": {"init_from": start, "r": 8}})
    outcome, _ = run(tmp_path / "run", changes, data=data, init_from=start)
    assert outcome["exit_code"] == 78
    assert "lora.r" in outcome["error"] and "has 4" in outcome["error"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_fine_tuning_has_a_second_model_as_reference(tmp_path: Path, data: Path, dtype: str) -> None:
    changes = merged(DPO, {"lora": None, "training": {"max_steps": 2, "per_device_train_batch_size": 8}})
    changes = merged(changes, {"model": {"dtype": dtype}})
    outcome, events = run(tmp_path / "run", changes, data=data)
    assert outcome["outcome"] == "done"
    assert steps(events)[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert steps(events)[1]["loss"] < 0.69


# --- resumed = uninterrupted ---

RESUMES: dict[str, dict[str, Any]] = {
    "4-bit": {"quantization": FOUR_BIT},
    "8-bit weights, DoRA": {
        "quantization": {"load_in_8bit": True},
        "lora": {"use_dora": True, "lora_dropout": 0.1},
        "training": {"disable_dropout": False},
    },
    "8-bit optimizer": {"quantization": FOUR_BIT, "lora": {"r": 64}, "training": {"optim": "adamw_bnb_8bit"}},
    "from an SFT adapter": {"quantization": FOUR_BIT},
}


@pytest.mark.parametrize("case", RESUMES)
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path, sft_run: Path, data: Path, case: str) -> None:
    start = str(sft_run / "adapter") if case.startswith("from") else None
    changes = merged(merged(DPO, RESUMES[case]), {"training": {"per_device_train_batch_size": 4}})
    changes = merged(
        changes, {"checkpoints": {"save_steps": 2}, "training": {"lr_scheduler_type": "constant"}}
    )
    if start is not None:
        changes = merged(changes, {"lora": {"init_from": start}})
    whole = tmp_path / "whole"
    outcome, events = run(whole, changes, data=data, init_from=start)
    assert outcome["outcome"] == "done" and len(steps(events)) == 4
    middle = next(path for path in (whole / "outbox").iterdir() if path.name.startswith("00000002"))
    if case == "8-bit optimizer":
        tensors = load_file(middle / state.OPTIMIZER)
        assert {value.dtype for name, value in tensors.items() if name.endswith("state1")} >= {torch.uint8}
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    copied = shutil.copytree(middle, tmp_path / middle.name)
    outcome, later = run(resumed, changes, data=data, init_from=start, attempt=2, restore=copied)
    assert outcome["outcome"] == "done"
    assert [step["loss"] for step in steps(later)] == [step["loss"] for step in steps(events)[2:]]
    ends = [folder / "adapter" / "adapter_model.safetensors" for folder in (whole, resumed)]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    configs = [json.loads(one.with_name("adapter_config.json").read_text()) for one in ends]
    assert configs[0] == configs[1]
