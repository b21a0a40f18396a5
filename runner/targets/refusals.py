"""What a target cannot do, said before anything is made: every problem at once, with the key and the way out.

Two kinds: what the job says (`of`), and what an object turned out to be too large for (`too_large`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from runner.errors import Problem
from runner.job.yaml_source import MAX_CHARACTERS
from runner.manifest import Source, looks_local
from runner.places import Kubernetes
from runner.section import seconds, size
from runner.targets.pods import GPU
from runner.targets.submission import Submission
from runner.targets.template import Tree

SECTION = {
    "kubernetes": "kubernetes",
    "jobset": "kubernetes",
    "trainjob": "kubernetes",
    "aws-batch": "aws_batch",
    "gcp-batch": "gcp_batch",
}
"""Target -> the section of the job that is about it."""

LONGEST_NAME = {
    "kubernetes": 63,
    "jobset": 48,
    "trainjob": 48,
    "aws-batch": 128,
    "gcp-batch": 63,
}
"""Of a submission. Kubernetes: a label's value; JobSet and TrainJob: what they add to it, `-node-0-0-xxxxx`,
has to fit into 63, too. From the eleventh node on an index has more digits, and the name fewer."""

INDEXED_NAME = 61
"""Of an Indexed Job: its pods' host names end with an index."""

IMAGE = "/opt/"
"""Local paths that are taken for the image's own."""

OVERRIDES = 8192
SUBMIT = 30 * 1024
DEFINITION = 24 * 1024
"""Bytes of AWS Batch's containerOverrides, SubmitJob and RegisterJobDefinition. (A ConfigMap takes 1 MiB: any
job that is read at all.)"""

OURS = re.compile(r"(JOB_|PET_|RUNNER_)|(HOME|HF_HOME|HF_TOKEN|HF_TOKEN_PATH|XDG_CACHE_HOME)$")
"""Variables that the templates, a secret, the job itself or the target sets."""

LABEL_VALUE = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
LABEL = rf"([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{LABEL_VALUE}"
"""Of Kubernetes."""

ATTEMPT = 60
"""Seconds, the shortest timeout of AWS Batch."""

_GOOGLE = re.compile(r"://([\w.-]+\.)?storage\.googleapis\.com")
_OWN_LABELS = re.compile(
    r"(app|batch)\.kubernetes\.io/|vlm-runner/|(\w+\.)?kueue\.x-k8s\.io/|jobset\.sigs\.k8s\.io/"
    r"|trainer\.kubeflow\.org/|(job-name|controller-uid)$"
)
_ALL_KUBERNETES = ("kubernetes", "jobset", "trainjob")


def of(target: str, one: Submission) -> list[Problem]:
    """Why this target cannot run this job; empty if it can."""
    return [
        *_text(one),
        *_store(one),
        *_local(one),
        *_machine(one),
        *_section(target, one),
        *_name(target, one),
        *(_pods(target, one) if target in _ALL_KUBERNETES else _batch(target, one)),
    ]


def too_large(target: str, objects: list[Tree]) -> list[Problem]:
    """Which limits of the target its objects break."""
    if target != "aws-batch":
        return []
    definition, submit = (next(iter(one.values())) for one in objects)
    sizes = [
        ("RegisterJobDefinition", definition, DEFINITION),
        ("SubmitJob", submit, SUBMIT),
        ("containerOverrides of SubmitJob", submit["containerOverrides"], OVERRIDES),
    ]
    shorten = "shorten aws_batch.env, aws_batch.tags and aws_batch.secrets"
    return [
        Problem("aws_batch", f"{what} has {length:,} bytes, and AWS Batch takes {most:,}", shorten)
        for what, tree, most in sizes
        if (length := len(json.dumps(tree).encode())) > most
    ]


def _text(one: Submission) -> Iterator[Problem]:
    if len(one.text) > MAX_CHARACTERS:
        reason = f"with its defaults the job has {len(one.text):,} characters, and the container reads "
        yield Problem("", f"{reason}{MAX_CHARACTERS:,}", "shorten its longest values")


