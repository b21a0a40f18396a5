"""The job a person writes, as frozen pydantic models: every key, its type, unit, default and reason.

A `Job` is built by `runner.settings.resolve` from files, environment and command line, and crosses into the
training processes as `Job.model_validate(job.model_dump(mode="json"))`. The models check types, ranges and
unknown keys, nothing else: upstream's keys are judged by the JSON Schema that is generated from these models
and the pinned libraries (`runner.job.check`), combinations of keys by `runner.job.matrix`. Nothing here reads
a file, the environment or the machine.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from runner.places import AwsBatch, GcpBatch, Kubernetes, Resources
from runner.section import DURATION_PATTERN, Count, Section, Text, seconds

Format = Literal[
    "vqa",
    "caption",
    "messages",
    "prompt_completion",
    "cauldron",
    "llava",
    "preference",
    "preference_messages",
]
FORMATS: tuple[str, ...] = get_args(Format)

ROLES: dict[str, tuple[str, ...]] = {
    "vqa": ("image", "images", "question", "answer", "group"),
    "caption": ("image", "images", "caption"),
    "messages": ("image", "images", "messages"),
    "prompt_completion": ("image", "images", "prompt", "completion"),
    "cauldron": ("image", "images", "texts"),
    "llava": ("image", "images", "messages"),
    "preference": ("image", "images", "question", "chosen", "rejected"),
    "preference_messages": ("image", "images", "prompt", "chosen", "rejected"),
}
"""What a format reads from a row. A role that `columns` does not name is the column of its own name; the
image may be called `image` or `images`; vqa's `group` is optional (ChartQA's human or augmented)."""

PAIRS: tuple[str, ...] = ("preference", "preference_messages")
"""Formats whose rows are pairs of answers: what method dpo trains on, and nothing else reads."""

SORTING: tuple[str, ...] = ("aot", "aot_unpaired")
"""Values of DPOConfig.loss_type that sort the pairs of a micro-batch: another size of it is another loss."""

NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
"""A DNS-1123 label, because the name becomes the name of cluster objects."""

SPLIT_PATTERN = r"^\w+(\.\w+)*(\[(-?[\d_]+%?)?:(-?[\d_]+%?)?\])?(\([^)]*\))?(\s*\+\s*\w+.*)?$"
"""`train`, `train[:10%]`, `train[100:200]+validation`: the grammar of `datasets.ReadInstruction`."""

URI_PATTERN = r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#]*)?|file:///[^?#]+|[^:?#]+)$"
"""`s3://bucket/prefix`, or a folder: what `runner.checkpoint.place` opens."""

TABLES = (".parquet", ".jsonl", ".json", ".csv")
"""Ends of a dataset's path that is a file."""


def looks_local(path: str, dataset: bool = False) -> bool:
    """Whether a path is one of this machine by its spelling alone; any other may be a hub id, too."""
    return (
        path.startswith(("/", "./", "../", "~")) or path in (".", "..") or (dataset and path.endswith(TABLES))
    )


class Model(Section):
    """The base model and how it is loaded."""

    name_or_path: Text = Field(description="Hub id, local folder, or demo:<name>. Required.")
    revision: Text = Field(default="main", description="Branch, tag or commit of the hub repository.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16",
        description="Type of the weights that are not quantized, and of the computation. bfloat16 because "
        "float16 overflows in most vision-language models and float32 doubles the memory.",
    )
    attn_implementation: Text = Field(
        default="sdpa",
        description="As in transformers: sdpa, eager, flash_attention_2, kernels-community/... "
        "sdpa because it is fast and needs nothing installed.",
    )
    freeze: list[Literal["vision_tower", "projector"]] = Field(
        default=["vision_tower", "projector"],
        description="Parts that get no LoRA, no quantization and no backward pass. Both by default, because "
        "language is what small data can teach; [] trains LoRA everywhere it matches.",
    )
    processor: dict[str, Any] = Field(
        default={},
        description="Keyword arguments of AutoProcessor.from_pretrained, as {size: {longest_edge: 1152}}.",
    )
    image_backend: Literal["pil", "torchvision"] = Field(
        default="pil",
        description="Who resizes images. The two differ in the last bits, so it is part of the run's "
        "identity; pil because it needs nothing installed.",
    )


