"""`runner export` as a person types it, on a real 4-bit run over a base from the hub's cache."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner import cli, launch
from runner.checkpoint.folder import FolderStore
from runner.checkpoint.pull import Wish, pull
from runner.demo import resolve_model
from runner.export import build
from runner.export.source import find
from runner.manifest import Job
from runner.settings import resolve
from tests import warm
from tests.attempts import charts
from tests.fake_hub import TOKEN, FakeHub, fake_hub
from tests.machines import Command
from tests.runs_in_store import Clock, Run
from tests.test_disk import mounted

ROOT = Path(__file__).parents[1]
BASE, COMMIT = "HuggingFaceTB/SmolVLM-Instruct", "c" * 40
SECRET = "hf_" + "s" * 24

JOB: dict[str, Any] = {
    "name": "mine",
    "model": {"name_or_path": BASE, "dtype": "float32"},
    "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "datasets": {
        part: [
            {
                "path": "demo:charts",
                "split": split,
                "format": "vqa",
                "columns": {"question": "query", "answer": "label"},
            }
        ]
        for part, split in (("train", "train[:16]"), ("eval", "test[:8]"))
    },
    "training": {"global_batch_size": 8, "max_steps": 4, "learning_rate": 1e-2},
    "evaluation": {"max_new_tokens": 4},
    "checkpoints": {"save_steps": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A person's folder: mine.yaml and runs/mine, and a cache with the base model in it."""
    folder = tmp_path_factory.mktemp("person")
    cached = folder / "home" / "hub" / f"models--{BASE.replace('/', '--')}"
    shutil.copytree(resolve_model("demo:smolvlm-tiny"), cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    (folder / "mine.yaml").write_text(yaml.safe_dump(JOB, sort_keys=False))
    charts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "home"))
        patch.setenv("PYTHONPATH", str(ROOT))
        resolved = resolve(str(folder / "mine.yaml"), [], {})
        assert launch.train(resolved, folder / "runs", trainer=warm.command("runner.train")) == 0
        yield folder


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with fake_hub() as hub:
        hub.models[BASE] = COMMIT
        yield hub


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, place: Path) -> Path:
    """The command in this process, in the person's folder, with an exporter that need not import anything."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(build, "EXPORTER", warm.command("runner.train.export"))
    return place


def without_machine(folder: Path, place: Path) -> None:
    """No file of an export holds a path of this machine, a secret, or where the run was."""
    for file in folder.iterdir():
        data = file.read_bytes()
        for word in (str(place), str(ROOT), os.environ["HOME"], SECRET, TOKEN, "runs/mine"):
            assert word.encode() not in data, f"{word} in {file.name}"


def python_of(card: str) -> str:
    """The first block of code."""
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    return found[1]


def test_an_adapter_by_the_public_command_and_to_the_hub(place: Path, hub: FakeHub) -> None:
    from huggingface_hub import ModelCard

    command = [sys.executable, "-m", "runner", "export", "mine.yaml", "--to", "my-adapter"]
    command += ["--push-to-hub", "me/my-adapter", "--license", "apache-2.0"]
    environ = {**os.environ, **hub.environ(), "WANDB_API_KEY": SECRET}
    done = subprocess.run(command, cwd=place, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "adapter of mine, step 4" in done.stdout and f"{hub.endpoint}/me/my-adapter" in done.stdout
    assert f'PeftModel.from_pretrained(base, "{place}/my-adapter")' in done.stdout
    folder = place / "my-adapter"
    assert {file.name for file in folder.iterdir()} >= {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "job.yaml", "export.json"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert not list(place.glob(".my-adapter*"))
    without_machine(folder, place)
    assert {name: len(data) for name, data in hub.files["me/my-adapter"].items() if name[0] != "."} == {
        file.name: file.stat().st_size for file in folder.iterdir()
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, COMMIT)
    assert (folder / "adapter_model.safetensors").read_bytes() == (
        place / "runs" / "mine" / "adapter" / "adapter_model.safetensors"
    ).read_bytes()

    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == BASE and data["base_model_relation"] == "adapter"
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "image-text-to-text")
    assert data["license"] == "apache-2.0" and "datasets" not in data
    ended = json.loads((place / "runs" / "mine" / "result.json").read_text())
    metrics = {one.metric_type: one.metric_value for one in card.data.eval_results}
    after = ended["metrics"]["after"]
    assert metrics == {name: after[name]["overall"] for name in ("relaxed_accuracy", "exact_match")}
    for words in ("load_in_4bit True", "| global batch | 8 |", "| optimizer steps | 4 |", "(n=8", COMMIT):
        assert words in card.text

    job = Job.model_validate(yaml.safe_load((folder / "job.yaml").read_text()))
    trained = Job.model_validate(JOB)
    for section in ("model", "quantization", "lora", "datasets", "training", "evaluation"):
        assert getattr(job, section) == getattr(trained, section)

    # The lines of docs/export.md are those of this card, and they load it.
    lines = python_of(card.text).replace("me/my-adapter", "my-adapter")
    written = python_of((ROOT / "docs" / "export.md").read_text())  # in lines that fit its page
    assert ast.unparse(ast.parse(written)) == ast.unparse(
        ast.parse(lines.replace(f' revision="{COMMIT}",', ""))
    )
    assert len(lines.splitlines()) == 6
    told = subprocess.run(
        [sys.executable, "-c", f"{lines}print(type(model).__name__, type(processor).__name__)"],
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert told.stdout.split() == ["PeftModelForCausalLM", "Idefics3Processor"], told.stderr


def test_a_merged_model_is_compared_and_loaded_by_transformers_alone(
    quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", "runs/mine", "--merged", "--to", "merged"]) == 0
    said = capsys.readouterr().out
    assert "on 8 questions: 8 answers are equal token by token" in said
    assert "over these 8 questions, quantized base + adapter, as the run measured it -> merged:" in said
    found = json.loads((quick / "merged" / "export.json").read_text())
    after = json.loads((quick / "runs" / "mine" / "result.json").read_text())["metrics"]["after"]
    assert found["metrics"]["run"] == after
    assert found["compared"]["questions"] == found["compared"]["equal"] == 8
    config = json.loads((quick / "merged" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert not (quick / "merged" / "adapter_config.json").exists()
    assert "\nlicense:" not in (quick / "merged" / "README.md").read_text()
    without_machine(quick / "merged", quick)


def test_a_fresh_process_that_answers_otherwise_stops_it(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What is written is damaged between the two: by a card that names another folder."""
    other = tmp_path / "other"
    monkeypatch.setattr("runner.export.check.load_lines", lambda *_: [f"raise OSError({str(other)!r})"])
    assert cli.main(["export", "mine.yaml", "--to", "broken"]) == 1
    said = capsys.readouterr().err
    assert "plain transformers cannot load it" in said and f"OSError: {other}" in said
    log = re.search(r"log: (\S+)", said)
    assert log is not None and "Traceback" in Path(log[1]).read_text()
    Path(log[1]).unlink()
    assert not list(quick.glob("*broken*"))


