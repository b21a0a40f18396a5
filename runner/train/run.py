"""One attempt, step by step: the sequence that `python -m runner.train` runs.

Each function does one stage and returns what the next needs. Whatever draws random numbers is seeded or
guarded here, so that an attempt that resumes goes on with the numbers of the one before.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin, set_seed
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, SFTConfig

from runner.durable import write_text
from runner.errors import OutOfMemory, Preempted, RunnerError
from runner.plan import Plan, total_steps
from runner.train import copies, gathering, methods, placement, preparation, probe, state
from runner.train.callbacks import SaveAndStop
from runner.train.channel import Channel
from runner.train.data.audit import audit
from runner.train.data.rows import Rows
from runner.train.evaluation.evaluator import Evaluator
from runner.train.facts import peak_memory, versions, weight_bytes
from runner.train.memory import memory_named
from runner.train.models import adapter
from runner.train.models import model as models
from runner.train.planned import planned
from runner.train.savings import Savings, savings
from runner.train.trainer import RunTrainer
from runner.train.watch import RECORD, Watch
from runner.train.world import first_on_machine, from_first, world

OUT_OF_MEMORY = (
    "out of memory before or after training: the model does not fit the device. Remedy, the largest lever "
    "first: quantization.load_in_4bit: true, model.dtype: bfloat16, a device with more memory"
)


@dataclass(frozen=True)
class Prepared:
    """What every purpose needs: the processor and the rows."""

    processor: ProcessorMixin
    train_rows: Rows | None
    eval_rows: Rows | None
    savings: Savings | None
    """Of training."""
    planned: dict[str, Any]
    """What the `plan` event tells of model and data; empty on all ranks but the first."""


def train(plan: Plan, channel: Channel) -> dict[str, Any]:
    """Train, export and evaluate. Returns the outcome's fields.

    Raises:
        Preempted: the supervisor asked to stop; what was trained is saved.
        RunnerError: the job, the data or the device does not do.
    """
    _reproducible()
    plan = copies.brought(plan)
    prepared = _prepare(plan, channel)
    _stop_here(channel, "before training")
    arguments = methods.arguments(plan, _steps(plan, prepared))
    channel.send("phase", phase="load")
    with memory_named(RunnerError, OUT_OF_MEMORY):
        with placement.whole(arguments):
            model, before = _model(plan, channel, prepared)
        evaluator = Evaluator(plan, channel, model, prepared.processor, prepared.eval_rows)
        trainer = _trainer(plan, channel, model, prepared, evaluator, arguments)
        plan = _sized(plan, channel, trainer, prepared)
        channel.send("plan", **_numbers(plan, prepared, trainer))
        control = _fit(plan, channel, trainer)
        if control.stopped:
            raise Preempted(
                f"stopped at step {trainer.state.global_step} of {trainer.args.max_steps}; state is saved"
            )
        trainer.leave()
        trainer.take_best()
        exported = _export(plan, channel, trainer, prepared.processor)
        if world().first:
            _write_steps(plan.run_dir / "steps.jsonl", trainer.steps)
        last = trainer.steps[-1].step
        best = trainer.watch.told()
        after = evaluator.run("after", "evaluate_after", step=last if best is None else best["step"])
        if world().first:
            trainer.watch.clear()
    return {
        "step": last,
        "steps": last,
        "best": best,
        "stopped_early": last < trainer.args.max_steps,
        "metrics": {"before": before, "after": after},
        "adapter": str(exported),
        "facts": {**_facts(plan, model, trainer, prepared), "peak_memory_bytes": peak_memory()},
    }


def evaluate_only(plan: Plan, channel: Channel) -> dict[str, Any]:
    """Generate on the evaluation rows with the adapter that the plan names, or with the base model."""
    _reproducible()
    prepared = _prepare(plan, channel)
    channel.send("phase", phase="load")
    model: torch.nn.Module = models.load_base(plan.job, plan.fetched.model)
    if plan.adapter is not None:
        model = models.load_adapter(model, plan.adapter)
    label = "base" if plan.adapter is None else "adapter"
    evaluator = Evaluator(plan, channel, model, prepared.processor, prepared.eval_rows)
    metrics = evaluator.run(label, "evaluate", step=0)
    return {"step": 0, "steps": 0, "metrics": {label: metrics}, "facts": models.describe(model)}


def _stop_here(channel: Channel, where: str) -> None:
    """Leave early when asked to: nothing was trained by this attempt, so nothing is saved.

    Raises:
        Preempted: asked to stop.
    """
    if from_first(channel.request().action == "stop"):
        raise Preempted(f"stopped {where}; the state before it is saved")


def _reproducible() -> None:
    """Take the deterministic choice where there is one. PyTorch's fused attention has none on GPUs in the
    backward pass unless it is demanded, which other operations would then refuse: there only `eager` is."""
    transformers_logging.disable_progress_bar()
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)


def _prepare(plan: Plan, channel: Channel) -> Prepared:
    """Build the processor, prepare and check all rows, audit the labels."""
    channel.send("phase", phase="data")
    job = plan.job
    limit = preparation.token_limit(job, plan.fetched.model)
    processor = models.load_processor(job, plan.fetched.model)
    train_rows = eval_rows = applied = None
    told: dict[str, Any] = {}
    with first_on_machine():
        if plan.purpose == "train":
            train_rows = preparation.train_rows(job, plan.fetched.train, processor, limit)
            applied = savings(job, train_rows, processor, plan.fetched.model)
            collator = preparation.collator(job, processor, train_rows, applied)
            channel.send("audit", lines=audit(train_rows, collator, processor))
            if world().first:
                told = planned(plan, train_rows, collator, applied)
        eval_rows = preparation.eval_rows(job, plan.fetched.eval, processor, limit)
    placement.check_rows(plan, train_rows, eval_rows)
    for rows in (train_rows, eval_rows):
        for row, reason in () if rows is None else rows.skipped:
            channel.send("warning", message=f"{row} is skipped: {reason}")
        for note in () if rows is None else rows.notes:
            channel.send("message", text=note)
    return Prepared(processor, train_rows, eval_rows, applied, told)


def _steps(plan: Plan, prepared: Prepared) -> int:
    """Optimizer steps of the whole run."""
    assert prepared.train_rows is not None
    options = plan.job.training.options
    return total_steps(
        len(prepared.train_rows.dataset),
        plan.geometry.global_batch_size,
        options.get("num_train_epochs", 3.0),
        options.get("max_steps", -1),
    )


def _model(plan: Plan, channel: Channel, prepared: Prepared) -> tuple[torch.nn.Module, dict[str, Any] | None]:
    """What trains, and the metrics of what it starts from."""
    base = _start_of(plan)
    start = None if plan.fetched.init_from is None else Path(plan.fetched.init_from)
    before = None
    # An adapter that does not begin at zero, or moves weights of the base, is what training starts from.
    has_start = adapter.keeps_reference(plan.job)
    if not has_start:
        before = Evaluator(plan, channel, base, prepared.processor, prepared.eval_rows).baseline()
    set_seed(plan.job.seed)  # the adapter's initial values depend on nothing that came before
    model = base if plan.job.lora is None else adapter.adapted(base, plan.job, start)
    models.check_frozen(model, list(plan.job.model.freeze))
    if has_start:
        before = Evaluator(plan, channel, model, prepared.processor, prepared.eval_rows).baseline()
    return model, before


def _start_of(plan: Plan) -> PreTrainedModel:
    """The base model; of full fine-tuning in the precision that it trains in, so that what it is compared
    with, the baseline and dpo's reference, is the same model to the last bit."""
    base = models.load_base(plan.job, plan.fetched.model, sharded=plan.strategy in placement.SHARDED)
    if plan.job.lora is None:
        models.float32_trainable(base)
    return base


