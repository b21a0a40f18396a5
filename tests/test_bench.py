"""The speed bench: it runs, compares losses before speed, and the page shows what was measured."""

from __future__ import annotations

import copy
import importlib
import json
import re
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import transformers

from runner.manifest import Job

ROOT = Path(__file__).parents[1]
Modules = dict[str, ModuleType]
NAMES = ("speed", "speed_cases", "speed_flops", "speed_models", "speed_record", "speed_runs", "speed_table")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Modules:
    """The bench's modules, as a program in its folder imports them."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return {name: importlib.import_module(name) for name in NAMES}


def test_it_measures_a_case_on_tiny_sizes(
    bench: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both sides in processes of their own, as the GPU's command does it: 4-bit, bfloat16, pairs."""
    arguments = ["--tiny", "--model", "smolvlm", "--rounds", "1", "--steps", "4", "dpo"]
    arguments += ["--only", "plain TRL", "--only", "all", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench/speed.py", *arguments])
    bench["speed"].main()
    printed = capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    record = json.loads(file.read_text())
    assert record["case"] == "smolvlm-dpo"
    assert [one["name"] for one in record["variants"]] == ["plain TRL", "all"]
    for variant in record["variants"]:
        (one,) = variant["rounds"]
        assert len(set(one["losses"])) == len(one["seconds"]) == 4
        assert one["peak_bytes"] > 2**28
        assert one["reserved_bytes"] is None
    assert 0 < record["flops"]["later"] < record["flops"]["first"]
    assert bench["speed_table"].too_different(record) == []
    assert printed.index("no step's loss differs") < printed.index("| case |")
    assert all(line in printed for line in bench["speed_table"].table(record))


# --- losses before speed ---


def example(**losses: list[float]) -> dict[str, Any]:
    """A record of pairs, two epochs of three steps, whose step takes the seconds that its loss is."""
    return {
        "case": "dpo",
        "model": "proportions",
        "dtype": "float32",
        "date": "2026-01-02",
        "hardware": {"cpu": "Some CPU", "cores": 2, "card": None},
        "versions": {"torch": "2"},
        "revision": "abc",
        "command": "python bench/speed.py",
        "tolerance": 1e-5,
        "steps": 6,
        "steps_per_epoch": 3,
        "samples_per_step": 2,
        "sample": {"images": 13, "patches": 729, "prompt": 1100.0, "answers": [20.0, 30.0]},
        "flops": {"first": 2e9, "later": 1e9},
        "peak": {"flops": 1e10, "source": "measured"},
        "variants": [
            {
                "name": name.replace("_", " "),
                "not_run": None,
                "rounds": [
                    {
                        "losses": values,
                        "seconds": [9.0, 4.0, 4.0, 2.0, 2.0, 2.0],
                        "data_seconds": [9.0, 1.0, 1.0, 0.5, 0.5, 0.5],
                        "before_seconds": 1.0,
                        "peak_bytes": 2**30,
                        "reserved_bytes": None,
                    }
                ],
            }
            for name, values in losses.items()
        ],
    }


LOSSES = [0.7, 0.6, 0.5, 0.4, 0.3, 0.2]


@pytest.mark.parametrize(
    ("difference", "said"), [(0.0, False), (9e-6, False), (2e-5, True), (float("nan"), True)]
)
def test_losses_that_differ_are_named(bench: Modules, difference: float, said: bool) -> None:
    moved = [*LOSSES[:-1], LOSSES[-1] + difference]
    words = bench["speed_table"].too_different(example(plain_TRL=LOSSES, all=moved))
    assert len(words) == said
    assert all(word.startswith("dpo, all: a step's loss differs") for word in words)


def test_another_number_of_steps_is_no_comparison(bench: Modules) -> None:
    with pytest.raises(ValueError, match="zip"):
        bench["speed_table"].too_different(example(plain_TRL=LOSSES, all=LOSSES[:-1]))


def test_no_speed_is_printed_and_nothing_kept_when_losses_differ(
    bench: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = example(plain_TRL=LOSSES, all=[loss + 1e-4 for loss in LOSSES])
    monkeypatch.setattr(bench["speed"], "measured", lambda said: ([record], []))
    monkeypatch.setattr(sys, "argv", ["speed.py", "--results", str(tmp_path / "kept")])
    with pytest.raises(SystemExit) as ended:
        bench["speed"].main()
    assert "differs from plain TRL's by 1.0e-04" in str(ended.value.code)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "kept").exists()


def test_a_variant_that_failed_fails_the_command_after_the_table(
    bench: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = example(plain_TRL=LOSSES)
    record["variants"].append({"name": "all", "not_run": "failed: why", "rounds": []})
    monkeypatch.setattr(bench["speed"], "measured", lambda said: ([record], ["dpo, all: why"]))
    monkeypatch.setattr(sys, "argv", ["speed.py", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="dpo, all: why"):
        bench["speed"].main()
    assert "| dpo | all | failed: why |" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["dpo-cpu-2-cores-some-cpu.json"]


# --- the table ---


def test_a_row_says_what_was_measured(bench: Modules) -> None:
    """4 s for 2 samples in the first epoch, 2 s in the second; the first step warms up."""
    record = example(plain_TRL=LOSSES, all=LOSSES)
    record["variants"][1]["rounds"][0]["seconds"][3:] = [1.0, 1.0, 1.0]
    record["variants"][1]["rounds"][0]["data_seconds"] = [None] * 6
    assert bench["speed_table"].table(record) == [
        "| dpo | plain TRL | 0.5 | 1.00x | 0.0e+00 | 10.0% | 1.00 | 25.0% |",
        "| dpo | all | 0.5 | 1.00x | 0.0e+00 | 10.0% | 1.00 | - |",
        "| dpo-second | plain TRL | 1 | 1.00x | 0.0e+00 | 10.0% | 1.00 | 25.0% |",
        "| dpo-second | all | 2 | 2.00x | 0.0e+00 | 20.0% | 1.00 | - |",
    ]


def test_what_is_not_known_is_a_dash(bench: Modules) -> None:
    record = example(all=LOSSES)
    record["peak"] = None
    record["variants"][0]["rounds"][0] |= {"reserved_bytes": 2**31}
    assert (
        bench["speed_table"].table(record)[0]
        == "| dpo | all | 0.5 | - | - | - | 1.00 (2.00 reserved) | 25.0% |"
    )


def test_work_done_ahead_is_counted_in_the_first_epoch(bench: Modules) -> None:
    record = example(plain_TRL=LOSSES, frozen_parts_alone=LOSSES, all=LOSSES)
    record["variants"][2]["rounds"][0]["before_seconds"] = 13.0
    first, second = bench["speed_table"].views(record)
    assert bench["speed_table"].samples_per_second(record, "all", first) == 2 / (4 + 12 / 3)
    assert bench["speed_table"].samples_per_second(record, "all", second) == 2 / 2
    assert bench["speed_table"].samples_per_second(record, "frozen parts alone", first) == 2 / 4


def test_the_page_has_the_table_of_the_results(bench: Modules) -> None:
    text = bench["speed_table"].PAGE.read_text("utf-8")
    assert bench["speed_table"].page(text, bench["speed_table"].read()) == text, "run bench/speed_table.py"


def test_the_page_changes_with_the_results(bench: Modules, tmp_path: Path) -> None:
    record = example(plain_TRL=LOSSES, all=LOSSES)
    bench["speed_record"].keep(tmp_path, [record])
    other = copy.deepcopy(record) | {"hardware": {"cpu": "x", "cores": 1, "card": "NVIDIA H200"}}
    bench["speed_record"].keep(tmp_path, [other])
    records = bench["speed_table"].read(tmp_path)
    assert records == [record, other]
    text = bench["speed_table"].PAGE.read_text("utf-8")
    page = bench["speed_table"].page(text, records)
    assert page.count("| dpo-second | all |") == 2
    assert "Some CPU, 2 cores" in page and "NVIDIA H200" in page
    assert bench["speed_table"].page(page, []) == bench["speed_table"].page(text, [])


def test_the_kept_results_passed_the_comparison(bench: Modules) -> None:
    for record in bench["speed_table"].read():
        assert bench["speed_table"].too_different(record) == []


# --- what is run ---


def test_the_start_is_measured_against_a_whole_spec(bench: Modules, tmp_path: Path) -> None:
    """Of `bench/start.py`; that the fields of a spec are all that plain TRL needs, `tests/plain.py` shows."""
    start, cases = importlib.import_module("start"), bench["speed_cases"]
    case = start.Case(tmp_path / "model", tmp_path / "rows.parquet", 16, 1, {})
    model = bench["speed_models"].TINY["proportions"]
    whole = cases.spec(cases.CASES["sft"], model, 3, tmp_path, case.data, [[0]], "cpu")
    spec = start.spec(case)
    assert spec.keys() == whole.keys()
    job = Job.model_validate(start.job(case, auto=False))
    assert spec["training"]["per_device_train_batch_size"] == job.training.global_batch_size == 1
    assert spec["lora"] == {**(job.lora or {}), "exclude_modules": model.frozen}


def test_the_commands_of_the_page_name_what_there_is(bench: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    text = bench["speed_table"].PAGE.read_text("utf-8")
    commands = re.findall(r"^\.venv/bin/python bench/speed\.py(.*?)(?:  +#.*)?$", text, re.MULTILINE)
    assert len(commands) == 5
    for arguments in commands:
        monkeypatch.setattr(sys, "argv", ["speed.py", *arguments.split()])
        bench["speed"].options()


def test_what_does_not_fit_into_the_time_is_listed(bench: Modules, tmp_path: Path) -> None:
    runs_of = bench["speed_runs"]
    case = bench["speed_cases"].CASES["dpo"]
    runs = runs_of.Runs(case, 2, tmp_path / "rows", sample=None)
    now = runs_of.Bench(bench["speed_models"].TINY["smolvlm"], "cuda", tmp_path, time.monotonic())
    runs_of.measure(now, [runs], 1, None)
    assert runs.rounds == {} and runs.failed == []
    assert list(runs.why)[:3] == ["all", "plain TRL", "frozen parts alone"]
    assert set(runs.why.values()) <= {
        runs_of.NO_TIME,
        *(f"not run: {p} is not installed" for p in ("liger_kernel", "triton")),
    }


def test_a_lever_of_upstream_may_fail_and_one_of_ours_may_not(
    bench: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_of, cases = bench["speed_runs"], bench["speed_cases"]

    def fails(bench: Any, runs: Any, variant: Any, turn: int) -> None:
        raise runs_of.Failed("a long log\nwhy")

    monkeypatch.setattr(runs_of, "_ours", fails)
    monkeypatch.setattr(cases.Variant, "missing", False)
    runs = runs_of.Runs(cases.CASES["sft"], 2, tmp_path / "rows", sample=None)
    there = runs_of.Bench(bench["speed_models"].TINY["smolvlm"], "cuda", tmp_path, time.monotonic() + 100)
    runs_of.measure(there, [runs], 1, None)
    assert runs.why["use_liger_kernel"] == "failed: why"
    assert [line.partition(":")[0] for line in runs.failed] == [
        "sft, all",
        "sft, plain TRL",  # whose order would be ours
        "sft, frozen parts alone",
    ]


def test_a_variant_that_took_other_rows_fails(
    bench: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_of, case = bench["speed_runs"], bench["speed_cases"].CASES["sft"]
    steps = [{"ids": [0], "loss": 1.0, "seconds": 1.0}]
    monkeypatch.setattr(
        runs_of, "trainer", lambda *_: SimpleNamespace(steps=steps, process={}, before_seconds=0.0)
    )
    runs = runs_of.Runs(case, 1, tmp_path / "rows", sample=None, order=[[1]])
    there = runs_of.Bench(bench["speed_models"].TINY["smolvlm"], "cpu", tmp_path, time.monotonic() + 100)
    with pytest.raises(runs_of.Failed, match="other rows"):
        runs_of._ours(there, runs, case.variants("cpu")[0], 0)


def test_model_flops_are_those_of_the_formula(bench: Modules) -> None:
    """One layer of width 2 each, counted by hand."""
    flops = bench["speed_flops"]
    model = flops.Weights(10, 2, 1, 5, 100, 2, 1, 7)
    row = flops.Sample(3, 4, 6, 10.0, (2.0, 4.0), 6.0, 1)
    seen = 3 * 4 * (2 * 10 + 4 * 2 * 4) + 2 * 5 * 6
    linear = 2 * (100 * 16 + 7 * 6)
    attention = 4 * 2 * (10 * 10 + 2 * 12 + 4 * 14)
    assert flops.flops(model, row, "sft", reference=True) == seen + 2 * linear + 3 * attention
    assert flops.flops(model, row, "dpo", reference=True) == seen + 3 * linear + 4 * attention
    assert flops.flops(model, row, "dpo", reference=False) == seen + 2 * linear + 3 * attention
    # Four questions about one image: what they share is done once, and counted as a quarter of it for each.
    row = flops.Sample(3, 4, 6, 10.0, (2.0,), 1.0, 4)
    linear = 2 * (100 * (10 / 4 + 2) + 7 * 1)
    attention = 4 * 2 * (10 * 10 / 4 + 2 * 12)
    assert flops.flops(model, row, "sft", reference=True) == seen / 4 + 2 * linear + 3 * attention
    assert flops.peak("NVIDIA H200")["flops"] == 989e12
    assert flops.peak("Another card") is None


def test_the_models_have_the_published_sizes(bench: Modules, tmp_path: Path) -> None:
    """Linear layers of SmolVLM-Instruct's text, 24 x (4 x 2048^2 + 3 x 2048 x 8192), and of Qwen2-VL-7B's."""
    models, flops = bench["speed_models"].MODELS, bench["speed_flops"]
    smol = {"model_type": "idefics3", "scale_factor": 3, "text_config": models["smolvlm"].text}
    smol["vision_config"] = models["smolvlm"].vision | {"patch_size": 14}
    found = flops.weights(smol)
    assert found.text == 24 * (4 * 2048**2 + 3 * 2048 * 8192)
    assert found.projector == 1152 * 9 * 2048 == 21_233_664
    qwen = {"model_type": "qwen2_vl", "text_config": models["qwen2vl-7b"].text}
    sides = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
    qwen["vision_config"] = models["qwen2vl-7b"].vision | sides
    found = flops.weights(qwen)
    assert found.text == 28 * (3584 * (3584 + 512) * 2 + 3 * 3584 * 18944)
    assert found.tower + found.projector == pytest.approx(675e6, rel=0.01)


def test_the_model_of_the_gpu_is_smolvlm_instruct_to_the_parameter(
    bench: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made without numbers, and counted where it would be saved."""
    counted: list[int] = []
    monkeypatch.setattr(
        transformers.PreTrainedModel,
        "save_pretrained",
        lambda self, folder: counted.append(sum(one.numel() for one in self.parameters())),
    )
    models = bench["speed_models"]
    models.build(models.MODELS["smolvlm"], tmp_path, "meta")
    assert counted == [2_246_272_880]


def test_order_and_speed_reach_both_sides(bench: Modules, tmp_path: Path) -> None:
    cases = bench["speed_cases"]
    model = bench["speed_models"].TINY["proportions"]
    case = cases.CASES["sft4"]
    by_name = {one.name: one for one in case.variants("cpu")}
    assert list(by_name) == ["all", "frozen parts alone", "encode_once", "share_prompt"]
    job = cases.job(case, by_name["share_prompt"], model, 3, tmp_path, tmp_path / "rows.parquet")
    assert job.datasets.order == "by_image"
    assert job.speed.model_dump() == {"encode_once": False, "share_prompt": True, "cache_reference": False}
    order = [[3, 1, 2, 0]]
    spec = cases.spec(case, model, 3, tmp_path, tmp_path / "rows.parquet", order, "cpu")
    assert spec["order"] == order and spec["rows"] == 12
    assert spec["training"]["per_device_train_batch_size"] == job.training.per_device_train_batch_size == 4
    with pytest.raises(SystemExit, match="3 steps are not 2 whole epochs"):
        cases.CASES["dpo"].images(3)
