"""Words that stand for a run lead every verb to the same one, opened as its job says."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from runner import cli, run_words
from runner.checkpoint.head import HEAD
from runner.errors import DataError, UsageError
from runner.run_words import at, named
from runner.settings import Resolved, resolve
from runner.supervisor import identity

GOOD = str(Path(__file__).parent / "data" / "good.yaml")
BUCKET = "s3://bucket/prefix"

JOB = """\
name: mine
checkpoints:
  uri: {uri}
  expected_bucket_owner: "123456789012"
  a_word_of_another_version: 7
"""


def folder_of_a_run(runs: Path, uri: str = BUCKET) -> Path:
    folder = runs / "here"  # not its name, after a move
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(JOB.format(uri=uri))
    begun = identity.Identity(job={}, pins={}, fingerprints={}, versions={})
    (folder / "run.json").write_bytes(identity.encode(begun))
    return folder


def store_of(folder: Path) -> Path:
    """A run's store of which every verb says the name, because its HEAD is damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HEAD).write_text("damaged")
    (folder / "run.json").write_text("{}")
    return folder


def test_a_job_names_its_run(tmp_path: Path) -> None:
    local = named("status", [GOOD, "name=b"], tmp_path)
    assert (local.folder, local.place) == (tmp_path / "b", str(tmp_path / "b" / "checkpoints"))
    remote = named("status", [GOOD, "name=b", f"checkpoints.uri={BUCKET}/"], tmp_path)
    assert (remote.folder, remote.place) == (tmp_path / "b", f"{BUCKET}/b")
    assert (local.in_bucket, remote.in_bucket) == (False, True)


def test_a_job_of_the_environment_names_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_FILE", GOOD)
    assert named("status", [], tmp_path).folder == tmp_path / "good"


def test_a_job_may_lie_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str | None, list[str]]] = []

    def resolved(word: str | None, overrides: list[str], environ: object) -> Resolved:
        asked.append((word, overrides))
        return resolve(GOOD, overrides, {})

    monkeypatch.setattr(run_words, "resolve", resolved)
    assert named("status", [f"{BUCKET}/job.yaml", "name=b"], tmp_path).folder == tmp_path / "b"
    assert asked == [(f"{BUCKET}/job.yaml", ["name=b"])]


def test_the_folder_of_a_run_says_where_its_checkpoints_are(tmp_path: Path) -> None:
    folder = folder_of_a_run(tmp_path)
    found = named("status", [str(folder)], tmp_path)
    assert (found.folder, found.place, found.job) == (folder, f"{BUCKET}/mine", None)
    store_of(folder / "checkpoints")  # from before it moved
    assert found.place == f"{BUCKET}/mine"


def test_a_store_is_a_store_whatever_else_lies_in_it(tmp_path: Path) -> None:
    folder = store_of(folder_of_a_run(tmp_path))
    assert at(str(folder)).place == str(folder)
    (folder / "job.yaml").write_text("no: job")
    assert at(str(folder)).place == str(folder)


@pytest.mark.parametrize("word", [f"{BUCKET}/b", "file:///mnt/runs/b", "FOLDER"])
def test_any_other_place_is_a_store(tmp_path: Path, word: str) -> None:
    (tmp_path / "job.yaml").write_text("name: x")
    word = word.replace("FOLDER", str(tmp_path))
    assert at(word).place == word


@pytest.mark.parametrize("word", [f"{BUCKET}/b", "FOLDER"])
def test_values_beside_a_run_are_refused(tmp_path: Path, word: str) -> None:
    with pytest.raises(UsageError, match=r"export: name=x changes a job, and .* is a run"):
        named("export", [word.replace("FOLDER", str(tmp_path)), "name=x"], tmp_path)


@pytest.mark.parametrize("word", ["runs/gone", "gone"])
def test_a_run_that_is_not_there_is_no_job_file(tmp_path: Path, word: str) -> None:
    with pytest.raises(DataError, match=f"status: {word} is not there; remedy: name a run as its folder"):
        named("status", [word], tmp_path)


@pytest.mark.parametrize(
    "text", ["", "- 1", "checkpoints: {uri: /mnt}", "name: x\ncheckpoints: {uri: 7}", "a: ["]
)
def test_a_job_that_is_none_is_named_where_it_is_needed(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    found = at(str(tmp_path))
    with pytest.raises(DataError, match=r"job\.yaml: cannot be read as a job; remedy: name the address"):
        _ = found.place
    store_of(tmp_path / "checkpoints")
    assert found.place == str(tmp_path)


def test_what_the_command_line_says_of_a_bucket_comes_first(tmp_path: Path) -> None:
    found = at(str(folder_of_a_run(tmp_path)))
    for said, meant in ((None, "123456789012"), ("999999999999", "999999999999")):
        arguments = argparse.Namespace(expected_bucket_owner=said, kms_key_id="key", allow_unfenced=False)
        found.reach(arguments)
        assert vars(arguments) == {
            "uri": f"{BUCKET}/mine",
            "kms_key_id": "key",
            "expected_bucket_owner": meant,
            "allow_unfenced": False,
        }


@pytest.mark.parametrize(
    "verb",
    [
        ["status"],
        ["report"],
        ["export", "--to", "new"],
        ["checkpoints", "ls"],
        ["checkpoints", "verify"],
        ["checkpoints", "pull", "--to", "new"],
    ],
)
def test_who_reads_follows_the_folder_of_a_run_to_its_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    store = store_of(tmp_path / "elsewhere" / "mine")
    folder = folder_of_a_run(tmp_path / "runs", str(tmp_path / "elsewhere"))
    assert cli.main([*verb, str(folder)]) == 65
    assert f"{store}/{HEAD}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["gc"], ["rm", "--yes"]])
def test_who_deletes_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: list[str]) -> None:
    """There may be copies of the folder, and nobody looks for a bucket behind one."""
    store = store_of(tmp_path / "elsewhere" / "mine")
    folder = folder_of_a_run(tmp_path / "runs", str(tmp_path / "elsewhere"))
    assert cli.main(["checkpoints", *verb, str(folder)]) == 64
    assert f"{folder} keeps its checkpoints in {store}\n    remedy: name that" in capsys.readouterr().err
    assert (store / HEAD).exists()


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        (["status"], "mine/good/checkpoints/HEAD"),
        (["export", "--to", "new"], "mine/good/checkpoints/HEAD"),
        (["report"], "report: mine/good is no run"),
    ],
)
def test_who_takes_a_job_is_told_where_runs_are(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    store_of(tmp_path / "mine" / "good" / "checkpoints")
    assert cli.main([*verb, GOOD, "--runs", "mine"]) == 65
    assert said in capsys.readouterr().err


def test_a_report_needs_no_job_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text("torn: [")
    (tmp_path / "events.jsonl").touch()
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "report.html" in capsys.readouterr().out
