"""Which parts of a picture count: its own transparency, or a mask in another folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from sdclr.data.pairs import Pair, files_in, header, printable
from sdclr.errors import DataError


def by_transparency(pairs: Sequence[Pair]) -> list[Pair]:
    """Each picture that has an alpha channel as its own mask; all of the others counts. Raises DataError where none has."""
    masked = [dataclasses.replace(pair, mask=pair.path) if _has_transparency(pair.path) else pair for pair in pairs]
    if not any(pair.mask for pair in masked):
        raise DataError(
            ["mask.images: alpha asks for the pictures' transparency, and none of them has an alpha channel"],
            hint="save them with an alpha channel (PNG, WebP), or set mask.images to a folder of masks",
        )
    return masked


def from_folder(pairs: Sequence[Pair], folder: Path) -> list[Pair]:
    """Each picture with the mask of its name (whatever its suffix); raises DataError naming every one that is missing or does not fit."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "there is no such folder"
        raise DataError(
            [f"{folder}: {what} (mask.images)"],
            hint="set mask.images to the folder that holds the masks, or to alpha for the pictures' own transparency",
        )
    beside: list[str] = []
    files, _ = files_in(folder, beside)
    problems, masked, missing = [], [], False
    for pair in pairs:
        stem = PurePosixPath(pair.key).with_suffix("").as_posix()
        own = files.get(stem, [])
        if len(own) == 1:
            problems += [f"{printable(own[0])}: {problem}" for problem in [_unfit(own[0], pair)] if problem]
            masked.append(dataclasses.replace(pair, mask=own[0]))
        elif own:
            problems.append(f"{', '.join(map(printable, own))}: {len(own)} masks of one picture: keep one")
        else:
            problems.append(f"{printable(pair.path)}: has no mask in {folder} (looked for {printable(stem)}.*)")
            missing = True
    if problems:
        raise DataError(
            problems + beside * missing,
            hint="a mask is as large as its picture, white where that counts; a white one counts all of it",
        )
    return masked


def _unfit(mask: Path, pair: Pair) -> str | None:
    """Why a file can be no mask of a picture, as far as its header tells."""
    size, problem = header(mask, mask.name)
    if problem:
        return problem
    if size != pair.size:
        return f"is {size[0]}×{size[1]} pixels, and its picture {printable(pair.path)} {pair.size[0]}×{pair.size[1]}"
    if _has_transparency(mask):
        return "has transparency, and its brightness is read: lay it on black"
    return None


def _has_transparency(path: Path) -> bool:
    with Image.open(path) as image:
        return image.has_transparency_data
