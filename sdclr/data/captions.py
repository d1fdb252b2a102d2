"""A caption as training may say it: its tags, which commas part, in other orders."""

from __future__ import annotations

from sdclr.data.pairs import Pair
from sdclr.seeding import numpy_rng


def tag_orders(pair: Pair, count: int, keep: int, seed: int) -> list[str]:
    """The caption as it is written and, after that, `count − 1` times with all but its first `keep` tags shuffled.

    An order derives from (seed, key, number), so it is the same in every run, however many are asked for.
    """
    said = [pair.caption]
    tags = tags_of(pair.caption)
    for number in range(1, count):
        drawn = numpy_rng(seed, "tag order", pair.key, number).permutation(max(0, len(tags) - keep))
        said.append(", ".join(tags[:keep] + [tags[keep + place] for place in drawn]))
    return said


def tags_of(caption: str) -> list[str]:
    """What stands between a caption's commas."""
    return [tag for part in caption.split(",") if (tag := part.strip())]
