"""Which picture, seen how, at which place of the run: a function of the seed and the sample's position.

A run is one endless stream of samples, epoch after epoch, each epoch a fresh permutation of the pictures (of those that repeat,
as often as they do); a step takes the next size × accumulate of them, however many processes share the work. An epoch need not be a
whole number of steps, and no picture is ever dropped, or doubled unasked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable
from functools import cached_property, lru_cache
from typing import TypeVar

import numpy as np

from sdclr.data.pairs import Pair, Split
from sdclr.seeding import derive, numpy_rng

Item = TypeVar("Item")


def in_groups(items: Iterable[Item], alike: Callable[[Item], Hashable], most: int) -> list[list[Item]]:
    """Items that go through the model at once: groups of at most `most` that are `alike` (of one shape), in the order they came in."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(alike(item), []).append(item)
    return [group[first : first + most] for group in groups.values() for first in range(0, len(group), most)]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample of the stream: its position, the picture's index, the index of its view, whether its caption is emptied, and a number
    whose remainder, divided by how many orders its caption has, says which of these it is told."""

    position: int
    index: int
    view: int
    drop_caption: bool
    order: int = 0


@dataclasses.dataclass(frozen=True)
class Batches:
    """The stream, cut into optimizer steps and micro-batches of `size`; `rank` of `processes` takes its equal share of each. `times` is how
    often an epoch takes each picture (empty: once)."""

    seed: int
    images: int
    views: int
    size: int
    accumulate: int = 1
    caption_dropout: float = 0.0
    rank: int = 0
    processes: int = 1
    times: tuple[int, ...] = ()

    @cached_property
    def samples_per_epoch(self) -> int:
        """Samples in one pass over the images, those that repeat counted as often as they do."""
        return sum(self.times) or self.images

    @cached_property
    def _places(self) -> np.ndarray:
        """The picture at each place of an epoch that is not shuffled."""
        return np.repeat(np.arange(self.images), self.times or 1)

    @property
    def samples_per_step(self) -> int:
        return self.size * self.accumulate

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in one pass over the images; may be fractional."""
        return self.samples_per_epoch / self.samples_per_step

    def __call__(self, step: int) -> list[list[Sample]]:
        """This process's micro-batches of one optimizer step (0-based)."""
        first = step * self.samples_per_step
        share = self.size // self.processes
        return [
            [self.sample(first + m * self.size + self.rank * share + i) for i in range(share)]
            for m in range(self.accumulate)
        ]  # fmt: skip

    def sample(self, position: int) -> Sample:
        """The sample at one position of the stream."""
        epoch, place = divmod(position, self.samples_per_epoch)
        index = int(self._places[_order(self.seed, epoch, self.samples_per_epoch)[place]])
        view = derive(self.seed, "view", position) % self.views
        order = derive(self.seed, "tag order", position)
        dropped = derive(self.seed, "caption dropout", position) < self.caption_dropout * 2**63
        return Sample(position, index, view, dropped, order)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The images of a run, split, and how they are sampled; `prior` are other pictures that are trained on beside them."""

    split: Split
    batches: Batches
    prior: tuple[Pair, ...] = ()

    @property
    def steps_per_epoch(self) -> float:
        return self.batches.steps_per_epoch

    @property
    def prior_batches(self) -> Batches:
        """The stream of the prior pictures: as many in a step, from a seed of their own."""
        seed = derive(self.batches.seed, "prior")
        return dataclasses.replace(self.batches, seed=seed, images=len(self.prior), times=())


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, samples: int) -> np.ndarray:
    return numpy_rng(seed, "order", epoch).permutation(samples)
