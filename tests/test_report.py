"""Reports without a browser: whatever a run's folder holds, a run in a store, several, sizes, licences."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runner import cli, health
from runner.report import gallery, vendor
from runner.report.read import read
from runner.report.render import html
from runner.report.view import page
from tests.machines import Bench, World, at

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror=alert(1)>"


def picture(number: int, noise: bool) -> bytes:
    """A small WebP: of noise, which hardly shrinks, or of a few bars, as a chart is."""
    drawn = random.Random(number)
    if noise:
        image = Image.frombytes("RGB", (384, 384), drawn.randbytes(3 * 384 * 384))
    else:
        image = Image.new("RGB", (384, 384), "white")
        for bar in range(6):
            colour = tuple(drawn.randrange(256) for _ in range(3))
            image.paste(colour, (60 * bar, drawn.randrange(300), 60 * bar + 40, 384))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=60)
    return file.getvalue()


def evaluated(run: Path, rows: int, images: list[bytes]) -> None:
    """Predictions of a run whose trainer leaves none."""
    folder = run / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number, data in enumerate(images):
            archive.writestr(f"{number}.webp", data)
    for label, share in (("before", 3), ("after", 2)):
        records = [
            {
                "row": f"data row {number}",
                "question": f"What is value {number}?",
                "answers": [str(number)],
                "prediction": str(number if number % share == 0 else -1),
                "relaxed_accuracy": number % share == 0,
                "group": "human",
                "images": [f"{number % len(images)}.webp"] if images else [],
            }
            for number in range(rows)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{label}.predictions.jsonl").write_text(text)


@dataclass(frozen=True)
class Ended:
    """A run that is done, in a folder of the test's own."""

    path: Path
    run: Path


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("once"))
    code, output = bench.train()
    assert code == 0, output
    evaluated(bench.run, 6, [picture(0, noise=False)])
    (bench.run / "steps.jsonl").write_text('{"step": 1, "loss": 1.0, "rows": [0]}\n')
    return bench


@pytest.fixture
def ended(once: Bench, tmp_path: Path) -> Ended:
    shutil.copytree(once.runs, tmp_path / "runs")
    shutil.copy(once.path / "job.yaml", tmp_path)
    return Ended(tmp_path, tmp_path / "runs" / "bench")


def test_an_image_that_several_rows_show_is_in_the_page_once(ended: Ended) -> None:
    text = html(page(read(ended.run)))
    assert text.count("data:image/webp;base64,") == 1
    assert text.count('data-same="image-0"') == 5
    became = re.findall(r'<tr data-became="(\w+)">', text)
    assert became == ["right", "wrong", "fixed", "broken", "fixed", "wrong"]


def odd_archives(whole: bytes) -> list[bytes]:
    """An archive whose directory speaks of a later version, of a compression, and of a password."""
    if not whole.startswith(b"PK"):
        return []
    at = whole.rindex(b"PK\x01\x02")
    changes = ((6, b"\xff\x00"), (10, b"\x63\x00"), (8, b"\x01\x00"))
    return [whole[: at + byte] + value + whole[at + byte + len(value) :] for byte, value in changes]


FILES = ("job.yaml", "result.json", "events.jsonl", "steps.jsonl", "evaluation/before.predictions.jsonl")


@pytest.mark.parametrize("name", [*FILES, "evaluation/after.predictions.jsonl", "evaluation/images.zip"])
def test_a_file_that_is_half_written_costs_only_what_it_would_have_said(ended: Ended, name: str) -> None:
    file = ended.run / name
    whole = file.read_bytes()
    cuts = [0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 2]
    for content in (
        *(whole[:cut] for cut in cuts),
        b"[]",
        b"{}",
        b"\xff\x00\xfe",
        b'{"a": NaN}',
        b"[" * 9000,
        b"name:\n  a:\tb\n",
        *odd_archives(whole),
    ):
        file.write_bytes(content)
        assert "</html>" in html(page(read(ended.run)))
    file.unlink()
    assert "bench" in html(page(read(ended.run)))


