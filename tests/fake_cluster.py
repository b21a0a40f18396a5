"""A Kubernetes API server for tests: as much of one as kubectl and `runner submit` see.

    with FakeCluster() as cluster:
        os.environ["KUBECONFIG"] = cluster.kubeconfig(folder / "config")
        cluster.plan(image_pull(), running(), ended(0))     # what the pods' next looks show
        ...
        cluster.requests, cluster.objects

HTTPS on 127.0.0.1 (kubectl sends no token without), in threads of this process; the real kubectl talks to it.
Like the real server it keeps objects by kind, namespace and name, honours `dryRun=All`, strict fields, label
and field selectors and deletion with a uid, and collects what an object's owner leaves behind, also what
names an owner that is not there. Refused are, in the words of the real one: an unknown token, verbs without a
right, namespaces that are not there, pods that break `restricted`, a quota, or name a service account that
does not exist. A Job makes pods and lives through the stages of `plan`, one with every look at it.
"""

from __future__ import annotations

import base64
import copy
import functools
import json
import re
import ssl
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.loopback import Loopback

TOKEN = "token-of-the-tests"

Object = dict[str, Any]
Key = tuple[str, str, str]
"""Resource, namespace, name."""

SERVED = {
    "jobs": ("batch/v1", "Job"),
    "pods": ("v1", "Pod"),
    "configmaps": ("v1", "ConfigMap"),
    "services": ("v1", "Service"),
    "events": ("v1", "Event"),
    "localqueues": ("kueue.x-k8s.io/v1beta1", "LocalQueue"),
    "workloads": ("kueue.x-k8s.io/v1beta1", "Workload"),
}

FIELDS = {
    "Job": {"apiVersion", "kind", "metadata", "spec"},
    "Pod": {"apiVersion", "kind", "metadata", "spec"},
    "Service": {"apiVersion", "kind", "metadata", "spec"},
    "ConfigMap": {"apiVersion", "kind", "metadata", "data", "binaryData", "immutable"},
}
METADATA = {"name", "namespace", "labels", "annotations", "ownerReferences", "finalizers", "generateName"}
JOB_SPEC = {
    *{"activeDeadlineSeconds", "backoffLimit", "backoffLimitPerIndex", "completionMode", "completions"},
    *{"managedBy", "manualSelector", "maxFailedIndexes", "parallelism", "podFailurePolicy", "selector"},
    *{"podReplacementPolicy", "successPolicy", "suspend", "template", "ttlSecondsAfterFinished"},
}
"""Of the strict fields these alone: the schemas of the real server judge what `render` prints elsewhere."""

NOW = "2026-01-01T00:00:00Z"


