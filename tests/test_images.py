"""The image policy, case by case, and damaged files of every format."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runner.train.data.images import BadImage, Stored, inspect, open_image, scaled
from tests.samples import broken, cmyk, encoded, grey16, palette, picture, png, sideways


def stored(data: bytes | None = None, path: str | None = None) -> Stored:
    return Stored(bytes=data, path=path)


def opened(data: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    image, notes = open_image(stored(data))
    assert image.mode == "RGB"
    return np.asarray(image), notes


def test_rgb_is_not_touched() -> None:
    pixels, notes = opened(png(seed=5))
    assert np.array_equal(pixels, np.asarray(picture(seed=5)))
    assert notes == ()


def test_exif_orientation_is_applied() -> None:
    pixels, notes = opened(sideways())
    assert pixels.shape == (48, 32, 3)
    assert notes == ("turned upright (EXIF orientation 6)",)


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    pixels, notes = opened(grey16())
    expected = np.round(np.linspace(0, 65535, 1200).round() / 257).reshape(30, 40)
    assert np.array_equal(pixels[:, :, 0], expected)
    assert np.array_equal(pixels[:, :, 0], pixels[:, :, 2])
    assert notes == ("16-bit grey scaled to 8 bits (mode I;16)",)


def test_thirty_two_bit_grey_beyond_sixteen_bits_is_refused() -> None:
    values = np.array([[0, 70000]], dtype=np.int32)
    with pytest.raises(BadImage, match="grey values from 0 to 70000, beyond 16 bits"):
        open_image(stored(encoded(Image.fromarray(values), "TIFF")))


def test_floating_point_is_refused() -> None:
    with pytest.raises(BadImage, match="floating-point pixels"):
        open_image(stored(encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")))


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (palette(), "P"),
        (cmyk(), "CMYK"),
        (encoded(picture().convert("L")), "L"),
        (encoded(picture().convert("1")), "1"),
    ],
)
def test_other_modes_are_converted_and_noted(data: bytes, mode: str) -> None:
    pixels, notes = opened(data)
    assert pixels.shape == (32, 48, 3)
    assert notes == (f"converted to RGB (mode {mode})",)


def transparent(mode: str) -> bytes:
    """A black square, transparent on its left half."""
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 2))
    return encoded(image.convert(mode))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(mode: str) -> None:
    pixels, notes = opened(transparent(mode))
    assert pixels[:, :2].min() == 255
    assert pixels[:, 2:].max() == 0
    assert notes == (f"transparency put on white (mode {mode})",)


def test_transparent_colour_of_a_palette_becomes_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 0, 0, 0])
    image.putpixel((1, 0), 1)
    pixels, notes = opened(encoded(image, transparency=0))
    assert pixels.tolist() == [[[255, 255, 255], [0, 0, 0]]]
    assert notes == ("transparency put on white (mode P)",)


def test_opaque_alpha_changes_no_pixel() -> None:
    pixels, _ = opened(encoded(picture(seed=6).convert("RGBA")))
    assert np.array_equal(pixels, np.asarray(picture(seed=6)))


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    pixels, notes = opened(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert "first of several frames" in notes


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"not a picture", "not an image that Pillow can read"),
        (broken(), "corrupt: "),
        (encoded(picture(200, 200), "JPEG")[:900], "corrupt: "),
    ],
)
def test_what_cannot_be_decoded_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        open_image(stored(data))


def test_files(tmp_path: Path) -> None:
    (tmp_path / "here.png").write_bytes(png())
    (tmp_path / "empty.png").touch()
    assert open_image(stored(path=str(tmp_path / "here.png")))[0].size == (48, 32)
    with pytest.raises(BadImage, match=r"no such file: .*gone\.png"):
        open_image(stored(path=str(tmp_path / "gone.png")))
    with pytest.raises(BadImage, match=r"0 bytes: .*empty\.png"):
        open_image(stored(path=str(tmp_path / "empty.png")))
    with pytest.raises(BadImage, match=r"cannot read .*: Is a directory"):
        open_image(stored(path=str(tmp_path)))
    with pytest.raises(BadImage, match=r"cannot read x{200} \.\.\. \(9,000 characters\): File name too long"):
        open_image(stored(path="x" * 9000))


@pytest.mark.parametrize("factor", [0.6, 0.4])
def test_decompression_bombs_are_refused(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Pillow only warns up to twice its limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(48 * 32 * factor))
    with pytest.raises(BadImage, match="pixels"):
        open_image(stored(png()))


def test_damaged_files_are_refused_or_decoded_and_nothing_else_happens() -> None:
    """Flipped, cut and doubled bytes: no exception but ours, no warning."""
    rng = random.Random(0)
    healthy = [
        png(),
        grey16(),
        palette(),
        cmyk(),
        sideways(),
        encoded(picture(), "GIF"),
        encoded(picture(), "WEBP"),
        encoded(picture(), "TIFF", compression="tiff_lzw"),
        encoded(picture(), "TIFF"),
        encoded(picture(), "BMP"),
        encoded(picture(), "PPM"),
        encoded(picture(), "TGA"),
        encoded(picture(), "ICO"),
    ]
    refused = 0
    for turn in range(1500):
        data = bytearray(rng.choice(healthy))
        for _ in range(rng.randint(1, 8)):
            # Headers are short, so half of the damage is done there.
            position = rng.randrange(min(64, len(data)) if rng.random() < 0.5 else len(data))
            data[position] = rng.randrange(256)
        if turn % 3 == 0:
            del data[rng.randrange(len(data)) :]
        try:
            open_image(stored(bytes(data)))
        except BadImage:
            refused += 1
    assert 300 < refused < 1400


def test_inspection_of_a_row() -> None:
    found = inspect([stored(sideways()), stored(palette())])
    assert (found["problem"], found["heights"], found["widths"]) == (None, [48, 32], [32, 48])
    assert found["notes"] == ["turned upright (EXIF orientation 6)", "converted to RGB (mode P)"]
    assert found["digest"] != inspect([stored(palette()), stored(sideways())])["digest"]


def test_inspection_names_the_image() -> None:
    assert inspect([stored(png()), stored(b"x")])["problem"] == (
        "image 2 of 2: not an image that Pillow can read"
    )
    assert inspect([stored(png()), None])["problem"] == "image 2 of 2 is null"
    assert (
        inspect([None])["problem"] is None
    )  # a row without an image: whether that is bad is the format's to say


def test_shrinking() -> None:
    assert scaled(100, 50, 1.0) == (100, 50)
    assert scaled(100, 50, 0.333) == (33, 17)
    assert scaled(3, 1, 0.1) == (1, 1)
    assert open_image(stored(png()), scale=0.5)[0].size == (24, 16)
