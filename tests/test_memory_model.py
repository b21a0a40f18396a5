"""The memory model: against what was measured and published, its tables, and what may never happen."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from runner.facts import DataFacts, ModelFacts, Part, Percentiles, Stack
from runner.manifest import Job
from runner.memory import GPUS, Estimate, Lever, Subject, Term, choose, estimate, levers
from runner.memory.subject import DEFAULTS, Device
from runner.memory.terms import OPTIMIZERS
from runner.plan import Strategy, geometry
from tests.attempts import merged
from tests.small_job import SMALL

ROOT = Path(__file__).parents[1]
GIB = 2**30
FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
LORA = {"r": 8, "target_modules": "all-linear"}

# SmolVLM-Instruct: 2,246,272,880 parameters.
TEXT = Stack(layers=24, hidden=2048, intermediate=8192, heads=32, kv_heads=32, head_dim=64)
TOWER = Stack(layers=27, hidden=1152, intermediate=4304, heads=16, kv_heads=16, head_dim=72)
HEAD = 49155 * 2048
PARTS = {"vision_tower": 412_442_352, "projector": 21_233_664, "language_model": 1_812_596_864}
LINEARS = 24 * (4 * 2048**2 + 3 * 2048 * 8192)


def model(job: Job) -> ModelFacts:
    """SmolVLM-Instruct as the job adapts it."""
    packed, full = job.quantization is not None, job.lora is None
    parts = {
        name: Part(
            parameters=size,
            quantized=LINEARS if packed and name == "language_model" else 0,
            trainable=size if full and name not in job.model.freeze else 0,
            adapter=9_043_968 if not full and name == "language_model" else 0,
        )
        for name, size in PARTS.items()
    }
    return ModelFacts(
        model_type="idefics3",
        model_class="Idefics3ForConditionalGeneration",
        parts=parts,
        text=TEXT,
        vision=TOWER,
        vocabulary=49155,
        tied_head=False,
        adapted_inputs=0 if full else 24 * (6 * 2048 + 8192),
        buffers=256,
    )


def data(tokens: int = 1200, tower: int = 13 * 729) -> DataFacts:
    def at(number: int) -> Percentiles:
        return Percentiles(p50=number, p95=number, largest=number, mean=number)

    return DataFacts(
        rows=100,
        looked_at=100,
        skipped=0,
        tokens=at(tokens),
        image_tokens=at(tokens - 100),
        images=at(1),
        pixel_values=tower * 14 * 14 * 3,
        tower_tokens=tower,
    )


def job_of(**changes: Any) -> Job:
    return Job.model_validate(merged({**SMALL, "lora": LORA, "training": {"global_batch_size": 16}}, changes))


def said(
    changes: dict[str, Any] | None = None,
    world: int = 1,
    strategy: Strategy = "single",
    device: Device = "cuda",
    rows: DataFacts | None = None,
) -> Estimate:
    job = job_of(**merged({"training": {"per_device_train_batch_size": 2}}, changes or {}))
    return estimate(Subject(model(job), rows or data(), job, geometry(job, world), strategy, device))


def term(found: Estimate, name: str) -> Term:
    return next(one for one in found.terms if one.name == name)


def saving(*names: str) -> DataFacts:
    """Rows with these of `speed` in force."""
    every = ("encode_once", "share_prompt", "cache_reference")
    return data().model_copy(
        update={"savings": {name: None if name in names else "speed says no" for name in every}}
    )


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("HF_HUB_OFFLINE", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "1")  # which the bench sets, and this takes back
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("memory_model")


# --- against the world ---


def test_measured_peaks_lie_inside_and_close_to_the_middle(bench: ModuleType) -> None:
    records = bench.read()
    assert len(records) >= 12
    off = []
    for record in records:
        found, peak = bench.predicted(record), record["peak_bytes"]
        assert found.low <= peak <= found.high, record["case"]
        off.append(abs(found.middle - peak) / peak)
    assert sum(off) / len(off) <= 0.15


def test_the_page_has_the_table_of_the_records(bench: ModuleType) -> None:
    text = bench.PAGE.read_text("utf-8")
    assert bench.page(text, bench.read()) == text, "run bench/memory_model.py --write"


PUBLISHED = (ROOT / "tests" / "data" / "memory-published.jsonl").read_text("utf-8").splitlines()


@pytest.mark.parametrize("line", PUBLISHED, ids=lambda line: json.loads(line)["name"])
def test_published_loads_are_the_weights_and_a_little(line: str) -> None:
    """What others print still holds their caches: up to a fifth more than weights and adapter."""
    record = json.loads(line)
    whole = Part(
        parameters=record["parameters"],
        quantized=record["quantized"],
        trainable=0,
        adapter=record["adapter"],
    )
    text = TEXT.model_copy(update={name: record[name] for name in ("hidden", "intermediate")})
    job = job_of(quantization=FOUR_BIT)
    facts = model(job).model_copy(update={"parts": {"language_model": whole}, "text": text})
    found = estimate(Subject(facts, data(), job, geometry(job), "single", "cuda"))
    unpacked = text.hidden * text.intermediate * 2
    loaded = term(found, "weights").low - unpacked + term(found, "adapter").low
    assert 0.8 <= loaded / GIB / record["printed_gib"] <= 1.0


# --- the tables ---


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [(None, 16), ({"load_in_8bit": True}, 8.016), ({"load_in_4bit": True}, 4.5), (FOUR_BIT, 4.127)],
)
def test_bits_of_a_weight(quantization: dict[str, Any] | None, bits: float) -> None:
    weights = term(said({"quantization": quantization}), "weights").low
    unpacked = 2048 * 8192 * 2 if quantization else 0
    plain = 2 * (sum(PARTS.values()) - LINEARS) + 256
    assert (weights - unpacked - plain) * 8 / LINEARS == pytest.approx(bits, abs=0.001)


@pytest.mark.parametrize(
    ("optim", "bytes_each"),
    [
        ("adamw_torch_fused", 8),
        ("adamw_bnb_8bit", 2.03125),
        ("lion_32bit", 4),
        ("ademamix", 12),
        ("sgd", 0),
        ("paged_adamw_8bit", 0),
    ],
)
def test_bytes_of_the_optimizer(optim: str, bytes_each: float) -> None:
    found = said({"lora": None, "training": {"optim": optim}})
    assert term(found, "optimizer").low == pytest.approx(bytes_each * PARTS["language_model"])


@pytest.mark.parametrize(
    ("strategy", "optimizer", "gradients", "weights"),
    [
        ("zero1", 4, 1, 1),
        ("zero2", 4, 4, 1),
        ("zero3", 4, 4, 4),
        ("fsdp2", 4, 4, 4),
    ],
)
def test_what_is_split_over_four_devices(
    strategy: Strategy, optimizer: int, gradients: int, weights: int
) -> None:
    alone, found = said({"lora": None}), said({"lora": None}, 4, strategy)
    for name, share in (("optimizer", optimizer), ("gradients", gradients)):
        assert term(found, name).low == pytest.approx(term(alone, name).low / share)
    one_layer = term(alone, "weights").low / 24 if weights > 1 else 0
    assert term(found, "weights").low == pytest.approx(term(alone, "weights").low / weights + one_layer)


def test_ddp_has_all_and_its_buckets() -> None:
    alone, found = said(), said({}, 4, "ddp")
    assert term(found, "optimizer") == term(alone, "optimizer")
    assert term(found, "gradients").low == 2 * term(alone, "gradients").low


@pytest.mark.parametrize(
    ("low", "high", "unknown", "verdict"),
    [
        (1, 2, (), "fits"),
        (1, 2, ("x",), "may fit"),
        (1, 9, (), "may fit"),
        (8, 9, (), "does not fit"),
        (8, 9, ("x",), "does not fit"),
    ],
)
def test_verdicts(low: int, high: int, unknown: tuple[str, ...], verdict: str) -> None:
    base = said()
    found = Estimate("cuda", "single", base.cut, (Term("all", low, high),), unknown)
    assert found.verdict(4) == verdict


def test_defaults_are_upstreams() -> None:
    schema = json.loads((ROOT / "runner" / "schema" / "upstream.json").read_text())
    for name, value in DEFAULTS.items():
        for config in ("SFTConfig", "DPOConfig"):
            assert schema[config][name]["default"] == value, f"{config}.{name}"


def test_gpus_can_use_less_than_their_name_says() -> None:
    named = {"T4": 16, "L4": 24, "A10G": 24, "A100-80GB": 80, "L40S": 48, "H100": 80, "H200": 141}
    for name, gigabytes in named.items():
        assert 0.9 * gigabytes <= GPUS[name].usable / 1e9 <= 1.05 * gigabytes


# --- what it says of jobs ---


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"quantization": FOUR_BIT}, {"quantization": {"load_in_8bit": True}}),
        ({}, {"training": {"gradient_checkpointing": False}}),
        ({}, {"training": {"per_device_train_batch_size": 4}}),
        ({}, {"model": {"dtype": "float32"}}),
        ({}, {"model": {"freeze": []}}),
        ({}, {"method": "dpo"}),
        ({}, {"lora": None}),
        ({"lora": None, "training": {"optim": "adamw_bnb_8bit"}}, {"lora": None}),
        ({"lora": None}, {"lora": None, "method": "dpo"}),
        ({}, {"model": {"attn_implementation": "eager"}}),
        (
            {"training": {"gradient_checkpointing": False}},
            {"training": {"gradient_checkpointing": False}, "lora": {**LORA, "lora_dropout": 0.1}},
        ),
    ],
)
def test_more_of_anything_takes_more(device: Device, less: dict[str, Any], more: dict[str, Any]) -> None:
    small, large = said(less, device=device), said(more, device=device)
    assert small.low < large.low and small.high < large.high


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_tokens_and_tiles_take_more(device: Device) -> None:
    found = [said(rows=data(tokens, 9477), device=device) for tokens in (600, 1200, 2400)]
    assert found == sorted(found, key=lambda one: (one.low, one.high))
    tower = [said({"method": "dpo"}, rows=data(1200, tiles * 729), device=device) for tiles in (1, 13, 40)]
    assert tower == sorted(tower, key=lambda one: one.high)
    assert tower[0].high < tower[1].high < tower[2].high


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_pair_shares_is_there_once(device: Device) -> None:
    pair = {"method": "dpo"}
    apart, once, prefix = (
        said(pair, rows=rows, device=device)
        for rows in (saving(), saving("encode_once"), saving("encode_once", "share_prompt"))
    )
    assert apart == said(pair, device=device)  # records from before know of no savings
    assert term(once, "batch").high < term(apart, "batch").high
    assert term(once, "activations, text") == term(apart, "activations, text")
    assert term(prefix, "activations, text").high < 0.7 * term(apart, "activations, text").high
    assert prefix.high < once.high < apart.high and prefix.low < apart.low


def test_rows_share_where_their_order_brings_them_together() -> None:
    shares = saving("encode_once", "share_prompt")
    for name in ("activations, text", "batch"):
        apart, mixed, gathered = (
            term(said({"datasets": {"order": order}}, rows=rows), name)
            for order, rows in (("shuffled", saving()), ("shuffled", shares), ("by_image", shares))
        )
        assert mixed == apart
        assert gathered.low < apart.low and gathered.high >= apart.high


def test_more_ranks_take_less_of_each() -> None:
    found = [said({"lora": None}, world, "zero3") for world in (1, 2, 4, 8)]
    lows = [term(one, "weights").low + term(one, "optimizer").low for one in found]
    assert lows == sorted(lows, reverse=True) and len(set(lows)) == 4


def test_a_tile_of_the_head_is_whole_on_a_gpu_and_as_wide_as_the_vocabulary_on_a_cpu() -> None:
    """TRL allocates 32,768 columns for a vocabulary of 640, and a CPU gives memory to what is written."""
    job = job_of(training={"per_device_train_batch_size": 2})

    def head(device: Device, vocabulary: int) -> Term:
        facts = model(job).model_copy(update={"vocabulary": vocabulary})
        return term(estimate(Subject(facts, data(), job, geometry(job), "single", device)), "head")

    assert head("cuda", 640) == head("cuda", 49155)
    tokens, pages, width, hidden = 200, 4096, 640, 2048  # two rows of 100 tokens that are not an image's
    unfolded = 5 * tokens * width * 4 + width * hidden * 4
    assert head("cpu", 640).high == tokens * pages + 2 * tokens * hidden * 4 + unfolded


def test_a_cpu_holds_the_micro_batches_that_wait() -> None:
    devices: tuple[Device, ...] = ("cpu", "cuda")
    sizes = [
        term(said({"training": {"global_batch_size": rows}}, device=device), "batch")
        for device in devices
        for rows in (2, 16)
    ]
    assert sizes[1].low == 8 * sizes[0].low and sizes[2] == sizes[3]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"training": {"optim": "galore_adamw"}}, "training.optim"),
        ({"training": {"torch_compile": True}}, "training.torch_compile"),
        ({"training": {"use_liger_kernel": True}}, "training.use_liger_kernel"),
        ({"lora": {**LORA, "use_dora": True}}, "lora.use_dora"),
        ({"model": {"attn_implementation": "flex_attention"}}, "model.attn_implementation"),
    ],
)
def test_what_is_not_known_is_said(changes: dict[str, Any], names: str) -> None:
    found = said(changes)
    assert [one.partition(":")[0] for one in found.unknown] == [names]
    assert found.verdict(10**15) == "may fit"


def test_a_tower_without_widths_is_said() -> None:
    job = job_of()
    blind = model(job).model_copy(update={"vision": None})
    found = estimate(Subject(blind, data(), job, geometry(job), "single", "cuda"))
    assert len(found.unknown) == 1 and "vision tower" in found.unknown[0]
    assert not estimate(Subject(blind, data(tower=0), job, geometry(job), "single", "cuda")).unknown


def test_every_optimizer_of_the_table_is_upstreams() -> None:
    schema = json.loads((ROOT / "runner" / "schema" / "upstream.json").read_text())
    assert set(OPTIMIZERS) <= set(schema["SFTConfig"]["optim"]["enum"])


# --- levers and strategies ---


def found_levers(changes: dict[str, Any], gpu: str, world: int = 1) -> list[Lever]:
    job = job_of(**changes)
    strategy: Strategy = "single" if world == 1 else "ddp"
    it = Subject(model(job), data(), job, geometry(job, world), strategy, "cuda")
    return levers(it, GPUS[gpu].usable)


def changed(job: Job, keys: dict[str, Any]) -> dict[str, Any]:
    """A job's mapping with dotted keys set, as the command line sets them."""
    tree = job.model_dump(mode="json")
    for key, value in keys.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node[parent] = node[parent] or {}
            node = node[parent]
        node[last] = value
    return tree


