"""Randomness with a name: every draw is a function of (seed, purpose, position) and of nothing else.

So nothing depends on worker or process count, on how often validation ran, or on what ran before; to resume, a run needs its
weights, its optimizer state and the step.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive(seed: int, *labels: int | str) -> int:
    """A 63-bit seed for one named purpose, for example `derive(42, "order", epoch)`."""
    text = "\x1f".join(map(str, (seed, *labels)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *labels: int | str) -> torch.Generator:
    """A CPU torch generator for one named purpose."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *labels))


def numpy_rng(seed: int, *labels: int | str) -> np.random.Generator:
    """A numpy generator for one named purpose."""
    return np.random.default_rng(derive(seed, *labels))
