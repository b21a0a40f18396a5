"""What a row means: the formats of a source, turned into conversations.

    vqa                   image, question, answer (text or a list of it), group
    caption               image, caption
    messages              images, messages (OpenAI and TRL style)
    prompt_completion     images, prompt, completion (texts, or lists of messages)
    cauldron              images, texts: turns {user, assistant, source} (HuggingFaceM4/the_cauldron)
    llava                 images, messages whose image parts name an image by its index
                          (HuggingFaceH4/llava-instruct-mix-vsft)
    preference            image, question, chosen, rejected: texts (openbmb/RLAIF-V-Dataset)
    preference_messages   images, prompt, chosen, rejected: texts, or lists of messages
                          (HuggingFaceH4/rlaif-v_formatted, trl-lib/rlaif-v)

Every row becomes a list of messages that ends with the assistant's answer, a pair's rejected answer beside
it, and the words of evaluation: question, accepted answers, group. Rows without images are fine where images
stand in a list of their own; vqa, caption and preference ask about one. Pure: rows in, rows out; a row that
means nothing carries its problem instead of raising, so that all of them can be named at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from runner.manifest import PAIRS, Format
from runner.train.data.cells import cell, group, required, string
from runner.train.data.messages import (
    Message,
    Unusable,
    check,
    image_parts,
    parsed,
    placed,
    text_part,
    words,
)

VERSION = 2
"""Raise it with every change of what a row turns into: kept conversions are keyed by it."""


class Converted(TypedDict):
    """One row, as `convert` leaves it."""

    messages: list[Message]
    """Ends with the assistant's answer, a pair's chosen one; empty if there is a problem."""
    rejected: list[Message]
    """The other answer of a pair, one assistant message; empty for other formats."""
    shown: list[int]
    """Which images of the row the image parts show, in their order; empty if there is a problem."""
    question: str
    """What the last user message asks, in words."""
    answers: list[str]
    """Accepted in evaluation; the first one is trained on, or preferred."""
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


@dataclass(frozen=True)
class _Built:
    """What a format makes of a row."""

    messages: list[Message]
    answers: list[str]
    rejected: list[Message] = field(default_factory=list)
    shown: list[int] | None = None
    """None: every image once, in the order of the column."""


def convert(row: Mapping[str, Any], images: int, reading: Reading) -> Converted:
    """One row of a source.

    Args:
        row: the columns that `reading.columns` names, images left out.
        images: how many images the row has.
    """
    found = Converted(
        messages=[],
        rejected=[],
        shown=[],
        question="",
        answers=[],
        group=None,
        turns=0,
        history=False,
        digest="",
        problem=None,
    )
    try:
        cells = {
            role: cell(row, column, reading.labels.get(column)) for role, column in reading.columns.items()
        }
        built = _BUILDERS[reading.format](cells, images, reading)
        messages = built.messages
        if reading.system_prompt is not None:
            if messages[0]["role"] == "system":
                raise Unusable("the row has a system message of its own and the job sets system_prompt")
            messages = [Message(role="system", content=[text_part(reading.system_prompt)]), *messages]
        shown = list(range(images)) if built.shown is None else built.shown
        check([*messages, *built.rejected], len(shown), reading.controls)
        found["group"] = group(cells.get("group"))
    except Unusable as error:
        found["problem"] = str(error)
        return found
    found["messages"], found["rejected"], found["shown"] = messages, built.rejected, shown
    found["answers"] = built.answers
    asked = [message for message in messages[:-1] if message["role"] == "user"]
    found["question"] = words(asked[-1]) if asked else ""
    assistants = sum(message["role"] == "assistant" for message in messages)
    last_only = reading.format == "prompt_completion" or reading.format in PAIRS
    found["turns"] = 1 if last_only else assistants
    found["history"] = last_only and assistants > 1
    found["digest"] = _digest(found, images)
    return found


def _digest(found: Converted, images: int) -> str:
    """Of what is learned and judged. What newer formats add counts only where it is there, so that rows keep
    the digests that a run's checkpoints know them by."""
    told: list[Any] = [found["messages"], found["answers"], found["group"]]
    if found["rejected"]:
        told.append({"rejected": found["rejected"]})
    if found["shown"] != list(range(images)):
        told.append({"shown": found["shown"]})
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


# --- the formats ---


def _vqa(cells: Mapping[str, Any], images: int, reading: Reading) -> _Built:
    question = required(cells["question"], "question")
    given = cells["answer"] if isinstance(cells["answer"], list) else [cells["answer"]]
    answers = [string(answer, "answer") for answer in given]
    if not answers or not answers[0].strip():
        raise Unusable("empty answer")
    return _Built(
        [_asked(question, images), _said(answers[0])], [answer for answer in answers if answer.strip()]
    )


def _caption(cells: Mapping[str, Any], images: int, reading: Reading) -> _Built:
    caption = required(cells["caption"], "caption")
    return _Built([_asked(reading.prompt, images), _said(caption)], [caption])


def _messages(cells: Mapping[str, Any], images: int, reading: Reading) -> _Built:
    messages = parsed(cells["messages"], "messages")
    _check_order(cells["messages"])
    return _conversation(placed(messages, images))


