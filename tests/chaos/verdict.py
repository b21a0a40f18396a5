"""What must hold of a run when it is done, whatever was done to it: an empty list, or what does not.

the end          byte by byte that of a run that nobody disturbed, here and in the store
HEAD             one line: every accepted write follows the one before; no epoch, no step falls; done stays
the store        every key is written once, under a condition; nothing that is retained is ever deleted
what is left     what HEAD names, events, identity; the outbox is empty; no process lives
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from runner.checkpoint.head import Entry, Head, Manifest, decode
from tests.chaos.observer import forward
from tests.chaos.proxy import Mutation
from tests.chaos.run import PREFIX, Kind, Run

Ending = Mapping[str, str]
"""SHA-256 of what a run ends with, by its path in the run's folder, and the public part of its result."""


def ending(folder: Path, kind: Kind) -> Ending:
    """What a run has ended with on a machine."""
    files = sorted(path for pattern in kind.kept for path in folder.glob(pattern) if path.is_file())
    found = {path.relative_to(folder).as_posix(): _sha256(path.read_bytes()) for path in files}
    result = json.loads((folder / "result.json").read_text())
    public = {key: result[key] for key in ("outcome", "exit_code", "steps", "metrics")}
    return {**found, "result": json.dumps(public, sort_keys=True)}


def judge(run: Run, expected: Ending, tidy: bool = True) -> list[str]:
    """All that is wrong with a run that has ended.

    Args:
        tidy: False where a second owner may have sent something after the last sweep.
    """
    run.settle()
    wrong = list(run.wrong)
    wrong += one_line(run.trace.heads())
    wrong += orderly(run.trace.mutations)
    head = run.head()
    if head is None or head.state != "done" or head.final is None:
        return [*wrong, f"HEAD is not done: {head}"]
    try:
        found = ending(run.path, run.kind)
    except FileNotFoundError as error:
        return [*wrong, f"the end is not on the machine that finished: {error}"]
    wrong += [f"ends with another {name}" for name in _differing(found, expected)]
    wrong += _final(run, head.final, expected)
    wrong += _left(run, head, tidy)
    outbox = sorted(path.name for path in run.path.glob("outbox/*"))
    if outbox:
        wrong.append(f"left in the outbox: {outbox}")
    return wrong


def one_line(heads: Sequence[Mutation]) -> list[str]:
    """What is wrong with the accepted writes of HEAD, in their order."""
    wrong: list[str] = []
    before: tuple[Mutation, Head] | None = None
    for one in heads:
        if one.method != "PUT":
            wrong.append("HEAD was deleted")
            continue
        head = decode(Head, one.body, "HEAD")
        if before is None:
            if one.condition != "*" or (head.seq, head.epoch) != (1, 1):
                wrong.append(f"the first HEAD is seq {head.seq}, epoch {head.epoch}, if {one.condition}")
        else:
            last, old = before
            said = f"HEAD {head.seq} after {old.seq}"
            if one.condition != last.etag:
                wrong.append(f"{said}: written on {one.condition}, not on {last.etag}")
            if head.seq != old.seq + 1:
                wrong.append(f"{said}: not the next")
            same = head.owner.attempt == old.owner.attempt
            if head.epoch != old.epoch + (not same):
                wrong.append(f"{said}: epoch {old.epoch} -> {head.epoch}, {'same' if same else 'new'} owner")
            new = [entry for entry in head.retained if entry not in old.retained]
            if len(new) > 1 or (new and head.retained[0] != new[0]):
                wrong.append(f"{said}: retains {[entry.id for entry in new]} all at once")
            wrong += forward(old, head)
        before = (one, head)
    return wrong


def orderly(mutations: Sequence[Mutation]) -> list[str]:
    """What is wrong with the writes: a key twice, no condition, a deletion of what is retained."""
    wrong: list[str] = []
    written: set[str] = set()
    manifests: dict[str, Manifest] = {}
    retained: set[str] = set()
    for one in mutations:
        if one.key == "HEAD":
            head = decode(Head, one.body, "HEAD")
            retained = set()
            for entry in (*head.retained, *([] if head.final is None else [head.final])):
                names = {entry.key, *(blob.key for blob in manifests[entry.key].files.values())}
                wrong += [f"HEAD {head.seq} names {key}, which is not written" for key in names - written]
                retained |= names
        elif one.method == "DELETE":
            if one.key in retained:
                wrong.append(f"{one.key} was deleted, and HEAD names it")
            written.discard(one.key)
        else:
            if one.condition is None:
                wrong.append(f"{one.key} was written without a condition")
            if one.key in written:
                wrong.append(f"{one.key} was written twice")
            written.add(one.key)
            if one.key.startswith("checkpoints/"):
                manifests[one.key] = decode(Manifest, one.body, one.key)
    return wrong


def _final(run: Run, final: Entry, expected: Ending) -> list[str]:
    """What is wrong with the end as the store has it."""
    data = run.bucket.read(PREFIX + final.key)
    if data is None:
        return [f"the manifest of the end is missing: {final.key}"]
    blobs = decode(Manifest, data, final.key).files
    names = [name for name in expected if name != "result"]
    return [f"the store ends with another {name}" for name in names if _differs(blobs, name, expected)]


def _differs(blobs: Mapping[str, object], name: str, expected: Ending) -> bool:
    blob = blobs.get(name)
    return blob is None or blob.sha256 != expected[name]  # type: ignore[attr-defined]


def _left(run: Run, head: Head, tidy: bool) -> list[str]:
    """What is in the store and should not be. Objects of a probe that was killed are counted elsewhere."""
    named = {"HEAD", "run.json"}
    for entry in (*head.retained, head.final):
        assert entry is not None
        data = run.bucket.read(PREFIX + entry.key)
        named |= {entry.key}
        if data is not None:
            named |= {blob.key for blob in decode(Manifest, data, entry.key).files.values()}
    keys = {key.removeprefix(PREFIX) for key in run.bucket.listed()}
    wrong = [f"missing in the store: {key}" for key in sorted(named - keys)]
    others = sorted(key for key in keys - named if not key.startswith(("events/", "probe/")))
    return wrong + ([f"left in the store: {others}"] if others and tidy and swept(run) else [])


def swept(run: Run) -> bool:
    """Whether the last owner had the time to delete what nobody names.

    A kill between `done` and its deletions leaves that for ever: nobody takes a run that is done. And what
    was late may have arrived after them.
    """
    late = any(killed.kill.strike and killed.kill.strike.side == "late" for killed in run.kills)
    return not late and not any(killed.done for killed in run.kills)


def _differing(found: Ending, expected: Ending) -> list[str]:
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
