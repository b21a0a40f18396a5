"""A run's place in a store, from what a person types: the address of the run, or its folder `runs/<name>`.

Only reads. A place with nothing there is an error that names the runs one level below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from runner.checkpoint.folder import FolderStore
from runner.checkpoint.head import HEAD, MANIFESTS, Head, is_manifest
from runner.checkpoint.lease import found
from runner.checkpoint.store import Store
from runner.errors import DataError, JobError, UsageError

_LOOKED_AT = 10_000
"""Most keys that are listed in search of runs: ten requests."""

_NAMED = 12


@dataclass(frozen=True)
class Place:
    """How to open the store of a run."""

    uri: str
    open: Callable[[str], Store]
    """`runner.checkpoint.place.open_store` with everything else that it needs."""

    def store(self) -> Store:
        """The store; of a run folder, the one in `checkpoints/` inside it.

        Raises:
            UsageError: an address that leads nowhere.
        """
        try:
            store = self.open(self.uri)
        except JobError as error:
            problem = error.problems[0]
            raise UsageError(f"{problem.reason}\n    remedy: {problem.remedy}") from error
        if isinstance(store, FolderStore) and not holds_run(store):
            inner = self.open(f"{store.place}/{MANIFESTS.rstrip('/')}")
            if holds_run(inner):
                return inner
        return store


def head_of(store: Store) -> Head:
    """`HEAD` of the run in a store.

    Raises:
        DataError: there is no run, or its `HEAD` is missing or damaged.
    """
    held = found(store)
    if held is None:
        raise nothing(store)
    return held[0]


def nothing(store: Store) -> DataError:
    """The error for a place without a run."""
    keys = (key.partition("/") for key in islice(store.keys(""), _LOOKED_AT))
    below = sorted({name for name, _, rest in keys if rest in (HEAD, f"{MANIFESTS}{HEAD}")})
    if not below:
        return DataError(
            f"{store.place}: no run is there; remedy: give the address of a run, that is checkpoints.uri and "
            "the run's name: s3://bucket/prefix/name, or runs/name"
        )
    more = f" and {len(below) - _NAMED} more" if len(below) > _NAMED else ""
    return DataError(
        f"{store.place}: no run is there, but below it are {', '.join(below[:_NAMED])}{more}; remedy: add "
        f"the run's name, as {store.place}/{below[0]}"
    )


def holds_run(store: Store) -> bool:
    """Whether a run is in a store, which may have lost its `HEAD`."""
    return store.read(HEAD) is not None or any(map(is_manifest, store.keys(MANIFESTS)))
