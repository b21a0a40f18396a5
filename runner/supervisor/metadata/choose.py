"""Which metadata service this machine has: what RUNNER_METADATA says, or what can be seen without a network.

    RUNNER_METADATA    here                                                   asked
    off                -                                                      nobody
    aws, gce, azure    -                                                      that
    auto, unset        KUBERNETES_SERVICE_HOST: a pod                         nobody: the node says SIGTERM
    auto, unset        AWS_EXECUTION_ENV is Fargate's                         nobody: it has none
    auto, unset        AWS_BATCH_JOB_ID                                       aws
    auto, unset        BATCH_TASK_INDEX, BATCH_TASK_COUNT: Google's Batch     gce
    auto, unset        DMI: vendor Amazon EC2, or a BIOS of its Xen           aws
    auto, unset        DMI: product Google Compute Engine                     gce
    auto, unset        DMI: the asset tag of every Azure machine              azure
    auto, unset        anything else: a laptop, another cloud                 nobody

AWS_EC2_METADATA_DISABLED=true is nobody instead of aws, as for every client of AWS. Where a service listens:
AWS_EC2_METADATA_SERVICE_ENDPOINT or ..._MODE (IPv6), GCE_METADATA_HOST, AZURE_POD_IDENTITY_AUTHORITY_HOST, as
for the vendors' own clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from runner.errors import JobError, Problem
from runner.supervisor.metadata.sources import AWS_IPV6, LINK_LOCAL, Aws, Azure, Gce, Source

VARIABLE = "RUNNER_METADATA"

DMI = Path("/sys/class/dmi/id")

AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"
"""chassis_asset_tag of every Azure machine; cloud-init knows them by it."""


def source(environ: Mapping[str, str], dmi: Path = DMI) -> Source | None:
    """The service to ask; None: nobody.

    Raises:
        JobError: RUNNER_METADATA is none of its words.
    """
    name = environ.get(VARIABLE) or "auto"
    if name not in ("auto", "off", "aws", "gce", "azure"):
        reason = f"{VARIABLE}={name!r} names no metadata service"
        raise JobError([Problem("", reason, "write auto, off, aws, gce or azure, or leave it out")])
    if name == "auto":
        name = guessed(environ, dmi) or "off"
    if name == "aws" and environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true":
        six = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "").lower() == "ipv6"
        return Aws(environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or (AWS_IPV6 if six else LINK_LOCAL))
    if name == "gce":
        host = environ.get("GCE_METADATA_HOST")
        return Gce(f"http://{host}" if host else LINK_LOCAL)
    if name == "azure":
        return Azure(environ.get("AZURE_POD_IDENTITY_AUTHORITY_HOST") or LINK_LOCAL)
    return None


def guessed(environ: Mapping[str, str], dmi: Path) -> str | None:
    """The cloud whose machine this is, as the table says; None: no cloud, or one that is not known."""
    if environ.get("KUBERNETES_SERVICE_HOST") or "FARGATE" in environ.get("AWS_EXECUTION_ENV", ""):
        return None
    if environ.get("AWS_BATCH_JOB_ID"):
        return "aws"
    if environ.get("BATCH_TASK_INDEX") and environ.get("BATCH_TASK_COUNT"):
        return "gce"
    if _read(dmi / "sys_vendor") == "Amazon EC2" or _read(dmi / "bios_version").endswith(".amazon"):
        return "aws"
    if _read(dmi / "product_name") == "Google Compute Engine":
        return "gce"
    return "azure" if _read(dmi / "chassis_asset_tag") == AZURE_TAG else None


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace").strip()
    except OSError:  # another system than Linux, or another kind of machine
        return ""
