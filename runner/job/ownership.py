"""Ours and theirs: the upstream fields that the runner owns, each with the job key to use instead.

Every other field of the pinned `trl.SFTConfig`, `trl.DPOConfig`, `peft.LoraConfig` and
`transformers.BitsAndBytesConfig` passes through unchanged; docs/training-options.md is
generated from these tables and the upstream schema. A field is ours when two hands on it would break a
promise (what a checkpoint is, which samples a step sees, which tokens carry loss), or when a second word for
it exists in the job.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Owned:
    """An upstream field that a job may not set."""

    why: str
    use: str = ""
    """The job key to use instead; empty when there is nothing to set."""


_CHECKPOINTS = "the runner writes, verifies and prunes checkpoints itself"
_RESUME = "the same command resumes by itself, at the right sample, from the newest checkpoint that verifies"
_HUB = "a run uploads nothing; the adapter is in runs/<name>/adapter, ready for `hf upload`"
_BEST = "the best evaluation during training is chosen by generation or by loss, and kept across machines"
_LAUNCH = "the runner starts the processes and configures the engine"
_ORDER = "the order of samples is the runner's: by rows, seed and epoch alone, the same on any machine"
_LABELS = "the loss is on the answers, always; the label audit shows it before step 1"
_PRECISION = "the computation has the type of the model, in training and in evaluation"
_ROWS = "rows are read by format and columns, and never tokenized ahead for vision data"
_VERBS = "the verb of the command line decides what is done"
_TRACKIO = "trackio writes beside the run, so that no step is there twice; `trackio sync` sends it to a Space"
_PYTHON = "it is a Python object, which YAML cannot write"

TRAINING: dict[str, Owned] = {
    "output_dir": Owned("a run is in runs/<name>/", "name"),
    "run_name": Owned("the run has one name", "name"),
    "seed": Owned("one seed for everything", "seed"),
    "data_seed": Owned("one seed for everything", "seed"),
    "gradient_accumulation_steps": Owned(
        "it is derived: global_batch_size / (per_device_train_batch_size x devices)",
        "training.global_batch_size",
    ),
    "auto_find_batch_size": Owned(
        "it changes the global batch: upstream multiplies by 0.9 and leaves the accumulation",
        "training.per_device_train_batch_size",
    ),
    "bf16": Owned(_PRECISION, "model.dtype"),
    "fp16": Owned(_PRECISION, "model.dtype"),
    "bf16_full_eval": Owned(_PRECISION, "model.dtype"),
    "fp16_full_eval": Owned(_PRECISION, "model.dtype"),
    "save_strategy": Owned(_CHECKPOINTS, "checkpoints.save_steps"),
    "save_steps": Owned(_CHECKPOINTS, "checkpoints.save_steps"),
    "save_total_limit": Owned(_CHECKPOINTS, "checkpoints.keep_last"),
    "save_only_model": Owned(f"{_CHECKPOINTS}; without the optimizer a resumed run would be another run"),
    "save_on_each_node": Owned(_CHECKPOINTS),
    "enable_jit_checkpoint": Owned("the runner saves on a notice, on all processes at the same step"),
    "load_best_model_at_end": Owned(_BEST, "evaluation.metric_for_best_model"),
    "metric_for_best_model": Owned(_BEST, "evaluation.metric_for_best_model"),
    "greater_is_better": Owned("it follows from the metric: a loss is better smaller, all others larger"),
    "resume_from_checkpoint": Owned(_RESUME),
    "ignore_data_skip": Owned(_RESUME),
    "restore_callback_states_from_checkpoint": Owned(_RESUME),
    "push_to_hub": Owned(_HUB),
    "hub_token": Owned(f"{_HUB}; a token never stands in a job"),
    "hub_private_repo": Owned(_HUB),
    "hub_model_id": Owned(_HUB),
    "hub_strategy": Owned(_HUB),
    "hub_always_push": Owned(_HUB),
    "hub_revision": Owned(_HUB),
    "trackio_space_id": Owned(_TRACKIO, "training.report_to"),
    "trackio_bucket_id": Owned(_TRACKIO, "training.report_to"),
    "trackio_static_space_id": Owned(_TRACKIO, "training.report_to"),
    "use_cpu": Owned(
        "the device is the machine's; hide its GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
    ),
    "local_rank": Owned(_LAUNCH),
    "accelerator_config": Owned(f"{_LAUNCH} and the sampler", "launch.strategy"),
    "parallelism_config": Owned(_LAUNCH, "launch.strategy"),
    "deepspeed": Owned(_LAUNCH, "launch.strategy"),
    "fsdp": Owned(_LAUNCH, "launch.strategy"),
    "fsdp_config": Owned(_LAUNCH, "launch.strategy"),
    "ddp_find_unused_parameters": Owned(_LAUNCH, "launch.strategy"),
    "ddp_bucket_cap_mb": Owned(_LAUNCH, "launch.strategy"),
    "ddp_broadcast_buffers": Owned(_LAUNCH, "launch.strategy"),
    "ddp_static_graph": Owned(_LAUNCH, "launch.strategy"),
    "ddp_backend": Owned(_LAUNCH, "launch.strategy"),
    "ddp_timeout": Owned(_LAUNCH, "launch.strategy"),
    "dataloader_drop_last": Owned(f"{_ORDER}; an epoch is padded to whole global batches"),
    "dataloader_in_order": Owned(_ORDER),
    "train_sampling_strategy": Owned(_ORDER, "datasets.order"),
    "length_column_name": Owned(_ORDER, "datasets.order"),
    "shuffle_dataset": Owned(_ORDER, "seed"),
    "remove_unused_columns": Owned("the collator needs the image and label columns", "datasets.train"),
    "max_length": Owned("it counts image tokens and is checked before training", "datasets.max_length"),
    "truncation_mode": Owned("image tokens are never truncated, at either end", "datasets.on_overflow"),
    "dataset_text_field": Owned(_ROWS, "datasets.train"),
    "dataset_kwargs": Owned(_ROWS, "datasets.train"),
    "dataset_num_proc": Owned("it belongs to the data", "datasets.num_proc"),
    "chat_template_path": Owned(
        "token counts, audit, training and evaluation must share one template, the one in the model's folder",
        "model.name_or_path",
    ),
    "completion_only_loss": Owned(_LABELS),
    "assistant_only_loss": Owned(_LABELS),
    "model_init_kwargs": Owned("the runner loads the model", "model"),
    "precompute_ref_log_probs": Owned(
        "upstream refuses it for rows with images; the runner keeps what it has computed once",
        "speed.cache_reference",
    ),
    "precompute_ref_batch_size": Owned("it goes with precompute_ref_log_probs"),
    "sync_ref_model": Owned(
        "a reference that moves would have to be a second model, and part of every checkpoint"
    ),
    "ref_model_mixup_alpha": Owned("it goes with sync_ref_model"),
    "ref_model_sync_steps": Owned("it goes with sync_ref_model"),
    "trust_remote_code": Owned("code from a hub is not executed; use an architecture that transformers has"),
    "do_train": Owned(_VERBS),
    "do_eval": Owned(_VERBS),
    "do_predict": Owned(_VERBS),
    "include_for_metrics": Owned("metrics are computed by generation", "evaluation"),
    "batch_eval_metrics": Owned("metrics are computed by generation", "evaluation"),
    "disable_tqdm": Owned("the progress bar is the supervisor's; it is off where there is no terminal"),
}
"""Fields of trl.SFTConfig, of trl.DPOConfig, or of both: what is ours under one method is ours under both."""

LORA: dict[str, Owned] = {
    "task_type": Owned("the runner sets it: CAUSAL_LM"),
    "peft_type": Owned("this section is LoRA"),
    "auto_mapping": Owned("PEFT fills it in"),
    "peft_version": Owned("PEFT fills it in"),
    "base_model_name_or_path": Owned("the base is the job's model", "model.name_or_path"),
    "revision": Owned("the base is the job's model", "model.revision"),
    "inference_mode": Owned(_VERBS),
    "megatron_config": Owned("Megatron is not an engine of the runner"),
    "megatron_core": Owned("Megatron is not an engine of the runner"),
    "runtime_config": Owned(_PYTHON),
    "eva_config": Owned(
        f"{_PYTHON}, and EVA needs a pass over the data before training", "lora.init_lora_weights"
    ),
    "corda_config": Owned(
        f"{_PYTHON}, and CorDA needs a pass over the data before training", "lora.init_lora_weights"
    ),
    "lora_ga_config": Owned(
        f"{_PYTHON}, and LoRA-GA needs a pass over the data before training", "lora.init_lora_weights"
    ),
    "use_bdlora": Owned(_PYTHON),
    "arrow_config": Owned(_PYTHON),
    "kasa_config": Owned(_PYTHON),
    "monteclora_config": Owned("it needs a term in the loss that TRL's trainer does not add"),
    "alora_invocation_tokens": Owned(
        "aLoRA needs its invocation tokens in every prompt, which the formats do not write"
    ),
}
"""Fields of peft.LoraConfig."""

QUANTIZATION: dict[str, Owned] = {
    "llm_int8_enable_fp32_cpu_offload": Owned(
        "the model is on one device; a part on the CPU would not train"
    ),
}
"""Fields of transformers.BitsAndBytesConfig."""

OWNED: dict[str, dict[str, Owned]] = {"training": TRAINING, "lora": LORA, "quantization": QUANTIZATION}

DEFAULTS: dict[str, str] = {
    "dataloader_num_workers": "with a GPU 1 to 8, as cores and shared memory allow, else 0",
    "dataloader_prefetch_factor": "2, or as many as have the micro-batches of a whole step ready",
    "dataloader_persistent_workers": "true where there are workers",
    "dataloader_pin_memory": "true with a GPU, else false",
}
"""Fields of `training` whose default is ours and depends on the machine (`runner.train.loading`)."""
