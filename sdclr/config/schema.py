"""The config's schema: one frozen pydantic model a section, unknown keys forbidden, impossible combinations refused.

A problem that involves two keys is reported at the later one (`at=`), so that the reader is sent to a line they can change.
Defaults carry their reason; units stand in the description.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sdclr.config.kinds import (
    Count,
    Length,
    Place,
    Rate,
    Section,
    Seed,
    Side,
    Span,
    Text,
    at_home,
    needed,
    problem,
    problems,
)
from sdclr.config.pictures import DataSection, MaskSection, PriorSection
from sdclr.config.rates import CYCLIC, ScheduleSection, TrainSection

BF16_SUMS = 64
"""Gradients that are summed up in bf16 at most: of 64 the sum is off by 1 %, of 1024 by a quarter."""


class RunSection(Section):
    """Where the run lives and what seeds it."""

    name: Annotated[str, Field(min_length=1, max_length=100)] = Field(
        description="folder of this run inside output_dir"
    )
    output_dir: Place = Field(Path("runs"), description="folder that holds all runs and the cache")
    seed: Seed = Field(42, description="every random draw derives from it")
    tensorboard: bool = Field(False, description="also write TensorBoard files (pip install 'sdclr[tensorboard]')")

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"[\w][\w.@+-]*", name):
            raise problem(
                f"must be a plain folder name (letters, digits, . _ - + @, the first a letter, digit or _); got {name!r}"
            )
        return name


class ModelSection(Section):
    """The Stable Diffusion to start from, and how to compute with it."""

    base: Annotated[str, Field(min_length=1, max_length=1000)] = Field(
        description="diffusers folder, one .safetensors file, or a hub id"
    )
    config: str | None = Field(
        None, description="for a .safetensors file: the diffusers folder or hub id with its configs and tokenizer"
    )
    train: tuple[Literal["unet", "text_encoder"], ...] = Field(
        ("unet",), description="what is fine-tuned: [unet] or [unet, text_encoder]"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "full_bf16"] = Field(
        "auto",
        description="auto, fp32, bf16, fp16: of the forward pass, with weights in fp32; full_bf16: trained weights and gradients in bf16 too (half their memory), updates rounded up or down by chance so that small ones add up",
    )
    attention: Literal["auto", "sdpa", "xformers"] = Field(
        "auto", description="attention kernel: auto, sdpa or xformers"
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="true or false: less memory, about a third slower; auto: where the run might not fit without",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="auto: on an NVIDIA GPU the step is a CUDA graph (not in fp16, with fused_backward or in several processes), and torch.compile in a run that is long enough to earn it; on: torch.compile; off: neither",
    )

    @field_validator("base", "config")
    @classmethod
    def _a_tilde_is_the_home(cls, place: str | None) -> str | None:
        return str(at_home(Path(place))) if place and place.startswith("~") else place

    @field_validator("train")
    @classmethod
    def _trains_the_unet_once(cls, train: tuple[str, ...]) -> tuple[str, ...]:
        if "unet" not in train or len(set(train)) != len(train):
            raise problem(f"must be [unet] or [unet, text_encoder]; got {list(train)}")
        return train

    @field_validator("config")
    @classmethod
    def _config_goes_with_a_single_file(cls, config: str | None, info: ValidationInfo) -> str | None:
        base = info.data.get("base")
        if base and config and not base.endswith(".safetensors"):
            raise problem(f"has no effect here: only a single .safetensors file needs it, and base is {base!r}")
        if base and not config and base.endswith(".safetensors"):
            raise needed(
                "model.config is needed with a single file: name a diffusers folder of the same kind, or a hub id such as "
                "stable-diffusion-v1-5/stable-diffusion-v1-5 or stabilityai/stable-diffusion-xl-base-1.0, to take the configs and "
                "the tokenizer from (small text files)",
                at="base",
            )
        return config


class LoraSection(Section):
    """Small matrices trained beside the model's (Hu 2021, arXiv 2106.09685) instead of these; not without a rank."""

    rank: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="of the matrices, often 4 to 128; null: the model's own weights are trained"
    )
    alpha: Annotated[float, Field(gt=0, le=4096)] | None = Field(
        None, description="what they add is multiplied by alpha/rank; null: as rank"
    )
    layers: Literal["attention", "transformer"] = Field(
        "transformer",
        description="beside which matrices: attention, or transformer, the feed-forward ones of its blocks too",
    )

    @field_validator("alpha")
    @classmethod
    def _alpha_is_the_rank(cls, alpha: float | None, info: ValidationInfo) -> float | None:
        """Written out, so that whoever says it and whoever does not have the same run."""
        rank = info.data.get("rank")
        return float(rank) if alpha is None and rank else alpha

    @model_validator(mode="after")
    def _settings_have_a_rank(self) -> LoraSection:
        idle = [key for key in ("alpha", "layers") if getattr(self, key) != type(self).model_fields[key].default]
        if idle and self.rank is None:
            raise problems([(key, "has no effect: lora.rank is null") for key in idle])
        return self


