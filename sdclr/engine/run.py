"""Everything a run needs, built from its config: device, model, cached latents and captions, losses, optimizers.

The only module that knows all the parts. Commands ask it for a fresh state, a loss, a validation; none of these depends on
another having been asked before.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from sdclr.config.schema import RunConfig
from sdclr.data.batches import Sample
from sdclr.data.cache import Entry, TensorCache, content_hash, key_of, weights_hash
from sdclr.data.dataset import View, pixels, views
from sdclr.data.pairs import Pair, printable
from sdclr.engine import graph, optimizers, sharding
from sdclr.engine.graph import Graph
from sdclr.engine.loop import AddGradients, TrainState, gradients_of
from sdclr.engine.optimizers import InBackward
from sdclr.engine.plan import Inputs
from sdclr.engine.processes import Processes
from sdclr.engine.validation import Draws, evaluate, fixed_draws
from sdclr.errors import DataError, InputError
from sdclr.model import components
from sdclr.model.objective import min_snr_weights, offset_noise, predict, squared_error
from sdclr.report import console
from sdclr.seeding import generator

CAPTIONS_TOGETHER = 4
"""Captions in one pass of the text encoder: twice as fast as one by one; more gain little."""
EARNS_COMPILING = 20 * 60
"""Seconds that a run must take to be compiled: on an H200 compiling takes two minutes and saves a quarter of every step."""
PACK = 64
"""Entries that are encoded before they are written to the cache together."""


@dataclasses.dataclass
class Encoded:
    """Pictures and captions as the UNet sees them: latents' mean and spread (images, views, 4, h, w), token ids (images, tokens)
    and, where the text encoder is frozen, its hidden states (images, tokens, width)."""

    pairs: tuple[Pair, ...]
    mean: torch.Tensor
    std: torch.Tensor
    tokens: torch.Tensor
    context: torch.Tensor | None


class Prepared(NamedTuple):
    """A micro-batch as the loss takes it, on the device: latents and noise (batch, 4, h, w), timesteps (batch,), and the captions'
    hidden states (batch, tokens, width) or, where the text encoder is trained, their token ids (batch, tokens)."""

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    words: torch.Tensor


class Run:
    """One run's parts, ready to train; weights are the untouched base's until a state is trained.

    `modules` are what is trained, `wrapped` the same as several processes train them, `models` whose configs are written.
    """

    def __init__(
        self,
        config: RunConfig,
        inputs: Inputs,
        keep_base: bool = True,
    ):
        """Without `keep_base` no copy of the untouched weights is kept, and only one state can be had."""
        self.config, self.inputs = config, inputs
        self.accelerator = make_accelerator(config)
        self.device = self.accelerator.device
        self.processes = Processes(self.accelerator.process_index, self.accelerator.num_processes)
        optimizers.refuse_what_cannot_run(config.optimizer, self.accelerator.mixed_precision, self.processes.count)
        if config.model.compile == "on" and self.processes.count > 1:
            raise InputError("model.compile: on is for one process", hint="set model.compile: auto")
        assert (inputs.batches.rank, inputs.batches.processes) == (self.processes.rank, self.processes.count)
        self.parts = components.load(config.model)
        encoder = self._encoder = _Encoder(config, self.parts, self.device)
        self._encode()
        with self.accelerator.main_process_first():
            self.empty_context = None if encoder.trains_text else encoder.contexts([""])
        self.empty_tokens = components.tokenize(self.parts, [""])
        self.parts.vae.to("cpu")
        components.prepare_for_training(self.parts, config.model, self.device)
        self.modules = self.models = self.parts.trainable(config.model.train)
        if sharding.asked():
            self.models = {name: components.without_weights(module) for name, module in self.modules.items()}
            for module in self.modules.values():
                sharding.shard(module, self.device, self.accelerator.mixed_precision)
        self._base = {
            name: {k: v.detach().clone() for k, v in m.state_dict().items()}
            for name, m in self.modules.items()
            if keep_base
        }
        self._untouched = True
        self._first_scale = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
        self.wrapped = self.modules if sharding.asked() else self._prepared()
        if "text_encoder" not in self.modules:
            self.parts.text_encoder.to("cpu")
        self.denoiser: Callable[..., Any] = self.wrapped["unet"]
        self._in_backward: list[InBackward] = []  # of the newest state, on whichever split: all train the same weights
        self.add_gradients = self._gradients()

    def compile_for(self, steps: int = 0) -> None:
        """Before training: compile the UNet if that is asked for; with `compile: auto`, if it is trained as a recorded graph and so many
        steps, as they are timed now, take long enough to earn it."""
        asked = self.config.model.compile
        if asked == "auto" and steps and isinstance(self.add_gradients, Graph):
            count = self.config.batch.accumulate
            seconds = self.add_gradients.seconds(self.batches(0)[0], count) * count * steps
            if seconds > EARNS_COMPILING:
                console.say(f"{steps} steps would take {seconds / 60:.0f} minutes: the UNet is compiled first (model.compile: off forgoes it)")  # fmt: skip
                self._compile()
        elif asked == "on":
            self._compile()

    def _compile(self) -> None:
        """The UNet through torch.compile, for training; raises InputError where it cannot be and was asked for by name.

        Its weights then lie channels last, as convolutions want them on a GPU: a tenth of a compiled step. Not with 8-bit AdamW, which
        puts weights elsewhere that do not lie in the usual order.
        """
        eager, unet = self.denoiser, self.modules["unet"]
        if self.config.optimizer.name != "adamw8bit":
            unet.to(memory_format=torch.channels_last)
        self._denoise_with(torch.compile(functools.partial(type(unet).forward, unet), dynamic=False))
        problem = self._cannot_train()
        if problem is None:
            return
        what = f"torch.compile cannot compile the UNet here: {problem}"
        if self.config.model.compile == "on":
            raise InputError(f"model.compile: {what}", hint="set model.compile: auto")
        console.warn(f"{what}; it is trained as it is")
        unet.to(memory_format=torch.contiguous_format)
        self._denoise_with(eager)

    def _denoise_with(self, denoiser: Callable[..., Any]) -> None:
        self.denoiser, self.add_gradients = denoiser, self._gradients()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of what an earlier recording held

    def _cannot_train(self) -> str | None:
        """Try a micro-batch; what went wrong, if anything did: no C compiler, no triton, an operator that is not known."""
        try:
            self.add_gradients(self.batches(0)[0], self.config.batch.accumulate)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return components.first_line(error)
        finally:
            for module in self.modules.values():
                module.zero_grad(set_to_none=True)
        return None

    def _gradients(self) -> AddGradients:
        """How a micro-batch's gradients come about: kernel by kernel, or as a recorded graph."""
        plain = gradients_of(self.loss, self.accelerator, careful=self.config.optimizer.fused_backward)
        if not graph.wanted(self.config, self.device, self.accelerator.mixed_precision):
            return plain
        return Graph(plain, [p for module in self.modules.values() for p in module.parameters()])

    def _prepared(self) -> dict[str, torch.nn.Module]:
        prepared = self.accelerator.prepare(*self.modules.values())
        return dict(zip(self.modules, prepared if len(self.modules) > 1 else [prepared], strict=True))

    def on(self, inputs: Inputs) -> Run:
        """The same model and caches on another split, or another stream of samples; both runs share one set of weights."""
        other = copy.copy(self)
        other.inputs = inputs
        if inputs.split != self.inputs.split:
            other._encode()
            self.parts.vae.to("cpu")
            if "text_encoder" not in self.modules:
                self.parts.text_encoder.to("cpu")
        return other

    def _encode(self) -> None:
        data, held = self.config.data, self.inputs.split.validation
        with self.accelerator.main_process_first():  # the others find everything in the cache
            self.train = self._encoder.encode(self.inputs.split.train, views(data.crop, data.crops, data.flip))
            self.held_out = self._encoder.encode(held, [View()]) if held else None
            # Training pictures measured as the held-out ones are: the gap between the two curves is overfitting.
            self.stabilised = self._encoder.encode(self.inputs.split.train[: len(held)], [View()]) if held else None

    # Training ---------------------------------------------------------------------------------------------------------------

    def fresh_state(self) -> TrainState:
        """The untouched base weights and a new optimizer."""
        assert self._base or self._untouched, "a second state needs keep_base"
        if self.accelerator.scaler is not None:  # a scale that another state has found is not this one's
            self.accelerator.scaler.load_state_dict(self._first_scale)
        self._untouched = False
        for name, weights in self._base.items():
            self.modules[name].load_state_dict(weights)
        while self._in_backward:
            self._in_backward.pop().end()
        optimizer = self._new_optimizer()
        if self.config.optimizer.fused_backward:
            self._in_backward.append(InBackward(optimizer))
        return TrainState(self.wrapped, optimizer, in_backward=next(iter(self._in_backward), None))

    def batches(self, step: int) -> list[Prepared]:
        """A step's micro-batches, on their way to the device."""
        return [self.prepare(samples) for samples in self.inputs.batches(step)]

    def prepare(self, samples: Sequence[Sample]) -> Prepared:
        """Some samples as the loss takes them; every draw derives from the seed and the sample's position."""
        config, seed, shape = self.config, self.inputs.batches.seed, self.train.mean.shape[2:]
        steps = self.parts.noise_scheduler.config.num_train_timesteps
        index = torch.tensor([s.index for s in samples])
        view = torch.tensor([s.view for s in samples])
        generators = [generator(seed, "sample", s.position) for s in samples]
        timesteps = torch.cat([torch.randint(steps, (1,), generator=g) for g in generators])
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        spread = torch.stack([torch.randn(shape, generator=g) for g in generators])
        if config.loss.noise_offset:
            shift = torch.stack([torch.randn((shape[0], 1, 1), generator=g) for g in generators])
            noise = offset_noise(noise, shift, config.loss.noise_offset)
        latents = self.train.mean[index, view] + self.train.std[index, view] * spread
        dropped = torch.tensor([s.drop_caption for s in samples])
        return Prepared(*map(self._sent, (latents, noise, timesteps, self._words(self.train, index, dropped))))

    def loss(self, batch: Prepared) -> torch.Tensor:
        """Mean training loss of a micro-batch."""
        per_sample = self._denoise(self.denoiser, *batch[:3], self._context(batch.words))
        gamma = self.config.loss.min_snr_gamma
        if gamma:
            per_sample = per_sample * min_snr_weights(self.parts.noise_scheduler, batch.timesteps, gamma)
        return per_sample.mean()

    # Validation -------------------------------------------------------------------------------------------------------------

    def draws(self, encoded: Encoded, per_image: int | None = None) -> Draws:
        """The fixed draws of some encoded pictures."""
        keys = [pair.key for pair in encoded.pairs]
        total = self.parts.noise_scheduler.config.num_train_timesteps
        return fixed_draws(
            keys,
            per_image or self.config.validation.timesteps_per_image,
            encoded.mean.shape[2:],
            total,
            self.config.run.seed,
        )

    def losses(self, encoded: Encoded, draws: Draws) -> np.ndarray:
        """Plain mean squared error of every draw with the current weights, (images, K)."""

        def losses_of(images: list[int], timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            index = torch.tensor(images)
            words = self._words(encoded, index, torch.zeros(len(images), dtype=torch.bool))
            latents, noise, timesteps, words = map(self._sent, (encoded.mean[index, 0], noise, timesteps, words))
            return self._denoise(self.modules["unet"], latents, noise, timesteps, self._context(words))

        return evaluate(list(self.modules.values()), losses_of, draws, self.validation_batch, self.accelerator)

    @property
    def validation_batch(self) -> int:
        """Draws in one validation forward."""
        return validation_batch(self.inputs.batches.size)

    # Parts ------------------------------------------------------------------------------------------------------------------

    def _denoise(self, unet: Callable[..., Any], latents, noise, timesteps, context) -> torch.Tensor:
        with self.accelerator.autocast():
            prediction, target = predict(unet, self.parts.noise_scheduler, latents, noise, timesteps, context)
        return squared_error(prediction, target)

    def _words(self, encoded: Encoded, index: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        """What is known of captions before training: the frozen encoder's hidden states, or the tokens of one that is trained."""
        known, nothing = (
            (encoded.tokens, self.empty_tokens) if encoded.context is None else (encoded.context, self.empty_context)
        )
        assert nothing is not None
        return torch.where(dropped.view(-1, *[1] * (known.ndim - 1)), nothing, known[index])

    def _context(self, words: torch.Tensor) -> torch.Tensor:
        if "text_encoder" not in self.modules:
            return words
        text_encoder = self.wrapped["text_encoder"] if torch.is_grad_enabled() else self.modules["text_encoder"]
        with self.accelerator.autocast():
            return text_encoder(words)[0]

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device, without waiting for what it is at work on."""
        return (
            tensor.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else tensor.to(self.device)
        )

    def _new_optimizer(self) -> torch.optim.Optimizer:
        c = self.config.optimizer
        groups = [{"params": list(self.modules["unet"].parameters()), "lr_scale": 1.0}]
        if "text_encoder" in self.modules:
            groups.append({"params": list(self.modules["text_encoder"].parameters()), "lr_scale": c.text_encoder_scale})
        optimizer = optimizers.new(c, groups)
        self.accelerator._optimizers.clear()  # one optimizer at a time: an arm's must not be unscaled with the next one's
        return self.accelerator.prepare_optimizer(optimizer) if self.accelerator.scaler is not None else optimizer


def validation_batch(size: int) -> int:
    """Draws in one validation forward: the same at any number of processes, for sums depend on their company, and few, so that
    there are enough of them to share out."""
    return max(8, size)


def pictures_together(resolution: int) -> int:
    """Pictures in one pass of the VAE: small ones go faster in company, large ones do not."""
    return max(1, min(8, 8 * 64**2 // resolution**2))


def make_accelerator(config: RunConfig) -> Accelerator:
    """accelerate's device and processes, in the config's precision."""
    from accelerate.state import PartialState

    device = PartialState().device
    precision = components.mixed_precision(config.model.precision, device)
    if sharding.asked():
        sharding.refuse_other_ways(config.optimizer.name, precision)
        sharding.let_every_process_load()
    accelerator = Accelerator(mixed_precision=precision)
    kind = accelerator.distributed_type.name
    if kind != "NO" and not kind.startswith("MULTI_") and not sharding.asked():
        raise InputError(
            f"accelerate is set up for {kind}, and sdclr trains whole models side by side (data parallel) or in shares of several processes (FSDP 2)",
            hint="start it so: accelerate launch --multi_gpu --num_processes 2 -m sdclr ..., or with --use_fsdp --fsdp_version 2 instead of --multi_gpu",
        )
    return accelerator


class _Encoder:
    """Run the frozen encoders once for each picture, view and caption, through the cache on disk."""

    def __init__(self, config: RunConfig, parts: components.Components, device: torch.device):
        self.config, self.parts, self.device = config, parts, device
        self.trains_text = "text_encoder" in config.model.train
        self.cache = TensorCache(config.run.output_dir / ".cache")
        self.together = pictures_together(config.data.resolution)
        self.vae_key = (weights_hash(components.what_encodes(parts.vae)), parts.vae.config.scaling_factor)
        self.text_hash = weights_hash(parts.text_encoder.named_parameters())

    def encode(self, pairs: tuple[Pair, ...], seen: list[View]) -> Encoded:
        """All views of all pairs. Raises DataError naming every picture that cannot be decoded."""
        latents = self._latents(pairs, seen)
        shape = (len(pairs), len(seen), *latents[0]["mean"].shape)
        return Encoded(
            pairs=pairs,
            mean=torch.stack([entry["mean"] for entry in latents]).reshape(shape),
            std=torch.stack([entry["std"] for entry in latents]).reshape(shape),
            tokens=components.tokenize(self.parts, [pair.caption for pair in pairs]),
            context=None if self.trains_text else self.contexts([pair.caption for pair in pairs]),
        )

    def _latents(self, pairs: tuple[Pair, ...], seen: list[View]) -> list[Entry]:
        c = self.config
        keys: dict[str, tuple[Pair, View]] = {}
        order = []
        for pair in pairs:
            content = content_hash(pair.path)
            for view in seen:
                place = (c.run.seed, pair.key) if view.crop else ()
                key = key_of("latents", content, c.data.resolution, view.name, *place, *self.vae_key, self.together)
                keys[key] = (pair, view)
                order.append(key)
        entries = self.cache.get(keys)
        missing = [(key, *keys[key]) for key in keys if key not in entries]
        if missing:
            entries |= self._encode_missing(missing)
        return [entries[key] for key in order]

    def _encode_missing(self, missing: list[tuple[str, Pair, View]]) -> dict[str, Entry]:
        """Latents of what the cache does not have yet, by key. Raises DataError naming every picture that cannot be decoded."""
        made: dict[str, Entry] = {}
        unwritten: dict[str, Entry] = {}
        broken: dict[Path, str] = {}
        self.parts.vae.to(self.device)
        with console.progress("encoding pictures", total=len(missing)) as bar:
            for first in range(0, len(missing), self.together):
                pictures = {}
                for key, pair, view in missing[first : first + self.together]:
                    try:
                        array = pixels(pair, self.config.data.resolution, view, self.config.run.seed)
                        pictures[key] = torch.from_numpy(array)
                    except Exception as error:  # Pillow's decoders raise many kinds: each means a broken file
                        broken[pair.path] = str(error).splitlines()[0] if str(error) else type(error).__name__
                    bar.advance()
                unwritten |= zip(pictures, self._encode_together(list(pictures.values())), strict=True)
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

    def _encode_together(self, pictures: list[torch.Tensor]) -> list[Entry]:
        """Latents of up to `together` pictures. A smaller group is filled up with copies: the last bits of a picture's latents
        depend on how many are encoded at once, and must not depend on which others happened to be missing."""
        if not pictures:
            return []
        group = [*pictures, *[pictures[-1]] * (self.together - len(pictures))]
        mean, std = components.encode_pixels(self.parts.vae, torch.stack(group).to(self.device))
        return [{"mean": m.cpu().clone(), "std": s.cpu().clone()} for m, s in zip(mean, std)][: len(pictures)]

    @torch.no_grad()
    def contexts(self, captions: list[str]) -> torch.Tensor:
        """Hidden states of captions, (captions, tokens, width)."""
        self.parts.text_encoder.to(self.device)
        length = self.parts.tokenizer.model_max_length
        keys = {caption: key_of("text", caption, self.text_hash, length, CAPTIONS_TOGETHER) for caption in captions}
        stored = self.cache.get(keys.values())
        found = {caption: stored[key]["context"] for caption, key in keys.items() if key in stored}
        missing = [caption for caption in keys if caption not in found]
        for start in range(0, len(missing), PACK):
            pack = missing[start : start + PACK]
            for first in range(0, len(pack), CAPTIONS_TOGETHER):
                some = pack[first : first + CAPTIONS_TOGETHER]
                group = some + [some[-1]] * (CAPTIONS_TOGETHER - len(some))  # as pictures are, and for the same reason
                contexts = self.parts.text_encoder(components.tokenize(self.parts, group).to(self.device))[0]
                found |= {caption: context.cpu().clone() for caption, context in zip(some, contexts)}
            self.cache.put({keys[caption]: {"context": found[caption]} for caption in pack})
        return torch.stack([found[caption] for caption in captions])
