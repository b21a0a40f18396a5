"""Writes upstream.json and job.json here, and two pages of docs/: `python -m runner.schema.generate`.

It imports torch, transformers, trl and peft, as a program of its own that nothing imports. Types, choices,
defaults and the first sentence of each field's help come from the pinned libraries. `RULES` adds what they
check only when the value is used, an hour later. `--to DIR` writes all of them into one folder, for the test
that compares them with what is committed.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import inspect
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

from runner.schema.job import job_schema, training_options
from runner.schema.job_page import job_page

HERE = Path(__file__).parent

POSITIVE = {"exclusiveMinimum": 0}
NOT_NEGATIVE = {"minimum": 0}
SHARE = {"minimum": 0, "exclusiveMaximum": 1}
COUNT = {"minimum": 1}

TRAINING: dict[str, dict[str, Any]] = {
    "include_num_input_tokens_seen": {"enum": [True, False, "all", "non_padding", "no"]},
    "learning_rate": POSITIVE,
    "num_train_epochs": POSITIVE,
    # Upstream takes 0 and everything below as "not set".
    "max_steps": {"anyOf": [{"const": -1}, {"type": "integer", "minimum": 1}]},
    "per_device_eval_batch_size": COUNT,
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": POSITIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "pad_to_multiple_of": {"anyOf": [{"enum": ["auto", None]}, {"type": "integer", "minimum": 1}]},
    "label_smoothing_factor": SHARE,
    "logging_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "eval_delay": NOT_NEGATIVE,
    "eval_accumulation_steps": COUNT,
    "torch_empty_cache_steps": COUNT,
    "dataloader_num_workers": NOT_NEGATIVE,
    "dataloader_prefetch_factor": COUNT,
}
"""Of transformers.TrainingArguments, and so of every configuration of TRL."""

DPO_LOSSES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
"""Every loss that DPOTrainer knows (trl/trainer/dpo_trainer.py); tests/test_dpo.py takes a step with each."""

RULES: dict[str, dict[str, dict[str, Any]]] = {
    "SFTConfig": {
        **TRAINING,
        # SFTTrainer.__init__ refuses the third choice that the field's metadata still names.
        "loss_type": {"enum": ["nll", "dft"]},
    },
    "DPOConfig": {
        **TRAINING,
        "loss_type": {
            "anyOf": [
                {"enum": DPO_LOSSES},
                {"type": "array", "minItems": 1, "items": {"enum": DPO_LOSSES}},
            ]
        },
        "beta": POSITIVE,
        "f_divergence_type": {"enum": ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]},
        "ld_alpha": {"minimum": 0, "maximum": 1},
        "label_smoothing": {"minimum": 0, "exclusiveMaximum": 0.5},
        "discopop_tau": POSITIVE,
    },
    "LoraConfig": {
        "r": COUNT,
        "lora_alpha": COUNT,
        "lora_dropout": SHARE,
        "init_lora_weights": {
            "anyOf": [
                {"type": "boolean"},
                {
                    "enum": [
                        "gaussian",
                        "olora",
                        "orthogonal",
                        "pissa",
                        "mica",
                        "loftq",
                        "eva",
                        "corda",
                        "lora_ga",
                    ]
                },
                {"type": "string", "pattern": "^pissa_niter_[0-9]+$"},
            ]
        },
    },
    # BitsAndBytesConfig has no annotations: what the defaults do not tell is read from its checks.
    "BitsAndBytesConfig": {
        "llm_int8_threshold": NOT_NEGATIVE,
        "llm_int8_skip_modules": {"type": ["array", "null"], "items": {"type": "string"}},
        "bnb_4bit_quant_type": {"enum": ["fp4", "nf4"]},
        "bnb_4bit_compute_dtype": {"enum": ["bfloat16", "float16", "float32", None]},
        "bnb_4bit_quant_storage": {
            "enum": ["bfloat16", "float16", "float32", "float64", "int8", "uint8", None]
        },
    },
}

JSON_TYPES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    dict: "object",
    type(None): "null",
}


def upstream_schema() -> dict[str, Any]:
    """{class: {field: JSON Schema with description and default}}, and the versions they were read from."""
    import peft
    import transformers
    import trl

    schema = {
        "versions": {
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "peft": peft.__version__,
        },
        "SFTConfig": _dataclass_fields(trl.SFTConfig),
        "DPOConfig": _dataclass_fields(trl.DPOConfig),
        "LoraConfig": _dataclass_fields(peft.LoraConfig),
        "BitsAndBytesConfig": _signature_fields(transformers.BitsAndBytesConfig),
    }
    gone = [
        f"{config}.{name}" for config, rules in RULES.items() for name in rules if name not in schema[config]
    ]
    if gone:
        raise SystemExit(f"RULES names fields that upstream no longer has: {', '.join(gone)}")
    return schema


def _dataclass_fields(config: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    fields = {}
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        schema = _schema_of(hints[field.name])
        if choices := field.metadata.get("choices"):
            nullable = [None] if "null" in schema.get("type", ()) else []
            schema = {"enum": [*choices, *nullable]}
        default = None if field.default is dataclasses.MISSING else {"default": field.default}
        fields[field.name] = _finished(config, field.name, schema, field.metadata.get("help", ""), default)
    return fields


def _signature_fields(config: type[Any]) -> dict[str, Any]:
    fields = {}
    for name, parameter in inspect.signature(config).parameters.items():
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            continue
        schema = {} if parameter.default is None else _schema_of(type(parameter.default))
        found = re.search(rf"^ +{name} \(.*\):\n((?: {{12}}.*\n?)+)", config.__doc__ or "", re.MULTILINE)
        fields[name] = _finished(
            config, name, schema, found[1] if found else "", {"default": parameter.default}
        )
    return fields


def _finished(
    config: type[Any], name: str, schema: dict[str, Any], text: str, default: dict[str, Any] | None
) -> dict[str, Any]:
    rules = RULES.get(config.__name__, {}).get(name, {})
    if "enum" in rules or "anyOf" in rules:
        schema = {}
    finished = {"description": _first_sentence(text), **schema, **rules}
    if default is not None:
        value = default["default"]
        value = value.value if isinstance(value, enum.Enum) else value
        if value is None or isinstance(value, (bool, int, float, str)):
            finished["default"] = value
    return finished


def _schema_of(hint: Any) -> dict[str, Any]:
    """The JSON Schema of a type hint. What JSON cannot write, as a class of PEFT's, is left out."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    if origin in (list, tuple) or hint is list:
        items = _schema_of(arguments[0]) if origin is list else {}
        return {"type": "array", **({"items": items} if items else {})}
    if origin is dict:
        return {"type": "object"}
    return {"type": JSON_TYPES[hint]} if hint in JSON_TYPES else {}