class ValidationSection(Section):
    """The held-out split, and how often and how finely it is measured."""

    fraction: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        0.2, description="share of images held out; 0 trains on all, blind"
    )
    every: Length = Field(Span(value=1, unit="epochs"), description="steps or epochs between validations")
    timesteps_per_image: Annotated[int, Field(ge=1, le=250)] = Field(
        8, description="fixed (noise, timestep) draws per image, one a stratum"
    )


class OptimizerSection(Section):
    """The optimizer; its betas are never cycled."""

    name: Literal["adamw", "adamw8bit", "adafactor", "sgd"] = Field(
        "adamw",
        description="adamw, adamw8bit (its two numbers a weight in a byte each; pip install 'sdclr[bitsandbytes]'), adafactor or sgd",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="adamw, adamw8bit"
    )
    eps: Annotated[float, Field(gt=0, le=1)] = Field(1e-8, description="adamw, adamw8bit")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="sgd")
    weight_decay: Annotated[float, Field(ge=0, le=10)] = Field(
        0.01, description="share of each weight taken away in a step, times the rate (sgd: added to the gradient)"
    )
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        1.0, description="null: no clipping"
    )
    text_encoder_scale: Annotated[float, Field(gt=0, le=100)] = Field(
        1.0, description="text encoder's rate as a multiple of the UNet's"
    )
    fused_backward: bool = Field(
        False,
        description="update each weight as soon as its gradient is there, so that gradients take no memory; asks for max_grad_norm: null and batch.accumulate: 1",
    )

    @model_validator(mode="after")
    def _settings_belong_to_the_optimizer(self) -> OptimizerSection:
        belongs = {"betas": "adamw", "eps": "adamw", "momentum": "sgd"}
        found: list[tuple[str | None, str]] = [
            (key, f"has no effect: it belongs to {owner}, and optimizer.name is {self.name}")
            for key, owner in belongs.items()
            if not self.name.startswith(owner) and getattr(self, key) != type(self).model_fields[key].default
        ]
        if self.fused_backward and self.max_grad_norm is not None:
            found.append(
                (
                    "fused_backward",
                    f"updates weights before the whole gradient's norm is known, and optimizer.max_grad_norm is {self.max_grad_norm:g}: set that to null",
                )
            )
        if found:
            raise problems(found)
        return self


class LossSection(Section):
    """The training loss; validation is always the plain mean squared error."""

    min_snr_gamma: Annotated[float, Field(gt=0, le=100)] | None = Field(None, description="min-SNR weighting, often 5")
    noise_offset: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="often 0.05; lets very dark and bright pictures be learnt"
    )


class BatchSection(Section):
    """How many pictures one optimizer step sees: size × accumulate, on however many processes (and as many prior ones, if there are any)."""

    size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field(
        4,
        description="pictures in one forward-backward, shared evenly by several processes; auto (one process): as many as fit in memory",
    )
    accumulate: Annotated[int, Field(ge=1, le=4096)] = Field(1, description="forward-backwards in one optimizer step")


