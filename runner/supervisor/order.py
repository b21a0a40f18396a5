"""One attempt as node 0 asks the other nodes for it, and the ranks that a node has in it. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from runner.plan import Plan
from runner.supervisor.wire import Message


@checked_dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class Order:
    """One attempt, as node 0 asks the others for it: `attempt` of `runner.supervisor.wire`."""

    attempt: int
    plan: Plan
    """With the paths of node 0. `restore`, `adapter` and `reference` are read by rank 0 alone and stay."""
    pins: dict[str, str]
    """Commits to fetch (`runner.supervisor.fetch.Request`)."""
    fingerprints: dict[str, str]
    """Of what is local on node 0 (`runner.supervisor.fetch.Answer`)."""
    processes: list[Annotated[int, Field(ge=1)]]
    """Ranks of each node, by its index."""
    address: str
    port: int
    """Where the ranks meet: rank 0 listens there."""

    def message(self) -> Message:
        return {"say": "attempt", **_READS.dump_python(self, mode="json")}


_READS: TypeAdapter[Order] = TypeAdapter(Order)


@dataclass(frozen=True)
class Share:
    """The ranks of one node."""

    first_rank: int
    """Of the whole world; the node's others follow it."""
    processes: int
    address: str
    port: int
    """Where all ranks meet."""


def ordered(message: Message) -> Order:
    """The order that a message carries."""
    return _READS.validate_json(json.dumps(message))


def share(order: Order, node: int) -> Share:
    """The ranks of a node: they are numbered node by node."""
    return Share(sum(order.processes[:node]), order.processes[node], order.address, order.port)