def test_levers_save_most_first_and_estimate_again() -> None:
    changes = {
        "model": {"dtype": "float32", "processor": {"size": {"longest_edge": 1536}}},
        "training": {"per_device_train_batch_size": 8, "gradient_checkpointing": False},
    }
    found = found_levers(changes, "T4", world=2)
    assert [one.saves for one in found] == sorted((one.saves for one in found), reverse=True)
    assert {one.name for one in found} == {
        "micro-batches of 1",
        "4-bit weights",
        "gradient checkpointing",
        "images of half the side",
        "8-bit optimizer",
        "bfloat16",
        "zero2 over 2 devices",
        "zero3 over 2 devices",
        "fsdp2 over 2 devices",
        "16 devices, zero3",
    }
    for one in found:
        assert Job.model_validate(changed(job_of(**changes), one.keys)) != job_of(**changes), one.name
    by_name = {one.name: one for one in found}
    job = job_of(**merged(changes, {"training": {"gradient_checkpointing": True}}))
    again = estimate(Subject(model(job), data(), job, geometry(job, 2), "ddp", "cuda"))
    assert by_name["gradient checkpointing"].estimate == again
    assert by_name["gradient checkpointing"].verdict == again.verdict(GPUS["T4"].usable)
    assert by_name["images of half the side"].keys == {"model.processor": {"size": {"longest_edge": 768}}}


