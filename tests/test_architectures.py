"""Every row of the table: its paths are the model's, and a tiny model of it trains as the table says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, PreTrainedConfig
from transformers import PaliGemmaProcessor as Published

from runner.errors import DataError
from runner.train.data.collator import Collator, images
from runner.train.data.rows import Rows
from runner.train.models import model as models
from runner.train.models.architectures import ARCHITECTURES, PARTS, parts
from runner.train.models.paligemma import PaliGemmaProcessor
from tests import samples
from tests.test_model import job
from tests.tiny_models import MAKERS, NEED_TORCHVISION, save
from tests.trials import ANSWERS, REJECTED, rows

FROZEN = "vision_tower+projector"
TRIALS = [
    *[f"{name}:{method}:{FROZEN}" for name in MAKERS for method in ("sft", "dpo")],
    # Parts inside one another, several modules in a part, a lone parameter as a part.
    *[
        f"{name}:sft:{freeze}"
        for name in ("qwen2_5_vl", "qwen3_vl")
        for freeze in ("vision_tower", "projector")
    ],
    *[f"{name}:sft:" for name in ("qwen2_5_vl", "qwen3_vl", "gemma3")],
]
SEPARATORS = {"gemma3", "idefics2", "idefics3", "internvl", "mistral3", "paligemma", "pixtral", "smolvlm"}
"""Architectures whose processor adds tokens of its own where there is an image."""
ENDS = {"</s>", "<|im_end|>", "<end_of_utterance>", "<end_of_turn>", "<eos>"}

TORCHVISION = Path(sys.prefix) / "torchvision-cpu"
SHIM = Path(__file__).parent / "torchvision_shim"
INSTALLED = importlib.util.find_spec("torchvision") is not None
MISSING = (
    "no torchvision: `make test` installs it for tests into .venv/torchvision-cpu, when it can download it"
)


def needs_torchvision(trial: str) -> bool:
    return trial.partition(":")[0] in NEED_TORCHVISION


def both_ways(module: str, folder: Path, asked: Mapping[str, bool]) -> None:
    """Run a program of the tests over a folder, in two processes at once: with torchvision, and without.

    Args:
        asked: its arguments, and whether each needs torchvision; without one those are left out.
    """
    started = []
    for needed in (True, False):
        if needed and not (INSTALLED or TORCHVISION.is_dir()):
            continue
        path = [str(SHIM), str(TORCHVISION)] if needed and not INSTALLED else []
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", module, str(folder), *[one for one in asked if asked[one] == needed]],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
                cwd=Path(__file__).parents[1],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    for process in started:
        said, _ = process.communicate(timeout=500)
        assert process.returncode == 0, said.decode()[-3000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for every trial."""
    folder = tmp_path_factory.mktemp("trials")
    both_ways("tests.trials", folder, {trial: needs_torchvision(trial) for trial in TRIALS})
    return folder


def facts(folder: Path, trial: str) -> dict[str, Any]:
    if needs_torchvision(trial) and not (INSTALLED or TORCHVISION.is_dir()):
        pytest.skip(MISSING)
    file = folder / trial / "facts.json"
    assert file.exists(), (folder / trial / "trial.log").read_text()[-3000:]
    return dict(json.loads(file.read_text()))


