"""What lies in memory while a job trains, one term at a time: bytes on one device, with the source of each.

weights         quantized: packed and scales; else model.dtype, float32 where they train
adapter         float32
casts           autocast's copies of what trains, in model.dtype
gradients       float32, of what trains; what strategies keep beside them
optimizer       states, by training.optim
text            activations of the text model, for the worst micro-batch
tower           of the vision tower: what they add to the peak
head            logits of the tokens that carry loss, in TRL's tiles
batch           pixel values and ids: of the micro-batch at work, or of all that wait
"""

from __future__ import annotations

from dataclasses import replace

from runner.facts import Part, Stack
from runner.memory.stacks import FLOAT32, NOTHING, Range, Trained, exactly, passed, trained
from runner.memory.subject import Subject

NF4_BITS = 4 + 32 / 64
"""64 weights share a float32 scale (bitsandbytes 0.50, `Params4bit`, blocksize 64)."""
NF4_DOUBLE_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Doubly quantized: a byte, and 256 of those share a float32 (QLoRA, arXiv 2305.14314, section 3)."""

_BLOCK8 = 1 + 4 / 256
"""Bytes of an 8-bit state: 256 share a float32 scale (bitsandbytes docs, 8-bit optimizers)."""

OPTIMIZERS: dict[str, tuple[float, float]] = {
    "adamw_torch": (8, 12),
    "adamw_torch_fused": (8, 8),
    "adamw_bnb_8bit": (2 * _BLOCK8, 2 * _BLOCK8),
    "adamw_8bit": (2 * _BLOCK8, 2 * _BLOCK8),
    "paged_adamw_32bit": (8, 8),
    "paged_adamw_8bit": (2 * _BLOCK8, 2 * _BLOCK8),
    "ademamix": (12, 12),
    "ademamix_8bit": (3 * _BLOCK8, 3 * _BLOCK8),
    "paged_ademamix_32bit": (12, 12),
    "paged_ademamix_8bit": (3 * _BLOCK8, 3 * _BLOCK8),
    "lion_32bit": (4, 4),
    "lion_8bit": (_BLOCK8, _BLOCK8),
    "paged_lion_32bit": (4, 4),
    "paged_lion_8bit": (_BLOCK8, _BLOCK8),
    "rmsprop": (4, 8),
    "rmsprop_bnb": (4, 4),
    "rmsprop_bnb_32bit": (4, 4),
    "rmsprop_bnb_8bit": (_BLOCK8, _BLOCK8),
    "adagrad": (4, 8),
    "sgd": (0, 4),
    "adafactor": (0.01, 0.2),
}
"""Bytes of state for each parameter, at least and at most. Adam has two float32 moments (ZeRO, arXiv
1910.02054, section 3.1); the high end of PyTorch's own, unless fused, is its `foreach` step, which holds as
much as the parameters once more (torch.optim docs). Adafactor keeps a row and a column of a matrix (arXiv
1804.04235)."""

SMALL = 4096
"""Tensors below this many numbers keep 32-bit states (bitsandbytes, `min_8bit_size`)."""

TILE_TOKENS, TILE_ROWS = 4096, 32768
"""Of TRL's fused head (1.16, `TOKEN_CHUNK_SIZE`, `_CHUNKED_LOGPROB_CHUNK_SIZE`)."""

PAGE = 4096
"""Bytes that Linux gives at once, where huge pages are for those that ask for them (`madvise`)."""


def weights(it: Subject) -> Range:
    """The base model; of full dpo twice, because the reference is a second model.

    Where weights are quantized, the largest matrix is unpacked for a product, at most in float32 once more.
    Sharded: a share, and one to two whole layers that are gathered. Scales of quantized weights are not
    parameters and stay whole, and such weights are loaded whole before they are split: the high end has all.
    """
    packed = sum(_packed(it, part) for part in it.model.parts.values())
    plain = sum(
        (part.parameters - part.quantized - part.trainable) * it.c + part.trainable * FLOAT32
        for part in it.model.parts.values()
    )
    if it.pairs and it.job.lora is None:
        packed, plain = 2 * packed, 2 * plain
    whole = exactly(it.model.buffers)
    if packed:
        matrix = it.model.text.hidden * it.model.text.intermediate
        whole += Range(matrix * it.c, matrix * (it.c + FLOAT32))
    split = it.shard("weights")
    if split == 1:
        return whole + exactly(packed + plain)
    gathered = (packed + plain) / it.model.text.layers
    return whole + Range((packed + plain) / split + gathered, packed + plain / split + 2 * gathered)


