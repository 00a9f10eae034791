"""A picture as a list of shapes, written as SVG text or as PNG bytes: both show the same shapes in the same places."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import hypot
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

INK = "#222222"
FONT_SIZE = 12
# A PNG has so many pixels per unit of length; lines are drawn finer still and averaged, which smooths them.
PNG_SCALE = 2
SMOOTHING = 2

Place = tuple[float, float]
Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True)
class Line:
    """Straight strokes through `places`; `dashes` is the length of a stroke and of the gap behind it."""

    places: tuple[Place, ...]
    colour: str
    width: float = 1
    dashes: tuple[float, float] | None = None


@dataclass(frozen=True)
class Dot:
    """A filled circle; `hint` is what an SVG shows under the pointer."""

    centre: Place
    radius: float
    colour: str
    hint: str


@dataclass(frozen=True)
class Text:
    """One line of text; `place` is on its baseline. `upright`: turned by a quarter, to be read from below."""

    words: str
    place: Place
    anchor: Anchor = "start"
    bold: bool = False
    upright: bool = False


Shape = Line | Dot | Text


@dataclass(frozen=True)
class Drawing:
    """Shapes on white, the later over the earlier; y grows downwards."""

    width: float
    height: float
    shapes: tuple[Shape, ...]

    def svg(self) -> str:
        """The SVG document."""
        width, height = f"{self.width:.0f}", f"{self.height:.0f}"
        opening = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            f'font-family="system-ui, Helvetica, Arial, DejaVu Sans, sans-serif" font-size="{FONT_SIZE}" fill="{INK}">'
        )
        ground = f'<rect width="{width}" height="{height}" fill="white"/>'
        return "\n".join([opening, ground, *map(_svg_of, self.shapes), "</svg>", ""])

    def png(self) -> bytes:
        """The PNG file, :data:`PNG_SCALE` pixels per unit."""
        fine = PNG_SCALE * SMOOTHING
        size = (round(self.width), round(self.height))
        image = Image.new("RGB", (size[0] * fine, size[1] * fine), "white")
        pen = ImageDraw.Draw(image)
        for shape in self.shapes:
            match shape:
                case Line():
                    _stroke(pen, shape, fine)
                case Dot(centre, radius, colour):
                    pen.circle((centre[0] * fine, centre[1] * fine), radius * fine, fill=colour)
                case Text():
                    _write(image, shape, fine)
        out = io.BytesIO()
        image.resize((size[0] * PNG_SCALE, size[1] * PNG_SCALE), Image.Resampling.BOX).save(out, "PNG", optimize=True)
        return out.getvalue()


def _svg_of(shape: Shape) -> str:
    match shape:
        case Line(places, colour, width, dashes):
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            dashed = "" if dashes is None else f' stroke-dasharray="{dashes[0]:g} {dashes[1]:g}"'
            return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashed}/>'
        case Dot((x, y), radius, colour, hint):
            title = f"<title>{escape(hint)}</title>"
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}">{title}</circle>'
        case Text(words, (x, y), anchor, bold, upright):
            place = f'transform="translate({x:.1f} {y:.1f}) rotate(-90)"' if upright else f'x="{x:.1f}" y="{y:.1f}"'
            weight = ' font-weight="600"' if bold else ""
            return f'<text {place} text-anchor="{anchor}"{weight}>{escape(words)}</text>'


def _stroke(pen: ImageDraw.ImageDraw, line: Line, scale: float) -> None:
    places = [(x * scale, y * scale) for x, y in line.places]
    width = round(line.width * scale)
    if line.dashes is None:
        pen.line(places, fill=line.colour, width=width, joint="curve")
        return
    for start, end in _dashes(places, line.dashes[0] * scale, line.dashes[1] * scale):
        pen.line([start, end], fill=line.colour, width=width)


def _dashes(places: Sequence[Place], stroke: float, gap: float) -> list[tuple[Place, Place]]:
    """Strokes along a line; the pattern goes on around its corners."""
    pieces = []
    offset = 0.0
    for (x1, y1), (x2, y2) in pairwise(places):
        length = hypot(x2 - x1, y2 - y1)
        at = -offset
        while at < length:
            low, high = max(at, 0.0), min(at + stroke, length)
            if high > low:
                first, last = (
                    (x1 + share * (x2 - x1), y1 + share * (y2 - y1)) for share in (low / length, high / length)
                )
                pieces.append((first, last))
            at += stroke + gap
        offset = (offset + length) % (stroke + gap)
    return pieces


def _write(image: Image.Image, text: Text, scale: int) -> None:
    font = ImageFont.load_default(FONT_SIZE * scale)
    stroke = scale / 4 if text.bold else 0
    # The baseline's start, middle or end, which is where an SVG anchors text.
    anchor = {"start": "ls", "middle": "ms", "end": "rs"}[text.anchor]
    x, y = text.place[0] * scale, text.place[1] * scale
    pen = ImageDraw.Draw(image)
    if not text.upright:
        pen.text((x, y), text.words, fill=INK, font=font, anchor=anchor, stroke_width=stroke, stroke_fill=INK)
        return
    left, top, right, bottom = (round(edge) for edge in pen.textbbox((0, 0), text.words, font=font, anchor=anchor))
    lying = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(lying).text((-left, -top), text.words, fill=255, font=font, anchor=anchor)
    standing = lying.rotate(90, expand=True)
    image.paste(INK, (round(x) + top, round(y) - right), standing)
