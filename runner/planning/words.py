"""The document of a plan as lines for people: a word, then what it is."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from runner.supervisor.progress import duration, printable

_LEFT = 13
"""Columns of the first word."""


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """One document, `runner.planning.verb.make`'s."""
    yield printable(_title(document["job"]))
    yield ""
    for name, section in (
        ("model", _model(document)),
        ("data", _data(document)),
        ("speed", _speed(document["speed"])),
        ("training", _training(document["training"])),
        ("memory", _memory(document["memory"])),
        ("checkpoints", _checkpoints(document["checkpoints"])),
        ("grace", _grace(document["grace"])),
        ("preemptions", _preemptions(document["job"])),
        ("time", _time(document["time"])),
        ("downloads", _downloads(document["downloads"])),
        ("notes", iter(document["notes"])),
    ):
        for number, line in enumerate(section):
            yield printable(f"{name if number == 0 else '':<{_LEFT}} {line}")
    yield ""
    for check in document["checks"]:
        yield f"{check['status']:<{_LEFT}} {check['check']}"
        for line in check["message"].splitlines():
            yield " " * (_LEFT + 3) + printable(line)


def size(count: int | float | None) -> str:
    """Bytes for people: 512 B, 1.4 MB; `unknown` for none."""
    if count is None:
        return "unknown"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _title(job: Mapping[str, Any]) -> str:
    quantization, lora = job["quantization"] or {}, job["lora"]
    bits = "4-bit" if quantization.get("load_in_4bit") else "8-bit" if quantization else "not quantized"
    how = "full fine-tuning" if lora is None else f"LoRA r={lora.get('r', 8)}"
    model = job["model"]
    return f"{job['name']}: {job['method']} of {model['name_or_path']}, {bits}, {how}, {model['dtype']}"


def _model(document: Mapping[str, Any]) -> Iterator[str]:
    model = document["model"]
    if model is None:
        yield "unknown"
        return
    count, trains = model["parameters"], model["trainable_parameters"]
    yield (
        f"{model['model_class']}, {count:,} parameters, {trains:,} train ({trains / count:.2%} of them); "
        f"{size(model['weight_bytes'])} of weights in memory"
    )
    for name, part in model["parts"].items():
        told = [f"{part['parameters']:>15,} {name}"]
        told += [f"{part['quantized']:,} quantized"] if part["quantized"] else []
        told += [f"{part['trainable']:,} train"] if part["trainable"] else []
        told += [f"{part['adapter']:,} of adapter"] if part["adapter"] else []
        yield ", ".join([*told, *(["frozen"] if name in model["frozen"] else [])])


def _data(document: Mapping[str, Any]) -> Iterator[str]:
    data, held_out = document["data"], document["eval_rows"]
    if data is None:
        yield "unknown"
        return
    rows, seen = data["rows"], data["looked_at"]
    all_seen = seen >= rows + data["skipped"]
    looked = "all looked at" if all_seen else f"a sample of {seen:,} looked at"
    yield f"{rows:,} rows to train on, {looked}, {data['skipped']:,} skipped; {held_out or 0:,} to evaluate"
    for name, label in (("tokens", "tokens"), ("image_tokens", "of images"), ("images", "images")):
        found = data[name]
        yield (
            f"{label:<10} median {found['p50']:,}, 95 % up to {found['p95']:,}, largest "
            f"{found['largest']:,}, mean {found['mean']:,.1f}"
        )


def _speed(savings: Mapping[str, str | None] | None) -> Iterator[str]:
    """What is in force in a line, then a line for each that is not."""
    if savings is None:
        yield "unknown"
        return
    yield ", ".join(name for name, why in savings.items() if why is None) or "nothing is saved"
    for name, why in savings.items():
        if why is not None:
            yield f"not {name}: {why}"


