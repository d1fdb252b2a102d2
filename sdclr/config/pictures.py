"""The sections on what is trained on: the images, their captions and masks, and prior pictures."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sdclr.config.kinds import Place, Probability, Section, Side, Text, problem, problems

ALPHA = Path("alpha")
"""In place of a folder of masks."""
MOST_REPEATS = 1000
Folder = Annotated[str, Field(min_length=1, max_length=1000)]


def number_before(name: str) -> int | None:
    """The number before a folder's name (`10_cat`), which other trainers read as its repeats; None of a name without one."""
    found = re.match(r"(\d+)_", name)
    return min(MOST_REPEATS, max(1, int(found[1][:9]))) if found else None


class DataSection(Section):
    """The images and their captions."""

    images: Place = Field(
        description="folder of pictures, each with a .txt or .caption beside it (else the file name is the caption)"
    )
    resolution: Side = Field(512, description="pixels, a multiple of 8")
    aspect: Literal["square", "buckets"] = Field(
        "square",
        description="square, or buckets: of the shapes of at most resolution² pixels, each picture takes the one nearest its own; a step is then several forward-backwards",
    )
    crop: Literal["center", "random"] = Field(
        "center", description="which part of a picture is taken where it does not fit: center or random"
    )
    crops: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="random crops encoded for each picture (crop: random)"
    )
    flip: bool = Field(False, description="also train on mirrored pictures")
    repeats: dict[Folder, int] = Field(
        {}, description="how often an epoch takes the pictures of a subfolder, such as {portraits: 3}; others once"
    )
    caption: Text | None = Field(None, description="one caption for every picture that has no caption file")
    tag_orders: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="orders of a caption's tags, which commas part, that training draws from; 1: as written"
    )
    keep_tags: Annotated[int, Field(ge=0, le=100)] = Field(
        0, description="tags at the beginning of a caption that stay there (tag_orders)"
    )
    caption_dropout: Probability = Field(
        0.1, description="share of steps' samples whose caption is emptied, so that guidance keeps working"
    )

    @field_validator("repeats", mode="before")
    @classmethod
    def _repeats_are_whole_numbers(cls, repeats: Any) -> Any:
        if not isinstance(repeats, dict):
            raise problem(f"must be subfolders and numbers, such as {{portraits: 3}}; got {repeats!r}")
        wrong = {name: n for name, n in repeats.items() if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST_REPEATS}  # fmt: skip
        if wrong:
            raise problem(f"must be whole numbers from 1 to {MOST_REPEATS}; got {wrong}")
        return {str(name): times for name, times in repeats.items()}

    @field_validator("repeats")
    @classmethod
    def _repeats_are_of_subfolders(cls, repeats: dict[str, int]) -> dict[str, int]:
        tidy: dict[str, int] = {}
        for name, times in repeats.items():
            path = PurePosixPath(unicodedata.normalize("NFC", name))
            if path.is_absolute() or not path.parts or ".." in path.parts:
                raise problem(f"must name subfolders of data.images; got {name!r}")
            if path.as_posix() in tidy:
                raise problem(f"names {path.as_posix()} twice")
            tidy[path.as_posix()] = times
        return tidy

    @field_validator("keep_tags")
    @classmethod
    def _kept_tags_have_an_order(cls, keep: int, info: ValidationInfo) -> int:
        if keep and info.data.get("tag_orders") == 1:
            raise problem(f"has no effect with tag_orders: 1 (captions stay as they are written); got {keep}")
        return keep

    @field_validator("crops")
    @classmethod
    def _crops_are_random(cls, crops: int, info: ValidationInfo) -> int:
        if crops > 1 and info.data.get("crop") == "center":
            raise problem(f"has no effect with crop: center (there is only one); got {crops}")
        return crops


class MaskSection(Section):
    """Which parts of each picture count in the loss, trained and held out."""

    images: Place | None = Field(
        None,
        description="folder of masks, as large as the pictures and named as they are, white where a picture counts; alpha: the pictures' own transparency (a folder of that name is given with its whole path); null: all of every picture counts",
    )
    outside: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        0.0, description="weight of what is masked, beside 1 of what is not"
    )

    @field_validator("outside")
    @classmethod
    def _there_is_an_outside(cls, outside: float, info: ValidationInfo) -> float:
        if outside and info.data.get("images", ...) is None:
            raise problem("has no effect: mask.images is null")
        if 0 < outside < 1e-3:
            raise problem(f"must be 0, or 0.001 to 1; got {outside:g}")
        return outside

    @property
    def of_transparency(self) -> bool:
        """Whether the pictures' own transparency masks them."""
        return self.images == ALPHA

    @property
    def folder(self) -> Path | None:
        """The folder of masks, if they lie in one."""
        return None if self.of_transparency else self.images


class PriorSection(Section):
    """Other pictures of the subject's kind, so that the model keeps what it knows of them (Ruiz 2022, arXiv 2208.12242, section 3.2)."""

    images: Place | None = Field(
        None,
        description="folder of them, captioned as data.images is; a step takes as many of them as of the subject, and twice as long. null: none",
    )
    weight: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = Field(
        1.0, description="of their loss beside the subject's"
    )
    caption: Text | None = Field(None, description="one caption for every one that has no caption file")

    @model_validator(mode="after")
    def _settings_have_pictures(self) -> PriorSection:
        idle = [key for key in ("weight", "caption") if getattr(self, key) != type(self).model_fields[key].default]
        if idle and self.images is None:
            raise problems([(key, "has no effect: prior.images is null") for key in idle])
        return self
