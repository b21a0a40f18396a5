"""A real S3 server in a process of its own (moto), and the environment in which boto3 finds it.

    python -m tests.s3_server PORT [WINDOW]

moto looks whether a condition holds and then stores, with nothing between that keeps others out: of several
creations of one key at once, two may win. This server lets in one write at a time, as a store must that
promises conditional writes.
"""

from __future__ import annotations

import contextlib
import io
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}

BUCKET = "bucket"


@contextlib.contextmanager
def s3_server(window: float = 0.0, module: str = __name__) -> Iterator[int]:
    """Run a server with one empty bucket; yields its port.

    Args:
        window: seconds that a write takes after its condition was found to hold.
        module: that is run: this one, or one that adds to it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", module, str(port), str(window)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, "the S3 server did not start"
            with contextlib.suppress(ConnectionError):
                connection = HTTPConnection("127.0.0.1", port)
                connection.request("PUT", f"/{BUCKET}")
                assert connection.getresponse().status == 200
                connection.close()
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


def one_write_at_a_time(store: Application) -> Application:
    """The same WSGI application, in which no request that may write meets another."""
    from werkzeug.wsgi import get_input_stream

    lock = threading.Lock()

    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return store(environ, start_response)
        # Before the lock: whoever is slow to send keeps nobody waiting.
        body = get_input_stream(environ).read()
        environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        with lock:
            return store(environ, start_response)

    return application


def serve(port: int, window: float, around: Callable[[Application], Application] = lambda moto: moto) -> None:
    """Never returns.

    Args:
        around: puts something before moto.
    """
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from moto.s3.models import S3Backend
    from werkzeug.serving import run_simple

    def late(write: Callable[..., Any]) -> Callable[..., Any]:
        def written(*arguments: Any, **options: Any) -> Any:
            time.sleep(window)
            return write(*arguments, **options)

        return written

    if window:
        S3Backend.put_object = late(S3Backend.put_object)
        S3Backend.complete_multipart_upload = late(S3Backend.complete_multipart_upload)
    moto = around(DomainDispatcherApplication(create_backend_app))
    run_simple(
        "127.0.0.1", port, one_write_at_a_time(moto), threaded=True, request_handler=MotoRequestHandler
    )


if __name__ == "__main__":
    serve(int(sys.argv[1]), float(sys.argv[2]))
