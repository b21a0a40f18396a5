"""Evaluation on pairs: log-probabilities as plain arithmetic gives them, records, rewards, no trace."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ProcessorMixin

from runner.demo import resolve_dataset
from runner.manifest import Evaluation as Spec
from runner.manifest import Job
from runner.plan import Fetched, Plan, geometry
from runner.train.channel import Channel
from runner.train.data.collator import Collator
from runner.train.data.rows import Rows
from runner.train.evaluation.evaluate import Reference
from runner.train.evaluation.evaluator import Evaluator
from runner.train.evaluation.pairs import PairScore, fused_head, score
from tests.samples import png, rlaif_v, rows, smolvlm, source
from tests.small_job import SMALL
from tests.test_evaluate import adapted, float32, generators, run

SPEC = Spec(batch_size=2, max_new_tokens=4)
CHOSEN = ["It is 0.", "red 10, blue 35", "A", "yes", "red 10, blue 35, green 40"]
REJECTED = ["It is not 0.", "blue 35, red 10", "A rather longer answer", "no", "green 40"]


@pytest.fixture(scope="module")
def processor() -> ProcessorMixin:
    return smolvlm()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, processor: ProcessorMixin) -> Rows:
    """Questions and answers of different lengths."""
    folder = rlaif_v(
        tmp_path_factory.mktemp("pairs") / "pairs",
        [png(number, 64, 64) for number in range(5)],
        question=[f"{'very ' * number}long question?" for number in range(5)],
        chosen=CHOSEN,
        rejected=REJECTED,
    )
    return rows(processor, (source("pairs", format="preference"), folder), name="eval")


def batch_of(made: Rows, processor: ProcessorMixin, positions: list[int]) -> dict[str, Any]:
    collator = Collator(processor, "preference", torch.float32)
    return collator([made.dataset[position] for position in positions])


def plainly(model: Any, batch: dict[str, Any], row: int) -> tuple[float, int]:
    """One answer's log-probability, token by token, from the logits of a forward of its own."""
    ids = batch["input_ids"][row : row + 1][:, batch["attention_mask"][row].bool()]
    answer = batch["completion_mask"][row][batch["attention_mask"][row].bool()].bool()
    logits = model(input_ids=ids, pixel_values=batch["pixel_values"][row : row + 1]).logits[0]
    total = 0.0
    for place in answer.nonzero().flatten().tolist():
        total += logits[place - 1].double().log_softmax(-1)[ids[0, place]].item()
    return total, int(answer.sum())


def test_scores_are_those_of_plain_arithmetic(processor: ProcessorMixin, made: Rows) -> None:
    model = float32().eval()
    batch = batch_of(made, processor, [0, 1, 2])
    found = score(model, batch)
    for row, one in enumerate(found):
        chosen, chosen_tokens = plainly(model, batch, row)
        rejected, rejected_tokens = plainly(model, batch, 3 + row)
        assert (one.tokens_chosen, one.tokens_rejected) == (chosen_tokens, rejected_tokens)
        assert (one.logp_chosen, one.logp_rejected) == pytest.approx((chosen, rejected), abs=1e-3)
    said = processor.tokenizer(" A<end_of_utterance>\n")["input_ids"]
    assert found[2].tokens_chosen == len(said) < found[2].tokens_rejected


def test_scores_do_not_depend_on_the_batch(processor: ProcessorMixin, made: Rows) -> None:
    model = float32().eval()
    together = score(model, batch_of(made, processor, [0, 1, 2, 3, 4]))
    for position, one in enumerate(together):
        (alone,) = score(model, batch_of(made, processor, [position]))
        assert (one.logp_chosen, one.logp_rejected) == pytest.approx(
            (alone.logp_chosen, alone.logp_rejected), abs=1e-3
        )


def test_an_adapters_scores_are_the_adapters(processor: ProcessorMixin, made: Rows) -> None:
    model = adapted(quantized=False).eval()
    batch = Collator(processor, "preference", torch.bfloat16)([made.dataset[0]])
    base = score(model, batch)
    torch.nn.init.normal_(next(p for name, p in model.named_parameters() if "lora_B" in name), std=1.0)
    assert score(model, batch) != base
    with model.disable_adapter():
        assert score(model, batch) == base


