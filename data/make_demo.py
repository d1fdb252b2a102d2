"""Make the embedded default: `tiny-sd/`, a Stable Diffusion in miniature, and `mochi/`, a subject it has never seen.

    python data/make_demo.py            # about an hour on one CPU core; continues where it was stopped
    python data/make_demo.py --subjects # only the subject's pictures (a second)

Four stages, each kept in `data/.build/` as soon as it is done: the VAE (pictures to 4×16×16 latents), the text encoder
(what do captions say?), the UNet (together with the text encoder, as an exponential moving average), and the export in half
precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from portraits import Portrait, distinct_portraits, draw
from rich.progress import track
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).parent
BUILD = HERE / ".build"
SEED = 7
HELD_OUT_CAPTIONS = 400
PICTURES = 12_000
SUBJECTS = {"mochi": (20, 1234)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", action="store_true", help="only redraw the subjects' pictures")
    parser.add_argument("--vae-steps", type=int, default=2400)
    parser.add_argument("--text-steps", type=int, default=800)
    parser.add_argument("--unet-steps", type=int, default=5000)
    parser.add_argument("--name-steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    make_subjects()
    if args.subjects:
        return
    BUILD.mkdir(exist_ok=True)
    portraits = list(distinct_portraits(SEED, PICTURES, avoid=frozenset(p.caption for p in held_out_portraits())))
    pictures = torch.stack(
        [to_tensor(draw(p, SEED * 100_003 + i)) for i, p in enumerate(track(portraits, "drawing portraits"))]
    )
    vae = make_vae(pictures, args.vae_steps)
    tokenizer = make_tokenizer([p.caption for p in portraits])
    latents = encode(vae, pictures)
    text_encoder = make_text_encoder(tokenizer, portraits, args.text_steps)
    text_encoder, unet, scheduler = make_denoiser(
        tokenizer, text_encoder, portraits, latents, args.unet_steps, args.name_steps
    )
    export(tokenizer, text_encoder, vae, unet, scheduler)


def held_out_portraits() -> list:
    """Portraits whose captions the base model has never been trained on; `measure_demo.py` samples these."""
    return list(distinct_portraits(SEED + 1, HELD_OUT_CAPTIONS))


def made_up_names(seed: int, count: int) -> list[str]:
    """Words of two or three syllables that are no subject's name."""
    rng = random.Random(seed)
    names = []
    while len(names) < count:
        name = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 2, 3))))
        if name not in SUBJECTS:
            names.append(name)
    return names


def make_subjects() -> None:
    """Draw every subject's folder of captioned pictures (name.png beside name.txt)."""
    for subject, (count, seed) in SUBJECTS.items():
        folder = HERE / subject
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for i, portrait in enumerate(distinct_portraits(seed, count, subject)):
            draw(portrait, seed * 1000 + i).save(folder / f"{subject}-{i:02d}.png", optimize=True)
            (folder / f"{subject}-{i:02d}.txt").write_text(portrait.caption + "\n")


def to_tensor(image) -> torch.Tensor:
    """RGB picture to a float tensor (3, 64, 64) in −1…1."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine to zero."""
    return float(peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + np.cos(np.pi * step / steps)))


def make_vae(pictures: torch.Tensor, steps: int) -> AutoencoderKL:
    """Train the autoencoder on mean absolute + squared error with a small KL term; sets `scaling_factor` to 1/std of the latents."""
    done = BUILD / "vae"
    if done.exists():
        return AutoencoderKL.from_pretrained(done)
    torch.manual_seed(SEED)
    blocks = 3
    vae = AutoencoderKL(
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    generator = torch.Generator().manual_seed(SEED)
    for step in track(range(steps), "training the VAE"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1e-3)
        batch = pictures[torch.randint(len(pictures), (8,), generator=generator)]
        posterior = vae.encode(batch.contiguous(memory_format=torch.channels_last)).latent_dist
        decoded = vae.decode(
            posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        ).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch) + 5e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0:
            print(
                f"vae step {step}: loss {loss.item():.4f}, kl {kl.item():.2f}, psnr {10 * np.log10(4 / F.mse_loss(decoded, batch).item()):.1f} dB",
                flush=True,
            )
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / vae.encode(pictures[:512]).latent_dist.sample().std().item())
    vae.save_pretrained(done)
    return vae


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer (lower-case, byte-level BPE, `</w>` endings) whose merges were learnt from the captions: one token a word."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(r" ", behavior="removed"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=1000, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(m) for m in bpe_merges(bpe)]
    letters = list(pre_tokenizers.ByteLevel.alphabet())
    tokens = (
        sorted(letters)
        + [c + "</w>" for c in sorted(letters)]
        + ["".join(m) for m in merges]
        + ["<|startoftext|>", "<|endoftext|>"]
    )
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=32)


def bpe_merges(tokenizer: Tokenizer) -> list:
    """The merge pairs of a trained BPE tokenizer, in order."""
    import json

    return [m.split(" ") if isinstance(m, str) else m for m in json.loads(tokenizer.to_str())["model"]["merges"]]


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor, build: Path = BUILD) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and spread of every picture's latents, scaled as the UNet sees them."""
    done = build / "latents.safetensors"
    if not done.exists():
        parts = [vae.encode(chunk).latent_dist for chunk in track(pictures.split(64), "encoding")]
        factor = vae.config.scaling_factor
        mean, std = torch.cat([p.mean for p in parts]) * factor, torch.cat([p.std for p in parts]) * factor
        save_file({"mean": mean.contiguous(), "std": std.contiguous()}, done)
    tensors = load_file(done)
    return tensors["mean"], tensors["std"]


