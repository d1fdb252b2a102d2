"""Which parts of a picture count: its own transparency, or a mask in another folder."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from sdclr.data.pairs import Pair, find, printable
from sdclr.errors import DataError


def by_transparency(pairs: Sequence[Pair]) -> list[Pair]:
    """Each picture that has any transparency as its own mask; all of the others counts. Raises DataError where none has."""
    masked = [dataclasses.replace(pair, mask=pair.path) if _has_transparency(pair.path) else pair for pair in pairs]
    if not any(pair.mask for pair in masked):
        raise DataError(
            ["mask.images: alpha asks for the pictures' transparency, and none of them has any"],
            hint="save them with an alpha channel (PNG, WebP), or set mask.images to a folder of masks",
        )
    return masked


def from_folder(pairs: Sequence[Pair], folder: Path) -> list[Pair]:
    """Each picture with the mask of its name (whatever its suffix); raises DataError naming every one that is missing or of another size."""
    if not folder.is_dir():
        raise DataError(
            [f"{folder}: there is no such folder (mask.images)"],
            hint="set mask.images to the folder that holds the masks, or to alpha for the pictures' own transparency",
        )
    masks = {_stem(mask): mask for mask in find(folder, default_caption="")}
    problems, masked = [], []
    for pair in pairs:
        mask = masks.get(_stem(pair))
        if mask is None:
            problems.append(f"{printable(pair.path)}: has no mask in {folder} (looked for {printable(_stem(pair))}.*)")
        elif mask.size != pair.size:
            sizes = [f"{width}×{height}" for width, height in (mask.size, pair.size)]
            problems.append(
                f"{printable(mask.path)}: is {sizes[0]} pixels, and its picture {printable(pair.path)} {sizes[1]}"
            )
        else:
            masked.append(dataclasses.replace(pair, mask=mask.path))
    if problems:
        raise DataError(
            problems, hint="a mask is as large as its picture, white where that counts; a white one counts all of it"
        )
    return masked


def _has_transparency(path: Path) -> bool:
    with Image.open(path) as image:
        return image.has_transparency_data


def _stem(pair: Pair) -> str:
    return unicodedata.normalize("NFC", PurePosixPath(pair.key).with_suffix("").as_posix())
