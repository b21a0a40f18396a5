"""What a row means: the four formats of a source, turned into conversations.

    vqa                 image, question, answer (text or a list of it), group
    caption             image, caption
    messages            images, messages (OpenAI and TRL style)
    prompt_completion   images, prompt, completion (texts, or lists of messages)

Every row becomes a list of messages `{role, content: [{type, text}]}` that ends with the assistant's answer,
and the words of evaluation: question, accepted answers, group. Images are `{type: image}` parts; their pixels
stay where they are. Pure: rows in, rows out; a row that means nothing carries its problem instead of raising,
so that all of them can be named at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from runner.manifest import Format
from runner.train.metrics import RESERVED_GROUPS

VERSION = 1
"""Raise it with every change of what a row turns into: kept conversions are keyed by it."""

ROLES = ("system", "user", "assistant")

GROUPS = {
    "human": "human",
    "machine": "augmented",
    "human_test": "human",
    "augmented_test": "augmented",
}
"""ChartQA's words in its two editions (HuggingFaceM4, lmms-lab) -> the paper's. Others stay as they are."""


class Part(TypedDict):
    type: str
    text: str | None


class Message(TypedDict):
    role: str
    content: list[Part]


class Converted(TypedDict):
    """One row, as `convert` leaves it."""

    messages: list[Message]
    """Ends with the assistant's answer; empty if there is a problem."""
    question: str
    """What the last user message asks, in words."""
    answers: list[str]
    """Accepted in evaluation; the first one is trained on."""
    group: str | None
    turns: int
    """Assistant messages that carry loss when every one of them does."""
    history: bool
    """Whether the row wants loss on its last assistant message only, and has others before it."""
    digest: str
    """SHA-256 of everything above."""
    problem: str | None


@dataclass(frozen=True)
class Reading:
    """How the rows of one source are read."""

    format: Format
    columns: Mapping[str, str]
    """Role -> column, for every role that the format reads here."""
    system_prompt: str | None
    prompt: str | None
    """The instruction of format caption."""
    labels: Mapping[str, Sequence[str]]
    """Column -> names of its classes, for columns that hold class numbers."""
    controls: str
    """Regular expression of the control tokens that no text may contain: a text that spells one would be read
    as an image or as the end of a turn."""


class _Unusable(Exception):
    """A row that cannot be used; the message is the reason."""


def convert(row: Mapping[str, Any], images: int, reading: Reading) -> Converted:
    """One row of a source.

    Args:
        row: the columns that `reading.columns` names, images left out.
        images: how many images the row has.
    """
    found = Converted(
        messages=[], question="", answers=[], group=None, turns=0, history=False, digest="", problem=None
    )
    try:
        cells = {role: _cell(row, column, reading) for role, column in reading.columns.items()}
        found["messages"], found["answers"] = _BUILDERS[reading.format](cells, images, reading)
        if reading.system_prompt is not None:
            if found["messages"][0]["role"] == "system":
                raise _Unusable("the row has a system message of its own and the job sets system_prompt")
            found["messages"].insert(0, _message("system", [_text(reading.system_prompt)]))
        _check(found["messages"], images, reading.controls)
        found["group"] = _group(cells)
    except _Unusable as error:
        found["problem"], found["messages"] = str(error), []
        return found
    assistants = sum(message["role"] == "assistant" for message in found["messages"])
    found["question"] = words(
        next((m for m in reversed(found["messages"][:-1]) if m["role"] == "user"), _message("user", []))
    )
    found["history"] = reading.format == "prompt_completion" and assistants > 1
    found["turns"] = 1 if found["history"] else assistants
    found["digest"] = hashlib.sha256(
        json.dumps([found["messages"], found["answers"], found["group"]], sort_keys=True).encode()
    ).hexdigest()
    return found


