"""`runner checkpoints VERB URI`: what a person may do with a run's store beside training it.

    ls, verify, pull     read, also while the run lives; pull writes a pin if it may
    gc, rm, adopt        take the run as a supervisor would, and refuse a live one

URI is the address of a run, `s3://bucket/prefix/name` or a folder, or the run's folder `runs/name`, which
tells those that read where its checkpoints are (`runner.run_words`). The output is for people, or for
programs with `--json` (docs/checkpoints.md). What is waited for goes to stderr, warnings too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.checkpoint import inspect, maintain
from runner.checkpoint.adopt import adopt, readable_head
from runner.checkpoint.collect import GRACE
from runner.checkpoint.find import Place, head_of
from runner.checkpoint.head import HEAD, MANIFESTS, Head, is_manifest, step_of
from runner.checkpoint.lease import Lease
from runner.checkpoint.place import open_store
from runner.checkpoint.pull import Wish, pull
from runner.checkpoint.store import BootClock, Clock, Patience, Store
from runner.command import Verb, complain, say
from runner.errors import DataError, UsageError
from runner.run_words import at

PATIENCE = 120.0
"""Seconds that a silent store is waited for. A person waits, not a GPU."""


def store_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("buckets, as in the job's checkpoints section")
    group.add_argument("--kms-key-id", metavar="KEY", help="key of SSE-KMS for what is written")
    group.add_argument("--expected-bucket-owner", metavar="ACCOUNT", help="account that must own the bucket")
    group.add_argument("--allow-unfenced", action="store_true", help="the store has no conditional writes")


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("uri", metavar="URI", help="s3://bucket/prefix/name, a folder, or runs/name")
    store_arguments(parser)


def _ls_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("--json", action="store_true", help="for programs")


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    _ls_arguments(parser)
    parser.add_argument("--id", metavar="ID", help="only this checkpoint")


def _pull_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--id", metavar="ID", help="this checkpoint (default: the newest, or the end of a run)"
    )
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step")
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--checkpoint", action="store_true", help="the files as they are, not the adapter")


def _gc_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    _grace_argument(parser)


def _grace_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-grace",
        action="store_true",
        help=f"nobody reads without a pin: delete now, not in {GRACE / 60:.0f} minutes",
    )


def _adopt_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("uri", metavar="MANIFEST", help="URI/checkpoints/<manifest>.json")
    parser.add_argument("--replace", action="store_true", help="also where HEAD is whole")
    store_arguments(parser)


def _rm_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("--id", metavar="ID", help="only this checkpoint; never the last")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    _grace_argument(parser)


# --- reading ---


def _ls(arguments: argparse.Namespace) -> int:
    store = place_of(arguments).store()
    head, rows = inspect.rows(store)
    if arguments.json:
        _say_json(_listed(store, head, rows))
        return 0
    say(f"{store.place}\n{_state(head)}")
    table = [("", "id", "step", "files", "bytes")]
    for entry in head.needed:
        row = rows[entry.key]
        mark = "end" if entry == head.final else "head" if entry == head.newest else ""
        table.append((mark, entry.id, *_counts(entry.step, _files(row), row.size)))
    table += [("bad", *_of_key(key)) for key in head.bad]
    say(_aligned(table) if len(table) > 1 else "no checkpoint yet")
    for row in rows.values():
        if row.problem is not None:
            complain(f"warning: {row.problem}")
    return 0


def _listed(store: Store, head: Head, rows: Mapping[str, inspect.Row]) -> dict[str, Any]:
    """`ls --json`."""

    def row(key: str) -> dict[str, Any]:
        one = rows[key]
        return {
            "id": one.entry.id,
            "step": one.entry.step,
            "key": key,
            "files": _files(one),
            "bytes": one.size,
            "problem": one.problem,
        }

    return {
        "place": store.place,
        "state": head.state,
        "epoch": head.epoch,
        "owner": head.owner.model_dump(mode="json", include={"attempt", "host", "job"}),
        "checkpoints": [row(entry.key) for entry in head.retained],
        "final": None if head.final is None else row(head.final.key),
        "bad": list(head.bad),
    }


def _verify(arguments: argparse.Namespace) -> int:
    store = place_of(arguments).store()

    def show(one: inspect.Checked) -> None:
        if not arguments.json:
            word = "wrong" if one.wrong else "whole"
            say(f"{word}  {one.entry.id}  step {one.entry.step}{_extent(one)}")
            for harm in one.wrong:
                say(f"       {store.place}/{harm.key}: {harm.problem}: {harm.reason}")

    verdict = inspect.verify(store, arguments.id, show)
    if arguments.json:
        _say_json(_verified(store, verdict))
    else:
        for entry in verdict.collected:
            say(f"gone   {entry.id}  step {entry.step}: collected by its owner meanwhile")
        if verdict.orphans is not None:
            say(f"{verdict.orphans} that nothing retained names")
        if not verdict.whole:
            complain(
                f"{store.place}: what is retained is not whole\n    remedy: bring back what was lost "
                "(versioned buckets keep it); the next train goes back to the newest checkpoint that is whole"
            )
    return 0 if verdict.whole else DataError.exit_code


def _verified(store: Store, verdict: inspect.Verdict) -> dict[str, Any]:
    """`verify --json`."""
    checkpoints = [
        {
            "id": one.entry.id,
            "step": one.entry.step,
            "files": one.files,
            "bytes": one.size,
            "wrong": [{"key": bad.key, "problem": bad.problem, "reason": bad.reason} for bad in one.wrong],
        }
        for one in verdict.checked
    ]
    orphans = verdict.orphans
    return {
        "place": store.place,
        "whole": verdict.whole,
        "checkpoints": checkpoints,
        "collected": [entry.id for entry in verdict.collected],
        "orphans": None
        if orphans is None
        else {"blobs": len(orphans.blobs), "manifests": len(orphans.manifests)},
    }


def _pull(arguments: argparse.Namespace) -> int:
    place = place_of(arguments)
    store = place.store()
    wish = Wish(arguments.id, arguments.step, arguments.checkpoint)
    to = arguments.to.expanduser().absolute()
    done = pull(store, place.open(store.place), wish, to, lambda line: complain(f"warning: {line}"))
    say(f"{done.what} of checkpoint {done.entry.id}, step {done.step}: {arguments.to}")
    return 0


# --- changing ---


def _gc(arguments: argparse.Namespace) -> int:
    _say_deleted(maintain.collect(_work(arguments), _grace(arguments)))
    return 0


def _adopt(arguments: argparse.Namespace) -> int:
    run, slash, name = arguments.uri.rpartition(f"/{MANIFESTS}")
    key = f"{MANIFESTS}{name}"
    if not slash or not is_manifest(key):
        raise UsageError(
            f"adopt: {arguments.uri!r} is not the address of a manifest\n"
            f"    remedy: write URI/{MANIFESTS}<manifest>.json, as runner train named it"
        )
    arguments.uri = run
    work = _work(arguments)
    owner = maintain.owner("adopt")
    lease = Lease(work.store, owner, work.clock, work.patience)
    head = adopt(work.store, key, lease, owner, work.patience, arguments.replace, work.say)
    kept = ", ".join(f"{entry.id} (step {entry.step})" for entry in head.retained)
    say(f"{work.store.place}: epoch {head.epoch}, released, with {kept}; runner train goes on from there")
    return 0


def _rm(arguments: argparse.Namespace) -> int:
    work = _work(arguments)
    if arguments.id is not None:
        entry = inspect.named(work.store, head_of(work.store), arguments.id)
        _confirm(f"checkpoint {entry.id}, step {entry.step}, of {work.store.place}", arguments.yes)
        _say_deleted(maintain.drop(work, arguments.id, _grace(arguments)))
        return 0
    head, etag = readable_head(work.store)
    if head is not None:
        what = f"{_state(head)}, {len(head.needed)} checkpoints"
    else:
        what = f"{HEAD} is {'missing' if etag is None else 'damaged'}"
    _confirm(f"the whole run {work.store.place} ({what})", arguments.yes)
    _say_deleted(maintain.remove(work))
    return 0


def _confirm(what: str, yes: bool) -> None:
    """Ask a person.

    Raises:
        UsageError: there is nobody to ask, or the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"rm: this deletes {what}\n    remedy: say that it shall: --yes")
    complain(f"delete {what}? Type yes:")
    if sys.stdin.readline().strip() != "yes":
        raise UsageError("rm: nothing was deleted\n    remedy: type yes")


