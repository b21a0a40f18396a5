"""TRL's trainer with our data order, our checkpoints and our record of every step; nothing else changed.

Every rank of an attempt runs one. What they do together (`runner.train.world`) is decided by rank 0, which
alone writes; the record of a step is of its global batch.

`RunTrainer` is a mixin over any `transformers.Trainer`; a method is one subclass of it and of TRL's trainer
(`runner.train.methods`). The upstream methods that it overrides are private; `tests/test_upstream.py` fails
when one of them moves.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers.trainer import TRAINER_STATE_NAME

from runner.checkpoint.files import publish, seal
from runner.durable import disk
from runner.errors import DataError, RunnerError
from runner.plan import Geometry, Plan, batch_record, checkpoint_id
from runner.train import loading, placement, state
from runner.train.callbacks import SaveAndStop
from runner.train.channel import Channel
from runner.train.data.rows import Rows
from runner.train.facts import peak_memory
from runner.train.gathering import Engine, Whole, Zero, trainable
from runner.train.models.architectures import FREEZABLE
from runner.train.models.model import float32_trainable
from runner.train.models.shared import SharedImages
from runner.train.sampler import GlobalBatchSampler
from runner.train.savings import Savings
from runner.train.watch import Watch
from runner.train.watched import WatchedTrainer
from runner.train.world import from_all

CALMER = (
    "Remedy: a smaller training.learning_rate, or a smaller training.max_grad_norm; the last checkpoint is "
    "from before"
)


class RunTrainer(WatchedTrainer):
    """Goes before a method's own trainer: order, record, save, restore."""

    shared: SharedImages | None = None
    """The model's hooks, from `attach` on."""

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
        """Give the trainer its run. Called once, right after construction.

        Args:
            evaluate_now: generates on the evaluation rows when an evaluation is due; returns the metrics, or
                None when it was asked to stop.
            applied: which savings are in force.
        """
        self._plan = plan
        self._rows = rows
        self._channel = channel
        self._evaluate_now = evaluate_now
        self.control_callback = control_callback
        self.watch = watch
        order = plan.job.datasets.order
        self._sampler = GlobalBatchSampler(
            len(rows.dataset),
            plan.geometry.global_batch_size,
            plan.job.seed,
            order,
            () if order == "shuffled" else rows.dataset["tokens"][:],
            rows.dataset["pictures"][:] if order == "by_image" else (),
        )
        self.steps: list[state.Step] = [] if plan.restore is None else state.load_steps(plan.restore)
        self._parent = None if plan.restore is None else plan.restore.name
        self._micro: list[tuple[torch.Tensor, int, int]] = []
        self._step_rows: list[list[int]] = []
        self._micro_rows: list[int] = []
        self._waited = 0.0
        self._given: torch.optim.Optimizer | None = None
        self._names: list[list[str]] = []
        self._began = time.monotonic()
        float32_trainable(self.model)
        frozen = applied.encode_once is None and set(FREEZABLE) <= set(plan.job.model.freeze)
        self.shared = SharedImages(self.model, frozen=frozen)

    def leave(self) -> None:
        """Training is through: leave to other runs what they need not compute again."""

    def facts(self) -> dict[str, Any]:
        """What the method has to tell of itself, for the outcome."""
        return {}

    def recut(self, cut: Geometry) -> None:
        """Train in micro-batches of another size; only before `train`."""
        self._plan = self._plan.model_copy(update={"geometry": cut})
        self.args.per_device_train_batch_size = self._train_batch_size = cut.per_device
        self.args.gradient_accumulation_steps = cut.accumulation
        for name, value in loading.arguments(self._plan, loading.Room.here()).items():
            setattr(self.args, name, value)

    # --- the order of rows ---

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> GlobalBatchSampler:
        return self._sampler

    def get_train_dataloader(self) -> DataLoader:
        """Upstream puts every micro-batch of a step on the GPU at once; ours moves when it is at work."""
        loader = super().get_train_dataloader()
        loader.device = None
        if self.args.dataloader_persistent_workers:
            # Such workers draw their seed from the global generator once a process, not once an epoch, so a
            # resumed run would draw at other places. They draw from this one; nothing else uses it.
            loader.base_dataloader.generator = torch.Generator()
        return loader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # accelerate loses the epoch of a custom sampler once a resume wraps it in a SkipBatchSampler.
        self._sampler.set_epoch(kwargs["epoch"])
        step, last = self.state.global_step, self.state.max_steps
        if self.watch.pending(step, last):
            self._evaluate_step(step)
        if step >= last or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # --- the record of steps ---

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], *args: Any, **kwargs: Any
    ) -> tuple[list[dict[str, Any]], Any]:
        """Upstream's micro-batches of one step; names their rows before they can do harm."""
        timed = loading.Timed(epoch_iterator)
        with loading.unwrapped():
            samples, items = super().get_batch_samples(timed, *args, **kwargs)
        self._waited = timed.seconds
        ranks = from_all([sample["row_index"].tolist() for sample in samples])
        # The sampler's order: a micro-batch of every rank, then the next one.
        self._step_rows = [[index for rows in turn for index in rows] for turn in zip(*ranks, strict=True)]
        self._channel.send("begin", step=self.state.global_step + 1, ids=self._ids)
        return samples, items

    @property
    def _ids(self) -> list[int]:
        """The rows of the step, all ranks', in the sampler's order."""
        return [index for rows in self._step_rows for index in rows]

    def _prepare_input(self, data: Any) -> Any:
        """Upstream's, which waits for every copy to the GPU; from pinned memory nobody has to."""
        if isinstance(data, torch.Tensor) and self.args.device.type == "cuda" and data.is_pinned():
            data = data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        self._micro_rows = inputs.pop("row_index").tolist()
        images = int(inputs.pop("image_count").sum())
        tokens = int(inputs["attention_mask"].sum())
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._micro.append((loss.detach(), tokens, images))
        return loss

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any
    ) -> None:
        done = self.state.global_step
        stepped = bool(self._micro)  # upstream calls this once more at the end of an epoch
        if stepped:
            self._record(done, grad_norm, kwargs["learning_rate"])
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        if stepped and self.control_callback.evaluate and not self.control_callback.stopped:
            self._evaluate_step(done)
        self._began = time.monotonic()

    def _record(self, done: int, grad_norm: Any, learning_rate: float) -> None:
        mine = [float(sum(values)) for values in zip(*self._micro, strict=True)]
        losses, tokens, images, waited = zip(*from_all([*mine, self._waited]), strict=True)
        # Every rank's is of its own rows, scaled so that the mean over ranks is that of the global batch.
        loss = sum(losses) / len(losses)
        norm = math.nan if grad_norm is None else float(grad_norm)
        if not (math.isfinite(loss) or self.accelerator.scaler is not None):  # the scaler skips such steps
            raise RunnerError(
                f"step {done}: the loss is {loss} at learning rate {learning_rate:.3g}. {CALMER}"
            )
        step = state.Step(
            step=done,
            loss=loss,
            grad_norm=norm if math.isfinite(norm) else None,
            learning_rate=float(learning_rate),
            tokens=int(sum(tokens)),
            images=int(sum(images)),
            rows=self._ids,
        )
        self._micro.clear()
        self.steps.append(step)
        self._channel.send(
            "step",
            step=done,
            steps=self.state.max_steps,
            loss=step.loss,
            grad_norm=step.grad_norm,
            learning_rate=step.learning_rate,
            tokens=step.tokens,
            images=step.images,
            ids=step.rows,
            seconds=time.monotonic() - self._began,
            data_seconds=max(waited),  # all wait for the slowest
            memory_bytes=peak_memory(),
        )

    # --- the state of the run ---

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Upstream's optimizer, remembered as it is before an engine takes it and its parameters apart."""
        optimizer = super().create_optimizer(*args, **kwargs)
        # An adapter has nothing without weight decay. DeepSpeed drops an empty group, others keep it, and a
        # state has to fit them all.
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        names = {id(parameter): name for name, parameter in trainable(self.model).items()}
        self._given = optimizer
        self._names = [[names[id(one)] for one in group["params"]] for group in optimizer.param_groups]
        return optimizer

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        """Upstream's, without DeepSpeed's own way to load a checkpoint."""
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        else:
            self._load_from_checkpoint(resume_from_checkpoint)  # the engine is made of these values
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        placement.check(self, self._plan.strategy)
        placement.settle(self)
        return prepared

    @property
    def engine(self) -> Engine:
        """What the strategy made of model and optimizer; while it trains."""
        assert self._given is not None
        if self.is_deepspeed_enabled:
            stage = placement.STAGES[self._plan.strategy]
            return Zero(self.model, self._given, self._names, self.model_wrapped.optimizer, stage)
        return Whole(self.model, self.optimizer.optimizer)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        done = self.state.global_step
        began = time.monotonic()
        self._channel.send("phase", phase="save")
        snapshot = state.collect(self.engine)
        if snapshot is not None:
            self._write_checkpoint(snapshot, done, began)
        self._parent = checkpoint_id(self._plan, done)
        self._channel.send("phase", phase="train")

    def _write_checkpoint(self, snapshot: state.Snapshot, done: int, began: float) -> None:
        for name, values in snapshot.parameters.items():
            if not torch.isfinite(values).all():
                raise RunnerError(f"step {done}: {name} is not finite any more, nothing is saved. {CALMER}")
        saving = self._plan.attempt_dir / f"saving-{done:08d}"
        shutil.rmtree(saving, ignore_errors=True)
        saving.mkdir()
        state.save(
            saving,
            snapshot,
            model=self.model,
            scheduler=self.lr_scheduler,
            scaler=self.accelerator.scaler,
            data=self._rows.fingerprint,
            steps=self.steps,
            references=self._known_references(),
        )
        self.watch.write(saving)
        with disk("save a checkpoint", saving):
            self.state.save_to_json(str(saving / TRAINER_STATE_NAME))
        name = checkpoint_id(self._plan, done)
        extra = {"batch": batch_record(self._plan.job, self._plan.geometry, self._plan.strategy)}
        seal(saving, id=name, step=done, parent=self._parent, extra=extra)
        if self.control_callback.evaluate:
            self.watch.saved(saving)
        path = publish(saving, self._plan.run_dir / "outbox", name)
        self._channel.send("checkpoint", id=name, step=done, path=str(path), seconds=time.monotonic() - began)

    def _known_references(self) -> dict[str, torch.Tensor] | None:
        """What a checkpoint keeps of a reference."""
        return None

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        if state.data_fingerprint(folder) != self._rows.fingerprint:
            raise DataError(
                f"checkpoint {folder.name}: it was trained on other rows than the datasets hold now; remedy: "
                "put the data back as it was, or start a run under another name"
            )
        state.load_parameters(folder, self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.load_optimizer(Path(checkpoint), engine=self.engine, scheduler=self.lr_scheduler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            state.load_scaler(Path(checkpoint), self.accelerator.scaler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.load_rng(Path(checkpoint), self._plan.job.seed)