class RangeTestSection(Section):
    """How the learning-rate range test looks."""

    arms_per_decade: Annotated[int, Field(ge=2, le=16)] = Field(4, description="rates tried in a factor of ten")
    tolerance: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.10, description="share of the gain that a rate may lose and still be admissible"
    )
    raggedness: Annotated[float, Field(gt=0, le=10)] = Field(
        0.25, description="unevenness of the curve, as a share of the gain, that is still admissible"
    )
    test_exposure: Annotated[float, Field(gt=0, le=2)] = Field(
        0.5,
        description="exposure at which arms are compared, as a share of the best one (at most the reference arm's)",
    )
    lr: tuple[Rate, Rate] | None = Field(
        None, description="[lowest, highest] rate to try: the screen, which finds the top, goes no further"
    )
    fraction: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = Field(
        "auto",
        description="share of images held out in the range test; auto: two fifths, or validation.fraction if that is more, less where folds or a batch need the room",
    )
    folds: Annotated[int, Field(ge=1, le=100)] = Field(
        1,
        description="splits to measure on, each holding out other images: a narrower interval for as many times the work",
    )
    seeds: Annotated[int, Field(ge=1, le=100)] = Field(
        1, description="training seeds for each split, whose losses are averaged"
    )
    max_steps: Count = Field(3000, description="train steps that an arm may take at most")
    max_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="stop after this long and report what is finished"
    )

    @field_validator("lr")
    @classmethod
    def _range_is_a_range(cls, lr: tuple[float, float] | None) -> tuple[float, float] | None:
        if lr and not 0 < lr[0] < lr[1]:
            raise problem(f"must be [lowest, highest] with 0 < lowest < highest; got {list(lr)}")
        return lr


class CheckpointSection(Section):
    """Which states of the run are kept."""

    at_troughs: bool = Field(True, description="at the end of every cycle")
    average: bool = Field(False, description="and, at the end, the average of the troughs' weights")
    best: bool = Field(True, description="at the lowest validation loss")
    every: Length | None = Field(None, description="and every so many steps or epochs; null: ten times in the run")
    keep_last: Count = Field(2, description="how many of the latest to keep beside troughs and best")

    @model_validator(mode="after")
    def _average_has_troughs(self) -> CheckpointSection:
        if self.average and not self.at_troughs:
            raise problem("is made of the troughs, and checkpoint.at_troughs is false", at="average")
        return self


class SampleSection(Section):
    """The comparison grids."""

    prompts: Annotated[tuple[Text, ...], Field(min_length=1, max_length=200)] = Field(
        ("a photo",), description="a row each"
    )
    negative_prompt: Text = Field("", description="what the pictures should not show")
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=200)] = Field(
        (1, 2, 3), description="one picture each of every prompt, from the same noise in every column"
    )
    size: tuple[Side, Side] | None = Field(
        None, description="[width, height] in pixels, multiples of 8; null: data.resolution, square"
    )
    at_troughs: bool = Field(
        False,
        description="draw while training too: the base, then each trough as it is kept (samples/at-work/index.html)",
    )
    steps: Annotated[int, Field(ge=1, le=1000)] = Field(30, description="of the sampler")
    guidance: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] = Field(
        7.5, description="how strongly the prompt is followed (classifier-free guidance); 1: not beyond the model's own"
    )


