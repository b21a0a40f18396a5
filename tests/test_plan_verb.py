"""`runner plan`: what it says is what training finds, and what would fail in the first minute fails here.

Most tests look at the job in this process: importing torch in a new one takes longer than what they test.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from runner import cli
from runner.checkpoint.folder import FolderStore
from runner.demo import resolve_dataset, resolve_model
from runner.errors import AccessDenied, JobError, StorageError
from runner.facts import Question
from runner.manifest import Job
from runner.plan import warmup_steps
from runner.planning import numbers, store, verb, words
from runner.planning.verb import Asked
from runner.settings import resolve
from runner.supervisor import fetch
from runner.train.inspect import inspect
from tests import attempts, samples
from tests.recorded import SCHEMAS, copy

ROOT = Path(__file__).parents[1]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
CONFIGS = Path(__file__).parent / "data" / "configs"
SFT, DPO = str(ROOT / "jobs" / "demo-sft.yaml"), str(ROOT / "jobs" / "demo-dpo.yaml")

ENDS = {kind.exit_code: kind for kind in (AccessDenied, JobError, StorageError)}

PUBLISHED = {
    "HuggingFaceTB/SmolVLM-Instruct": ("smolvlm-instruct", 2_246_272_880),
    "Qwen/Qwen2-VL-7B-Instruct": ("qwen2-vl-7b-instruct", 8_291_375_616),
    "HuggingFaceM4/idefics2-8b": ("idefics2-8b", 8_402_768_112),
    "demo:smolvlm-tiny": (None, 1_586_816),
}
"""Model -> its configuration in tests/data, and its parameters as published."""

PRINTED = {
    "qwen2vl-7b-chartqa-sft": 2_523_136,
    "smolvlm-chartqa-sft": 11_269_248,
    "smolvlm-rlaifv-dpo": 11_269_248,
    "idefics2-rlaifv-dpo": 55_348_736,
}
"""Job -> trainable parameters that its recipe printed."""


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to plan in, without new processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verb, "fetched", lambda request, *_: fetch.fetch(request, os.environ, lambda _: None))
    monkeypatch.setattr(verb, "ask", lambda question, *_: inspect(question))
    return tmp_path


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recorded")
    return {hub_id: copy(hub_id, folder) for hub_id in SCHEMAS}


def published(name: str, folder: Path) -> Path:
    """A model's published configuration, the demo's processor, and weights of which there is only a name."""
    folder.mkdir()
    for file in resolve_model("demo:smolvlm-tiny").iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    shutil.copy(CONFIGS / f"{name}.json", folder / "config.json")
    (folder / "model.safetensors").touch()
    return folder


def planned(*words: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the document of a job file and its overrides."""
    document = verb.make(resolve(words[0], list(words[1:]), {}), Asked(runs=Path("runs")))
    return document["exit_code"], document


def failed(document: Mapping[str, Any]) -> dict[str, str]:
    return {one["check"]: one["message"] for one in document["checks"] if one["status"] == "failed"}


