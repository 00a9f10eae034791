"""Generated multi-image prompts with one exact answer each: the pocket model's world.

A scene is a shuffled row of captioned pictures (several coloured shapes or digits each), pairs of pictures between
which one object changes, text facts and filler. A task is a way of asking about a scene. A sample draws from a stream
keyed by (split, task, index, seed): splits share none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image

from flowmm.errors import InputError

SPLITS = ("train", "validation", "test", "calibration")

# fmt: off
NAMES = (
    "ada", "bob", "cleo", "dan", "eve", "finn", "gus", "hana", "ivy", "jack", "kim", "leo", "mia", "ned",
    "ola", "pia", "ravi", "sue", "tom", "uma",
)
KEYS = (
    "door", "lamp", "boat", "clock", "bridge", "garden", "mirror", "engine", "ladder", "violin", "basket",
    "anchor", "window", "pocket", "ticket", "tunnel", "harbour", "kettle", "rocket", "saddle",
)
VALUES = (
    "kiwi", "fig", "plum", "mango", "lemon", "cherry", "melon", "olive", "peach", "grape", "onion", "carrot",
    "walnut", "pepper", "radish", "tomato", "barley", "ginger", "celery", "papaya",
)
# fmt: on
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 40),
    "purple": (170, 50, 200),
    "white": (235, 235, 235),
}
DIGIT = "digit"
SHAPES = ("circle", "square", "triangle", "cross", "ring", DIGIT)
FILLERS = (
    "the rain stopped before noon.",
    "a train passed in the night.",
    "nobody was at the market.",
    "we walked along the river.",
    "the bread was still warm.",
    "an old song played again.",
    "the road turns left here.",
    "it was a quiet morning.",
)

IMAGE_SIZE = 32
CELL = 16
_REDRAWS = 100
_OBJECT_SIZES = (11, 12, 13, 14)
_DIGIT_SIZES = (13, 14, 15, 16)
# Which tenths of the handwritten digits belong to which split, so that no split is asked about another's handwriting.
_DIGIT_TENTHS = {"train": (0, 1, 2, 3, 4, 5), "validation": (6,), "test": (7, 8), "calibration": (9,)}


@dataclass(frozen=True)
class Object:
    """One coloured shape and the cell (row, column) of the picture it lies in; ``digit`` where the shape is one."""

    shape: str
    colour: str
    cell: tuple[int, int]
    digit: int | None = None


@dataclass(frozen=True)
class Picture:
    """A captioned image; no shape occurs in it twice. ``pixels`` is uint8 ``[IMAGE_SIZE, IMAGE_SIZE, 3]``."""

    name: str
    objects: tuple[Object, ...]
    pixels: np.ndarray


@dataclass(frozen=True)
class Pair:
    """Two pictures of one name; in the second, one object has given way to a shape that the first does not show."""

    before: Picture
    after: Picture

    @property
    def arrived(self) -> Object:
        """The object that only the second picture shows."""
        known = {item.shape for item in self.before.objects}
        (arrived,) = (item for item in self.after.objects if item.shape not in known)
        return arrived


@dataclass(frozen=True)
class Fact:
    """The sentence ``KEY is VALUE.``"""

    key: str
    value: str


@dataclass(frozen=True)
class Scene:
    """Pictures, pairs, facts and filler sentences in the order in which a prompt shows them."""

    items: tuple[Picture | Pair | Fact | str, ...]

    @property
    def pictures(self) -> list[Picture]:
        """Every picture, both of a pair one after the other."""
        shown = [(item.before, item.after) if isinstance(item, Pair) else (item,) for item in self.items]
        return [picture for group in shown for picture in group if isinstance(picture, Picture)]

    @property
    def pairs(self) -> list[Pair]:
        return [item for item in self.items if isinstance(item, Pair)]

    @property
    def facts(self) -> list[Fact]:
        return [item for item in self.items if isinstance(item, Fact)]

    def content(self) -> tuple[dict, ...]:
        """Return chat content parts; neighbouring sentences share one text part."""
        parts: list[dict] = []
        words: list[str] = []

        def show(picture: Picture, caption: str) -> None:
            parts.append({"type": "text", "text": " ".join([*words, caption])})
            parts.append({"type": "image", "image": Image.fromarray(picture.pixels)})
            words.clear()

        for item in self.items:
            match item:
                case Picture():
                    show(item, f"image {item.name}")
                case Pair():
                    show(item.before, f"image {item.before.name}")
                    show(item.after, item.after.name)
                case Fact():
                    words.append(f"{item.key} is {item.value}.")
                case str():
                    words.append(item)
        if words:
            parts.append({"type": "text", "text": " ".join(words)})
        return tuple(parts)


@dataclass(frozen=True)
class Sample:
    """One prompt, one question, one exact answer; `further` questions are of the other tasks about the same context."""

    task: str
    split: str
    index: int
    context: tuple[dict, ...]
    question: str
    answer: str
    further: tuple[str, ...] = ()

    @property
    def images(self) -> list[Image.Image]:
        return [part["image"] for part in self.context if part["type"] == "image"]

    def messages(self) -> list[dict]:
        """Return one user turn: the context's parts, then the question on a line of its own."""
        return [{"role": "user", "content": [*self.context, {"type": "text", "text": "\n" + self.question}]}]


