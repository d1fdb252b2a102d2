"""`sdclr init`: a commented config, made from the schema itself so that it can never be out of date."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from sdclr.config.pictures import number_before
from sdclr.config.schema import RunConfig
from sdclr.config.source import dump_value
from sdclr.data.pairs import files_in
from sdclr.errors import InputError
from sdclr.report import console


def init(images: Path | None, base: str, output: Path, stdout: bool = False) -> None:
    """Write (or print) a config for a folder of images. Raises InputError rather than overwrite a file."""
    if images is not None and not images.is_dir():
        raise InputError(f"{images}: there is no such folder of pictures")
    repeats = _repeats(images) if images else {}
    name = re.sub(r"[^\w.@+-]+", "-", images.resolve().name if images else "")
    name = name.lstrip("-.+@").rstrip("-.")[:100] or "my-run"
    given = {
        "run.name": name,
        "model.base": base,
        "data.images": str(images or "path/to/pictures"),
        "data.resolution": _resolution(base),
        "schedule.cycles": 4,
        "data.repeats": repeats,
    }
    text = commented(given)
    if stdout:
        return console.result(text)
    try:
        with os.fdopen(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(
            f"{output}: exists already, and init never overwrites", hint="choose another: --output other.yaml"
        ) from None
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror}") from None
    console.result(str(output))
    if repeats:
        console.say("the numbers in the folders' names are written down as data.repeats")
    console.say(f"next: sdclr check {output}, then sdclr range-test {output}")


def _repeats(images: Path) -> dict[str, int]:
    """What the numbers before the subfolders' names say (`10_cat`), as kohya's trainer reads them; of one number for all, nothing."""
    folders = {stem.partition("/")[0] if "/" in stem else "" for stem in files_in(images, [])[0]}
    numbers = {name: number_before(name) or 1 for name in sorted(folders)}
    return {name: n for name, n in numbers.items() if n > 1} if len(set(numbers.values())) > 1 else {}


def _resolution(base: str) -> int:
    """The side of the pictures that a model was made for: of a local one as its configs say it, of another as its name does."""
    try:
        unet, vae = (json.loads((Path(base) / part / "config.json").read_bytes()) for part in ("unet", "vae"))
        return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError):
        return 1024 if re.search("xl", Path(base).name, re.IGNORECASE) else 512


def commented(given: dict[str, Any]) -> str:
    """Every key of the schema with its default and its meaning."""
    lines = [
        "# One file for range-test, train and sample. Every key has its default; delete what you do not change.",
        "",
    ]
    for section, field in RunConfig.model_fields.items():
        model = field.annotation
        assert isinstance(model, type) and issubclass(model, BaseModel)
        lines.append(f"{section}:  # {(model.__doc__ or '').splitlines()[0].rstrip('.')}")
        for key, inner in model.model_fields.items():
            default = field.default if isinstance(field.default, BaseModel) else None
            value = given.get(f"{section}.{key}", getattr(default, key) if default is not None else inner.default)
            value = "" if value is PydanticUndefined else value
            text = f"  {key}: {dump_value(value)}"
            lines.append(f"{text:<43} # {inner.description}" if inner.description else text)
        lines.append("")
    return "\n".join(lines)
