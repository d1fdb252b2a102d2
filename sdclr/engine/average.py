"""The average of a run's trough weights as one more state of the model: snapshots of cyclical rates (Huang 2017, arXiv 1704.00109),
averaged as weights (Izmailov 2018, arXiv 1803.05407). Of a LoRA these are its matrices A and B; the average's own BA is another than the
mean of theirs, and its held-out loss is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from sdclr.engine.checkpoint import TROUGH, Checkpoint, available, verify
from sdclr.model.components import read_trained


@dataclasses.dataclass(frozen=True)
class Average:
    """Mean weights of some troughs: the steps they were kept at, and the mean of their exposures."""

    steps: tuple[int, ...]
    exposure: float
    weights: dict[str, dict[str, torch.Tensor]]


def of_troughs(folder: Path, names: tuple[str, ...]) -> tuple[Average | None, list[str]]:
    """The average of all troughs in a checkpoints folder, every one weighing the same, and why it could not be made.

    It needs at least two troughs, all whole: an average of some of them would be another state under the same name.
    """
    troughs = available(folder, (TROUGH,))
    problems = [f"{t.path}: {'; '.join(found)}" for t in troughs if (found := verify(t))]
    if len(troughs) < 2:
        problems.append(f"an average needs at least two troughs, and the run has {len(troughs)}")
    if problems:
        return None, problems
    exposures = [trough.info()["exposure"] for trough in troughs]
    steps = tuple(trough.step for trough in troughs)
    return Average(steps, sum(exposures) / len(exposures), mean_weights(troughs, names)), []


def mean_weights(checkpoints: Sequence[Checkpoint], names: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """Mean of the checkpoints' weights, read one after another and summed up in fp32; what is not a floating-point number is the last one's."""
    mean: dict[str, dict[str, torch.Tensor]] = {}
    last: dict[str, dict[str, torch.Tensor]] = {}
    for number, checkpoint in enumerate(checkpoints, 1):
        last = read_trained(checkpoint.path, names)
        for name, weights in last.items():
            so_far = mean.setdefault(name, {})
            for key, value in weights.items():
                floating = value.is_floating_point() and key in so_far
                so_far[key] = so_far[key] + (value.float() - so_far[key]) / number if floating else value
    return {
        name: {key: value.to(last[name][key].dtype) for key, value in found.items()} for name, found in mean.items()
    }