@pytest.mark.parametrize("patched", [False, True])
def test_the_forward_comes_back(patched: bool) -> None:
    model = float32()
    if patched:
        model.forward = torch.no_grad()(model.forward)
    before = vars(model).get("forward")
    with pytest.raises(RuntimeError, match="no"), fused_head(model):
        assert vars(model)["forward"] is not before
        raise RuntimeError("no")
    assert vars(model).get("forward") is before
    assert model(input_ids=torch.tensor([[1, 2]])).logits is not None


def test_records_of_pairs(processor: ProcessorMixin, made: Rows) -> None:
    model = float32()
    found = run(model, processor, made, SPEC)
    assert [record["row"] for record in found.records] == made.dataset["row"][:]
    assert [record["chosen"] for record in found.records] == CHOSEN
    assert [record["rejected"] for record in found.records] == REJECTED
    (scored,) = score(model.eval(), batch_of(made, processor, [1]))
    one = found.records[1]
    assert {*one} == {
        *("row", "question", "prediction", "chosen", "rejected", "nearer", "group"),
        *PairScore.__dataclass_fields__,
        *("reference_logp_chosen", "reference_logp_rejected"),
    }
    assert one["logp_chosen"] == pytest.approx(scored.logp_chosen, abs=1e-3)
    metrics = found.metrics
    right = sum(record["logp_chosen"] > record["logp_rejected"] for record in found.records)
    assert metrics["preference_accuracy"] is not None
    assert (metrics["preference_accuracy"]["overall"], metrics["preference_accuracy"]["n"]) == (right / 5, 5)
    assert metrics["reward_accuracy"] is None


def test_rewards_are_against_the_reference(processor: ProcessorMixin, made: Rows) -> None:
    model = float32()
    before = run(model, processor, made, SPEC).records
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    # Another source may have rows of the same names.
    reference = Reference(0.25, [*before, {**before[0], "question": "And here?", "logp_chosen": 0.0}])
    after = run(model, processor, made, SPEC, reference=reference)
    margins = []
    for then, now in zip(before, after.records, strict=True):
        assert now["reference_logp_chosen"] == then["logp_chosen"]
        gained = [now[f"logp_{name}"] - then[f"logp_{name}"] for name in ("chosen", "rejected")]
        margins.append(0.25 * (gained[0] - gained[1]))
    assert after.metrics["reward_margin"] is not None
    assert after.metrics["reward_margin"]["overall"] == pytest.approx(sum(margins) / 5)
    for others in (before[:4], [*before[:4], {**before[4], "rejected": "another"}]):
        known = Reference(0.25, others)
        assert run(model, processor, made, SPEC, reference=known).metrics["reward_margin"] is None


def test_it_leaves_no_trace(processor: ProcessorMixin, made: Rows) -> None:
    model = adapted()
    model.train()
    model.gradient_checkpointing_enable()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    forwards = [vars(module).get("forward") for module in model.modules()]
    before = generators()
    run(model, processor, made, SPEC)
    assert generators() == before
    assert all(module.training for module in model.modules())
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_train_evaluate_train_is_train_train(processor: ProcessorMixin, made: Rows) -> None:
    """On pairs, and through TRL's fused head, as DPOTrainer trains."""
    from trl.trainer.utils import add_fused_lm_head

    def trained(*, evaluated: bool) -> dict[str, torch.Tensor]:
        model = adapted()
        add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy"))
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        collator = Collator(processor, "preference", torch.bfloat16)
        torch.manual_seed(1)  # dropout draws from it
        for step in range(2):
            batch = collator([made.dataset[step]])
            labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
            del batch["row_index"], batch["image_count"]
            output = model(**batch, labels=labels, use_cache=False, fused_lm_head=True)
            assert output.entropy is not None  # the trainer's own head is at work
            chosen, rejected = output.log_probs.sum(dim=1)
            torch.nn.functional.softplus(rejected - chosen).backward()
            optimizer.step()
            optimizer.zero_grad()
            if evaluated and step == 0:
                run(model, processor, made, SPEC)
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    plain, disturbed = trained(evaluated=False), trained(evaluated=True)
    assert plain
    for name, value in plain.items():
        assert torch.equal(disturbed[name], value), name


