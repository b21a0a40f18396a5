"""Defects that are planted in a supervisor, to see that they are found: what cannot fail shows nothing.

forgets-a-blob       a file of a checkpoint is not sent
deletes-retained     the collector does not ask who names what it deletes
restores-nothing     a run that goes on begins again
swaps-blindly        HEAD is written without a condition
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tests.chaos.campaign import Model, remove
from tests.chaos.proxy import Strike
from tests.chaos.run import PREFIX, Arena, Kill, Run
from tests.chaos.verdict import judge


@dataclass(frozen=True)
class Defect:
    """What is planted, and what must be said about it."""

    plant: Callable[[], None]
    """In the supervisor's process."""
    said: str


def _forget_a_blob() -> None:
    from runner.checkpoint.s3 import S3Store

    send = S3Store.create_file

    def create_file(store: S3Store, key: str, path: Any, size: int, sha256: str) -> bool:
        return path.name == "state.bin" or send(store, key, path, size, sha256)

    S3Store.create_file = create_file  # type: ignore[method-assign]


def _delete_retained() -> None:
    from runner.checkpoint import collect

    collect.garbage = lambda keys, named, epoch: list(keys)


def _restore_nothing() -> None:
    from runner.supervisor import custody

    custody.restore = lambda *arguments: None


def _swap_blindly() -> None:
    from runner.checkpoint.s3 import S3Store

    put = S3Store._put

    def unconditional(store: S3Store, key: str, body: Any, sha256: bytes, condition: dict[str, Any]) -> Any:
        return put(store, key, body, sha256, {} if key == "HEAD" else condition)

    S3Store._put = unconditional  # type: ignore[method-assign]


DEFECTS = {
    "forgets-a-blob": Defect(_forget_a_blob, "is not written"),
    "deletes-retained": Defect(_delete_retained, "was deleted, and HEAD names it"),
    "restores-nothing": Defect(_restore_nothing, "began at step 0"),
    "swaps-blindly": Defect(_swap_blindly, "written on None"),
}


def plant(name: str) -> None:
    """Put a defect into this process."""
    DEFECTS[name].plant()


def unfound(arena: Arena, model: Model) -> Iterator[str]:
    """Play one run with each defect, killed once after its first commits; yields what nobody noticed."""
    for name, defect in DEFECTS.items():
        hurry = replace(model.kind.hurry, defect=name)
        run = Run(arena, f"defect-{name}", replace(model.kind, hurry=hurry))
        arena.observer.watch(run.name, PREFIX)
        run.command(Kill("supervisor", Strike(1, "after", "LIST pins")))
        run.command()
        wrong = [*judge(run, model.ending), *arena.observer.leave(run.name).violations]
        if not any(defect.said in one for one in wrong):
            yield f"the defect {name} was not found: {wrong}"
        remove(run)
