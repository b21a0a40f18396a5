"""The methods: TRL's trainer of each as a run, its configuration and how it is built. The rest is shared.

    method   trainer       configuration   reads rows of form
    sft      SFTTrainer    SFTConfig       prompt_completion, messages
    dpo      DPOTrainer    DPOConfig       preference

What both do with the data order, checkpoints and records is `runner.train.trainer`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import trl.trainer.utils
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin, Trainer
from transformers.utils import ModelOutput
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from runner.errors import JobError, Problem
from runner.plan import Plan
from runner.train import loading, placement
from runner.train.callbacks import SaveAndStop
from runner.train.data.collator import Collator
from runner.train.data.rows import Rows
from runner.train.memory import is_out_of_memory
from runner.train.trainer import RunTrainer
from runner.train.world import device, from_all, world

# TRL (1.16) projects only the tokens that carry loss through the head where Triton runs, and every token
# elsewhere, for devices that compile anew for every shape. A CPU does not: at the bench's proportions
# that was a fifth of a step. The kernel itself asks for Triton by another module's name.
trl.trainer.utils._use_triton = lambda device: True

REFERENCE = "ref"
"""Name of the frozen copy of the adapter that DPOTrainer makes (trl 1.16)."""


class SftRun(RunTrainer, SFTTrainer):
    """TRL's supervised fine-tuning as a run."""


class DpoRun(RunTrainer, DPOTrainer):
    """TRL's direct preference optimization as a run.

    The loss of each pair is upstream's. Its `sft` term alone is ours: upstream takes the mean over the chosen
    tokens of a micro-batch, so that the same global batch has another loss when it is cut another way (1.8e-2
    a step between 4 x 1 and 1 x 4); here it is the mean over the chosen tokens of the global batch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        types: list[str] = self.args.loss_type
        weights: list[float] = self.args.loss_weights or [1.0] * len(types)
        self._sft_weight = sum(weight for name, weight in zip(types, weights, strict=True) if name == "sft")
        self.loss_weights = [weight for name, weight in zip(types, weights, strict=True) if name != "sft"]
        self.loss_types = [name for name in types if name != "sft"]
        self._chosen_tokens = 0

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        mine = sum(int(_chosen(sample["completion_mask"]).sum()) for sample in batch_samples)
        self._chosen_tokens = sum(from_all(mine))
        return super()._get_num_items_in_batch(batch_samples, device)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if not self._sft_weight:
            return super()._compute_loss(model, inputs, return_outputs)
        with _first_output(model) as outputs:
            loss = super()._compute_loss(model, inputs, return_outputs)
        term = self._sft_weight * self._sft_term(outputs[0].log_probs, inputs["completion_mask"])
        return (loss[0] + term, loss[1]) if return_outputs else loss + term

    def _sft_term(self, log_probs: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of the chosen tokens.

        Args:
            log_probs: (2B, T') with T' >= T - 1, chosen rows first.
            completion_mask: (2B, T).
        """
        mask = _chosen(completion_mask)
        total = -(log_probs[: len(mask), -mask.shape[1] :] * mask).sum()
        if not self.model.training:
            return total / mask.sum()
        # The caller divides by the number of micro-batches, and the ranks' gradients are averaged, neither of
        # which a sum over the global batch wants.
        return total / self._chosen_tokens * self.current_gradient_accumulation_steps * world().size


def _chosen(completion_mask: torch.Tensor) -> torch.Tensor:
    """(2B, T) -> (B, T - 1): where a chosen token is predicted."""
    return completion_mask.chunk(2, dim=0)[0][:, 1:]


@contextlib.contextmanager
def _first_output(model: torch.nn.Module) -> Iterator[list[ModelOutput]]:
    """The output of the first forward inside: the policy's, which goes before the reference's."""
    outputs: list[ModelOutput] = []
    hook = model.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


_RUNS: dict[str, type[SftRun | DpoRun]] = {"sft": SftRun, "dpo": DpoRun}
_CONFIGURATIONS: dict[str, type[SFTConfig | DPOConfig]] = {"sft": SFTConfig, "dpo": DPOConfig}


def arguments(plan: Plan, steps: int) -> SFTConfig | DPOConfig:
    """TRL's configuration: what is ours, and every other field as the job has it.

    Raises:
        JobError: upstream refuses a value that the generated schema could not judge.
    """
    job = plan.job
    options = {"report_to": "none", **job.training.options}
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
