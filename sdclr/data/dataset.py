"""From a picture's file to the pixels that the VAE sees."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from sdclr.data.pairs import Pair
from sdclr.seeding import numpy_rng

BUCKET_STEP = 64
"""Sides of buckets are multiples of it: eight of the VAE's times eight of the UNet's (Podell 2023, arXiv 2307.01952, section 2.3)."""


class Shape(NamedTuple):
    """Width and height of what is trained on, in pixels."""

    width: int
    height: int

    def keeps(self, width: int, height: int) -> float:
        """The share of a picture that is left when it is cut to this shape."""
        wider = self.width * height / (self.height * width)
        return min(wider, 1 / wider)

    def scale(self, width: int, height: int) -> float:
        """The factor by which a picture is resized so that it covers this shape."""
        return max(self.width / width, self.height / height)


@functools.cache
def shapes(resolution: int, aspect: str) -> tuple[Shape, ...]:
    """The shapes that pictures are cut to, the square first. Buckets beside it have at most resolution² pixels, no side longer than twice the
    resolution, and sides that are multiples of 64 (below 512 pixels: of an eighth of the resolution, rounded down to a multiple of 8)."""
    square = Shape(resolution, resolution)
    if aspect == "square":
        return (square,)
    step = min(BUCKET_STEP, max(8, resolution // 64 * 8))
    long = range((resolution // step + 1) * step, 2 * resolution + 1, step)
    wide = [Shape(width, resolution**2 // width // step * step) for width in long]
    return (square, *wide, *(Shape(height, width) for width, height in wide))


def shape_for(width: int, height: int, resolution: int, aspect: str) -> Shape:
    """The shape that keeps the most of a picture of this size."""
    return max(shapes(resolution, aspect), key=lambda shape: shape.keeps(width, height))


@dataclasses.dataclass(frozen=True)
class View:
    """One way of seeing a picture: which part of it, and whether mirrored. `crop` 0 is the centre."""

    crop: int = 0
    flipped: bool = False

    @property
    def name(self) -> str:
        return f"{self.crop}{'f' if self.flipped else ''}"


def views(crop: str, crops: int, flip: bool) -> list[View]:
    """The views that training draws from: the centre, or `crops` random parts, each also mirrored if `flip`."""
    parts = [0] if crop == "center" else [i + 1 for i in range(crops)]
    return [View(part, flipped) for part in parts for flipped in ((False, True) if flip else (False,))]


class Seen(NamedTuple):
    """A picture as the VAE sees it, float32 (3, height, width) in −1 … 1, and what SDXL is told of it: height and width before it was
    resized, top and left of this part in the resized picture, height and width of this part (Podell 2023, arXiv 2307.01952, section 2.2);
    of one that has a mask also how much each pixel counts, (1, height, width) in 0 … 1."""

    pixels: np.ndarray
    sizes: tuple[int, int, int, int, int, int]
    mask: np.ndarray | None = None


def look(pair: Pair, resolution: int, view: View, seed: int = 0, aspect: str = "square") -> Seen:
    """The picture, resized until it covers its shape, and cut to it.

    EXIF orientation is applied, transparency laid on white, 16 bits scaled to 8, everything converted to RGB. Random parts derive from
    (seed, key, view), so they are the same in every run. Raises OSError and Pillow's errors for files that cannot be decoded.
    """
    image = upright(pair.path)
    width, height = image.size
    shape = shape_for(width, height, resolution, aspect)
    scale = shape.scale(width, height)
    covering = [max(wanted, round(side * scale)) for wanted, side in zip(shape, image.size, strict=True)]
    spare = np.array(covering) - shape
    at = np.array([0.5, 0.5]) if view.crop == 0 else numpy_rng(seed, "crop", pair.key, view.crop).random(2)
    left, top = (int(v) for v in np.round(spare * at))

    def part(whole: Image.Image, resampling: Image.Resampling) -> np.ndarray:
        cut = whole.resize(covering, resampling).crop((left, top, left + shape.width, top + shape.height))
        return np.asarray(ImageOps.mirror(cut) if view.flipped else cut, dtype=np.float32)

    pixels = np.ascontiguousarray(part(image, Image.Resampling.LANCZOS).transpose(2, 0, 1)) / 127.5 - 1
    mask = part(mask_of(pair), Image.Resampling.BILINEAR)[None] / 255 if pair.mask else None
    left_as_seen = int(spare[0]) - left if view.flipped else left
    return Seen(pixels, (height, width, top, left_as_seen, shape.height, shape.width), mask)


def mask_of(pair: Pair) -> Image.Image:
    """A picture's mask, upright, from 0 (masked) to 255 (counts). Raises OSError and Pillow's errors where it cannot be decoded."""
    assert pair.mask is not None
    if pair.mask != pair.path:
        return upright(pair.mask).convert("L")
    with Image.open(pair.path) as opened:
        return ImageOps.exif_transpose(opened).convert("RGBA").getchannel("A")


def upright(path: Path) -> Image.Image:
    """A picture's pixels in RGB, its EXIF orientation applied. Raises OSError and Pillow's errors for files that cannot be decoded."""
    with Image.open(path) as opened:
        return to_rgb(ImageOps.exif_transpose(opened))


def readable(path: Path) -> bool:
    """Whether a file is a picture that can be decoded."""
    try:
        with Image.open(path) as image:
            image.load()
        return True
    except Exception:  # Pillow's decoders raise many kinds
        return False


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode Pillow reads to RGB."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        array = np.asarray(image, dtype=np.float64)
        # Integer modes hold 16-bit data (PNG, TIFF); floats hold 0…1 or 0…255.
        top = 65535.0 if image.mode != "F" else (1.0 if array.max(initial=0) <= 1 else 255.0)
        image = Image.fromarray(np.clip(array / top * 255 + 0.5, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