def _store(one: Submission) -> Iterator[Problem]:
    uri = one.job.checkpoints.uri
    if uri is None or not uri.startswith("s3://"):
        where = "it has none" if uri is None else f"{uri!r} is a folder of one machine"
        yield Problem(
            "checkpoints.uri",
            f"{where}, and the next attempt runs on another one",
            "set checkpoints.uri=s3://bucket/prefix",
        )


def _local(one: Submission) -> Iterator[Problem]:
    job, remedy = one.job, f"put it on the hub, or into the image below {IMAGE}, and name that"
    paths: list[tuple[str, str, bool]] = [("model.name_or_path", job.model.name_or_path, False)]
    parts: dict[str, list[Source]] = {"train": job.datasets.train, "eval": job.datasets.eval}
    for part, sources in parts.items():
        for index, source in enumerate(sources):
            paths.append((f"datasets.{part}[{index}].path", source.path, True))
            if source.image_folder is not None:
                paths.append((f"datasets.{part}[{index}].image_folder", source.image_folder, True))
    if job.lora is not None and isinstance(start := job.lora.get("init_from"), str):
        paths.append(("lora.init_from", start, False))
    for key, path, dataset in paths:
        is_local = looks_local(path, dataset) or path.count("/") > 1
        if is_local and not path.startswith((IMAGE, "demo:")):
            yield Problem(key, f"{path!r} is of this machine, and the job runs on another", remedy)


def _machine(one: Submission) -> Iterator[Problem]:
    each, resources = one.job.launch.gpus_per_node, one.job.resources
    if isinstance(each, int) and resources.gpu and each != resources.gpu:
        yield Problem(
            "launch.gpus_per_node",
            f"{each} processes on each node, and resources.gpu gives it {resources.gpu}",
            f"set both to the same number, or launch.gpus_per_node=auto (now {GPU} is {resources.gpu})",
        )
    if size(resources.shm) >= size(resources.memory):
        yield Problem(
            "resources.shm",
            f"{resources.shm} of shared memory is part of resources.memory, {resources.memory}",
            "make it smaller",
        )


def _section(target: str, one: Submission) -> Iterator[Problem]:
    key = SECTION[target]
    section = getattr(one.job, key)
    needed = {"aws_batch": ("image", "queue"), "gcp_batch": ("image", "machine_type")}.get(key, ("image",))
    for name in needed:
        if section is None or getattr(section, name) is None:
            yield Problem(
                f"{key}.{name}", f"the job does not say it, and {target} needs one", f"set {key}.{name}=..."
            )
    for name, value in () if section is None else section.env.items():
        where = f"{key}.env.{name}"
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
            yield Problem(where, "it is no name of a variable", "use letters, digits and _")
        elif OURS.match(name):
            yield Problem(where, "the runner or the target sets this variable", "remove it")
        elif _GOOGLE.search(value) and not one.job.checkpoints.allow_unfenced:
            yield Problem(
                where,
                "Google's S3 interface has no conditional writes by ETag, so nothing keeps two writers apart",
                "use another store, or checkpoints.allow_unfenced=true if only one submission at a "
                "time works on the run",
            )


def _name(target: str, one: Submission) -> Iterator[Problem]:
    nodes = one.job.launch.nodes
    most = INDEXED_NAME if target == "kubernetes" and nodes > 1 else LONGEST_NAME[target]
    most -= len(str(nodes - 1)) - 1
    if len(one.name) > most:
        shorter = len(one.job.name) - (len(one.name) - most)
        yield Problem(
            "name",
            f"{one.name!r} has {len(one.name)} characters, and {target} takes {most}",
            f"give the run a name of at most {shorter}" if shorter > 0 else "shorten --name",
        )
    if re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", one.name) is None:
        yield Problem("name", f"{one.name!r} names no object", "use lower case letters, digits and dashes")
    elif one.name[0].isdigit() and (target in ("jobset", "trainjob", "gcp-batch") or nodes > 1):
        yield Problem(
            "name", f"{one.name!r} begins with a digit, which {target} refuses", "begin with a letter"
        )