def _prompt_completion(cells: Mapping[str, Any], images: int, reading: Reading) -> _Built:
    prompt = _prompt(cells["prompt"], images)
    completion = _answer(cells["completion"], "completion")
    return _Built([*prompt, completion], [words(completion)])


def _cauldron(cells: Mapping[str, Any], images: int, reading: Reading) -> _Built:
    turns = cells["texts"]
    if not isinstance(turns, list) or not turns:
        raise Unusable("texts is not a list of turns")
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Unusable(f"texts[{number}] has no user and assistant")
        asked, answer = (required(turn.get(role), f"texts[{number}].{role}") for role in _CAULDRON_ROLES)
        messages += [Message(role="user", content=[text_part(asked)]), _said(answer)]
    return _conversation(placed(messages, images))


_CAULDRON_ROLES = ("user", "assistant")


def _llava(cells: Mapping[str, Any], images: int, reading: Reading) -> _Built:
    """Which images are shown, in which order:

    indices of the image parts      images of the row
    no image part                   all, before the first user message
    all null                        all, in the order of the column
    1, 0                            the second, the first
    0, 0                            the first, twice
    some null                       refused
    not 0 .. images - 1             refused
    an image that none names        refused
    """
    messages = parsed(cells["messages"], "messages")
    named = _named(cells["messages"])
    if all(index is None for index in named):
        return _conversation(placed(messages, images))
    for index in named:
        if index is None:
            raise Unusable("some image parts have an index and some have none")
        if index not in range(images):
            raise Unusable(f"an image part names image {index}, and the row has {images}, counted from 0")
    if missing := sorted({*range(images)} - {*named}):
        raise Unusable(f"no part shows image {missing[0]} of {images}, counted from 0")
    return _conversation(messages, shown=named)


def _preference(cells: Mapping[str, Any], images: int, reading: Reading) -> _Built:
    prompt = [_asked(required(cells["question"], "question"), images)]
    chosen, rejected = (_said(required(cells[name], name)) for name in _ANSWERS)
    return _pair(prompt, chosen, rejected)


def _preference_messages(cells: Mapping[str, Any], images: int, reading: Reading) -> _Built:
    chosen, rejected = (_answer(cells[name], name) for name in _ANSWERS)
    return _pair(_prompt(cells["prompt"], images), chosen, rejected)


_ANSWERS = ("chosen", "rejected")

_BUILDERS = {
    "vqa": _vqa,
    "caption": _caption,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "cauldron": _cauldron,
    "llava": _llava,
    "preference": _preference,
    "preference_messages": _preference_messages,
}


# --- what formats share ---


def _asked(question: str | None, images: int) -> Message:
    """The user's message about the images, which must be there."""
    if images == 0:
        raise Unusable("no image")
    asked = [] if question is None else [text_part(question)]
    return Message(role="user", content=[*image_parts(images), *asked])


def _said(text: str) -> Message:
    return Message(role="assistant", content=[text_part(text)])


def _named(value: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The index of every image part, null where it has none, of messages that `parsed` takes."""
    return [
        part.get("index")
        for entry in value
        if isinstance(entry["content"], list)
        for part in entry["content"]
        if part["type"] == "image"
    ]


def _check_order(value: Sequence[Mapping[str, Any]]) -> None:
    """Image parts of any format but llava show the images in the order of their column."""
    named = _named(value)
    if any(index is not None for index in named) and named != list(range(len(named))):
        order = ", ".join(map(str, named))
        raise Unusable(f"its image parts name the images {order}: only format llava reads the index")


def _conversation(messages: list[Message], shown: list[int] | None = None) -> _Built:
    """Turns that end with an answer."""
    if messages[-1]["role"] != "assistant":
        raise Unusable(
            f"the last message is the {messages[-1]['role']}'s: there is no answer to learn after it"
        )
    for message in messages:
        if message["role"] == "assistant" and not words(message).strip():
            raise Unusable("empty answer")
    return _Built(messages, [words(messages[-1])], shown=shown)


def _prompt(value: Any, images: int) -> list[Message]:
    """A text of the user, or messages that end with one; images placed."""
    if isinstance(value, str) or value is None:
        prompt = [Message(role="user", content=[text_part(required(value, "prompt"))])]
    else:
        prompt = parsed(value, "prompt")
        _check_order(value)
    if prompt[-1]["role"] != "user":
        raise Unusable(f"the last message of prompt is the {prompt[-1]['role']}'s, not the user's")
    return placed(prompt, images)


def _answer(value: Any, what: str) -> Message:
    """A text of the assistant, or a list of one message that is one."""
    if isinstance(value, str) or value is None:
        return _said(required(value, what))
    messages = parsed(value, what)
    if [message["role"] for message in messages] != ["assistant"]:
        roles = ", ".join(message["role"] for message in messages)
        raise Unusable(f"{what} is one assistant message, not: {roles}")
    if not words(messages[0]).strip():
        raise Unusable(f"empty {what}")
    return messages[0]


def _pair(prompt: list[Message], chosen: Message, rejected: Message) -> _Built:
    if words(chosen).strip() == words(rejected).strip():
        raise Unusable("chosen and rejected are the same: there is nothing to prefer")
    return _Built([*prompt, chosen], [words(chosen)], rejected=[rejected])
