"""A store in memory, for simulations: the same contract, no clock and no failures of its own."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

from runner.checkpoint.store import Missing, Object
from runner.errors import DataError


class MemoryStore:
    """`runner.checkpoint.store.Store` in a dictionary. Several threads may use one."""

    place = "memory"

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self._lock = threading.Lock()
        self._count = 0

    def create(self, key: str, data: bytes) -> bool:
        with self._lock:
            if key not in self.objects:
                self._put(key, data)
            return self.objects[key].data == data

    def create_file(self, key: str, path: Path, size: int, sha256: str) -> bool:
        del size, sha256
        return self.create(key, path.read_bytes())

    def swap(self, key: str, data: bytes, etag: str | None) -> str | None:
        with self._lock:
            held = self.objects.get(key)
            if (None if held is None else held.etag) != etag:
                return None
            return self._put(key, data)

    def read(self, key: str) -> Object | None:
        return self.objects.get(key)

    def fetch(self, key: str, path: Path, size: int) -> str:
        held = self.objects.get(key)
        if held is None:
            raise Missing(f"{self.place}/{key}: no such object")
        if len(held.data) != size:
            raise DataError(f"{self.place}/{key}: the object has {len(held.data)} bytes, not {size}")
        path.write_bytes(held.data)
        return hashlib.sha256(held.data).hexdigest()

    def keys(self, prefix: str) -> Iterator[str]:
        yield from sorted(key for key in list(self.objects) if key.startswith(prefix))

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def close(self) -> None:
        pass

    def _put(self, key: str, data: bytes) -> str:
        self._count += 1
        self.objects[key] = Object(data, f"{self._count:08d}")
        return self.objects[key].etag
