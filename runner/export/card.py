"""The model card of an export: what the hub reads from its front matter, and what a person reads below.

Nothing is guessed: a license only if somebody said one, hub ids only where the job names some, metrics only
as they were measured. huggingface_hub's own classes write the front matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.export.code import Base, ask_lines, load_lines
from runner.export.likeness import Compared
from runner.export.order import Kind, Made
from runner.export.public import public_path
from runner.export.source import Trained
from runner.manifest import Job, Source
from runner.supervisor.progress import metric_lines

PIPELINE = "image-text-to-text"


@dataclass(frozen=True)
class Card:
    """What a card says."""

    kind: Kind
    trained: Trained
    made: Made
    dtype: str
    """Of the weights, of a merged model; of the job otherwise."""
    place: str
    """Hub id, or the name of the export's folder."""
    license: str | None


def markdown(card: Card) -> str:
    """The whole README.md."""
    from huggingface_hub import ModelCard

    return str(ModelCard(f"---\n{_front_matter(card)}\n---\n\n{_text(card)}")) + "\n"


def base_of(trained: Trained) -> Base:
    """The base model as anybody finds it: a hub id with its commit, else a folder of their own."""
    model = trained.job.model
    commit = trained.commit("model", model.name_or_path, model.revision)
    return Base(public_path(model.name_or_path), commit)


def _front_matter(card: Card) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    trained, job = card.trained, card.trained.job
    base = base_of(trained)
    asked = job.datasets.eval
    alone = asked[0] if len(asked) == 1 else None  # the hub's format has one split and one commit
    used = [one for one in job.datasets.train if trained.commit("dataset", one.path, one.revision)]
    adapter = card.kind == "adapter"
    data = ModelCardData(
        base_model=base.place if base.revision else None,
        base_model_relation=("adapter" if adapter else "finetune") if base.revision else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=PIPELINE,
        datasets=list(dict.fromkeys(one.path for one in used)) or None,
        license=card.license,
        tags=["vlm-runner", job.method, *(["lora"] if job.lora is not None else [])],
        model_name=job.name,
        eval_results=[
            EvalResult(
                task_type=PIPELINE,
                dataset_type=public_path(asked[0].path),
                dataset_name=", ".join(dict.fromkeys(public_path(one.path) for one in asked)),
                dataset_config=None if alone is None else alone.name,
                dataset_split=None if alone is None else alone.split,
                dataset_revision=None
                if alone is None
                else trained.commit("dataset", alone.path, alone.revision),
                metric_type=name,
                metric_name=f"{name.replace('_', ' ')} (n={value['n']})",
                metric_value=value["overall"],
            )
            for name, value in _after(card).items()
            if asked and isinstance(value, Mapping) and value.get("overall") is not None
        ]
        or None,
    )
    return str(data.to_yaml())


def _after(card: Card) -> Mapping[str, Any]:
    """Metrics of what is exported: the merged model's own, else those of the run's end."""
    ended = card.trained.result
    run = {} if ended is None else ended.metrics.get("after") or {}
    return card.made.metrics.get("merged") or run


def _text(card: Card) -> str:
    job = card.trained.job
    what = {"adapter": "LoRA adapter", "merged": "model with its LoRA adapter merged", "model": "model"}
    base = None if card.kind != "adapter" else base_of(card.trained)
    code = load_lines(card.kind, card.place, card.dtype, base, card.made.quantization)
    sections = [
        f"# {job.name}",
        f"A {what[card.kind]}, trained from {_name(job)} by {job.method} with vlm-runner.",
        *_training(card.trained),
        *_evaluation(card),
        "## Use",
        f"```python\n{chr(10).join(code)}\n```",
        *_remarks(card),
        f"Then ask it:\n\n```python\n{chr(10).join(ask_lines())}\n```",
    ]
    return "\n\n".join(sections)


