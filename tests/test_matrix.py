"""The compatibility matrix, row by row, and upstream refusing the same."""

from __future__ import annotations

from typing import Any

import pytest

from runner.job.check import check
from tests.small_job import SMALL

BITS = {"load_in_4bit": True}
HALF = {"name_or_path": "x", "dtype": "float16"}
EVAL = {"datasets": {**SMALL["datasets"], "eval": [{"path": "demo:charts", "format": "vqa"}]}}

PAIRS = [{"path": "demo:preferences", "format": "preference"}]
DPO = {"method": "dpo", "datasets": {"train": PAIRS, "eval": PAIRS}}
BEST = ("evaluation", "metric_for_best_model")

ROWS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"method": "dpo"}, ("datasets", "train", 0, "format")),
    ({"datasets": {"train": [{"path": "x", "format": "preference"}]}}, ("datasets", "train", 0, "format")),
    ({**DPO, "evaluation": {"metric": "relaxed_accuracy"}}, ("evaluation", "metric")),
    ({**DPO, "evaluation": {"metric": "exact_match"}}, ("evaluation", "metric")),
    ({**EVAL, "evaluation": {"metric": "preference_accuracy"}}, ("evaluation", "metric")),
    ({"training": {"packing": True}}, ("training", "packing")),
    ({"training": {"eval_packing": True}}, ("training", "eval_packing")),
    ({"training": {"padding_free": True}}, ("training", "padding_free")),
    ({"training": {"pad_to_multiple_of": 8}}, ("training", "pad_to_multiple_of")),
    ({"lora": {"r": 8}, "quantization": {**BITS, "load_in_8bit": True}}, ("quantization", "load_in_8bit")),
    ({"lora": {"r": 8}, "quantization": {"bnb_4bit_quant_type": "nf4"}}, ("quantization",)),
    ({"quantization": BITS}, ("quantization",)),
    ({"model": {"name_or_path": "x", "dtype": "float16"}}, ("model", "dtype")),
    ({"lora": {"target_modules": ["q_proj", "lm_head"]}}, ("lora", "target_modules")),
    ({"lora": {"target_modules": r".*\.(q_proj|lm_head)"}}, ("lora", "target_modules")),
    ({"lora": {"target_modules": ["vision_model.encoder.q_proj"]}}, ("lora", "target_modules")),
    ({"lora": {"modules_to_save": ["connector"]}}, ("lora", "modules_to_save")),
    ({"lora": {"init_lora_weights": "pissa_niter_4"}, "quantization": BITS}, ("lora", "init_lora_weights")),
    ({"lora": {"init_lora_weights": "mica"}, "quantization": BITS}, ("lora", "init_lora_weights")),
    ({"lora": {"init_lora_weights": "pissa_niter_4"}}, ("lora", "init_lora_weights")),
    ({"lora": {"init_lora_weights": "orthogonal"}, "quantization": BITS}, ("lora", "init_lora_weights")),
    ({"lora": {"init_lora_weights": "eva"}}, ("lora", "init_lora_weights")),
    ({"lora": {"init_lora_weights": "orthogonal", "r": 7}}, ("lora", "init_lora_weights")),
    ({"lora": {"init_lora_weights": "loftq"}}, ("lora", "init_lora_weights")),
    ({"lora": {"lora_bias": True, "use_dora": True}}, ("lora", "lora_bias")),
    ({"lora": {"velora_config": {"num_groups": 4}}}, ("lora", "velora_config")),
    ({**DPO, "lora": {"bias": "lora_only"}}, ("lora", "bias")),
    ({"lora": {"target_modules": "all-linear", "layers_to_transform": [1]}}, ("lora", "layers_to_transform")),
    ({"lora": {"target_modules": ["q_proj"], "layers_pattern": "layers"}}, ("lora", "layers_pattern")),
    (
        {"training": {"global_batch_size": 8, "per_device_train_batch_size": 3}},
        ("training", "per_device_train_batch_size"),
    ),
    ({**DPO, "training": {"loss_type": "aot"}}, ("training", "per_device_train_batch_size")),
    (
        {
            **DPO,
            "training": {"loss_type": ["sft", "aot_unpaired"], "per_device_train_batch_size": "auto"},
        },
        ("training", "per_device_train_batch_size"),
    ),
    ({**DPO, "training": {"loss_weights": [1.0, 2.0]}}, ("training", "loss_weights")),
    (
        {**DPO, "training": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}},
        ("training", "loss_weights"),
    ),
    ({**DPO, "training": {"loss_type": ["sigmoid", "exo_pair"]}}, ("training", "loss_type")),
    (
        {**DPO, "training": {"f_divergence_type": "forward_kl", "loss_type": "nca_pair"}},
        ("training", "f_divergence_type"),
    ),
    (
        {**DPO, "training": {"use_weighting": True, "loss_type": ["sigmoid", "sft"]}},
        ("training", "use_weighting"),
    ),
    (
        {
            **DPO,
            "training": {"use_weighting": True, "loss_type": "aot", "per_device_train_batch_size": 4},
        },
        ("training", "use_weighting"),
    ),
    ({"training": {"eval_strategy": "steps"}}, ("training", "eval_strategy")),
    ({"training": {"eval_on_start": True}}, ("training", "eval_on_start")),
    ({"evaluation": {}}, ("evaluation",)),
    *(
        ({**EVAL, "evaluation": evaluation}, ("evaluation", key))
        for evaluation, key in (
            ({"steps": 5, "minutes": 1.0}, "minutes"),
            ({"metric_for_best_model": "loss"}, "metric_for_best_model"),
            ({"steps": 5, "loss": False, "metric_for_best_model": "loss"}, "metric_for_best_model"),
            ({"steps": 5, "metric_for_best_model": "reward_accuracy"}, "metric_for_best_model"),
            ({"steps": 5, "early_stopping_patience": 2}, "early_stopping_patience"),
        )
    ),
    *(
        ({**DPO, "evaluation": {"steps": 5, "metric_for_best_model": metric, **more}}, BEST)
        for metric, more in (("relaxed_accuracy", {}), ("reward_accuracy", {"baseline": False}))
    ),
    ({"training": {"lr_scheduler_type": "reduce_lr_on_plateau"}}, ("training", "lr_scheduler_type")),
    ({"training": {"lr_scheduler_type": "cosine_with_min_lr"}}, ("training", "lr_scheduler_type")),
    ({"training": {"dataloader_prefetch_factor": 2}}, ("training", "dataloader_prefetch_factor")),
    ({"training": {"dataloader_persistent_workers": True}}, ("training", "dataloader_persistent_workers")),
    ({"training": {"logging_steps": 2.5}}, ("training", "logging_steps")),
    (
        {"training": {"liger_kernel_config": {"fused_linear_cross_entropy": True}}},
        ("training", "liger_kernel_config", "fused_linear_cross_entropy"),
    ),
    # Upstream failing at these is in tests/test_refused_strategies.py.
    *(
        ({"launch": {"strategy": strategy}, "lora": {}, "training": {"optim": optim}}, ("training", "optim"))
        for strategy in ("zero1", "zero2", "zero3", "fsdp2")
        for optim in ("adamw_bnb_8bit", "adafactor", "adagrad", "ademamix")
    ),
    (
        {"launch": {"strategy": "fsdp2"}, "lora": {}, "training": {"optim": "lion_32bit"}},
        ("training", "optim"),
    ),
    *(
        ({"launch": {"strategy": strategy}, "lora": {}, "model": HALF}, ("model", "dtype"))
        for strategy in ("zero1", "zero2", "zero3")
    ),
    (
        {"launch": {"strategy": "fsdp2"}, "lora": {}, "quantization": {"load_in_8bit": True}},
        ("quantization", "load_in_8bit"),
    ),
    (
        {"launch": {"strategy": "zero3"}, "lora": {"use_dora": True}, "quantization": BITS},
        ("lora", "use_dora"),
    ),
    (
        {
            "launch": {"strategy": "fsdp2"},
            "lora": {},
            "quantization": {**BITS, "bnb_4bit_quant_storage": "float32"},
        },
        ("quantization", "bnb_4bit_quant_storage"),
    ),
    ({"launch": {"strategy": "fsdp2"}}, ("launch", "strategy")),
    ({"launch": {"strategy": "fsdp2"}, "lora": {"modules_to_save": ["lm_head"]}}, ("launch", "strategy")),
]

