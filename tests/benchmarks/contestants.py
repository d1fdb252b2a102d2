"""One contestant of the throughput measurement, in a process of its own: `floor`, `sdclr` or a variant of it, `script`, or `validation`.

Speaks lines of JSON: says when it is ready, then for every number N on stdin trains N steps and says how long they took; at `end`
it says how much memory it had at most.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

Turns = Callable[[], Iterator[int]]
FOREVER = {"cpu": 100_000, "cuda": 2_000}
"""Steps of a run that the driver ends; on a GPU, where it is a matter of minutes, few enough that `compile: auto` does not compile."""

VARIANTS = {
    "sdclr": (),
    "compiled": ("model.compile=on",),
    "one-by-one": ("model.compile=off",),
    "xformers": ("model.attention=xformers",),
    "lora": ("lora.rank=16",),
}
"""Ways of setting sdclr, as overrides of its config."""


def resident(field: str = "VmRSS") -> int:
    """Bytes of memory that this process holds (VmHWM: held at most). Not ru_maxrss, which remembers the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def say(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def synchronized(device: str) -> float:
    """Now, when the device has done all that was asked of it."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def orders() -> Iterator[int]:
    """The driver's numbers, until it says `end`."""
    for line in sys.stdin:
        if line.strip() == "end":
            return
        yield int(line)


def take_turns(step: Callable[[], None], device: str) -> None:
    """Train as many steps as the driver asks for, time and again."""
    say(ready=True)
    for count in orders():
        started = synchronized(device)
        for _ in range(count):
            step()
        say(seconds=synchronized(device) - started)


# (a) The bare floor: what any loop must do ------------------------------------------------------------------------------------


def floor(args: argparse.Namespace) -> None:
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler, UNet2DConditionModel

    say(imported=resident())
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(args.model, subfolder="unet", torch_dtype=torch.float32, low_cpu_mem_usage=False).to(args.device)  # fmt: skip
    noise_scheduler = DDPMScheduler.from_pretrained(args.model, subfolder="scheduler")
    side, width = args.resolution // args.vae_factor, unet.config.cross_attention_dim
    text = json.loads((args.model / "text_encoder" / "config.json").read_text())
    latents = torch.randn(16, 4, side, side, device=args.device)
    contexts = torch.randn(16, text["max_position_embeddings"], width, device=args.device)
    pooled, sizes = kept_for_xl(args.model, args.resolution, 16, args.device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, weight_decay=1e-2, fused=True)
    unet.eval()

    def step() -> None:
        index = torch.randint(16, (args.batch,), device=args.device)
        clean, context = latents[index], contexts[index]
        added = {"text_embeds": pooled[index], "time_ids": sizes[index]} if pooled is not None else None
        noise, t = torch.randn_like(clean), torch.randint(1000, (args.batch,), device=args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            noisy = noise_scheduler.add_noise(clean, noise, t)
            prediction = unet(noisy, t, context, added_cond_kwargs=added, return_dict=False)[0]
        F.mse_loss(prediction.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    take_turns(step, args.device)


def kept_for_xl(model: Path, resolution: int, count: int, device: str) -> tuple[Any, Any]:
    """What SDXL is told of `count` pictures besides their captions: summaries of these, and sizes; twice None where it is no SDXL."""
    import torch

    config = model / "text_encoder_2" / "config.json"
    if not config.is_file():
        return None, None
    pooled = torch.randn(count, json.loads(config.read_text())["projection_dim"], device=device)
    return pooled, torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]] * count, device=device)


# (b) sdclr: `sdclr train` itself, held at the end of each round ---------------------------------------------------------------


def write_config(args: argparse.Namespace) -> Path:
    path = args.work / "run.yaml"
    path.write_text(
        f"run: {{name: bench-{args.batch}, output_dir: '{args.work / 'runs'}'}}\n"
        f"model: {{base: '{args.model}'}}\n"
        f"data: {{images: '{args.images}', resolution: {args.resolution}, flip: true}}\n"
        f"validation: {{fraction: 0.2, every: {FOREVER[args.device]}, timesteps_per_image: {args.draws}}}\n"
        f"batch: {{size: {args.batch}}}\ncheckpoint: {{best: false}}\n"
        f"schedule: {{policy: constant, max_lr: 1e-6}}\ntrain: {{steps: {FOREVER[args.device]}}}\n"
    )
    return path


