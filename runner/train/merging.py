"""An adapter into the weights of its base, and the base's own file format around them.

The base is loaded without quantization, so that nothing is merged into rounded weights. Every weight is
rounded once, to its dtype: PEFT computes what the adapter adds in float32.

Tied embeddings are one parameter under two names, and an adapter may change one of the two. So the head gets
a copy of its own before the adapter is there, and loses it again if it is still the same after the merge; if
it is not, the configuration says that they are not tied any more. Until the merge it says that they are: what
PEFT trains of tied embeddings it puts into both.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from runner.errors import DataError, JobError, Problem
from runner.manifest import Job
from runner.train.memory import is_out_of_memory
from runner.train.models import model as models
from runner.train.tensor_files import writing

MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of values of `init_lora_weights` that change the base when the adapter is made (PEFT 0.21). Over
a quantized base that is another change than over the unquantized one: the adapter does not belong to it."""


def unquantized(job: Job, dtype: str) -> Job:
    """The job over its base without quantization, in `dtype`, with an attention that this device has."""
    attention = job.model.attn_implementation
    if not torch.cuda.is_available() and attention not in ("sdpa", "eager"):
        attention = "sdpa"
    model = job.model.model_copy(update={"dtype": dtype, "attn_implementation": attention})
    return job.model_copy(update={"quantization": None, "model": model})


def beside(job: Job, base: str, adapter: Path) -> PeftModel:
    """The unquantized base with its adapter beside it, ready to be merged.

    Args:
        job: as `unquantized` makes it.

    Raises:
        DataError: the base or the adapter does not load, or holds what is no number.
    """
    model = models.load_base(job, base)
    _own_head(model)
    adapted = models.load_adapter(model, adapter)
    check_finite(adapted, adapter)
    return adapted


def check_base_kept(adapted: PeftModel, job: Job) -> None:
    """Whether the adapter of a quantized run means the same over the unquantized base.

    Raises:
        JobError: it was made by changing the base.
    """
    initial = adapted.peft_config["default"].init_lora_weights
    if job.quantization is not None and isinstance(initial, str) and initial.startswith(MOVES_BASE):
        raise JobError(
            [
                Problem(
                    "lora.init_lora_weights",
                    f"{initial} changed the quantized base when training began, and would change the "
                    "unquantized one otherwise: the adapter belongs to no base that it could be merged into",
                    "export it without --merged; or train without quantization, or initialised otherwise",
                )
            ]
        )


def check_finite(adapted: PeftModel, adapter: Path) -> None:
    """Whether every number of an adapter is one.

    Raises:
        DataError: some are not.
    """
    for name, parameter in adapted.named_parameters():
        if ".default." in f"{name}." and not torch.isfinite(parameter).all():
            raise DataError(
                f"export: {adapter} holds numbers that are none (NaN or infinite), the first in {name}; "
                "remedy: export another step of the run (--step)"
            )


def merged(adapted: PeftModel) -> PreTrainedModel:
    """The base with the adapter in its weights.

    Raises:
        DataError: PEFT cannot merge this kind of adapter.
    """
    base = adapted.get_base_model()
    tied = _heads(base) is not None
    if tied:
        _say_tied(base, False)
    try:
        model: PreTrainedModel = adapted.merge_and_unload()
    except (NotImplementedError, ValueError, RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise DataError(
            f"merge the adapter: PEFT cannot: {error}; remedy: export it without --merged"
        ) from error
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if tied and torch.equal(embedding.weight, head.weight):
        head.weight = embedding.weight
        _say_tied(model, True)
    return model


def save(model: PreTrainedModel, processor: ProcessorMixin, to: Path) -> None:
    """Write weights, configuration and processor into a new folder.

    Raises:
        StorageError, AccessDenied: the disk.
    """
    with writing("write the merged model", to):
        to.mkdir(parents=True)
        model.save_pretrained(to)
        processor.save_pretrained(to)


def _heads(model: PreTrainedModel) -> tuple[torch.nn.Module, torch.nn.Module] | None:
    """The input and the output embedding, of a model whose configuration ties them."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.tie_word_embeddings or model.config.get_text_config().tie_word_embeddings
    return ends if tied and None not in ends else None


def _own_head(model: PreTrainedModel) -> None:
    if (ends := _heads(model)) is not None:
        head = ends[1]
        head.weight = torch.nn.Parameter(
            head.weight.detach().clone(), requires_grad=head.weight.requires_grad
        )


def _say_tied(model: PreTrainedModel, tied: bool) -> None:
    model.config.tie_word_embeddings = tied
    model.config.get_text_config().tie_word_embeddings = tied
