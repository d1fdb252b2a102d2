"""Memory foretold and memory used: what `sdclr check` counts beforehand, beside the peak of real training in a process of its own.

The held-out images are measured once, before the first step; no copy of the best weights is kept. `throughput.py --memory` runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import throughput
from shapes import folder_of

ROOT = Path(__file__).parent.parent.parent
BAR = 0.10
"""Foretold within this share of used, both as whole processes; the imports are measured."""


def measure(work: Path, quick: bool) -> list[dict[str, Any]]:
    """Bytes foretold and used, above the imports and whole, for each case."""
    demo, middle = ROOT / "data/tiny-sd", folder_of("middle", work)
    cases = [(demo, 64, 4, 16), (middle, 128, 8, 4)]
    if not quick:
        cases = [
            (demo, 64, 4, 4),
            *cases,
            (middle, 128, 8, 1),
            (middle, 192, 8, 6),
            (middle, 256, 8, 2),
            (middle, 256, 8, 8),
        ]
    return [_case(work, *case) for case in cases]


def _case(work: Path, model: Path, resolution: int, factor: int, batch: int) -> dict[str, Any]:
    import torch

    from sdclr.config import source
    from sdclr.engine import memory

    setting = throughput.Setting(model, ROOT / "data/mochi", resolution, factor, (batch,), "cpu", 1, 0)
    contestant = throughput.Contestant("sdclr", setting, batch, work, "--draws", "2")
    imported = contestant.imported
    contestant.round(2)
    used = contestant.end()
    config = source.load(work / f"sdclr-{batch}" / "run.yaml").config
    needs = memory.count(config, 16, 4, torch.device("cpu"))
    return {
        "model": model.name, "weights": needs.parts["weights"], "batch": batch, "resolution": resolution, "imported": imported,
        "foretold": needs.at(batch), "used": used["above_imports"], "peak": used["peak"],
    }  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """The cases as a table, and the bar."""
    lines = [
        "## Memory foretold and used",
        "",
        *(f"- {name}: {value}" for name, value in result["machine"].items()),
        "",
    ]
    lines += ["| model | UNet MiB | pixels | batch | foretold MiB | used MiB | off | off, whole process | bar |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for c in result["cases"]:
        off, whole = c["foretold"] / c["used"] - 1, (c["foretold"] + c["imported"]) / c["peak"] - 1
        mib = {k: c[k] / 2**20 for k in ("weights", "foretold", "used")}
        lines.append(
            f"| {c['model']} | {mib['weights']:.0f} | {c['resolution']} | {c['batch']} | {mib['foretold']:.0f} | {mib['used']:.0f} "
            f"| {off:+.1%} | {whole:+.1%} | {'holds' if abs(whole) <= BAR else 'MISSED'} |"
        )
    return "\n".join([*lines, ""])
