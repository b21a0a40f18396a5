"""What dpo's reference thinks of a pair is computed once: in a run, over its attempts, and on a machine."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.errors import DataError
from runner.manifest import Job
from runner.plan import Fetched
from runner.supervisor.fetch import fingerprint, key
from runner.supervisor.identity import Identity
from runner.supervisor.references import references_file
from runner.train import state
from runner.train.references import References
from tests.attempts import merged, pairs, run, run_ranks, steps
from tests.test_dpo import DPO, dpo_job

TWICE = merged(
    DPO,
    {
        "training": {"per_device_train_batch_size": 4, "num_train_epochs": 2},
        "checkpoints": {"save_steps": 1},
    },
)
"""Sixteen pairs, two epochs of two steps."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Any]:
    """A run that leaves what it learned to others."""
    folder = tmp_path_factory.mktemp("first")
    outcome, events = run(folder / "run", TWICE, data=data, references=folder / "cache" / "it.safetensors")
    return {"folder": folder, "outcome": outcome, "losses": losses(events)}


def losses(events: list[dict[str, Any]]) -> list[float]:
    return [step["loss"] for step in steps(events)]


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


# --- a run ---


def test_every_pair_is_asked_about_once_and_the_losses_are_those_of_asking_always(
    tmp_path: Path, data: Path, first: dict[str, Any]
) -> None:
    always, events = run(tmp_path / "run", merged(TWICE, {"speed": {"cache_reference": False}}), data=data)
    assert always["facts"]["references"] is None
    assert first["outcome"]["facts"]["references"] == {"known": 16, "computed": 16}
    assert first["losses"] == pytest.approx(losses(events), abs=1e-6)
    assert first["losses"][0] == pytest.approx(0.693147, abs=1e-6)


def test_of_one_step_a_micro_batch_may_be_known_and_another_not(tmp_path: Path, data: Path) -> None:
    """Ten pairs in steps of two and two: the last step ends with the first two of the epoch."""
    source = {"path": "pairs.parquet", "split": "train[:10]", "format": "preference"}
    cut = {"global_batch_size": 4, "per_device_train_batch_size": 2, "num_train_epochs": 1}
    outcome, events = run(
        tmp_path, merged(DPO, {"datasets": {"train": [source]}, "training": cut}), data=data
    )
    assert [len(step["ids"]) for step in steps(events)] == [4, 4, 4]
    assert outcome["facts"]["references"] == {"known": 10, "computed": 10}


def test_a_second_run_on_the_machine_asks_about_none(
    tmp_path: Path, data: Path, first: dict[str, Any]
) -> None:
    file = first["folder"] / "cache" / "it.safetensors"
    other = merged(TWICE, {"name": "second", "seed": 11, "training": {"max_steps": 1}})
    outcome, events = run(tmp_path / "run", other, data=data, references=file)
    assert outcome["facts"]["references"] == {"known": 16, "computed": 0}
    assert losses(events) == [pytest.approx(0.693147, abs=1e-5)]


def test_a_resume_knows_what_the_run_knew_and_ends_with_the_same_bytes(
    tmp_path: Path, data: Path, first: dict[str, Any]
) -> None:
    """On another machine, whose cache another run has filled with nonsense that must not be looked at."""
    (saved,) = (first["folder"] / "run" / "outbox").glob("00000001-*")
    folder, file = tmp_path / "run", tmp_path / "cache.safetensors"
    liar = References(load_digests(first))
    liar.learn(range(16), torch.full((16, 2), -1.0))
    liar.keep(file)
    outcome, _ = run(folder, TWICE, data=data, attempt=2, restore=saved, references=file)
    assert outcome["facts"]["references"] == {"known": 16, "computed": 8}
    assert weights(folder) == weights(first["folder"] / "run")


def load_digests(first: dict[str, Any]) -> list[str]:
    tensors = load_file(first["folder"] / "cache" / "it.safetensors")
    return [bytes(pair).hex() for pair in tensors["pairs"].tolist()]


def test_ranks_learn_from_each_other(tmp_path: Path, data: Path, first: dict[str, Any]) -> None:
    outcome, events = run_ranks(tmp_path / "run", TWICE, "ddp", 2, data=data)
    assert outcome["facts"]["references"] == {"known": 16, "computed": 16}
    assert losses(events) == pytest.approx(first["losses"], abs=1e-4)


def test_a_cache_that_is_broken_is_said_and_written_anew(
    tmp_path: Path, data: Path, first: dict[str, Any]
) -> None:
    file = tmp_path / "cache.safetensors"
    file.write_bytes(b"no tensors")
    job = merged(TWICE, {"training": {"max_steps": 1}})
    outcome, events = run(tmp_path / "run", job, data=data, references=file)
    assert outcome["facts"]["references"] == {"known": 8, "computed": 8}
    (said,) = [event["message"] for event in events if event["event"] == "warning"]
    assert "it is written anew" in said
    assert len(load_file(file)["pairs"]) == 8