def _trainer(
    plan: Plan,
    channel: Channel,
    model: torch.nn.Module,
    prepared: Prepared,
    evaluator: Evaluator,
    arguments: SFTConfig | DPOConfig,
) -> RunTrainer:
    rows, applied = prepared.train_rows, prepared.savings
    assert rows is not None and applied is not None
    job = plan.job
    watch = Watch(
        job.evaluation,
        attempt_dir=plan.attempt_dir,
        record=plan.run_dir / RECORD,
        restore=plan.restore,
    )
    control = SaveAndStop(
        save_steps=job.checkpoints.save_steps,
        save_seconds=plan.save_seconds,
        request=channel.request,
        tell_phase=lambda phase: channel.send("phase", phase=phase),
        evaluation_due=watch.due,
        agree=from_first,
    )
    reference = None
    if job.method == "dpo" and job.lora is None:
        with placement.whole(arguments):
            reference = _start_of(plan).requires_grad_(False)
    keeps_reference = adapter.keeps_reference(job)
    with adapter.values_kept(model) if keeps_reference else contextlib.nullcontext():
        trainer = methods.trainer(
            arguments,
            method=job.method,
            model=model,
            reference=reference,
            keep_reference_adapter=keeps_reference,
            processor=prepared.processor,
            collator=preparation.collator(job, prepared.processor, rows, applied),
            rows=rows,
            eval_rows=prepared.eval_rows,
            control=control,
        )
    trainer.attach(plan, rows, channel, evaluator.during, control, watch, applied)
    return trainer


