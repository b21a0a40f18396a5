"""What the tiny model is taught before anyone tunes it: a few sentences about charts, and small talk.

Pure text about `runner.demo.charts.Chart`; the pretraining script turns it into tokens. The lessons
transcribe, order and describe charts. They never ask the questions of the dataset: that task is what the demo
job teaches.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from runner.demo.charts import COLOURS, TITLES, Chart

SMALL_TALK = (
    ("Hello!", "Hello! Show me a chart."),
    ("Hi.", "Hello! Show me a chart."),
    ("Who are you?", "I am a very small model that looks at charts."),
    ("What can you do?", "I can transcribe a chart, order its values and describe it."),
    ("Thank you.", "You are welcome."),
    ("Good morning.", "Good morning!"),
    ("What is a chart?", "A picture of values, as bars or as a line."),
    ("How are you?", "I am fine."),
)

SYSTEM_PROMPTS = (
    "You look at charts.",
    "Answer with a single word or number.",
    "You are a helpful assistant.",
    "You are a vision language model. Answer about the chart in a few words.",
)

_WORDS = (
    *(
        "what",
        "which",
        "how",
        "many",
        "is",
        "are",
        "there",
        "the",
        "of",
        "than",
        "in",
        "value",
        "number",
        "word",
    ),
    *("chart", "line", "bar", "bars", "point", "points", "highest", "lowest", "higher", "lower", "Yes", "No"),
    *("title", "sum", "more", "less", "between", "answer", "question", "image", *COLOURS),
)

Turn = tuple[str, str]
"""What the user says, and what the assistant answers."""


@dataclass(frozen=True)
class Lesson:
    """One conversation. `chart` is None for text alone; the first turn carries the image otherwise."""

    chart: Chart | None
    system: str | None
    turns: tuple[Turn, ...]


def _listing(columns: list[tuple[str, int]]) -> str:
    return ", ".join(f"{colour} {value}" for colour, value in columns)


def _transcribe(chart: Chart, rng: random.Random) -> Turn:
    return "Transcribe the chart.", _listing(list(chart.content))


def _descending(chart: Chart, rng: random.Random) -> Turn:
    return "Order the chart, falling.", _listing(sorted(chart.content, key=lambda one: -one[1]))


def _ascending(chart: Chart, rng: random.Random) -> Turn:
    return "Order the chart, rising.", _listing(sorted(chart.content, key=lambda one: one[1]))


def _arrange(chart: Chart, rng: random.Random) -> Turn:
    columns = rng.sample(chart.content, len(chart.content))
    return f"Transcribe in this order: {', '.join(colour for colour, _ in columns)}.", _listing(columns)


def _describe(chart: Chart, rng: random.Random) -> Turn:
    said = f"A {chart.kind} chart of {chart.title} with {len(chart.values)} {chart.noun}s."
    return "Describe the chart.", said


def _repeat(rng: random.Random) -> Turn:
    if rng.random() < 0.5:
        text = " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, 6)))
    else:
        text = "".join(chr(rng.randint(33, 126)) for _ in range(rng.randint(1, 8)))
    return f"Repeat: {text}", text


_ABOUT_A_CHART: tuple[Callable[[Chart, random.Random], Turn], ...] = (
    _transcribe,
    _descending,
    _ascending,
    _arrange,
    _arrange,
    _describe,
)


def lesson(chart: Chart, rng: random.Random) -> Lesson:
    """A conversation about `chart`, or in one case of ten without an image."""
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.2 else None
    if rng.random() < 0.1:
        return Lesson(None, system, (rng.choice(SMALL_TALK) if rng.random() < 0.5 else _repeat(rng),))
    return Lesson(chart, system, tuple(one(chart, rng) for one in rng.sample(_ABOUT_A_CHART, 2)))


def corpus() -> list[str]:
    """Every kind of text that the tokenizer should have short words for."""
    rng = random.Random("corpus")
    frame = ["User:", "Assistant:", "System:", "What", "Which", "How", "Is", "Yes", "No", "Hello", "Answer"]
    numbers = [f" {number}" for number in range(0, 101, 5)]
    words = [" " + word for word in (*_WORDS, *TITLES)]
    talk = [text for question, answer in SMALL_TALK for text in (question, " " + answer)]
    shown = [Chart(kind, "Sales", tuple(COLOURS), (10, 20, 30, 40, 50, 60)) for kind in ("bar", "line")]
    about = [one(chart, rng) for chart in shown for one in _ABOUT_A_CHART]
    return [
        *(2 * (frame + numbers + words)),
        *talk,
        *SYSTEM_PROMPTS,
        *(text for question, answer in about for text in (question, " " + answer)),
    ]
