"""Metadata servers of the three clouds, in threads of this process, and what such servers do wrong.

    with MetadataServer() as server:
        server.aws["spot/instance-action"] = {"action": "terminate", "time": "..."}
        server.how = "500"        # absent, slow, drip, garbage, closed, 401, 404, 500, flapping

They answer as the clouds' own documentation says: a token by PUT first, the headers that keep browsers out,
the long poll with its etag, events of all machines of a scale set.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

TOKEN = "AQAAAexample=="
MACHINE = "gpu-set_3"


class MetadataServer:
    """All three on one port."""

    def __init__(self) -> None:
        self.how = "well"
        self.aws: dict[str, Mapping[str, Any]] = {}
        """Path below meta-data to its document."""
        self.gce = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.azure: list[Mapping[str, Any]] = []
        self.asked: list[str] = []
        """Method and path of every request."""
        self._server: ThreadingHTTPServer | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                outer.answer(self)

            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, address: object) -> None:
                pass  # a client that had enough

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def host(self) -> str:
        assert self._server is not None
        return f"127.0.0.1:{self._server.server_address[1]}"

    def environ(self, cloud: str) -> dict[str, str]:
        """The variables with which a command finds it."""
        return {
            "RUNNER_METADATA": cloud,
            "AWS_EC2_METADATA_DISABLED": "false",
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{self.host}",
            "GCE_METADATA_HOST": self.host,
            "AZURE_POD_IDENTITY_AUTHORITY_HOST": f"http://{self.host}",
        }

    # --- the threads ---

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append(f"{request.command} {request.path}")
        match self.how:
            case "slow":
                self._ended.wait(60)
            case "drip":
                request.wfile.write(b"HTTP/1.1 200 OK\r\n")
                while not self._ended.wait(0.05):
                    request.wfile.write(b"X: y\r\n")
            case "garbage":
                request.wfile.write(b"\x00\xff" * 500)
            case "closed":
                pass
            case "no hops" if request.command == "PUT":
                self._ended.wait(60)
            case "nonsense":
                self._send(request, 200, '{"action": ["explode"], "Events": [[]]}', {})
            case "flapping" if len(self.asked) % 3:
                self._send(request, (500, 404, 200)[len(self.asked) % 5 % 3], "<html>", {})
            case "401" | "404" | "500":
                self._send(request, int(self.how), "<html>no</html>", {})
            case _:
                self._well(request)

    def _well(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        query, headers = parse_qs(parts.query), request.headers
        if parts.path == "/latest/api/token":
            ttl = headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            right = request.command == "PUT" and ttl.isdecimal() and "X-Forwarded-For" not in headers
            self._send(request, 200 if right else 400, TOKEN if right else "", {})
        elif parts.path.startswith("/latest/meta-data/"):
            if headers.get("X-aws-ec2-metadata-token") != TOKEN:
                self._send(request, 401, "", {})
                return
            found = self.aws.get(parts.path.removeprefix("/latest/meta-data/"))
            self._send(request, 404 if found is None else 200, json.dumps(found), {})
        elif parts.path.startswith("/computeMetadata/v1/instance/"):
            if headers.get("Metadata-Flavor") != "Google":
                self._send(request, 403, "", {})
                return
            name = parts.path.rpartition("/")[2]
            if query.get("wait_for_change") == ["true"]:
                until = time.monotonic() + float(query["timeout_sec"][0])
                while self._etag(name) == query["last_etag"][0] and time.monotonic() < until:
                    time.sleep(0.01)
            self._send(request, 200, self.gce[name], {"ETag": self._etag(name), "Metadata-Flavor": "Google"})
        elif headers.get("Metadata") != "true" or "api-version" not in query:
            self._send(request, 400, "", {})
        elif parts.path == "/metadata/instance/compute/name":
            self._send(request, 200, MACHINE, {})
        elif parts.path == "/metadata/scheduledevents":
            document = {"DocumentIncarnation": 1, "Events": self.azure}
            self._send(request, 200, json.dumps(document), {})
        else:
            self._send(request, 404, "", {})

    def _etag(self, name: str) -> str:
        return self.gce[name].encode().hex()

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, text: str, headers: Mapping[str, str]
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(text.encode())


def azure_event(kind: str, machine: str = MACHINE, not_before: str = "", status: str = "Scheduled") -> Any:
    return {
        "EventId": f"{kind}-{machine}",
        "EventType": kind,
        "ResourceType": "VirtualMachine",
        "Resources": [machine],
        "EventStatus": status,
        "NotBefore": not_before,
        "Description": "",
        "EventSource": "Platform",
        "DurationInSeconds": -1,
    }
