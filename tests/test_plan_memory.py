"""Memory in a plan: what is counted, where it fits, and which levers would make it fit."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import yaml

from runner.errors import UsageError
from runner.memory import GPUS, Subject
from runner.plan import geometry
from runner.planning import memory, words
from tests.attempts import merged
from tests.test_memory_model import data, job_of, model

FULL = {"lora": None, "model": {"dtype": "bfloat16"}, "training": {"per_device_train_batch_size": 16}}


def section(changes: dict[str, Any], gpu: str | None, world: int = 1) -> dict[str, Any]:
    job, at = job_of(**changes), memory.where(gpu)
    return memory.section(Subject(model(job), data(), job, geometry(job, world), "ddp", at.device), at)


def test_what_cannot_fit_names_levers_that_are_computed_largest_first() -> None:
    """Each lever, pulled, gives the plan that it promised."""
    found = section(FULL, "T4")
    assert found["verdict"] == "does not fit"
    savings = [lever["saves"] for lever in found["levers"]]
    assert savings == sorted(savings, reverse=True)
    assert len(savings) > 1
    for lever in found["levers"]:
        assert lever["high"] == found["high"] - lever["saves"]
    smaller = next(lever for lever in found["levers"] if lever["name"].startswith("micro-batches"))
    (rows,) = smaller["keys"].values()
    again = section(merged(FULL, {"training": {"per_device_train_batch_size": rows}}), "T4")
    assert again["high"] == smaller["high"]
    assert again["verdict"] == smaller["verdict"]


def test_a_lever_is_printed_as_a_shell_takes_it() -> None:
    """Its keys, typed after the job, make what was estimated; what depends on the processor is named."""
    sized = merged(FULL, {"model": {"processor": {"size": {"longest_edge": 1536}}}})
    for changes, images in (
        (sized, """'model.processor={"size": {"longest_edge": 768}}'"""),
        (FULL, "model.processor"),
    ):
        found = section(merged(changes, {"training": {"gradient_checkpointing": False}}), "T4")
        printed = [line for line in words._memory(found) if " less, " in line]
        typed = {line.partition(":")[0]: line.rpartition(" (")[2].removesuffix(")") for line in printed}
        assert typed["images of half the side"] == images
        assert typed["gradient checkpointing"] == "training.gradient_checkpointing=true"
        for lever in found["levers"]:
            given = dict(one.partition("=")[::2] for one in shlex.split(typed[lever["name"]]))
            for key, value in lever["keys"].items():
                assert yaml.safe_load(given[key] or "null") == value


def test_what_fits_has_no_levers() -> None:
    found = section({}, "H100")
    assert (found["verdict"], found["levers"]) == ("fits", [])


def test_auto_is_counted_for_the_largest_size_that_surely_fits() -> None:
    auto = merged(FULL, {"training": {"per_device_train_batch_size": "auto"}})
    small, large = section(auto, "L40S"), section(auto, "H200")
    assert small["verdict"] == large["verdict"] == "fits"
    assert small["per_device"] < large["per_device"]
    twice = merged(auto, {"training": {"per_device_train_batch_size": 2 * small["per_device"]}})
    assert section(twice, "L40S")["verdict"] != "fits"


def test_without_a_type_it_says_which_it_fits() -> None:
    found = section(merged(FULL, {"training": {"per_device_train_batch_size": 4}}), None)
    assert found["capacity"] is None
    assert found["verdict"] is None
    usable = [GPUS[name].usable for name in found["fits"]]
    assert usable == sorted(usable)
    assert all(size >= found["high"] for size in usable)
    assert usable
    assert len(usable) < len(GPUS)


@pytest.mark.parametrize(
    ("gpu", "launch", "strategy"),
    [("H200", "auto", "ddp"), ("L40S", "auto", "zero2"), ("H200", "fsdp2", "fsdp2"), (None, "auto", "ddp")],
)
def test_the_strategy_and_its_reason(gpu: str | None, launch: str, strategy: str) -> None:
    few = merged(FULL, {"training": {"per_device_train_batch_size": 1}, "launch": {"strategy": launch}})
    found = section(few, gpu, world=8)
    assert found["strategy"] == strategy
    assert found["reason"]


def test_a_type_that_nobody_knows_is_refused_with_those_that_are() -> None:
    with pytest.raises(UsageError, match="A100-80GB"):
        memory.where("B9000")


def test_auto_takes_no_strategy_that_the_job_cannot_train_under() -> None:
    """float16 has no loss scaler under DeepSpeed, and an 8-bit optimizer's state cannot be split."""
    many = {"training": {"per_device_train_batch_size": 16, "gradient_checkpointing": False}}
    assert section(many, "T4", world=2)["strategy"] == "zero3"
    assert section(merged(many, {"model": {"dtype": "float16"}}), "T4", world=2)["strategy"] == "ddp"
    assert (
        section(merged(many, {"training": {"optim": "adamw_bnb_8bit"}}), "T4", world=2)["strategy"] == "ddp"
    )


def test_auto_sizes_do_not_make_a_strategy_more_than_is_needed() -> None:
    auto = {"training": {"global_batch_size": 256, "per_device_train_batch_size": "auto"}}
    assert section(auto, "L40S", world=2)["strategy"] == "ddp"