def sdclr(args: argparse.Namespace) -> None:
    from sdclr.cli import set_environment

    set_environment()
    from sdclr.commands import train
    from sdclr.engine import run  # noqa: F401 (all that a run imports, so that it counts as such)
    from sdclr.report import console

    say(imported=resident())

    class Ended(Exception):
        pass

    class Turnstile(console.Bar):
        """The run's own progress bar, which also counts a round's steps and then waits for the driver."""

        def __init__(self, inner: console.Bar):
            super().__init__(inner.bar, inner.task)
            say(ready=True)
            self.orders = orders()
            self.next_round()

        def next_round(self) -> None:
            self.left = next(self.orders, 0)
            if not self.left:
                raise Ended
            self.started = synchronized(args.device)

        def advance(self, numbers: str = "", steps: int = 1) -> None:
            super().advance(numbers, steps)
            self.left -= steps
            if not self.left:
                say(seconds=synchronized(args.device) - self.started)
                self.next_round()

    real = console.progress

    @contextlib.contextmanager
    def progress(what: str, total: int | None, done: int = 0) -> Iterator[console.Bar]:
        with real(what, total, done) as bar:
            yield Turnstile(bar) if what == "training" else bar

    console.progress = progress
    with contextlib.suppress(Ended):
        train.train(write_config(args), args.set)


# (c) diffusers' train_text_to_image.py, or train_text_to_image_sdxl.py, step by step (defaults but for the batch; EMA off, no tracker) --


def script(args: argparse.Namespace) -> None:
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from tqdm.auto import tqdm

    with contextlib.suppress(ImportError):  # the extra `bench` has it; the script does not start without it
        import datasets  # noqa: F401

    encodes = not (args.model / "text_encoder_2").is_dir()
    if encodes:
        from diffusers import AutoencoderKL  # noqa: F401
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    say(imported=resident())
    accelerator = Accelerator(mixed_precision="bf16" if args.device == "cuda" else "no", cpu=args.device == "cpu")
    noise_scheduler = DDPMScheduler.from_pretrained(args.model, subfolder="scheduler")
    inputs = encoded_each_step(args, accelerator) if encodes else encoded_beforehand(args, accelerator)
    unet = UNet2DConditionModel.from_pretrained(args.model, subfolder="unet", torch_dtype=torch.float32)
    unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    lr_scheduler = get_scheduler(
        "constant", optimizer=optimizer, num_warmup_steps=0, num_training_steps=FOREVER[args.device]
    )
    unet, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    bar = tqdm(range(FOREVER[args.device]), disable=not accelerator.is_local_main_process)

    def step() -> None:
        train_loss = 0.0
        with accelerator.accumulate(unet):
            latents, told = next(inputs)
            noise = torch.randn_like(latents)
            bsz = latents.shape[0]
            timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (bsz,), device=latents.device).long()  # fmt: skip
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
            prediction = unet(noisy_latents, timesteps, return_dict=False, **told)[0]
            loss = F.mse_loss(prediction.float(), noise.float(), reduction="mean")
            avg_loss = accelerator.gather(loss.repeat(args.batch)).mean()
            train_loss += avg_loss.item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            bar.update(1)
            accelerator.log({"train_loss": train_loss}, step=bar.n)
        bar.set_postfix(step_loss=loss.detach().item(), lr=lr_scheduler.get_last_lr()[0])

    take_turns(step, args.device)