def _sized(plan: Plan, channel: Channel, trainer: RunTrainer, prepared: Prepared) -> Plan:
    """The plan with the largest micro-batch that fits, where the job leaves it to the runner."""
    rows = prepared.train_rows
    if not plan.probe or rows is None:
        return plan
    if plan.strategy == "single":
        cut = probe.fitting(trainer, trainer.data_collator, rows, plan.geometry, channel)
    else:
        # One rank that is out of memory leaves the others in a collective; training finds it, by a restart.
        cut = probe.largest(plan.geometry)
    trainer.recut(cut)
    return plan.model_copy(update={"geometry": cut})


def _fit(plan: Plan, channel: Channel, trainer: RunTrainer) -> SaveAndStop:
    """Train from the plan's checkpoint to the last step, or only load a checkpoint that is already there."""
    channel.send("phase", phase="train")
    with memory_named(OutOfMemory, f"a micro-batch of {plan.geometry.per_device} does not fit"):
        if plan.restore is None:
            if not world().first:
                set_seed(plan.job.seed + world().rank)  # dropout of its own
            trainer.train()
        elif (done := trainer.steps[-1].step) >= (last := trainer.args.max_steps) and not (
            trainer.watch.pending(done, last)
        ):
            # transformers would train one step more from such a checkpoint.
            trainer._load_from_checkpoint(str(plan.restore))
        else:
            trainer.train(resume_from_checkpoint=str(plan.restore))
            trainer.evaluate_last()
    return trainer.control_callback


def _export(plan: Plan, channel: Channel, trainer: RunTrainer, processor: ProcessorMixin) -> Path:
    """The adapter as plain PEFT loads it, or the whole model without one; published by rename. Collective."""
    channel.send("phase", phase="export")
    final = plan.run_dir / ("model" if plan.job.lora is None else "adapter")
    model = trainer.accelerator.unwrap_model(trainer.model)
    values = gathering.everything(model, trainable_only=isinstance(model, PeftModel))
    if not world().first:
        return final
    writing = plan.attempt_dir / "export"
    shutil.rmtree(writing, ignore_errors=True)
    if isinstance(model, PeftModel):
        # No vocabulary is ever resized here; the default asks the hub for the base model's configuration.
        model.save_pretrained(
            writing, save_embedding_layers=False, selected_adapters=["default"], state_dict=values
        )
        (writing / "README.md").unlink()  # PEFT's empty card, with the path of this machine's base model
        state.save_adapter_config(writing, model)
    else:
        model.save_pretrained(writing, state_dict=values)
        processor.save_pretrained(writing)
    shutil.rmtree(final, ignore_errors=True)
    writing.rename(final)
    return final


def _write_steps(path: Path, steps: list[state.Step]) -> None:
    write_text(path, "".join(json.dumps(asdict(step)) + "\n" for step in steps))


def _numbers(plan: Plan, prepared: Prepared, trainer: RunTrainer) -> dict[str, Any]:
    rows = prepared.train_rows
    assert rows is not None
    return {
        "rows": len(rows.dataset),
        "skipped": len(rows.skipped),
        "steps": trainer.args.max_steps,
        "tokens_max": rows.max_tokens,
        "geometry": plan.geometry.model_dump(),
        "restored_step": trainer.steps[-1].step if trainer.steps else 0,
        "strategy": plan.strategy,
        **prepared.planned,
    }


def _facts(plan: Plan, model: torch.nn.Module, trainer: RunTrainer, prepared: Prepared) -> dict[str, Any]:
    """What is in force, as result.json records it."""
    return {
        **models.describe(model),
        **placement.engine(trainer),
        "strategy": plan.strategy,
        "weight_bytes": weight_bytes(model),
        "mixed_precision": trainer.accelerator.mixed_precision,
        # None in an attempt that found its training done and only evaluated.
        "optimizer": None if trainer.optimizer is None else type(trainer.optimizer.optimizer).__name__,
        "gradient_checkpointing": trainer.model.is_gradient_checkpointing,
        "image_backend": models.image_backend(prepared.processor),
        "speed": None if prepared.savings is None else prepared.savings.told(),
        **trainer.facts(),
        "dataloader_num_workers": trainer.args.dataloader_num_workers,
        "geometry": plan.geometry.model_dump(),
        "versions": versions(),
    }
