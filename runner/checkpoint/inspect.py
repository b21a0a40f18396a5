"""What a run's store holds, by reading alone: the checkpoints as a list, and every byte of them verified.

    list      HEAD and the manifests
    verify    every object that a retained checkpoint or the end of the run names, compared with its SHA-256

A live run collects while one reads. So whatever turns out missing is looked up in `HEAD` once more, and is
wrong only if `HEAD` still names it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from runner.checkpoint.find import head_of
from runner.checkpoint.head import BLOBS, MANIFESTS, Blob, Entry, Head, Manifest
from runner.checkpoint.manifests import Manifests
from runner.checkpoint.restore import fetch_file
from runner.checkpoint.store import Missing, Store
from runner.durable import scratch
from runner.errors import DataError


@dataclass(frozen=True)
class Row:
    """A checkpoint and its manifest."""

    entry: Entry
    manifest: Manifest | None
    problem: str | None = None
    """Why there is no manifest."""

    @property
    def size(self) -> int | None:
        """Bytes of its files; None without a manifest."""
        return None if self.manifest is None else sum(blob.size for blob in self.manifest.files.values())


@dataclass(frozen=True)
class Wrong:
    """An object that is not what `HEAD` promises."""

    key: str
    problem: str
    """missing, damaged, or manifest: not the one that was committed."""
    reason: str


@dataclass(frozen=True)
class Checked:
    """One checkpoint after every byte of it was read."""

    entry: Entry
    files: int | None
    """None where the manifest cannot be read."""
    size: int | None
    wrong: tuple[Wrong, ...]


@dataclass(frozen=True)
class Orphans:
    """Objects that nothing in `HEAD` names: of a killed owner, or of a live one's next checkpoint."""

    manifests: tuple[str, ...]
    blobs: tuple[str, ...]

    def __str__(self) -> str:
        return f"{_counted(len(self.blobs), 'blob')} and {_counted(len(self.manifests), 'manifest')}"


@dataclass(frozen=True)
class Verdict:
    """What `verify` found."""

    checked: tuple[Checked, ...]
    collected: tuple[Entry, ...]
    """What a live run stopped to retain meanwhile."""
    orphans: Orphans | None
    """None where nobody looked, or a manifest that is needed cannot be read."""

    @property
    def whole(self) -> bool:
        """Whether all that is retained is what was committed."""
        return not any(one.wrong for one in self.checked)


def rows(store: Store) -> tuple[Head, dict[str, Row]]:
    """`HEAD`, and what it names by manifest key: the retained checkpoints, newest first, then the end.

    Raises:
        DataError: there is no run, or its `HEAD` cannot be read.
    """
    manifests = Manifests(store)
    while True:
        head = head_of(store)
        listed = {entry.key: _row(manifests, entry) for entry in head.needed}
        if all(row.manifest is not None for row in listed.values()):
            return head, listed
        again = head_of(store)
        if again.needed == head.needed:
            return head, listed


def verify(store: Store, id: str | None, say: Callable[[Checked], object]) -> Verdict:
    """Read every byte of what `HEAD` retains, one file at a time.

    Args:
        id: of the one checkpoint to read; None: all, and the orphans are counted.
        say: takes each checkpoint as soon as it has been read.

    Raises:
        DataError: there is no run, or its `HEAD` cannot be read, or nothing in it has this id.
    """
    while True:
        head = head_of(store)
        entries = head.needed if id is None else (named(store, head, id),)
        manifests = Manifests(store)
        checked: list[Checked] = []
        collected: list[Entry] = []
        seen: dict[Blob, Wrong | None] = {}
        for entry in entries:
            one = _checked(store, manifests, entry, seen)
            if one.wrong and entry not in head_of(store).needed:
                collected.append(entry)
                continue
            checked.append(one)
            say(one)
        if checked or not collected:
            orphans = None if id is not None else _orphans(store, manifests, checked, collected)
            return Verdict(tuple(checked), tuple(collected), orphans)


def named(store: Store, head: Head, id: str) -> Entry:
    """The checkpoint of this id.

    Raises:
        DataError: `HEAD` does not retain it.
    """
    for entry in head.needed:
        if entry.id == id:
            return entry
    kept = ", ".join(entry.id for entry in head.needed) or "none"
    raise DataError(f"{store.place}: checkpoint {id} is not retained; remedy: name one that is: {kept}")


def orphans(store: Store, named: Collection[str]) -> Orphans:
    """Objects outside `named`, which are keys of manifests and of blobs."""

    def outside(prefix: str) -> tuple[str, ...]:
        return tuple(key for key in store.keys(prefix) if key not in named)

    return Orphans(outside(MANIFESTS), outside(BLOBS))


def keys_of(manifests: Manifests, entries: Iterable[Entry]) -> Iterator[str]:
    """The keys that checkpoints need.

    Raises:
        DataError: a manifest cannot be read.
    """
    for entry in entries:
        yield entry.key
        yield from (blob.key for blob in manifests.get(entry).files.values())


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _row(manifests: Manifests, entry: Entry) -> Row:
    try:
        return Row(entry, manifests.get(entry))
    except DataError as error:
        return Row(entry, None, str(error))


def _checked(store: Store, manifests: Manifests, entry: Entry, seen: dict[Blob, Wrong | None]) -> Checked:
    try:
        manifest = manifests.get(entry)
    except Missing as error:
        return Checked(entry, None, None, (Wrong(entry.key, "missing", str(error)),))
    except DataError as error:
        return Checked(entry, None, None, (Wrong(entry.key, "manifest", str(error)),))
    wrong = []
    for _, blob in sorted(manifest.files.items()):
        if blob not in seen:
            seen[blob] = _read(store, entry, blob)
        if (harm := seen[blob]) is not None and harm not in wrong:
            wrong.append(harm)
    size = sum(blob.size for blob in manifest.files.values())
    return Checked(entry, len(manifest.files), size, tuple(wrong))


def _read(store: Store, entry: Entry, blob: Blob) -> Wrong | None:
    """What is wrong with one object. It is in a file on the disk while it is read, never in memory."""
    with scratch("verify a checkpoint") as folder:
        try:
            fetch_file(store, entry.id, blob, folder / "blob")
        except Missing as error:
            return Wrong(blob.key, "missing", str(error))
        except DataError as error:
            return Wrong(blob.key, "damaged", str(error))
    return None


def _orphans(
    store: Store, manifests: Manifests, checked: Iterable[Checked], collected: Iterable[Entry]
) -> Orphans | None:
    """What `HEAD` names now, or named before, is none."""
    entries = dict.fromkeys((*(one.entry for one in checked), *head_of(store).needed))
    try:
        known = {*keys_of(manifests, entries), *(entry.key for entry in collected)}
    except DataError:
        return None
    return orphans(store, known)
