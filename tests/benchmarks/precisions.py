"""What does a precision cost in what is learnt? The demo's base, the same batches in each, judged on 64 pictures of its subject.

    python tests/benchmarks/precisions.py                   # half an hour on one core; goes on where it stopped
    python tests/benchmarks/precisions.py --quick           # one seed

At the demo's own rate, and at a hundredth of it: there an update is so small a part of its weight as those of Stable Diffusion 1.5
are. Finished pieces are lines of tests/benchmarks/results/precisions.jsonl; the table, as Markdown, comes on stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from accelerate.state import AcceleratorState
from cases import CASES, prepare
from stage import Judge, Place

from sdclr.engine import rounding

RESULTS = Path(__file__).parent / "results" / "precisions.jsonl"
STEPS, RATES = 300, (6e-5, 6e-7)
NEAREST = "full_bf16, rounded to the nearest"
KINDS: dict[str, tuple[str, ...]] = {
    "fp32": ("model.precision=fp32",),
    "bf16": ("model.precision=bf16",),
    "full_bf16": ("model.precision=full_bf16",),
    "full_bf16, adamw8bit": ("model.precision=full_bf16", "optimizer.name=adamw8bit"),
    NEAREST: ("model.precision=full_bf16",),
}


Learnt = Callable[[str, float, int], dict[str, Any]]
"""(kind, rate, seed) -> the untouched model's loss, and the losses of its curve"""


def measured(place: Place) -> Learnt:
    """Trains what has not been trained yet."""

    def find(kind: str, lr: float, seed: int) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            AcceleratorState._reset_state(reset_partial_state=True)  # which has one precision a process
            judge = Judge(place, seed, KINDS[kind])
            with to_the_nearest() if kind == NEAREST else contextlib.nullcontext():
                return {"base": judge.base(), **judge.short_curve(f"{kind} at {lr:g}", lambda step: lr, STEPS, ())}

        return place.piece(name_of(kind, lr, seed), make, [STEPS, *KINDS[kind]])

    return find


def stored() -> Learnt:
    """What has been."""
    lines = {line["name"]: line["value"] for line in map(json.loads, RESULTS.read_text().splitlines())}
    return lambda kind, lr, seed: lines[name_of(kind, lr, seed)]


def name_of(kind: str, lr: float, seed: int) -> str:
    return f"{kind}, {lr:g}, seed {seed}"


@contextlib.contextmanager
def to_the_nearest() -> Iterator[None]:
    """What rounding by chance is for: bf16 as torch rounds."""
    real = rounding.rounded
    rounding.rounded = lambda values, generator: values.to(torch.bfloat16).float()
    try:
        yield
    finally:
        rounding.rounded = real


def summary(learnt: Learnt, seeds: int) -> list[dict[str, Any]]:
    """For each rate and kind: the share of the loss of the untouched model in fp32 that training takes away, and of that which it takes in
    fp32; mean and standard deviation over seeds."""
    rows = []
    for lr in RATES:
        base = np.array([learnt("fp32", lr, seed)["base"] for seed in range(seeds)])
        gains = {kind: 1 - np.array([learnt(kind, lr, seed)["losses"][-1] for seed in range(seeds)]) / base for kind in KINDS}  # fmt: skip
        for kind, gain in gains.items():
            share = gain / gains["fp32"]
            spread = share.std(ddof=1) if seeds > 1 else 0.0
            rows.append({"lr": lr, "kind": kind, "gain": gain.mean(), "share": share.mean(), "sd": spread})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [f"| rate, {STEPS} steps | precision | gain | of fp32's |", "|---|---|---|---|"]
    lines += [f"| {r['lr']:.0e} | {r['kind']} | {r['gain']:.1%} | {r['share']:.3f} ± {r['sd']:.3f} |" for r in rows]
    return "\n".join(lines)


def place_in(work: Path, results: Path = RESULTS) -> Place:
    case = next(case for case in CASES if case.name == "mochi")
    prepare(case, work)
    return Place(case, work, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "sdclr-precisions", help="pictures")
    args = parser.parse_args()
    print(markdown(summary(measured(place_in(args.work.resolve())), 1 if args.quick else 5)))


if __name__ == "__main__":
    main()