NEIGHBOURS: list[dict[str, Any]] = [
    {"training": {"packing": False, "padding_free": False, "eval_packing": None, "pad_to_multiple_of": None}},
    {"lora": {"r": 8, "use_dora": True}, "quantization": {"load_in_8bit": True}},
    {"lora": {"r": 8}, "quantization": BITS},
    {"model": {"name_or_path": "x", "dtype": "float16"}, "lora": {"r": 8}},
    {"model": {"name_or_path": "x", "dtype": "float32"}, "lora": {"r": 8}, "quantization": BITS},
    {"model": {"name_or_path": "x", "freeze": []}, "lora": {"target_modules": ["vision_model.q_proj"]}},
    {"lora": {"target_modules": r"^(?!.*vision_model).*q_proj$"}},
    # Qwen's projector stands inside the tower's module.
    {
        "model": {"name_or_path": "x", "freeze": ["vision_tower"]},
        "lora": {"target_modules": ["visual.merger.mlp.0", "visual.deepstack_merger_list.0.linear_fc1"]},
    },
    {
        "model": {"name_or_path": "x", "freeze": ["vision_tower"]},
        "lora": {"target_modules": r"model\.visual\.merger\..*"},
    },
    {"lora": {"modules_to_save": ["lm_head"], "target_modules": "all-linear"}},
    {"lora": {"init_lora_weights": "olora"}, "quantization": BITS},
    {"lora": {"bias": "lora_only"}},
    {**DPO, "lora": {"bias": "none"}},
    {"lora": {"init_lora_weights": "orthogonal", "r": 8}},
    {
        "lora": {"init_lora_weights": "orthogonal"},
        "quantization": {**BITS, "bnb_4bit_quant_storage": "bfloat16"},
    },
    {"lora": {"target_modules": ["q_proj"], "layers_pattern": "layers", "layers_to_transform": [1]}},
    {**EVAL, "evaluation": {}, "training": {"eval_strategy": "steps", "eval_on_start": True}},
    {**EVAL, "evaluation": {"metric": "exact_match"}},
    {**EVAL, "evaluation": {"steps": 5, "metric_for_best_model": "loss", "early_stopping_patience": 1}},
    {**EVAL, "evaluation": {"minutes": 0.5, "loss": False, "metric_for_best_model": "exact_match"}},
    {**DPO, "evaluation": {"steps": 5, "metric_for_best_model": "reward_accuracy"}},
    {**DPO, "evaluation": {"metric": "preference_accuracy"}},
    {**DPO, "evaluation": {}},
    {**EVAL, "training": {"eval_strategy": "epoch", "lr_scheduler_type": "reduce_lr_on_plateau"}},
    {"training": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}},
    {
        "training": {
            "dataloader_num_workers": 2,
            "dataloader_prefetch_factor": 2,
            "dataloader_persistent_workers": True,
        }
    },
    {"training": {"logging_steps": 0.1, "eval_steps": 2.0}},
    {**DPO, "training": {"loss_type": "aot", "per_device_train_batch_size": 4}},
    {**DPO, "training": {"loss_type": ["sigmoid", "sft"], "per_device_train_batch_size": "auto"}},
    {**DPO, "training": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}},
    {**DPO, "training": {"loss_type": "exo_pair", "label_smoothing": 1e-3}},
    {**DPO, "training": {"f_divergence_type": "forward_kl", "loss_type": ["ipo", "sft"]}},
    {**DPO, "training": {"use_weighting": True, "loss_type": ["sigmoid", "bco_pair"]}},
    *(
        {"launch": {"strategy": strategy}, "lora": {}, "training": {"optim": optim}}
        for strategy in ("zero1", "zero2", "zero3", "fsdp2")
        for optim in ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
    ),
    {"launch": {"strategy": "zero3"}, "training": {"optim": "lion_32bit"}},
    {"launch": {"strategy": "fsdp2"}, "lora": {"modules_to_save": ["embed_tokens"]}, "model": HALF},
    {"launch": {"strategy": "zero3"}, "lora": {"r": 8}, "quantization": {"load_in_8bit": True}},
    {"launch": {"strategy": "zero3"}, "lora": {"use_dora": True}},
    {
        "launch": {"strategy": "fsdp2"},
        "lora": {},
        "quantization": {**BITS, "bnb_4bit_quant_storage": "bfloat16"},
    },
    {"launch": {"strategy": "fsdp2"}, "lora": {"use_dora": True}, "quantization": BITS},
    {"launch": {"strategy": "ddp"}, "lora": {"r": 8}, "quantization": {"load_in_8bit": True}},
    # Left to the runner, none of it is refused.
    {"launch": {"strategy": "auto"}, "training": {"optim": "adamw_bnb_8bit"}},
    {"lora": {"modules_to_save": ["lm_head"]}, "quantization": {"load_in_8bit": True}, "model": HALF},
]
"""One step beside the rows: upstream can do these."""


