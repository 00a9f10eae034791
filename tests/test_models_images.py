"""open_image: every kind of picture becomes upright 8-bit RGB, every kind of damage an InputError."""

from __future__ import annotations

import base64
import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_checkpoint import image_bytes, tiny_image

from flowmm.errors import InputError
from flowmm.models.images import open_image

PNG = image_bytes(tiny_image())


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a b.png"
    path.write_bytes(PNG)
    expected = np.asarray(tiny_image())
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    for source in (path, str(path), path.as_uri(), PNG, url, tiny_image()):
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), expected)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(image_bytes(tiny_image(24, 16), "JPEG", exif=exif)).size == (16, 24)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode)
    options: dict[str, Any] = {"transparency": 0} if mode == "P" else {}
    assert open_image(image_bytes(image, **options)).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    assert open_image(Image.new(mode, (8, 8))).mode == "RGB"


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16))
    levels = np.asarray(open_image(image_bytes(grey)))[..., 0].astype(int)
    assert np.abs(levels - [[0, 100], [200, 255]]).max() <= 1


def test_the_first_frame_of_an_animation_is_used() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    animation = image_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(animation).getpixel((0, 0)) == (255, 0, 0)


def test_the_given_image_is_not_modified() -> None:
    image = Image.new("RGBA", (8, 8))
    open_image(image)
    assert image.mode == "RGBA"


def test_unusable_files_are_explained(tmp_path: Path) -> None:
    files = {"text.png": b"hello", "empty.png": b"", "cut.png": PNG[: len(PNG) // 2]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    for name, reason in {
        "missing.png": "no such file",
        "folder": "is a directory",
        "text.png": "not an image",
        "empty.png": "the file is empty",
        "cut.png": "corrupt or truncated",
        "x" * 5000: "cannot be read|no such file",
    }.items():
        with pytest.raises(InputError, match=reason) as caught:
            open_image(tmp_path / name)
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("https://example.org/a.png", "does not download"),
        ("data:image/png;base64,@@@", "base64 data is damaged"),
        ("data:image/png,abc", "expected data:image"),
        ("nul\0byte.png", "no such file|cannot be read"),
        (Image.new("RGB", (0, 4)), "empty"),
        (Image.new("F", (4, 4)), "floating-point"),
        (17, "expected a path, bytes or a PIL image"),
    ],
)
def test_unusable_sources_are_explained(source: object, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        open_image(source)  # ty: ignore[invalid-argument-type]


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="too many pixels"):
        open_image(PNG)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
def test_damaged_bytes_give_an_image_or_an_input_error(data: st.DataObject, kind: str) -> None:
    content = bytearray(image_bytes(tiny_image(), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(1, len(content))) :]
    with contextlib.suppress(InputError):
        assert open_image(bytes(content)).mode == "RGB"