# --- what they share ---


def closing(act: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """`act`, after which every store that it opened is closed."""

    def acting(arguments: argparse.Namespace) -> int:
        with contextlib.ExitStack() as arguments.opened:
            return act(arguments)

    return acting


def _reading(act: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """`act` on the run that URI names, which may be the folder of one with its checkpoints elsewhere."""

    def acting(arguments: argparse.Namespace) -> int:
        at(arguments.uri).reach(arguments)
        return closing(act)(arguments)

    return acting


def _deleting(act: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """`act` on the run at URI itself: a folder, of which there are copies, deletes nothing elsewhere."""

    def acting(arguments: argparse.Namespace) -> int:
        run = at(arguments.uri)
        if run.folder is not None and (place := run.place) != str(run.folder):
            raise UsageError(
                f"{arguments.uri} keeps its checkpoints in {place}\n"
                "    remedy: name that address, if what is there shall be deleted"
            )
        return closing(act)(arguments)

    return acting


def place_of(arguments: argparse.Namespace) -> Place:
    patience = _patience(BootClock())

    def opened(uri: str) -> Store:
        store = open_store(
            uri,
            patience,
            fenced=not arguments.allow_unfenced,
            kms_key=arguments.kms_key_id,
            bucket_owner=arguments.expected_bucket_owner,
        )
        arguments.opened.callback(store.close)
        return store

    return Place(arguments.uri.rstrip("/"), opened)


def _work(arguments: argparse.Namespace) -> maintain.Work:
    clock = BootClock()
    return maintain.Work(place_of(arguments).store(), clock, _patience(clock), complain)


def _patience(clock: Clock) -> Patience:
    return Patience(PATIENCE, clock, lambda event: complain(f"waiting for the store: {event['message']}"))


def _grace(arguments: argparse.Namespace) -> float:
    return 0.0 if arguments.no_grace else GRACE


def _state(head: Head) -> str:
    whose = f" by {head.owner.attempt} on {head.owner.host}"
    words = {
        "held": f"held{whose}",
        "released": "released: the next train goes on",
        "done": "done",
        "removing": f"being removed{whose}: runner checkpoints rm finishes it",
    }
    return f"{words[head.state]}, epoch {head.epoch}"


def _of_key(key: str) -> tuple[str, str, str, str]:
    """Cells of a checkpoint of which only the key is left."""
    return key.removeprefix(MANIFESTS).removesuffix(".json").split("-", 2)[-1], *_counts(
        step_of(key), None, None
    )


def _files(row: inspect.Row) -> int | None:
    return None if row.manifest is None else len(row.manifest.files)


def _counts(step: int, *numbers: int | None) -> tuple[str, str, str]:
    files, size = ("?" if number is None else f"{number:,}" for number in numbers)
    return f"{step}", files, size


def _extent(one: inspect.Checked) -> str:
    return "" if one.files is None else f"  {one.files} files  {one.size:,} bytes"


def _aligned(table: Sequence[tuple[str, str, str, str, str]]) -> str:
    """Columns: words to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(5)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )


def _say_deleted(keys: Iterable[str]) -> None:
    keys = list(keys)
    say(
        "".join(f"deleted {key}\n" for key in keys)
        + f"{len(keys)} object{'' if len(keys) == 1 else 's'} deleted"
    )


def _say_json(value: Any) -> None:
    say(json.dumps(value, indent=2))


VERBS = {
    "ls": Verb(
        "Who holds a run, and its checkpoints, newest first.",
        "  runner checkpoints ls s3://bucket/prefix/my-charts\n"
        "  runner checkpoints ls runs/my-charts --json\n",
        _ls_arguments,
        _reading(_ls),
    ),
    "verify": Verb(
        "Read every byte of what is retained; 65 if anything is wrong.",
        "  runner checkpoints verify s3://bucket/prefix/my-charts\n"
        "  runner checkpoints verify runs/my-charts --id 00000120-0002\n",
        _verify_arguments,
        _reading(_verify),
    ),
    "pull": Verb(
        "Get the adapter, also out of a run that trains.",
        "  runner checkpoints pull s3://bucket/prefix/my-charts --to my-adapter\n"
        "  runner checkpoints pull runs/my-charts --step 120 --to state-120 --checkpoint\n",
        _pull_arguments,
        _reading(_pull),
    ),
    "gc": Verb(
        "Delete what nothing retained names. Refuses a live run.",
        "  runner checkpoints gc s3://bucket/prefix/my-charts\n"
        "  runner checkpoints gc runs/my-charts --no-grace\n",
        _gc_arguments,
        _deleting(_gc),
    ),
    "adopt": Verb(
        "Make a checkpoint the head of a run whose HEAD is lost.",
        "  runner checkpoints adopt s3://bucket/prefix/my-charts/checkpoints/00000120-000002-ID.json\n",
        _adopt_arguments,
        closing(_adopt),
    ),
    "rm": Verb(
        "Delete a run, or one of its checkpoints. Refuses a live run.",
        "  runner checkpoints rm s3://bucket/prefix/my-charts\n"
        "  runner checkpoints rm runs/my-charts --id 00000120-0002 --yes\n",
        _rm_arguments,
        _deleting(_rm),
    ),
}