@pytest.mark.parametrize(("change", "path"), ROWS)
def test_each_row_is_refused_with_what_to_use(change: dict[str, Any], path: tuple[str, ...]) -> None:
    job, findings = check({**SMALL, **change}, {})
    assert job is None and [finding.path for finding in findings] == [path]
    assert findings[0].reason and findings[0].remedy


@pytest.mark.parametrize("change", NEIGHBOURS)
def test_the_neighbours_of_the_rows_pass(change: dict[str, Any]) -> None:
    job, findings = check({**SMALL, **change}, {})
    assert findings == [] and job is not None


@pytest.mark.parametrize(
    "lora",
    [
        {"init_lora_weights": "loftq"},
        {"lora_bias": True, "use_dora": True},
        {"lora_bias": True, "init_lora_weights": "gaussian"},
        {"target_modules": "all-linear", "layers_to_transform": [1]},
        {"target_modules": "all-linear", "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_pattern": "layers"},
    ],
)
def test_peft_refuses_the_same(lora: dict[str, Any]) -> None:
    from peft import LoraConfig

    with pytest.raises((ValueError, ImportError)):
        LoraConfig(**lora)


def test_velora_keeps_state_outside_the_parameters() -> None:
    import torch
    from peft import LoraConfig, VeloraConfig, get_peft_model

    model = torch.nn.Sequential()
    model.add_module("q_proj", torch.nn.Linear(64, 64))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], velora_config=VeloraConfig()))
    kept = {name for name, _ in adapted.named_buffers()}
    assert any("velora" in name for name in kept), kept


