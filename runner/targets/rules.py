"""The table of `runner.exits` as rules of Kubernetes: of a Job, and of a JobSet, which starts all pods again.

    end of a pod           Job: podFailurePolicy   JobSet: its Job's, then its own failurePolicy
    disruption, any code   Ignore                  FailJob, RestartJobSetAndIgnoreMaxRestarts
    no                     FailJob                 FailJob, FailJobSet
    uncounted              Ignore                  FailJob, RestartJobSetAndIgnoreMaxRestarts
    counted                none: backoffLimit      none: backoffLimit 0, none: maxRestarts

In every list the first rule that matches wins.
"""

from __future__ import annotations

from runner import exits
from runner.targets.pods import TRAINER
from runner.targets.template import Tree

DISRUPTED: Tree = {"type": "DisruptionTarget", "status": "True"}
"""The condition of a pod whose node was taken away, drained, or needed by others."""


def failure_policy() -> Tree:
    """podFailurePolicy of a Job. What no rule matches counts against backoffLimit."""
    return {
        "rules": [
            on_disruption("Ignore"),
            on_exit("FailJob", exits.codes("no"), TRAINER),
            on_exit("Ignore", exits.codes("uncounted"), TRAINER),
        ]
    }


def on_exit(action: str, codes: list[int], container: str) -> Tree:
    """A rule of podFailurePolicy for exit codes."""
    return {
        "action": action,
        "onExitCodes": {"containerName": container, "operator": "In", "values": codes},
    }


def on_disruption(action: str) -> Tree:
    """A rule of podFailurePolicy for pods that had to go."""
    return {"action": action, "onPodConditions": [dict(DISRUPTED)]}


def gang_policy(container: str) -> Tree:
    """podFailurePolicy of a Job whose pods start again together: each failure that says something ends it,
    and whoever made it decides by `restart_rules`."""
    return {
        "rules": [
            on_disruption("FailJob"),
            on_exit("FailJob", exits.codes("no"), container),
            on_exit("FailJob", exits.codes("uncounted"), container),
        ]
    }


def restart_rules() -> list[Tree]:
    """Rules of a JobSet's failurePolicy. What none matches restarts all, counted by maxRestarts.

    A Job that a rule of its podFailurePolicy ended has the reason PodFailurePolicy, whatever the rule: exit
    codes that are not retried are told from disruptions by the message.
    """
    codes = "|".join(str(code) for code in exits.codes("no"))
    return [
        {
            "name": "giveUp",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [f"failed with exit code ({codes}) matching"],
        },
        {"name": "outOfTime", "action": "FailJobSet", "onJobFailureReasons": ["DeadlineExceeded"]},
        {
            "name": "goOn",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
        },
    ]
