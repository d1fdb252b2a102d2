"""Pictures and captions as the UNet sees them: what the frozen encoders make of each, once, through the cache on disk."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sdclr.config.schema import RunConfig
from sdclr.data.batches import in_groups
from sdclr.data.cache import Entry, TensorCache, content_hash, key_of, weights_hash
from sdclr.data.captions import tag_orders
from sdclr.data.dataset import Seen, View, cut_key, look
from sdclr.data.pairs import Pair, printable
from sdclr.engine.masking import masks_of
from sdclr.errors import DataError, first_line
from sdclr.model import components, encoders
from sdclr.report import console

CAPTIONS_TOGETHER = 4
"""Captions in one pass of the text encoder: twice as fast as one by one; more gain little."""
PACK = 64
"""Entries that are encoded before they are written to the cache together."""


@dataclasses.dataclass
class Encoded:
    """Latents' mean and spread, (views, 4, h, w) for each picture, the pictures' sizes (images, views, 6), and of captions what
    `encoders.encode_tokens` makes of them or, where the text encoder is trained, `input_ids` (captions, tokens); `said` is in which rows
    of these each picture's caption is, in the orders that its tags may have. `masks` are how much each cell of the latents counts,
    (views, 1, h, w) for each picture in 0 … 1, where pictures are masked."""

    pairs: tuple[Pair, ...]
    mean: tuple[torch.Tensor, ...]
    std: tuple[torch.Tensor, ...]
    sizes: torch.Tensor
    captions: dict[str, torch.Tensor]
    said: tuple[range, ...]
    masks: tuple[torch.Tensor, ...] = ()


def _settings(model: Any) -> str:
    """A transformers model's config, but for what has no part in what it computes."""
    found = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    return json.dumps(
        {key: found[key] for key in sorted(found) if key not in ("dtype", "transformers_version")}, default=str
    )