def test_four_bit_is_guessed_right() -> None:
    """What a lever says before the model was inspected again is what is then found, but for the norms."""
    [lever] = [one for one in found_levers({}, "T4") if one.name == "4-bit weights"]
    job = job_of(quantization={**FOUR_BIT, "bnb_4bit_quant_type": "nf4"})
    again = estimate(Subject(model(job), data(), job, geometry(job), "single", "cuda"))
    assert lever.estimate.high == pytest.approx(again.high, rel=0.001)


def test_a_smaller_batch_is_the_largest_that_fits() -> None:
    small = {"training": {"per_device_train_batch_size": 16, "gradient_checkpointing": False}}
    [lever] = [one for one in found_levers(small, "A100-80GB") if one.name.startswith("micro-batches")]
    assert lever.verdict == "fits" and lever.estimate.cut.per_device > 1
    assert lever.keys == {"training.per_device_train_batch_size": lever.estimate.cut.per_device}


def test_levers_that_are_pulled_already_are_not_offered() -> None:
    pulled = {
        "quantization": FOUR_BIT,
        "training": {"per_device_train_batch_size": 1, "optim": "paged_adamw_8bit", "global_batch_size": 1},
    }
    assert [one.name for one in found_levers(pulled, "T4")] == ["images of half the side"]