def _training(training: Mapping[str, Any] | None) -> Iterator[str]:
    if training is None:
        yield "unknown"
        return
    about = "" if training["exact"] else "about "
    yield (
        f"{about}{training['steps']:,} steps, {training['warmup_steps']:,} of them warm-up; "
        f"{training['epochs']:g} epochs of {training['steps_per_epoch']:,}"
    )
    most = ", at most: a run finds out what fits" if training["auto"] else ""
    yield (
        f"{training['global_batch_size']} rows a step: {training['per_device']} per device{most}, x "
        f"{training['accumulation']} x {training['world']} process{'' if training['world'] == 1 else 'es'}, "
        f"{training['strategy'] or 'strategy unknown'}"
    )
    if (count := training["evaluations"]) != 0:
        often = "by the clock" if count is None else f"{count:,} time{'' if count == 1 else 's'}"
        best = training["exports"]
        chosen = "the last step" if best is None else f"the best by {best.replace('_', ' ')}"
        yield f"evaluated during training {often}; {chosen} is exported"


def _memory(section: Mapping[str, Any] | None) -> Iterator[str]:
    if section is None:
        yield "unknown"
        return
    rows = f"{section['per_device']} row{'' if section['per_device'] == 1 else 's'} at once"
    on = {None: "each GPU", "cpu": "each process on a CPU"}.get(section["gpu"], f"each {section['gpu']}")
    has = (
        ""
        if section["capacity"] is None
        else f", which has {size(section['capacity'])}: {section['verdict']}"
    )
    yield f"{size(section['low'])} to {size(section['high'])} on {on}, {rows}{has}"
    if section["strategy"] != "single":
        yield f"strategy {section['strategy']}: {section['reason']}"
    if section["capacity"] is None and section["gpu"] is None:
        yield f"surely fits {', '.join(section['fits']) or 'none of the types that are known'}"
    for name, term in section["terms"].items():
        yield f"{size(term['low']):>10} to {size(term['high']):>8} {name}"
    for line in section["unknown"]:
        yield f"not counted: {line}"
    for lever in section["levers"]:
        keys = " ".join(_typed(key, value) for key, value in lever["keys"].items())
        yield f"{lever['name']}: {size(lever['saves'])} less, {lever['verdict']} ({keys})"


def _typed(key: str, value: Any) -> str:
    """A key as a shell takes it; one whose value depends on the processor is only named."""
    if value is None:
        return key
    return shlex.quote(f"{key}={value if isinstance(value, str) else json.dumps(value)}")


def _checkpoints(section: Mapping[str, Any]) -> Iterator[str]:
    every = f"every {duration(section['save_seconds'])} at first"
    if section["save_steps"] is not None:
        every = f"every {section['save_steps']} steps"
    yield (
        f"{size(section['bytes'])} each, {section['keep_last']} kept, {every}; a lost machine costs at most "
        f"{duration(section['max_loss_seconds'])} and a step"
    )
    yield section["place"]


def _grace(section: Mapping[str, Any]) -> Iterator[str]:
    needed = section["needed_seconds"]
    rate = f"at {size(section['assumed_bytes_per_second'])}/s"
    takes = "a save and its commit" + ("" if needed is None else f" take about {needed:g} s {rate}")
    if section["seconds"] is None:
        yield f"unknown, RUNNER_GRACE_SECONDS is not set; {takes}"
    elif needed is None:
        yield f"{section['seconds']:g} s"
    else:
        verdict = "enough" if section["enough"] else "too short: what is committed by then is kept"
        yield f"{section['seconds']:g} s, {verdict}; {takes}"


def _preemptions(job: Mapping[str, Any]) -> Iterator[str]:
    if job["kubernetes"] is None or not job["resources"]["spot"]:
        return
    yield "a Kubernetes Job waits 10, 20, 40, ... 320 s before the pod after each, whatever was done by then;"
    yield "after about seven each costs minutes. For a long run: runner render jobset, which does not wait"


def _time(section: Mapping[str, Any]) -> Iterator[str]:
    if section["seconds"] is None:
        yield "unknown: give --steps-per-second, or train once"
        return
    price = (
        ""
        if section["price"] is None
        else f", {section['price']:,.2f} at {section['price_per_hour']:g} an hour"
    )
    yield (
        f"{duration(section['seconds'])}{price}; {section['steps_per_second']:.3g} steps a second "
        f"({section['source']})"
    )


def _downloads(downloads: list[Mapping[str, Any]]) -> Iterator[str]:
    if not downloads:
        yield "nothing more"
    for one in downloads:
        yield f"{one['what']}: {size(one['bytes'])}"