def test_the_demos_base_model_prefers_neither_answer(processor: ProcessorMixin) -> None:
    """By symmetry: it has a taste, but none that depends on the form of the chart."""
    folder = resolve_dataset("demo:preferences", Path(os.environ["RUNNER_CACHE"]))
    held_out = source("demo:preferences", format="preference", split="test[:80]")
    found = rows(processor, (held_out, folder), name="eval")
    accuracy = run(float32(), processor, found, Spec(batch_size=40, max_new_tokens=40)).metrics
    assert accuracy["preference_accuracy"] is not None and accuracy["generated_rejected"] is not None
    assert 0.4 <= (accuracy["preference_accuracy"]["overall"] or 0) <= 0.6
    assert 0.3 <= (accuracy["generated_rejected"]["overall"] or 0) <= 0.6


# --- the stage ---


def plan(folder: Path, method: str = "dpo", **fields: Any) -> Plan:
    job = Job.model_validate(
        {
            **SMALL,
            "method": method,
            "model": {"name_or_path": "demo:smolvlm-tiny", "dtype": "float32"},
            "training": {"beta": 0.5} if method == "dpo" else {},
            "evaluation": {"batch_size": 5, "max_new_tokens": 2, "baseline": fields.pop("baseline", True)},
        }
    )
    return Plan(
        purpose=fields.pop("purpose", "train"),
        job=job,
        run_dir=folder,
        attempt=1,
        attempt_dir=folder,
        geometry=geometry(job),
        fetched=Fetched(model="", train=[], eval=[]),
        save_seconds=60,
        **fields,
    )


@pytest.mark.parametrize("baseline", [True, False])
def test_rewards_only_where_the_reference_was_evaluated(
    tmp_path: Path, processor: ProcessorMixin, made: Rows, baseline: bool
) -> None:
    model = float32()
    stage = Evaluator(plan(tmp_path, baseline=baseline), Channel(tmp_path, None), model, processor, made)
    before = stage.baseline()
    assert (before is not None) == baseline
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    after = stage.run("after", "evaluate_after", step=1)
    assert after is not None
    if before is None:
        assert after["reward_accuracy"] is after["reward_margin"] is None
        return
    assert before["reward_accuracy"] is before["reward_margin"] is None
    margins = [metrics["preference_margin"]["overall"] for metrics in (before, after)]
    assert after["reward_margin"]["overall"] == pytest.approx(0.5 * (margins[1] - margins[0]))
    assert after["reward_accuracy"]["n"] == 5
    assert json.loads((tmp_path / "evaluation" / "after.json").read_text())["metrics"] == after


def test_a_baseline_is_kept_when_only_what_comes_during_training_changes(
    tmp_path: Path, processor: ProcessorMixin, made: Rows
) -> None:
    first = plan(tmp_path)
    spec = first.job.evaluation
    assert spec is not None
    (tmp_path / "evaluation").mkdir()
    kept = {"evaluation": spec.model_dump(mode="json"), "metrics": {"kept": 1}}
    (tmp_path / "evaluation" / "before.json").write_text(json.dumps(kept))

    def baseline(**changes: Any) -> dict[str, Any] | None:
        job = first.job.model_copy(update={"evaluation": spec.model_copy(update=changes)})
        now = first.model_copy(update={"job": job})
        return Evaluator(now, Channel(tmp_path, None), float32(), processor, None).baseline()

    assert baseline() == baseline(steps=7, loss=False) == {"kept": 1}
    assert baseline(max_new_tokens=3) is None  # there are no rows to make it anew


def test_a_later_evaluation_takes_the_reference_that_its_plan_names(
    tmp_path: Path, processor: ProcessorMixin, made: Rows
) -> None:
    model = float32()
    reference = tmp_path / "before.predictions.jsonl"
    records = run(model, processor, made, SPEC).records
    reference.write_text("".join(json.dumps(record) + "\n" for record in records))
    for named in (reference, None):
        asked = plan(tmp_path, purpose="evaluate", reference=named)
        found = Evaluator(asked, Channel(tmp_path, None), model, processor, made).run(
            "adapter", "evaluate", 0
        )
        assert found is not None
        assert (found["reward_margin"] is not None) == (named is not None)
