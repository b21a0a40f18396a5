"""The checkpoint that an attempt goes on from, for machines that do not have it.

Node 0 restores it from the store; the others have no credentials there. Its files go to them as they are,
over the ranks' own connection, because transformers reads some by itself; whoever reads them finds the same
content, and says the same of what is wrong with it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from runner.durable import disk
from runner.plan import Plan
from runner.train.world import from_all, from_first, world

PIECE = 1 << 26
"""Bytes that are sent at once."""


def brought(plan: Plan) -> Plan:
    """The plan with a checkpoint that lies on this rank's machine. Collective.

    On the machine of rank 0 the plan as it is; on any other with `<attempt>/restored/<id>`, which the
    machine's first rank writes.

    Raises:
        StorageError, AccessDenied: the disk.
    """
    here = world()
    if plan.restore is None or here.size == here.local_size:
        return plan
    copy = plan.attempt_dir / "restored" / plan.restore.name
    writes = not here.beside_first and here.local_rank == 0
    with disk("read the checkpoint", plan.restore):
        names = from_first(_names(plan.restore) if here.first else [])
    for name in names:
        _send(plan.restore / name if here.first else None, copy / name if writes else None)
    from_all(None)  # nobody reads what is still being written
    return plan if here.beside_first else plan.model_copy(update={"restore": copy})


def _names(folder: Path) -> list[str]:
    """Of all files, as paths within the folder."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def _send(source: Path | None, target: Path | None) -> None:
    """One file, piece by piece. Collective.

    Args:
        source: on rank 0.
        target: on a rank that writes.
    """
    place = source or target
    with contextlib.ExitStack() as files:
        if place is not None:
            files.enter_context(disk("copy the checkpoint", place))
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
        reading = None if source is None else files.enter_context(source.open("rb"))
        writing = None if target is None else files.enter_context(target.open("wb"))
        while piece := from_first(b"" if reading is None else reading.read(PIECE)):
            if writing is not None:
                writing.write(piece)
