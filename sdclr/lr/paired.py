"""Differences between two states of one model, image by image: the only comparison that can see a 1 % change of a loss whose single
draws spread by 125 %.

Both states are measured on the same noise and timesteps, so the draws' luck cancels; what remains is the spread between images,
from which the interval follows.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.special import stdtrit


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean of paired differences over images, its 95 % interval, and the share of images that agree with its sign."""

    mean: float
    low: float
    high: float
    agreement: float
    images: int


def paired_difference(a: np.ndarray, b: np.ndarray, confidence: float = 0.95) -> Difference:
    """a − b for losses of the same images, each (images,) or (images, draws); draws are averaged first.

    The interval is Student's t with images − 1 degrees of freedom; with one image it is infinite.
    """
    each = per_image(a) - per_image(b)
    mean, half = float(each.mean()), half_width(each, confidence)
    agreement = float(np.mean(np.sign(each) == np.sign(mean))) if mean else 0.0
    return Difference(mean, mean - half, mean + half, agreement, len(each))


def half_width(values: np.ndarray, confidence: float = 0.95) -> float:
    """Half the width of the confidence interval of a mean, values (n,); infinite for n < 2."""
    n = len(values)
    return float(stdtrit(n - 1, 0.5 + confidence / 2) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("inf")


def per_image(losses: np.ndarray) -> np.ndarray:
    """Mean over draws, shape (images,)."""
    losses = np.asarray(losses, dtype=float)
    return losses.mean(axis=1) if losses.ndim > 1 else losses
