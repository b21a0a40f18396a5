"""Private upstream names that the trainer overrides or calls: each test fails when one of them moves."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.kernels.chunked_logprob
import trl.trainer.base_trainer
import trl.trainer.utils
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from trl import DPOTrainer, SFTTrainer

from runner.train.deferred import _when_called
from runner.train.placement import settle
from runner.train.trainer import RunTrainer
from runner.train.watched import WatchedTrainer

SIGNATURES = {
    "_get_train_sampler": ["self", "train_dataset"],
    "get_train_dataloader": ["self"],
    "_maybe_log_save_evaluate": [
        "self", "tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval", "start_time",
        "learning_rate",
    ],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_scaler": ["self", "checkpoint"],
    "_load_rng_state": ["self", "checkpoint"],
    "create_optimizer": ["self", "model"],
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_prepare_input": ["self", "data"],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "prediction_step": ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_an_overridden_method_still_has_its_place(name: str) -> None:
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == SIGNATURES[name]


def test_run_epoch_is_called_with_its_epoch_by_keyword() -> None:
    assert "epoch" in inspect.signature(Trainer._run_epoch).parameters
    assert "epoch=epoch," in inspect.getsource(Trainer._inner_training_loop)


def test_the_loop_records_before_it_saves() -> None:
    """`on_step_end` decides, then `_maybe_log_save_evaluate` records and saves, in one step."""
    source = inspect.getsource(Trainer._run_epoch)
    assert source.index("on_step_end") < source.index("self._maybe_log_save_evaluate(")
    assert "learning_rate=learning_rate" in source
    assert "self._save_checkpoint(" in inspect.getsource(Trainer._maybe_log_save_evaluate)


def test_the_probe_can_prepare_and_count_as_the_loop_does() -> None:
    count = ["self", "batch_samples", "device"]
    assert list(inspect.signature(Trainer._get_num_items_in_batch).parameters) == count
    # What the loop makes anew when it is gone, and what holds the size.
    assert "if self.optimizer is None" in inspect.getsource(Trainer.create_optimizer)
    assert "self._created_lr_scheduler = False" in inspect.getsource(Trainer._prepare_for_training)
    assert "batch_size=self._train_batch_size" in inspect.getsource(Trainer.get_train_dataloader)
    for trainer in (SFTTrainer, DPOTrainer):
        source = inspect.getsource(trainer)
        assert "self._metrics = {" in source and "self._total_train_tokens = 0" in source


def test_every_override_is_listed_here() -> None:
    here = {**vars(WatchedTrainer), **vars(RunTrainer)}
    ours = {name for name in here if callable(here[name]) and hasattr(SFTTrainer, name)}
    ours = {name for name in ours if not name.startswith("__")}
    assert ours == {*SIGNATURES, "_run_epoch", "evaluate"}


def test_the_head_projects_only_labelled_tokens_where_it_is_told_that_triton_runs() -> None:
    """`runner.train.methods` says so of CPUs; the kernel's own choice is by another name and stays."""
    source = inspect.getsource(trl.trainer.utils.add_fused_lm_head)
    assert "compact = _use_triton(hidden_states.device)" in source
    assert "hidden_states[mask] if compact" in source
    importlib.import_module("runner.train.methods")
    assert trl.trainer.utils._use_triton(torch.device("cpu"))
    assert not trl.kernels.chunked_logprob._use_triton(torch.device("cpu"))


def test_a_cpu_shards_where_accelerate_takes_it_for_an_xpu() -> None:
    """`runner.train.placement.prepare`; fails when FSDP2 runs on CPUs by itself, and it can go."""
    assert "self.__dict__ = self._shared_state" in inspect.getsource(PartialState.__init__)
    source = inspect.getsource(AcceleratorState.__init__)
    assert "self.__dict__.update(PartialState._shared_state)" in source
    sharding = source[: source.index("self.distributed_type = DistributedType.FSDP")]
    listed = sharding[sharding.rindex("elif self.distributed_type in [") :]
    assert "DistributedType.MULTI_XPU" in listed and "DistributedType.MULTI_CPU" not in listed


def test_a_precision_policy_of_ours_stands() -> None:
    """`runner.train.placement.prepare` puts one where accelerate makes its own only if there is none."""
    assert "FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)" in inspect.getsource(Trainer)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=policy)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy is policy and policy.output_dtype is None


KEPT: list[object] = []
"""Process groups of gloo. Where the last reference to one goes while its thread still gives back what a
backward pass sent, the two wait for each other: its destructor (PyTorch 2.13) joins that thread and holds the
lock that the thread wants. In a run other calls between ranks lie between."""


def as_it_is(engine: torch.nn.Module) -> torch.nn.Module:
    return engine