def _pods(target: str, one: Submission) -> Iterator[Problem]:
    place = one.job.kubernetes
    if place is None:
        return
    if one.job.resources.spot and place.cloud is None and not place.node_selector:
        yield Problem(
            "resources.spot",
            "spot nodes are asked for, and nothing says which those are",
            "set kubernetes.cloud=aws, gke or azure; or kubernetes.node_selector, and tolerations",
        )
    for name, value in place.labels.items():
        if _OWN_LABELS.match(name):
            yield Problem(
                f"kubernetes.labels.{name}", "the runner or the cluster sets this label", "remove it"
            )
        elif re.fullmatch(LABEL, name) is None or (value and re.fullmatch(LABEL_VALUE, value) is None):
            reason = f"{name}={value!r} is no label: at most 63 letters, digits, -, _ and . each"
            yield Problem(f"kubernetes.labels.{name}", reason, "write it as an annotation, or shorten it")
    yield from _nodes(one, place)
    for name in place.annotations:
        if re.fullmatch(LABEL, name) is None:
            reason = f"{name!r} names no annotation: at most 63 letters, digits, -, _ and ."
            yield Problem(f"kubernetes.annotations.{name}", reason, "shorten it, as team/contact")
    if target == "trainjob":
        for key, is_set, instead in (
            (
                "priority_class",
                place.priority_class is not None,
                "set it in the ClusterTrainingRuntime, or use jobset",
            ),
            ("env_from", bool(place.env_from), "give the service account a role, or use jobset"),
        ):
            if is_set:
                yield Problem(f"kubernetes.{key}", "a TrainJob cannot set it", instead)


def _nodes(one: Submission, place: Kubernetes) -> Iterator[Problem]:
    """What no node can have, and no server takes."""
    asked = {f"kubernetes.node_selector.{name}": (name, value) for name, value in place.node_selector.items()}
    if one.job.resources.gpu_type is not None:
        asked["resources.gpu_type"] = (place.gpu_type_label, one.job.resources.gpu_type)
    for key, (name, value) in asked.items():
        if re.fullmatch(LABEL, name) is None or (value and re.fullmatch(LABEL_VALUE, value) is None):
            reason = f"{name}={value!r} is no label of a node: at most 63 letters, digits, -, _ and . each"
            yield Problem(key, reason, "copy it from kubectl get nodes --show-labels")
    for index, taint in enumerate(place.tolerations):
        if taint.operator == "Exists" and taint.value:
            reason, remedy = "operator Exists takes no value", "remove the value, or write operator: Equal"
        elif taint.operator == "Equal" and taint.key is None:
            reason, remedy = "operator Equal needs the key of a taint", "name it, or write operator: Exists"
        else:
            continue
        yield Problem(f"kubernetes.tolerations[{index}]", reason, remedy)


def _batch(target: str, one: Submission) -> Iterator[Problem]:
    job, system = one.job, {"aws-batch": "AWS Batch", "gcp-batch": "Google Cloud Batch"}[target]
    if job.launch.nodes > 1:
        yield Problem(
            "launch.nodes",
            f"{job.launch.nodes} nodes, and {system} starts no group of spot machines again together",
            "set launch.nodes=1 with more resources.gpu; or use runner render jobset, or kubernetes (an "
            "Indexed Job)",
        )
    for name, value in job.gcp_batch.labels.items() if target == "gcp-batch" and job.gcp_batch else ():
        if re.fullmatch(r"(?!goog(le)?-)[a-z][-_a-z0-9]{0,62}", name) is None or re.search(
            r"[^-_a-z0-9]|.{64}", value
        ):
            reason = f"{name}={value!r} is no label on Google Cloud: at most 63 lower case letters, digits, "
            yield Problem(
                f"gcp_batch.labels.{name}", f"{reason}- and _ each, and goog- is Google's", "correct it"
            )
    limit = job.resources.time_limit
    if target == "aws-batch" and limit is not None and seconds(limit) < ATTEMPT:
        yield Problem(
            "resources.time_limit", f"{limit}, and AWS Batch takes {ATTEMPT} s or more", "give it more"
        )
    if target == "aws-batch" and job.resources.gpu_type is not None:
        yield Problem(
            "resources.gpu_type",
            "on AWS Batch the queue's compute environment decides the GPU",
            "remove it, and name a queue of such machines in aws_batch.queue",
        )
