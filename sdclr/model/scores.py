"""Scores of drawn pictures by a CLIP model (Radford 2021): likeness to given pictures, obedience to the prompt, variety between seeds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import CLIPModel, CLIPProcessor

from sdclr.errors import InputError, first_line
from sdclr.model.checks import is_local
from sdclr.model.components import quiet_libraries

HINT = "--score takes a folder or a hub id of a transformers CLIP model with safetensors, such as openai/clip-vit-large-patch14"
BATCH = 32


@dataclasses.dataclass(frozen=True)
class Score:
    """Mean, spread (standard deviation) and number of the values it was made of; of no values all are None or 0."""

    mean: float | None
    sd: float | None
    count: int


class Judge:
    """One CLIP model; embeddings are of unit length, so that a product of two is their cosine."""

    def __init__(self, name: str, device: torch.device | None = None):
        local = is_local(name, "--score", HINT)
        try:
            with quiet_libraries():
                self.model = CLIPModel.from_pretrained(name, local_files_only=local, use_safetensors=True).eval()
                self.processor = CLIPProcessor.from_pretrained(name, local_files_only=local)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"--score {name}: cannot be loaded: {first_line(error)}", hint=HINT) from error
        self.device = device or torch.device("cpu")
        self.model.to(self.device)

    @torch.no_grad()
    def pictures(self, pictures: Iterable[Image.Image]) -> np.ndarray:
        """Embeddings of RGB pictures, (pictures, width); asks for a few at a time, so they need not all be in memory."""
        parts, left = [], iter(pictures)
        while batch := list(itertools.islice(left, BATCH)):
            pixels = self.processor.image_processor(images=batch, return_tensors="pt")["pixel_values"]
            seen = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
            parts.append(self.model.visual_projection(seen))
        return _unit(torch.cat(parts))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts, cut at the model's length, (texts, width)."""
        tokens = self.processor.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        read = self.model.text_model(**{k: tokens[k].to(self.device) for k in ("input_ids", "attention_mask")})
        return _unit(self.model.text_projection(read.pooler_output))


def scores(drawn: np.ndarray, prompt_of: Sequence[int], prompts: np.ndarray, training: np.ndarray) -> dict[str, Score]:
    """The three scores of some drawn pictures (pictures, width); `prompt_of[i]` is the row of `prompts` that picture i was drawn from.

    Likeness: a picture's mean cosine with all training pictures (DreamBooth's CLIP-I, Ruiz 2023, section 4.1). Obedience: its
    cosine with its prompt (CLIP-T). Variety: 1 − cosine of two pictures of one prompt, over all pairs of seeds.
    """
    index = np.asarray(prompt_of)
    pairs = [
        1 - float(drawn[i] @ drawn[j]) for i, j in itertools.combinations(range(len(drawn)), 2) if index[i] == index[j]
    ]
    return {
        "likeness": _score((drawn @ training.T).mean(axis=1)),
        "obedience": _score((drawn * prompts[index]).sum(axis=1)),
        "variety": _score(np.array(pairs)),
    }


def _score(values: np.ndarray) -> Score:
    if not len(values):
        return Score(None, None, 0)
    return Score(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None, len(values))


def _unit(embeddings: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(embeddings.double(), dim=-1).cpu().numpy()
