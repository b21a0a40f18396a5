"""Where a job runs: its sections `resources`, `kubernetes`, `aws_batch` and `gcp_batch`.

None of them defines the run: all may change between two attempts. Credentials are never among them, only the
names of the secrets that hold some. `runner.targets` makes the objects of those systems from them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from runner.section import Count, Duration, Quantity, Section, Text

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
Dns = Annotated[str, Field(pattern=rf"^{_LABEL}(\.{_LABEL})*$", max_length=253)]
"""The name of an object of Kubernetes."""
Label = Annotated[str, Field(pattern=rf"^{_LABEL}(\.{_LABEL})*$", max_length=63)]
"""The name of an object that a label has, too."""

_IMAGE = (
    "The container image, best by digest (name@sha256:...), so that an attempt a week later runs the same "
)
_IMAGE += "code. Null: there is none, and nothing is rendered."
_ENV = "More variables of the container, name to value. Never a credential: those come from secrets."


class Resources(Section):
    """What each machine of the job gives it, wherever it runs."""

    gpu: int = Field(default=1, ge=0, le=64, description="GPUs of each node; 0 trains on the CPU.")
    gpu_type: Text | None = Field(
        default=None,
        description="Which GPU, as the target calls it: on Kubernetes the value of the node label "
        "kubernetes.gpu_type_label, on GCP Batch an accelerator type, as nvidia-l4. Null: any.",
    )
    cpu: Count = Field(
        default=8,
        description="Whole CPUs of each node, asked for and at most. Whole, because only "
        "those can be pinned.",
    )
    memory: Quantity = Field(
        default="64Gi",
        description="Memory of each node, asked for and at most, as 64Gi; shm is part of it. A container "
        "that needs more is killed (exit code 137).",
    )
    shm: Quantity = Field(
        default="16Gi",
        description="Size of /dev/shm, as 16Gi: what data workers and NCCL share. 64 MiB, the containers' "
        "default, ends them with a bus error.",
    )
    ephemeral_storage: Quantity = Field(
        default="100Gi",
        description="Local disk of each node for model, data and checkpoints on their way, as 100Gi.",
    )
    spot: bool = Field(
        default=False,
        description="Run on machines that may be taken away at any time, for less. The run survives it; off, "
        "because whoever pays should say so.",
    )
    time_limit: Duration | None = Field(
        default=None,
        description="Most time that one submission may take, as 48h. Null: as the target has it, "
        "mostly none.",
    )


class Toleration(Section):
    """A taint that the pods do not mind, as in Kubernetes."""

    key: Text | None = Field(default=None, description="Key of the taint. Null, with operator Exists: all.")
    operator: Literal["Exists", "Equal"] = Field(
        default="Exists", description="Equal compares the value, too."
    )
    value: str | None = Field(
        default=None, description="Value of the taint, with operator Equal. Null: none."
    )
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Null: every effect."
    )


class Kubernetes(Section):
    """The pods of a Job, JobSet or TrainJob."""

    image: Text | None = Field(default=None, description=_IMAGE)
    image_pull_secrets: list[Dns] = Field(default=[], description="Names of Secrets for a private registry.")
    namespace: Annotated[str, Field(pattern=rf"^{_LABEL}$", max_length=63)] | None = Field(
        default=None, description="Null: that of the user's current context."
    )
    service_account: Dns = Field(
        default="vlm-runner",
        description="Account of the pods, which a cloud's roles are tied to (IRSA, Pod Identity, Workload "
        "Identity). Its token is not mounted.",
    )
    cloud: Literal["aws", "gke", "azure"] | None = Field(
        default=None,
        description="Whose nodes these are: with resources.spot it picks their spot nodes, tolerates their "
        "taint and says how much time they leave, as k8s/overlays/<cloud>-spot. Null: node_selector says it.",
    )
    node_selector: dict[str, str] = Field(default={}, description="Labels that the nodes must have.")
    gpu_type_label: Text = Field(
        default="nvidia.com/gpu.product",
        description="Node label that resources.gpu_type is the value of. NVIDIA's device discovery sets the "
        "default; GKE has cloud.google.com/gke-accelerator, Karpenter karpenter.k8s.aws/instance-gpu-name.",
    )
    tolerations: list[Toleration] = Field(
        default=[], description="More taints that the pods do not mind, beside that of GPU nodes."
    )
    priority_class: Dns | None = Field(
        default=None, description="A PriorityClass, best with preemptionPolicy Never. Null: the cluster's."
    )
    queue: Label | None = Field(
        default=None,
        description="Kueue's LocalQueue, which lets the job in when there is quota. Null: no queue.",
    )
    queue_priority: Label | None = Field(
        default=None, description="Kueue's WorkloadPriorityClass. Null: the queue's."
    )
    topology: Text | None = Field(
        default=None,
        description="Label of the domain, as cloud.google.com/gke-nodepool or topology.kubernetes.io/zone, "
        "that Kueue should place all nodes of the job in. Null: anywhere.",
    )
    labels: dict[str, str] = Field(default={}, description="More labels of all objects.")
    annotations: dict[str, str] = Field(default={}, description="More annotations of the pods.")
    env: dict[str, str] = Field(default={}, description=_ENV)
    env_from: list[Dns] = Field(
        default=[],
        description="Names of Secrets, every key of which becomes a variable: for S3 keys where the service "
        "account has no role.",
    )
    hf_token_from: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?(/[-._a-zA-Z0-9]{1,253})?$",
        description="Secret that holds the Hugging Face token, as name or name/key (key token by default). "
        "It is mounted as a file, never a variable, which children and dumps would have. Null: no token.",
    )
    termination_grace_seconds: Count | None = Field(
        default=None,
        description="Seconds between SIGTERM and the kill where a pod is asked to go. Null: 110, or what the "
        "cloud's spot nodes allow.",
    )
    notice_seconds: Count | None = Field(
        default=None,
        description="Seconds that a node which is taken away leaves its pods, where that was changed (GKE: "
        "up to 120 by the node pool's configuration). Null: the cloud's default.",
    )
    keep_finished: Duration = Field(
        default="24h", description="How long the objects stay after the end, to be looked at."
    )


class SecretVariable(Section):
    """A variable whose value the cloud's secret store has."""

    variable: Text = Field(description="Name in the container, as HF_TOKEN. Required.")
    reference: Text = Field(
        description="AWS: ARN of a Secrets Manager secret or an SSM parameter; GCP: "
        "projects/<project>/secrets/<name>/versions/<version>. Required."
    )


