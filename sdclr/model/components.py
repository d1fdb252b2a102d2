"""Stable Diffusion's parts: load, freeze, set precision and attention. The only module that knows where weights come from."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdclr.config.schema import ModelSection, RunConfig
from sdclr.errors import InputError, SdclrError, first_line
from sdclr.model import adapters, checks
from sdclr.model.checks import MODEL_HINT, WEIGHTS

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclasses.dataclass
class Components:
    """The parts of one Stable Diffusion, in fp32 unless `load` says otherwise; `noise_scheduler` is the diffusion's, not the learning rate's.

    SDXL has a second tokenizer and text encoder, and may want zeros, rather than an empty caption's encoding, where there is no caption.
    `unused` are weights that a folder holds and that no part has a place for.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    sampler: Any
    tokenizer_2: CLIPTokenizer | None = None
    text_encoder_2: CLIPTextModelWithProjection | None = None
    zeros_for_no_caption: bool = False
    unused: tuple[str, ...] = ()

    @property
    def is_xl(self) -> bool:
        return self.text_encoder_2 is not None

    @property
    def tokenizers(self) -> list[CLIPTokenizer]:
        """One for each text encoder."""
        return [tokenizer for tokenizer in (self.tokenizer, self.tokenizer_2) if tokenizer is not None]

    @property
    def text_encoders(self) -> list[Any]:
        """One, or SDXL's two."""
        return [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]

    @property
    def kind(self) -> str:
        """The family, which its text encoders tell apart: 1.x reads with OpenAI's CLIP, 2.x with OpenCLIP, SDXL with both."""
        if self.is_xl:
            return "SDXL"
        return "Stable Diffusion 2.x" if self.text_encoder.config.hidden_act == "gelu" else "Stable Diffusion 1.x"

    @property
    def networks(self) -> dict[str, Any]:
        """All that has weights, by name."""
        named = {name: getattr(self, name) for name in WEIGHTS}
        return {name: module for name, module in named.items() if module is not None}

    def trainable(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The modules named in `model.train`, in that order."""
        return {name: getattr(self, name) for name in names}

    def described(self) -> str:
        """What kind of model it is, in a few words."""
        weights = sum(p.numel() for p in self.unet.parameters()) - adapters.attached(self.unet)
        target = self.noise_scheduler.config.prediction_type
        predicted = {"epsilon": "the noise", "v_prediction": "the velocity"}.get(target, target)
        return f"{self.kind}, with a UNet of {weights:,} weights that predicts {predicted}"

    def put_away(self, trained: tuple[str, ...]) -> None:
        """Off the device with what is not trained."""
        for name, module in self.networks.items():
            if name not in trained:
                module.to("cpu")

    def pipeline(self) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        """The parts as diffusers' pipeline, sharing weights."""
        shared = {"vae": self.vae, "text_encoder": self.text_encoder, "tokenizer": self.tokenizer, "unet": self.unet, "scheduler": self.sampler}  # fmt: skip
        pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline
        with quiet_libraries():
            if self.is_xl:
                pipeline = StableDiffusionXLPipeline(
                    **shared, text_encoder_2=self.text_encoder_2, tokenizer_2=self.tokenizer_2,
                    force_zeros_for_empty_prompt=self.zeros_for_no_caption, add_watermarker=False,
                )  # fmt: skip
            else:
                pipeline = StableDiffusionPipeline(
                    **shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False
                )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def with_weights(self, weights: dict[str, dict[str, torch.Tensor]]) -> Components:
        """These parts with other weights by name, to be written, not run: buffers that no file holds have no content. Nothing is copied but what lies in another layout."""
        others = {name: without_weights(getattr(self, name)) for name in weights}
        for name, model in others.items():
            own = {key: tensor.contiguous() for key, tensor in weights[name].items()}  # a file holds no other layout
            model.load_state_dict(own, assign=True)
        return dataclasses.replace(self, **others)

    def save_pipeline(self, folder: Path) -> None:
        """Write the parts as a diffusers folder that `DiffusionPipeline.from_pretrained` opens; safetensors only.

        Raises OSError or SafetensorError when the disk refuses, and when a part did not get there: the libraries make a folder
        again that has vanished under them, and go on.
        """
        try:
            with quiet_libraries():
                self.pipeline().save_pretrained(folder, safe_serialization=True)
        except Exception as error:
            if type(error) is Exception:  # as tokenizers passes on what the system said
                raise OSError(str(error)) from error
            raise
        problems = checks.problems_of(folder)
        if problems:
            raise OSError(problems[0])


def load(config: ModelSection, to_train: bool = False) -> Components:
    """Load every part in fp32 and evaluation mode, nothing trainable yet. With `precision: full_bf16`, `to_train` loads in bf16 what is
    trained.

    A local folder or file is never looked up on the hub. Raises InputError naming the missing or misfitting part.
    """
    checks.check(config)
    try:
        with quiet_libraries():
            index = _index(config)
            read = _from_single_file if config.base.endswith(".safetensors") else _from_folder_or_hub
            parts = read(config, index, narrowed(config) if to_train else ())
            checks.refuse_misfits(config.base, parts)
            checks.refuse_odd_tokens_and_noise(config.base, parts)
    except SdclrError:
        raise
    except Exception as error:  # the libraries raise many kinds for files that are not what they should be
        raise InputError(
            f"model.base {config.base}: cannot be loaded: {first_line(error)}", hint=_hint(config)
        ) from error
    return _frozen(parts)


def skeleton(config: ModelSection) -> Components:
    """The modules that `load` would fill, with no weights and no tokenizer: on torch's meta device they take no memory."""
    checks.check(config)
    base = config.config or config.base
    options: dict[str, Any] = {"local_files_only": Path(base).is_dir()}
    nothing: Any = None
    try:
        with quiet_libraries():
            index = _index(config)
            unet, vae = (
                kind.from_config(kind.load_config(base, subfolder=part, **options))
                for kind, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
            )
            texts = {
                part: kind(CLIPTextConfig.from_pretrained(base, subfolder=part, **options))
                for part, kind in _text_encoders(index).items()
            }
            parts = Components(tokenizer=nothing, vae=vae, unet=unet, noise_scheduler=nothing, sampler=nothing, **texts)
            checks.refuse_misfits(config.base, parts)
    except SdclrError:
        raise
    except Exception as error:  # as above
        raise InputError(
            f"model {base}: its configs cannot be read: {first_line(error)}", hint=_hint(config)
        ) from error
    return _frozen(parts)


def _frozen(parts: Components) -> Components:
    for module in parts.networks.values():
        module.requires_grad_(False).eval()
    return parts


def _hint(config: ModelSection) -> str:
    """What to do about a model that cannot be loaded."""
    place = config.config or config.base
    if Path(place).exists():
        return MODEL_HINT
    return f"{place} is looked for on the hub: is the name right, is there a network, does the model ask for a login (hf auth login)?"


def without_weights(model: Any) -> Any:
    """A model of the same kind and config on torch's meta device."""
    with torch.device("meta"), quiet_libraries():
        kind = type(model)
        return kind.from_config(model.config) if hasattr(kind, "from_config") else kind(model.config)


def narrowed(config: ModelSection) -> tuple[str, ...]:
    """The parts that are trained in bf16."""
    return config.train if config.precision == "full_bf16" else ()


def narrow(module: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Make of a module's weights narrower ones, one by one."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def attach_lora(parts: Components, config: RunConfig, precision: str) -> None:
    """Train small matrices beside the weights of what is named in `model.train`. The weights themselves are frozen, and those that autocast
    would cast to `precision` in every forward are stored so; norms and embeddings stay in fp32, and what is computed stays the same."""
    dtype = DTYPES.get(precision, torch.float32)
    for module in parts.trainable(config.model.train).values():
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                narrow(layer, dtype)
        adapters.attach(module, config.lora, config.run.seed)


def prepare_for_training(parts: Components, config: ModelSection, device: torch.device) -> None:
    """Unfreeze what is trained; set gradient checkpointing and the attention kernel. Raises InputError where xformers cannot run."""
    for module in parts.trainable(config.train).values():
        module.requires_grad_(True)
        if config.gradient_checkpointing is True:  # auto has been settled by who knows what memory there is
            # Nothing here draws random numbers, and looking after their state would keep a step from being recorded.
            how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            if isinstance(module, UNet2DConditionModel):
                module.enable_gradient_checkpointing(functools.partial(checkpoint, **how))
            else:
                module.gradient_checkpointing_enable(how)
                module.train()  # transformers recomputes in training mode alone; a CLIP has no dropout
    set_attention(parts.unet, config.attention, device)


def set_attention(unet: UNet2DConditionModel, attention: str, device: torch.device) -> None:
    """`auto` and `sdpa` are torch's scaled_dot_product_attention; `xformers` must run where it is asked for by name."""
    if attention != "xformers":
        return
    hint = "set model.attention: sdpa (as fast on current GPUs), or: pip install 'sdclr[xformers]' on a machine with an NVIDIA GPU"
    if device.type != "cuda":
        raise InputError(f"model.attention: xformers needs an NVIDIA GPU, and this run computes on {device.type}", hint)
    try:
        unet.enable_xformers_memory_efficient_attention()
    except Exception as error:  # missing, built for another torch, unsupported head size: each is the user's to know
        raise InputError(f"model.attention: xformers cannot run here: {first_line(error)}", hint) from error


def mixed_precision(precision: str, device: torch.device) -> str:
    """accelerate's word for the forward pass's precision, of a GPU that is not here as of one that knows bf16. Raises InputError where the
    device cannot compute in it."""
    on_gpu = device.type == "cuda"
    in_bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported()
    if precision == "auto":
        return "no" if not on_gpu else "bf16" if in_bf16 else "fp16"
    if precision == "fp16" and not on_gpu:
        raise InputError(
            f"model.precision: fp16 needs a GPU, and this run computes on {device.type}",
            hint="set model.precision: auto",
        )
    if precision in ("bf16", "full_bf16") and on_gpu and not in_bf16:
        raise InputError(f"model.precision: {precision} is not supported by this GPU", hint="set model.precision: auto")
    return {"fp32": "no", "full_bf16": "bf16"}.get(precision, precision)


def load_trained(parts: Components, folder: Path, besides: tuple[str, ...] = ()) -> None:
    """Put the weights of a checkpoint's or run's folder into parts that are as they were loaded, but for some; a LoRA is added to theirs.

    Raises InputError where a tensor is missing or does not fit.
    """
    if (folder / adapters.FILE).is_file():
        found, lora = adapters.read(folder)
    else:
        names = tuple(name for name in parts.networks if name not in besides and (folder / name).is_dir())
        found, lora = read_trained(folder, names), {}
    if not found:
        raise InputError(
            f"{folder}: has gone, or holds no weights",
            hint="a run removes states that it no longer needs; run the same command again",
        )
    for name, weights in found.items():
        module = getattr(parts, name)
        try:
            if lora:
                adapters.merge(module, weights, lora[name])
            else:
                module.load_state_dict(weights)
        except (RuntimeError, ValueError) as error:
            first, *others = [line.strip() for line in str(error).splitlines()]
            raise InputError(
                f"{folder if lora else folder / name}: does not fit the {name} of model.base: {(others or [first])[0][:300]}",
                hint="its run was trained from another model: name that one as model.base",
            ) from error


def read_trained(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """What was trained of the named parts, from a checkpoint's or run's folder. Raises InputError where that is missing or damaged."""
    if (folder / adapters.FILE).is_file():
        found = adapters.read(folder)[0]
        absent = [name for name in names if name not in found]
        if absent:
            raise InputError(f"{folder / adapters.FILE}: has nothing for the {absent[0]}")
        return {name: found[name] for name in names}
    return {name: _read_part(folder / name / f"{WEIGHTS[name]}.safetensors") for name in names}


def _read_part(path: Path) -> dict[str, torch.Tensor]:
    """The weights of one file, or of those that the libraries have split it into."""
    index = path.with_name(f"{path.name}.index.json")
    if path.is_file() or not index.is_file():
        return read_weights(path)
    try:
        names = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: cannot be read: {first_line(error)}") from error
    return {key: tensor for name in sorted(names) for key, tensor in read_weights(path.with_name(name)).items()}


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one safetensors file. Raises InputError when it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a safetensors file is no dict)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from error


def _index(config: ModelSection) -> dict[str, Any]:
    """The model_index.json of a model, or of that which a single file takes its configs from. Raises InputError where the model
    is not of a kind that is trained here, or not in the parts that the config names."""
    source = config.config or config.base
    local = checks.is_local(source, "model.config")
    file = Path(source) / checks.INDEX if local else hf_hub_download(source, checks.INDEX)
    index: dict[str, Any] = json.loads(Path(file).read_bytes())
    checks.refuse_untrainable(config, source, index)
    return index


def _text_encoders(index: dict[str, Any]) -> dict[str, Any]:
    """The text encoders of a model, by name, and their kinds."""
    first = {"text_encoder": CLIPTextModel}
    return first | {"text_encoder_2": CLIPTextModelWithProjection} if checks.is_xl(index) else first


def _from_folder_or_hub(config: ModelSection, index: dict[str, Any], in_bf16: tuple[str, ...]) -> Components:
    base, local = config.base, Path(config.base).is_dir()
    options: dict[str, Any] = {"local_files_only": local}
    weights = {"use_safetensors": True, "output_loading_info": True, **options}

    def read(part: str, kind: Any, dtype: str, **how: Any) -> Any:
        how[dtype] = torch.bfloat16 if part in in_bf16 else torch.float32
        return kind.from_pretrained(base, subfolder=part, variant=_variant(base, part), **weights, **how)

    loaded = {part: read(part, kind, "dtype") for part, kind in _text_encoders(index).items()}
    for part, kind in (("vae", AutoencoderKL), ("unet", UNet2DConditionModel)):
        loaded[part] = read(part, kind, "torch_dtype", low_cpu_mem_usage=False)
    for part, (_, info) in loaded.items():
        checks.refuse_missing(f"{base}: the weights of {part}/", info["missing_keys"])
    tokenizers = {
        part: CLIPTokenizer.from_pretrained(base, subfolder=part, **options)
        for part in checks.parts_of(index)
        if part.startswith("tokenizer")
    }
    return Components(
        noise_scheduler=DDPMScheduler.from_pretrained(base, subfolder="scheduler", **options),
        sampler=_sampler(base, **options),
        zeros_for_no_caption=_zeros_for_no_caption(index),
        unused=tuple(
            f"{part}/{name}" for part, (_, info) in loaded.items() for name in sorted(info["unexpected_keys"])
        ),
        **tokenizers,
        **{part: module for part, (module, _) in loaded.items()},
    )


def _from_single_file(config: ModelSection, index: dict[str, Any], in_bf16: tuple[str, ...]) -> Components:
    assert config.config is not None  # the schema saw to it
    checks.refuse_other_kind(config, index)
    kind: Any = StableDiffusionXLPipeline if checks.is_xl(index) else StableDiffusionPipeline
    unwanted = {} if checks.is_xl(index) else {"safety_checker": None, "feature_extractor": None}
    pipeline = kind.from_single_file(
        config.base,
        config=config.config,
        local_files_only=Path(config.config).is_dir(),
        torch_dtype=torch.float32,
        **unwanted,
    )
    read = {part: getattr(pipeline, part) for part in checks.parts_of(index) if part != "scheduler"}
    for part in in_bf16:
        narrow(read[part])
    for part in WEIGHTS:
        if part in read:
            left = (name for name, tensor in read[part].state_dict().items() if tensor.is_meta)
            checks.refuse_missing(f"{config.base}: the weights of its {part}", left)
    return Components(
        noise_scheduler=DDPMScheduler.from_config(pipeline.scheduler.config),
        sampler=pipeline.scheduler,
        zeros_for_no_caption=_zeros_for_no_caption(index),
        **read,
    )


def _variant(base: str, part: str) -> str | None:
    """`fp16` where a local folder holds a part's weights under that name alone, as many are downloaded."""
    stem, folder = WEIGHTS[part], Path(base) / part
    plain = any((folder / f"{stem}.{ending}").is_file() for ending in ("safetensors", "safetensors.index.json"))
    return None if plain or not any(folder.glob(f"{stem}.fp16*.safetensors")) else "fp16"


def _zeros_for_no_caption(index: dict[str, Any]) -> bool:
    """Whether the sampler stands zeros for a caption that is not there, as SDXL was trained; diffusers' own default is that it does."""
    return checks.is_xl(index) and bool(index.get("force_zeros_for_empty_prompt", True))


def _sampler(base: str, **options: Any) -> Any:
    """The sampler that the model's own scheduler_config names."""
    config = DDPMScheduler.load_config(base, subfolder="scheduler", **options)
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    is_scheduler = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
    if not is_scheduler:
        raise InputError(f"model.base {base}: diffusers knows no scheduler {config.get('_class_name')!r}", MODEL_HINT)
    return kind.from_config(config)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries' own warnings and bars: what matters is checked and said here."""
    before = transformers.logging.get_verbosity(), diffusers.logging.get_verbosity()
    for library in (transformers, diffusers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            transformers.logging.set_verbosity(before[0])
            diffusers.logging.set_verbosity(before[1])