def test_whoever_interrupts_it_leaves_nothing(quick: Path) -> None:
    words = ["export", "runs/mine", "--merged", "--to", "stopped"]
    process = Command(lambda: cli.main(words), quick)
    deadline = time.monotonic() + 60
    while "loading" not in process.output():  # its process is at work
        assert time.monotonic() < deadline, process.output()
        time.sleep(0.01)
    process.send(signal.SIGINT)
    code, said = process.finish()
    assert code == 75, said
    assert not list(quick.glob("*stopped*"))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["mine.yaml", "--to", "runs"], 64, "is there already"),
        (["mine.yaml", "--to", "new", "--dtype", "float16"], 64, "--dtype means nothing without --merged"),
        (["mine.yaml", "--to", "new", "--compare", "3"], 64, "--compare means nothing without --merged"),
        (["runs/mine", "seed=1", "--to", "new"], 64, "seed=1 changes a job"),
        (["mine.yaml", "name=other", "--to", "new"], 65, "runs/other is not there; remedy: train the job"),
        (["runs", "--to", "new"], 65, "no run is there, but below it are mine"),
        (["runs/mine", "--step", "3", "--to", "new"], 65, "does not retain a checkpoint of step 3"),
        (["nothing.yaml", "--to", "new"], 78, "nothing.yaml"),
    ],
)
def test_what_cannot_be_exported_says_why(
    quick: Path, words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", *words]) == code
    output = capsys.readouterr().err
    assert said in output and "Traceback" not in output
    assert not (quick / "new").exists() and not list(quick.glob(".new*"))


def test_a_base_that_is_gone_or_another_one_is_named(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HOME", str(quick / "nowhere"))
    assert cli.main(["export", "mine.yaml", "--to", "new"]) == 74
    assert "HF_HUB_OFFLINE is set and it is not complete" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(quick)
    config = next((quick / "home").rglob("config.json"))
    whole = config.read_text()
    try:
        config.write_text(json.dumps({**json.loads(whole), "quantization_config": {"bits": 4}}))
        assert cli.main(["export", "mine.yaml", "--merged", "--to", "new"]) == 65
        assert "is stored quantized, so there is no unquantized base" in capsys.readouterr().err
    finally:
        config.write_text(whole)
    assert not (quick / "new").exists()


def test_a_disk_without_room_is_named_before_anything_is_computed(
    quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk") as disk:
        disk.fill(leave=1 << 20)
        assert cli.main(["export", "runs/mine", "--merged", "--to", str(disk.path / "new")]) == 74
        said = capsys.readouterr()
        assert re.search(rf"needs [67]\.\d MB, and {disk.path} has \S+ MB free; .*remedy: free", said.err)
        assert "loading" not in said.out
        assert [file.name for file in disk.path.iterdir()] == ["ballast"]


class Named:
    """What the command line would have."""

    def __init__(self, runs: Path, *words: str, step: int | None = None) -> None:
        self.words, self.runs, self.step = list(words), runs, step
        self.kms_key_id = self.expected_bucket_owner = None
        self.allow_unfenced = False
        self.opened = self

    def callback(self, close: object) -> None:
        del close  # folders have nothing to close


def test_where_a_run_is_found(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "runs" / "mine"
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()

    def found(*words: str, step: int | None = None) -> Any:
        work = tmp_path / f"work-{time.monotonic_ns()}"
        work.mkdir()
        return find(Named(place / "runs", *words, step=step), work)  # type: ignore[arg-type]

    for words in ([str(place / "mine.yaml")], [str(run)]):
        here = found(*words)
        assert here.folder == run / "adapter" and here.result is not None and here.step == 4
    end = found(str(run / "checkpoints"))
    assert (end.folder / "adapter_model.safetensors").read_bytes() == weights
    assert end.result is not None and end.recorded is not None and end.recorded.is_file()
    assert end.commit("model", BASE, "main") == COMMIT
    early = found(str(run), step=2)
    assert early.step == 2 and early.result is None and early.recorded is None
    assert (early.folder / "adapter_model.safetensors").read_bytes() != weights
    assert capsys.readouterr().err == ""

    # A run of the same job that is not done.
    store = FolderStore(run / "checkpoints")
    pull(store, store, Wish(step=2, checkpoint=True), tmp_path / "state", lambda line: None)
    files = {
        file.name: file.read_bytes()
        for file in (tmp_path / "state").iterdir()
        if file.name in ("adapter_config.json", "parameters.safetensors")
    }
    other = FolderStore(tmp_path / "store")
    Run(other, tmp_path, Clock()).taken().commit(2, **files)
    identity = store.read("run.json")
    assert identity is not None and other.create("run.json", identity.data)
    unfinished = found(str(tmp_path / "store"))
    assert unfinished.step == 2 and unfinished.result is None
    assert (unfinished.folder / "adapter_model.safetensors").read_bytes() == (
        early.folder / "adapter_model.safetensors"
    ).read_bytes()
    assert "is not done: exporting its newest checkpoint, step 2" in capsys.readouterr().err
