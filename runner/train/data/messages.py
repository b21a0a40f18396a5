"""Messages: `{role, content: [{type, text}]}`, parsed from the ways that datasets write them, and checked.

Images are `{type: image}` parts of the user; their pixels stay where they are. Pure: what cannot be a message
raises `Unusable` with the reason, and the caller names the row. What a row's columns mean is
`runner.train.data.formats`'.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypedDict

ROLES = ("system", "user", "assistant")


class Part(TypedDict):
    type: str
    text: str | None


class Message(TypedDict):
    role: str
    content: list[Part]


class Unusable(Exception):
    """A row that cannot be used; the message is the reason."""


def text_part(text: str) -> Part:
    return Part(type="text", text=text)


def image_parts(count: int) -> list[Part]:
    return [Part(type="image", text=None) for _ in range(count)]


def words(message: Message) -> str:
    """The text parts of a message, joined by newlines."""
    return "\n".join(part["text"] for part in message["content"] if part["text"] is not None)


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


def parsed(value: Any, what: str) -> list[Message]:
    """Messages from what a dataset holds: `content` a string or a list of parts.

    Raises:
        Unusable: it is something else.
    """
    if not isinstance(value, list) or not value:
        raise Unusable(f"{what} is not a list of messages")
    return [_parsed_message(entry, f"{what}[{number}]") for number, entry in enumerate(value)]


def placed(messages: list[Message], images: int) -> list[Message]:
    """With a part for every image: where the row says, else all before the first user message, as TRL
    does."""
    if images and not any(part["type"] == "image" for message in messages for part in message["content"]):
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise Unusable(f"{images} images and no user message to show them")
        first["content"][:0] = image_parts(images)
    return messages


def check(messages: list[Message], images: int, controls: str) -> None:
    """What every format must hold for the chat template and the processor.

    Args:
        images: how many the messages show.
        controls: regular expression of the control tokens that no text may contain.

    Raises:
        Unusable: they do not hold it.
    """
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise Unusable("a system message that is not the first")
    if "user" not in roles:
        raise Unusable("no user message")
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places != images:
        raise Unusable(f"{images} images for {places} image parts")
    for message in messages:
        if token := re.search(controls, words(message)):
            raise Unusable(f"the {message['role']}'s text contains the control token {token[0]!r}")


def _parsed_message(entry: Any, what: str) -> Message:
    if not isinstance(entry, dict) or entry.get("role") is None:
        raise Unusable(f"{what} has no role and content")
    role = entry["role"]
    if role not in ROLES:
        raise Unusable(f"{what} has role {role!r}; known: {', '.join(ROLES)}")
    more = [
        key for key, value in entry.items() if key not in ("role", "content") and value not in (None, "", [])
    ]
    if more:
        raise Unusable(
            f"{what} has {', '.join(more)}, which would be left out; only role and content are read"
        )
    content = entry.get("content")
    if isinstance(content, str):
        return Message(role=role, content=[text_part(content)])
    if not isinstance(content, list) or not content:
        raise Unusable(f"{what} has no content")
    parts = [_part(part, f"{what}.content[{number}]", role) for number, part in enumerate(content)]
    return Message(role=role, content=parts)


def _part(part: Any, what: str, role: str) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return text_part(part["text"])
    if kind == "image" and role == "user":
        return Part(type="image", text=None)
    if kind == "image":
        raise Unusable(f"{what} is an image of the {role}; only the user shows images")
    raise Unusable(
        f"{what} is neither {{type: text, text: ...}} nor {{type: image}} with the image in its column"
    )
