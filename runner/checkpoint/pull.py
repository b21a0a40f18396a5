"""An adapter, or a whole checkpoint, out of a run that may live, without disturbing it.

    pin, read HEAD, go on only if it is still retained -> fetch and verify -> the adapter -> one rename

The pin keeps what is read from collection. Without the right to write one the reader relies on the owner's
grace, and on this: what is missing is looked up in `HEAD` once more, and if `HEAD` does not retain it any
more, the reader starts over. The end of a done run holds the adapter as files; before it, a checkpoint holds
the trainer's state, which `runner.checkpoint.adapter_file` turns into one.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from runner.checkpoint.adapter_file import extract
from runner.checkpoint.files import move
from runner.checkpoint.find import head_of
from runner.checkpoint.head import PINS, TRAINED, Entry, Head, Manifest, Pin, encode
from runner.checkpoint.manifests import Manifests
from runner.checkpoint.restore import download, fetch_files
from runner.checkpoint.store import Store
from runner.durable import disk
from runner.errors import DataError, RunnerError, UsageError

PIN_TTL = 600.0
"""Seconds that a pin of a reader who was killed keeps a checkpoint."""

REFRESH_EVERY = PIN_TTL / 4

_ENDS = (("adapter/", "adapter"), ("model/", "model"))
"""Where the end of a run holds what was trained: an adapter, or after full fine-tuning the model."""


@dataclass(frozen=True)
class Wish:
    """What to pull."""

    id: str | None = None
    step: int | None = None
    """With neither: the newest that is whole, or what a done run ended with."""
    checkpoint: bool = False
    """The files as they were committed, instead of the adapter."""


@dataclass(frozen=True)
class Pulled:
    """What came."""

    entry: Entry
    what: str
    """adapter, model or checkpoint."""
    step: int
    """Whose parameters they are: of the end of a run that chose its best, not its last."""
    pinned: bool


def pull(
    store: Store,
    pins: Store,
    wish: Wish,
    to: Path,
    say: Callable[[str], object],
    refresh_every: float = REFRESH_EVERY,
) -> Pulled:
    """Fetch into a new folder, which appears whole or not at all.

    Args:
        pins: the same run in a store of its own, so that a missing right to write is told from one that
            worked before and is gone.
        say: takes warnings: no pin, a damaged checkpoint.
        refresh_every: seconds.

    Raises:
        UsageError: the folder is there already, with something in it.
        DataError: no such checkpoint, or it is damaged, or it has no adapter, or another step's.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"pull: {to} is there already\n    remedy: name a new folder, or an empty one")
    damaged: dict[Entry, str] = {}
    while True:
        entry = _chosen(store.place, head_of(store), wish, damaged)
        with _pinned(pins, entry, refresh_every, say) as pinned:
            head = head_of(store)
            if entry not in head.needed:
                continue
            try:
                what, step = _fetched(store, entry, entry == head.final, wish, to)
                return Pulled(entry, what, step, pinned)
            except _OtherStep as error:
                damaged[entry] = str(error)
                if all(one in damaged for one in candidates(head, wish)):
                    raise
            except DataError as error:
                if entry not in head_of(store).needed:
                    say(f"checkpoint {entry.id} was collected while it was read; starting over")
                    continue
                if wish.id is not None or wish.step is not None or isinstance(error, _NoAdapter):
                    raise
                damaged[entry] = str(error)
                say(f"{error}; going back to the checkpoint before")


def candidates(head: Head, wish: Wish) -> list[Entry]:
    """What a wish may mean, the best first.

    wanted       of a done run                       of another
    adapter      the end, then retained ones         retained ones, newest first
    checkpoint   retained ones, then the end         retained ones, newest first
    """
    ends = [] if head.final is None else [head.final]
    order = [*head.retained, *ends] if wish.checkpoint else [*ends, *head.retained]
    if wish.id is not None:
        return [entry for entry in order if entry.id == wish.id]
    if wish.step is not None:
        return [entry for entry in order if entry.step == wish.step]
    return order