def test_a_run_that_trains_and_one_that_was_killed(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    command = bench.start(at("step:4", "linger"))
    bench.wait_for(lambda: len(bench.said("step")) == 3, command)
    assert cli.main(["report", str(bench.run)]) == 0
    out = capsys.readouterr().out
    assert out == f"bench: Running. Step 3 of 6.\nreport: {bench.run / 'report.html'}\n"
    assert '<span class="badge running">' in (bench.run / "report.html").read_text()
    command.send(signal.SIGKILL)
    command.finish()
    beat = health.beat(bench.run)
    assert beat is not None
    (bench.run / health.FILE).write_text(f"{beat - 60:20.3f}")
    assert read(bench.run).state == "interrupted"
    assert bench.train()[0] == 0
    done = read(bench.run)
    assert done.state == "done"
    assert [(mark.kind, mark.step) for mark in done.history.marks] == [("preemption", 2)]


def test_nothing_that_others_wrote_is_markup(ended: Ended) -> None:
    """As in tests/test_report_page.py, for machines without a browser."""
    for name in FILES:
        file = ended.run / name
        text = file.read_text()
        file.write_text(
            re.sub(r'"(question|prediction|row|group|reason)": "[^"]*"', rf'"\1": {json.dumps(EVIL)}', text)
        )
    result = json.loads((ended.run / "result.json").read_text())
    (ended.run / "result.json").write_text(json.dumps({**result, "versions": {EVIL: EVIL}}))
    text = html(page(read(ended.run)))
    assert text.count("&lt;/script&gt;&lt;script&gt;window.hacked = 1") >= 8
    assert "window.hacked = 1</script>" not in text and "<img src=x" not in text
    assert len(re.findall(r"<script\b", text)) == 5


@pytest.mark.parametrize("noise", [False, True], ids=["charts", "noise"])
def test_two_hundred_predictions_with_images_are_below_5_mb(ended: Ended, noise: bool) -> None:
    few = [picture(number, noise) for number in range(40)]
    # Another name is another image; what is in it does not matter for the size.
    evaluated(ended.run, 200, few * 5)
    began = time.monotonic()
    found = page(read(ended.run))
    text = html(found)
    print(f"{len(text.encode()):,} bytes in {time.monotonic() - began:.2f} s")
    assert len(text.encode()) < 5_000_000
    assert len(re.findall(r'<tr data-became="', text)) == 200
    shown = text.count("data:image/webp;base64,")
    assert shown + found.predictions.left_out == 200
    assert (found.predictions.left_out > 0) is noise and shown > 30


def test_rows_beyond_the_page_are_counted(ended: Ended) -> None:
    evaluated(ended.run, gallery.ROWS + 100, [])
    found = page(read(ended.run)).predictions
    assert (len(found.rows), found.total) == (gallery.ROWS, gallery.ROWS + 100)
    assert sum(found.counts.values()) == found.total
    assert f"the first {gallery.ROWS} of {found.total} rows, judged by" in html(page(read(ended.run)))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["report", "."], 65, "no run is there; remedy: give the address of a run"),
        (["report", "nowhere.yaml"], 78, "nowhere.yaml"),
        (["report", "s3://bucket"], 64, "s3://bucket"),
        (["report", "RUN", "--to", "no/such/folder/x.html"], 74, "write the report: no/such/folder"),
        (["report", "RUN", "name=x"], 64, "name=x changes a job, and "),
    ],
)
def test_what_cannot_be_done_is_one_message(
    ended: Ended,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(ended.path)
    assert cli.main([str(ended.run) if word == "RUN" else word for word in words]) == code
    out, err = capsys.readouterr()
    assert out == "" and said in err and "Traceback" not in err


def test_a_job_names_its_run(
    ended: Ended, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ended.path)
    assert cli.main(["report", "job.yaml"]) == 0
    assert capsys.readouterr().out.endswith("report: runs/bench/report.html\n")
    monkeypatch.setenv("JOB_FILE", "job.yaml")
    assert cli.main(["report", "--runs", "runs", "--to", "x.html"]) == 0
    assert (ended.path / "x.html").read_text().startswith("<!doctype html>")


def test_runs_side_by_side(
    once: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(once.path)
    code, output = once.train(at("step:3", "kill"), overrides=("name=other", "seed=7"))
    assert code == 0, output
    assert cli.main(["report", "runs/bench", "runs/other"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["bench", "other"]
    assert [line.split() for line in out[1 : out.index("")]] == [["seed", "42", "7"]]
    cells = {line[:25].strip(): line[25:].split() for line in out[out.index("") + 1 :] if line}
    assert cells["outcome"] == ["Done", "Done"] and cells["restarts"] == ["0", "1"]
    text = (once.path / "report-bench-vs-other.html").read_text()
    assert '<th scope="row" class="mono">seed</th>' in text and "lora.r" not in text
    assert cli.main(["report", "runs/bench", "runs/bench"]) == 0
    assert "nothing differs but the name" in capsys.readouterr().out


def test_a_run_that_is_done_is_told_from_its_store(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    machine = world.machine()
    assert machine.train(at("step:5", "crash:65"))[0] == 65
    assert cli.main(["report", f"{world.uri}/bench"]) == 65
    assert "has not ended, and until then its store has no predictions" in capsys.readouterr().err
    evaluated(machine.run, 4, [picture(0, noise=False)])
    assert machine.train()[0] == 0
    assert cli.main(["report", f"{world.uri}/bench"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("bench: Done.") and out.endswith("report: report-bench.html\n")
    text = (tmp_path / "report-bench.html").read_text()
    assert "data:image/webp;base64," in text and "Restarted</b> at step 4" in text
    assert "6 of 6" in text and f"{world.uri}/bench" in text


# --- libraries of others ---


@pytest.mark.parametrize("library", vendor.LIBRARIES, ids=lambda one: one.name)
def test_a_library_is_what_its_authors_published(library: vendor.Library) -> None:
    script = (Path(vendor.__file__).parent / library.file).read_bytes()
    assert hashlib.sha256(script).hexdigest() == library.sha256
    assert library.version in script[:120].decode()
    assert b"</script" not in script.lower() and b"<!--" not in script and b"\r" not in script
    licence = (Path(vendor.__file__).parent / library.licence).read_text()
    assert library.spdx == "ISC" and "Permission to use, copy, modify, and/or distribute" in licence
    assert licence.strip() in library.script


def test_every_file_beside_them_is_accounted_for() -> None:
    here = {path.name for path in Path(vendor.__file__).parent.iterdir() if path.is_file()}
    told = {name for one in vendor.LIBRARIES for name in (one.file, one.licence)}
    assert here == told | {"__init__.py"}


def test_a_report_needs_neither_torch_nor_boto3(ended: Ended) -> None:
    program = (
        "import sys\nfrom runner.cli import main\ncode = main(['report', sys.argv[1]])\n"
        "heavy = {'torch', 'transformers', 'boto3', 'datasets', 'numpy', 'PIL'}\n"
        "sys.exit(code or ', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    environ: dict[str, Any] = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program, str(ended.run)], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