def _packed(it: Subject, part: Part) -> float:
    options = it.job.quantization or {}
    if options.get("load_in_8bit"):
        return part.quantized * (1 + FLOAT32 / it.model.text.hidden)  # a scale for every row
    double = options.get("bnb_4bit_use_double_quant", False)
    return part.quantized * (NF4_DOUBLE_BITS if double else NF4_BITS) / 8


def adapter(it: Subject) -> Range:
    """In float32; of dpo at most with the frozen copy that a started adapter is compared with."""
    size = it.adapter * FLOAT32 / it.shard("weights")
    return Range(size, size * (2 if it.pairs else 1))


def casts(it: Subject) -> Range:
    """Autocast copies every float32 weight that trains once in a forward pass (torch.amp docs, weight cache);
    a backward pass with checkpointing makes them layer by layer."""
    if it.c == FLOAT32:
        return NOTHING
    size = it.trains * it.c / it.shard("weights")
    return Range(0 if it.option("gradient_checkpointing") else size, size)


def gradients(it: Subject) -> Range:
    """Float32. At most with a second one of the largest matrix, the embedding, made before it is added.
    Beside them ddp has its buckets (torch DDP docs), DeepSpeed at most float32 copies of its share and a
    bucket for what it is reducing."""
    size = it.trains * FLOAT32
    kept = exactly(size / it.shard("gradients"))
    if it.part("language_model").trainable:
        kept += Range(0, it.model.vocabulary * it.model.text.hidden * FLOAT32)
    if it.strategy == "ddp":
        return kept + exactly(size)
    if it.strategy in ("zero1", "zero2", "zero3"):
        return kept + Range(0, size / it.shard("optimizer") + min(size, 2e9))
    return kept


def optimizer(it: Subject) -> Range | None:
    """States; None for an optimizer that is not in the table. Paged ones may move to the host from a GPU."""
    name = it.option("optim")
    if name not in OPTIMIZERS:
        return None
    low, high = OPTIMIZERS[name]
    rank = (it.job.lora or {}).get("r", 8)
    if "8bit" in name and it.job.lora is not None and rank * it.model.text.hidden < SMALL:
        high *= FLOAT32 / _BLOCK8
    if name.startswith("paged_") and it.device == "cuda":
        low = 0
    return Range(low, high) * (it.trains / it.shard("optimizer"))


def fragments(it: Subject) -> Range:
    """What the C library of a CPU may keep of layers that checkpointing freed, whose inputs pin the heap: at
    most all that they would have kept without it (measured: a LLaVA with six layers, after its forward pass:
    51 MiB of tensors, and a process that had grown by 265)."""
    if not it.option("gradient_checkpointing"):
        return NOTHING
    stack = it.model.text
    how = _trained(it, it.part("language_model"), stack, gated=True)
    without = trained(stack, it.c, replace(how, checkpointing=False)).times(it.tokens)
    return Range(0, without.high - trained(stack, it.c, how).times(it.tokens).high)


def text(it: Subject) -> Range:
    """Of the text model: what its layers keep, the working set of one, and what lies before and behind them:
    the embedded tokens, with images and without, the last state and its norm."""
    part, stack = it.part("language_model"), it.model.text
    how = _trained(it, part, stack, gated=True)
    if it.job.model.attn_implementation == "eager":
        # The softmax in float32 and its copy in model.dtype.
        how = replace(how, scores=stack.heads * it.width.high * (FLOAT32 + it.c))
    ends = stack.hidden * (FLOAT32 + 3 * it.c)
    mask = Range(0, it.tokens.high * it.width.high * (1 + it.c))
    return (trained(stack, it.c, how) + exactly(ends)).times(it.tokens) + mask


