"""Where an adapter begins: new, or with the values of another one (`lora.init_from`).

    nothing                                    a new adapter, PEFT's own initialisation
    adapter_config.json in the folder          that adapter: its configuration and its values
    parameters.safetensors in the folder       a run's checkpoint: the job's configuration, its values

It also says what method dpo prefers against: the base model where a new adapter changes nothing yet, else a
copy of the adapter as it begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from runner.errors import DataError, JobError, Problem
from runner.manifest import Job
from runner.train import gathering, state
from runner.train.models.model import add_adapter, load_adapter

STARTS_AT_ZERO = (None, True, "gaussian")
"""Values of `init_lora_weights` with which a new adapter changes nothing until its first step (PEFT 0.21)."""

_FREE = ("target_modules", "exclude_modules", "lora_dropout")
"""Keys of `lora` that may differ from those of the adapter that it begins with: PEFT writes the modules that
it found, not what was asked for, and dropout is no property of the values."""


def adapted(base: PreTrainedModel, job: Job, start: Path | None) -> PeftModel:
    """The base model with the adapter that will train.

    Args:
        start: where `lora.init_from` lies.

    Raises:
        JobError: PEFT refuses the configuration, or it is not that of the adapter at `start`.
        DataError: nothing at `start` fits this model.
    """
    if start is None:
        return add_adapter(base, job)
    if (start / state.PARAMETERS).is_file():
        model = add_adapter(base, job)
        state.load_parameters(start, model)
        return model
    return _from_adapter(base, job, start)


def keeps_reference(job: Job) -> bool:
    """Whether dpo's reference is a copy of the adapter as it begins, and not the base model.

    init_from   init_lora_weights       reference
    none        true, gaussian          the base model: the adapter is disabled
    none        any other               a copy: the adapter is not zero, or the base was changed for it
    given       -                       a copy
    """
    lora = job.lora or {}
    return lora.get("init_from") is not None or lora.get("init_lora_weights") not in STARTS_AT_ZERO


@contextlib.contextmanager
def values_kept(model: PeftModel) -> Iterator[None]:
    """Base and adapter stay as they are while TRL's trainer is built.

    It rounds adapters over a quantized base to bfloat16; values that mean something are given back in full.
    And it adds the reference as a second adapter of the same configuration, of which the initialisation would
    move the weights of the base once more (PiSSA, OLoRA); its values are copied in any case.
    """
    before = {name: value.detach().clone() for name, value in gathering.trainable(model).items()}
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    initial, config.init_lora_weights = config.init_lora_weights, True
    yield
    config.init_lora_weights = initial
    for name, parameter in gathering.trainable(model).items():
        parameter.data = before[name]


def without_values(base: PreTrainedModel, job: Job, start: Path | None) -> PeftModel:
    """`adapted` over a model on the meta device: the same modules and parameters, and no numbers in them."""
    if start is None or (start / state.PARAMETERS).is_file():
        # Initialisations that compute with the base's weights have none here.
        plain = {**(job.lora or {}), "init_lora_weights": True}
        return add_adapter(base, job.model_copy(update={"lora": plain}))
    config = _configuration(job, start)
    config.inference_mode, config.init_lora_weights = False, True
    return get_peft_model(base, config)


def _from_adapter(base: PreTrainedModel, job: Job, folder: Path) -> PeftModel:
    config = _configuration(job, folder)
    model = load_adapter(base, folder, named="lora.init_from", config=config)
    model.peft_config["default"].base_model_name_or_path = job.model.name_or_path
    model.peft_config["default"].revision = job.model.revision
    return model


def _configuration(job: Job, folder: Path) -> LoraConfig:
    """That of the adapter in `folder`, which the job does not contradict."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise ValueError(f"it is a {type(config).__name__}, and this runner trains LoRA")
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise DataError(f"lora.init_from: cannot load {folder}: {error}") from error
    _same(job, config)
    config.lora_dropout = (job.lora or {}).get("lora_dropout", config.lora_dropout)
    return config


def _same(job: Job, config: LoraConfig) -> None:
    """Whether the keys that the job gives beside init_from are those of the adapter.

    Raises:
        JobError: some are not.
    """
    given: dict[str, Any] = {key: value for key, value in (job.lora or {}).items() if key != "init_from"}
    found = config.to_dict()
    problems = [
        Problem(
            f"lora.{key}",
            f"{value!r}, and the adapter of lora.init_from has {found[key]!r}",
            "remove the key: an adapter goes on as it is",
        )
        for key, value in given.items()
        if key not in _FREE and found[key] != value
    ]
    if problems:
        raise JobError(problems)
