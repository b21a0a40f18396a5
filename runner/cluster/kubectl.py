"""The seam to a Kubernetes cluster: kubectl, with the context and the credentials of whoever calls.

One call is one request of the Kubernetes API (`kubectl get | create | delete --raw`): nothing is looked up
before, nothing is cached, and what is sent is what was rendered. kubectl is a process group of its own, so
that Ctrl-C ends what the runner does, never a request in flight.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from runner.cluster.refusals import reason_of, refusal
from runner.errors import RunnerError, StorageError, UsageError

REQUEST = 30
"""Seconds that the API server has for an answer."""

PROCESS = 90
"""Seconds that kubectl has: the request, and the login of a credential plugin before it."""

MANAGER = "vlm-runner"
"""Whom the cluster's own records name as the writer."""

_GROUPS = {
    "jobs": "/apis/batch/v1",
    "pods": "/api/v1",
    "configmaps": "/api/v1",
    "services": "/api/v1",
    "events": "/api/v1",
}
"""Where the API serves a resource."""

_PLURALS = {"Job": "jobs", "Pod": "pods", "ConfigMap": "configmaps", "Service": "services"}

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Where:
    """A namespace of a cluster, as kubeconfig and job name them."""

    context: str
    namespace: str

    def __str__(self) -> str:
        return f"namespace {self.namespace}, context {self.context}"


class Kubectl:
    """One namespace of one cluster.

    Args:
        context: of the kubeconfig; None: its current one.
        namespace: None: the context's own, else `default`.
        warn: takes what the API server warns of.
    """

    def __init__(self, context: str | None, namespace: str | None, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._context = [] if context is None else ["--context", context]
        self.options = "".join(
            f" --{name} {value}" for name, value in (("context", context), ("namespace", namespace)) if value
        )
        """What `runner logs` and `runner cancel` need to look in the same place."""
        done = self._run(["config", "view", "--minify", "--output", "json"])
        if done.returncode:
            raise refusal("read the kubeconfig", done.stderr)
        config = json.loads(done.stdout)
        [entry] = config["contexts"]
        self.where = Where(entry["name"], namespace or entry["context"].get("namespace") or "default")

    def get(self, resource: str, name: str = "", **query: str) -> Any:
        """An object, or without a name a list of them; None when the object does not exist.

        Raises:
            RunnerError: as `refusals.refusal` says, here and below.
        """
        what = f"read {resource} {name}".rstrip()
        found = self.get_path(self._path(resource, name, query), what)
        if found is None and not name:  # a list may be empty; what has none is no Kubernetes
            raise self._refusal(what, "Error from server (NotFound): the server has no such resource")
        return found

    def get_path(self, path: str, what: str) -> Any:
        """The answer to a path of the API; None when it does not exist."""
        done = self._run(["get", "--raw", path])
        if done.returncode:
            if reason_of(done.stderr)[0] == "NotFound":
                return None
            raise self._refusal(what, done.stderr)
        return self._parsed(what, done.stdout)

    def create(self, document: Json, dry_run: bool = False) -> Any:
        """Create an object, or let the server do all but that. Returns what it made of it."""
        query = {"fieldManager": MANAGER, "fieldValidation": "Strict"} | (
            {"dryRun": "All"} if dry_run else {}
        )
        path = self._path(_PLURALS[document["kind"]], "", query)
        what = f"{'try' if dry_run else 'create'} {document['kind']} {document['metadata']['name']}"
        done = self._run(["create", "--raw", path, "--filename", "-"], json.dumps(document))
        if done.returncode:
            raise self._refusal(what, done.stderr)
        for line in done.stderr.splitlines():
            if line.startswith("Warning: ") and dry_run:
                self._warn(f"the cluster warns of {document['kind']}: {line.removeprefix('Warning: ')}")
        return self._parsed(what, done.stdout)

    def delete(self, resource: str, name: str, uid: str | None = None) -> bool:
        """Delete an object and, after it, all that it owns. False when it was gone.

        Args:
            uid: delete no other object that has the same name now.
        """
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            **({} if uid is None else {"preconditions": {"uid": uid}}),
        }
        path = self._path(resource, name, {})
        done = self._run(["delete", "--raw", path, "--filename", "-"], json.dumps(options))
        if not done.returncode:
            return True
        # A conflict: the name is another object's now.
        if reason_of(done.stderr)[0] in ("NotFound", "Conflict"):
            return False
        raise self._refusal(f"delete {resource} {name}", done.stderr)

    def lines(self, pod: str, container: str, follow: bool) -> Iterator[str]:
        """The log of a container, line by line; with `follow` until it ends.

        Raises:
            StorageError: also of a container that has no log yet.
        """
        query = {"container": container, **({"follow": "true"} if follow else {})}
        command = ["get", "--raw", self._path("pods", f"{pod}/log", query)]
        with _started(self._command(command, 0 if follow else REQUEST)) as process:
            assert process.stdout is not None and process.stderr is not None
            for line in process.stdout:
                yield line.rstrip("\n")
            stderr = process.stderr.read()
            if process.wait():
                raise self._refusal(f"read the log of {pod}", stderr)

    def _path(self, resource: str, name: str, query: Mapping[str, str]) -> str:
        parts = f"{_GROUPS[resource]}/namespaces/{quote(self.where.namespace)}/{resource}"
        return f"{parts}{f'/{name}' if name else ''}{f'?{urlencode(query)}' if query else ''}"

    def _refusal(self, what: str, stderr: str) -> RunnerError:
        return refusal(f"{what} in {self.where}", stderr)

    def _parsed(self, what: str, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise StorageError(
                f"{what} in {self.where}: the answer is no JSON: {text[:80]!r}\n    remedy: see whether the "
                "context's server is a Kubernetes API (kubectl cluster-info)"
            ) from error

    def _command(self, words: Sequence[str], seconds: int) -> list[str]:
        return ["kubectl", *self._context, f"--request-timeout={seconds}s", *words]

    def _run(self, words: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
        command = self._command(words, REQUEST)
        with _started(command) as process:
            try:
                out, err = process.communicate(text, timeout=PROCESS)
            except subprocess.TimeoutExpired as error:
                raise StorageError(
                    f"{' '.join(words[:2])}: kubectl did not end within {PROCESS} s\n"
                    "    remedy: see what kubectl cluster-info says; a credential plugin may wait for a login"
                ) from error
        return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextlib.contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            process_group=0,
        )
    except FileNotFoundError as error:
        raise UsageError(
            "there is no kubectl on PATH\n    remedy: install it (kubernetes.io/docs/tasks/tools), or give "
            "what runner render kubernetes prints to a machine that has it"
        ) from error
    except PermissionError as error:
        raise UsageError(f"kubectl cannot be run: {error.strerror}\n    remedy: install it anew") from error
    with process:
        try:
            yield process
        finally:  # also one that hangs; and after a Ctrl-C `with` waits for none
            process.kill()
            process.wait()
