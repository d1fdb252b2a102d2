"""How much each cell of a picture's latents counts, from its mask, through the cache on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import adaptive_avg_pool2d

from sdclr.config.schema import RunConfig
from sdclr.data.cache import Entry, TensorCache, content_hash, key_of
from sdclr.data.dataset import View, cut_key, look_at_mask
from sdclr.data.pairs import Pair, printable
from sdclr.errors import DataError, first_line
from sdclr.report import console


class Part(NamedTuple):
    """A view of a picture, the picture's width and height in pixels, and the view's height and width in cells of the latents."""

    pair: Pair
    view: View
    size: tuple[int, int]
    cells: tuple[int, int]


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
    wanted, keys = dict[str, Part](), list[list[str]]()
    for pair, own, each in zip(pairs, latents, sizes, strict=True):
        height, width = map(int, each[0, :2])
        parts = [Part(pair, view, (width, height), (own.shape[2], own.shape[3])) for view in views if pair.mask]
        keys.append([_key(part, config) for part in parts])
        wanted |= zip(keys[-1], parts, strict=True)
    entries = cache.get(wanted)
    missing = {key: part for key, part in wanted.items() if key not in entries}
    if missing:
        made = _read(missing, config)
        cache.put(made)
        entries |= made
    masks = tuple(
        torch.stack([entries[key]["mask"] for key in named]) if named else torch.ones_like(own[:, :1])
        for named, own in zip(keys, latents, strict=True)
    )
    if not config.mask.outside:
        _refuse_blank(pairs, masks)
    if wanted and all((mask == 1).all() for mask in masks):
        console.warn(f"mask.images masks nothing of these {len(pairs)} pictures: all of each counts")
    return masks


def _key(part: Part, config: RunConfig) -> str:
    pair, data = part.pair, config.data
    assert pair.mask is not None
    kind = "alpha" if pair.mask == pair.path else "mask"
    cut = cut_key(pair, part.view, data.resolution, config.run.seed, data.aspect)
    return key_of(kind, content_hash(pair.mask), *cut, *part.size, *part.cells)


def _read(missing: dict[str, Part], config: RunConfig) -> dict[str, Entry]:
    """What is not in the cache, by key."""
    made, broken = dict[str, Entry](), dict[Path | None, str]()
    data, seed = config.data, config.run.seed
    with console.progress("reading masks", total=len(missing)) as bar:
        for key, (pair, view, size, cells) in missing.items():
            try:
                pixels = torch.from_numpy(look_at_mask(pair, size, data.resolution, view, seed, data.aspect))
                made[key] = {"mask": adaptive_avg_pool2d(pixels[None], cells)}
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
