"""Method dpo: TRL's direct preference optimization as a run, its reference computed once.

What TRL's own trainer does for every pair of a step, and what is done here:

    upstream                                       here
    the reference's forward of both answers        from a table (`runner.train.references`), once it was made
    the images of a pair, four times               once (`runner.train.models.shared`)
    the `sft` term over a micro-batch's tokens     over the global batch's
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import ModelOutput
from trl import DPOTrainer

from runner.errors import DataError
from runner.plan import Plan
from runner.train import state
from runner.train.callbacks import SaveAndStop
from runner.train.channel import Channel
from runner.train.data.rows import Rows
from runner.train.models.shared import SharedImages
from runner.train.references import References
from runner.train.savings import Savings
from runner.train.trainer import RunTrainer
from runner.train.watch import Watch
from runner.train.world import from_all, from_first, world


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
        self._references: References | None = None
        self._known: list[bool] = []
        self._learned: list[tuple[list[int], torch.Tensor]] = []
        self._computed = 0

    def attach(
        self,
        plan: Plan,
        rows: Rows,
        channel: Channel,
        evaluate_now: Callable[[int], dict[str, Any] | None],
        control_callback: SaveAndStop,
        watch: Watch,
        applied: Savings,
    ) -> None:
        super().attach(plan, rows, channel, evaluate_now, control_callback, watch, applied)
        if self.ref_model is not None:
            SharedImages(self.accelerator.unwrap_model(self.ref_model), frozen=False)
        if applied.cache_reference is None:
            self._references = References(rows.dataset["digest"][:])
            if plan.restore is None and plan.references is not None:
                self._look_up(plan.references)

    # --- the reference ---

    def _look_up(self, file: Path) -> None:
        """Take what other runs on this machine left. Collective."""
        assert self._references is not None
        if world().first:
            try:
                self._references.look_up(file)
            except DataError as error:
                self._channel.send("warning", message=str(error))
        self._references.restore(from_first(self._references.tensors()))

    def leave(self) -> None:
        file = self._plan.references
        if self._references is not None and file is not None and world().first:
            try:
                self._references.keep(file)
            except OSError as error:
                self._channel.send("warning", message=f"reference log-probabilities are not kept: {error}")

    def facts(self) -> dict[str, Any]:
        if self._references is None:
            return {"references": None}
        return {"references": {"known": self._references.known, "computed": self._computed}}

    def _known_references(self) -> dict[str, torch.Tensor] | None:
        return None if self._references is None else self._references.tensors()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._references is not None:
            state.load_references(Path(resume_from_checkpoint), self._references)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        samples, items = super().get_batch_samples(*args, **kwargs)
        if self._references is not None:
            # Of all ranks together: a forward may be a collective, and all make it or none.
            self._known = [self._references.knows(rows) for rows in self._step_rows]
        return samples, items

    def _record(self, done: int, grad_norm: Any, learning_rate: float) -> None:
        super()._record(done, grad_norm, learning_rate)
        if self._references is not None and not all(self._known):
            for learned in from_all(self._learned):
                for rows, values in learned:
                    self._references.learn(rows, values)
                    self._computed += len(rows)
        self._learned.clear()

    def _reference(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The reference's log-probabilities of the micro-batch at work, as TRL takes them: float32 (B,) each.
        Collective where a forward is."""
        number, rows = len(self._micro), self._micro_rows
        in_step = number < len(self._known)  # the probe's batches are of no step
        if in_step and self._known[number]:
            assert self._references is not None
            values = self._references.of(rows).to(inputs["input_ids"].device)
        else:
            values = torch.stack(
                self.compute_ref_log_probs(self.ref_model or self.model, inputs), dim=1
            ).float()
            if in_step:
                self._learned.append((rows, values.cpu()))
        return {"ref_chosen_logps": values[:, 0], "ref_rejected_logps": values[:, 1]}

    # --- the loss ---

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        mine = sum(int(_chosen(sample["completion_mask"]).sum()) for sample in batch_samples)
        self._chosen_tokens = sum(from_all(mine))
        return super()._get_num_items_in_batch(batch_samples, device)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        with contextlib.nullcontext() if self.shared is None else self.shared.kept():
            self.precompute_ref_logps = self._references is not None and self.model.training
            if self.precompute_ref_logps:
                inputs = {**inputs, **self._reference(inputs)}
            return self._weighted(model, inputs, return_outputs)

    def _weighted(self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
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