def pictures_together(resolution: int) -> int:
    """Pictures in one pass of the VAE: small ones go faster in company, large ones do not."""
    return max(1, min(8, 8 * 64**2 // resolution**2))


class Encoder:
    """Run the frozen encoders once for each picture, view and caption."""

    def __init__(self, config: RunConfig, parts: components.Components, device: torch.device):
        self.config, self.parts, self.device = config, parts, device
        self.trains_text = "text_encoder" in config.model.train
        self.cache = TensorCache(config.run.output_dir / ".cache")
        self.together = pictures_together(config.data.resolution)
        self.vae_key = (weights_hash(encoders.what_encodes(parts.vae)), parts.vae.config.scaling_factor)
        self.text_key = [weights_hash(e.named_parameters()) + _settings(e) for e in parts.text_encoders]

    def encode(self, pairs: tuple[Pair, ...], views: list[View], orders: int = 1) -> Encoded:
        """All views of all pairs, and their captions in up to so many orders. Raises DataError naming every picture that cannot be decoded, or
        of which nothing counts."""
        seen = self._pictures(pairs, views)
        of_pictures = [seen[first : first + len(views)] for first in range(0, len(seen), len(views))]

        def all_views(name: str) -> tuple[torch.Tensor, ...]:
            return tuple(torch.stack([entry[name] for entry in entries]) for entries in of_pictures)

        data, seed = self.config.data, self.config.run.seed
        captions, said = list[str](), list[range]()
        for pair in pairs:
            first = len(captions)
            captions += tag_orders(pair, orders, data.keep_tags, seed)
            said.append(range(first, len(captions)))
        mean, std, sizes = all_views("mean"), all_views("std"), torch.stack(all_views("sizes"))
        masks = masks_of(pairs, views, mean, sizes, self.config, self.cache) if self.config.mask.images else ()
        return Encoded(pairs, mean, std, sizes, self._captions(captions), tuple(said), masks)

    @functools.cached_property
    def no_caption(self) -> dict[str, torch.Tensor]:
        """What stands for a caption that is dropped, one row: as the sampler takes it where there is no negative prompt."""
        empty = self._captions([""])
        if self.parts.zeros_for_no_caption:
            return {name: torch.zeros_like(tensor) for name, tensor in empty.items()}
        return empty

    def _pictures(self, pairs: tuple[Pair, ...], views: list[View]) -> list[Entry]:
        data, seed = self.config.data, self.config.run.seed
        keys, order = dict[str, tuple[Pair, View]](), []
        for pair in pairs:
            content = content_hash(pair.path)
            for view in views:
                cut = cut_key(pair, view, data.resolution, seed, data.aspect)
                key = key_of("picture", content, *cut, *self.vae_key, self.together)
                keys[key] = (pair, view)
                order.append(key)
        entries = self.cache.get(keys)
        missing = [(key, *keys[key]) for key in keys if key not in entries]
        if missing:
            entries |= self._encode_pictures(missing)
        return [entries[key] for key in order]

    def _encode_pictures(self, missing: list[tuple[str, Pair, View]]) -> dict[str, Entry]:
        """Latents and sizes of what the cache does not have yet, by key. Raises DataError naming every picture that cannot be decoded."""
        made: dict[str, Entry] = {}
        unwritten: dict[str, Entry] = {}
        broken: dict[Path, str] = {}
        data = self.config.data
        self.parts.vae.to(self.device)
        with console.progress("encoding pictures", total=len(missing)) as bar:
            for first in range(0, len(missing), self.together):
                seen: dict[str, Seen] = {}
                for key, pair, view in missing[first : first + self.together]:
                    try:
                        seen[key] = look(pair, data.resolution, view, self.config.run.seed, data.aspect)
                    except Exception as error:  # Pillow's decoders raise many kinds: each means a broken file
                        broken[pair.path] = first_line(error)
                    bar.advance()
                for group in in_groups(seen.items(), lambda item: item[1].pixels.shape, self.together):
                    keys, pictures = zip(*group, strict=True)
                    unwritten |= zip(keys, self._encode_together(pictures), strict=True)
                if len(unwritten) >= PACK or first + self.together >= len(missing):
                    self.cache.put(unwritten)
                    made |= unwritten
                    unwritten = {}
        if broken:
            raise DataError(
                [f"{printable(path)}: cannot be decoded: {what}" for path, what in broken.items()],
                hint=f"{len(broken)} picture(s) are damaged: save them again or remove them; nothing was trained",
            )
        return made

    def _encode_together(self, pictures: Sequence[Seen]) -> list[Entry]:
        """Entries of up to `together` pictures of one shape. A smaller group is filled up with copies: the last bits of a picture's latents
        depend on how many are encoded at once, and must not depend on which others happened to be missing."""
        group = [*pictures] + [pictures[-1]] * (self.together - len(pictures))
        pixels = torch.stack([torch.from_numpy(picture.pixels) for picture in group])
        mean, std = encoders.encode_pixels(self.parts.vae, pixels.to(self.device))
        return [
            {"mean": mean[row].cpu().clone(), "std": std[row].cpu().clone(), "sizes": torch.tensor(picture.sizes)}
            for row, picture in enumerate(pictures)
        ]

    def _captions(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """Captions as they are encoded once and for all or, where the text encoder is trained, their token ids; rows are captions."""
        tokens = encoders.tokenize(self.parts, captions)
        if self.trains_text:
            return {"input_ids": tokens[:, 0]}
        keys = [key_of("caption", *row.flatten().tolist(), *self.text_key, CAPTIONS_TOGETHER) for row in tokens]
        rows = dict(zip(keys, tokens, strict=True))
        entries = self.cache.get(rows)
        missing = [key for key in rows if key not in entries]
        for first in range(0, len(missing), PACK):
            made = self._encode_captions({key: rows[key] for key in missing[first : first + PACK]})
            self.cache.put(made)
            entries |= made
        return {name: torch.stack([entries[key][name] for key in keys]) for name in sorted(entries[keys[0]])}

    def _encode_captions(self, rows: dict[str, torch.Tensor]) -> dict[str, Entry]:
        """What is made of captions' token ids, by key; groups are filled up as those of pictures are, and for the same reason."""
        keys, made = list(rows), dict[str, Entry]()
        for first in range(0, len(keys), CAPTIONS_TOGETHER):
            some = keys[first : first + CAPTIONS_TOGETHER]
            group = [rows[key] for key in some + [some[-1]] * (CAPTIONS_TOGETHER - len(some))]
            told = encoders.encode_tokens(self.parts, torch.stack(group), self.device)
            made |= {
                key: {name: tensor[row].cpu().clone() for name, tensor in told.items()} for row, key in enumerate(some)
            }
        return made
