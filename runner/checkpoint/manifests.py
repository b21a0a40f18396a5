"""The manifests of a run, each read once: they never change, and `HEAD` says what their bytes must be."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from runner.checkpoint.head import Entry, Manifest, decode, encode
from runner.checkpoint.store import Missing, Store
from runner.errors import DataError

TRIES = 2
"""Reads of an object that turns out damaged: once more, because the way may have been at fault."""


class Manifests:
    """Manifests by key, from memory or from the store.

    Args:
        say: takes an event about one that is read again.
    """

    def __init__(self, store: Store, say: Callable[[Mapping[str, Any]], None] = lambda event: None) -> None:
        self._store = store
        self._say = say
        self._kept: dict[str, Manifest] = {}

    def keep(self, key: str, manifest: Manifest) -> Entry:
        """Remember a manifest that was written under a key; returns what `HEAD` shall say about it."""
        self._kept[key] = manifest
        digest = hashlib.sha256(encode(manifest)).hexdigest()
        return Entry(id=manifest.id, step=manifest.step, key=key, manifest_sha256=digest)

    def forget(self, key: str) -> None:
        """Drop a manifest that is deleted."""
        self._kept.pop(key, None)

    def get(self, entry: Entry) -> Manifest:
        """The manifest of a committed checkpoint.

        Raises:
            Missing: it is not there.
            DataError: it is not the one that was committed.
            JobError: of a newer format.
        """
        if (kept := self._kept.get(entry.key)) is not None:
            return kept
        place = f"{self._store.place}/{entry.key}"
        for _ in range(TRIES):
            found = self._store.read(entry.key)
            if found is None:
                raise Missing(f"checkpoint {entry.id}: {place} is missing")
            if hashlib.sha256(found.data).hexdigest() == entry.manifest_sha256:
                self._kept[entry.key] = decode(Manifest, found.data, place)
                return self._kept[entry.key]
            reason = f"checkpoint {entry.id}: {place} is not the manifest that was committed"
            self._say({"event": "store", "message": reason, "waited": 0.0})
        raise DataError(reason)
