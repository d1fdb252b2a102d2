"""Which average over timesteps should decide? The same arms, read through others than the plain mean squared error.

The truth is of the plain one. A weight is of a draw, the same before and after training, so every reading is of the same forwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import trials
from stage import Place

from sdclr.commands.range_test import Findings, as_result, measure
from sdclr.engine.arms import Measured
from sdclr.model.objective import min_snr_weights

Weights = Callable[[np.ndarray, torch.Tensor, Any], np.ndarray]
"""(untouched losses (images, K), timesteps (images, K), noise scheduler) -> weights (images, K)"""


def plain(base: np.ndarray, timesteps: torch.Tensor, scheduler: Any) -> np.ndarray:
    return np.ones_like(base)


def by_bin(base: np.ndarray, timesteps: torch.Tensor, scheduler: Any) -> np.ndarray:
    """Each of the K strata of timesteps as a share of the untouched model's loss there, so that all count alike."""
    return np.broadcast_to(1 / base.mean(axis=0), base.shape)


def min_snr(base: np.ndarray, timesteps: torch.Tensor, scheduler: Any) -> np.ndarray:
    """Hang 2023 (arXiv 2303.09556), γ = 5."""
    return min_snr_weights(scheduler, timesteps.flatten(), 5.0).numpy().reshape(base.shape).astype(float)


AVERAGES: dict[str, Weights] = {"plain": plain, "every bin alike": by_bin, "min-SNR weights": min_snr}


def run(place: Place, seed: int, truth: dict[str, Any]) -> list[dict[str, Any]]:
    """One range test's arms, read through each average, against the truth."""

    def make() -> dict[str, Any]:
        bench, config, inputs = trials.bench_of(place, seed, f"test-{seed}")
        found = measure(bench, config.range_test)
        first = bench.benches[0][0]
        timesteps = first.draws.timesteps.reshape(bench.base().shape)
        weights = {n: f(bench.base(), timesteps, first.run.parts.noise_scheduler) for n, f in AVERAGES.items()}
        return {name: as_result(_weighed(found, each), bench, config, inputs) for name, each in weights.items()}

    results = place.piece(f"averages-{seed}", make, [trials.method()])
    loaded, inputs = place.load(seed)
    return [
        {"average": name} | trials.against(truth, result, loaded.config, inputs) for name, result in results.items()
    ]


def summaries(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As of the tests, for each average."""
    return {name: trials.summary([record for record in records if record["average"] == name]) for name in AVERAGES}


def _weighed(found: Findings, weights: np.ndarray) -> Findings:
    def weighed(arm: Measured) -> Measured:
        return dataclasses.replace(arm, losses=arm.losses * weights, base=arm.base * weights)

    assert found.base is not None and found.reference is not None and found.longest is not None
    return dataclasses.replace(
        found,
        base=found.base * weights,
        reference=weighed(found.reference),
        longest=weighed(found.longest),
        arms=[weighed(arm) for arm in found.arms],
    )
