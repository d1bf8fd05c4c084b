"""A small world of pictures and questions, drawn from a seed.

A picture holds one or two coloured shapes, each at one of four places. Questions ask for content ("What
colour is the circle?"), for place ("Where is the red shape?"), for a number and for yes or no; an answer is
one word.
Given the question, its answers are about equally likely, so that a model which does not look can only guess.

Training and held-out pictures are disjoint by construction: a scene belongs to one split by a checksum of all
that defines it, and drawing for one split passes over scenes of the other.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

IMAGE_SIZE = 80
"""Width and height of a picture in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (238, 200, 20),
    "purple": (140, 50, 170),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
NUMBERS = ("zero", "one", "two")
KINDS = ("colour", "shape", "place", "exists", "count")
"""Kinds of question; every answer is one word."""

Split = Literal["train", "heldout"]

PHRASES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
_AXES = (("left", "right"), ("top", "bottom"))
_OVERSAMPLE = 2
_HELDOUT_SHARE = 8  # one scene in so many is a held-out one


@dataclass(frozen=True)
class Item:
    """One shape of a scene; centre and radius in pixels."""

    shape: str
    colour: str
    place: str
    x: int
    y: int
    radius: int
    shade: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows: its shapes, and the grey level (0-255) of the background."""

    items: tuple[Item, ...]
    background: int

    @property
    def split(self) -> Split:
        """The split that this scene belongs to, whatever seed drew it."""
        return "heldout" if zlib.crc32(repr(self).encode()) % _HELDOUT_SHARE == 0 else "train"


@dataclass(frozen=True)
class Question:
    """A question about a scene with its true answer."""

    kind: str
    text: str
    answer: str


def draw_scene(rng: random.Random, split: Split, n_items: int | None = None) -> Scene:
    """Draw a scene of a split, with one or two shapes; with None, chance decides evenly."""
    while True:
        count = n_items if n_items is not None else rng.choice((1, 2))
        places = [rng.choice(list(PLACES))] if count == 1 else list(rng.choice(_AXES))
        shapes = rng.sample(SHAPES, count)
        colours = rng.sample(list(COLOURS), count)
        items = tuple(_draw_item(rng, *each) for each in zip(shapes, colours, places, strict=True))
        scene = Scene(items, rng.randint(226, 250))
        if scene.split == split:
            return scene


def _draw_item(rng: random.Random, shape: str, colour: str, place: str) -> Item:
    across, down = PLACES[place]
    radius = rng.randint(12, 16)
    middle = IMAGE_SIZE // 2
    # The centre varies little towards its place, and more along the other axis.
    x = middle + across * 21 + rng.randint(-2, 2) if across else middle + rng.randint(-9, 9)
    y = middle + down * 21 + rng.randint(-2, 2) if down else middle + rng.randint(-9, 9)
    return Item(shape, colour, place, x, y, radius, rng.randint(-14, 14))


def render(scene: Scene) -> Image.Image:
    """Draw the picture of a scene: RGB, `IMAGE_SIZE` square."""
    size = IMAGE_SIZE * _OVERSAMPLE
    image = Image.new("RGB", (size, size), (scene.background,) * 3)
    canvas = ImageDraw.Draw(image)
    for item in scene.items:
        red, green, blue = (min(255, max(0, level + item.shade)) for level in COLOURS[item.colour])
        x, y, r = (value * _OVERSAMPLE for value in (item.x, item.y, item.radius))
        _paint(canvas, item.shape, x, y, r, (red, green, blue))
    return image.reduce(_OVERSAMPLE)


def _paint(
    canvas: ImageDraw.ImageDraw, shape: str, x: int, y: int, r: int, fill: tuple[int, int, int]
) -> None:
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        half = round(r * 0.88)
        canvas.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape == "triangle":
        angles, reach = (0.0, math.tau / 3, -math.tau / 3), 1.15 * r
        canvas.polygon([(x + reach * math.sin(a), y - reach * math.cos(a)) for a in angles], fill=fill)
    else:
        arm = round(r * 0.36)
        canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)


def ask(rng: random.Random, scene: Scene, kind: str) -> Question:
    """Ask a question about a scene, of one of `KINDS`; any other kind is a `ValueError`."""
    item = rng.choice(scene.items)
    place = PHRASES[item.place]
    if kind == "colour":
        texts = (f"What colour is the shape {place}?", f"What colour is the {item.shape}?")
        return Question(kind, rng.choice(texts), item.colour)
    if kind == "shape":
        texts = (f"What shape is {place}?", f"What shape is {item.colour}?")
        return Question(kind, rng.choice(texts), item.shape)
    if kind == "place":
        texts = (f"Where is the {item.shape}?", f"Where is the {item.colour} shape?")
        return Question(kind, rng.choice(texts), item.place)
    if kind == "exists":
        return _ask_exists(rng, scene, item)
    if kind == "count":
        return Question(kind, "How many shapes are there?", NUMBERS[len(scene.items)])
    raise ValueError(f"unknown kind of question {kind!r}: expected one of {', '.join(KINDS)}")


def _ask_exists(rng: random.Random, scene: Scene, item: Item) -> Question:
    """Yes and no are equally likely; half of the noes miss by the colour, half by the shape."""
    shape, colour = item.shape, item.colour
    truth = rng.random() < 0.5
    if not truth:
        present = {(each.shape, each.colour) for each in scene.items}
        if rng.random() < 0.5:
            colour = rng.choice([c for c in COLOURS if (shape, c) not in present])
        else:
            shape = rng.choice([s for s in SHAPES if (s, colour) not in present])
    return Question("exists", f"Is there a {colour} {shape}?", "yes" if truth else "no")


def ask_each(rng: random.Random, scene: Scene, kinds: tuple[str, ...] = KINDS) -> list[Question]:
    """One question of each kind, in an order left to chance so that every kind also comes first."""
    return [ask(rng, scene, kind) for kind in rng.sample(kinds, len(kinds))]
