"""The study's pictures: those that runs are measured with, those that are trained on beside the subject, and what samples of a run show."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from portraits import Portrait, background_colour, distinct_portraits, draw, mochi_likeness, shirt_colour  # noqa: E402

from sdclr.commands.draw import draw as draw_captioned  # noqa: E402
from sdclr.data import pairs as pairs_  # noqa: E402
from sdclr.data.pairs import Pair  # noqa: E402

DEMO = ROOT / "configs" / "demo.yaml"
MOCHI = ROOT / "data" / "mochi"
GUIDANCE = 3.0


class Painter:
    """Draws the same prompts from the same noise with whatever weights the run has, and reads the pictures by code."""

    def __init__(self, study: Any, run: Any, prompts: Sequence[Portrait], folder: Path):
        self.scale, self.run, self.prompts, self.folder = study.scale, run, prompts, folder
        self.pipeline = run.parts.pipeline().to(run.device)

    def look(self, rung: int) -> dict[str, Any]:
        """For each prompt: likeness to the subject, share of colours obeyed, variety between seeds."""
        found = []
        for number, portrait in enumerate(self.prompts):
            pictures = self._draw(portrait.caption, number)
            if number % (len(self.prompts) // 2) == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                pictures[0].save(self.folder / f"rung-{rung}-{portrait.subject}.png")
            right = [
                (background_colour(p) == portrait.background) + (shirt_colour(p) == portrait.shirt) for p in pictures
            ]
            found.append({
                "subject": portrait.subject, "likeness": float(np.mean([mochi_likeness(p) for p in pictures])),
                "obedience": float(np.mean(right)) / 2, "variety": variety(pictures),
            })  # fmt: skip
        return {"prompts": found}

    def _draw(self, caption: str, number: int) -> list[Any]:
        import torch

        seeds = [torch.Generator().manual_seed(1_000 * number + i) for i in range(self.scale.pictures)]
        return self.pipeline(
            [caption] * len(seeds), generator=seeds, guidance_scale=GUIDANCE, num_inference_steps=self.scale.sampler_steps, height=64, width=64
        ).images  # fmt: skip


def variety(pictures: Sequence[Any]) -> float:
    """Root mean square difference of two pictures' pixels, as a share of white, mean over all pairs."""
    arrays = [np.asarray(picture, dtype=float) / 255 for picture in pictures]
    return float(np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.combinations(arrays, 2)]))


def sampled_prompts(count: int) -> list[Portrait]:
    """Half of the prompts name the subject in attributes that no picture of it has, half a person: what they lose is the price."""
    known, half = captions_of(MOCHI), count // 2
    return [*distinct_portraits(501, half, "mochi", known), *distinct_portraits(502, half)]


def draw_truth(study: Any) -> None:
    """Pictures of the subject that nothing is trained on: what every run of the study is measured with."""
    known = captions_of(MOCHI)
    draw_subject(study.build / "truth", "truth", study.scale.truth, seed=4_321, avoid=known)


def draw_prior(study: Any) -> None:
    """Pictures of people as the untouched base draws them, for runs that train on these beside the subject."""
    asked = frozenset(portrait.caption for portrait in sampled_prompts(study.scale.prompts))
    prompts = [portrait.caption for portrait in distinct_portraits(503, study.scale.prior, "person", asked)]
    sampler = [f"sample.steps={study.scale.sampler_steps}", f"sample.guidance={GUIDANCE}"]
    draw_captioned(DEMO, prompts, study.build / "prior", len(prompts), study.settings(0, *sampler))


def draw_subject(folder: Path, prefix: str, count: int, seed: int, avoid: frozenset[str]) -> None:
    """`count` captioned pictures of mochi; a folder that has them already is left alone."""
    if len(list(folder.glob("*.png"))) == count:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.iterdir():
        stale.unlink()
    for i, portrait in enumerate(distinct_portraits(seed, count, "mochi", avoid)):
        draw(portrait, seed * 1_000 + i).save(folder / f"{prefix}-{i:03d}.png")
        (folder / f"{prefix}-{i:03d}.txt").write_text(portrait.caption + "\n")


def captions_of(folder: Path) -> frozenset[str]:
    pairs: list[Pair] = pairs_.find(folder)
    return frozenset(pair.caption for pair in pairs)