def linear(config: PreTrainedConfig, frozen: list[str]) -> set[str]:
    """Paths of the linear layers that shall be quantized and adapted: all but the frozen, and the head."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    where = parts(config.model_type)
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path != where.lm_head and where.part_of(path) not in frozen
    }


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_parts_of_a_row_are_disjoint_and_together_the_model(model_type: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[model_type]())
    where = parts(model_type)
    paths = [*where.vision_tower, *where.projector, *where.language_model]
    assert not [(one, other) for one in paths for other in paths if other.startswith(f"{one}.")]
    known = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
    assert set(paths) <= known
    counted = Counter(where.part_of(name) for name, _ in model.named_parameters())
    assert set(counted) == set(PARTS)
    assert model.get_submodule(where.lm_head) is model.get_output_embeddings()
    assert where.part_of(where.lm_head) == "language_model"


def test_every_row_has_a_tiny_model() -> None:
    assert set(MAKERS) - {"pixtral"} == set(ARCHITECTURES)


def test_an_unknown_architecture_says_how_to_add_it() -> None:
    with pytest.raises(DataError, match=r"add a row .* to runner/train/models/architectures\.py"):
        parts("bert")


@pytest.mark.parametrize("trial", TRIALS)
def test_what_is_not_frozen_is_quantized_and_adapted_and_nothing_else(trained: Path, trial: str) -> None:
    found = facts(trained, trial)
    frozen = trial.rpartition(":")[2].split("+")
    wanted = linear(AutoConfig.from_pretrained(trained / trial / "model"), frozen)
    assert {module["path"] for module in found["modules"] if module["adapted"]} == wanted
    quantized = {module["path"] for module in found["modules"] if module["quantized"]}
    assert quantized == {f"{path}.base_layer" for path in wanted}
    for part in frozen:
        assert not part or not any(found["parts"][part].values())
    assert found["parts"]["language_model"]["linear4bit"] > 0


@pytest.mark.parametrize("trial", TRIALS)
def test_what_trains_moves_in_float32_and_what_is_frozen_stays(trained: Path, trial: str) -> None:
    found = facts(trained, trial)
    trained_ones = [one for one in found["parameters"] if one["trainable"]]
    assert trained_ones
    assert not [one["path"] for one in trained_ones if not one["moved"] or one["dtype"] != "torch.float32"]
    assert not [one["path"] for one in found["parameters"] if one["moved"] and not one["trainable"]]


@pytest.mark.parametrize("trial", TRIALS)
def test_backward_reaches_a_frozen_part_only_to_train_what_lies_before_it(trained: Path, trial: str) -> None:
    found = facts(trained, trial)
    if trial.endswith(":projector"):
        assert found["backward"]  # the tower behind it trains
    else:
        assert found["backward"] == []


@pytest.mark.parametrize("trial", TRIALS)
def test_loss_is_on_answers_and_their_ends_only(trained: Path, trial: str) -> None:
    learned = [re.fullmatch(r"\s*(.*?)\s*(<[^ ]*>)\s*", text) for text in facts(trained, trial)["learned"]]
    assert all(learned)
    said = Counter(match[1] for match in learned if match)
    # A pair is seen twice: by the model that trains and by its reference.
    wanted = ANSWERS if ":sft:" in trial else 2 * [*ANSWERS, *REJECTED]
    assert said == Counter(wanted)
    assert {match[2] for match in learned if match} <= ENDS


@pytest.mark.parametrize("trial", [trial for trial in TRIALS if ":sft:" in trial])
def test_the_trained_model_generates(trained: Path, trial: str) -> None:
    assert facts(trained, trial)["metrics"]["after"]["relaxed_accuracy"]["n"] == 2


@pytest.mark.parametrize("trial", TRIALS)
def test_a_plan_knows_what_training_then_finds(trained: Path, trial: str) -> None:
    """The model on the meta device has the parameters, trainable and packed, and the bytes of the one that
    trains; the rows have the tokens of the batches."""
    found = facts(trained, trial)
    planned = found["planned"]
    assert [check for check in planned["findings"] if check["status"] != "ok"] == []
    parts, data = planned["model"]["parts"], planned["data"]
    trains = sum(part["trainable"] + part["adapter"] for part in parts.values())
    assert trains == found["trainable_parameters"]
    assert planned["weight_bytes"] == found["weight_bytes"]
    assert {name for name, part in parts.items() if part["quantized"]} == {
        name for name, part in found["parts"].items() if part["linear4bit"]
    }
    tokens = sorted(row["tokens"] for row in found["collated"])
    assert (data["rows"], data["tokens"]["largest"]) == (found["plan"]["rows"], found["plan"]["tokens_max"])
    assert (data["tokens"]["p50"], data["tokens"]["largest"]) == (tokens[1], tokens[-1])
    # What the plan counts beside the positions that hold an image: separators around images and tiles.
    shown = sorted(row["image_tokens"] for row in found["collated"])
    beside = data["image_tokens"]["largest"] - shown[-1]
    name = trial.partition(":")[0]
    assert beside >= 0 if name in SEPARATORS else beside == 0


def test_a_lone_parameter_of_the_projector_is_frozen_with_it(tmp_path: Path) -> None:
    folder = str(save("llava_next", tmp_path))
    plain = {"name_or_path": "x", "dtype": "float32"}
    trains = models.load_base(
        job(quantization=None, lora=None, model={**plain, "freeze": ["vision_tower"]}), folder
    )
    assert trains.model.image_newline.requires_grad
    stays = models.load_base(job(quantization=None, lora=None, model=plain), folder)
    assert not stays.model.image_newline.requires_grad
    assert models.describe(stays)["parts"]["projector"]["trainable"] == 0


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    (save("llava", tmp_path) / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="no chat template"):
        models.load_processor(job(), str(tmp_path))


@pytest.mark.skipif(INSTALLED, reason="torchvision is installed")
@pytest.mark.parametrize("name", sorted(set(MAKERS) - NEED_TORCHVISION))
def test_processors_that_can_do_without_torchvision(name: str, tmp_path: Path) -> None:
    processor = models.load_processor(job(), str(save(name, tmp_path)))
    assert models.image_backend(processor) == "pil"


@pytest.mark.skipif(INSTALLED, reason="torchvision is installed")
@pytest.mark.parametrize("name", sorted(NEED_TORCHVISION))
def test_processors_that_cannot_do_without_torchvision_name_it(trained: Path, name: str) -> None:
    trial = f"{name}:sft:{FROZEN}"
    facts(trained, trial)
    with pytest.raises(DataError, match=r"(?s)orchvision.*Remedy: .*vlm-runner\[gpu\]"):
        models.load_processor(job(), str(trained / trial / "model"))


# --- PaliGemma ---


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, PaliGemmaProcessor, Rows]:
    folder = tmp_path_factory.mktemp("paligemma")
    model = str(save("paligemma", folder / "model"))
    processor = models.load_processor(job(), model)
    assert isinstance(processor, PaliGemmaProcessor)
    return (
        model,
        processor,
        samples.rows(processor, (samples.source("pairs", columns={}), rows(folder / "pairs"))),
    )


def test_paligemma_is_taught_as_its_own_processor_would(
    paligemma: tuple[str, PaliGemmaProcessor, Rows],
) -> None:
    _, processor, made = paligemma
    published = Published(processor.image_processor, processor.tokenizer)
    for row in made.dataset:
        batch = Collator(processor, made.form, torch.float32)([row])
        image = images(row)[0]
        text, suffix = f"<image>{row['question']}", row["answers"][0]
        theirs = published(images=[image], text=[text], suffix=[suffix])
        for name in ("input_ids", "attention_mask", "token_type_ids", "labels", "pixel_values"):
            assert torch.equal(batch[name], torch.tensor(np.array(theirs[name]))), name


def test_paligemma_reads_its_prompt_in_both_directions_and_its_answer_in_one(
    paligemma: tuple[str, PaliGemmaProcessor, Rows],
) -> None:
    folder, processor, made = paligemma
    model = models.load_base(
        job(
            quantization=None, model={"name_or_path": "x", "dtype": "float32", "attn_implementation": "eager"}
        ),
        folder,
    ).eval()
    batch = Collator(processor, made.form, torch.float32)([made.dataset[3]])
    del batch["row_index"], batch["image_count"], batch["labels"]
    first = int((batch["token_type_ids"][0] == 1).int().argmax())

    def logits(changed: int) -> torch.Tensor:
        ids = batch["input_ids"].clone()
        ids[0, changed] = processor.tokenizer.bos_token_id
        with torch.no_grad():
            return model(**{**batch, "input_ids": ids}).logits[0]

    whole = logits(int((batch["input_ids"][0] == processor.tokenizer.bos_token_id).int().argmax()))
    assert torch.equal(logits(-1)[:-1], whole[:-1])
    assert not torch.equal(logits(first - 2)[: first - 2], whole[: first - 2])


def test_paligemma_learns_one_answer_a_row(
    paligemma: tuple[str, PaliGemmaProcessor, Rows], tmp_path: Path
) -> None:
    processor = paligemma[1]
    turns = [{"user": "How many?", "assistant": "2"}, {"user": "And now?", "assistant": "3"}]
    (tmp_path / "0.png").write_bytes(samples.png())

    def load(*rows: dict[str, Any]) -> Rows:
        file = samples.jsonl(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", list(rows))
        return samples.rows(processor, (samples.source(file.name, format="cauldron"), file))

    with pytest.raises(DataError, match=r"learns one answer a row.*Remedy: make a row of every turn"):
        load({"images": ["0.png"], "texts": turns})
    with pytest.raises(DataError, match=r"row 1: the processor refuses the row: .*without an image"):
        load({"images": ["0.png"], "texts": turns[:1]}, {"images": [], "texts": turns[:1]})


def test_paligemma_takes_no_prompt_without_an_image(
    paligemma: tuple[str, PaliGemmaProcessor, Rows],
) -> None:
    processor = paligemma[1]
    with pytest.raises(ValueError, match="without an image"):
        processor(text=["How many?"])
    with pytest.raises(ValueError, match="without an image"):
        processor(text=["<image>How many?", "And?"], images=[[samples.picture()], []])
