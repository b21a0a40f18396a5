"""What a child does before it becomes its command (Linux): arrange to die with its supervisor, then exec.

    python -I -S shim.py SUPERVISOR COMMAND [ARGUMENT ...]

A program of its own, because code between fork and exec (`preexec_fn`) may deadlock in a process that has
threads. PDEATHSIG survives exec. Started for every child, so it imports little; nothing imports it.
"""

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_SIGKILL, _SIGPIPE, _SIGXFSZ = 9, 13, 25  # `signal` takes longer to import than all the rest
_SIG_DFL = None
_NOT_STARTED = 127
"""As a shell says it."""


def main(supervisor: int, command: list[str]) -> int:
    """Become the command. Returns only if that fails: the exit code."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    for number in (_SIGPIPE, _SIGXFSZ):  # Python ignores them, and the command would inherit that
        libc.signal(number, _SIG_DFL)
    try:
        # Of the two, the kernel shall kill this one for memory: the supervisor can go on with less.
        with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
            file.write("1000")
    except OSError:  # /proc may be closed to us
        pass
    if os.getppid() != supervisor:  # it died in between: the signal will not come
        return 1
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"start {command[0]}: {error.strerror}\n".encode())
        return _NOT_STARTED


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