@pytest.mark.parametrize("wrapped", [as_it_is, torch.compile, None])
def test_ddp_cuts_its_buckets_anew_after_the_first_backward_pass(wrapped: Callable[..., Any] | None) -> None:
    """Which `settle` makes one before the first step; nothing of it is left in the gradients."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    KEPT.append(torch.distributed.group.WORLD)
    try:
        engine = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        if wrapped is not None:
            settle(SimpleNamespace(model_wrapped=wrapped(engine)))
        assert all(parameter.grad is None for parameter in engine.parameters())
        anew = []
        for _ in range(3):
            engine(torch.ones(1, 2)).sum().backward()
            anew.append(engine._has_rebuilt_buckets)
        assert anew == [wrapped is not None, True, True]
    finally:
        torch.distributed.destroy_process_group()


def test_transformers_takes_every_model_for_partitioned_under_one_global_configuration() -> None:
    """`runner.train.placement.whole` puts it away and back."""
    configuration = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    unset_hf_deepspeed_config()
    assert not is_deepspeed_zero3_enabled()
    set_hf_deepspeed_config(configuration)
    assert is_deepspeed_zero3_enabled()
    unset_hf_deepspeed_config()


def test_deepspeed_keeps_its_partitions_where_they_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`runner.train.gathering.Zero`: what the optimizer steps on, and what finds a parameter's part of it."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import deepspeed.utils
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    early, late = (inspect.getsource(one) for one in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3))
    assert "self.single_partition_of_fp32_groups.append(" in early
    assert "param_group['params'] = [self.single_partition_of_fp32_groups[i]]" in early
    assert "self.fp32_partitioned_groups_flat.append(" in late
    assert "fp32_param = self.fp32_partitioned_groups_flat[sub_group_id]" in late
    assert "self.optimizer.param_groups[param_group_id]['params'] = [fp32_param]" in late
    link = DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state
    assert list(inspect.signature(link).parameters) == ["self"]
    source = inspect.getsource(link)
    assert "self.optimizer.state" in source and "if not self._hp_optimizer_states_linked:" in source
    assert "self._lazy_init_hp_params_optimizer_state()" in early
    for name, arguments in {
        "safe_get_full_fp32_param": ["param"],
        "safe_get_full_optimizer_state": ["param", "optim_state_key"],
        "safe_set_full_optimizer_state": ["param", "value", "optim_state_key"],
    }.items():
        assert list(inspect.signature(getattr(deepspeed.utils, name)).parameters) == arguments
    assert "zero_optimization_stage" in vars(deepspeed.DeepSpeedEngine)


def test_deepspeed_loads_its_own_checkpoint_in_the_method_that_is_overridden() -> None:
    """`RunTrainer._prepare_for_training` gives it none, and loads before and after."""
    source = inspect.getsource(Trainer._prepare_for_training)
    assert source.index("accelerator.prepare(") < source.index("if resume_from_checkpoint is not None:")
    assert source.index("if resume_from_checkpoint is not None:") < source.index("deepspeed_load_checkpoint(")
    assert "self.model_wrapped = model" in source


DEFERS = """
import sys
from runner.train.__main__ import leave_out_trackers
leave_out_trackers()
import runner.train.deferred
import runner.train.run, torch
from bitsandbytes.backends.default import ops
print("torch._inductor.compile_fx" in sys.modules, torch.compile.__name__)
update = ops._optimizer_update_32bit
print(hasattr(update, "__wrapped__"))
import gc
print(gc.isenabled(), gc.get_freeze_count() > 100_000)
import deepspeed
print([name for name in ("wandb", "mlflow", "trackio") if sys.modules[name]])
"""


def test_bitsandbytes_still_compiles_as_it_is_imported_and_waits_here() -> None:
    from bitsandbytes.backends.default import ops

    assert "compiled_fn = torch.compile(fn, **compile_kwargs)" in inspect.getsource(ops)
    printed = subprocess.run(
        [sys.executable, "-c", DEFERS], capture_output=True, text=True, check=True
    ).stdout
    lines = printed.splitlines()
    assert [*lines[:3], lines[-1]] == ["False compile", "True", "True True", "[]"]


def test_trl_and_deepspeed_import_trackers_that_are_installed() -> None:
    """Which `leave_out_trackers` prevents, and needs not where they do not."""
    import deepspeed.autotuning.autotuner

    source = inspect.getsource(trl.trainer.base_trainer)
    assert "if is_wandb_available():\n    import wandb\n" in source
    assert "\n    import mlflow\n" in inspect.getsource(deepspeed.autotuning.autotuner)


def test_what_waits_to_be_compiled_is_compiled_once_and_called() -> None:
    asked: list[tuple[str, dict[str, object]]] = []

    def compile_now(function: Callable[[int], int], **options: object) -> Callable[[int], int]:
        asked.append((function.__name__, options))
        return lambda value: function(value) + 100

    def double(value: int) -> int:
        return 2 * value

    plain, optioned = _when_called(compile_now, double), _when_called(compile_now, dynamic=False)(double)
    assert asked == []
    assert [plain(1), plain(2), optioned(3)] == [102, 104, 106]
    assert asked == [("double", {}), ("double", {"dynamic": False})]