def _trained(it: Subject, part: Part, stack: Stack, *, gated: bool) -> Trained:
    share = part.adapter / it.adapter if it.adapter else 0
    return Trained(
        full=part.trainable > 0,
        adapted_inputs=it.model.adapted_inputs * share,
        int8=bool((it.job.quantization or {}).get("load_in_8bit")) and part.quantized > 0,
        checkpointing=bool(it.option("gradient_checkpointing")),
        dropout=bool((it.job.lora or {}).get("lora_dropout")),
        gated=gated,
    )


def tower(it: Subject, beside: Range) -> Range | None:
    """Of the vision tower, beyond what the text model's activations need at another time; None where its
    widths are not known.

    trains    its layers keep what backward needs, beside the text model's
    frozen    its largest layer, before the text model's activations are there: what it is more than they, and
              what it made, kept for the reference and the policy
              dpo without encode_once and cache_reference: at most all of it: the reference's pass goes
              through it while the policy's waits for its backward (TRL 1.16, `_compute_loss`)

    Args:
        beside: the text model's activations.
    """
    positions = it.image_rows * it.data.tower_tokens
    if not positions.high:
        return NOTHING
    stack = it.model.vision
    if stack is None:
        return None
    part = it.part("vision_tower")
    if "vision_tower" not in it.job.model.freeze:
        return trained(stack, it.c, _trained(it, part, stack, gated=False)).times(positions)
    pixels = it.image_rows * it.data.pixel_values
    moment = passed(stack, it.c, gated=False).times(positions) + Range(0, 2 * pixels.high * it.c)
    made = Range(0, positions.high * stack.hidden * it.c if it.saves("encode_once") else 0)
    over = Range(max(0, moment.low - beside.low), max(0, moment.high - beside.high)) + made
    late = it.pairs and not (it.saves("encode_once") or it.saves("cache_reference"))
    return Range(over.low, moment.high) if late else over


def head(it: Subject) -> Range:
    """TRL's fused head: logits of the tokens that carry loss, in tiles; none of them is kept for backward.

    At least one token a row carries loss, at most all that are not an image's. A tile is in model.dtype, the
    gradient of the states in float32; where the head trains, its gradient in float32 once more. A tile has
    TILE_ROWS columns whatever the vocabulary (TRL, `mm_buf`): a GPU gives memory to all of them, a CPU to the
    pages that are written. A CPU, which has no Triton, unfolds what is written of a tile into five in float32
    and a slice of the head into one.
    """
    hidden, vocabulary = it.model.text.hidden, it.model.vocabulary
    answers = max(1, it.data.tokens.largest - it.data.image_tokens.p50)
    trains = it.part("language_model").trainable > 0
    weight = vocabulary * hidden * (FLOAT32 + (it.c if it.c < FLOAT32 else 0)) if trains else 0

    width = min(vocabulary, TILE_ROWS)
    line = TILE_ROWS * it.c
    if it.device == "cpu":
        line = min(line, -(-width * it.c // PAGE) * PAGE)

    def of(tokens: int) -> float:
        size = min(tokens, TILE_TOKENS) * line + 2 * tokens * hidden * FLOAT32
        if it.device == "cpu":
            size += 5 * min(tokens, TILE_TOKENS) * width * FLOAT32 + width * hidden * FLOAT32
        return size

    return Range(of(it.rows), of(it.rows * answers) + weight)


def batch(it: Subject) -> Range:
    """Pixel values in model.dtype with their mask, and five numbers of 8 bytes a token (ids, masks, labels).
    A CPU holds all micro-batches of a step, at most one more that was fetched ahead, and what the processor
    made them of in float32; a GPU the one at work."""
    pixels = it.image_rows * it.data.pixel_values
    ids = exactly(it.rows * it.data.tokens.largest * 40)
    one = pixels * (it.c + 1 / 3) + ids
    if it.device == "cuda":
        return Range(one.low, one.high + pixels.high * FLOAT32)
    ahead = one.high * (it.cut.accumulation + 1) + 2 * pixels.high * FLOAT32
    return Range(one.low * it.cut.accumulation, ahead)