class Source(Section):
    """One dataset and how its rows are read."""

    path: Text = Field(
        description="Hub id, local folder, a .parquet, .jsonl, .json or .csv file, or demo:<name>. Required."
    )
    name: Text | None = Field(default=None, description="Configuration of a hub dataset.")
    revision: Text = Field(default="main", description="Branch, tag or commit of a hub dataset.")
    data_files: Text | list[Text] | None = Field(
        default=None, description="Files inside `path`, with wildcards, as in datasets.load_dataset."
    )
    split: str = Field(
        default="train",
        pattern=SPLIT_PATTERN,
        description="Split, with slices: train, train[:10%], val[100:200].",
    )
    format: Format = Field(description=f"What a row means: {', '.join(FORMATS)}. Required.")
    columns: dict[str, Text] = Field(
        default={},
        description="Role to column, as {question: query}. A role that is not named is the column of its own "
        "name. Roles: " + "; ".join(f"{name}: {', '.join(roles)}" for name, roles in ROLES.items()) + ".",
    )
    system_prompt: Text | None = Field(default=None, description="System message put before every row.")
    prompt: Text | None = Field(default=None, description="The instruction of format caption.")
    max_samples: Count | None = Field(default=None, description="At most this many rows, drawn by seed.")
    image_folder: Text | None = Field(
        default=None, description="Base of relative image paths. Default: the folder of the data file."
    )


class Datasets(Section):
    """What is trained and evaluated on."""

    train: list[Source] = Field(min_length=1, description="Training sets; several are mixed. Required.")
    eval: list[Source] = Field(default=[], description="Held-out sets for evaluation.")
    max_length: Count | None = Field(
        default=None,
        description="Most tokens a row may have, image tokens included. Null: as the model's config allows.",
    )
    on_overflow: Literal["error", "drop", "resize"] = Field(
        default="error",
        description="What happens to a longer row. Never truncated: that would cut image tokens.",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error",
        description="What happens to a row without an image, with a corrupt one or no answer.",
    )
    order: Literal["shuffled", "by_length", "by_image"] = Field(
        default="shuffled",
        description="In which order an epoch takes the training rows, the same on any machine. shuffled: one "
        "permutation. by_length: rows of about equal length side by side, so that little is padded. "
        "by_image: rows that show the same images side by side, so that `speed` can encode them once, and "
        "those by length. The two make batches less mixed, so they are another training.",
    )
    num_proc: Count | None = Field(default=None, description="Processes that prepare rows. Null: one.")


