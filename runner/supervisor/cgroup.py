"""How often the kernel has killed for memory here: the counter of this process's control group.

    v2    /sys/fs/cgroup/<group>/memory.events               oom_kill 3
    v1    /sys/fs/cgroup/memory/<group>/memory.oom_control   oom_kill 3

A trainer inherits the group of its supervisor. The counter of the victim's own group is raised whether the
limit is its own, that of a group above, or the machine's (Linux, mm/oom_kill.c, __oom_kill_process), so a
SIGKILL that raised it was for memory, and one that did not was somebody's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def kills(root: Path = ROOT, own: Path = OWN) -> int | None:
    """Processes of this group that were killed for memory so far; None where nobody counts them."""
    for file in _counters(root, own):
        try:
            lines = file.read_text().splitlines()
        except OSError:  # another version, or no right to look: the next place
            continue
        for line in lines:
            name, _, count = line.partition(" ")
            if name == "oom_kill" and count.isdecimal():
                return int(count)
    return None


def _counters(root: Path, own: Path) -> Iterator[Path]:
    """Where the counter may be: a container may see its group's outer path, and its files at the root."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = root, "memory.events"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.oom_control"
        else:
            continue
        yield base / path.lstrip("/") / name
        yield base / name
