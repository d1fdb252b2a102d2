"""What the schema is made of: problems in our own words, lengths of training, numbers with bounds, and the base of all sections."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError


def problem(message: str, at: str | None = None) -> PydanticCustomError:
    """One problem in our own words; `at` names the key of the same section that it should be shown at."""
    return problems([(at, message)])


def problems(found: list[tuple[str | None, str]]) -> PydanticCustomError:
    """Several problems of one section as one error; `config.source` takes them apart again."""
    return PydanticCustomError("sdclr", "{text}", {"text": "; ".join(message for _, message in found), "found": found})


def needed(message: str, at: str) -> PydanticCustomError:
    """A key that must be given because of another; not reported when the key stood there and was itself refused."""
    return PydanticCustomError("sdclr_needed", "{text}", {"text": message, "found": [(at, message)]})


MAX_STEPS = 10_000_000
"""Longer schedules are a slip of the keyboard; a step a second would take four months."""


class Span(BaseModel):
    """A length of training: a whole number of optimizer steps, or a number of epochs (passes over the training images)."""

    model_config = ConfigDict(frozen=True)
    value: float
    unit: Literal["steps", "epochs"]

    def in_steps(self, steps_per_epoch: float) -> int:
        """Optimizer steps, at least one."""
        return max(1, round(self.value * (steps_per_epoch if self.unit == "epochs" else 1)))

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit if self.value != 1 else self.unit[:-1]}"


def parse_span(value: Any) -> Any:
    """`40`, `"40 steps"`, `"10 epochs"` or `"1 epoch"` to a Span."""
    if isinstance(value, Span):
        return value
    if isinstance(value, bool) or value is None:
        raise problem(f"must be a number of steps such as 40, or text such as '10 epochs'; got {value!r}")
    match = re.fullmatch(
        r"\s*((?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:e[+-]?[0-9]+)?)\s*(steps?|epochs?)?\s*", str(value), re.IGNORECASE
    )
    number = float(match[1]) if match else math.nan
    unit = "epochs" if match and (match[2] or "").lower().startswith("epoch") else "steps"
    if not 0 < number <= MAX_STEPS:
        raise problem(f"must be a positive number of steps such as 40, or text such as '10 epochs'; got {value!r}")
    if unit == "steps" and number != round(number):
        raise problem(f"must be a whole number of steps; got {value!r}")
    return Span(value=number, unit=unit)


def show_span(span: Span) -> int | str:
    """The shortest text that parses back to the same Span."""
    if span.unit == "steps":
        return int(span.value)
    return str(span) if parse_span(str(span)) == span else f"{span.value!r} epochs"


Length = Annotated[Span, BeforeValidator(parse_span), PlainSerializer(show_span)]
Rate = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Seed = Annotated[int, Field(ge=0, le=2**53)]
Text = Annotated[str, Field(max_length=2000)]


def _fits_the_vae(pixels: int) -> int:
    if pixels % 8:
        raise problem(f"must be a multiple of 8 (the VAE's factor); got {pixels}, nearest is {8 * round(pixels / 8)}")
    return pixels


Side = Annotated[int, Field(ge=32, le=4096), AfterValidator(_fits_the_vae)]


def at_home(path: Path) -> Path:
    """A path with ~ and ~user as the folders they stand for; a user that this machine does not know is a problem."""
    try:
        return path.expanduser()
    except RuntimeError:
        user = path.parts[0][1:]
        raise problem(f"names the home of {user!r}, and there is no such user here; write ./{path} for a folder of that name") from None  # fmt: skip


def _named(place: Any) -> Any:
    """pathlib would take no name for the folder that the program runs in."""
    if place == "":
        raise problem("must name a folder; got an empty name")
    return place


Place = Annotated[Path, BeforeValidator(_named), AfterValidator(at_home)]


class Section(BaseModel):
    """Base of all sections: frozen, strict about keys, defaults judged like values."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, defer_build=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take `size: true` for 1 and `flip: 1` for true."""
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        given = value if isinstance(value, list) else [value]
        if bool not in kinds and kinds & {int, float} and any(isinstance(v, bool) for v in given):
            raise problem(f"must be a number; got {value!r}")
        if bool in kinds and isinstance(value, (int, float)) and not isinstance(value, bool):
            raise problem(f"must be true or false; got {value!r}")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation is made of."""
    inner = get_args(annotation)
    return {kind for part in inner for kind in _kinds(part)} if inner else {annotation}
