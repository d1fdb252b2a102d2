"""What the bench measures the range test on: a base model, a set of pictures drawn by code, and settings that differ from the demo's.

A case's folder holds `user/` (the pictures a user has), `held-out/` (64 more of the same subject, which only the judge sees),
`strangers/` (pictures of another subject with captions that belong to none of them) and `run.yaml`.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageOps

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "data"))

from portraits import COLOURS, SIZE, distinct_portraits, draw  # noqa: E402

HELD_OUT = 64
MOCHI_SEED = 1234
"""The demo's: so the user's twenty pictures are those of data/mochi."""


@dataclasses.dataclass(frozen=True)
class Case:
    """`subject` names who draws the pictures: mochi, style or object; `overrides` are what `--set` takes.

    A `narrow` case is for the base of half the width (see narrow.py), whose steps take half the time; nulls and all variants are of the
    one that is looked at `in_depth`, of another only those that it names.
    """

    name: str
    subject: str = "mochi"
    pictures: int = 20
    overrides: tuple[str, ...] = ()
    base: Path = ROOT / "data" / "tiny-sd"
    narrow: bool = False
    in_depth: bool = False
    variants: tuple[str, ...] = ()


CASES = [
    Case("mochi"),
    Case("narrow", narrow=True, in_depth=True),
    Case("style", "style", 60, narrow=True),
    Case("object", "object", 8, narrow=True, variants=("nothing", "two fifths held out")),
    Case("text-encoder", overrides=("model.train=[unet, text_encoder]",), narrow=True),
    Case("batch-1", overrides=("batch.size=1",), narrow=True),
    Case("batch-8", overrides=("batch.size=8",), narrow=True),
    Case("betas", overrides=("optimizer.betas=[0.8, 0.95]",), narrow=True),
    Case("adafactor", overrides=("optimizer.name=adafactor",), narrow=True),
    Case("sgd", overrides=("optimizer.name=sgd",), narrow=True),
    Case("lora", overrides=("lora.rank=8",), narrow=True),
    Case("lora-alpha", overrides=("lora.rank=16", "lora.alpha=1", "lora.layers=attention"), narrow=True),
]


def prepare(case: Case, folder: Path) -> None:
    """Draw the case's pictures and write its config, unless they are there."""
    config = folder / "run.yaml"
    if config.exists():
        return
    pictures = _pictures(case.subject, case.pictures + HELD_OUT)
    _write(folder / "user", pictures[: case.pictures])
    _write(folder / "held-out", pictures[case.pictures :])
    others = list(_portraits(40, seed=77, subject="person"))
    _write(folder / "strangers", [(image, others[i - 1][1]) for i, (image, _) in enumerate(others)])
    config.write_text(
        f"run: {{name: {case.name}, output_dir: '{folder / 'runs'}'}}\n"
        f"model: {{base: '{case.base}'}}\n"
        f"data: {{images: '{folder / 'user'}', resolution: {_resolution(case.base)}, flip: true}}\n"
        "validation: {fraction: 0.2, every: 2 epochs, timesteps_per_image: 16}\n"
        "batch: {size: 4}\n"
        "schedule: {policy: triangular, base_lr: 0, max_lr: auto, cycles: 4}\n"
        "train: {steps: auto, kappa: 1.0}\n"
    )


def _pictures(subject: str, count: int) -> list[tuple[Image.Image, str]]:
    """`count` captioned pictures, all different; the user's are the first of them."""
    if subject == "mochi":
        return list(_portraits(count, MOCHI_SEED, "mochi"))
    if subject == "style":
        return [(inked(image), _styled(caption)) for image, caption in _portraits(count, 4321, "person")]
    return list(_rockets(count, 5678))


def _portraits(count: int, seed: int, subject: str) -> Iterator[tuple[Image.Image, str]]:
    for i, portrait in enumerate(distinct_portraits(seed, count, subject)):
        yield draw(portrait, seed * 1000 + i), portrait.caption


def _styled(caption: str) -> str:
    return caption.replace("a portrait of", "an inky print of")


def inked(image: Image.Image) -> Image.Image:
    """A style the base never saw: three levels of gray, tinted from dark blue to cream, outlined in dark ink."""
    gray = ImageOps.grayscale(image)
    edges = gray.filter(ImageFilter.FIND_EDGES).point(lambda v: 255 if v > 40 else 0)
    levels = ImageOps.posterize(ImageOps.autocontrast(gray), 2)
    tinted = ImageOps.colorize(levels, black=(28, 36, 92), mid=(196, 110, 104), white=(250, 240, 214))
    tinted.paste((18, 20, 44), mask=edges.crop((1, 1, image.width - 1, image.height - 1)).resize(image.size))
    return tinted


def _rockets(count: int, seed: int) -> Iterator[tuple[Image.Image, str]]:
    """An object the base never saw, in two colours and three poses, each combination once."""
    rng = random.Random(seed)
    poses = {"leaning left": 25, "upright": 0, "leaning right": -25}
    kinds = [(a, b, pose) for a in COLOURS for b in COLOURS for pose in poses if a != b]
    for colour, ground, pose in rng.sample(kinds, count):
        side = SIZE * 4
        image = Image.new("RGB", (side, side), COLOURS[ground])
        shape = Image.new("RGBA", (side, side))
        pen = ImageDraw.Draw(shape)
        x, w, top, bottom = side / 2, side * rng.uniform(0.11, 0.14), side * 0.18, side * 0.74
        pen.polygon(
            [(x - 2 * w, bottom + w), (x - w, bottom - 2 * w), (x + w, bottom - 2 * w), (x + 2 * w, bottom + w)],
            fill=(70, 70, 84),
        )
        pen.ellipse((x - w * 0.7, bottom - w, x + w * 0.7, bottom + 2.6 * w), fill=(255, 190, 60))
        pen.rounded_rectangle((x - w, top + w, x + w, bottom), w * 0.5, fill=COLOURS[colour])
        pen.polygon([(x - w, top + 1.5 * w), (x, top - w), (x + w, top + 1.5 * w)], fill=(236, 236, 240))
        pen.ellipse(
            (x - w * 0.5, top + 2 * w, x + w * 0.5, top + 3 * w), fill=(200, 236, 250), outline=(40, 40, 50), width=6
        )
        turned = shape.rotate(poses[pose] + rng.uniform(-5, 5), Image.Resampling.BICUBIC)
        image.paste(turned, (round(rng.uniform(-12, 12)), round(rng.uniform(-12, 12))), turned)
        caption = f"a picture of a {colour} rocket, {pose}, on a {ground} background"
        yield image.resize((SIZE, SIZE), Image.Resampling.LANCZOS), caption


def _write(folder: Path, pictures: list[tuple[Image.Image, str]]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, (image, caption) in enumerate(pictures):
        image.save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(caption + "\n")


def _resolution(base: Path) -> int:
    """Pixels of the pictures that a diffusers folder was made for."""
    side = json.loads((base / "unet" / "config.json").read_text())["sample_size"]
    stages = len(json.loads((base / "vae" / "config.json").read_text())["block_out_channels"])
    return int(side * 2 ** (stages - 1))
