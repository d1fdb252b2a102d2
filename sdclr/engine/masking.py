"""How much each cell of a picture's latents counts, from its mask, through the cache on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import adaptive_avg_pool2d

from sdclr.config.schema import RunConfig
from sdclr.data.cache import Entry, TensorCache, content_hash, key_of
from sdclr.data.dataset import View, cut_key, look_at_mask
from sdclr.data.pairs import Pair, printable
from sdclr.errors import DataError, first_line
from sdclr.report import console

Place = tuple[int, int]
"""A picture, and one of its views."""


def masks_of(
    pairs: Sequence[Pair],
    views: Sequence[View],
    latents: Sequence[torch.Tensor],
    sizes: torch.Tensor,
    config: RunConfig,
    cache: TensorCache,
) -> tuple[torch.Tensor, ...]:
    """Of each picture (views, 1, h, w) in 0 … 1, beside its latents (views, 4, h, w): a cell counts as much as its pixels do in the mean, all of
    a picture without a mask. `sizes` are (images, views, 6), the pictures' height and width first. Raises DataError naming every mask
    that cannot be read, and every picture of which nothing counts."""
    masks = [torch.ones_like(each[:, :1]) for each in latents]
    places: dict[str, list[Place]] = {}
    data, seed = config.data, config.run.seed
    for index, pair in enumerate(pairs):
        if pair.mask:
            kind, content = "alpha" if pair.mask == pair.path else "mask", content_hash(pair.mask)
            for number, view in enumerate(views):
                cut = cut_key(pair, view, data.resolution, seed, data.aspect)
                key = key_of(kind, content, *cut, *latents[index].shape[2:])
                places.setdefault(key, []).append((index, number))
    entries = cache.get(places)
    missing = {key: at[0] for key, at in places.items() if key not in entries}
    if missing:
        made = _read(missing, pairs, views, latents, sizes, config)
        cache.put(made)
        entries |= made
    for key, at in places.items():
        for index, number in at:
            masks[index][number] = entries[key]["mask"]
    if not config.mask.outside:
        _refuse_blank(pairs, masks)
    if masks and all((mask == 1).all() for mask in masks):
        console.warn(f"mask.images masks nothing of these {len(pairs)} pictures: all of each counts")
    return tuple(masks)


def _read(
    missing: dict[str, Place],
    pairs: Sequence[Pair],
    views: Sequence[View],
    latents: Sequence[torch.Tensor],
    sizes: torch.Tensor,
    config: RunConfig,
) -> dict[str, Entry]:
    """What is not in the cache, by key."""
    made, broken = dict[str, Entry](), dict[Path | None, str]()
    with console.progress("reading masks", total=len(missing)) as bar:
        for key, (index, number) in missing.items():
            pair, (height, width) = pairs[index], latents[index].shape[2:]
            whole = (int(sizes[index, number, 1]), int(sizes[index, number, 0]))
            data, seed = config.data, config.run.seed
            try:
                seen = look_at_mask(pair, whole, data.resolution, views[number], seed, data.aspect)
                made[key] = {"mask": adaptive_avg_pool2d(torch.from_numpy(seen)[None], (height, width))}
            except Exception as error:  # Pillow's decoders raise many kinds: each means a file that can be no mask
                broken[pair.mask] = first_line(error)
            bar.advance()
    if broken:
        raise DataError(
            [f"{printable(str(path))}: can be no mask: {what}" for path, what in broken.items()],
            hint=f"save {'them' if len(broken) > 1 else 'it'} again, white where the picture counts and black where it does not; nothing was trained",
        )
    return made


def _refuse_blank(pairs: Sequence[Pair], masks: Sequence[torch.Tensor]) -> None:
    """There is nothing to learn, or to measure, of a view of which nothing counts."""
    blank = [pair for pair, views in zip(pairs, masks, strict=True) if (views.sum(dim=(1, 2, 3)) == 0).any()]
    if blank:
        raise DataError(
            [
                f"{printable(pair.path)}: nothing counts of the part of it that is seen, by its mask {printable(pair.mask or pair.path)}"
                for pair in blank
            ],
            hint="with data.aspect: buckets more of it is seen, and with mask.outside above 0 all of it counts a little; or take these pictures away",
        )
