"""Which node of a run this machine is, and where node 0 listens. Pure: variables and a host name in.

The first row whose index is set decides; RUNNER_LEADER names the leader instead of any of them. An empty
variable counts as one that is not set.

    source        index                       count                      leader
    explicit      RUNNER_NODE_RANK            -                          RUNNER_LEADER=host[:port]
    torchrun      PET_NODE_RANK               PET_NNODES                 PET_MASTER_ADDR:PET_MASTER_PORT
    indexed job   JOB_COMPLETION_INDEX        -                          own host name, with index 0
    aws batch     AWS_BATCH_JOB_NODE_INDEX    AWS_BATCH_JOB_NUM_NODES    ..._MAIN_NODE_PRIVATE_IPV4_ADDRESS
    slurm         SLURM_NODEID                SLURM_NNODES               first of SLURM_STEP_NODELIST, without
                                                                         it of SLURM_JOB_NODELIST

    launch.nodes    what is set                                        answer
    1               anything                                           node 0, 127.0.0.1
    2               RUNNER_NODE_RANK=1 RUNNER_LEADER=a                 node 1, a:29400
    2               RUNNER_NODE_RANK=1 RUNNER_LEADER=a:5               node 1, a:5
    2               RUNNER_NODE_RANK=1                                 refused: RUNNER_LEADER is missing
    2               RUNNER_NODE_RANK=2 RUNNER_LEADER=a                 refused: nodes are 0 to 1
    2               PET_NODE_RANK=1 PET_NNODES=2 PET_MASTER_ADDR=a     node 1, a:29400
    2               the same with PET_MASTER_PORT=7                    node 1, a:7
    2               the same with PET_NNODES=4 or 1:4                  refused: launch.nodes is 2
    2               the same with RUNNER_LEADER=b                      node 1, b:29400
    2               JOB_COMPLETION_INDEX=1 on t-1.s.n.svc              node 1, t-0.s.n.svc:29400
    2               JOB_COMPLETION_INDEX=1 on t-1                      refused: it is in no headless service
    2               JOB_COMPLETION_INDEX=1 on t-7.s.n.svc              refused: the name does not end with -1
    3               AWS main node 1, this is node 1                    node 0, its own host name
    3               AWS main node 1, this is node 0, main at 10.0.0.9  node 1, 10.0.0.9:29400
    3               AWS main node 1, this is node 2, main at 10.0.0.9  node 2, 10.0.0.9:29400
    2               SLURM_NODEID=1 SLURM_NNODES=2 on gpu[003-007,9]    node 1, gpu003:29400
    2               the same with SLURM_LOCALID=1                      refused: a second task on this node
    2               nothing                                            refused: lists what would do
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from runner.errors import JobError, Problem

PORT = 29400
"""Where a leader listens unless something says another: torchrun's own default for its rendezvous."""

_HOST = re.compile(r"[^\s\[\]/@,:.]{1,63}(\.[^\s\[\]/@,:.]{1,63})*\.?")
_HOST_AND_PORT = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<host>[^\s\[\]/@,:]+))(?::(?P<port>[0-9]+))?")
_IPV6 = re.compile(r"[0-9a-fA-F]*:[0-9a-fA-F:.]*:[0-9a-fA-F.]*")

_WAYS = (
    "RUNNER_NODE_RANK and RUNNER_LEADER=host:port on every node; or start them as Kubeflow Trainer does "
    "(PET_NODE_RANK, PET_NNODES, PET_MASTER_ADDR), as an Indexed Job of Kubernetes with a headless service, "
    "as a multi-node job of AWS Batch, or under srun (docs/nodes.md shows each); or set launch.nodes to 1"
)


@dataclass(frozen=True)
class Topology:
    """One node's place among the nodes of a run."""

    index: int
    """Of this node; 0 leads."""
    count: int
    """Nodes."""
    address: str
    """Host name or IP address of node 0. On AWS Batch node 0 knows only its own host name; what the others
    reach it by is known when they have connected (`runner.supervisor.link.Leader.address`)."""
    port: int
    """TCP port that node 0 listens on."""
    source: str
    """What said so, for messages."""


def topology(environ: Mapping[str, str], nodes: int, hostname: str) -> Topology:
    """This node's place, by the tables above.

    Args:
        nodes: `launch.nodes`.
        hostname: of this machine, with its domain where it has one (`socket.getfqdn()`).

    Raises:
        JobError: nothing says it, or what does disagrees with the job.
    """
    if nodes == 1:
        return Topology(0, 1, "127.0.0.1", PORT, "launch.nodes is 1")
    place = _Place({name: value for name, value in environ.items() if value}, nodes, hostname)
    for variable, read in _SOURCES.items():
        if variable in place.environ:
            return read(place)
    raise place.refusal(
        "environment", f"{nodes} nodes, and nothing says which of them this is", f"set {_WAYS}"
    )


