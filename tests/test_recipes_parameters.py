"""The adapters of the published recipes have exactly the parameters that their notebooks printed.

Models are built from their published configurations on the meta device, which holds shapes and no numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

from runner.manifest import Job
from runner.train.models import model as models

CONFIGS = Path(__file__).parent / "data" / "configs"
SEVEN = ["down_proj", "o_proj", "k_proj", "q_proj", "gate_proj", "up_proj", "v_proj"]


def on_meta(name: str) -> PreTrainedModel:
    fields = json.loads((CONFIGS / f"{name}.json").read_text())
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(CONFIG_MAPPING[fields.pop("model_type")](**fields))


@pytest.mark.parametrize(
    ("name", "lora", "printed"),
    [
        ("qwen2-vl-7b-instruct", {"r": 8, "target_modules": ["q_proj", "v_proj"]}, 2_523_136),
        ("smolvlm-instruct", {"r": 8, "target_modules": SEVEN, "use_dora": True}, 11_269_248),
        ("smolvlm-instruct", {"r": 8, "target_modules": ["q_proj", "v_proj"]}, 2_568_192),
        ("idefics2-8b", {"r": 16, "target_modules": "all-linear"}, 55_348_736),
    ],
)
def test_trainable_parameters_are_those_that_the_notebook_printed(
    name: str, lora: dict[str, Any], printed: int
) -> None:
    job = Job.model_validate(
        {
            "name": "recipe",
            "model": {"name_or_path": name, "freeze": []},
            "lora": lora,
            "datasets": {"train": [{"path": "x", "format": "vqa"}]},
        }
    )
    assert models.describe(models.add_adapter(on_meta(name), job))["trainable_parameters"] == printed


def test_smolvlm_has_as_many_parameters_as_published() -> None:
    assert sum(parameter.numel() for parameter in on_meta("smolvlm-instruct").parameters()) == 2_246_272_880
