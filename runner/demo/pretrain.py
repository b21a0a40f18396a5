"""Makes `demo:smolvlm-tiny`, the base model of the demo: `python -m runner.demo.pretrain --output DIR`.

The model is a real Idefics3 (what SmolVLM-Instruct is) of a million and a half parameters with its own
byte-level tokenizer, SmolVLM's special tokens and chat template, and the Idefics3 processor. It learns the
lessons of `runner.demo.lessons` on charts of the train split and nothing else; its vision tower then reads
charts well enough that the demo job tunes the text model alone.

The committed folder `runner/demo/smolvlm-tiny` came from the command above with the defaults, in about twenty
minutes on one core. The same seed gives the same bytes on the same machine type and library versions;
elsewhere the arithmetic of another CPU moves the last bits, and with them the weights.

Runs as a process of its own: the one module outside `runner/train` that imports torch, and no part of the
package imports it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from runner.demo import charts, lessons

if TYPE_CHECKING:
    import torch
    from transformers import Idefics3ForConditionalGeneration, Idefics3Processor, PreTrainedTokenizerFast

SEE_STEPS = 3500
SPEAK_STEPS = 3000
BATCH = 32
LEARNING_RATE = 2e-3
WARMUP = 100
VOCABULARY = 640
PATCH = 16
SCALE = 2
IMAGE_TOKENS = (charts.SIZE // PATCH) ** 2 // SCALE**2

CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""SmolVLM-Instruct's, to the letter: TRL knows it, and swaps in its marked edition for several turns."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text has tokens, with the special tokens of SmolVLM under their names."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    row_col = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>"]
    special += ["<end_of_utterance>", "<global-img>", *row_col]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lessons.corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=["<fake_token_around_image>", "<image>", "<end_of_utterance>"],
        model_max_length=2048,
        padding_side="left",
    )


def make_processor() -> Idefics3Processor:
    """One tile per chart; `size: {longest_edge: N * 128}` splits into more, as with SmolVLM."""
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    images = Idefics3ImageProcessorPil(
        size={"longest_edge": charts.SIZE}, max_image_size={"longest_edge": charts.SIZE}
    )
    return Idefics3Processor(
        images, make_tokenizer(), image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Idefics3ForConditionalGeneration:
    """Random weights. Every width is a multiple of 64, the block of 4-bit quantization."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    def token(text: str) -> int:
        identifier = tokenizer.convert_tokens_to_ids(text)
        assert isinstance(identifier, int)
        return identifier

    config = Idefics3Config(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": charts.SIZE,
            "patch_size": PATCH,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "bos_token_id": token("<|im_start|>"),
            "eos_token_id": token("<end_of_utterance>"),
            "pad_token_id": token("<|im_end|>"),
        },
        scale_factor=SCALE,
        image_token_id=token("<image>"),
        bos_token_id=token("<|im_start|>"),
        eos_token_id=token("<end_of_utterance>"),
        pad_token_id=token("<|im_end|>"),
    )
    return Idefics3ForConditionalGeneration(config)


def pieces(lesson: lessons.Lesson) -> list[tuple[str, bool]]:
    """The chat template's text for a lesson, cut where loss begins and ends: (text, carries loss)."""
    image = (
        ""
        if lesson.chart is None
        else "<fake_token_around_image><global-img>" + "<image>" * IMAGE_TOKENS + "<fake_token_around_image>"
    )
    text = "<|im_start|>" + (
        f"System: {lesson.system}<end_of_utterance>\n" if lesson.system is not None else ""
    )
    cut: list[tuple[str, bool]] = []
    for question, answer in lesson.turns:
        text += f"User:{image or ' '}{question}<end_of_utterance>\nAssistant:"
        cut += [(text, False), (f" {answer}<end_of_utterance>\n", True)]
        text, image = "", ""
    return cut