class AwsBatch(Section):
    """A job definition of AWS Batch and its submission."""

    image: Text | None = Field(default=None, description=_IMAGE)
    queue: Text | None = Field(
        default=None,
        description="Job queue, name or ARN; its compute environment decides instance types and spot. Null: "
        "there is none, and nothing is rendered.",
    )
    region: Text | None = Field(default=None, description="Null: as boto3 finds it.")
    job_role: Text | None = Field(
        default=None, description="ARN of the role of the container: the bucket. Null: none."
    )
    execution_role: Text | None = Field(
        default=None, description="ARN of the role that pulls the image and reads secrets. Null: none."
    )
    attempts: int = Field(
        default=10,
        ge=1,
        le=10,
        description="Starts in all, machines that were taken away included: Batch counts every one, and "
        "allows ten. The same submission afterwards goes on with the run.",
    )
    env: dict[str, str] = Field(default={}, description=_ENV)
    secrets: list[SecretVariable] = Field(default=[], description="Variables from Secrets Manager or SSM.")
    log_group: Text | None = Field(default=None, description="Log group. Null: /aws/batch/job.")
    share: Text | None = Field(
        default=None, description="Share identifier, on a queue with fair shares. Null: none."
    )
    priority: int | None = Field(
        default=None, ge=0, le=9999, description="Priority within the share, with `share`. Null: none."
    )
    tags: dict[str, str] = Field(default={}, description="More tags of definition and job.")


class GcpBatch(Section):
    """A job of Google Cloud Batch."""

    image: Text | None = Field(default=None, description=_IMAGE)
    project: Text | None = Field(default=None, description="Null: as gcloud is set.")
    region: Text = Field(default="us-central1", description="Where the job is.")
    locations: list[Text] = Field(
        default=[],
        description="Where its machines may be, as zones/us-central1-a. Empty: anywhere in the region.",
    )
    machine_type: Text | None = Field(
        default=None,
        description="As g2-standard-8, which brings its GPUs, or n1-standard-8 with resources.gpu_type. "
        "Null: there is none, and nothing is rendered.",
    )
    service_account: Text | None = Field(default=None, description="E-mail. Null: the project's default.")
    network: Text | None = Field(default=None, description="Null: the default network.")
    subnetwork: Text | None = Field(default=None, description="Null: the network's, in the region.")
    external_ip: bool = Field(
        default=True, description="Whether machines have one. Without it the network needs Cloud NAT."
    )
    retries: int = Field(
        default=10,
        ge=0,
        le=10,
        description="Starts after the first, machines that were taken away included. Batch allows ten.",
    )
    env: dict[str, str] = Field(default={}, description=_ENV)
    secrets: list[SecretVariable] = Field(default=[], description="Variables from Secret Manager.")
    labels: dict[str, str] = Field(default={}, description="More labels of job and machines.")