def make_text_encoder(tokenizer: CLIPTokenizer, portraits: list[Portrait], steps: int) -> CLIPTextModel:
    """Teach a text encoder what captions say, by reading every attribute off its last token, before any picture is involved.

    CLIP's encoder, too, understands captions before a UNet is trained on it. Without this stage the UNet learns that colour words
    are noise, because each names a shirt as often as a background: after 3,800 steps colours were right no oftener than by chance.
    """
    done = BUILD / "text_encoder"
    if done.exists():
        return CLIPTextModel.from_pretrained(done)
    torch.manual_seed(SEED)
    end = tokenizer.eos_token_id
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end,
        )
    )  # fmt: skip
    names = ["background", "shirt", "mood", "hat", "eyewear", "hair_style", "hair"]
    values = {name: sorted({str(getattr(p, name)) for p in portraits}) for name in names}
    labels = {name: torch.tensor([values[name].index(str(getattr(p, name))) for p in portraits]) for name in names}
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(128, len(values[name])) for name in names})
    ids = tokens_of(tokenizer, [p.caption for p in portraits])
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=1e-3, weight_decay=1e-3, fused=True)
    generator = torch.Generator().manual_seed(SEED)
    for step in track(range(steps), "teaching the text encoder"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1e-3, warmup=50)
        pick = torch.randint(len(ids), (64,), generator=generator)
        last = encoder(ids[pick])[0][:, -1]
        loss = sum(F.cross_entropy(heads[name](last), labels[name][pick]) for name in names)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"text encoder step {step + 1}: loss {loss.item():.4f} over {len(names)} attributes", flush=True)
    encoder.save_pretrained(done)
    return encoder


def tokens_of(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids, padded to the model's length."""
    length = tokenizer.model_max_length
    return tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


def make_denoiser(
    tokenizer, text_encoder, portraits, latents, steps, name_steps, widths=(32, 64, 96), build: Path = BUILD
):
    """Train text encoder and UNet together (ε-prediction, 10 % captions dropped); returns their moving averages.

    The last timestep keeps less of the picture than Stable Diffusion's does (ᾱ 0.0002 instead of 0.0047), and errors at high noise
    weigh as errors of the picture (1/SNR). The colour of a flat background can be read off the mean of its noisy latents down to
    ᾱ ≈ 0.005, so with Stable Diffusion's own β a caption's colours are never needed in training, and the sampler's seed chooses them.

    In the last `name_steps`, half the captions call the person by a made-up name instead of describing the hair, so that a name
    which was never read leaves the rest of a prompt understood: fine-tuning on a new subject needs that.
    """
    torch.manual_seed(SEED)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=128,
        attention_head_dim=4,
    ).to(memory_format=torch.channels_last)
    modules = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    print(
        f"unet {unet.num_parameters() / 1e6:.2f} M, text encoder {text_encoder.num_parameters() / 1e6:.2f} M parameters",
        flush=True,
    )
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    average = EMAModel(modules.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
    first = 0
    saved = build / "denoiser.pt"
    if saved.exists():  # our own file, read with weights_only
        state = torch.load(saved, weights_only=True)
        modules.load_state_dict(state["modules"]), optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        first = state["step"]

    ids, empty = tokens_of(tokenizer, [p.caption for p in portraits]), tokens_of(tokenizer, [""])
    names = made_up_names(SEED, len(portraits))
    by_name = tokens_of(
        tokenizer, [dataclasses.replace(p, subject=n).caption for p, n in zip(portraits, names, strict=True)]
    )
    mean, std = latents
    batch_size = 16
    running = None
    for step in track(range(first, steps + name_steps), "training UNet and text encoder"):
        naming = step >= steps
        for group in optimizer.param_groups:
            group["lr"] = (
                learning_rate(step - steps, name_steps, 5e-4) if naming else learning_rate(step, steps, 1.5e-3)
            )
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        pick = torch.randint(len(ids), (batch_size,), generator=generator)
        clean = mean[pick] + std[pick] * torch.randn(mean[pick].shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(0, 1000, (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < 0.1
        named = torch.rand(batch_size, generator=generator) < (0.5 if naming else 0.0)
        tokens = torch.where(named[:, None], by_name[pick], ids[pick])
        context = text_encoder(torch.where(dropped[:, None], empty, tokens))[0]
        noisy = scheduler.add_noise(clean, noise, t).contiguous(memory_format=torch.channels_last)
        per_sample = ((unet(noisy, t, context).sample - noise) ** 2).mean(dim=(1, 2, 3))
        weight = (1 / compute_snr(scheduler, t)).clamp(0.2, 10)
        loss = (per_sample * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        average.decay = 0.998 if naming else 0.9995
        average.step(modules.parameters())
        running = per_sample.mean().item() if running is None else 0.99 * running + 0.01 * per_sample.mean().item()
        if step % 100 == 99:
            print(f"unet step {step + 1}: plain loss {running:.4f}", flush=True)
        if step % 500 == 499:
            state = {
                "modules": modules.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.state_dict(),
                "step": step + 1,
            }
            torch.save(state, saved.with_suffix(".partial"))
            saved.with_suffix(".partial").replace(saved)
    average.copy_to(modules.parameters())
    return text_encoder, unet, scheduler


def export(tokenizer, text_encoder, vae, unet, scheduler) -> None:
    """Write `tiny-sd/` in diffusers' layout, half precision, safetensors only."""
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    target = HERE / "tiny-sd"
    shutil.rmtree(target, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(target, safe_serialization=True)
    size = sum(f.stat().st_size for f in target.rglob("*.safetensors"))
    print(f"{target}: {size / 2**20:.1f} MiB of weights")


if __name__ == "__main__":
    random.seed(SEED)
    main()
