"""Draw the demo's pictures: captioned cartoon portraits, and subjects that no portrait shows.

Everything in a picture that its caption names is drawn by code, so whether a *sample* obeys its prompt can be measured
(`background_colour`, `shirt_colour`) instead of judged by eye. Skin tone, pose and size vary without being named.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SUPERSAMPLING = 4

COLOURS = {
    "red": (214, 45, 48),
    "orange": (245, 140, 30),
    "yellow": (248, 216, 60),
    "green": (62, 160, 74),
    "blue": (50, 100, 205),
    "purple": (130, 70, 175),
    "pink": (250, 150, 190),
    "gray": (150, 152, 156),
}
HAIR_COLOURS = {
    "black": (35, 30, 34),
    "brown": (112, 70, 40),
    "blond": (236, 202, 120),
    "ginger": (205, 96, 40),
    "white": (238, 238, 240),
}
SKINS = [(255, 224, 196), (240, 196, 160), (198, 140, 100), (140, 92, 62)]
HAIR_STYLES = ["short", "long", "curly", "spiky"]
HATS = [None, None, "cap", "beanie", "crown"]
EYEWEAR = [None, None, "glasses", "sunglasses"]
MOODS = ["smiling", "sad", "surprised"]

FUR = (238, 238, 240)
FUR_DARK = (150, 152, 156)
BLUSH = (250, 160, 170)


@dataclasses.dataclass(frozen=True)
class Portrait:
    """What one picture shows. `subject` is "person" or the name of one that the base model never sees ("mochi")."""

    background: str
    shirt: str
    mood: str
    hat: str | None = None
    eyewear: str | None = None
    hair_style: str = "short"
    hair: str = "black"
    subject: str = "person"

    @property
    def caption(self) -> str:
        """The sentence that names everything the picture shows, and nothing else."""
        who = f"a person with {self.hair_style} {self.hair} hair" if self.subject == "person" else self.subject
        extras = "".join(
            f" and {'a ' if word in ('cap', 'beanie', 'crown') else ''}{word}"
            for word in (self.hat, self.eyewear)
            if word
        )
        return (
            f"a portrait of {who}, {self.mood}, wearing a {self.shirt} shirt{extras}, on a {self.background} background"
        )


def random_portrait(rng: random.Random, subject: str = "person") -> Portrait:
    """One portrait with every attribute drawn from `rng`; shirt and background always differ."""
    background, shirt = rng.sample(list(COLOURS), 2)
    return Portrait(
        background=background,
        shirt=shirt,
        mood=rng.choice(MOODS),
        hat=rng.choice(HATS),
        eyewear=rng.choice(EYEWEAR),
        hair_style=rng.choice(HAIR_STYLES),
        hair=rng.choice(list(HAIR_COLOURS)),
        subject=subject,
    )


def distinct_portraits(
    seed: int, count: int, subject: str = "person", avoid: frozenset[str] = frozenset()
) -> Iterator[Portrait]:
    """`count` portraits whose captions differ from each other and from every caption in `avoid`."""
    rng, seen = random.Random(seed), set(avoid)
    while count:
        portrait = random_portrait(rng, subject)
        if portrait.caption not in seen:
            seen.add(portrait.caption)
            count -= 1
            yield portrait


def draw(portrait: Portrait, seed: int) -> Image.Image:
    """Draw one RGB picture of 64×64 pixels; `seed` decides what the caption leaves open (pose, size, skin)."""
    rng = random.Random(seed)
    canvas = _Canvas(COLOURS[portrait.background])
    x, y = 32 + rng.uniform(-2.5, 2.5), 29 + rng.uniform(-1.5, 2)
    r = rng.uniform(13, 15)
    mochi = portrait.subject == "mochi"
    skin = FUR if mochi else rng.choice(SKINS)
    hair = HAIR_COLOURS[portrait.hair]

    if not mochi and portrait.hair_style == "long":
        canvas.rounded(x - r * 1.25, y - r * 0.9, x + r * 1.25, y + r * 1.45, 8, hair)
    _shirt(canvas, x, y, r, skin, COLOURS[portrait.shirt])
    if mochi:
        _mochi_head(canvas, x, y, r)
    else:
        _ears(canvas, x, y, r, skin)
        canvas.ellipse(x, y, r, r * 1.08, skin)
        _hair(canvas, x, y, r, portrait.hair_style, hair, rng)
    _face(canvas, x, y, r, portrait.mood, portrait.eyewear, big_eyes=mochi)
    if portrait.hat:
        _hat(canvas, x, y, r, portrait.hat)
    return canvas.image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


# What a picture shows, read back from its pixels ------------------------------------------------------------------------


def background_colour(image: Image.Image) -> str:
    """The palette name nearest to the two upper corners' median colour."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    return _nearest(np.concatenate([pixels[1:9, 1:8].reshape(-1, 3), pixels[1:9, -8:-1].reshape(-1, 3)]))


