"""Words that stand for a run lead every verb to the same one, opened as its job says."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from runner import cli
from runner.checkpoint.head import HEAD
from runner.errors import DataError, UsageError
from runner.run_words import MARKS, at, kept_at, named
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


def run_folder(runs: Path, uri: str = BUCKET) -> Path:
    folder = runs / "here"  # not its name, after a move
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(JOB.format(uri=uri))
    begun = identity.Identity(job={}, pins={}, fingerprints={}, versions={})
    (folder / "run.json").write_bytes(identity.encode(begun))
    return folder


def test_a_job_names_its_run(tmp_path: Path) -> None:
    local = named("status", [GOOD, "name=b"], tmp_path)
    assert (local.folder, local.place) == (tmp_path / "b", str(tmp_path / "b" / "checkpoints"))
    remote = named("status", [GOOD, "name=b", f"checkpoints.uri={BUCKET}/"], tmp_path)
    assert (remote.folder, remote.place) == (tmp_path / "b", f"{BUCKET}/b")
    assert remote.job is not None and remote.job.name == "b"


def test_a_job_of_the_environment_names_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_FILE", GOOD)
    assert named("status", [], tmp_path).folder == tmp_path / "good"


def test_the_folder_of_a_run_says_where_its_checkpoints_are(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    found = named("status", [str(folder)], tmp_path)
    assert (found.folder, found.place, found.job) == (folder, f"{BUCKET}/mine", None)
    assert found.settings.expected_bucket_owner == "123456789012"
    assert kept_at(folder) == f"{BUCKET}/mine"


@pytest.mark.parametrize("mark", MARKS)
def test_a_run_that_lost_its_job_keeps_them_itself(tmp_path: Path, mark: str) -> None:
    (tmp_path / mark).touch()
    assert (at(str(tmp_path)).folder, at(str(tmp_path)).place) == (tmp_path, str(tmp_path))
    assert kept_at(tmp_path) is None


@pytest.mark.parametrize("word", [f"{BUCKET}/b", "file:///mnt/runs/b", "FOLDER"])
def test_any_other_place_is_a_store(tmp_path: Path, word: str) -> None:
    (tmp_path / "job.yaml").write_text("a person's, who keeps the job here")
    word = word.replace("FOLDER", str(tmp_path))
    assert (at(word).folder, at(word).place) == (None, word)


@pytest.mark.parametrize("word", [f"{BUCKET}/b", "FOLDER"])
def test_values_beside_a_run_are_refused(tmp_path: Path, word: str) -> None:
    with pytest.raises(UsageError, match=r"export: name=x changes a job, and .* is a run"):
        named("export", [word.replace("FOLDER", str(tmp_path)), "name=x"], tmp_path)


@pytest.mark.parametrize("word", ["runs/gone", "gone"])
def test_a_run_that_is_not_there_is_no_job_file(tmp_path: Path, word: str) -> None:
    with pytest.raises(DataError, match=f"status: {word} is not there; remedy: name a run as its folder"):
        named("status", [word], tmp_path)


@pytest.mark.parametrize("text", ["", "- 1", "name: x", "name: x\ncheckpoints: {uri: 7}", "a: [", "{}"])
def test_a_job_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    (tmp_path / "run.json").touch()
    with pytest.raises(DataError, match=r"job\.yaml: cannot be read as a job; remedy: give the run"):
        at(str(tmp_path))


def test_what_the_command_line_says_of_a_bucket_comes_first(tmp_path: Path) -> None:
    found = at(str(run_folder(tmp_path)))
    for said, meant in ((None, "123456789012"), ("999999999999", "999999999999")):
        arguments = argparse.Namespace(expected_bucket_owner=said, kms_key_id="key")
        found.reach(arguments)
        assert vars(arguments) == {
            "uri": f"{BUCKET}/mine",
            "kms_key_id": "key",
            "expected_bucket_owner": meant,
            "allow_unfenced": False,
        }


@pytest.mark.parametrize("verb", [["status"], ["checkpoints", "ls"], ["report"], ["export", "--to", "new"]])
def test_every_verb_follows_the_folder_of_a_run_to_its_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    """A store whose HEAD is damaged says its own name; the folder of the run has nothing of it."""
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "elsewhere" / "mine"
    store.mkdir(parents=True)
    (store / HEAD).write_text("damaged")
    folder = run_folder(tmp_path / "runs", str(tmp_path / "elsewhere"))
    assert cli.main([*verb, str(folder)]) == 65
    assert f"{store}/{HEAD}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["status"], ["report"], ["export", "--to", "new"]])
def test_every_verb_that_takes_a_job_is_told_where_runs_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "mine" / "good" / "checkpoints"
    store.mkdir(parents=True)
    (store / HEAD).write_text("damaged")
    (tmp_path / "mine" / "good" / "job.yaml").write_text(Path(GOOD).read_text())
    assert cli.main([*verb, GOOD, "--runs", "mine"]) == 65
    assert "mine/good" in capsys.readouterr().err
