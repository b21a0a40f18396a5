"""What an attempt's processes find in their environment: the supervisor's own, without credentials, and their
place among the others.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from runner.plan import Strategy
from runner.supervisor.order import Share
from runner.supervisor.world import Machine

SECRET = (
    *("AWS_", "GOOGLE_", "AZURE_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
    *("WANDB_", "MLFLOW_", "DATABRICKS_", "TRACKIO_"),
)
"""Beginnings of variables that a trainer does not get."""

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch.distributed's `env://` reads. Those of whoever started the supervisor are not its trainers'."""

_HERE = "127.0.0.1"


def environ_of_trainer(
    environ: Mapping[str, str], processes: int, strategy: Strategy, machine: Machine
) -> dict[str, str]:
    """The supervisor's environment, with what a quiet trainer needs on top, and without credentials of
    stores: a trainer talks to none, and runs code of many packages (`SECRET`).

    CUDA_VISIBLE_DEVICES   0, 1, ...         as many as `processes`, of a supervisor that has none
                           its first ones    as many, of one that has a list; with one process TRL refuses
                                             DataParallel over several
                           the same          of one that hides all (empty, -1)

    OMP_NUM_THREADS        cores / processes with several processes, unless it is set: together they would
                                             start as many times the cores

    OMP_WAIT_POLICY        PASSIVE           unless it is set: on a machine with other work, threads that spin
                                             at OpenMP's barriers made a training step twenty times slower

    DS_ACCELERATOR         cpu               under ZeRO without a GPU: DeepSpeed guesses by what is installed

    Args:
        processes: on this machine.
    """
    numbers = ",".join(str(number) for number in range(processes))
    visible = environ.get("CUDA_VISIBLE_DEVICES", numbers).split(",")[:processes]
    result = {
        **{
            name: value
            for name, value in environ.items()
            if not name.startswith(SECRET) and name not in PLACE
        },
        "CUDA_VISIBLE_DEVICES": ",".join(visible),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }
    if processes > 1:
        result.setdefault("OMP_NUM_THREADS", str(max(1, machine.cores // processes)))
    if strategy.startswith("zero") and not machine.gpus:
        result["DS_ACCELERATOR"] = "cpu"
    return result


def environs_of_ranks(
    environ: Mapping[str, str],
    world: int,
    strategy: Strategy,
    machine: Machine,
    share: Share | None = None,
) -> list[dict[str, str]]:
    """The environment of each rank of this machine: that of a trainer, and where it meets the others
    (`PLACE`), if there are any.

    Args:
        share: the ranks of this machine; None: all are here. They meet at a port that is free now; one that
            is taken in between costs the attempt.
    """
    share = share or Share(0, world, _HERE, free_port(_HERE))
    common = environ_of_trainer(environ, share.processes, strategy, machine)
    if world == 1:
        return [common]
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(share.processes)}
    common |= {"MASTER_ADDR": share.address, "MASTER_PORT": str(share.port)}
    return [
        {**common, "RANK": str(share.first_rank + local), "LOCAL_RANK": str(local)}
        for local in range(share.processes)
    ]


def free_port(address: str = "") -> int:
    """A TCP port of this machine that nobody listens on now.

    Args:
        address: to listen on; all of this machine's if it is empty.
    """
    with socket.socket() as listener:
        listener.bind((address, 0))
        port: int = listener.getsockname()[1]
        return port