class Training(BaseModel):
    """Keys of trl.SFTConfig or trl.DPOConfig, as `method` says, that are not ours, and two of our own.
    `runner.job.check` judges upstream's."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, hide_input_in_errors=True)

    global_batch_size: Count = Field(
        default=8,
        description="Samples per optimizer step over all devices. Accumulation is derived from it, so that "
        "the run means the same on any machine.",
    )
    per_device_train_batch_size: Count | Literal["auto"] = Field(
        default="auto",
        description="Samples per forward and backward on one device; divides global_batch_size. auto: before "
        "step 1 the largest divisor that fits is found with the longest rows (without a GPU at most 8). A "
        "number is a wish: whatever was asked for, running out of memory later restarts the run once from "
        "its last checkpoint with the next smaller divisor, and says so. The global batch stays. With "
        "loss_type aot or aot_unpaired it has to be a number and never shrinks, because it changes the loss.",
    )

    @property
    def sorts(self) -> bool:
        """Whether the loss depends on how the global batch is cut (`SORTING`)."""
        losses = self.options.get("loss_type")
        return any(loss in SORTING for loss in (losses if isinstance(losses, list) else [losses]))

    @property
    def options(self) -> dict[str, Any]:
        """The keys that pass through to trl.SFTConfig or trl.DPOConfig."""
        return dict(self.model_extra or {})


class Speed(Section):
    """Work that a step need not do. The losses are those of the plain way, to the rounding of the dtype;
    where that is not so the plain way is taken, and `plan` says why."""

    encode_once: bool = Field(
        default=True,
        description="Images that several rows of a micro-batch show, or both answers of a pair and their "
        "reference, go through the vision tower once.",
    )
    share_prompt: bool = Field(
        default=True,
        description="Both answers of a pair, or the rows of a micro-batch that show the same images, follow "
        "one copy of what they begin with, in one sequence with a mask that keeps them apart.",
    )
    cache_reference: bool = Field(
        default=True,
        description="dpo: the reference's log-probabilities of a pair are computed once, and kept with the "
        "run's checkpoints and in this machine's cache.",
    )


class Evaluation(Section):
    """Evaluation by generation and, of pairs, by log-probability: before and after training and, if asked,
    during it. None of it disturbs training."""

    metric: Literal["relaxed_accuracy", "exact_match", "preference_accuracy"] | None = Field(
        default=None,
        description="relaxed_accuracy: ChartQA's, numbers within 5 %, text equal; exact_match: text equal; "
        "preference_accuracy: the chosen answer likelier than the rejected one. Null: relaxed_accuracy under "
        "method sft, preference_accuracy under dpo.",
    )
    datasets: Literal["eval"] = Field(
        default="eval", description="Which part of `datasets`; eval is the only one."
    )
    max_samples: Count | None = Field(
        default=None, description="At most this many rows, drawn by seed. Null: all."
    )
    max_new_tokens: Count = Field(default=32, description="Longest answer, in tokens.")
    baseline: bool = Field(default=True, description="Evaluate before training, too.")
    batch_size: Count = Field(
        default=8, description="Rows generated at once; of pairs, both answers are scored in one batch, too."
    )
    steps: Count | None = Field(
        default=None,
        description="Also evaluate every this many optimizer steps, each after a save. Null: only before and "
        "after.",
    )
    minutes: float | None = Field(
        default=None,
        gt=0,
        description="Also evaluate whenever this many minutes of training have passed, instead of `steps`. "
        "Which steps that are depends on the machine, and with it which checkpoint is the best.",
    )
    loss: bool = Field(
        default=True,
        description="An evaluation during training takes the loss of its rows, too: it turns before answers "
        "do.",
    )
    metric_for_best_model: (
        Literal["relaxed_accuracy", "exact_match", "preference_accuracy", "reward_accuracy", "loss"] | None
    ) = Field(
        default=None,
        description="Export what was best by this metric of the evaluations during training, the last step's "
        "among them; of equals the first. Null: the last step is exported.",
    )
    early_stopping_patience: Count | None = Field(
        default=None,
        description="Stop after this many evaluations in a row that do not improve metric_for_best_model. "
        "Null: train to the last step.",
    )
    early_stopping_threshold: float = Field(
        default=0.0,
        ge=0,
        description="An improvement that is not larger than this does not count for "
        "early_stopping_patience, in units of the metric.",
    )

    @property
    def during(self) -> bool:
        """Whether there are evaluations during training."""
        return self.steps is not None or self.minutes is not None


class Launch(Section):
    """Where the processes run, and what they share."""

    strategy: Literal["auto", "single", "ddp", "zero1", "zero2", "zero3", "fsdp2"] = Field(
        default="auto",
        description="How several processes share a model. single: one process. ddp: each has all of it. "
        "zero1, zero2, zero3: DeepSpeed splits the optimizer's state, gradients too, weights too. fsdp2: "
        "PyTorch splits all three. auto: single for one process, else the simplest that fits.",
    )
    nodes: Count = Field(default=1, description="Machines, each with a supervisor of its own.")
    gpus_per_node: Count | Literal["auto"] = Field(
        default="auto",
        description="Processes on each machine. auto: one for every visible GPU; without GPUs one.",
    )


class Checkpoints(Section):
    """How much work a kill may cost, and where what was done is kept."""

    uri: str | None = Field(
        default=None,
        pattern=URI_PATTERN,
        description="Where checkpoints go, in a folder of the run's name: s3://bucket/prefix (any endpoint "
        "through AWS_ENDPOINT_URL) or a folder, as /mnt/checkpoints. Null: runs/<name>/checkpoints. Not "
        "gs://: Google's S3 interface has no conditional writes by ETag, and wants allow_unfenced. "
        "Credentials come from boto3's standard chain, never from the job.",
    )
    save_steps: Count | None = Field(
        default=None,
        description="Save every this many optimizer steps. Null: as often as max_loss asks, after what a "
        "save was measured to cost.",
    )
    max_loss: str = Field(
        default="2m",
        pattern=DURATION_PATTERN,
        description="Most work that a lost machine may cost, as 90s, 2m or 1h. When what is committed falls "
        "further behind, training waits for the store.",
    )
    keep_last: int = Field(
        default=3,
        ge=2,
        le=64,
        description="Checkpoints kept. At least 2, because the newest may turn out corrupt.",
    )
    store_patience: str = Field(
        default="30m",
        pattern=DURATION_PATTERN,
        description="How long a store that does not answer is waited for, as 30m; then the command ends "
        "with 74. Training goes on meanwhile, until max_loss.",
    )
    allow_unfenced: bool = Field(
        default=False,
        description="Use a store that has no conditional writes, and cannot keep two writers apart: the "
        "user makes sure that only one command works on a run.",
    )
    kms_key_id: Text | None = Field(
        default=None, description="S3: key of SSE-KMS. Null: as the bucket encrypts by default."
    )
    expected_bucket_owner: Text | None = Field(
        default=None, description="S3: account id that must own the bucket. Null: not checked."
    )

    @field_validator("max_loss", "store_patience")
    @classmethod
    def _above_zero(cls, value: str) -> str:
        if float(value[:-1]) == 0:
            raise ValueError("a duration above zero")
        return value

    @property
    def max_loss_seconds(self) -> float:
        """`max_loss` in seconds."""
        return seconds(self.max_loss)

    @property
    def patience_seconds(self) -> float:
        """`store_patience` in seconds."""
        return seconds(self.store_patience)


class Job(Section):
    """A fine-tuning run."""

    name: str = Field(
        pattern=NAME_PATTERN,
        max_length=45,
        description="Names the run and its folder: lower case letters, digits, dashes, at most 45. Required.",
    )
    method: Literal["sft", "dpo"] = Field(
        default="sft",
        description="sft: supervised fine-tuning. dpo: direct preference optimization, on pairs of answers.",
    )
    seed: int = Field(
        default=42,
        ge=0,
        lt=2**32,
        description="Seed of everything: order, dropout, initial adapter, subsets.",
    )
    model: Model
    quantization: dict[str, Any] | None = Field(
        default=None, description="transformers.BitsAndBytesConfig. Null: the base model is not quantized."
    )
    lora: dict[str, Any] | None = Field(
        default=None,
        description="peft.LoraConfig, and init_from; target_modules defaults to all-linear, outside what is "
        "frozen. Null: full fine-tuning.",
    )
    datasets: Datasets
    training: Training = Training()
    evaluation: Evaluation | None = Field(default=None, description="Null: no evaluation by generation.")
    speed: Speed = Field(default=Speed(), description="All on: the same losses for less work.")
    launch: Launch = Launch()
    checkpoints: Checkpoints = Checkpoints()
    resources: Resources = Field(
        default=Resources(), description="What each machine gives it. Runs on this one use what there is."
    )
    kubernetes: Kubernetes | None = Field(
        default=None, description="Where and how it runs on a cluster. Null: it does not."
    )
    aws_batch: AwsBatch | None = Field(default=None, description="The same on AWS Batch. Null: it does not.")
    gcp_batch: GcpBatch | None = Field(
        default=None, description="The same on Google Cloud Batch. Null: it does not."
    )

    @field_validator("quantization")
    @classmethod
    def _float_threshold(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        # BitsAndBytesConfig refuses 6 where it wants 6.0; in YAML the two are one number.
        threshold = (value or {}).get("llm_int8_threshold")
        return (
            {**(value or {}), "llm_int8_threshold": float(threshold)} if isinstance(threshold, int) else value
        )
