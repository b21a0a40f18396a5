"""Every exit code, and a machine that is taken away, through the retry rules of every target.

The rules are evaluated here as their systems document it, and compared with `runner.exits`.
"""

from __future__ import annotations

import fnmatch
import re
from typing import Any

import pytest
import yaml

from runner import exits
from runner.targets import aws_batch, gcp_batch, rules
from tests.submitted import CASES, ROOT, rendered

CODES = range(1, 256)
DECIDED = {"no": "give up", "uncounted": "again", "counted": "again, counted"}
Tree = dict[str, Any]


def expected(code: int, disrupted: bool) -> str:
    return "again" if disrupted else DECIDED[exits.of(code).retried]


def first_rule(policy: Tree, code: int, disrupted: bool) -> tuple[int, Tree] | None:
    """The rule of a podFailurePolicy that a failed pod matches."""
    for index, rule in enumerate(policy["rules"]):
        if "onPodConditions" in rule and disrupted:
            return index, rule
        if "onExitCodes" in rule and code in rule["onExitCodes"]["values"]:
            return index, rule
    return None


def of_job(policy: Tree, code: int, disrupted: bool) -> str:
    found = first_rule(policy, code, disrupted)
    return (
        "again, counted" if found is None else {"Ignore": "again", "FailJob": "give up"}[found[1]["action"]]
    )


def of_job_set(policy: Tree, job: Tree, code: int, disrupted: bool) -> str:
    """A pod fails, with its Job for a reason and a message, and the JobSet's first rule for these decides."""
    found = first_rule(job["podFailurePolicy"], code, disrupted)
    if found is None:
        assert job["backoffLimit"] == 0
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    else:
        index, rule = found
        assert rule["action"] == "FailJob"
        reason = "PodFailurePolicy"
        message = f"Pod vlm/charts-0 has condition DisruptionTarget matching FailJob rule at index {index}"
        if "onExitCodes" in rule:
            message = (
                f"Container trainer for pod vlm/charts-0 failed with exit code {code} matching FailJob rule "
                f"at index {index}"
            )
    for rule in policy["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(one, message) for one in patterns):
            return {"FailJobSet": "give up", "RestartJobSetAndIgnoreMaxRestarts": "again"}[rule["action"]]
    return "again, counted"


def of_aws(found: list[Tree], code: int | None) -> str:
    """What no rule matches is retried; every retry counts."""
    for rule in found:
        if code is not None and fnmatch.fnmatchcase(str(code), rule["onExitCode"]):
            return {"EXIT": "give up"}[rule["action"]]
    return "again, counted"


def of_gcp(policies: list[Tree], code: int) -> str:
    """FAIL_TASK fails the task for these codes, and retries it for all others; every retry counts."""
    (policy,) = policies
    assert policy["action"] == "FAIL_TASK"
    return "give up" if code in policy["actionCondition"]["exitCodes"] else "again, counted"


@pytest.mark.parametrize("case", [case for target, case in CASES if target == "kubernetes"])
@pytest.mark.parametrize("disrupted", [False, True])
def test_a_job(case: str, disrupted: bool) -> None:
    spec = rendered("kubernetes", case)[-1]["spec"]
    for code in CODES:
        assert of_job(spec["podFailurePolicy"], code, disrupted) == expected(code, disrupted), code
    assert spec["backoffLimit"] >= 100


@pytest.mark.parametrize("case", [case for target, case in CASES if target == "jobset"])
@pytest.mark.parametrize("disrupted", [False, True])
def test_a_job_set(case: str, disrupted: bool) -> None:
    spec = rendered("jobset", case)[-1]["spec"]
    (job,) = spec["replicatedJobs"]
    for code in CODES:
        decided = of_job_set(spec["failurePolicy"], job["template"]["spec"], code, disrupted)
        assert decided == expected(code, disrupted), code
    assert spec["failurePolicy"]["maxRestarts"] >= 100


@pytest.mark.parametrize("disrupted", [False, True])
def test_a_train_job(disrupted: bool) -> None:
    """Its rules are the runtime's."""
    runtime, *_, job = rendered("trainjob", "least")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    spec = runtime["spec"]["template"]["spec"]
    (node,) = spec["replicatedJobs"]
    for code in CODES:
        decided = of_job_set(spec["failurePolicy"], node["template"]["spec"], code, disrupted)
        assert decided == expected(code, disrupted), code


def test_a_deadline_ends_a_job_set() -> None:
    found = rendered("jobset", "least")[-1]["spec"]["failurePolicy"]["rules"]
    (rule,) = [one for one in found if one["onJobFailureReasons"] == ["DeadlineExceeded"]]
    assert rule["action"] == "FailJobSet"


def as_counted(code: int) -> str:
    """The clouds count every retry."""
    return expected(code, False).replace("again, counted", "again").replace("again", "again, counted")


def test_aws_batch() -> None:
    found = rendered("aws-batch", "least")[0]["RegisterJobDefinition"]["retryStrategy"]["evaluateOnExit"]
    assert found == aws_batch.retry_rules()
    assert [rule["onExitCode"] for rule in found] == ["6*", "76", "77", "78", "9*"]
    assert len(found) <= aws_batch.RULES == 5
    for code in {*exits.EXITS, 1, 2, 126, 127, 130, 134, 137, 139, 143} - {0}:
        assert of_aws(found, code) == as_counted(code), code
    # An exit code that nothing here ends with shares a pattern, nothing else does.
    others = {code for code in CODES if of_aws(found, code) != as_counted(code)}
    assert others == {6, *range(60, 70), 9, *range(90, 100)} - {64, 65, 93}


@pytest.mark.parametrize("event", ["Host EC2 (instance i-0) terminated.", "CannotPullContainerError"])
def test_aws_batch_without_an_exit_code(event: str) -> None:
    """A machine that was taken away, an image that could not be pulled: no rule says anything of reasons."""
    found = aws_batch.retry_rules()
    assert all(set(rule) == {"onExitCode", "action"} for rule in found), event
    assert of_aws(found, None) == "again, counted"


def test_gcp_batch() -> None:
    task = rendered("gcp-batch", "least")[0]["taskGroups"][0]["taskSpec"]
    for code in CODES:
        assert of_gcp(task["lifecyclePolicies"], code) == as_counted(code), code
    assert of_gcp(task["lifecyclePolicies"], gcp_batch.PREEMPTED) == "again, counted"
    assert 1 <= task["maxRetryCount"] <= 10


def test_the_base_of_k8s_has_the_same_rules() -> None:
    base = yaml.safe_load((ROOT / "k8s" / "base" / "train.yaml").read_text("utf-8"))
    assert base["spec"]["podFailurePolicy"] == rules.failure_policy()