def _chosen(place: str, head: Head, wish: Wish, damaged: dict[Entry, str]) -> Entry:
    possible = candidates(head, wish)
    for entry in possible:
        if entry not in damaged:
            return entry
    if possible:
        raise DataError(
            f"pull: no checkpoint in {place} is whole: {'; '.join(damaged[entry] for entry in possible)}; "
            "remedy: bring back what was lost (versioned buckets keep it)"
        )
    if not head.needed:
        raise DataError(f"pull: {place} has no checkpoint yet; remedy: wait for the first commit")
    wanted = f"checkpoint {wish.id}" if wish.id is not None else f"a checkpoint of step {wish.step}"
    kept = ", ".join(f"{entry.id} (step {entry.step})" for entry in head.needed)
    raise DataError(f"pull: {place} does not retain {wanted}; remedy: name one that it does: {kept}")


class _NoAdapter(DataError):
    """A whole checkpoint without an adapter."""


class _OtherStep(DataError):
    """The end of a run that holds another step's parameters than those that were asked for."""


def _fetched(store: Store, entry: Entry, end: bool, wish: Wish, to: Path) -> tuple[str, int]:
    """Fetch into `to`; returns what it is, and of which step."""
    manifest = Manifests(store).get(entry)
    step = entry.step
    if end and not wish.checkpoint:
        step = trained_step(entry, manifest)
        if wish.step not in (None, step):
            raise _OtherStep(
                f"pull: the end of {store.place} holds what was best, at step {step}, and no checkpoint of "
                f"step {wish.step} is retained; remedy: leave out --step"
            )
    with disk("pull a checkpoint", to):
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent) as scratch:
            made = _from_end if end else _from_checkpoint
            folder, what = made(store, manifest, wish, Path(scratch))
            move(folder, to)
    return what, step


def trained_step(end: Entry, manifest: Manifest) -> int:
    """The step whose parameters the end of a run holds; of one that does not tell, the last."""
    told = manifest.extra.get(TRAINED)
    return told if isinstance(told, int) else end.step


def _from_end(store: Store, manifest: Manifest, wish: Wish, scratch: Path) -> tuple[Path, str]:
    """The folder that was wanted, inside `scratch`, and what it is."""
    for prefix, what in (("", "checkpoint"),) if wish.checkpoint else _ENDS:
        files = {
            name.removeprefix(prefix): blob
            for name, blob in manifest.files.items()
            if name.startswith(prefix)
        }
        if files:
            fetch_files(store, manifest.id, files, scratch / what)
            return scratch / what, what
    raise _NoAdapter(f"pull: {manifest.id} of {store.place} has neither {' nor '.join(dict(_ENDS))}")


def _from_checkpoint(store: Store, manifest: Manifest, wish: Wish, scratch: Path) -> tuple[Path, str]:
    """As `_from_end`, from the trainer's state."""
    folder = download(store, manifest, scratch).folder
    if wish.checkpoint:
        return folder, "checkpoint"
    try:
        extract(folder, scratch / "adapter")
    except DataError as error:
        raise _NoAdapter(
            f"pull: checkpoint {manifest.id} of {store.place}: {error}; remedy: --checkpoint gives all "
            "that it has"
        ) from error
    return scratch / "adapter", "adapter"


@contextlib.contextmanager
def _pinned(store: Store, entry: Entry, refresh_every: float, say: Callable[[str], object]) -> Iterator[bool]:
    """Hold a pin on a checkpoint, if it can be written. Yields whether it was."""
    name, data = f"{PINS}{uuid.uuid4().hex}", encode(Pin(entry=entry, ttl_s=PIN_TTL))
    # Each refresh is a new key, because the same bytes under the old one could look unchanged. The one before
    # stays until the next: whoever lists a folder meanwhile might see neither.
    keys = (f"{name}-{number:06d}.json" for number in range(1_000_000))
    held = [next(keys)]
    try:
        store.create(held[0], data)
    except RunnerError as error:
        say(f"reading without a pin, in the owner's grace: {error}")
        yield False
        return
    ended = threading.Event()

    def refresh() -> None:
        while not ended.wait(refresh_every):
            try:
                held.append(next(keys))
                store.create(held[-1], data)
                if len(held) > 2:
                    store.delete(held[-3])
            except RunnerError as error:
                say(f"the pin is not refreshed any more: {error}")
                return

    thread = threading.Thread(target=refresh, daemon=True)
    thread.start()
    try:
        yield True
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(RunnerError):  # it ends by itself
            for key in held[-3:]:
                store.delete(key)
