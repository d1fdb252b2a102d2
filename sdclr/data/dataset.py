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
    resized, top and left of this part in the resized picture, height and width of this part (Podell 2023, arXiv 2307.01952, section 2.2)."""

    pixels: np.ndarray
    sizes: tuple[int, int, int, int, int, int]


class Cut(NamedTuple):
    """Which part of a picture a view shows: the size it is resized to, and where in it which shape lies, perhaps mirrored."""

    covering: tuple[int, int]
    left: int
    top: int
    shape: Shape
    flipped: bool

    def of(self, image: Image.Image, resampling: Image.Resampling) -> np.ndarray:
        """The part as float32 (height, width) or (height, width, bands), in 0 … 255."""
        box = (self.left, self.top, self.left + self.shape.width, self.top + self.shape.height)
        part = image.resize(self.covering, resampling).crop(box)
        return np.asarray(ImageOps.mirror(part) if self.flipped else part, dtype=np.float32)


def cut_for(size: tuple[int, int], key: str, resolution: int, view: View, seed: int = 0, aspect: str = "square") -> Cut:
    """Resize until the shape is covered, and cut to it. Random parts derive from (seed, key, view), so they are the same in every run."""
    shape = shape_for(*size, resolution, aspect)
    scale = shape.scale(*size)
    width, height = (max(wanted, round(side * scale)) for wanted, side in zip(shape, size, strict=True))
    at = np.array([0.5, 0.5]) if view.crop == 0 else numpy_rng(seed, "crop", key, view.crop).random(2)
    left, top = (int(v) for v in np.round((np.array([width, height]) - shape) * at))
    return Cut((width, height), left, top, shape, view.flipped)


def cut_key(pair: Pair, view: View, resolution: int, seed: int, aspect: str) -> tuple[int | str, ...]:
    """What the part of a picture that a view shows depends on, beside the picture itself: a key's part."""
    shape = (resolution, aspect) if aspect != "square" else (resolution,)
    return (*shape, view.name, seed, pair.key) if view.crop else (*shape, view.name)


def look(pair: Pair, resolution: int, view: View, seed: int = 0, aspect: str = "square") -> Seen:
    """The picture, resized until it covers its shape, and cut to it.

    EXIF orientation is applied, transparency laid on white, 16 bits scaled to 8, everything converted to RGB. Raises OSError and Pillow's
    errors for files that cannot be decoded.
    """
    image = upright(pair.path)
    cut = cut_for(image.size, pair.key, resolution, view, seed, aspect)
    pixels = np.ascontiguousarray(cut.of(image, Image.Resampling.LANCZOS).transpose(2, 0, 1)) / 127.5 - 1
    left = cut.covering[0] - cut.shape.width - cut.left if cut.flipped else cut.left
    return Seen(pixels, (image.height, image.width, cut.top, left, cut.shape.height, cut.shape.width))


def look_at_mask(
    pair: Pair, size: tuple[int, int], resolution: int, view: View, seed: int = 0, aspect: str = "square"
) -> np.ndarray:
    """How much each pixel counts of what `look` sees of a picture of this width and height, float32 (height, width) in 0 … 1: by the brightness
    of its mask or, if it is its own, by its transparency. Raises OSError, ValueError and Pillow's errors for files that cannot be decoded
    or can be no mask."""
    assert pair.mask is not None
    if pair.mask == pair.path:
        with Image.open(pair.path) as opened:
            mask = ImageOps.exif_transpose(opened).convert("RGBA").getchannel("A")
    else:
        mask = upright(pair.mask).convert("L")
    brightest = int(np.asarray(mask).max())
    if brightest < 128:
        raise ValueError(f"its brightest pixel is {brightest} of 255, and white (opaque) is what counts")
    if mask.size != size:  # of some files the header does not say which way up they are
        raise ValueError(f"it is {mask.width}×{mask.height} pixels, and its picture {size[0]}×{size[1]}")
    # Lanczos would ring at a mask's edges.
    return cut_for(mask.size, pair.key, resolution, view, seed, aspect).of(mask, Image.Resampling.BILINEAR) / 255


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