class Refusal(Exception):
    """An answer that is a Status."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "reason": reason,
            "message": message,
            "code": code,
        }


@dataclass(frozen=True)
class Request:
    """What came."""

    method: str
    path: str
    query: dict[str, str]
    body: Any
    raw: str
    """Head and body as text, to look for what must not be there."""

    @property
    def line(self) -> str:
        """`POST jobs dry`, `GET pods`, `DELETE jobs`."""
        resource = next((part for part in reversed(self.path.split("/")) if part in SERVED), self.path)
        return f"{self.method} {resource}{' dry' if 'dryRun' in self.query else ''}"


Stage = Callable[["FakeCluster", Object], None]
"""What a Job and its pods become; see the functions at the end."""


class FakeCluster(Loopback):
    """The server, from `with` on."""

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[Key, Object] = {}
        self.requests: list[Request] = []
        self.namespaces = {"default", "team"}
        self.service_accounts: set[str] = {"default", "vlm-runner"}
        self.restricted = False
        """Pods must keep PodSecurity's `restricted`."""
        self.quota: dict[str, int] = {}
        """Most of a resource that a pod may ask for."""
        self.denied: set[tuple[str, str]] = set()
        """Verb and resource that the user has no right to."""
        self.kueue = False
        self.warning = ""
        """The server says this with the answer to every creation."""
        self.logs: dict[str, str] = {}
        """Of pods, by name."""
        self.faults: dict[int, str] = {}
        """Of the request with this number: `lost` (acted upon, not answered), `cut`, or a status as `503`."""
        self.at_request: dict[int, Callable[[], None]] = {}
        """Called before the request with this number is acted upon."""
        self._stages: list[Stage] = []
        self._count = 0
        self._lock = threading.RLock()
        certificate, pem = _certified()
        self._authority = base64.b64encode(certificate).decode()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.NamedTemporaryFile() as file:
            file.write(pem)
            file.flush()
            context.load_cert_chain(file.name)
        # The handshake is the handler's, or one slow client would keep all others waiting.
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.url = f"https://127.0.0.1:{self.port}"

    def kubeconfig(self, path: Path, token: str = TOKEN) -> str:
        """Write a kubeconfig: contexts `fake` (namespace team), `gone` (nobody listens) and `other`."""
        contexts = {"fake": "fake", "other": "fake", "gone": "gone"}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [
                {
                    "name": "fake",
                    "cluster": {"server": self.url, "certificate-authority-data": self._authority},
                },
                {"name": "gone", "cluster": {"server": "http://127.0.0.1:9"}},
            ],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [
                {"name": name, "context": {"cluster": cluster, "user": "user", "namespace": "team"}}
                for name, cluster in contexts.items()
            ],
        }
        path.write_text(json.dumps(document))
        return str(path)

    def plan(self, *stages: Stage) -> None:
        """What a Job lives through, a stage with each look at it; the last one lasts."""
        self._stages = list(stages)

    def of(self, resource: str) -> list[Object]:
        """What there is of a resource."""
        return [found for (kind, _, _), found in self.objects.items() if kind == resource]

    @property
    def lines(self) -> list[str]:
        """The requests, short."""
        return [request.line for request in self.requests]

    def put(self, resource: str, document: Object, namespace: str = "team") -> Object:
        """Keep an object as it is."""
        name = document["metadata"]["name"]
        document["metadata"].setdefault("uid", f"uid-{len(self.objects)}-{name}")
        document["metadata"] |= {"namespace": namespace}
        document["metadata"].setdefault("creationTimestamp", NOW)
        api, kind = SERVED[resource]
        self.objects[resource, namespace, name] = {"apiVersion": api, "kind": kind, **document}
        return self.objects[resource, namespace, name]

    def delete(self, resource: str, namespace: str, name: str) -> None:
        """Delete an object and all that it owns."""
        gone = self.objects.pop((resource, namespace, name))
        uid = gone["metadata"]["uid"]
        for key, other in list(self.objects.items()):
            if key in self.objects and uid in _owners(other):
                self.delete(*key)

    # --- requests ---

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = _body(handler)
        url = urlsplit(handler.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if url.path == "/version":  # the dispatcher of some distributions asks, with every call
            _answer(handler, 200, {"major": "1", "minor": "36", "gitVersion": "v1.36.0"})
            return
        raw = f"{handler.command} {handler.path}\n{handler.headers}\n{body.decode(errors='replace')}"
        parsed = json.loads(body) if body else None
        with self._lock:
            self.requests.append(Request(handler.command, url.path, query, parsed, raw))
            number, self._count = self._count, self._count + 1
            self.at_request.get(number, lambda: None)()
            fault = self.faults.get(number, "")
            try:
                if fault == "cut":
                    handler.close_connection = True
                    return
                if fault.isdigit():
                    raise Refusal(int(fault), "ServiceUnavailable", "the server is in trouble")
                if handler.headers["Authorization"] != f"Bearer {TOKEN}":
                    raise Refusal(401, "Unauthorized", "Unauthorized")
                code, answer = self._act(handler.command, url.path, query, parsed)
            except Refusal as refusal:
                code, answer = refusal.status["code"], refusal.status
        if fault == "lost":
            handler.close_connection = True
            return
        _answer(handler, code, answer, self.warning if handler.command == "POST" else "")

    def _act(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        if path == "/apis/kueue.x-k8s.io":
            if not self.kueue:
                raise Refusal(404, "NotFound", "the server could not find the requested resource")
            version = {"groupVersion": "kueue.x-k8s.io/v1beta1", "version": "v1beta1"}
            return 200, {"kind": "APIGroup", "name": "kueue.x-k8s.io", "preferredVersion": version}
        found = re.fullmatch(r"(?:/api|/apis)/(.+)/namespaces/([^/]+)/(\w+)(?:/([^/]+))?(/log)?", path)
        if found is None or SERVED.get(found[3], ("",))[0] != found[1]:
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        namespace, resource, name = found[2], found[3], found[4]
        verb = {"GET": "get" if name else "list", "POST": "create", "DELETE": "delete"}[method]
        if (verb, resource) in self.denied:
            api = found[1].rpartition("/")[0]
            raise Refusal(
                403,
                "Forbidden",
                f'{resource} is forbidden: User "tester" cannot {verb} resource "{resource}" in API group '
                f'"{api}" in the namespace "{namespace}"',
            )
        if verb == "list":
            return 200, self._list(resource, namespace, query)
        if verb == "create":
            return 201, self._create(resource, namespace, query, body)
        key = (resource, namespace, name)
        if (verb, resource) == ("get", "jobs") and key in self.objects and self._stages:
            stage = self._stages.pop(0) if len(self._stages) > 1 else self._stages[0]
            stage(self, self.objects[key])
        if key not in self.objects:
            raise Refusal(404, "NotFound", f'{resource} "{name}" not found')
        if found[5]:
            return 200, self.logs.get(name, "")
        if verb == "delete":
            wanted = (body or {}).get("preconditions", {}).get("uid")
            if wanted not in (None, self.objects[key]["metadata"]["uid"]):
                raise Refusal(409, "Conflict", "the UID in the precondition does not match")
            self.delete(*key)
            return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        return 200, self.objects[key]

    def _list(self, resource: str, namespace: str, query: dict[str, str]) -> Object:
        items = [
            found
            for (kind, where, _), found in self.objects.items()
            if (kind, where) == (resource, namespace) and _selected(found, query)
        ]
        return {"kind": f"{SERVED[resource][1]}List", "apiVersion": SERVED[resource][0], "items": items}

    def _create(self, resource: str, namespace: str, query: dict[str, str], body: Object) -> Object:
        if namespace not in self.namespaces:
            raise Refusal(404, "NotFound", f'namespaces "{namespace}" not found')
        made = copy.deepcopy(body)
        kind, name = made["kind"], made["metadata"]["name"]
        _strict(made)
        if made["metadata"].get("namespace", namespace) != namespace:
            raise Refusal(
                400, "BadRequest", "the namespace of the provided object does not match the request"
            )
        if (resource, namespace, name) in self.objects:
            raise Refusal(409, "AlreadyExists", f'{resource} "{name}" already exists')
        if resource == "pods":
            self._admit(name, made["spec"])
        if "dryRun" in query:
            return made
        uid = f"uid-{self._count}-{name}"
        made["metadata"] |= {"uid": uid, "creationTimestamp": NOW}
        if kind == "Job":
            made["status"] = {}
            made["spec"]["template"].setdefault("metadata", {}).setdefault("labels", {}).update(
                {"batch.kubernetes.io/job-name": name, "batch.kubernetes.io/controller-uid": uid}
            )
        self.put(resource, made, namespace)
        alive = {found["metadata"]["uid"] for found in self.objects.values()}
        if not _owners(made) <= alive:
            self.delete(resource, namespace, name)  # as the garbage collector does
        return made

    def _admit(self, name: str, spec: Object) -> None:
        account = spec.get("serviceAccountName", "default")
        if account not in self.service_accounts:
            raise _forbidden(
                name, f'error looking up service account team/{account}: serviceaccount "{account}" not found'
            )
        if self.restricted and (breaks := _not_restricted(spec)):
            raise _forbidden(name, f'violates PodSecurity "restricted:latest": {", ".join(breaks)}')
        for resource, most in self.quota.items():
            asked = sum(
                int(one.get("resources", {}).get("limits", {}).get(resource, 0)) for one in spec["containers"]
            )
            if asked > most:
                what = f"requests.{resource}"
                raise _forbidden(
                    name,
                    f"exceeded quota: team, requested: {what}={asked}, used: {what}=0, limit: {what}={most}",
                )


@functools.cache
def _certified() -> tuple[bytes, bytes]:
    """A certificate for 127.0.0.1 that signs itself, and the same with its key; PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fake cluster")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return certificate, certificate + private


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("Transfer-Encoding") != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    body = b""
    while size := int(handler.rfile.readline(), 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return body


def _answer(handler: BaseHTTPRequestHandler, code: int, answer: Any, warning: str = "") -> None:
    text = answer if isinstance(answer, str) else json.dumps(answer)
    handler.send_response(code)
    handler.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
    handler.send_header("Content-Length", str(len(text.encode())))
    if warning:
        handler.send_header("Warning", f'299 - "{warning}"')
    handler.end_headers()
    handler.wfile.write(text.encode())


def _owners(document: Object) -> set[str]:
    return {owner["uid"] for owner in document["metadata"].get("ownerReferences", [])}


def _selected(document: Object, query: dict[str, str]) -> bool:
    labels = document["metadata"].get("labels", {})
    for term in filter(None, query.get("labelSelector", "").split(",")):
        key, _, value = term.partition("=")
        if labels.get(key) != value:
            return False
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        key, _, value = term.partition("=")
        node: Any = document
        for part in key.split("."):
            node = node.get(part, {})
        if node != value:
            return False
    return True


def _strict(document: Object) -> None:
    unknown = [f'"{key}"' for key in document if key not in FIELDS[document["kind"]]]
    unknown += [f'"metadata.{key}"' for key in document["metadata"] if key not in METADATA]
    if document["kind"] == "Job":
        unknown += [f'"spec.{key}"' for key in document["spec"] if key not in JOB_SPEC]
    if unknown:
        kind = document["kind"]
        raise Refusal(
            400,
            "BadRequest",
            f'{kind} in version "v1" cannot be handled as a {kind}: strict decoding error: unknown field '
            + ", unknown field ".join(unknown),
        )
    if len(document["metadata"]["name"]) > 63:
        raise Refusal(422, "Invalid", "metadata.name: must be no more than 63 bytes")


def _not_restricted(spec: Object) -> list[str]:
    pod = spec.get("securityContext", {})
    breaks = []
    for one in spec["containers"]:
        own = one.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False:
            breaks.append("allowPrivilegeEscalation != false")
        if own.get("capabilities", {}).get("drop") != ["ALL"]:
            breaks.append("unrestricted capabilities")
        if not {**pod, **own}.get("runAsNonRoot"):
            breaks.append("runAsNonRoot != true")
        if {**pod, **own}.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            breaks.append("seccompProfile")
    return breaks


def _forbidden(name: str, why: str) -> Refusal:
    return Refusal(403, "Forbidden", f'pods "{name}" is forbidden: {why}')


# --- what a Job lives through ---


def pod_of(cluster: FakeCluster, job: Object, new: bool = False) -> Object:
    """The newest pod of a Job; one is made when there is none, or when it shall be `new`."""
    name = job["metadata"]["name"]
    pods = [one for one in cluster.of("pods") if job["metadata"]["uid"] in _owners(one)]
    if pods and not new:
        return pods[-1]
    template = copy.deepcopy(job["spec"]["template"])
    metadata = template["metadata"] | {
        "name": f"{name}-{len(pods):05d}",
        "creationTimestamp": f"2026-01-01T00:{len(pods):02d}:00Z",
        "ownerReferences": [
            {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job["metadata"]["uid"]}
        ],
    }
    document = {"metadata": metadata, "spec": template["spec"], "status": {"phase": "Pending"}}
    return cluster.put("pods", document, job["metadata"]["namespace"])


def event_of(cluster: FakeCluster, document: Object, reason: str, message: str) -> None:
    """An event about an object, as the newest."""
    number = len(cluster.of("events"))
    involved = {
        "kind": document["kind"],
        "name": document["metadata"]["name"],
        "uid": document["metadata"]["uid"],
    }
    cluster.put(
        "events",
        {
            "metadata": {"name": f"event-{number}"},
            "involvedObject": involved,
            "reason": reason,
            "message": message,
            "type": "Warning",
            "lastTimestamp": f"2026-01-01T01:{number:02d}:00Z",
        },
        document["metadata"]["namespace"],
    )


def nothing() -> Stage:
    """No pod yet."""
    return lambda cluster, job: None


def no_pods(message: str) -> Stage:
    """The Job controller may not make pods."""
    return lambda cluster, job: event_of(cluster, job, "FailedCreate", f"Error creating: {message}")


def unschedulable(message: str) -> Stage:
    """No node fits."""

    def act(cluster: FakeCluster, job: Object) -> None:
        pod_of(cluster, job)["status"] = {
            "phase": "Pending",
            "conditions": [
                {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
            ],
        }

    return act


def container_waits(reason: str, message: str = "") -> Stage:
    """On a node, and not started."""

    def act(cluster: FakeCluster, job: Object) -> None:
        pod = pod_of(cluster, job)
        pod["spec"]["nodeName"] = "node-1"
        waiting = {"reason": reason, **({"message": message} if message else {})}
        container = pod["spec"]["containers"][0]
        pod["status"] = {
            "phase": "Pending",
            "containerStatuses": [
                {"name": container["name"], "image": container["image"], "state": {"waiting": waiting}}
            ],
        }

    return act


def mount_fails(message: str) -> Stage:
    """A volume is not there."""

    def act(cluster: FakeCluster, job: Object) -> None:
        container_waits("ContainerCreating")(cluster, job)
        event_of(cluster, pod_of(cluster, job), "FailedMount", message)

    return act


def suspended(message: str = "") -> Stage:
    """Kueue lets it wait, and says why in its Workload."""

    def act(cluster: FakeCluster, job: Object) -> None:
        job["spec"]["suspend"] = True
        job["status"] = {"conditions": [{"type": "Suspended", "status": "True", "message": "Job suspended"}]}
        if message:
            condition = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": message}
            labels = {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]}
            cluster.put(
                "workloads",
                {"metadata": {"name": "workload", "labels": labels}, "status": {"conditions": [condition]}},
                job["metadata"]["namespace"],
            )

    return act


def running() -> Stage:
    """The container runs: of a new pod, where the newest has ended."""

    def act(cluster: FakeCluster, job: Object) -> None:
        job["spec"].pop("suspend", None)
        pod = pod_of(cluster, job)
        if pod["status"]["phase"] in ("Failed", "Succeeded"):
            pod = pod_of(cluster, job, new=True)
        pod["metadata"].pop("deletionTimestamp", None)
        pod["spec"]["nodeName"] = "node-1"
        name = pod["spec"]["containers"][0]["name"]
        pod["status"] = {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"name": name, "state": {"running": {"startedAt": NOW}}}],
        }
        job["status"] = {"active": 1}

    return act


def node_lost() -> Stage:
    """The node does not answer, and its pod is being deleted for ever."""

    def act(cluster: FakeCluster, job: Object) -> None:
        running()(cluster, job)
        pod = pod_of(cluster, job)
        pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:30Z"
        pod["status"]["conditions"] = [{"type": "Ready", "status": "False", "reason": "NodeNotReady"}]

    return act


def pod_ends(code: int, words: Object | None = None, reason: str = "Error") -> Stage:
    """The container ends; the Job goes on."""

    def act(cluster: FakeCluster, job: Object) -> None:
        pod = pod_of(cluster, job)
        terminated = {"exitCode": code, "reason": "Completed" if code == 0 else reason}
        if words is not None:
            terminated["message"] = json.dumps(words)
        name = pod["spec"]["containers"][0]["name"]
        pod["status"] = {
            "phase": "Failed" if code else "Succeeded",
            "containerStatuses": [{"name": name, "state": {"terminated": terminated}}],
        }
        pod["metadata"].pop("deletionTimestamp", None)
        job["status"] = {"active": 0}

    return act


def pod_gone(reason: str, message: str) -> Stage:
    """The node is deleted: the pod has failed, and nobody was left to tell how its container ended."""

    def act(cluster: FakeCluster, job: Object) -> None:
        running()(cluster, job)
        condition = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}
        pod_of(cluster, job)["status"] |= {"phase": "Failed", "conditions": [condition]}
        job["status"] = {"active": 0}

    return act


def pod_refused(reason: str, message: str) -> Stage:
    """A node does not take the pod, or evicts it, and no container is told of."""

    def act(cluster: FakeCluster, job: Object) -> None:
        pod_of(cluster, job)["status"] = {"phase": "Failed", "reason": reason, "message": message}

    return act


def ended(code: int, words: Object | None = None, why: str = "") -> Stage:
    """The container ends, and the Job with it."""

    def act(cluster: FakeCluster, job: Object) -> None:
        pod_ends(code, words)(cluster, job)
        condition = {"type": "Failed" if code else "Complete", "status": "True", "message": why}
        job["status"] = {"conditions": [condition]}

    return act


def finished(kind: str, reason: str, why: str) -> Stage:
    """The Job ends without a word of a pod."""

    def act(cluster: FakeCluster, job: Object) -> None:
        for key in [key for key in cluster.objects if key[0] == "pods"]:
            del cluster.objects[key]
        job["status"] = {"conditions": [{"type": kind, "status": "True", "reason": reason, "message": why}]}

    return act


def vanished() -> Stage:
    """Somebody deletes the Job."""
    return lambda cluster, job: cluster.delete("jobs", job["metadata"]["namespace"], job["metadata"]["name"])
