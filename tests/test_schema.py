"""The generated files say what the libraries say, and every upstream field is ours or passes through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.job.ownership import OWNED
from runner.manifest import Training
from runner.schema.job import METHODS, SECTIONS, job_schema, passed_through, training_options
from runner.schema.job_page import job_page

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "runner" / "schema"
UPSTREAM = json.loads((SCHEMA / "upstream.json").read_text("utf-8"))


def test_generated_files_are_not_stale(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "runner.schema.generate", "--to", str(tmp_path)]
    subprocess.run(
        command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True, capture_output=True
    )
    for name, committed in (
        ("upstream.json", SCHEMA),
        ("job.json", SCHEMA),
        ("training-options.md", ROOT / "docs"),
        ("job.md", ROOT / "docs"),
    ):
        assert (tmp_path / name).read_text("utf-8") == (committed / name).read_text("utf-8"), (
            "run `make schema`"
        )


def test_the_job_schema_and_the_page_follow_without_torch() -> None:
    assert json.loads((SCHEMA / "job.json").read_text("utf-8")) == job_schema(UPSTREAM)
    assert (ROOT / "docs" / "training-options.md").read_text("utf-8") == training_options(UPSTREAM)
    assert (ROOT / "docs" / "job.md").read_text("utf-8") == job_page(), "run `make schema`"


@pytest.mark.parametrize("config", SECTIONS)
def test_every_upstream_field_is_ours_or_passes_through(config: str) -> None:
    section = SECTIONS[config]
    every = {name for one, place in SECTIONS.items() if place == section for name in UPSTREAM[one]}
    assert set(OWNED[section]) <= every, "a field that upstream no longer has"
    assert set(passed_through(config, UPSTREAM)) == set(UPSTREAM[config]) - set(OWNED[section])


FAMILIES = (
    "save_ push_to hub_ resume ignore_data seed deepspeed fsdp ddp_ accelerator parallelism fp16 bf16 "
    "output_dir do_train do_eval do_predict dataset_ max_length truncation best_model local_rank"
)


@pytest.mark.parametrize("family", FAMILIES.split())
def test_families_of_the_runner_have_no_member_that_passes(family: str) -> None:
    passed = [name for one in METHODS.values() for name in passed_through(one, UPSTREAM) if family in name]
    assert passed == []


def test_every_owned_field_says_why() -> None:
    assert all(len(owned.why) > 10 for table in OWNED.values() for owned in table.values())


def test_our_own_training_keys_stand_over_upstreams() -> None:
    for method in METHODS:
        schema = job_schema(UPSTREAM)["$defs"][f"{method.capitalize()}Training"]["properties"]
        for name in Training.model_fields:
            assert "Samples" in schema[name]["description"]


@pytest.mark.parametrize("config", ["SFTConfig", "DPOConfig", "LoraConfig", "BitsAndBytesConfig"])
def test_every_field_is_described_and_typed(config: str) -> None:
    untyped = [
        name
        for name, schema in UPSTREAM[config].items()
        if not schema["description"] or not {"type", "enum", "anyOf"} & set(schema)
    ]
    assert untyped == (["runtime_config"] if config == "LoraConfig" else [])