# --- what it says ---


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.stem)
def test_every_job_is_planned_without_gpu_and_weights(
    file: Path, here: Path, copies: dict[str, Path]
) -> None:
    job = resolve(str(file), [], {}).job
    name, parameters = PUBLISHED[job.model.name_or_path]
    changes = ["model.image_backend=pil", "model.processor={}"]
    if name is not None:
        changes.append(f"model.name_or_path={published(name, here / 'model')}")
    for part in ("train", "eval"):
        for index, source in enumerate(getattr(job.datasets, part)):
            where = copies.get(source.path)
            changes.append(
                f"datasets.{part}[{index}].split={source.split}[:40]"
                if where is None
                else f"datasets.{part}[{index}].path={where}"
            )
    code, document = planned(str(file), *changes)
    assert (code, failed(document)) == (0, {})
    assert document["model"]["parameters"] == parameters
    if job.name in PRINTED:
        assert document["model"]["trainable_parameters"] == PRINTED[job.name]
    assert (document["model"]["quantized_parameters"] > 0) == (job.quantization is not None)
    training, rows = document["training"], document["data"]["rows"]
    per_epoch = -(-rows // job.training.global_batch_size)
    epochs = job.training.options.get("num_train_epochs", 3)
    assert training["steps"] == job.training.options.get("max_steps", per_epoch * epochs)
    said = "\n".join(words.lines(document))
    assert f"{parameters:,} parameters" in said and f"{training['steps']:,} steps" in said
    assert sorted(path.name for path in here.iterdir()) == ([] if name is None else ["model"])


@pytest.mark.parametrize(("file", "data"), [(SFT, "demo:charts"), (DPO, "demo:preferences")])
def test_a_plan_is_what_training_then_reports(file: str, data: str, tmp_path: Path) -> None:
    changes = ["datasets.train[0].split=train[:64]", "datasets.eval=[]", "evaluation=null"]
    job = resolve(file, [*changes, "training.max_steps=2", "name=same"], {}).job
    where = resolve_dataset(data, Path(os.environ["RUNNER_CACHE"]))
    outcome, events = attempts.run(tmp_path, job.model_dump(mode="json"), data=where)
    plan = json.loads((tmp_path / "attempts" / "1" / "plan.json").read_text())
    answer = inspect(Question(job=job, fetched=plan["fetched"], sample=None))
    assert answer.model is not None and answer.data is not None
    (told,) = [event for event in events if event["event"] == "plan"]
    steps = attempts.steps(events)
    section = numbers.training_section(job, answer.data, verb.geometry(job), "single")
    assert (section["steps"], answer.data.rows) == (told["steps"], told["rows"]) == (len(steps), 64)
    assert answer.data.tokens.largest == told["tokens_max"]
    assert told["model"] == answer.model.model_dump(mode="json")
    assert told["data"] == answer.data.model_dump(mode="json")
    assert numbers.trainable(answer.model) == outcome["facts"]["trainable_parameters"]
    assert answer.weight_bytes == outcome["facts"]["weight_bytes"]
    assert answer.data.images.mean * 64 == sum(step["images"] for step in steps)
    if job.method == "sft":  # of pairs, a step counts both answers
        assert answer.data.tokens.mean * 64 == pytest.approx(sum(step["tokens"] for step in steps), abs=0.1)
    (checkpoint,) = (tmp_path / "outbox").iterdir()
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert numbers.checkpoint_bytes(job, answer.model, answer.data, 2) == pytest.approx(size, rel=0.05)


def test_a_sample_is_the_same_again_and_says_that_it_is_one(here: Path) -> None:
    resolved = resolve(SFT, ["datasets.on_bad_row=skip"], {})
    first, again = (verb.make(resolved, Asked(runs=here, sample=20)) for _ in range(2))
    assert first == again
    assert (first["data"]["rows"], first["data"]["looked_at"]) == (8000, 20)
    assert not first["training"]["exact"]
    assert "a sample of 20 looked at" in "\n".join(words.lines(first))
    strict = verb.make(resolve(SFT, [], {}), Asked(runs=here, sample=20))
    assert strict["training"]["exact"]  # a bad row would end the run


@pytest.mark.parametrize("warmup", [0, 0.05, 0.3, 1, 20])
@pytest.mark.parametrize("steps", [1, 7, 150])
def test_warm_up_is_upstreams(warmup: float, steps: int, tmp_path: Path) -> None:
    theirs = TrainingArguments(output_dir=str(tmp_path), warmup_steps=warmup, use_cpu=True)
    assert warmup_steps(warmup, steps) == theirs.get_warmup_steps(steps)


def test_time_price_and_grace(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["datasets.train[0].split=train[:8]", "datasets.eval=[]", "evaluation=null"]
    resolved = resolve(SFT, small, {})
    monkeypatch.setenv("RUNNER_GRACE_SECONDS", "30")
    asked = Asked(runs=here, steps_per_second=0.5, price_per_hour=3.6)
    document = verb.make(resolved, asked)
    assert document["time"]["seconds"] == 1000 and document["time"]["price"] == 1.0
    assert document["grace"]["enough"] is True and document["grace"]["needed_seconds"] >= 3
    said = "\n".join(words.lines(document))
    assert "16:40, 1.00 at 3.6 an hour" in said and "preemptions" not in said
    on_spot = resolve(SFT, [*small, "resources.spot=true", "kubernetes.cloud=gke"], {}).job
    said = "\n".join(words.lines({**document, "job": on_spot.model_dump(mode="json")}))
    assert "10, 20, 40, ... 320 s" in said and "runner render jobset" in said
    assert verb.make(resolved, Asked(runs=here))["time"]["seconds"] is None
    (here / "demo-sft").mkdir()
    result = {"name": "demo-sft", "outcome": "done", "exit_code": 0, "steps": 500, "attempts": 1}
    result |= {"metrics": {}, "restarts": [], "error": None, "adapter": None, "checkpoint": None}
    result |= {"versions": {}, "facts": {}, "seconds": 250.0}
    (here / "demo-sft" / "result.json").write_text(json.dumps(result))
    former = verb.make(resolved, Asked(runs=here))["time"]
    assert (former["steps_per_second"], former["seconds"]) == (2.0, 250)
    assert "result.json" in former["source"]
    monkeypatch.setenv("RUNNER_GRACE_SECONDS", "soon")
    assert verb.make(resolved, Asked(runs=here))["exit_code"] == 78


# --- what fails ---


def test_all_that_is_wrong_is_said_at_once_and_the_first_is_the_exit_code(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "file").touch()
    wrong = [
        "datasets.train[0].columns.question=qery",
        "datasets.eval[0].split=tset",
        "lora.target_modules=[nowhere]",
        "checkpoints.uri=file/runs",
    ]
    assert cli.main(["plan", SFT, *wrong, "--json"]) == 78
    out, err = capsys.readouterr()
    document = json.loads(out)
    messages = failed(document)
    assert list(messages) == [
        "model",
        "columns of datasets.train[0]",
        "columns of datasets.eval[0]",
        "store",
    ]
    assert "did you mean 'query'" in messages["columns of datasets.train[0]"]
    assert "did you mean 'test'" in messages["columns of datasets.eval[0]"]
    codes = [one["exit_code"] for one in document["checks"] if one["status"] == "failed"]
    assert codes == [78, 65, 65, 74]
    assert err.strip().endswith("4 of 11 checks failed; nothing was started")
    assert cli.main(["plan", SFT, *wrong[:1], "datasets.eval=[]", "evaluation=null"]) == 65
    assert "FAILED" in capsys.readouterr().out.upper()


def test_an_image_that_does_not_decode_is_named(here: Path) -> None:
    data = samples.chartqa(here / "data", [samples.png(), samples.broken()])
    small = ["datasets.eval=[]", "evaluation=null", f"datasets.train[0].path={data}"]
    code, document = planned(SFT, *small)
    assert code == 65
    assert "row 1: " in failed(document)["rows of datasets.train"]
    code, document = planned(SFT, *small, "datasets.on_bad_row=skip")
    assert (code, document["data"]["rows"], document["data"]["skipped"]) == (0, 1, 1)
    assert "row 1 is skipped" in document["notes"][0]
    code, document = planned(SFT, *small, "datasets.on_bad_row=skip", "datasets.max_length=20")
    assert code == 65
    assert "more than 20 tokens" in failed(document)["rows of datasets.train"]


def test_processes_that_cannot_cut_the_batch_are_said_as_in_training(here: Path) -> None:
    few = "datasets.train[0].split=train[:8]"
    code, document = planned(SFT, few, "launch.gpus_per_node=3")
    assert (code, document["training"]["world"]) == (0, 2)
    assert document["notes"][0].startswith("3 processes cannot cut a global batch of 32 evenly; 2 are used")
    code, document = planned(SFT, few, "launch.nodes=3", "launch.gpus_per_node=2")
    assert (code, document["training"]) == (78, None)
    assert "3 nodes cannot cut a global batch of 32 evenly" in failed(document)["geometry"]


def test_a_source_that_is_not_there_ends_the_looking_and_not_the_store(here: Path) -> None:
    code, document = planned(SFT, "datasets.train[0].path=./nowhere")
    assert code == 65 and list(failed(document)) == ["sources"]
    assert {"check": "store", "status": "ok", "exit_code": 0, "message": ""} in document["checks"]
    assert document["model"] is None and document["training"] is None
    assert "model         unknown" in "\n".join(words.lines(document))


def job(**checkpoints: Any) -> Job:
    return Job.model_validate(
        {
            "name": "tried",
            "model": {"name_or_path": "x"},
            "datasets": {"train": [{"path": "x", "format": "vqa"}]},
            "checkpoints": checkpoints,
        }
    )


class Careless(FolderStore):
    """Lets everybody write everything."""

    def create(self, key: str, data: bytes) -> bool:
        self.delete(key)
        return super().create(key, data)


def test_a_store_without_conditions_or_rights_or_room_has_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.check_store(job(), tmp_path / "runs" / "tried")
    store.check_store(job(uri=str(tmp_path / "there")), tmp_path / "runs" / "tried")
    assert list(tmp_path.iterdir()) == []

    def refused(store: FolderStore, target: Path, write: Any) -> bool:
        raise OSError(errno.EACCES, "Permission denied", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "_link_new", refused)
        with pytest.raises(ENDS[77], match="Permission denied; remedy"):
            store.check_store(job(), tmp_path / "tried")
        with pytest.raises(ENDS[77]):
            store.check_store(job(allow_unfenced=True), tmp_path / "tried")
    with monkeypatch.context() as patch:
        patch.setattr(store, "open_store", lambda place, *_, **__: Careless(Path(place)))
        with pytest.raises(ENDS[78], match="a key be created twice"):
            store.check_store(job(), tmp_path / "tried")
        store.check_store(job(allow_unfenced=True), tmp_path / "tried")
    with pytest.raises(ENDS[74], match="bytes are free, and 3 checkpoints"):
        store.check_room(job(), tmp_path / "tried", 1 << 60)
    store.check_room(job(uri="s3://bucket/prefix"), tmp_path / "tried", 1 << 60)
    assert list(tmp_path.iterdir()) == []


# --- the command ---


def test_the_command_by_itself(tmp_path: Path) -> None:
    """In real processes, as a person types it: no torch in the one that answers, nothing left behind."""
    program = (
        "import sys\nfrom runner.cli import main\ncode = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(code or ', '.join(sorted(heavy)) or 0)"
    )
    small = ["datasets.train[0].split=train[:8]", "datasets.eval=[]", "evaluation=null"]
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", SFT, *small, "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_secret"},
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["data"]["rows"] == 8 and document["exit_code"] == 0
    assert "hf_secret" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
    table = (ROOT / "docs" / "plan.md").read_text("utf-8")
    assert [key for key in document if f"| `{key}` |" not in table] == []
