"""What kubectl says when a request fails, as one of our errors. Nothing here calls anything.

Error from server (Forbidden): pods "a" is forbidden: exceeded quota: team, ...
Unable to connect to the server: dial tcp: lookup k8s.example: no such host
"""

from __future__ import annotations

import re

from runner.errors import AccessDenied, JobError, Problem, RunnerError, StorageError, UsageError

_RIGHTS = re.compile(r'cannot \w+ resource "([^"]+)"')
_SERVER = re.compile(r"Error from server \((\w+)\): (.*)", re.DOTALL)
_INVALID = re.compile(r"The request is invalid: (.*)", re.DOTALL)
_NO_NAMESPACE = re.compile(r'namespaces "([^"]+)" not found')


def reason_of(stderr: str) -> tuple[str, str]:
    """The API server's reason, as `Forbidden`, and its message; the reason is empty when it did not answer.

    kubectl says                                  reason, message
    Error from server (NotFound): jobs "a" ...    NotFound, jobs "a" ...
    The request is invalid: spec.x: bad           Invalid, spec.x: bad
    error: You must be logged in to the server    Unauthorized, the whole
    anything else                                 "", the whole
    """
    text = "\n".join(line for line in stderr.strip().splitlines() if not line.startswith("Warning: "))
    if found := _SERVER.search(text):
        return found[1], found[2].strip()
    if found := _INVALID.search(text):
        return "Invalid", found[1].strip()
    if "You must be logged in" in text or "(Unauthorized)" in text:
        return "Unauthorized", text
    return "", text or "kubectl said nothing"


def refusal(what: str, stderr: str) -> RunnerError:
    """The error for a failed call of kubectl.

    reason                       message                            error
    Unauthorized                                                    77
    Forbidden                    cannot create resource "jobs"      77: a right is missing
    Forbidden                    any other: PodSecurity, quota,     78: the cluster does not want this job
                                 limits, service account, webhook
    NotFound                     namespaces "a" not found           78
    NotFound                     any other                          78: the cluster lacks this kind
    BadRequest, Invalid,                                            78
    RequestEntityTooLarge
    any other                                                       74: it may pass
    none                         getting credentials                77
    none                         context "a" does not exist         64
    none                         error loading config file "a"      64
    none                         x509: ... unknown authority        64: the kubeconfig is of another server
    none                         any other: no connection           74

    Args:
        what: the operation, as `create Job a in namespace b`.
    """
    reason, message = reason_of(stderr)
    said = f"{what}: {message}"
    if reason == "Unauthorized":
        return AccessDenied(
            f"{said}\n    remedy: log in to the cluster again; kubectl auth whoami tells as whom"
        )
    if reason == "Forbidden":
        if right := _RIGHTS.search(message):
            return AccessDenied(
                f"{said}\n    remedy: ask for the role that k8s/ has for submit; it lacks {right[1]} now"
            )
        return _job("kubernetes", said, _admission_remedy(message))
    if reason == "NotFound":
        if found := _NO_NAMESPACE.search(message):
            remedy = f"kubectl create namespace {found[1]}, or name another in kubernetes.namespace"
            return _job("kubernetes.namespace", said, remedy)
        return _job("kubernetes", said, "ask whether the cluster serves batch/v1, and is the one you mean")
    if reason in ("BadRequest", "Invalid", "RequestEntityTooLarge"):
        return _job(
            "kubernetes", said, "correct what it names; the cluster may be older than the job's fields"
        )
    if reason:
        return StorageError(f"{said}\n    remedy: give the same command again")
    return _unanswered(what, message)


def _unanswered(what: str, message: str) -> RunnerError:
    said = f"{what}: {message}"
    if re.search(r"context .* does not exist|cannot locate context|no context exists", message):
        return _usage(said, "kubectl config get-contexts lists what this machine has")
    if "current-context must exist" in message or "invalid configuration" in message:
        return _usage(said, "name a context: kubectl config use-context NAME, or --context NAME")
    if "error loading config file" in message:
        return _usage(said, "mend the kubeconfig; kubectl config view shows it")
    if "failed to verify certificate" in message:
        return _usage(said, "renew the certificate-authority of the context's cluster in the kubeconfig")
    if "getting credentials" in message or "exec plugin" in message:
        return AccessDenied(f"{said}\n    remedy: install and log in with what the kubeconfig names")
    return StorageError(
        f"{said}\n    remedy: check the network and the context (kubectl cluster-info), then give the same "
        "command again"
    )


def _usage(said: str, remedy: str) -> UsageError:
    return UsageError(f"{said}\n    remedy: {remedy}")


def _job(path: str, said: str, remedy: str) -> JobError:
    return JobError([Problem(path, said, remedy)])


def _admission_remedy(message: str) -> str:
    if "violates PodSecurity" in message:
        return "the namespace asks more of pods than this job's overrides leave; remove what it names"
    if "exceeded quota" in message:
        return "ask for less in resources, end what is not needed, or raise the quota"
    if "service account" in message or "serviceaccount" in message:
        return "create the service account, or name another in kubernetes.service_account"
    if "PriorityClass" in message:
        return "name one of kubectl get priorityclasses in the kubernetes section"
    return "change what it names, or ask who runs the cluster"
