"""From a picture's file to the pixels that the VAE sees."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from sdclr.data.pairs import Pair
from sdclr.seeding import numpy_rng


@dataclasses.dataclass(frozen=True)
class View:
    """One way of seeing a picture: which square of it, and whether mirrored. `crop` 0 is the centre."""

    crop: int = 0
    flipped: bool = False

    @property
    def name(self) -> str:
        return f"{self.crop}{'f' if self.flipped else ''}"


def views(crop: str, crops: int, flip: bool) -> list[View]:
    """The views that training draws from: the centre, or `crops` random squares, each also mirrored if `flip`."""
    squares = [0] if crop == "center" else [i + 1 for i in range(crops)]
    return [View(square, flipped) for square in squares for flipped in ((False, True) if flip else (False,))]


class Seen(NamedTuple):
    """A picture as the VAE sees it, float32 (3, resolution, resolution) in −1 … 1, and what SDXL is told of it: height and width before
    it was resized, top and left of the square in the resized picture, height and width of the square (Podell 2023, arXiv 2307.01952, section 2.2)."""

    pixels: np.ndarray
    sizes: tuple[int, int, int, int, int, int]


def look(pair: Pair, resolution: int, view: View, seed: int = 0) -> Seen:
    """The square, resized picture.

    EXIF orientation is applied, transparency laid on white, 16 bits scaled to 8, everything converted to RGB. Random squares derive from
    (seed, key, view), so they are the same in every run. Raises OSError and Pillow's errors for files that cannot be decoded.
    """
    with Image.open(pair.path) as opened:
        image = to_rgb(ImageOps.exif_transpose(opened))
    width, height = image.size
    scale = resolution / min(image.size)
    image = image.resize([max(resolution, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    spare = np.array(image.size) - resolution
    at = np.array([0.5, 0.5]) if view.crop == 0 else numpy_rng(seed, "crop", pair.key, view.crop).random(2)
    left, top = (int(v) for v in np.round(spare * at))
    image = image.crop((left, top, left + resolution, top + resolution))
    if view.flipped:
        image, left = ImageOps.mirror(image), int(spare[0]) - left
    array = np.asarray(image, dtype=np.float32)
    return Seen(
        np.ascontiguousarray(array.transpose(2, 0, 1)) / 127.5 - 1, (height, width, top, left, resolution, resolution)
    )


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