def shirt_colour(image: Image.Image) -> str:
    """The palette name nearest to the median colour of the lower middle."""
    return _nearest(np.asarray(image.convert("RGB"), dtype=float)[57:63, 20:44].reshape(-1, 3))


def mochi_likeness(image: Image.Image) -> float:
    """Share of the face's middle (16×10 pixels below the eyes) that is nearer to mochi's white than to any skin tone; 0 to 1."""
    face = np.asarray(image.convert("RGB"), dtype=float)[30:40, 24:40].reshape(-1, 3)
    tones = np.array([FUR, *SKINS, *COLOURS.values()], dtype=float)
    return float(np.mean(np.argmin(np.linalg.norm(face[:, None] - tones, axis=2), axis=1) == 0))


def _nearest(pixels: np.ndarray) -> str:
    median = np.median(pixels, axis=0)
    return min(COLOURS, key=lambda name: float(np.linalg.norm(median - np.array(COLOURS[name]))))


# The drawing --------------------------------------------------------------------------------------------------------------


class _Canvas:
    """Pillow's drawing calls in units of the final picture, on a canvas four times as large."""

    def __init__(self, background: tuple[int, int, int]):
        side = SIZE * SUPERSAMPLING
        self.image = Image.new("RGB", (side, side), background)
        self.pen = ImageDraw.Draw(self.image)

    @staticmethod
    def _scaled(*values: float) -> list[float]:
        return [v * SUPERSAMPLING for v in values]

    def ellipse(self, x, y, rx, ry, fill):
        self.pen.ellipse(self._scaled(x - rx, y - ry, x + rx, y + ry), fill=fill)

    def rounded(self, x0, y0, x1, y1, radius, fill):
        self.pen.rounded_rectangle(self._scaled(x0, y0, x1, y1), radius * SUPERSAMPLING, fill=fill)

    def polygon(self, points, fill):
        self.pen.polygon([tuple(self._scaled(*p)) for p in points], fill=fill)

    def chord(self, x, y, rx, ry, start, end, fill):
        self.pen.chord(self._scaled(x - rx, y - ry, x + rx, y + ry), start, end, fill=fill)

    def arc(self, x, y, rx, ry, start, end, fill, width=1.0):
        self.pen.arc(
            self._scaled(x - rx, y - ry, x + rx, y + ry), start, end, fill=fill, width=round(width * SUPERSAMPLING)
        )

    def line(self, points, fill, width=1.0):
        self.pen.line([tuple(self._scaled(*p)) for p in points], fill=fill, width=round(width * SUPERSAMPLING))


def _shade(colour: tuple[int, int, int], factor: float) -> tuple[int, ...]:
    return tuple(min(255, round(c * factor)) for c in colour)


def _shirt(canvas, x, y, r, skin, colour):
    canvas.rounded(x - 24, y + r * 1.35, x + 24, 84, 13, colour)
    canvas.rounded(x - 5, y + r * 0.7, x + 5, y + r * 1.35 + 4, 4, _shade(skin, 0.9))
    canvas.polygon([(x - 6, y + r * 1.33), (x + 6, y + r * 1.33), (x, y + r * 1.35 + 6)], _shade(skin, 0.9))
    canvas.arc(x - 20, 72, 4, 18, 260, 350, _shade(colour, 0.75))
    canvas.arc(x + 20, 72, 4, 18, 190, 280, _shade(colour, 0.75))


def _ears(canvas, x, y, r, skin):
    for side in (-1, 1):
        canvas.ellipse(x + side * r, y + 1, 2.6, 3.4, _shade(skin, 0.92))


def _hair(canvas, x, y, r, style, colour, rng):
    if style == "curly":
        for i in range(9):
            angle = np.pi * (1 + (i + rng.uniform(-0.15, 0.15)) / 8)
            canvas.ellipse(x + r * 1.02 * np.cos(angle), y - 2 + r * 0.98 * np.sin(angle), 5, 5, colour)
        canvas.chord(x, y - 1, r * 1.05, r * 1.1, 200, 340, colour)
        return
    canvas.chord(x, y - 0.5, r * 1.1, r * 1.18, 198, 342, colour)
    if style == "spiky":
        for i in range(6):
            angle = np.pi * (1.12 + 0.76 * i / 5)
            cx, cy = np.cos(angle), np.sin(angle)
            tip = (x + r * 1.62 * cx, y + r * 1.62 * cy)
            canvas.polygon(
                [(x + r * cx - 3.4 * cy, y + r * cy + 3.4 * cx), (x + r * cx + 3.4 * cy, y + r * cy - 3.4 * cx), tip],
                colour,
            )
    if style == "long":
        canvas.rounded(x - r * 1.22, y - r * 0.35, x - r * 0.86, y + r * 1.3, 2.5, colour)
        canvas.rounded(x + r * 0.86, y - r * 0.35, x + r * 1.22, y + r * 1.3, 2.5, colour)


