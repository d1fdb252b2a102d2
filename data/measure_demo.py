"""Measure the embedded default: does `tiny-sd/` reconstruct what it sees and draw what its prompt says?

    python data/measure_demo.py         # a few minutes on two CPU cores

Prints the VAE's PSNR on fresh pictures, and for held-out captions the share of samples whose background and shirt have the
colour that was asked for, with 95 % Wilson intervals.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from make_demo import HERE, SEED, held_out_portraits, made_up_names, to_tensor
from PIL import Image
from portraits import background_colour, draw, shirt_colour
from rich.progress import track


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "tiny-sd"))
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", help="write the first 24 samples as one picture")
    args = parser.parse_args()

    pipeline = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    portraits = held_out_portraits()[: args.captions]
    print(f"VAE: PSNR {psnr(pipeline.vae, portraits):.1f} dB on {len(portraits)} fresh pictures")
    names = made_up_names(SEED + 1, len(portraits))
    called = [dataclasses.replace(p, subject=name) for p, name in zip(portraits, names, strict=True)]
    for what, shown in (("held-out captions", portraits), ("the same with a made-up name for the person", called)):
        pictures = sample(pipeline, [p.caption for p in shown], args.guidance, args.steps)
        print(f"{what}:")
        for name, read, wanted in (
            ("background", background_colour, [p.background for p in portraits]),
            ("shirt", shirt_colour, [p.shirt for p in portraits]),
        ):
            right = sum(read(picture) == colour for picture, colour in zip(pictures, wanted, strict=True))
            low, high = wilson(right, len(pictures))
            print(
                f"  {name} colour right in {right}/{len(pictures)} = {right / len(pictures):.1%} ({low:.1%} to {high:.1%})"
            )
        if args.save and shown is portraits:
            sheet(pictures[:24]).save(args.save)


@torch.no_grad()
def psnr(vae, portraits) -> float:
    """Peak signal-to-noise ratio in dB of decode(mean of encode) over all pixels, in the range −1…1 (peak 2)."""
    fresh = torch.stack([to_tensor(draw(p, 5_000_011 + i)) for i, p in enumerate(portraits)])
    errors = []
    for batch in fresh.split(32):
        decoded = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
        errors.append(((decoded - batch) ** 2).mean(dim=(1, 2, 3)))
    return 10 * float(torch.log10(4 / torch.cat(errors).mean()))


def sample(pipeline, captions: list[str], guidance: float, steps: int) -> list[Image.Image]:
    """One picture a caption, each from its own seed."""
    pictures: list[Image.Image] = []
    for first in track(range(0, len(captions), 20), "sampling"):
        part = captions[first : first + 20]
        seeds = [torch.Generator().manual_seed(SEED * 7919 + first + i) for i in range(len(part))]
        pictures += pipeline(
            part, guidance_scale=guidance, num_inference_steps=steps, generator=seeds, height=64, width=64
        ).images
    return pictures


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    p, n = right / total, total
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def sheet(pictures: list[Image.Image], columns: int = 8, scale: int = 2) -> Image.Image:
    """Pictures in rows of eight."""
    side = pictures[0].width * scale
    canvas = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side))
    for i, picture in enumerate(pictures):
        canvas.paste(picture.resize((side, side), Image.Resampling.NEAREST), (i % columns * side, i // columns * side))
    return canvas


if __name__ == "__main__":
    main()
