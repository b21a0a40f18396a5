"""Which node this is: the rows of the tables in runner/topology.py, and what each refusal says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runner.errors import JobError
from runner.topology import PORT, first_host, topology

ROOT = Path(__file__).parents[1]

TORCH = {"PET_NODE_RANK": "1", "PET_NNODES": "2", "PET_MASTER_ADDR": "a"}
BATCH = {"AWS_BATCH_JOB_NUM_NODES": "3", "AWS_BATCH_JOB_MAIN_NODE_INDEX": "1"}
MAIN = {"AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS": "10.0.0.9"}
SLURM = {"SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[003-007,9]"}
POD = {"JOB_COMPLETION_INDEX": "1"}


@pytest.mark.parametrize(
    ("nodes", "environ", "hostname", "index", "address", "port"),
    [
        (1, {}, "here", 0, "127.0.0.1", PORT),
        (1, TORCH, "here", 0, "127.0.0.1", PORT),
        (2, {"RUNNER_NODE_RANK": "1", "RUNNER_LEADER": "a"}, "here", 1, "a", PORT),
        (2, {"RUNNER_NODE_RANK": "1", "RUNNER_LEADER": "a:5"}, "here", 1, "a", 5),
        (2, {"RUNNER_NODE_RANK": "0", "RUNNER_LEADER": "[fd00::9]:5"}, "here", 0, "fd00::9", 5),
        (2, {"RUNNER_NODE_RANK": "0", "RUNNER_LEADER": "fd00::9"}, "here", 0, "fd00::9", PORT),
        (2, TORCH, "here", 1, "a", PORT),
        (2, TORCH | {"PET_MASTER_PORT": "7"}, "here", 1, "a", 7),
        (2, TORCH | {"RUNNER_LEADER": "b"}, "here", 1, "b", PORT),
        (2, TORCH | {"RUNNER_NODE_RANK": "0", "RUNNER_LEADER": "b"}, "here", 0, "b", PORT),
        (2, TORCH | {"RUNNER_NODE_RANK": ""}, "here", 1, "a", PORT),
        (2, TORCH | {"JOB_COMPLETION_INDEX": "0"}, "t-node-0-1.t", 1, "a", PORT),
        (2, POD, "t-1.s.n.svc", 1, "t-0.s.n.svc", PORT),
        (2, POD | {"JOB_COMPLETION_INDEX": "0"}, "t-0.s.n.svc", 0, "t-0.s.n.svc", PORT),
        (12, POD | {"JOB_COMPLETION_INDEX": "11"}, "set-train-0-11.set", 11, "set-train-0-0.set", PORT),
        (2, POD | {"RUNNER_LEADER": "b:9"}, "t-1", 1, "b", 9),
        (3, BATCH | {"AWS_BATCH_JOB_NODE_INDEX": "1"}, "ip-10", 0, "ip-10", PORT),
        (3, BATCH | MAIN | {"AWS_BATCH_JOB_NODE_INDEX": "0"}, "ip-11", 1, "10.0.0.9", PORT),
        (3, BATCH | MAIN | {"AWS_BATCH_JOB_NODE_INDEX": "2"}, "ip-12", 2, "10.0.0.9", PORT),
        (2, SLURM, "gpu004", 1, "gpu003", PORT),
        (2, SLURM | {"SLURM_STEP_NODELIST": "gpu[006,007]"}, "gpu007", 1, "gpu006", PORT),
    ],
)
def test_a_place(
    nodes: int, environ: dict[str, str], hostname: str, index: int, address: str, port: int
) -> None:
    found = topology(environ, nodes, hostname)
    assert (found.index, found.count, found.address, found.port) == (index, nodes, address, port)


@pytest.mark.parametrize(
    ("environ", "hostname", "where", "reason"),
    [
        ({}, "here", "environment", "nothing says which"),
        ({"RUNNER_LEADER": "a"}, "here", "environment", "nothing says which"),
        ({"RUNNER_NODE_RANK": "1"}, "here", "RUNNER_NODE_RANK", "RUNNER_LEADER is not"),
        (
            {"RUNNER_NODE_RANK": "2", "RUNNER_LEADER": "a"},
            "here",
            "RUNNER_NODE_RANK",
            "no number from 0 to 1",
        ),
        (
            {"RUNNER_NODE_RANK": "-1", "RUNNER_LEADER": "a"},
            "here",
            "RUNNER_NODE_RANK",
            "no number from 0 to 1",
        ),
        ({"RUNNER_NODE_RANK": "1", "RUNNER_LEADER": "a:0"}, "here", "RUNNER_LEADER", "no host and port"),
        ({"RUNNER_NODE_RANK": "1", "RUNNER_LEADER": "a:x"}, "here", "RUNNER_LEADER", "no host and port"),
        ({"RUNNER_NODE_RANK": "1", "RUNNER_LEADER": "//a"}, "here", "RUNNER_LEADER", "no host and port"),
        (
            {"RUNNER_NODE_RANK": "1", "RUNNER_LEADER": "xn--h\u00f6st"},
            "here",
            "RUNNER_NODE_RANK",
            "no host name",
        ),
        (TORCH | {"PET_NNODES": "4"}, "here", "PET_NNODES", "launch.nodes is 2"),
        (TORCH | {"PET_NNODES": "1:4"}, "here", "PET_NNODES", "started on 1:4 nodes"),
        (TORCH | {"PET_NNODES": ""}, "here", "PET_NNODES", "an unknown number of nodes"),
        (TORCH | {"PET_MASTER_ADDR": ""}, "here", "PET_NODE_RANK", "PET_MASTER_ADDR is not"),
        (TORCH | {"PET_MASTER_PORT": "http"}, "here", "PET_MASTER_PORT", "no number"),
        (POD, "t-1", "JOB_COMPLETION_INDEX", "headless service"),
        (POD, "t-7.s.n.svc", "JOB_COMPLETION_INDEX", "does not end with -1"),
        ({"AWS_BATCH_JOB_NODE_INDEX": "1"}, "ip", "AWS_BATCH_JOB_NUM_NODES", "unknown number"),
        (
            {
                "AWS_BATCH_JOB_NODE_INDEX": "1",
                "AWS_BATCH_JOB_NUM_NODES": "2",
                "AWS_BATCH_JOB_MAIN_NODE_INDEX": "0",
            },
            "ip",
            "AWS_BATCH_JOB_NODE_INDEX",
            "PRIVATE_IPV4_ADDRESS is not set",
        ),
        (SLURM | {"SLURM_LOCALID": "1"}, "gpu004", "SLURM_LOCALID", "not the first task"),
        (SLURM | {"SLURM_JOB_NODELIST": "[1-2"}, "gpu004", "SLURM_NODEID", "no host name"),
        (SLURM | {"SLURM_JOB_NODELIST": ""}, "gpu004", "SLURM_NODEID", "SLURM_JOB_NODELIST is not set"),
    ],
)
def test_a_refusal_names_place_reason_and_remedy(
    environ: dict[str, str], hostname: str, where: str, reason: str
) -> None:
    with pytest.raises(JobError) as caught:
        topology(environ, 2, hostname)
    [problem] = caught.value.problems
    assert problem.path == "launch.nodes"
    assert where in problem.where
    assert reason in problem.reason
    assert problem.remedy


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu[003-007,9]", "gpu003"),
        ("gpu[9,003-007]", "gpu9"),
        ("a1,b[2-3]", "a1"),
        ("a-1,b[2-3]", "a-1"),
        ("rack[1-2]n[3,5],c", "rack1n3"),
        ("gpu[1-2]-ib", "gpu1-ib"),
        ("alone", "alone"),
    ],
)
def test_the_first_host_of_a_slurm_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_the_page_says_what_the_code_reads() -> None:
    """Every variable in docs/nodes.md, the port, and the command lines of its example."""
    named = r"(?:RUNNER_NODE|RUNNER_LEADER|PET|JOB_COMPLETION|AWS_BATCH|SLURM)[A-Z0-9_]*"
    page, code = ((ROOT / path).read_text("utf-8") for path in ("docs/nodes.md", "runner/topology.py"))
    read = set(re.findall(rf'"({named})"', code))
    assert read - {"SLURM_LOCALID"} == set(re.findall(rf"\b({named})\b", page))
    assert f"port {PORT}" in page
    by_hand = re.findall(r"^RUNNER_NODE_RANK=(\d) RUNNER_LEADER=(\S+) runner", page, re.MULTILINE)
    for index, (rank, leader) in enumerate(by_hand):
        found = topology({"RUNNER_NODE_RANK": rank, "RUNNER_LEADER": leader}, 2, "here")
        assert (found.index, found.address) == (index, "gpu003")
    assert len(by_hand) == 2
