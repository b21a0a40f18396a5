"""The program of `tests.warm`: hands its output, pipes and environment to the test process, where the trainer
is forked, and ends as that does.

    python -I -S warm_client.py SOCKET MODULE [ARGUMENT ...]
"""

import json
import os
import signal
import socket
import sys


def main(address: str, command: list[str]) -> int:
    """Returns the trainer's exit code, or dies of its signal."""
    pipes = {name: int(value) for name, value in os.environ.items() if name.endswith("_FD")}
    asked = {"command": command, "environ": dict(os.environ), "pipes": list(pipes)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(address)
        socket.send_fds(connection, [json.dumps(asked).encode()], [1, 2, *pipes.values()])
        code = int(connection.recv(64))
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