@lru_cache(maxsize=64)
def _stencil(shape: str, size: int) -> np.ndarray:
    """Return the bool mask ``[size, size]`` of a shape that fills its box."""
    y, x = np.mgrid[0:size, 0:size] - (size - 1) / 2
    radius = size / 2
    distance = np.hypot(x, y)
    match shape:
        case "circle":
            return distance <= radius
        case "square":
            return np.maximum(abs(x), abs(y)) <= radius
        case "triangle":
            return abs(x) <= (y + radius) / 2
        case "cross":
            return np.minimum(abs(x), abs(y)) <= size / 6
        case "ring":
            return (distance <= radius) & (distance >= radius * 0.55)
    raise InputError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")


@lru_cache(maxsize=len(SPLITS))
def _handwriting(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a split's digits: ink ``[n, 8, 8]`` from 0 to 255 and labels ``[n]``."""
    with np.load(Path(__file__).parent / "digits.npz") as file:
        ink, labels = file["images"] * np.uint8(15), file["labels"]
    chosen = np.isin(np.arange(len(labels)) % 10, _DIGIT_TENTHS[split])
    return ink[chosen], labels[chosen]


def _object(shape: str, cell: tuple[int, int], split: str, rng: np.random.Generator) -> tuple[Object, np.ndarray]:
    """Draw an object's colour and digit; return it with its drawing, ink ``[n, n]`` from 0 to 1."""
    colour = str(rng.choice(list(COLOURS)))
    if shape == DIGIT:
        drawings, labels = _handwriting(split)
        chosen = int(rng.integers(len(labels)))
        return Object(shape, colour, cell, int(labels[chosen])), drawings[chosen]
    return Object(shape, colour, cell), np.empty(0)


def _paint(item: Object, drawing: np.ndarray, canvas: np.ndarray, rng: np.random.Generator) -> None:
    """Paint an object somewhere in its cell, in its colour more or less."""
    size = int(rng.choice(_OBJECT_SIZES if item.digit is None else _DIGIT_SIZES))
    if item.digit is None:
        ink = _stencil(item.shape, size).astype(float)
    else:
        scaled = Image.fromarray(drawing).resize((size, size), Image.Resampling.BILINEAR)
        ink = np.asarray(scaled, dtype=float) / 240
    top, left = np.array(item.cell) * CELL + rng.integers(0, CELL - size + 1, 2)
    box = canvas[top : top + size, left : left + size]
    box += ink[..., None] * (np.array(COLOURS[item.colour]) + rng.uniform(-15, 15, 3) - box)


def _picture(name: str, drawn: Sequence[tuple[Object, np.ndarray]], rng: np.random.Generator) -> Picture:
    canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), rng.uniform(15, 60))
    for item, drawing in drawn:
        _paint(item, drawing, canvas, rng)
    pixels = np.clip(canvas + rng.normal(0, 8, canvas.shape), 0, 255).astype(np.uint8)
    return Picture(name, tuple(item for item, _ in drawn), pixels)


def _shown(name: str, paired: bool, split: str, rng: np.random.Generator) -> Picture | Pair:
    """Draw a picture, or a pair: the same objects painted anew, but for one that a new shape replaces."""
    side = IMAGE_SIZE // CELL
    count = int(rng.integers(2, side * side + 1))
    cells = [divmod(int(cell), side) for cell in rng.permutation(side * side)[:count]]
    shapes = [str(shape) for shape in rng.permutation(SHAPES)]
    drawn = [_object(shape, cell, split, rng) for shape, cell in zip(shapes, cells, strict=False)]
    before = _picture(name, drawn, rng)
    if not paired:
        return before
    replaced = int(rng.integers(count))
    drawn[replaced] = _object(shapes[count], cells[replaced], split, rng)
    return Pair(before, _picture(name, drawn, rng))


def draw_scene(
    rng: np.random.Generator,
    split: str,
    images: int | None = None,
    pairs: int | None = None,
    facts: int | None = None,
    fillers: int | None = None,
) -> Scene:
    """Draw a scene of ``images`` names, ``pairs`` of which are shown twice; sizes left out are drawn too.

    Drawn sizes are 12-20 names, 3-12 pairs, 4-12 facts and 2-12 fillers: prompts of 360-810 tokens.

    Raises:
        InputError: more images or facts than there are names or keys, more pairs than images, or a negative number.
    """
    images = int(rng.integers(12, 21)) if images is None else images
    pairs = min(images, int(rng.integers(3, 13))) if pairs is None else pairs
    facts = int(rng.integers(4, 13)) if facts is None else facts
    fillers = int(rng.integers(2, 13)) if fillers is None else fillers
    asked = (("images", images, len(NAMES)), ("pairs", pairs, images), ("facts", facts, len(KEYS)))
    for what, number, most in (*asked, ("fillers", fillers, 1000)):
        if not 0 <= number <= most:
            raise InputError(f"{what}={number} is out of range; expected 0 to {most}")
    names = rng.permutation(NAMES)[:images]
    items: list[Picture | Pair | Fact | str] = [
        _shown(str(name), i < pairs, split, rng) for i, name in enumerate(names)
    ]
    keys, values = rng.permutation(KEYS)[:facts], rng.choice(VALUES, facts)
    items += [Fact(str(key), str(value)) for key, value in zip(keys, values, strict=True)]
    items += [str(rng.choice(FILLERS)) for _ in range(fillers)]
    return Scene(tuple(items[i] for i in rng.permutation(len(items))))


