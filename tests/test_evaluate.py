"""Evaluation by generation: what it finds, and that it leaves no trace."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GenerationConfig,
    ProcessorMixin,
)

from runner.demo import resolve_model
from runner.manifest import Evaluation as Spec
from runner.train.data.collator import Collator
from runner.train.data.rows import Rows
from runner.train.evaluation.evaluate import Evaluation, evaluate, greedy
from tests.samples import chartqa, png, rows, smolvlm, source

MODEL = str(resolve_model("demo:smolvlm-tiny"))
SPEC = Spec(batch_size=2, max_new_tokens=4)


@pytest.fixture(scope="module")
def processor() -> ProcessorMixin:
    return smolvlm()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, processor: ProcessorMixin) -> Rows:
    folder = tmp_path_factory.mktemp("charts")
    questions = [f"{'very ' * number}long question?" for number in range(5)]
    images = [png(number, 64, 64) for number in range(5)]
    return rows(processor, (source(), chartqa(folder / "charts", images, query=questions)), name="eval")


def float32() -> Any:
    return AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)


def adapted(*, quantized: bool = True) -> Any:
    """A base in bfloat16, 4-bit if asked, with LoRA and dropout, as the trainer makes it."""
    torch.manual_seed(0)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.vision_model", "model.connector", "lm_head"],
    )
    model = AutoModelForImageTextToText.from_pretrained(
        MODEL, dtype=torch.bfloat16, quantization_config=config if quantized else None
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # In eval mode this path repacks weights and forgets gradients (bitsandbytes 0.50.2, AVX512-BF16).
            module.support_avx512bf16_for_cpu = False
    lora = LoraConfig(
        r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"], exclude_modules=".*vision.*"
    )
    return get_peft_model(model, lora)


def run(model: Any, processor: ProcessorMixin, made: Rows, spec: Spec = SPEC, **hooks: Any) -> Evaluation:
    calls: dict[str, Any] = {"on_progress": lambda done, total: None, "should_stop": lambda: False, **hooks}
    found = evaluate(model, processor, made, spec, **calls)
    assert found is not None
    return found


def test_records_and_metrics(processor: ProcessorMixin, made: Rows) -> None:
    progress: list[tuple[int, int]] = []
    found = run(float32(), processor, made, on_progress=lambda done, total: progress.append((done, total)))
    assert progress == [(2, 5), (4, 5), (5, 5)]
    assert [record["row"] for record in found.records] == made.dataset["row"][:]
    first = found.records[0]
    assert set(first) == {
        "row",
        "question",
        "answers",
        "prediction",
        "relaxed_accuracy",
        "exact_match",
        "group",
    }
    assert first["question"] == "long question?"
    assert first["answers"] == ["0"]
    assert first["prediction"] == first["prediction"].strip()
    metric = found.metrics["relaxed_accuracy"]
    assert (metric["n"], metric["n_human"], metric["n_augmented"]) == (5, 3, 2)


def test_batches_only_pad(processor: ProcessorMixin, made: Rows) -> None:
    """Rows of different lengths, alone and together, get the same answers."""
    model = float32()
    alone = run(model, processor, made, Spec(batch_size=1, max_new_tokens=4))
    together = run(model, processor, made, Spec(batch_size=5, max_new_tokens=4))
    assert [record["prediction"] for record in alone.records] == [
        record["prediction"] for record in together.records
    ]


def test_predictions_are_those_of_plain_generation(processor: ProcessorMixin, made: Rows) -> None:
    model = float32().eval()
    found = run(model, processor, made)
    batch = Collator(processor, made.form, torch.float32).prompts([made.dataset[0]])
    ids = model.generate(
        **{name: value for name, value in batch.items() if name not in ("row_index", "image_count")},
        do_sample=False,
        max_new_tokens=4,
    )
    text = processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert found.records[0]["prediction"] == text.strip()


def test_what_the_answers_are_makes_the_verdict(
    processor: ProcessorMixin, made: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([["0", " 1.04 "], ["2", "x"], ["4"]])
    monkeypatch.setattr(
        "runner.train.evaluation.evaluate._generate", lambda *_: [text.strip() for text in next(answers)]
    )
    found = run(float32(), processor, made)
    assert [record["relaxed_accuracy"] for record in found.records] == [True, True, True, False, True]
    assert [record["exact_match"] for record in found.records] == [True, False, True, False, True]
    assert found.metrics["exact_match"] == {
        "overall": 0.6,
        "n": 5,
        "augmented": 0.0,
        "n_augmented": 2,
        "human": 1.0,
        "n_human": 3,
    }


def test_a_request_to_stop_ends_it_between_batches(processor: ProcessorMixin, made: Rows) -> None:
    asked = iter([False, True])
    found = evaluate(
        float32(),
        processor,
        made,
        SPEC,
        on_progress=lambda done, total: None,
        should_stop=lambda: next(asked),
    )
    assert found is None


def generators() -> list[Any]:
    return [
        random.getstate(),
        [
            part.tolist() if isinstance(part, np.ndarray) else part
            for part in np.random.get_state(legacy=True)
        ],
        torch.random.get_rng_state().tolist(),
    ]


def test_it_leaves_no_trace(processor: ProcessorMixin, made: Rows) -> None:
    model = adapted()
    model.train()
    model.base_model.model.model.vision_model.eval()  # a mode that is not the model's own
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    configuration = model.generation_config.to_dict()
    before = generators()
    run(model, processor, made)
    assert generators() == before
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    assert model.is_gradient_checkpointing
    assert model.generation_config.to_dict() == configuration
    after = model.state_dict()
    assert after.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize("quantized", [True, False])
def test_train_evaluate_train_is_train_train(processor: ProcessorMixin, made: Rows, quantized: bool) -> None:
    def trained(*, evaluated: bool) -> dict[str, torch.Tensor]:
        model = adapted(quantized=quantized)
        model.train()
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        collator = Collator(processor, made.form, torch.bfloat16)
        torch.manual_seed(1)  # dropout draws from it
        for step in range(2):
            batch = collator([made.dataset[step]])
            del batch["row_index"], batch["image_count"]
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if evaluated and step == 0:
                run(model, processor, made, Spec(batch_size=5, max_new_tokens=2))
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    plain, disturbed = trained(evaluated=False), trained(evaluated=True)
    assert plain
    for name, value in plain.items():
        assert torch.equal(disturbed[name], value), name


def test_modes_come_back_after_an_error(processor: ProcessorMixin, made: Rows) -> None:
    model = float32()
    model.train()

    def failing(done: int, total: int) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        run(model, processor, made, on_progress=failing)
    assert all(module.training for module in model.modules())


def test_greedy_whatever_the_model_prefers(processor: ProcessorMixin, made: Rows) -> None:
    """A configuration that samples, searches and punishes repetition changes nothing."""
    model = float32()
    plain = run(model, processor, made)
    model.generation_config = GenerationConfig(
        **{
            **model.generation_config.to_dict(),
            "do_sample": True,
            "temperature": 0.1,
            "top_k": 3,
            "top_p": 0.2,
            "num_beams": 3,
            "repetition_penalty": 5.0,
            "no_repeat_ngram_size": 1,
            "use_cache": False,
        }
    )
    assert run(model, processor, made).records == plain.records


def test_generation_ends_at_the_models_and_the_tokenizers_end(processor: ProcessorMixin) -> None:
    model = float32()
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = [0, 2]
    assert greedy(model, processor, 8).eos_token_id == [0, 2, processor.tokenizer.eos_token_id]
    model.generation_config.eos_token_id = None
    assert greedy(model, processor, 8).eos_token_id == [processor.tokenizer.eos_token_id]
