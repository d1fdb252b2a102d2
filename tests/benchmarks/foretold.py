"""Memory foretold and memory used: what `sdclr check` counts beforehand, beside the peak of real training in a process of its own.

The held-out images are measured once, before the first step; no copy of the best weights is kept. `throughput.py --memory` runs it.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import throughput
from shapes import folder_of

ROOT = Path(__file__).parent.parent.parent
BAR = 0.10
"""Foretold within this share of used, both as whole processes; the imports are measured."""


SMALLER = ("model.gradient_checkpointing=true",)
SMALLER_STILL = (*SMALLER, "optimizer.name=adamw8bit")
SMALLEST = (*SMALLER_STILL, "optimizer.fused_backward=true", "optimizer.max_grad_norm=null")
LEAST = (*SMALLEST, "model.precision=full_bf16")
"""Settings that take less memory, each with the one before."""
LORA = "lora.rank=16"
IN_BF16 = "model.precision=bf16"
FEW = 5
"""Pictures at true size on the CPU, where encoding one takes a minute: one of them is held out."""
GIVEN_BACK = "MALLOC_MMAP_THRESHOLD_"
"""glibc's variable: with it blocks of a megabyte and more go back to the system when they are freed, so that what is used is what lives, as
it is counted for a card; it costs time."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model trained on pictures of some resolution, at some batch size, with overrides of the config."""

    model: Path
    resolution: int
    factor: int
    batch: int
    overrides: tuple[str, ...] = ()
    pictures: int = 20
    given_back: bool = False


def cases(work: Path, quick: bool, device: str, full_size: bool = False, xl: bool = False) -> list[Case]:
    """What is measured; on a GPU at true size (SDXL's with `xl`), and on the CPU in bf16 where that is asked for."""
    if full_size:
        sd15 = Case(folder_of("sd15", work), 512, 8, 1, pictures=FEW, given_back=True)
        settings = ((*SMALLER_STILL, IN_BF16), (*SMALLEST, IN_BF16), LEAST)
        small = [replace(sd15, overrides=overrides) for overrides in settings]
        return small if quick else [*small, Case(folder_of("sdxl", work), 1024, 8, 1, LEAST, FEW, given_back=True)]
    if device == "cuda" and xl:
        sdxl = Case(folder_of("sdxl", work), 1024, 8, 2)
        smaller = (SMALLER, SMALLER_STILL, SMALLEST, LEAST, (*SMALLER, LORA))
        return [replace(sdxl, batch=1, overrides=LEAST), *(replace(sdxl, overrides=overrides) for overrides in smaller)]
    if device == "cuda":
        sd15 = Case(folder_of("sd15", work), 512, 8, 1)
        settings = (
            (),
            SMALLER,
            SMALLER_STILL,
            SMALLEST,
            LEAST,
            (*SMALLER, LORA),
            (*SMALLER, "optimizer.name=adafactor"),
        )
        small = [replace(sd15, overrides=overrides) for overrides in settings]
        if quick:
            return small
        return [*small, replace(sd15, batch=4, overrides=(LORA,)), replace(sd15, batch=16), replace(sd15, batch=4), replace(sd15, batch=16, overrides=("model.compile=off",))]  # fmt: skip
    demo, middle = Case(ROOT / "data/tiny-sd", 64, 4, 16), Case(folder_of("middle", work), 128, 8, 4)
    middle_xl = Case(folder_of("middle-xl", work), 128, 8, 4)
    if quick:
        return [demo, middle]
    sizes = ((128, 1), (192, 6), (256, 2), (256, 8))
    twice = (LORA, *SMALLER)
    loras = [
        replace(middle, overrides=(LORA,)),
        replace(middle, resolution=192, batch=6, overrides=(LORA,)),
        replace(middle, resolution=256, batch=8, overrides=(LORA,)),
        replace(middle, overrides=twice),
        replace(middle, resolution=256, batch=2, overrides=twice),
        replace(middle, resolution=256, batch=8, overrides=twice),
        replace(middle_xl, overrides=(LORA,)),
        replace(middle_xl, overrides=twice),
    ]
    return [
        replace(demo, batch=4),
        demo,
        middle,
        *(replace(middle, resolution=r, batch=b) for r, b in sizes),
        middle_xl,
        *loras,
    ]


def measure(work: Path, case: Case, device: str) -> dict[str, Any]:
    """Bytes foretold and used, above the imports and whole; on a GPU, of its memory."""
    import torch

    from sdclr.config import source
    from sdclr.engine import memory

    images = some_of(ROOT / "data/mochi", case.pictures, work)
    setting = throughput.Setting(case.model, images, case.resolution, case.factor, (case.batch,), device, 1, 0)  # fmt: skip
    sets = [word for override in case.overrides for word in ("--set", override)]
    if case.given_back:
        os.environ[GIVEN_BACK] = str(2**20)
    contestant = throughput.Contestant("sdclr", setting, case.batch, work, "--draws", "2", *sets)
    os.environ.pop(GIVEN_BACK, None)
    imported = contestant.imported
    contestant.round(2)
    used = contestant.end()
    config = source.load(work / f"sdclr-{case.batch}" / "run.yaml", case.overrides).config
    held_out = case.pictures // 5
    needs = memory.count(config, case.pictures - held_out, held_out, torch.device(device))
    if case.given_back:
        needs = replace(needs, kept=0.0, kept_training=0.0)
    found = {
        "model": case.model.name, "weights": needs.parts["weights"], "batch": case.batch, "resolution": case.resolution,
        "overrides": list(case.overrides), "foretold": needs.at(case.batch),
    }  # fmt: skip
    if device == "cuda":
        found["allocator"] = used["allocator"]
        return {**found, "imported": 0, "used": used["device"], "peak": used["device"]}
    return {**found, "imported": imported, "used": used["above_imports"], "peak": used["peak"]}


def some_of(images: Path, count: int, work: Path) -> Path:
    """A folder with the first `count` of the pictures and their captions."""
    folder = work / f"pictures-{count}"
    folder.mkdir(parents=True, exist_ok=True)
    for picture in sorted(images.glob("*.png"))[:count]:
        for file in (picture, picture.with_suffix(".txt")):
            shutil.copy(file, folder)
    return folder


def markdown(result: dict[str, Any]) -> str:
    """The cases as a table, and the bar."""
    lines = [
        "## Memory foretold and used",
        "",
        *throughput.told(result),
        "",
    ]
    lines += ["| model | UNet MiB | pixels | batch | with | foretold MiB | used MiB | off | off, whole process | bar |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for c in result["cases"]:
        off, whole = c["foretold"] / c["used"] - 1, (c["foretold"] + c["imported"]) / c["peak"] - 1
        mib = {k: c[k] / 2**20 for k in ("weights", "foretold", "used")}
        lines.append(
            f"| {c['model']} | {mib['weights']:.0f} | {c['resolution']} | {c['batch']} | {', '.join(filter(None, [*c.get('overrides', []), c.get('allocator', '')]))} | {mib['foretold']:.0f} | {mib['used']:.0f} "
            f"| {off:+.1%} | {whole:+.1%} | {'holds' if abs(whole) <= BAR else 'MISSED'} |"
        )
    return "\n".join([*lines, ""])
