"""The memory of this process's control group: how full it is, and how often the kernel has killed for it.

                 v2: /sys/fs/cgroup/<group>/               v1: /sys/fs/cgroup/memory/<group>/
    limit        memory.max                                memory.limit_in_bytes
    in use       memory.current                            memory.usage_in_bytes
    droppable    memory.stat: inactive_file, active_file,  memory.stat: total_inactive_file,
                 slab_reclaimable                          total_active_file
    kills        memory.events: oom_kill                   memory.oom_control: oom_kill

A trainer inherits the group of its supervisor. The counter of the victim's own group is raised whether the
limit is its own, that of a group above, or the machine's (Linux, mm/oom_kill.c, __oom_kill_process), so a
SIGKILL that raised it was for memory, and one that did not was somebody's.

A container may see its group's outer path, and its files at the root: every place is looked at, from the
group's up to the root.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")

NO_LIMIT = 1 << 60
"""Bytes above which a number is none; without a limit v1 says the largest that its counter holds."""


@dataclass(frozen=True)
class _Version:
    """The names of one version's files."""

    limit: str
    used: str
    droppable: tuple[str, ...]
    """Lines of `memory.stat`: what the kernel gives up before it kills."""
    kills: str


_V1 = _Version(
    limit="memory.limit_in_bytes",
    used="memory.usage_in_bytes",
    droppable=("total_inactive_file", "total_active_file"),
    kills="memory.oom_control",
)
_V2 = _Version(
    limit="memory.max",
    used="memory.current",
    droppable=("inactive_file", "active_file", "slab_reclaimable"),
    kills="memory.events",
)


def kills(root: Path = ROOT, own: Path = OWN) -> int | None:
    """Processes of this group that were killed for memory so far; None where nobody counts them."""
    for version, places in _groups(root, own):
        for folder in (places[0], places[-1]):  # not those between: others' kills count there
            count = _table(folder / version.kills).get("oom_kill")
            if count is not None:
                return count
    return None


def pressure(root: Path = ROOT, own: Path = OWN) -> float | None:
    """The share of the memory limit that is in use, without what the kernel can drop.

    Of this group and those above it, as far as they are visible, the one that is fullest.

    Returns:
        None where there is no limit, or nothing can be read.
    """
    shares = [_share(folder, version) for version, places in _groups(root, own) for folder in places]
    return max((share for share in shares if share is not None), default=None)


def _share(folder: Path, version: _Version) -> float | None:
    limit = _number(folder / version.limit)
    if limit is None or not 0 < limit < NO_LIMIT:
        return None
    used = _number(folder / version.used)
    if used is None:
        return None
    stat = _table(folder / "memory.stat")
    # The three files are not of one moment.
    return max(0, used - sum(stat.get(name, 0) for name in version.droppable)) / limit


def _groups(root: Path, own: Path) -> Iterator[tuple[_Version, list[Path]]]:
    """Where the files of this process's group may be, and of those above it up to the root."""
    for line in _lines(own):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, version = root, _V2
        elif "memory" in controllers.split(","):
            base, version = root / "memory", _V1
        else:
            continue
        parts = [part for part in path.split("/") if part]
        yield version, [base.joinpath(*parts[:length]) for length in range(len(parts), -1, -1)]


def _number(file: Path) -> int | None:
    lines = _lines(file)
    return int(lines[0]) if lines and lines[0].isdecimal() else None


def _table(file: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    pairs = [line.partition(" ") for line in _lines(file)]
    return {name: int(number) for name, _, number in pairs if number.isdecimal()}


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:  # no Linux, another version, or no right to look
        return []
