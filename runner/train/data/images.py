"""One image policy: whatever a dataset holds becomes upright 8-bit RGB, or a named reason why not.

    what is stored                             what the model sees
    RGB without EXIF orientation               the same pixels
    EXIF orientation 2..8                      turned upright, noted
    L, 1, P, YCbCr, CMYK, HSV                  converted, noted (an ICC profile is not applied)
    RGBA, LA, PA, a transparent colour         composited on white, noted if anything shows through
    I;16, I within 0..65535 (16-bit grey)      value / 257, noted
    several frames                             the first one, noted
    I beyond 0..65535, F, LAB                  refused: nothing says what black and white are
    0 bytes, corrupt, truncated, no such file  refused
    a URL                                      refused: nothing is fetched here
    more than 89,478,485 pixels                refused: Pillow's limit against decompression bombs

White under transparency, because charts, formulas and documents are drawn for a white page; dropping the
alpha channel instead shows what happens to be stored below, mostly black on black. 16-bit grey is scaled here
because Pillow's own conversion clips it: everything above 255 would be white.

Called twice for every image: before training on all rows (`inspect`), and in the loader's workers
(`open_image`). This module does not decide what happens to a bad row.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.GifImagePlugin import GifImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

POLICY = 1
"""Raise it with every change of what a stored image turns into: kept inspections are keyed by it."""

DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise on damaged files; found by damaging files of every format it writes."""

ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "RGBa", "La"})
ANIMATED = (GifImageFile, PngImageFile, TiffImageFile, WebPImageFile)
"""The formats whose files can hold several frames."""
GREY16_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I"})


class Stored(TypedDict):
    """An undecoded image, as `datasets.Image(decode=False)` gives it. `bytes` wins over `path`."""

    bytes: bytes | None
    path: str | None


class Inspection(TypedDict):
    """What a full decode of a row's images found. Lists have one entry per image."""

    problem: str | None
    """Why the row cannot be used; the first reason found."""
    notes: list[str]
    """What was changed to make them RGB."""
    heights: list[int]
    widths: list[int]
    digest: str
    """SHA-256 over the stored images, in order."""


class BadImage(Exception):
    """A stored image that cannot be turned into RGB; the message is the reason."""


def open_image(stored: Stored, scale: float = 1.0) -> tuple[Image.Image, tuple[str, ...]]:
    """Decode under the policy.

    Args:
        scale: factor on both sides, in (0, 1]; below 1 the image is shrunk (Lanczos) after it is upright.

    Returns:
        The image, mode RGB, and what was changed on the way.

    Raises:
        BadImage: see the table above.
    """
    image, notes = _decode(stored_bytes(stored))
    image, converted = _to_rgb(image)
    notes.extend(converted)
    if scale < 1.0:
        image = image.resize(scaled(image.height, image.width, scale)[::-1], Image.Resampling.LANCZOS)
    return image, tuple(notes)


def inspect(images: Sequence[Stored | None]) -> Inspection:
    """Decode all images of a row in full, and say what is wrong, what was changed and how large they are."""
    found = Inspection(problem=None, notes=[], heights=[], widths=[], digest="")
    digest = hashlib.sha256()
    for number, stored in enumerate(images, start=1):
        which = f"image {number} of {len(images)}" if len(images) > 1 else "image"
        if stored is None or (stored["bytes"] is None and stored["path"] is None):
            if len(images) > 1:
                found["problem"] = found["problem"] or f"{which} is null"
            continue
        try:
            data = stored_bytes(stored)
            digest.update(hashlib.sha256(data).digest())
            image, notes = open_image(Stored(bytes=data, path=stored["path"]))
        except BadImage as error:
            found["problem"] = found["problem"] or f"{which}: {error}"
            continue
        found["heights"].append(image.height)
        found["widths"].append(image.width)
        found["notes"].extend(notes)
    found["digest"] = digest.hexdigest()
    return found


def scaled(height: int, width: int, scale: float) -> tuple[int, int]:
    """Height and width in pixels after shrinking by `scale`; at least 1."""
    if scale >= 1.0:
        return height, width
    return max(1, round(height * scale)), max(1, round(width * scale))


def stored_bytes(stored: Stored) -> bytes:
    """The encoded bytes, from the row or from the file that it names.

    Raises:
        BadImage: there are none.
    """
    data = stored["bytes"]
    if data is None:
        if stored["path"] is None:
            raise BadImage("no image")
        name = stored["path"]
        if "://" in name or name.startswith("data:"):
            raise BadImage(f"not a file on this machine: {_short(name)}")
        try:
            data = Path(name).read_bytes()
        except FileNotFoundError:
            raise BadImage(f"no such file: {_short(name)}") from None
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            reason = error.strerror if isinstance(error, OSError) else error
            raise BadImage(f"cannot read {_short(name)}: {reason}") from None
    if not data:
        raise BadImage("0 bytes" if stored["path"] is None else f"0 bytes: {stored['path']}")
    return data


def _short(name: str) -> str:
    """A path for a message. An image in Base64, put into the column of paths, would fill the screen."""
    return name if len(name) <= 300 else f"{name[:200]} ... ({len(name):,} characters)"


def _decode(data: bytes) -> tuple[Image.Image, list[str]]:
    """All pixels of the first frame, upright, in the mode that is stored."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            image: Image.Image = Image.open(io.BytesIO(data))
        except DECODE_ERRORS as error:
            raise BadImage(_reason(error)) from None
        if any(issubclass(warning.category, Image.DecompressionBombWarning) for warning in caught):
            raise BadImage(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}")
        try:
            if isinstance(image, ANIMATED) and image.is_animated:
                notes.append("first of several frames")
            image.load()
        except DECODE_ERRORS as error:
            raise BadImage(_reason(error)) from None
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            if orientation in range(2, 9):
                image = ImageOps.exif_transpose(image)
                notes.append(f"turned upright (EXIF orientation {orientation})")
        except DECODE_ERRORS:
            notes.append("unreadable EXIF ignored")
    return image, notes


def _to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Mode RGB, by the table above."""
    mode = image.mode
    if mode in GREY16_MODES:
        return _grey16_to_rgb(image), [f"16-bit grey scaled to 8 bits (mode {mode})"]
    if mode == "F":
        raise BadImage("floating-point pixels have no defined black and white; store it with 8 or 16 bits")
    try:
        if mode in ALPHA_MODES or "transparency" in image.info:
            return _on_white(image)
        if mode == "RGB":
            return image, []
        return image.convert("RGB"), [f"converted to RGB (mode {mode})"]
    except DECODE_ERRORS as error:
        raise BadImage(f"mode {mode} does not convert to RGB: {_reason(error)}") from None


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage(
            f"grey values from {values.min()} to {values.max()}, beyond 16 bits, have no defined black "
            "and white"
        )
    grey = np.round(values / 257.0).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _on_white(image: Image.Image) -> tuple[Image.Image, list[str]]:
    mode = image.mode
    coloured = image.convert("RGBA")
    lowest, _ = coloured.getchannel("A").getextrema()
    if lowest == 255:
        return coloured.convert("RGB"), [f"converted to RGB (mode {mode})"]
    white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, coloured).convert("RGB"), [f"transparency put on white (mode {mode})"]


def _reason(error: BaseException) -> str:
    """One line of what Pillow says; it quotes a buffer's address, which means nothing to anybody."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow can read"
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"corrupt: {text}"