def encoded_each_step(args: argparse.Namespace, accelerator: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Latents and what the UNet is told, as train_text_to_image.py makes them anew in every step, without end."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(args.model, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(args.model, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(args.model, subfolder="vae")
    vae.requires_grad_(False)
    text_encoder.requires_grad_(False)
    paths = sorted(Path(args.images).glob("*.png"))[:16]
    captions = [path.with_suffix(".txt").read_text().strip() for path in paths]

    def look(path: Path) -> torch.Tensor:
        """torchvision's Resize (bilinear, shorter side), CenterCrop, RandomHorizontalFlip, ToTensor, Normalize."""
        image = Image.open(path).convert("RGB")
        scale = args.resolution / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
        left, top = ((side - args.resolution) // 2 for side in image.size)
        image = image.crop((left, top, left + args.resolution, top + args.resolution))
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return pixels.sub_(0.5).div_(0.5)

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
            words = tokenizer(
                [captions[i] for i in indices], max_length=tokenizer.model_max_length, padding="max_length",
                truncation=True, return_tensors="pt",
            )  # fmt: skip
            return [{"pixel_values": look(paths[i]), "input_ids": w} for i, w in zip(indices, words.input_ids)]

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return self.__getitems__([index])[0]

    def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        pixel_values = torch.stack([e["pixel_values"] for e in examples])
        pixel_values = pixel_values.to(memory_format=torch.contiguous_format).float()
        return {"pixel_values": pixel_values, "input_ids": torch.stack([e["input_ids"] for e in examples])}

    loader = torch.utils.data.DataLoader(Pictures(), shuffle=True, collate_fn=collate, batch_size=args.batch)
    loader = accelerator.prepare(loader)
    weight_dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    text_encoder.to(accelerator.device, dtype=weight_dtype)
    vae.to(accelerator.device, dtype=weight_dtype)

    def endless() -> Iterator[tuple[Any, dict[str, Any]]]:
        while True:
            for batch in loader:
                latents = vae.encode(batch["pixel_values"].to(weight_dtype)).latent_dist.sample()
                hidden = text_encoder(batch["input_ids"], return_dict=False)[0]
                yield latents * vae.config.scaling_factor, {"encoder_hidden_states": hidden}

    return endless()


def encoded_beforehand(args: argparse.Namespace, accelerator: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The same as train_text_to_image_sdxl.py has encoded it before the first step, without end."""
    import torch

    side, count = args.resolution // args.vae_factor, 16
    width = json.loads((args.model / "unet" / "config.json").read_text())["cross_attention_dim"]
    pooled, _ = kept_for_xl(args.model, args.resolution, count, "cpu")
    kept = [
        {"model_input": torch.randn(4, side, side), "prompt_embeds": torch.randn(77, width), "pooled_prompt_embeds": pooled[i]}
        for i in range(count)
    ]  # fmt: skip
    loader = torch.utils.data.DataLoader(kept, shuffle=True, batch_size=args.batch)  # type: ignore[arg-type]
    loader = accelerator.prepare(loader)
    weight_dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    whole = [args.resolution, args.resolution, 0, 0, args.resolution, args.resolution]

    def endless() -> Iterator[tuple[Any, dict[str, Any]]]:
        while True:
            for batch in loader:
                sizes = [torch.tensor([whole]).to(accelerator.device, dtype=weight_dtype) for _ in batch["model_input"]]
                added = {"time_ids": torch.cat(sizes), "text_embeds": batch["pooled_prompt_embeds"]}
                told = {"encoder_hidden_states": batch["prompt_embeds"], "added_cond_kwargs": added}
                yield batch["model_input"], told

    return endless()


# The validation pass: batched as sdclr does it, and one draw at a time ----------------------------------------------------------


def validation(args: argparse.Namespace) -> None:
    from sdclr.config import source
    from sdclr.engine.plan import read_inputs
    from sdclr.engine.run import Run

    say(imported=resident())
    loaded = source.load(write_config(args), args.set)
    run = Run(loaded.config, read_inputs(loaded))
    assert run.held_out is not None
    draws, batched = run.draws(run.held_out), run.validation_batch

    def seconds_a_forward(batch: int) -> float:
        Run.validation_batch = batch  # type: ignore[assignment, method-assign]
        started = synchronized(args.device)
        run.losses(run.held_out, draws)
        return (synchronized(args.device) - started) / len(draws)

    say(ready=True, batch=batched, draws=len(draws))
    for _ in orders():
        say(batched=seconds_a_forward(batched), unbatched=seconds_a_forward(1))


def main() -> None:
    """Be the contestant that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["floor", *VARIANTS, "script", "validation"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--vae-factor", type=int, required=True)
    parser.add_argument("--draws", type=int, default=16, help="sdclr's validation draws of an image")
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--set", action="append", default=[], help="an override of sdclr's config")
    args = parser.parse_args()
    args.set += VARIANTS.get(args.kind, ())
    args.work.mkdir(parents=True, exist_ok=True)
    {"floor": floor, "script": script, "validation": validation}.get(args.kind, sdclr)(args)
    device_peak = None
    if args.device == "cuda":
        import torch

        # What no other program can have; a CUDA graph's memory is not "allocated".
        device_peak = torch.cuda.max_memory_reserved()
    say(peak=resident("VmHWM"), device_peak=device_peak, allocator=os.environ.get("PYTORCH_ALLOC_CONF", ""))


if __name__ == "__main__":
    main()