@dataclass(frozen=True)
class _Place:
    """What the sources read, and how they refuse."""

    environ: Mapping[str, str]
    nodes: int
    hostname: str

    def refusal(self, where: str, reason: str, remedy: str) -> JobError:
        return JobError([Problem("launch.nodes", reason, remedy, where)])

    def number(self, variable: str, most: int) -> int:
        """A whole number from 0."""
        text = self.environ.get(variable, "")
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) > most:
            what = f"{text!r} is no number from 0 to {most}" if text else "it is not set"
            raise self.refusal(
                f"environment {variable}", what, f"set it as docs/nodes.md says, or set {_WAYS}"
            )
        return int(text)

    def index(self, variable: str) -> int:
        return self.number(variable, self.nodes - 1)

    def same_count(self, variable: str) -> None:
        text = self.environ.get(variable, "")
        if text != str(self.nodes):
            raise self.refusal(
                f"environment {variable}",
                f"launch.nodes is {self.nodes}, and it was started on {text or 'an unknown number of'} nodes",
                "make both the same; a run whose nodes come and go while it trains is not supported",
            )

    def topology(self, index: int, source: str, address: str | None, port: int, missing: str) -> Topology:
        """With RUNNER_LEADER's address, else this one.

        Args:
            missing: what to say of an address that is None.
        """
        if leader := self.environ.get("RUNNER_LEADER"):
            address, port = self._leader(leader)
        if address is None or not _is_host(address):
            said = missing if address is None else f"{address!r} is no host name or IP address"
            raise self.refusal(
                source, said, "set RUNNER_LEADER=host:port on every node, host being that of node 0"
            )
        return Topology(index, self.nodes, address, port, source)

    def _leader(self, text: str) -> tuple[str, int]:
        if _IPV6.fullmatch(text):
            return text, PORT
        found = _HOST_AND_PORT.fullmatch(text)
        port = PORT if found is None or found["port"] is None else int(found["port"])
        if found is None or not 0 < port < 1 << 16:
            raise self.refusal(
                "environment RUNNER_LEADER",
                f"{text!r} is no host and port",
                "write the host of node 0, as gpu003, gpu003:29400, 10.0.0.9 or [fd00::9]:29400",
            )
        return found["six"] or found["host"], port


def _is_host(address: str) -> bool:
    """Whether it may be looked up; a name that IDNA cannot write is none."""
    try:
        address.encode("idna")
    except UnicodeError:
        return False
    return bool(_HOST.fullmatch(address) or _IPV6.fullmatch(address))


def _explicit(place: _Place) -> Topology:
    index = place.index("RUNNER_NODE_RANK")
    missing = "RUNNER_NODE_RANK is set and RUNNER_LEADER is not"
    return place.topology(index, "environment RUNNER_NODE_RANK", None, PORT, missing)


def _torchrun(place: _Place) -> Topology:
    index = place.index("PET_NODE_RANK")
    place.same_count("PET_NNODES")
    port = place.number("PET_MASTER_PORT", (1 << 16) - 1) if "PET_MASTER_PORT" in place.environ else PORT
    address, missing = place.environ.get("PET_MASTER_ADDR"), "PET_NODE_RANK is set and PET_MASTER_ADDR is not"
    return place.topology(index, "environment PET_NODE_RANK", address, port or PORT, missing)


def _indexed_job(place: _Place) -> Topology:
    """`<job>-<index>.<service>.<namespace>.svc.<cluster>`: the host names of an Indexed Job's pods."""
    index = place.index("JOB_COMPLETION_INDEX")
    host, dot, domain = place.hostname.partition(".")
    stem, address = host.removesuffix(f"-{index}"), None
    missing = f"this pod's host name {place.hostname} has no domain, so that no other pod can find node 0"
    if stem == host:
        missing = f"this pod's host name {place.hostname} does not end with -{index}"
    elif dot:
        address = f"{stem}-0.{domain}"
    return place.topology(
        index,
        "environment JOB_COMPLETION_INDEX",
        address,
        PORT,
        f"{missing}: give the pods a headless service as their subdomain",
    )


def _aws_batch(place: _Place) -> Topology:
    """The main node leads, whatever its index is; those before it move up by one."""
    here = place.index("AWS_BATCH_JOB_NODE_INDEX")
    place.same_count("AWS_BATCH_JOB_NUM_NODES")
    main = place.index("AWS_BATCH_JOB_MAIN_NODE_INDEX")
    index = 0 if here == main else here + 1 if here < main else here
    variable = "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS"  # of every node but the main one
    address = place.hostname if index == 0 else place.environ.get(variable)
    return place.topology(
        index, "environment AWS_BATCH_JOB_NODE_INDEX", address, PORT, f"{variable} is not set"
    )


def _slurm(place: _Place) -> Topology:
    index = place.index("SLURM_NODEID")
    place.same_count("SLURM_NNODES")
    if place.environ.get("SLURM_LOCALID", "0") != "0":
        raise place.refusal(
            "environment SLURM_LOCALID",
            "this is not the first task on its node, and one supervisor starts all processes of a node",
            "start one task on each node: srun --ntasks-per-node=1 runner train JOB",
        )
    # A step may run on fewer nodes than its job has; its nodes are numbered by its own list.
    hosts = place.environ.get("SLURM_STEP_NODELIST") or place.environ.get("SLURM_JOB_NODELIST")
    address = None if hosts is None else first_host(hosts)
    return place.topology(index, "environment SLURM_NODEID", address, PORT, "SLURM_JOB_NODELIST is not set")


def first_host(hosts: str) -> str:
    """The first host of a Slurm host list.

    gpu[003-007,9]     gpu003
    a1,b[2-3]          a1
    rack[1-2]n[3,5]    rack1n3
    gpu[1-2]-ib        gpu1-ib
    """
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])*", hosts)
    return re.sub(r"\[([^,\-\]]*)[^\]]*\]", r"\1", first[0] if first else "")


_SOURCES = {
    "RUNNER_NODE_RANK": _explicit,
    "PET_NODE_RANK": _torchrun,
    "JOB_COMPLETION_INDEX": _indexed_job,
    "AWS_BATCH_JOB_NODE_INDEX": _aws_batch,
    "SLURM_NODEID": _slurm,
}
"""By the variable that has the index, in order of precedence."""
