"""Rendered scenes of the embedded corpus: one large shape, its picture, its captions, and questions about it.

Scenes hold one shape each. Two shapes are left out on purpose: at 64x64 pixels and 8x8 codes a picture tokenizer that
trains in minutes loses the identity of rings and of shapes below about 20 pixels, so a two-shape picture would
measure the tokenizer and not the decoder. Every attribute is a word, so captions compose and answers are short.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image as PilImage
from PIL import ImageDraw

IMAGE_SIZE = 64
_OVERSAMPLING = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (35, 165, 60),
    "blue": (45, 75, 235),
    "yellow": (245, 220, 40),
    "purple": (160, 45, 205),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (0, 0, 0), "white": (255, 255, 255)}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
SIZES_PIXELS: dict[str, tuple[int, int]] = {"small": (29, 31), "large": (43, 45)}
"""Size word -> smallest and largest width of the shape."""
_JITTER_PIXELS = 0.75
PLACES: dict[str, tuple[float, float]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "middle": (0, 0),
}
"""Place word -> direction from the middle of the picture (x to the right, y down)."""

HELD_OUT_COMBINATIONS = (("red", "square"), ("green", "ring"), ("blue", "triangle"), ("yellow", "cross"))
"""Colour-shape pairs that no training record shows, writes or says; their colours and shapes appear in other pairs."""

_PLACE_PHRASES = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "near the top", "in the upper part"),
    "bottom": ("at the bottom", "near the bottom", "in the lower part"),
    "middle": ("in the middle", "in the center", "at the center"),
}
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_BACKGROUND_PHRASES = ("on a {} background", "against a {} background", "over a {} backdrop", "with {} behind it")
_CAPTION_ORDERS = (
    "{shape} {place} {background}",
    "{shape} {background}, {place}",
    "{background}, {shape} {place}",
    "{place}, {shape} {background}",
    "a picture of {shape} {place} {background}",
    "there is {shape} {place} {background}",
    "{shape} sits {place} {background}",
)
_QUESTIONS = {
    "colour": ("what color is the {shape}?", "which color does the {shape} have?", "the {shape} has what color?"),
    "shape": ("what shape is it?", "which shape is shown?", "what is the {colour} thing?"),
    "size": ("how big is the {shape}?", "what size is the {shape}?"),
    "place": ("where is the {shape}?", "where does the {shape} sit?"),
    "background": ("what color is the background?", "what is behind the {shape}?"),
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """One shape on a plain background; `width` and the centre are in pixels of a 64x64 picture."""

    shape: str
    colour: str
    size: str
    place: str
    background: str
    width: float
    centre_x: float
    centre_y: float

    @property
    def facts(self) -> dict[str, str]:
        """What a judge needs to know about the picture."""
        return {
            "kind": "scene",
            "label": f"{self.colour} {self.shape}",
            "colour": self.colour,
            "shape": self.shape,
            "size": self.size,
            "place": self.place,
            "background": self.background,
        }


def combinations(*, held_out: bool) -> list[tuple[str, str]]:
    """The (colour, shape) pairs of training scenes, or those kept from them."""
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return [pair for pair in pairs if (pair in HELD_OUT_COMBINATIONS) == held_out]


def random_scene(rng: np.random.Generator, *, held_out: bool, index: int) -> Scene:
    """Draws a scene; colour-shape pairs take turns by `index`, so every pair is equally frequent."""
    pairs = combinations(held_out=held_out)
    colour, shape = pairs[index % len(pairs)]
    size = _choice(rng, tuple(SIZES_PIXELS))
    place = _choice(rng, tuple(PLACES))
    width = float(rng.uniform(*SIZES_PIXELS[size]))
    reach = (IMAGE_SIZE - width) / 2 - 2
    jitter_x, jitter_y = rng.uniform(-_JITTER_PIXELS, _JITTER_PIXELS, 2)
    return Scene(
        shape=shape,
        colour=colour,
        size=size,
        place=place,
        background=_choice(rng, tuple(BACKGROUNDS)),
        width=width,
        centre_x=IMAGE_SIZE / 2 + PLACES[place][0] * reach + float(jitter_x),
        centre_y=IMAGE_SIZE / 2 + PLACES[place][1] * reach + float(jitter_y),
    )


def render(scene: Scene) -> np.ndarray:
    """Draws `scene` as uint8 [64, 64, 3]: at four times the size, then averaged, so that edges are anti-aliased."""
    scale = _OVERSAMPLING
    picture = PilImage.new("RGB", (IMAGE_SIZE * scale,) * 2, BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(picture)
    x, y, radius = scene.centre_x * scale, scene.centre_y * scale, scene.width / 2 * scale
    fill = COLOURS[scene.colour]
    box = (x - radius, y - radius, x + radius, y + radius)
    if scene.shape == "circle":
        draw.ellipse(box, fill=fill)
    elif scene.shape == "ring":
        draw.ellipse(box, fill=fill)
        hole = radius * 0.5
        draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=BACKGROUNDS[scene.background])
    elif scene.shape == "square":
        side = radius * 0.92
        draw.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif scene.shape == "triangle":
        draw.polygon([(x, y - radius), (x + radius, y + radius * 0.85), (x - radius, y + radius * 0.85)], fill=fill)
    elif scene.shape == "cross":
        arm = radius * 0.34
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
    else:
        raise ValueError(f"unknown shape {scene.shape!r}; known shapes: {', '.join(SHAPES)}")
    return np.asarray(picture.reduce(scale))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A full caption of `scene` (shape, colour, size, place, background) in one of many wordings."""
    return _choice(rng, _CAPTION_ORDERS).format(
        shape=f"a {_choice(rng, _SIZE_WORDS[scene.size])} {scene.colour} {scene.shape}",
        place=_choice(rng, _PLACE_PHRASES[scene.place]),
        background=_choice(rng, _BACKGROUND_PHRASES).format(scene.background),
    )


def short_phrase(scene: Scene, rng: np.random.Generator) -> str:
    """A few words about `scene` to be spoken: always colour and shape, at times size or place."""
    form = int(rng.integers(4))
    size = f"{_choice(rng, _SIZE_WORDS[scene.size])} " if form in (1, 3) else ""
    place = f" {_PLACE_PHRASES[scene.place][0]}" if form == 2 else ""
    return f"a {size}{scene.colour} {scene.shape}{place}"


def question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question about `scene` and its answer: one attribute, or yes or no."""
    about = _choice(rng, (*_QUESTIONS, "yes_no"))
    if about != "yes_no":
        asked = _choice(rng, _QUESTIONS[about]).format(shape=scene.shape, colour=scene.colour)
        return asked, str(getattr(scene, about))
    attribute, words = ("colour", tuple(COLOURS)) if rng.integers(2) else ("shape", SHAPES)
    truth = getattr(scene, attribute)
    answer = bool(rng.integers(2))
    word = truth if answer else _choice(rng, tuple(word for word in words if word != truth))
    asked = f"is the {scene.shape} {word}?" if attribute == "colour" else f"is it a {word}?"
    return asked, "yes" if answer else "no"


def _choice(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]