def test_no_lever_makes_what_validate_refuses() -> None:
    dora = {"lora": {**LORA, "use_dora": True}, "quantization": None}
    names = {one.name for one in found_levers(dora, "T4", world=2)}
    assert {"4-bit weights", "zero3 over 2 devices"} <= names
    quantized = {**dora, "quantization": FOUR_BIT}
    assert "zero3 over 2 devices" not in {one.name for one in found_levers(quantized, "T4", world=2)}
    packed = {"quantization": {"load_in_8bit": True}}
    names = {one.name for one in found_levers(packed, "T4", world=2)}
    assert "zero3 over 2 devices" in names and "fsdp2 over 2 devices" not in names


@pytest.mark.parametrize(
    ("changes", "world", "gpu", "strategy"),
    [
        ({}, 1, "L4", "single"),
        ({"quantization": FOUR_BIT}, 4, "L4", "ddp"),
        ({"lora": None}, 4, "H100", "ddp"),
        ({"lora": None}, 4, "RTX 3090", "zero3"),
        ({"lora": None}, 4, "A100-40GB", "zero2"),
    ],
)
def test_the_simplest_strategy_that_fits(
    changes: dict[str, Any], world: int, gpu: str, strategy: Strategy
) -> None:
    job = job_of(**merged({"training": {"per_device_train_batch_size": 1}}, changes))
    it = Subject(model(job), data(), job, geometry(job, world), "ddp", "cuda")
    choice = choose(it, GPUS[gpu].usable)
    assert choice.strategy == strategy
    assert "\n" not in choice.reason


