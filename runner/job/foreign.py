"""Names from elsewhere, each with the answer. Data only.

People bring jobs from LLaMA-Factory, Axolotl, ms-swift, TRL's command line and older transformers. A key that
one of those would understand is answered with ours wherever it stands. Names that upstream still has at the
same place are not here, nor are names that only stand in the wrong section, which `runner.job.check` finds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """What to write instead of a foreign name."""

    use: str
    """The job key; empty when there is none."""
    note: str = ""


_GONE = "it is no longer a field of transformers"

FOREIGN: dict[str, Answer] = {
    # the model
    "model_name_or_path": Answer("model.name_or_path"),
    "base_model": Answer("model.name_or_path"),
    "model_name": Answer("model.name_or_path"),
    "model_id": Answer("model.name_or_path"),
    "model_id_or_path": Answer("model.name_or_path"),
    "model_path": Answer("model.name_or_path"),
    "base_model_name": Answer("model.name_or_path"),
    "pretrained_model_name_or_path": Answer("model.name_or_path"),
    "model_revision": Answer("model.revision"),
    "torch_dtype": Answer("model.dtype", "renamed in transformers 5"),
    "torch_dtype_str": Answer("model.dtype"),
    "compute_dtype": Answer("model.dtype"),
    "precision": Answer("model.dtype"),
    "attn_impl": Answer("model.attn_implementation"),
    "flash_attn": Answer("model.attn_implementation", "as flash_attention_2"),
    "flash_attention": Answer("model.attn_implementation", "as flash_attention_2"),
    "sdp_attention": Answer("model.attn_implementation", "as sdpa"),
    "freeze_vision_tower": Answer("model.freeze", "as [vision_tower]"),
    "freeze_vit": Answer("model.freeze", "as [vision_tower]"),
    "freeze_multi_modal_projector": Answer("model.freeze", "as [projector]"),
    "freeze_aligner": Answer("model.freeze", "as [projector]"),
    "tokenizer": Answer("model.processor", "the model's own processor is used"),
    "tokenizer_type": Answer("model.processor", "the model's own processor is used"),
    "processor_type": Answer("model.processor", "the model's own processor is used"),
    "processor_kwargs": Answer("model.processor"),
    "template": Answer("", "the model's own chat template is used"),
    "chat_template": Answer("", "the model's own chat template is used"),
    "max_pixels": Answer("model.processor", "as the model's image processor names it"),
    "min_pixels": Answer("model.processor", "as the model's image processor names it"),
    "image_max_pixels": Answer("model.processor", "as the model's image processor names it"),
    "image_size": Answer("model.processor", "as the model's image processor names it"),
    "use_fast": Answer("model.image_backend", "torchvision is the fast one"),
    # quantization
    "quantization_bit": Answer("quantization.load_in_4bit", "or quantization.load_in_8bit"),
    "quant_bits": Answer("quantization.load_in_4bit", "or quantization.load_in_8bit"),
    "q_lora_bits": Answer("quantization.load_in_4bit", "or quantization.load_in_8bit"),
    "quant_method": Answer("quantization", "it is bitsandbytes"),
    "quantization_method": Answer("quantization", "it is bitsandbytes"),
    "quantization_config": Answer("quantization"),
    "quantization_type": Answer("quantization.bnb_4bit_quant_type"),
    "double_quantization": Answer("quantization.bnb_4bit_use_double_quant"),
    "use_bnb_nested_quant": Answer("quantization.bnb_4bit_use_double_quant"),
    # LoRA
    "lora_r": Answer("lora.r"),
    "lora_rank": Answer("lora.r"),
    "rank": Answer("lora.r"),
    "alpha": Answer("lora.lora_alpha"),
    "dropout": Answer("lora.lora_dropout"),
    "lora_target": Answer("lora.target_modules", "`all` is all-linear"),
    "lora_target_modules": Answer("lora.target_modules"),
    "lora_target_linear": Answer("lora.target_modules", "as all-linear"),
    "lora_modules_to_save": Answer("lora.modules_to_save"),
    "additional_target": Answer("lora.modules_to_save"),
    "use_peft": Answer("lora", "a lora section is LoRA, null is full fine-tuning"),
    "peft": Answer("lora"),
    "peft_config": Answer("lora"),
    "use_lora": Answer("lora", "a lora section is LoRA, null is full fine-tuning"),
    "adapter": Answer("lora", "with `quantization` it is QLoRA"),
    "q_lora": Answer("lora", "with `quantization` it is QLoRA"),
    "finetuning_type": Answer("lora", "a lora section is LoRA, null is full fine-tuning"),
    "tuner_type": Answer("lora", "a lora section is LoRA, null is full fine-tuning"),
    "train_type": Answer("lora", "a lora section is LoRA, null is full fine-tuning"),
    # data
    "dataset": Answer("datasets.train"),
    "data": Answer("datasets.train"),
    "dataset_name": Answer("datasets.train[0].path"),
    "dataset_config": Answer("datasets.train[0].name"),
    "dataset_train_split": Answer("datasets.train[0].split"),
    "dataset_test_split": Answer("datasets.eval[0].split"),
    "eval_dataset": Answer("datasets.eval"),
    "val_dataset": Answer("datasets.eval"),
    "val_size": Answer("datasets.eval", "name a split, as train[90%:]"),
    "val_set_size": Answer("datasets.eval", "name a split, as train[90%:]"),
    "split_dataset_ratio": Answer("datasets.eval", "name a split, as train[90%:]"),
    "test_split_size": Answer("datasets.eval", "name a split, as train[90%:]"),
    "system": Answer("datasets.train[0].system_prompt"),
    "cutoff_len": Answer("datasets.max_length"),
    "sequence_len": Answer("datasets.max_length"),
    "max_seq_length": Answer("datasets.max_length"),
    "max_seq_len": Answer("datasets.max_length"),
    "model_max_length": Answer("datasets.max_length"),
    "sample_packing": Answer("", "images cannot be packed"),
    "preprocessing_num_workers": Answer("datasets.num_proc"),
    "dataset_processes": Answer("datasets.num_proc"),
    "skip_prepare_dataset": Answer("", "vision rows are never prepared ahead"),
    # training
    "stage": Answer("method"),
    "trainer_type": Answer("method"),
    "rlhf_type": Answer("method"),
    "rl": Answer("method"),
    "algorithm": Answer("method"),
    "micro_batch_size": Answer("training.per_device_train_batch_size"),
    "per_gpu_train_batch_size": Answer("training.per_device_train_batch_size", _GONE),
    "train_batch_size": Answer("training.per_device_train_batch_size"),
    "batch_size": Answer("training.per_device_train_batch_size", "or training.global_batch_size"),
    "per_gpu_eval_batch_size": Answer("training.per_device_eval_batch_size", _GONE),
    "eval_batch_size": Answer("training.per_device_eval_batch_size"),
    "num_epochs": Answer("training.num_train_epochs"),
    "epochs": Answer("training.num_train_epochs"),
    "lr": Answer("training.learning_rate"),
    "lr_scheduler": Answer("training.lr_scheduler_type"),
    "optimizer": Answer("training.optim"),
    "warmup_ratio": Answer("training.warmup_steps", "a value below 1 is a share of all steps; " + _GONE),
    "evaluation_strategy": Answer("training.eval_strategy", "renamed in transformers"),
    "enable_gradient_checkpointing": Answer("training.gradient_checkpointing"),
    "group_by_length": Answer("datasets.order", "by_length puts rows of about equal length side by side"),
    "neftune_alpha": Answer("training.neftune_noise_alpha"),
    "gradient_clipping": Answer("training.max_grad_norm"),
    "trainer_kwargs": Answer("training"),
    "logging_dir": Answer("name", "logs are in runs/<name>/; " + _GONE),
    "overwrite_output_dir": Answer("name", "a new name starts a new run, the same name resumes; " + _GONE),
    "save_safetensors": Answer("", "checkpoints and adapters are always safetensors"),
    "saves_per_epoch": Answer("checkpoints.save_steps"),
    "evals_per_epoch": Answer("evaluation.steps"),
    "early_stopping_patience": Answer("evaluation.early_stopping_patience"),
    "early_stopping_threshold": Answer("evaluation.early_stopping_threshold"),
    "early_stop": Answer("evaluation.early_stopping_patience"),
    "save_best": Answer("evaluation.metric_for_best_model"),
    "no_cuda": Answer("", "hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"),
    "include_tokens_per_second": Answer("", "tokens per second are always reported"),
    "jit_mode_eval": Answer("", _GONE),
    "use_mps_device": Answer("", _GONE),
    "torchdynamo": Answer("training.torch_compile", _GONE),
    "plot_loss": Answer("", "the loss of every step is in runs/<name>/"),
    "enable_wandb": Answer("training.report_to", "as wandb"),
    "use_wandb": Answer("training.report_to", "as wandb"),
    "wandb_project": Answer("training.project", "or WANDB_PROJECT in the environment"),
    "wandb_entity": Answer("", "set WANDB_ENTITY where the runner is started"),
    "wandb_mode": Answer("", "set WANDB_MODE where the runner is started; without a key it is offline"),
    "wandb_run_id": Answer("", "it is the run's own, the same in every attempt"),
    "wandb_name": Answer("name"),
    "use_tensorboard": Answer("training.report_to", "as tensorboard"),
    "use_mlflow": Answer("training.report_to", "as mlflow"),
    "mlflow_tracking_uri": Answer("", "set MLFLOW_TRACKING_URI where the runner is started"),
    "mlflow_experiment_name": Answer("training.project", "or MLFLOW_EXPERIMENT_NAME in the environment"),
    # launch
    "num_processes": Answer("launch.gpus_per_node"),
    "num_nodes": Answer("launch.nodes"),
    "accelerate_config": Answer("launch.strategy"),
    "env": Answer("", "set variables where the runner is started"),
    "envs": Answer("", "set variables where the runner is started"),
}
"""Foreign name -> ours, wherever it stands and is unknown."""

FOREIGN_AT: dict[str, Answer] = {
    "model.name": Answer("model.name_or_path"),
    "model.path": Answer("model.name_or_path"),
    "model.id": Answer("model.name_or_path"),
    "datasets.train.type": Answer("datasets.train[0].format"),
    "datasets.eval.type": Answer("datasets.eval[0].format"),
    "datasets.train.dataset_name": Answer("datasets.train[0].path"),
    "datasets.eval.dataset_name": Answer("datasets.eval[0].path"),
    "datasets.train.fraction": Answer("datasets.train[0].split", "as train[:10%]"),
    "datasets.eval.fraction": Answer("datasets.eval[0].split", "as train[:10%]"),
    "datasets.val": Answer("datasets.eval"),
    "datasets.validation": Answer("datasets.eval"),
    "datasets.test": Answer("datasets.eval"),
    "lora.alpha": Answer("lora.lora_alpha"),
    "lora.dropout": Answer("lora.lora_dropout"),
    "lora.rank": Answer("lora.r"),
}
"""The same, for words that mean something else elsewhere. Indices are left out of the place."""

PROCESSOR: dict[str, Answer] = {
    "backend": Answer("model.image_backend"),
    "use_fast": Answer("model.image_backend", "torchvision is the fast one"),
    "revision": Answer("model.revision"),
    "trust_remote_code": Answer("", "code from a hub is not executed"),
    "local_files_only": Answer("", "the supervisor fetches first, the trainer is offline"),
    "token": Answer("", "credentials come from the environment"),
}
"""Keyword arguments of AutoProcessor.from_pretrained that are ours."""
