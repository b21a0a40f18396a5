"""Who a node is, and whether it may follow node 0. Pure.

Nodes that would train something else than node 0 are told apart before anything is started.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from runner import __version__
from runner.manifest import Job


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Hello:
    """Who a node is."""

    run: str
    """The job's name."""
    node: Annotated[int, Field(ge=0)]
    nodes: int
    """`launch.nodes`."""
    processes: Annotated[int, Field(ge=1)]
    """Ranks that this node can run."""
    job: dict[str, str]
    """Hash of each part of the resolved job (`job_hashes`)."""
    version: str = __version__
    """Of the runner; with another one a plan may mean something else."""


_HELLO = TypeAdapter(Hello)


def job_hashes(job: Job) -> dict[str, str]:
    """SHA-256 of each top-level part of a resolved job, shortened to 16 hexadecimal digits."""
    document = job.model_dump(mode="json")
    return {
        part: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
        for part, value in document.items()
    }


@dataclass(frozen=True)
class Refusal:
    """Why a node may not follow."""

    reason: str
    remedy: str
    final: bool = True
    """Whether it would be refused again."""


def judged(leader: Hello, document: Any, here: Collection[int]) -> Hello | Refusal:
    """Whether a node may follow. In this order:

        version    run        launch.nodes    index     job        here    answer
        another    -          -               -         -          -       refused: the image
        same       another    -               -         -          -       refused: the address
        same       same       another         -         -          -       refused: the number
        same       same       same            0, > n    -          -       refused: the index
        same       same       same            1 to n    another    -       refused: names the parts
        same       same       same            1 to n    same       yes     refused for now, as it may be dying
        same       same       same            1 to n    same       no      its hello

    Args:
        document: what the node said; one of another version may say it in other words.
        here: nodes that follow already.

    Raises:
        ValueError: it is no hello.
    """
    version = document.get("version") if isinstance(document, dict) else None
    if isinstance(version, str) and version != leader.version:
        both = f"node 0 runs vlm-runner {leader.version}, this node {version[:20]}"
        return Refusal(both, "start every node from the same image")
    node = _HELLO.validate_python(document)
    numbers = "number the nodes from 0, each once (docs/nodes.md)"
    if node.run != leader.run:
        return Refusal(
            f"node 0 leads run {leader.run}, this is run {node.run}",
            "give each run a node 0 or a port of its own (RUNNER_LEADER=host:port)",
        )
    if node.nodes != leader.nodes:
        return Refusal(f"launch.nodes is {leader.nodes} on node 0, {node.nodes} here", "make both the same")
    if not 0 < node.node < leader.nodes:
        return Refusal(f"node {node.node} is none of 1 to {leader.nodes - 1}", numbers)
    if node.job != leader.job:
        parts = sorted(p for p in leader.job.keys() | node.job.keys() if leader.job.get(p) != node.job.get(p))
        return Refusal(
            f"the job of this node differs from that of node 0 in {', '.join(parts)}",
            "give every node the same file, the same JOB__ variables and the same command line",
        )
    if node.node in here:
        return Refusal(f"another node {node.node} is connected", numbers, final=False)
    return node