def test_without_a_capacity_it_is_the_simplest() -> None:
    job = job_of(lora=None)
    choice = choose(Subject(model(job), data(), job, geometry(job, 2), "ddp", "cuda"), None)
    assert choice.strategy == "ddp" and "not known" in choice.reason


def test_where_nothing_fits_the_reason_says_so() -> None:
    job = job_of(lora=None, training={"per_device_train_batch_size": 8, "gradient_checkpointing": False})
    choice = choose(Subject(model(job), data(), job, geometry(job, 2), "ddp", "cuda"), GPUS["T4"].usable)
    assert choice.strategy == "zero3" and "nothing surely fits" in choice.reason


def test_rows_without_images_among_others_keep_the_weights_whole() -> None:
    job = job_of(training={"per_device_train_batch_size": 1})
    some = data().model_copy(update={"images": data().images.model_copy(update={"mean": 0.5})})
    for rows, strategy in ((data(), "zero3"), (some, "zero2")):
        it = Subject(model(job), rows, job, geometry(job, 2), "ddp", "cuda")
        assert choose(it, capacity=1).strategy == strategy
        split = {one.estimate.strategy for one in levers(it, capacity=1)} & {"zero3", "fsdp2"}
        assert split == ({"zero3", "fsdp2"} if strategy == "zero3" else set())