Question = tuple[str, str]
"""A question and its only answer."""


def _ask_text(scene: Scene, rng: np.random.Generator) -> Question | None:
    if not scene.facts:
        return None
    fact = scene.facts[rng.integers(len(scene.facts))]
    return f"what is {fact.key}?", fact.value


def _ask_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    if not scene.pictures:
        return None
    picture = scene.pictures[rng.integers(len(scene.pictures))]
    item = picture.objects[rng.integers(len(picture.objects))]
    return f"what colour is the {item.shape} in image {picture.name}?", item.colour


def _ask_digit(scene: Scene, rng: np.random.Generator) -> Question | None:
    found = [(picture, item) for picture in scene.pictures for item in picture.objects if item.digit is not None]
    if not found:
        return None
    picture, item = found[rng.integers(len(found))]
    return f"what is the digit in image {picture.name}?", str(item.digit)


def _ask_find(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Ask for the image with a shape in a colour that no other image shows."""
    shown = {(item.shape, item.colour, picture.name): None for picture in scene.pictures for item in picture.objects}
    counts = Counter(thing[:2] for thing in shown)
    unique = [thing for thing in shown if counts[thing[:2]] == 1]
    if not unique:
        return None
    shape, colour, name = unique[rng.integers(len(unique))]
    return f"what image shows the {shape} which is {colour}?", name


def _ask_change(scene: Scene, rng: np.random.Generator) -> Question | None:
    if not scene.pairs:
        return None
    pair = scene.pairs[rng.integers(len(scene.pairs))]
    return f"what is the change in image {pair.before.name}?", pair.arrived.shape


QUESTIONS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "text_needle": _ask_text,
    "colour_needle": _ask_colour,
    "digit_needle": _ask_digit,
    "find": _ask_find,
    "visual_change": _ask_change,
}
"""How to ask each task about a scene; None where the scene has nothing to ask about."""

TASKS: tuple[str, ...] = tuple(QUESTIONS)


def stream(split: str, purpose: str, index: int, seed: int = 0) -> np.random.Generator:
    """Return the random stream of one sample; different arguments never share a stream.

    Raises:
        InputError: unknown split, negative index or negative seed.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    if index < 0 or seed < 0:
        raise InputError(f"index {index} and seed {seed} must not be negative")
    return np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), crc32(purpose.encode()), index]))


def asked_scene(task: str, split: str, index: int, seed: int = 0, **sizes: int | None) -> tuple[Scene, Question]:
    """Return the scene and the question of a sample; see ``sample`` for arguments and errors."""
    if task not in QUESTIONS:
        raise InputError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
    rng = stream(split, task, index, seed)
    for _ in range(_REDRAWS):
        scene = draw_scene(rng, split, **sizes)
        if asked := QUESTIONS[task](scene, rng):
            return scene, asked
    raise InputError(f"{task} has nothing to ask about scenes of sizes {sizes}; ask for more images, pairs or facts")


def sample(
    task: str,
    split: str,
    index: int,
    seed: int = 0,
    *,
    images: int | None = None,
    pairs: int | None = None,
    facts: int | None = None,
    fillers: int | None = None,
) -> Sample:
    """Return sample ``index`` of a task; the same arguments always give the same sample.

    Raises:
        InputError: unknown task or split, negative index or seed, a size out of range (see ``draw_scene``),
            or sizes that leave nothing to ask about.
    """
    scene, asked = asked_scene(task, split, index, seed, images=images, pairs=pairs, facts=facts, fillers=fillers)
    return Sample(task, split, index, scene.content(), *asked, _further(scene, task, split, index, seed))


def _further(scene: Scene, task: str, split: str, index: int, seed: int) -> tuple[str, ...]:
    rng = stream(split, f"further {task}", index, seed)
    asked = (QUESTIONS[other](scene, rng) for other in TASKS if other != task)
    return tuple(question for question, _ in filter(None, asked))


def samples(split: str, n: int, tasks: Sequence[str] = TASKS, seed: int = 0) -> Iterator[Sample]:
    """Yield ``n`` samples, taking the tasks in turn.

    Raises:
        InputError: no task, an unknown task, or an unknown split.
    """
    if not tasks:
        raise InputError(f"no task given; expected some of {', '.join(TASKS)}")
    for i in range(n):
        yield sample(tasks[i % len(tasks)], split, i // len(tasks), seed)
