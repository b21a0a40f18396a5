"""The methods: TRL's trainer of each as a run, its configuration and how it is built. The rest is shared.

    method   trainer       configuration   reads rows of form
    sft      SFTTrainer    SFTConfig       prompt_completion, messages
    dpo      DPOTrainer    DPOConfig       preference

What both do with the data order, checkpoints and records is `runner.train.trainer`'s.
"""

from __future__ import annotations

import trl.trainer.utils
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin, Trainer
from trl import DPOConfig, SFTConfig, SFTTrainer

from runner.errors import JobError, Problem
from runner.plan import Plan
from runner.train import loading, placement
from runner.train.callbacks import SaveAndStop
from runner.train.data.collator import Collator
from runner.train.data.rows import Rows
from runner.train.dpo import DpoRun
from runner.train.memory import is_out_of_memory
from runner.train.trainer import RunTrainer
from runner.train.world import device

# TRL (1.16) projects only the tokens that carry loss through the head where Triton runs, and every token
# elsewhere, for devices that compile anew for every shape. A CPU does not: at the bench's proportions
# that was a fifth of a step. The kernel itself asks for Triton by another module's name.
trl.trainer.utils._use_triton = lambda device: True

REFERENCE = "ref"
"""Name of the frozen copy of the adapter that DPOTrainer makes (trl 1.16)."""


class SftRun(RunTrainer, SFTTrainer):
    """TRL's supervised fine-tuning as a run."""


_RUNS: dict[str, type[SftRun | DpoRun]] = {"sft": SftRun, "dpo": DpoRun}
_CONFIGURATIONS: dict[str, type[SFTConfig | DPOConfig]] = {"sft": SFTConfig, "dpo": DPOConfig}


def arguments(plan: Plan, steps: int) -> SFTConfig | DPOConfig:
    """TRL's configuration: what is ours, and every other field as the job has it.

    Raises:
        JobError: upstream refuses a value that the generated schema could not judge.
    """
    job = plan.job
    options = job.training.options
    try:
        built = _CONFIGURATIONS[job.method](
            **{
                **options,
                "output_dir": str(plan.attempt_dir / "trainer"),
                "seed": job.seed,
                "max_steps": steps,
                "per_device_train_batch_size": plan.geometry.per_device,
                "gradient_accumulation_steps": plan.geometry.accumulation,
                **placement.arguments(plan),
                **loading.arguments(plan, loading.Room.here()),
                "use_cpu": device().type == "cpu",
                "max_length": None,  # image tokens are never truncated; `datasets.max_length` decides before
                "save_strategy": "no",  # `SaveAndStop` decides
                "report_to": "none",  # `runner.tracking` does
                "disable_tqdm": True,
                "remove_unused_columns": False,
            }
        )
        placement.prepare(plan, built)
        # Its package may be missing, which upstream finds out at the first step.
        Trainer.get_optimizer_cls_and_kwargs(built)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise JobError(
            [
                Problem(
                    "training",
                    f"TRL refuses it: {error}",
                    f"see {_CONFIGURATIONS[job.method].__name__}'s own documentation",
                )
            ]
        ) from error
    return built


def trainer(
    configured: SFTConfig | DPOConfig,
    *,
    method: str,
    model: PreTrainedModel | PeftModel,
    reference: PreTrainedModel | None,
    keep_reference_adapter: bool,
    processor: ProcessorMixin,
    collator: Collator,
    rows: Rows,
    eval_rows: Rows | None,
    control: SaveAndStop,
) -> SftRun | DpoRun:
    """TRL's trainer of a method over a model that already has its adapter.

    Args:
        reference: of dpo without an adapter: a second, frozen model.
        keep_reference_adapter: whether dpo's reference is a frozen copy of the adapter as it is now; else it
            is the base model, with the adapter disabled.

    Raises:
        JobError: TRL refuses the configuration for this model.
    """
    more = {"ref_model": reference} if method == "dpo" else {}
    try:
        built = _RUNS[method](
            model=model,
            args=configured,
            data_collator=collator,
            train_dataset=rows.dataset,
            eval_dataset=None if eval_rows is None else eval_rows.dataset,
            processing_class=processor,
            callbacks=[control],
            **more,
        )
    except (ValueError, ImportError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise JobError(
            [Problem("training", f"TRL refuses it: {error}", "change the option that it names")]
        ) from error
    if isinstance(model, PeftModel) and REFERENCE in model.peft_config and not keep_reference_adapter:
        # DPOTrainer copies every adapter that it is given; that of a new one is the base model.
        model.delete_adapter(REFERENCE)
    return built