def make_batch(taught: list[lessons.Lesson], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Tokens, labels (-100 where no loss) and pixels, as the processor would give them.

    Padding stands on the right, where causal attention and the labels make a mask needless.
    """
    import torch

    sequences: list[tuple[list[int], list[int]]] = []
    for lesson in taught:
        tokens: list[int] = []
        labels: list[int] = []
        for text, carries_loss in pieces(lesson):
            new = tokenizer.backend_tokenizer.encode(text).ids
            tokens += new
            labels += new if carries_loss else [-100] * len(new)
        sequences.append((tokens, labels))
    width = max(len(tokens) for tokens, _ in sequences)
    pad = tokenizer.pad_token_id
    fill = [width - len(tokens) for tokens, _ in sequences]
    shown = [lesson.chart for lesson in taught if lesson.chart is not None]
    return {
        "input_ids": torch.tensor([t + [pad] * n for (t, _), n in zip(sequences, fill, strict=True)]),
        "labels": torch.tensor([b + [-100] * n for (_, b), n in zip(sequences, fill, strict=True)]),
        "pixel_values": make_pixels(shown).unsqueeze(1),
    }


def lesson_charts(seed: int) -> Iterator[charts.Chart]:
    """Charts of the train split, endlessly."""
    rng = random.Random(f"charts/{seed}")
    while True:
        chart = charts.sample(rng)
        if charts.split_of(chart) == "train":
            yield chart


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to a twentieth."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return LEARNING_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def make_pixels(shown: list[charts.Chart]) -> torch.Tensor:
    """(charts, 3, SIZE, SIZE) float32, normalised as the processor does."""
    import numpy
    import torch

    images = numpy.stack([numpy.asarray(charts.draw(chart)) for chart in shown])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def optimize(
    name: str, parameters: list[torch.nn.Parameter], steps: int, loss_of_step: Callable[[], torch.Tensor]
) -> None:
    """AdamW over `parameters`, in bfloat16 where autocast sees fit."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    began = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of_step()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - began
            print(f"{name} step {step} of {steps}: loss {loss.item():.4f}, {seconds:.0f} s", flush=True)


def teach_to_see(
    model: Idefics3ForConditionalGeneration, shown: Iterator[charts.Chart], steps: int, batch: int
) -> None:
    """Vision tower and connector: image token i tells colour and value of column i, the next one the rest.

    Linear heads read that from the tokens and are thrown away. Next-token loss alone takes far longer to find
    that the image matters.
    """
    import torch
    from torch.nn.functional import cross_entropy, mse_loss

    slots, names, values = len(charts.COLOURS), list(charts.COLOURS), list(charts.VALUES)
    width = model.config.text_config.hidden_size
    column = torch.nn.Linear(width, slots + 1 + len(values) + 1)
    whole = torch.nn.Linear(width, 2 + slots + len(charts.TITLES))

    def loss() -> torch.Tensor:
        taught = list(itertools.islice(shown, batch))
        features = model.model.get_image_features(make_pixels(taught).unsqueeze(1), return_dict=True)
        tokens = torch.stack(list(features.pooler_output))
        colour = torch.full((batch, slots), slots)
        value = torch.full((batch, slots), -100)
        for row, chart in enumerate(taught):
            for slot, (one, height) in enumerate(chart.content):
                colour[row, slot] = names.index(one)
                value[row, slot] = values.index(height)
        said_colour, said_value, said_height = (
            column(tokens[:, :slots]).float().split([slots + 1, len(values), 1], dim=-1)
        )
        is_there = value != -100
        said_kind, said_count, said_title = (
            whole(tokens[:, slots]).float().split([2, slots, len(charts.TITLES)], dim=-1)
        )
        return (
            cross_entropy(said_colour.flatten(0, 1), colour.flatten())
            + cross_entropy(said_value.flatten(0, 1), value.flatten())
            + 3 * mse_loss(said_height[is_there].squeeze(-1), value[is_there] / len(values))
            + 0.3 * cross_entropy(said_kind, torch.tensor([int(chart.kind == "bar") for chart in taught]))
            + 0.3 * cross_entropy(said_count, torch.tensor([len(chart.values) - 1 for chart in taught]))
            + 0.3
            * cross_entropy(said_title, torch.tensor([charts.TITLES.index(chart.title) for chart in taught]))
        )

    seeing = [*model.model.vision_model.parameters(), *model.model.connector.parameters()]
    optimize("see", [*seeing, *column.parameters(), *whole.parameters()], steps, loss)
    for parameter in seeing:
        parameter.requires_grad = False


def teach_to_speak(
    model: Idefics3ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    taught: Iterator[lessons.Lesson],
    steps: int,
    batch: int,
) -> None:
    """Text model, embeddings and head, on the lessons; what sees stays as it is."""

    def loss() -> torch.Tensor:
        result: torch.Tensor = model(
            **make_batch(list(itertools.islice(taught, batch)), tokenizer), use_cache=False
        ).loss
        return result

    optimize("speak", [one for one in model.parameters() if one.requires_grad], steps, loss)


def pretrain(output: Path, see_steps: int, speak_steps: int, batch: int, seed: int) -> None:
    """Train from random weights and write model and processor into `output`."""
    import torch

    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # part of the result: sums are split by thread
    processor = make_processor()
    model = make_model(processor.tokenizer).train()
    # In bfloat16, the fused attention of a CPU is slow in its backward pass.
    model.set_attn_implementation("eager")
    shown = lesson_charts(seed)
    rng = random.Random(f"lessons/{seed}")
    teach_to_see(model, shown, see_steps, batch)
    teach_to_speak(
        model, processor.tokenizer, (lessons.lesson(chart, rng) for chart in shown), speak_steps, batch
    )
    model.to(torch.bfloat16).save_pretrained(output)
    processor.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m runner.demo.pretrain", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the model; made if missing")
    parser.add_argument("--see-steps", type=int, default=SEE_STEPS)
    parser.add_argument("--speak-steps", type=int, default=SPEAK_STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pretrain(arguments.output, arguments.see_steps, arguments.speak_steps, arguments.batch, arguments.seed)


if __name__ == "__main__":
    main()