def test_dpo_config_refuses_weights_of_another_number(tmp_path: Any) -> None:
    from trl import DPOConfig

    with pytest.raises(ValueError, match="same length"):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, loss_weights=[1.0, 2.0])


@pytest.mark.parametrize("initial", ["pissa", "pissa_niter_4", "mica"])
def test_peft_refuses_these_initial_weights_on_a_quantized_base(initial: str) -> None:
    import bitsandbytes as bnb
    import torch
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential()
    model.add_module("q_proj", bnb.nn.Linear4bit(64, 64))
    model.q_proj.to("cpu")
    with pytest.raises(TypeError):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=initial))


def test_orthogonal_initial_weights_need_a_base_that_is_stored_as_floats() -> None:
    import bitsandbytes as bnb
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], init_lora_weights="orthogonal")
    for stored in (torch.uint8, torch.bfloat16):
        model = torch.nn.Sequential()
        model.add_module("q_proj", bnb.nn.Linear4bit(64, 64, quant_storage=stored))
        model.q_proj.to("cpu")
        if stored == torch.bfloat16:
            get_peft_model(model, config)
        else:
            with pytest.raises(RuntimeError, match="floating point"):
                get_peft_model(model, config)


@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"lr_scheduler_type": "greedy"},
        {"dataloader_prefetch_factor": 2},
        {"logging_steps": 2.5},
        {"eval_strategy": "steps", "eval_steps": 2.5},
    ],
)
def test_transformers_refuses_the_same(options: dict[str, Any], tmp_path: Any) -> None:
    from transformers import TrainingArguments

    with pytest.raises(ValueError):
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)


def test_both_bits_are_refused_by_transformers() -> None:
    from transformers import BitsAndBytesConfig

    with pytest.raises(ValueError, match="both"):
        BitsAndBytesConfig(load_in_4bit=True, load_in_8bit=True)


def test_the_gradient_scaler_refuses_float16_gradients() -> None:
    import torch

    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((weight * 2).sum()).backward()
    with pytest.raises(ValueError, match="FP16"):
        scaler.unscale_(optimizer)