def without_nulls(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: an image part without the null text that Arrow gives it."""
    return [
        {
            "role": message["role"],
            "content": [
                {key: value for key, value in part.items() if value is not None}
                for part in message["content"]
            ],
        }
        for message in messages
    ]


# --- the formats ---


def _vqa(cells: Mapping[str, Any], images: int, reading: Reading) -> tuple[list[Message], list[str]]:
    question = _required(cells["question"], "question")
    given = cells["answer"] if isinstance(cells["answer"], list) else [cells["answer"]]
    answers = [_string(answer, "answer") for answer in given]
    if not answers or not answers[0].strip():
        raise _Unusable("empty answer")
    prompt = _message("user", [*_images(_needed(images)), _text(question)])
    return [prompt, _message("assistant", [_text(answers[0])])], [
        answer for answer in answers if answer.strip()
    ]


def _caption(cells: Mapping[str, Any], images: int, reading: Reading) -> tuple[list[Message], list[str]]:
    caption = _required(cells["caption"], "caption")
    instruction = [] if reading.prompt is None else [_text(reading.prompt)]
    prompt = _message("user", [*_images(_needed(images)), *instruction])
    return [prompt, _message("assistant", [_text(caption)])], [caption]


def _messages(cells: Mapping[str, Any], images: int, reading: Reading) -> tuple[list[Message], list[str]]:
    messages = _placed(_parsed(cells["messages"], "messages"), images)
    if messages[-1]["role"] != "assistant":
        raise _Unusable(
            f"the last message is the {messages[-1]['role']}'s: there is no answer to learn after it"
        )
    for message in messages:
        if message["role"] == "assistant" and not words(message).strip():
            raise _Unusable("empty answer")
    return messages, [words(messages[-1])]


def _prompt_completion(
    cells: Mapping[str, Any], images: int, reading: Reading
) -> tuple[list[Message], list[str]]:
    prompt, completion = (
        [_message(role, [_text(_required(cells[name], name))])]
        if isinstance(cells[name], str) or cells[name] is None
        else _parsed(cells[name], name)
        for name, role in (("prompt", "user"), ("completion", "assistant"))
    )
    if [message["role"] for message in completion] != ["assistant"]:
        roles = ", ".join(message["role"] for message in completion)
        raise _Unusable(f"completion is one assistant message, not: {roles}")
    if prompt[-1]["role"] != "user":
        raise _Unusable(f"the last message of prompt is the {prompt[-1]['role']}'s, not the user's")
    if not words(completion[0]).strip():
        raise _Unusable("empty answer")
    return [*_placed(prompt, images), *completion], [words(completion[0])]


_BUILDERS = {
    "vqa": _vqa,
    "caption": _caption,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
}


# --- cells ---


def _cell(row: Mapping[str, Any], column: str, reading: Reading) -> Any:
    """The value of a column; a class number becomes the name of its class."""
    value = row[column]
    names = reading.labels.get(column)
    if names is None or value is None:
        return value
    numbers = value if isinstance(value, list) else [value]
    if not all(0 <= number < len(names) for number in numbers):
        return None
    return [names[number] for number in numbers] if isinstance(value, list) else names[value]


def _string(value: Any, what: str) -> str:
    """Text as it is; an integer in digits; another number in its shortest form without a trailing .0, because
    CSV readers turn a column of integers with a gap into floats, and the gap into NaN, which is no text."""
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return format(value, ".15g") if isinstance(value, float) else str(value)
    raise _Unusable(f"{what} is a {type(value).__name__}, not text")


def _required(value: Any, what: str) -> str:
    text = _string(value, what)
    if not text.strip():
        raise _Unusable(f"empty {what}")
    return text


def _needed(images: int) -> int:
    if images == 0:
        raise _Unusable("no image")
    return images


def _group(cells: Mapping[str, Any]) -> str | None:
    value = cells.get("group")
    if value is None:
        return None
    group = GROUPS.get(_string(value, "group"), _string(value, "group"))
    if group in RESERVED_GROUPS or group.startswith("n_"):
        raise _Unusable(f"group {group!r} is a word that results use themselves")
    return group


# --- messages ---


def _message(role: str, content: list[Part]) -> Message:
    return Message(role=role, content=content)


def _text(text: str) -> Part:
    return Part(type="text", text=text)


def _images(count: int) -> list[Part]:
    return [Part(type="image", text=None) for _ in range(count)]


def words(message: Message) -> str:
    """The text parts of a message, joined by newlines."""
    return "\n".join(part["text"] for part in message["content"] if part["text"] is not None)


def _parsed(value: Any, what: str) -> list[Message]:
    """Messages from what a dataset holds: `content` a string or a list of parts."""
    if not isinstance(value, list) or not value:
        raise _Unusable(f"{what} is not a list of messages")
    return [_parsed_message(entry, f"{what}[{number}]") for number, entry in enumerate(value)]


def _parsed_message(entry: Any, what: str) -> Message:
    if not isinstance(entry, dict) or entry.get("role") is None:
        raise _Unusable(f"{what} has no role and content")
    role = entry["role"]
    if role not in ROLES:
        raise _Unusable(f"{what} has role {role!r}; known: {', '.join(ROLES)}")
    more = [
        key for key, value in entry.items() if key not in ("role", "content") and value not in (None, "", [])
    ]
    if more:
        raise _Unusable(
            f"{what} has {', '.join(more)}, which would be left out; only role and content are read"
        )
    content = entry.get("content")
    if isinstance(content, str):
        return _message(role, [_text(content)])
    if not isinstance(content, list) or not content:
        raise _Unusable(f"{what} has no content")
    return _message(
        role, [_part(part, f"{what}.content[{number}]", role) for number, part in enumerate(content)]
    )


def _part(part: Any, what: str, role: str) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _text(part["text"])
    if kind == "image" and role == "user":
        return Part(type="image", text=None)
    if kind == "image":
        raise _Unusable(f"{what} is an image of the {role}; only the user shows images")
    raise _Unusable(
        f"{what} is neither {{type: text, text: ...}} nor {{type: image}} with the image in its column"
    )


def _placed(messages: list[Message], images: int) -> list[Message]:
    """With a part for every image: where the row says, else all before the first user message, as TRL
    does."""
    if images and not any(part["type"] == "image" for message in messages for part in message["content"]):
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise _Unusable(f"{images} images and no user message to show them")
        first["content"][:0] = _images(images)
    return messages


def _check(messages: list[Message], images: int, controls: str) -> None:
    """What every format must hold for the chat template and the processor."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise _Unusable("a system message that is not the first")
    if "user" not in roles:
        raise _Unusable("no user message")
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places != images:
        raise _Unusable(f"{images} images for {places} image parts")
    for message in messages:
        if token := re.search(controls, words(message)):
            raise _Unusable(f"the {message['role']}'s text contains the control token {token[0]!r}")
