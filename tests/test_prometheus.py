"""metrics.prom, as the official client reads it; and that it is written seldom and costs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from runner.manifest import Job
from runner.supervisor.metrics_file import EVERY, MetricsFile
from runner.tracking.prometheus import standing, text
from tests.machines import Bench, at
from tests.small_job import SMALL, with_value

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(content: str) -> Samples:
    """Every sample by its name and labels, but for the run's name."""
    found: Samples = {}
    for family in text_string_to_metric_families(content):
        assert family.documentation, family.name
        for sample in family.samples:
            labels = tuple(sorted((key, value) for key, value in sample.labels.items() if key != "run"))
            assert (sample.name, labels) not in found
            found[sample.name, labels] = sample.value
    return found


def test_file_of_a_run_says_how_it_went(bench: Bench) -> None:
    code, output = bench.train(at("step:5", "kill"))
    assert code == 0, output
    found = samples((bench.run / "metrics.prom").read_text())
    simple = {name: value for (name, labels), value in found.items() if not labels}
    commit = bench.said("commit")[-1]
    assert simple == {
        "vlm_runner_attempt": 2,
        "vlm_runner_step": 6,
        "vlm_runner_steps": 6,
        "vlm_runner_steps_total": len(bench.said("step")),
        "vlm_runner_tokens_total": 100 * len(bench.said("step")),
        "vlm_runner_images_total": 2 * len(bench.said("step")),
        "vlm_runner_loss": 1 / 6,
        "vlm_runner_step_seconds": 0.5,
        "vlm_runner_memory_peak_bytes": 1 << 30,
        "vlm_runner_committed_step": 6,
        "vlm_runner_commit_timestamp_seconds": commit["time"],
        "vlm_runner_start_timestamp_seconds": bench.said("start")[0]["time"],
        "vlm_runner_exit_code": 0,
    }
    assert found["vlm_runner_restarts_total", (("reason", "trainer"),)] == 1
    metric = (("metric", "relaxed_accuracy"), ("when", "before"))
    assert found["vlm_runner_evaluation", metric] == 0.25
    phases = {
        dict(labels)["phase"]: value for (name, labels), value in found.items() if name.endswith("_phase")
    }
    assert [phase for phase, value in phases.items() if value] == ["ended"]
    assert phases["train"] == 0


def test_a_command_that_goes_on_knows_what_was_evaluated_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.prom"
    file = MetricsFile(path, Job.model_validate(SMALL))
    file.resume({"before": {"accuracy": {"overall": 0.25, "n": 4}}, "after": None})
    for metrics in ({"eval_loss": 2.5}, {"accuracy": {"overall": 0.5}}):  # of one step
        file.note({"event": "evaluation", "when": "during", "step": 5, "metrics": metrics})
    file.write()
    found = {tuple(dict(labels).values()): value for (_, labels), value in samples(path.read_text()).items()}
    assert found["accuracy", "before"] == 0.25
    assert (found["loss", "during"], found["accuracy", "during"]) == (2.5, 0.5)


def test_labels_are_escaped_and_what_is_not_known_has_no_line() -> None:
    model = 'a "model" in C:\\n\nhere'
    state = standing(Job.model_validate(with_value("model.name_or_path", model)))
    state.note({"event": "step", "step": 1, "steps": 2, "loss": float("nan"), "tokens": 3, "images": 0})
    found = samples(text(state))
    ((_, labels),) = [key for key in found if key[0] == "vlm_runner_run_info"]
    assert dict(labels)["model"] == model
    assert not [name for name, _ in found if name in ("vlm_runner_loss", "vlm_runner_exit_code")]
    assert found["vlm_runner_tokens_total", ()] == 3


def test_file_is_written_seldom_at_the_end_and_never_in_the_way(tmp_path: Path) -> None:
    now = 0.0
    path = tmp_path / "metrics.prom"
    file = MetricsFile(path, Job.model_validate(SMALL), lambda: now)

    def step(number: int, **more: Any) -> float | None:
        file.note({"event": "step", "step": number, **more})
        file.write()
        return samples(path.read_text()).get(("vlm_runner_step", ())) if path.exists() else None

    assert step(1) == 1
    now = EVERY - 0.1
    assert step(2) == 1
    now = EVERY
    file.write()
    assert samples(path.read_text())["vlm_runner_step", ()] == 2
    file.note({"event": "end", "exit_code": 75})
    file.write()
    assert samples(path.read_text())["vlm_runner_exit_code", ()] == 75
    path.unlink()
    path.mkdir()  # what no file replaces
    now *= 3
    assert list(tmp_path.iterdir()) == [path]
    file.note({"event": "step", "step": 3})
    file.write()
