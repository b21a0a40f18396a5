"""A hub to upload to, as huggingface_hub 2.4 speaks with one: who am I, create, look, pre-upload, commit.

Small files travel inside the commit, which is all that it takes. It answers with what `failing` says for the
beginning of a path, and cuts the connection for a status of 0.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

TOKEN = "hf_" + "w" * 24


class FakeHub:
    """What it has, and how it fails."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.role = "write"
        self.failing: dict[str, int] = {}
        """Beginning of a path -> status."""
        self.private: dict[str, bool] = {}
        """Repositories, and whether others cannot see them."""
        self.files: dict[str, dict[str, bytes]] = {}
        """What was committed to them."""
        self.models: dict[str, str] = {}
        """Models to read, and their commits."""
        self.seen: list[str] = []

    def environ(self, token: str | None = TOKEN) -> dict[str, str]:
        """Of a process that sees this hub."""
        known = {} if token is None else {"HF_TOKEN": token}
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **known}

    def answer(self, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        """Status and JSON."""
        for beginning, status in self.failing.items():
            if path.startswith(beginning):
                return status, {"error": "it is so"}
        if path.startswith("/api/models/") and (commit := self.models.get(path.split("/revision/")[0][12:])):
            return 200, {"id": path[12:], "sha": commit, "siblings": []}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "auth": {"accessToken": {"role": self.role}}}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            found = name in self.private
            self.private.setdefault(name, asked.get("visibility") == "private")
            return (409 if found else 200), {"url": f"{self.endpoint}/{name}"}
        repo = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in asked]
            return 200, {"files": modes}
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.files[repo] = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            return 200, {"commitUrl": f"{self.endpoint}/{repo}/commit/1", "commitOid": "1" * 40}
        if path.startswith("/api/models/") and repo in self.private:
            return 200, {"id": repo, "sha": "0" * 40, "private": self.private[repo], "siblings": []}
        return 404, {"error": "Repository not found"}


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            path = self.path.partition("?")[0]
            hub.seen.append(f"{self.command} {path}")
            status, document = hub.answer(path, body, self.headers.get("Authorization"))
            if status == 0:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = FakeHub(server.server_port)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
