"""How long the program takes to begin: help, a mistake in the config, and the first training step with warm caches.

The first step's rival is diffusers importing itself and loading the same model. `throughput.py --startup` runs it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BARS = {"help": 0.25, "config error": 0.5, "first step / diffusers": 1.3}
"""Seconds, seconds, and a ratio."""


def measure(model: Path, work: Path, first_step: Callable[[], float], repeats: int) -> dict[str, Any]:
    """Wall-clock seconds of each beginning, `repeats` times in turn; `first_step` starts a run and returns after its first step."""
    work.mkdir(parents=True, exist_ok=True)
    wrong = work / "wrong.yaml"
    wrong.write_text(f"run: {{name: wrong}}\nmodel: {{base: '{model}'}}\ndata: {{imagse: '{model}'}}\n")
    program = [sys.executable, "-m", "sdclr"]
    load = f"from diffusers import StableDiffusionPipeline; StableDiffusionPipeline.from_pretrained({str(model)!r})"
    beginnings: dict[str, Callable[[], float]] = {
        "help": lambda: _seconds([*program, "--help"]),
        "config error": lambda: _seconds([*program, "check", str(wrong)], code=2),
        "first step": first_step,
        "diffusers": lambda: _seconds([sys.executable, "-c", load]),
    }
    for begin in beginnings.values():
        begin()  # fills the caches, of the program and of the disk
    found: dict[str, list[float]] = {name: [] for name in beginnings}
    for _ in range(repeats):
        for name, begin in beginnings.items():
            found[name].append(begin())
    return {"seconds": found}


def _seconds(command: list[str], code: int = 0) -> float:
    started = time.perf_counter()
    ended = subprocess.run(command, capture_output=True).returncode
    if ended != code:
        raise SystemExit(f"{' '.join(command)}: exit code {ended}, expected {code}")
    return time.perf_counter() - started


def markdown(result: dict[str, Any]) -> str:
    """Medians with their extremes, and the bars."""
    found = result["seconds"]
    lines = ["## Start-up", "", *(f"- {name}: {value}" for name, value in result["machine"].items()), ""]
    lines += ["| beginning | median s | least | most |", "|---|---|---|---|"]
    lines += [f"| {name} | {statistics.median(v):.2f} | {min(v):.2f} | {max(v):.2f} |" for name, v in found.items()]
    ratios = [a / b for a, b in zip(found["first step"], found["diffusers"], strict=True)]
    values = {
        **{name: statistics.median(v) for name, v in found.items()},
        "first step / diffusers": statistics.median(ratios),
    }
    lines.append("")
    lines += [
        f"- {name}: {values[name]:.2f}, bar {bar}: {'holds' if values[name] <= bar else 'MISSED'}"
        for name, bar in BARS.items()
    ]
    return "\n".join([*lines, ""])
