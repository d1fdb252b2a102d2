"""Everything a run needs, built from its config: device, model, encoded pictures and captions, losses, optimizers.

The only module that knows all the parts. Commands ask it for a fresh state, a loss, a validation; none of these depends on
another having been asked before.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch.utils._pytree import tree_map

from sdclr.config.schema import RunConfig
from sdclr.data.batches import Batches, Inputs, Sample, in_groups
from sdclr.data.dataset import View, views
from sdclr.data.pairs import printable
from sdclr.engine import graph, optimizers, rounding, sharding
from sdclr.engine.encoding import Encoded, Encoder
from sdclr.engine.graph import Graph
from sdclr.engine.loop import AddGradients, StepResult, TrainState, gradients_of, optimizer_steps
from sdclr.engine.optimizers import InBackward
from sdclr.engine.processes import Processes
from sdclr.engine.validation import Draws, evaluate, fixed_draws
from sdclr.errors import InputError, first_line
from sdclr.model import adapters, components, encoders
from sdclr.model.objective import min_snr_weights, offset_noise, predict, squared_error
from sdclr.report import console
from sdclr.seeding import generator

EARNS_COMPILING = 20 * 60
"""Seconds that a run must take to be compiled: on an H200 compiling takes two minutes and saves a quarter of every step."""


class Prepared(NamedTuple):
    """A micro-batch as the loss takes it, on the device: latents and noise (batch, 4, h, w), timesteps (batch,), what the UNet is told
    besides (see model.objective.denoise) or, where the text encoder is trained, the captions' `input_ids` (batch, tokens), and the
    `share` of its step's mean loss that is its own, in units of what it would be if all of the step's micro-batches were as large; and
    where pictures are masked one tensor of how much each cell of the latents counts, (batch, 1, h, w)."""

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    told: dict[str, torch.Tensor]
    share: torch.Tensor
    weights: tuple[torch.Tensor, ...] = ()  # not None, which a tree of tensors would take for one


class Stream(NamedTuple):
    """Pictures that are trained on: what the encoders make of them, which of them a step takes, and their weight in its loss."""

    encoded: Encoded
    batches: Batches
    weight: float = 1.0

    def groups(self, step: int) -> list[tuple[list[Sample], float]]:
        """A step's samples, those of one shape together, and the weight of each group in the step's loss."""
        planned = self.batches(step)
        samples = [sample for micro_batch in planned for sample in micro_batch]
        groups = in_groups(samples, lambda sample: self.encoded.mean[sample.index].shape, len(planned[0]))
        return [(group, self.weight * len(group) / len(samples)) for group in groups]


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
        if config.model.precision == "full_bf16":
            rounding.refuse_mixed_cards(self.device, self.processes)
        assert (inputs.batches.rank, inputs.batches.processes) == (self.processes.rank, self.processes.count)
        self.parts = components.load(config.model, to_train=True)
        self._say_what_is_cut()
        self._say_what_is_unused()
        self._encoder = Encoder(config, self.parts, self.device)
        components.prepare_for_training(self.parts, config.model, self.device)
        if config.lora.rank:
            components.attach_lora(self.parts, config, self.accelerator.mixed_precision)
        self._encode()
        self.modules = self.models = self.parts.trainable(config.model.train)
        if sharding.asked():
            self.models = {name: components.without_weights(module) for name, module in self.modules.items()}
            for module in self.modules.values():
                sharding.shard(module, self.device, self.accelerator.mixed_precision)
        self._base = {
            name: {k: v.detach().clone() for k, v in adapters.weights_of(m).items()}
            for name, m in self.modules.items()
            if keep_base
        }
        self._untouched = True
        self._first_scale = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
        self.wrapped = self.modules if sharding.asked() else self._prepared()
        self.denoiser: Callable[..., Any] = self.wrapped["unet"]
        self._in_backward: list[InBackward] = []  # of the newest state, on whichever split: all train the same weights
        self.add_gradients = self._gradients()

    def compile_for(self, steps: int = 0) -> None:
        """Before training: compile the UNet if that is asked for; with `compile: auto`, if it is trained as a recorded graph and so many
        steps, as they are timed now, take long enough to earn it."""
        asked = self.config.model.compile
        if asked == "auto" and steps and isinstance(self.add_gradients, Graph):
            batches = self.batches(0)
            seconds = self.add_gradients.seconds(batches[0], len(batches)) * len(batches) * steps
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
            batches = self.batches(0)
            self.add_gradients(batches[0], len(batches))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return first_line(error)
        finally:
            for module in self.modules.values():
                module.zero_grad(set_to_none=True)
        return None

    def _gradients(self) -> AddGradients:
        """How a micro-batch's gradients come about: kernel by kernel, or as a recorded graph."""
        plain = gradients_of(self.loss, self.accelerator, careful=self.config.optimizer.fused_backward)
        if not graph.wanted(self.config, self.device, self.accelerator.mixed_precision):
            return plain
        return Graph(plain, [p for module in self.modules.values() for p in adapters.trained(module)])

    def _prepared(self) -> dict[str, torch.nn.Module]:
        prepared = self.accelerator.prepare(*self.modules.values())
        return dict(zip(self.modules, prepared if len(self.modules) > 1 else [prepared], strict=True))

    def on(self, inputs: Inputs) -> Run:
        """The same model and caches on another split, or another stream of samples; both runs share one set of weights."""
        other = copy.copy(self)
        other.inputs = inputs
        if inputs.split != self.inputs.split:
            other._encode()
        return other

    def _say_what_is_cut(self) -> None:
        """Name the captions that are longer than the model reads."""
        if not self.processes.main:
            return
        pairs = (*self.inputs.split.train, *self.inputs.split.validation, *self.inputs.prior)
        cut = encoders.cut_captions(self.parts, {pair.caption for pair in pairs})
        named = [printable(pair.path) for pair in pairs if pair.caption in cut]
        if named:
            length, more = (
                self.parts.tokenizer.model_max_length,
                f" and {len(named) - 3} more" if len(named) > 3 else "",
            )
            console.warn(
                f"captions are cut at the {length} tokens that this model reads: of {', '.join(named[:3])}{more}"
            )

    def _say_what_is_unused(self) -> None:
        unused = self.parts.unused
        if unused and self.processes.main:
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            console.warn(f"{self.config.model.base}: holds weights that this kind of model has no place for, and that are not used: {', '.join(unused[:3])}{more}")  # fmt: skip

    def _encode(self) -> None:
        data, held, prior = self.config.data, self.inputs.split.validation, self.inputs.prior
        seen = views(data.crop, data.crops, data.flip)
        orders = data.tag_orders
        with self.accelerator.main_process_first():  # the others find everything in the cache
            self.train = self._encoder.encode(self.inputs.split.train, seen, orders)
            self.prior = self._encoder.encode(prior, seen, orders) if prior else None
            self.held_out = self._encoder.encode(held, [View()]) if held else None
            # Training pictures measured as the held-out ones are: the gap between the two curves is overfitting.
            self.stabilised = self._encoder.encode(self.inputs.split.train[: len(held)], [View()]) if held else None
            self.no_caption = self._encoder.no_caption
        if self.config.model.precision == "full_bf16":
            most = [self.config.batch.accumulate + len({m.shape for m in s.encoded.mean}) - 1 for s in self.streams]
            rounding.refuse_many_sums(sum(most))
        self.parts.put_away(self.config.model.train)

    # Training ---------------------------------------------------------------------------------------------------------------

    def fresh_state(self) -> TrainState:
        """The untouched base weights and a new optimizer."""
        assert self._base or self._untouched, "a second state needs keep_base"
        if self.accelerator.scaler is not None:  # a scale that another state has found is not this one's
            self.accelerator.scaler.load_state_dict(self._first_scale)
        self._untouched = False
        for name, weights in self._base.items():
            adapters.put(self.modules[name], weights)
        while self._in_backward:
            self._in_backward.pop().end()
        optimizer = self._new_optimizer()
        if self.config.optimizer.fused_backward:
            self._in_backward.append(InBackward(optimizer))
        return TrainState(self.wrapped, optimizer, in_backward=next(iter(self._in_backward), None))

    def steps(self, state: TrainState, lr_at: Callable[[int], float], until: int) -> Iterator[StepResult]:
        """Train a state to step `until`, at the rates `lr_at(step)`: see engine.loop."""
        norm = self.config.optimizer.max_grad_norm
        return optimizer_steps(state, self.batches, self.add_gradients, lr_at, until, self.accelerator, norm)

    @property
    def streams(self) -> list[Stream]:
        """What every step takes from: the subject's pictures, then the prior ones."""
        subject = Stream(self.train, self.inputs.batches)
        if self.prior is None:
            return [subject]
        return [subject, Stream(self.prior, self.inputs.prior_batches, self.config.prior.weight)]

    def batches(self, step: int) -> list[Prepared]:
        """A step's micro-batches, each of pictures of one stream and shape, on their way to the device."""
        groups = [(stream, *group) for stream in self.streams for group in stream.groups(step)]
        return [self.prepare(group, share * len(groups), stream) for stream, group, share in groups]

    def prepare(self, samples: Sequence[Sample], share: float = 1.0, stream: Stream | None = None) -> Prepared:
        """Some samples of one shape as the loss takes them; every draw derives from their stream's seed and the sample's position."""
        encoded, batches, _ = stream or self.streams[0]
        config, seed, shape = self.config, batches.seed, encoded.mean[samples[0].index].shape[1:]
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
        mean, std = (torch.stack([of[s.index][s.view] for s in samples]) for of in (encoded.mean, encoded.std))
        dropped = torch.tensor([s.drop_caption for s in samples])
        said = torch.tensor([(rows := encoded.said[s.index])[s.order % len(rows)] for s in samples])
        told = self._told(encoded, index, view, dropped, said)
        weights = self._weights(encoded, [(s.index, s.view) for s in samples])
        return tree_map(self._sent, Prepared(mean + std * spread, noise, timesteps, told, torch.tensor(share), weights))

    def loss(self, batch: Prepared) -> torch.Tensor:
        """Mean training loss of a micro-batch, times its share."""
        per_sample = self._errors(self.denoiser, batch)
        gamma = self.config.loss.min_snr_gamma
        if gamma:
            per_sample = per_sample * min_snr_weights(self.parts.noise_scheduler, batch.timesteps, gamma)
        return per_sample.mean() * batch.share

    # Validation -------------------------------------------------------------------------------------------------------------

    def draws(self, encoded: Encoded, per_image: int | None = None) -> Draws:
        """The fixed draws of some encoded pictures."""
        keys = [pair.key for pair in encoded.pairs]
        total = self.parts.noise_scheduler.config.num_train_timesteps
        return fixed_draws(
            keys,
            per_image or self.config.validation.timesteps_per_image,
            [mean.shape[1:] for mean in encoded.mean],
            total,
            self.config.run.seed,
        )

    def losses(self, encoded: Encoded, draws: Draws) -> np.ndarray:
        """Plain mean squared error of every draw with the current weights, (images, K), over what the pictures' masks let count."""

        def losses_of(images: list[int], timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            index = torch.tensor(images)
            said = torch.tensor([encoded.said[image][0] for image in images])  # as it is written
            told = self._told(encoded, index, torch.zeros_like(index), torch.zeros_like(index, dtype=torch.bool), said)
            latents = torch.stack([encoded.mean[image][0] for image in images])
            weights = self._weights(encoded, [(image, 0) for image in images])
            batch = tree_map(self._sent, Prepared(latents, noise, timesteps, told, torch.ones(()), weights))
            return self._errors(self.modules["unet"], batch)

        return evaluate(list(self.modules.values()), losses_of, draws, self.validation_batch, self.accelerator)

    @property
    def validation_batch(self) -> int:
        """Draws in one validation forward."""
        return validation_batch(self.inputs.batches.size)

    # Parts ------------------------------------------------------------------------------------------------------------------

    def _errors(self, unet: Callable[..., Any], batch: Prepared) -> torch.Tensor:
        told, scheduler = self._with_hidden_states(batch.told), self.parts.noise_scheduler
        with self.accelerator.autocast():
            prediction, target = predict(unet, scheduler, batch.latents, batch.noise, batch.timesteps, told)
        return squared_error(prediction, target, *batch.weights)

    def _weights(self, encoded: Encoded, seen: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
        """How much each cell of some pictures' views counts, (pictures, 1, h, w), if there are masks."""
        if not encoded.masks:
            return ()
        outside = self.config.mask.outside
        return (outside + (1 - outside) * torch.stack([encoded.masks[index][view] for index, view in seen]),)

    def _told(
        self, encoded: Encoded, index: torch.Tensor, view: torch.Tensor, dropped: torch.Tensor, said: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What the UNet is told of some pictures whose captions are in the rows `said`, or the token ids for a text encoder that is trained."""

        def unless_dropped(known: torch.Tensor, nothing: torch.Tensor) -> torch.Tensor:
            return torch.where(dropped.view(-1, *[1] * (known.ndim - 1)), nothing, known[said])

        told = {name: unless_dropped(known, self.no_caption[name]) for name, known in encoded.captions.items()}
        return told | {"time_ids": encoded.sizes[index, view]} if self.parts.is_xl else told

    def _with_hidden_states(self, told: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if "input_ids" not in told:
            return told
        text_encoder = self.wrapped["text_encoder"] if torch.is_grad_enabled() else self.modules["text_encoder"]
        with self.accelerator.autocast():
            return {"encoder_hidden_states": text_encoder(told["input_ids"])[0]}

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device, without waiting for what it is at work on."""
        return (
            tensor.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else tensor.to(self.device)
        )

    def _new_optimizer(self) -> torch.optim.Optimizer:
        c = self.config.optimizer
        scales = {
            "unet": 1.0,
            "text_encoder": c.text_encoder_scale,
        }  # in this order, whatever the config's: checkpoints go by it
        groups = [
            {"params": adapters.trained(self.modules[name]), "lr_scale": scale}
            for name, scale in scales.items()
            if name in self.modules
        ]
        new = functools.partial(optimizers.new, c)
        full = self.config.model.precision == "full_bf16"
        optimizer = rounding.Rounded(new, groups, self.config.run.seed) if full else new(groups)
        self.accelerator._optimizers.clear()  # one optimizer at a time: an arm's must not be unscaled with the next one's
        return self.accelerator.prepare_optimizer(optimizer) if self.accelerator.scaler is not None else optimizer


def validation_batch(size: int) -> int:
    """Draws in one validation forward: the same at any number of processes, for sums depend on their company, and few, so that
    there are enough of them to share out."""
    return max(8, size)


def make_accelerator(config: RunConfig) -> Accelerator:
    """accelerate's device and processes, in the config's precision."""
    from accelerate.state import PartialState

    device = PartialState().device
    precision = components.mixed_precision(config.model.precision, device)
    if sharding.asked():
        sharding.refuse_other_ways(config, precision)
        sharding.let_every_process_load()
    # Each weight is cast once in a forward: a copy that waits for the next use would only lie there, next to all the others.
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[AutocastKwargs(cache_enabled=False)])
    kind = accelerator.distributed_type.name
    if kind != "NO" and not kind.startswith("MULTI_") and not sharding.asked():
        raise InputError(
            f"accelerate is set up for {kind}, and sdclr trains whole models side by side (data parallel) or in shares of several processes (FSDP 2)",
            hint="start it so: accelerate launch --multi_gpu --num_processes 2 -m sdclr ..., or with --use_fsdp --fsdp_version 2 instead of --multi_gpu",
        )
    return accelerator