class RunConfig(Section):
    """One run, whole."""

    run: RunSection
    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    mask: MaskSection = MaskSection()
    prior: PriorSection = PriorSection()
    validation: ValidationSection = ValidationSection()
    optimizer: OptimizerSection = OptimizerSection()
    loss: LossSection = LossSection()
    batch: BatchSection = BatchSection()
    range_test: RangeTestSection = RangeTestSection()
    schedule: ScheduleSection = ScheduleSection(cycles=4)
    train: TrainSection = TrainSection()
    checkpoint: CheckpointSection = CheckpointSection()
    sample: SampleSection = SampleSection()

    @field_validator("data")
    @classmethod
    def _one_shape_is_compiled(cls, data: DataSection, info: ValidationInfo) -> DataSection:
        model = info.data.get("model")
        if model and model.compile == "on" and data.aspect == "buckets":
            raise problem(
                "has many shapes, and model.compile: on would compile each; set model.compile: auto", at="aspect"
            )
        return data

    @field_validator("lora")
    @classmethod
    def _lora_is_in_fp32(cls, lora: LoraSection, info: ValidationInfo) -> LoraSection:
        model = info.data.get("model")
        if model and lora.rank and model.precision == "full_bf16":
            raise problem(
                "trains matrices too small to need model.precision: full_bf16; set that to bf16, in which the frozen weights are kept",
                at="rank",
            )
        return lora

    @field_validator("optimizer")
    @classmethod
    def _text_encoder_is_trained(cls, optimizer: OptimizerSection, info: ValidationInfo) -> OptimizerSection:
        model = info.data.get("model")
        if model and optimizer.text_encoder_scale != 1.0 and "text_encoder" not in model.train:
            raise problem("has no effect: model.train does not name text_encoder", at="text_encoder_scale")
        return optimizer

    @field_validator("optimizer")
    @classmethod
    def _update_follows_the_whole_gradient(cls, optimizer: OptimizerSection, info: ValidationInfo) -> OptimizerSection:
        prior = info.data.get("prior")
        if prior and prior.images and optimizer.fused_backward:
            raise problem(
                "updates weights after every backward, and prior.images makes two of each step: set one of them to its default",
                at="fused_backward",
            )
        return optimizer

    @field_validator("batch")
    @classmethod
    def _accumulation_is_possible(cls, batch: BatchSection, info: ValidationInfo) -> BatchSection:
        optimizer, model, data, prior = (info.data.get(section) for section in ("optimizer", "model", "data", "prior"))
        most = BF16_SUMS // 2 if prior and prior.images else BF16_SUMS
        if model and model.precision == "full_bf16" and batch.accumulate > most:
            beside = ", and with prior.images" if most < BF16_SUMS else ""
            raise problem(
                f"must be at most {most} with model.precision: full_bf16{beside}, in which more gradients cannot be summed up: each is too small beside the sum; got {batch.accumulate}",
                at="accumulate",
            )
        if optimizer and optimizer.fused_backward and batch.accumulate > 1:
            raise problem(
                f"must be 1 with optimizer.fused_backward, which updates after every backward; got {batch.accumulate}",
                at="accumulate",
            )
        if optimizer and optimizer.fused_backward and data and data.aspect == "buckets" and batch.size != 1:
            raise problem(
                f"must be 1 with optimizer.fused_backward and data.aspect: buckets, for a backward is of pictures of one shape, and an update follows each; got {batch.size}",
                at="size",
            )
        return batch

    @field_validator("train")
    @classmethod
    def _early_stop_can_see(cls, train: TrainSection, info: ValidationInfo) -> TrainSection:
        validation = info.data.get("validation")
        if validation and train.early_stop and validation.fraction == 0:
            raise problem("needs a validation split, and validation.fraction is 0", at="early_stop")
        return train

    @field_validator("checkpoint")
    @classmethod
    def _best_can_be_told(cls, checkpoint: CheckpointSection, info: ValidationInfo) -> CheckpointSection:
        validation = info.data.get("validation")
        if validation and validation.fraction == 0 and checkpoint.best:
            if "best" in checkpoint.model_fields_set:
                raise problem("needs a validation split, and validation.fraction is 0: set it to false", at="best")
            return checkpoint.model_copy(update={"best": False})
        return checkpoint

    @field_validator("checkpoint")
    @classmethod
    def _average_has_cycles(cls, checkpoint: CheckpointSection, info: ValidationInfo) -> CheckpointSection:
        schedule = info.data.get("schedule")
        if schedule and checkpoint.average and schedule.policy not in CYCLIC:
            raise problem(f"has no effect with schedule.policy: {schedule.policy} (it has no troughs)", at="average")
        return checkpoint

    @field_validator("sample")
    @classmethod
    def _there_are_troughs_to_draw(cls, sample: SampleSection, info: ValidationInfo) -> SampleSection:
        schedule, checkpoint = info.data.get("schedule"), info.data.get("checkpoint")
        if schedule and sample.at_troughs and schedule.policy not in CYCLIC:
            raise problem(f"has no effect with schedule.policy: {schedule.policy} (it has no troughs)", at="at_troughs")
        if checkpoint and sample.at_troughs and not checkpoint.at_troughs:
            raise problem("draws the troughs that are kept, and checkpoint.at_troughs is false", at="at_troughs")
        return sample

    @property
    def sample_size(self) -> tuple[int, int]:
        """Width and height of a drawn picture, in pixels."""
        return self.sample.size or (self.data.resolution, self.data.resolution)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.output_dir / self.run.name