def _union(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if any(isinstance(argument, type) and issubclass(argument, enum.Enum) for argument in arguments):
        # `SchedulerType | str` means the value of an enum member: upstream calls SchedulerType(value).
        arguments = tuple(argument for argument in arguments if argument is not str)
    branches = [branch for branch in map(_schema_of, arguments) if branch]
    if enums := [value for branch in branches for value in branch.get("enum", ())]:
        plain = [branch for branch in branches if "enum" not in branch and branch["type"] != "null"]
        if {"type": "null"} in branches:
            enums.append(None)
        return {"anyOf": [{"enum": enums}, *plain]} if plain else {"enum": enums}
    # `typing` caches unions by their members, so their order depends on what was imported before.
    names = sorted((branch["type"] for branch in branches), key=lambda name: (name == "null", name))
    lists = [branch["items"] for branch in branches if "items" in branch]
    return {"type": names[0] if len(names) == 1 else names, **({"items": lists[0]} if lists else {})}


def _first_sentence(text: str) -> str:
    flat = re.sub(r"\s+", " ", re.sub(r"<[^>]+>|\[`?([^\]`]+)`?\]\([^)]*\)", r"\1", text)).strip()
    sentence = re.split(r"(?<=[a-z`)\]'0-9])\. (?=[A-Z`])|(?<=\.): ", flat)[0].rstrip(".")
    return sentence if len(sentence) <= 240 else sentence[:237].rsplit(" ", 1)[0] + "..."


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write runner/schema/*.json, docs/training-options.md and docs/job.md."
    )
    parser.add_argument("--to", type=Path, help="write into this folder instead")
    to: Path | None = parser.parse_args().to
    upstream = upstream_schema()
    for path, text in (
        ((to or HERE) / "upstream.json", json.dumps(upstream, indent=1, ensure_ascii=False) + "\n"),
        ((to or HERE) / "job.json", json.dumps(job_schema(upstream), indent=1, ensure_ascii=False) + "\n"),
        ((to or HERE.parent.parent / "docs") / "training-options.md", training_options(upstream)),
        ((to or HERE.parent.parent / "docs") / "job.md", job_page()),
    ):
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