def _training(trained: Trained) -> list[str]:
    job, ended = trained.job, trained.result
    options = job.training.options
    lora = {key: value for key, value in (job.lora or {}).items() if key != "init_from"}
    rows = [
        ("base model", _name(job)),
        ("commit of the base", base_of(trained).revision),
        ("data", ", ".join(map(_source, job.datasets.train))),
        ("method", job.method),
        ("quantization of the base", _settings(job.quantization)),
        ("LoRA", None if job.lora is None else _settings(lora)),
        ("began with", "another adapter (lora.init_from)" if (job.lora or {}).get("init_from") else None),
        ("frozen", ", ".join(job.model.freeze) or "nothing"),
        ("dtype", job.model.dtype),
        ("optimizer steps", trained.step),
        ("global batch", job.training.global_batch_size),
        ("learning rate", options.get("learning_rate")),
        ("seed", job.seed),
        ("images resized by", job.model.image_backend),
    ]
    table = [f"| {name} | {_cell(value)} |" for name, value in rows if value is not None]
    parts = ["## Training", "\n".join(["| | |", "|---|---|", *table])]
    if ended is None:
        parts.append(f"This is a checkpoint of the run, at step {trained.step}, not what it ended with.")
    else:
        versions = ", ".join(f"{name} {version}" for name, version in ended.versions.items())
        parts.append(f"Versions: {versions}.")
    parts.append("The whole job is in [job.yaml](job.yaml).")
    return parts


def _evaluation(card: Card) -> list[str]:
    ended, job = card.trained.result, card.trained.job
    parts: list[str] = []
    if ended is not None and any(ended.metrics.get(when) for when in ("before", "after")):
        lines = [
            f"* {when} training: {line}"
            for when in ("before", "after")
            for line in metric_lines(ended.metrics.get(when) or {})
        ]
        over = " over the quantized base" if job.quantization is not None else ""
        parts += [f"On {', '.join(map(_source, job.datasets.eval))}{over}, greedy:", "\n".join(lines)]
    if card.made.compared is not None:
        parts += [comparison(card.made.compared, card.dtype)]
        sides = [("what the run measured on them", "run"), ("the merged model", "merged")]
        lines = [
            f"* {title}: {line}"
            for title, side in sides
            for line in metric_lines(card.made.metrics.get(side) or {})
        ]
        if card.made.like_run is not None:
            n = card.made.compared.questions
            lines.append(f"* of the merged model's answers {card.made.like_run} of {n} are the run's own")
        parts.append("\n".join(lines))
    elif card.kind == "merged":
        parts.append("This merged model was not compared with base + adapter.")
    return ["## Evaluation", *parts] if parts else []


def comparison(found: Compared, dtype: str) -> str:
    """What a comparison found, in a sentence or two."""
    ties = (
        f", {found.ties} part where two tokens are equally likely within the tolerance" if found.ties else ""
    )
    return (
        f"Merged against unquantized base + adapter, both in {dtype}, on {found.questions} questions: "
        f"{found.equal} answers are equal token by token{ties}. Logits differ by at most {found.apart:.1e} "
        f"of the largest; the tolerance of {dtype} is {found.tolerance:.0e}."
    )


def _remarks(card: Card) -> list[str]:
    job = card.trained.job
    remarks = []
    if card.kind == "adapter" and card.made.quantization is not None:
        remarks.append(
            "The base is quantized as it was in training, which the numbers above hold for; without "
            "`quantization_config` it needs more memory, and answers may differ."
        )
    base = job.model.name_or_path
    if card.kind == "adapter" and base.startswith("demo:"):
        remarks.append(f"`{base}` comes with vlm-runner, which has to be installed for it.")
    elif card.kind == "adapter" and base_of(card.trained).revision is None:
        remarks.append("The base is no model of the hub: put the folder of your copy there.")
    return remarks


def _name(job: Job) -> str:
    return f"`{public_path(job.model.name_or_path)}`"


def _source(source: Source) -> str:
    return f"`{public_path(source.path)}` [{source.split}]"


def _settings(options: Mapping[str, Any] | None) -> str | None:
    """`r 16, lora_alpha 32`; None of none."""
    if options is None:
        return None
    return ", ".join(f"{key} {_value(value)}" for key, value in options.items()) or "PEFT's defaults"


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _value(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)
