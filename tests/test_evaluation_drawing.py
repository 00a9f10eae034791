"""One picture, two formats: what the SVG says is where the PNG's pixels are."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import pytest
from PIL import Image

from flowmm.evaluation.drawing import PNG_SCALE, Dot, Drawing, Line, Shape, Text


def pixels(*shapes: Shape) -> Image.Image:
    return Image.open(io.BytesIO(Drawing(100, 60, shapes).png())).convert("RGB")


def at(image: Image.Image, x: float, y: float) -> object:
    return image.getpixel((round(x * PNG_SCALE), round(y * PNG_SCALE)))


def inked(image: Image.Image) -> tuple[float, ...]:
    """Box of everything that is not white, in units of the drawing."""
    box = image.convert("L").point(lambda value: 255 * (value < 128)).getbbox()
    assert box is not None
    return tuple(edge / PNG_SCALE for edge in box)


def test_shapes_are_where_the_svg_says() -> None:
    image = pixels(Line(((10, 20), (90, 20)), "#ff0000", 4), Dot((50, 40), 5, "#0000ff", "a dot"))
    assert image.size == (100 * PNG_SCALE, 60 * PNG_SCALE)
    assert at(image, 50, 20) == (255, 0, 0)
    assert at(image, 50, 40) == (0, 0, 255)
    assert at(image, 5, 20) == at(image, 50, 30) == (255, 255, 255)


def test_dashes_leave_gaps_and_go_on_around_corners() -> None:
    image = pixels(Line(((10, 20), (25, 20), (25, 50)), "#ff0000", 4, dashes=(10, 10)))
    assert at(image, 15, 20) == (255, 0, 0)
    assert at(image, 22, 20) == at(image, 25, 22) == (255, 255, 255)
    assert at(image, 25, 30) == (255, 0, 0)


@pytest.mark.parametrize(("anchor", "left", "right"), [("start", 50, 95), ("middle", 27, 73), ("end", 5, 50)])
def test_text_stands_on_its_baseline_at_its_anchor(anchor: str, left: float, right: float) -> None:
    box = inked(pixels(Text("number", (50, 30), anchor)))  # ty: ignore[invalid-argument-type]
    assert left - 1 <= box[0]
    assert box[2] <= right + 1
    assert box[3] == pytest.approx(30, abs=1)


def test_upright_text_reads_from_below() -> None:
    box = inked(pixels(Text("number", (50, 55), "start", upright=True)))
    assert box[2] == pytest.approx(50, abs=1)
    assert box[3] == pytest.approx(54, abs=1.5)
    assert box[3] - box[1] > box[2] - box[0]


def test_words_are_escaped_in_svg() -> None:
    svg = Drawing(10, 10, (Text("a < b & c", (0, 0)), Dot((1, 1), 1, "#000000", "x > y"))).svg()
    root = ElementTree.fromstring(svg)
    assert {element.text for element in root.iter() if element.text and element.text.strip()} == {"a < b & c", "x > y"}
