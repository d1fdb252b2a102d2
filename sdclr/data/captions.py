"""A caption as training may say it: its tags, which commas part, in other orders."""

from __future__ import annotations

import math

from sdclr.data.pairs import Pair
from sdclr.seeding import numpy_rng


def tag_orders(pair: Pair, count: int, keep: int, seed: int) -> list[str]:
    """The caption as it is written and, after that, up to `count − 1` times with all but its first `keep` tags shuffled: no order of these
    twice, so a caption of few tags has fewer.

    An order derives from (seed, key, number), so it is the same in every run, however many are asked for.
    """
    tags = tags_of(pair.caption)
    free = max(0, len(tags) - keep)
    found = {tuple(range(free)): pair.caption}
    number = 0
    while len(found) < min(count, math.factorial(min(free, 20))):
        number += 1
        order = tuple(numpy_rng(seed, "tag order", pair.key, number).permutation(free).tolist())
        found.setdefault(order, ", ".join(tags[:keep] + [tags[keep + place] for place in order]))
    return list(found.values())


def tags_of(caption: str) -> list[str]:
    """What stands between a caption's commas."""
    return [tag for part in caption.split(",") if (tag := part.strip())]
