"""A run that has ended, out of its store: what `done` was committed with, and its events.

Read without a pin, as what a done run ended with is never collected.
"""

from __future__ import annotations

from pathlib import Path

from runner.checkpoint.find import head_of
from runner.checkpoint.head import EVENTS
from runner.checkpoint.manifests import Manifests
from runner.checkpoint.restore import fetch_files
from runner.checkpoint.store import Store
from runner.errors import DataError

_TRAINED = ("adapter/", "model/")
"""What a report does not show, and most of the bytes."""


def fetch(store: Store, folder: Path) -> Path:
    """Bring what a report shows into a folder that `runner.report.read` reads.

    Raises:
        DataError: there is no run, or it has not ended.
    """
    head = head_of(store)
    if head.final is None:
        raise DataError(
            f"report: the run in {store.place} has not ended, and until then its store has no predictions; "
            "remedy: name its folder (runs/<name>) on the machine that it is on, or ask runner status"
        )
    manifest = Manifests(store).get(head.final)
    wanted = {name: blob for name, blob in manifest.files.items() if not name.startswith(_TRAINED)}
    target = folder / "run"
    fetch_files(store, manifest.id, wanted, target)
    told = []
    for key in sorted(store.keys(EVENTS)):
        kept = store.read(key)
        told.append(b"" if kept is None else kept.data)
    (target / "events.jsonl").write_bytes(b"\n".join(told))
    return target