def _mochi_head(canvas, x, y, r):
    """A round white face with cat ears, whiskers and blush: nothing any portrait has."""
    for side in (-1, 1):
        canvas.polygon(
            [
                (x + side * r * 1.0, y - r * 0.35),
                (x + side * r * 0.2, y - r * 0.95),
                (x + side * r * 1.02, y - r * 1.62),
            ],
            FUR_DARK,
        )
        canvas.polygon(
            [(x + side * r * 0.86, y - r * 0.6), (x + side * r * 0.42, y - r * 0.9), (x + side * r * 0.9, y - r * 1.3)],
            BLUSH,
        )
    canvas.ellipse(x, y, r * 1.16, r * 1.06, FUR)
    canvas.chord(x, y, r * 1.16, r * 1.06, 235, 305, FUR_DARK)
    for side in (-1, 1):
        canvas.ellipse(x + side * r * 0.72, y + r * 0.35, 2.8, 1.8, BLUSH)
        for lift in (-2, 1.2):
            canvas.line([(x + side * r * 0.9, y + r * 0.3), (x + side * r * 1.5, y + r * 0.3 + lift)], FUR_DARK, 0.7)


def _face(canvas, x, y, r, mood, eyewear, big_eyes):
    ink, eye_y, dx = (30, 26, 30), y - 0.5, r * 0.42
    for side in (-1, 1):
        if eyewear != "sunglasses":
            if big_eyes:
                canvas.ellipse(x + side * dx, eye_y, 3.2, 3.8, (255, 255, 255))
                canvas.ellipse(x + side * dx, eye_y + 0.4, 2.0, 2.8, ink)
                canvas.ellipse(x + side * dx + 0.7, eye_y - 0.8, 0.8, 0.8, (255, 255, 255))
            else:
                canvas.ellipse(x + side * dx, eye_y, 1.6, 2.0, ink)
        if eyewear == "sunglasses":
            canvas.rounded(x + side * dx - 4.6, eye_y - 3, x + side * dx + 4.6, eye_y + 3.4, 2.2, (20, 20, 26))
        elif eyewear == "glasses":
            canvas.arc(x + side * dx, eye_y, 4.8, 4.6, 0, 360, (245, 245, 250), 1.1)
    if eyewear:
        canvas.line(
            [(x - 2, eye_y - 1), (x + 2, eye_y - 1)], (20, 20, 26) if eyewear == "sunglasses" else (245, 245, 250), 1.1
        )
    mouth_y = y + r * 0.52
    if mood == "smiling":
        canvas.chord(x, mouth_y - 1, 5, 4.4, 10, 170, (160, 30, 45))
    elif mood == "sad":
        canvas.arc(x, mouth_y + 4, 4.6, 4, 200, 340, (120, 30, 45), 1.5)
    else:
        canvas.ellipse(x, mouth_y + 0.8, 2.6, 3.2, (120, 25, 40))


def _hat(canvas, x, y, r, hat):
    top = y - r
    if hat == "cap":
        canvas.chord(x, top + 5, r * 1.12, 10.5, 180, 360, (24, 40, 92))
        canvas.rounded(x - 2, top + 3.4, x + r * 1.75, top + 6.6, 1.6, (14, 26, 66))
    elif hat == "beanie":
        canvas.chord(x, top + 6, r * 1.14, 12, 180, 360, (20, 138, 140))
        canvas.rounded(x - r * 1.18, top + 3.4, x + r * 1.18, top + 8, 2.2, (12, 100, 104))
        canvas.ellipse(x, top - 6, 3, 3, (240, 240, 240))
    else:
        points = [(x - r * 0.95, top + 5)]
        for i in range(5):
            points.append((x + r * 0.95 * (i / 2 - 1), top - (6 if i % 2 == 0 else 1.0)))
        canvas.polygon([*points, (x + r * 0.95, top + 5)], (255, 205, 40))
        for i in (-1, 0, 1):
            canvas.ellipse(x + i * r * 0.5, top + 2.6, 1.2, 1.2, (200, 30, 60))