def test_a_checkpoint_with_other_references_is_not_gone_on_from(
    tmp_path: Path, data: Path, first: dict[str, Any]
) -> None:
    (saved,) = (first["folder"] / "run" / "outbox").glob("00000001-*")
    forged = shutil.copytree(saved, tmp_path / saved.name)
    save_file(
        {"known": torch.ones(3, dtype=torch.bool), "values": torch.ones(3, 2)}, forged / state.REFERENCES
    )
    outcome, _ = run(tmp_path / "run", TWICE, data=data, attempt=2, restore=forged)
    assert outcome["exit_code"] == 65
    assert "references.safetensors is not what a run saves" in outcome["error"]
    assert "it has (3, 2) values for 16 pairs" in outcome["error"]


# --- the table ---


def test_what_several_runs_leave_is_kept_together(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "cache.safetensors"
    names = [hashlib.sha256(bytes([number])).hexdigest() for number in range(4)]
    one, other = References(names[:2]), References(names[1:])
    one.keep(file)
    assert not file.exists()  # nothing is known yet
    one.learn([0, 1], torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]))
    one.keep(file)
    other.learn([2], torch.tensor([[-7.0, -8.0]]))
    other.keep(file)
    found = References(names)
    found.look_up(file)
    assert found.known == 3 and found.knows([0, 1, 3]) and not found.knows([0, 2])
    assert found.of([3, 0]).tolist() == [[-7.0, -8.0], [-1.0, -2.0]]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_is_not_finite_stays_unknown() -> None:
    """Of a step that the float16 loss scaler skips; a checkpoint with it would not be gone on from."""
    table = References(["00" * 32, "01" * 32])
    table.learn([0, 1], torch.tensor([[-1.0, float("-inf")], [-3.0, -4.0]]))
    assert not table.knows([0]) and table.knows([1])
    again = References(["00" * 32, "01" * 32])
    again.restore(table.tensors())
    assert again.known == 1


@pytest.mark.parametrize(
    "tensors",
    [
        {"values": torch.ones(1, 2)},
        {"pairs": torch.zeros(1, 32, dtype=torch.uint8), "values": torch.ones(2, 2)},
        {"pairs": torch.zeros(1, 32, dtype=torch.uint8), "values": torch.full((1, 2), float("nan"))},
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = tmp_path / "cache.safetensors"
    save_file(tensors, file)
    with pytest.raises(DataError, match="it is written anew"):
        References(["00" * 32]).look_up(file)


# --- the file's name ---


def name(job: Job, commit: str = "abc", start: str = "s1") -> str | None:
    # As where the pairs lie in a repository of the model's name.
    sources = Fetched(model="/m", train=[], eval=[], revisions={job.model.name_or_path: "of the pairs"})
    pins = {key("model", job.model.name_or_path, "main"): commit}
    identity = Identity(job={}, pins=pins, fingerprints={"/start": start}, versions={})
    file = references_file(job, sources, identity, Path("/cache"))
    return None if file is None else file.name


DECIDES: list[dict[str, Any]] = [
    {"model": {"dtype": "bfloat16"}},
    {"model": {"attn_implementation": "eager"}},
    {"model": {"image_backend": "torchvision"}},
    {"model": {"processor": {"size": {"longest_edge": 64}}}},
    {"quantization": {"load_in_4bit": True}},
    {"lora": {"init_from": "/start"}},
    {"lora": {"init_lora_weights": "olora"}},
    {"training": {"ld_alpha": 0.5}},
    {"training": {"tf32": True}},
]


@pytest.mark.parametrize("changes", DECIDES)
def test_what_decides_a_reference_names_its_file(changes: dict[str, Any]) -> None:
    assert name(dpo_job(**changes)) != name(dpo_job())


def test_a_file_is_named_by_the_commit_and_by_where_the_adapter_starts() -> None:
    assert name(dpo_job(), commit="def") != name(dpo_job())
    started = dpo_job(lora={"init_from": "/start"})
    assert name(started, start="s2") != name(started)


def test_weights_on_this_machine_that_were_written_again_are_others(tmp_path: Path) -> None:
    """Also where the fingerprint of a run, which reads the ends of large files, does not see it."""
    file, names = tmp_path / "model.safetensors", []
    for middle in (b"old", b"new"):
        file.write_bytes(bytes(1 << 17) + middle + bytes(1 << 17))
        sources = Fetched(model=str(tmp_path), train=[], eval=[])
        seen = {"demo:smolvlm-tiny": fingerprint(tmp_path)}
        identity = Identity(job={}, pins={}, fingerprints=seen, versions={})
        names += [(seen, references_file(dpo_job(), sources, identity, Path("/cache")))]
        assert references_file(dpo_job(), sources, identity, Path("/cache")) == names[-1][1]
    assert names[0][0] == names[1][0] and names[0][1] != names[1][1]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"seed": 7},
        {"lora": {"r": 2, "lora_dropout": 0.1}},
        {"training": {"learning_rate": 1e-5, "beta": 0.3, "num_train_epochs": 1}},
        {"launch": {"gpus_per_node": 2}},
    ],
)
def test_what_only_the_policy_depends_on_does_not(changes: dict[str, Any]) -> None:
    assert name(dpo_job(**changes)) == name(dpo_job())


def test_no_file_where_no_reference_is_kept() -> None:
    assert name(dpo_job(speed={"cache_reference": False})) is None
    assert name(Job.model_validate(merged(dpo_job().model_dump(mode="json"), {"method": "sft"}))) is None
