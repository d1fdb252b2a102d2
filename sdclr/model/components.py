"""Stable Diffusion's parts: load, freeze, set precision and attention. The only module that knows where weights come from."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdclr.config.schema import ModelSection
from sdclr.errors import InputError, SdclrError

PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
WEIGHTS = {"text_encoder": "model", "vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model"}
"""The stem of each part's weights file in a diffusers folder."""


@dataclasses.dataclass
class Components:
    """The parts of one Stable Diffusion, all in fp32; `noise_scheduler` is the diffusion's, not the learning rate's."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    sampler: Any

    def trainable(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The modules named in `model.train`, in that order."""
        return {name: getattr(self, name) for name in names}

    def pipeline(self) -> StableDiffusionPipeline:
        """The parts as diffusers' pipeline, sharing weights."""
        with quiet_libraries():
            pipeline = StableDiffusionPipeline(
                vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=self.unet, scheduler=self.sampler,
                safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            )  # fmt: skip
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
        """Write the parts as a diffusers folder that `StableDiffusionPipeline.from_pretrained` opens; safetensors only.

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
        problems = _folder_problems(folder)
        if problems:
            raise OSError(problems[0])


def load(config: ModelSection) -> Components:
    """Load every part in fp32 and evaluation mode, nothing trainable yet.

    A local folder or file is never looked up on the hub. Raises InputError naming the missing or misfitting part.
    """
    check(config)
    try:
        with quiet_libraries():
            parts = (
                _from_single_file(config) if config.base.endswith(".safetensors") else _from_folder_or_hub(config.base)
            )
    except SdclrError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"model.base {config.base}: cannot be loaded: {first_line(error)}", hint=_MODEL_HINT
        ) from error
    for module in (parts.text_encoder, parts.vae, parts.unet):
        module.requires_grad_(False).eval()
    _check_shapes(config.base, parts)
    return parts


def skeleton(config: ModelSection) -> Components:
    """The modules that `load` would fill, with no weights and no tokenizer: on torch's meta device they take no memory."""
    check(config)
    base = config.config or config.base
    options: dict[str, Any] = {"local_files_only": Path(base).is_dir()}
    try:
        with quiet_libraries():
            unet, vae = (
                kind.from_config(kind.load_config(base, subfolder=part, **options))
                for kind, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
            )
            text = CLIPTextConfig.from_pretrained(base, subfolder="text_encoder", **options)
            text_encoder = CLIPTextModel(text)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(f"model {base}: its configs cannot be read: {first_line(error)}", hint=_MODEL_HINT) from error
    for module in (unet, vae, text_encoder):
        module.requires_grad_(False).eval()
    nothing: Any = None
    return Components(nothing, text_encoder, vae, unet, nothing, nothing)


def without_weights(model: Any) -> Any:
    """A model of the same kind and config on torch's meta device."""
    with torch.device("meta"), quiet_libraries():
        kind = type(model)
        return kind.from_config(model.config) if hasattr(kind, "from_config") else kind(model.config)


def check(config: ModelSection) -> None:
    """Look at the names and sizes of a local model's files; reads no weights. Raises InputError with every problem."""
    base = config.base
    path = Path(base)
    if base.endswith((".ckpt", ".pt", ".pth", ".bin")):
        raise InputError(
            f"model.base {base}: is a pickle, which can run any code when it is opened, so sdclr never opens one",
            hint="get the .safetensors of the same model, or convert it in a sandbox and name the result",
        )
    if base.endswith(".safetensors"):
        if not path.is_file():
            raise InputError(f"model.base {base}: there is no such file", hint=_MODEL_HINT)
        return
    if path.is_dir():
        found = _folder_problems(path)
        if found:
            raise InputError("\n".join(found), hint=_MODEL_HINT)
    elif path.exists() or not looks_like_hub_id(base):
        raise InputError(
            f"model.base {base}: there is no such folder, and it is not a hub id (owner/name)", hint=_MODEL_HINT
        )


def looks_like_hub_id(name: str) -> bool:
    """Whether a name that is no local path may be looked up on the hub: exactly owner/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None and not Path(name).parts[0].startswith(".")


def prepare_for_training(parts: Components, config: ModelSection, device: torch.device) -> None:
    """Unfreeze what is trained; set gradient checkpointing and the attention kernel. Raises InputError where xformers cannot run."""
    for module in parts.trainable(config.train).values():
        module.requires_grad_(True)
        if config.gradient_checkpointing:
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
    """accelerate's word for the forward pass's precision. Raises InputError where the device cannot compute in it."""
    on_gpu = device.type == "cuda"
    if precision == "auto":
        return "no" if not on_gpu else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if precision == "fp16" and not on_gpu:
        raise InputError(
            f"model.precision: fp16 needs a GPU, and this run computes on {device.type}",
            hint="set model.precision: auto",
        )
    if precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise InputError("model.precision: bf16 is not supported by this GPU", hint="set model.precision: auto")
    return "no" if precision == "fp32" else precision


def load_trained(parts: Components, folder: Path, names: tuple[str, ...]) -> None:
    """Put the weights of a checkpoint's or run's folder into the named parts. Raises InputError where a tensor is missing or does not fit."""
    for name, weights in read_trained(folder, names).items():
        try:
            getattr(parts, name).load_state_dict(weights)
        except RuntimeError as error:
            problems = [line.strip() for line in str(error).splitlines()[1:]]
            raise InputError(
                f"{folder / name}: does not fit the {name} of model.base: {problems[0][:300]}",
                hint="its run was trained from another model: name that one as model.base",
            ) from error


def read_trained(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of the named parts of a checkpoint's or run's folder."""
    return {name: read_weights(folder / name / f"{WEIGHTS[name]}.safetensors") for name in names}


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one safetensors file. Raises InputError when it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a safetensors file is no dict)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from error


def tokenize(parts: Components, captions: list[str]) -> torch.Tensor:
    """Token ids, (captions, tokenizer.model_max_length), padded and cut."""
    tokens = parts.tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=parts.tokenizer.model_max_length,
        return_tensors="pt",
    )
    return tokens.input_ids


def what_encodes(vae: AutoencoderKL) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that latents depend on, by name: the VAE's other half decodes, and need not even be read from disk to train."""
    return ((n, p) for n, p in vae.named_parameters() if not n.startswith(("decoder.", "post_quant_conv.")))


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (batch, 3, h, w) in −1…1 to mean and spread of their latents, each (batch, 4, h/8, w/8), scaled as the UNet sees them."""
    posterior = vae.encode(pixels).latent_dist
    return posterior.mean * vae.config.scaling_factor, posterior.std * vae.config.scaling_factor


def _from_folder_or_hub(base: str) -> Components:
    local = Path(base).is_dir()
    options: dict[str, Any] = {"local_files_only": local}
    weights = {"use_safetensors": True, "output_loading_info": True, **options}
    ours = {**weights, "torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    loaded = {
        "text_encoder": CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.float32, **weights),
        "vae": AutoencoderKL.from_pretrained(base, subfolder="vae", **ours),
        "unet": UNet2DConditionModel.from_pretrained(base, subfolder="unet", **ours),
    }
    for part, (_, info) in loaded.items():
        _refuse_missing(f"{base}: the weights of {part}/", info["missing_keys"])
    return Components(
        tokenizer=CLIPTokenizer.from_pretrained(base, subfolder="tokenizer", **options),
        noise_scheduler=DDPMScheduler.from_pretrained(base, subfolder="scheduler", **options),
        sampler=_sampler(base, **options),
        **{part: module for part, (module, _) in loaded.items()},
    )


def _refuse_missing(where: str, names: Iterable[str]) -> None:
    """The libraries fill what is missing with random numbers, and only warn."""
    missing = sorted(names)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"model.base {where} lack {', '.join(missing[:3])}{more}", hint=_MODEL_HINT)


def _from_single_file(config: ModelSection) -> Components:
    assert config.config is not None  # the schema saw to it
    source = config.config
    local = Path(source).is_dir()
    if not local and not looks_like_hub_id(source):
        raise InputError(
            f"model.config {source}: there is no such folder, and it is not a hub id (owner/name)", hint=_MODEL_HINT
        )
    pipeline = StableDiffusionPipeline.from_single_file(
        config.base,
        config=source,
        local_files_only=local,
        torch_dtype=torch.float32,
        safety_checker=None,
        feature_extractor=None,
    )
    for part in WEIGHTS:
        left = (name for name, tensor in getattr(pipeline, part).state_dict().items() if tensor.is_meta)
        _refuse_missing(f"{config.base}: the weights of its {part}", left)
    return Components(
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        vae=pipeline.vae,
        unet=pipeline.unet,
        noise_scheduler=DDPMScheduler.from_config(pipeline.scheduler.config),
        sampler=pipeline.scheduler,
    )


def _sampler(base: str, **options: Any) -> Any:
    """The sampler that the model's own scheduler_config names."""
    config = DDPMScheduler.load_config(base, subfolder="scheduler", **options)
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if not hasattr(kind, "from_config"):
        raise InputError(f"model.base {base}: diffusers knows no scheduler {config.get('_class_name')!r}", _MODEL_HINT)
    return kind.from_config(config)


def _folder_problems(folder: Path) -> list[str]:
    if not (folder / "model_index.json").is_file():
        return [f"model.base {folder}: is not a diffusers folder (model_index.json is missing)"]
    found = [f"model.base {folder}: its part {part}/ is missing" for part in PARTS if not (folder / part).is_dir()]
    tokenizer = folder / "tokenizer"
    if tokenizer.is_dir() and not any((tokenizer / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        found.append(f"{tokenizer}: has neither tokenizer.json nor vocab.json")
    for part, stem in WEIGHTS.items():
        if not (folder / part).is_dir():
            continue
        if not (folder / part / "config.json").is_file():
            found.append(f"{folder / part}: config.json is missing")
        else:
            found += _json_problems(folder / part / "config.json")
        files = list((folder / part).glob(f"{stem}*.safetensors"))
        if not files:
            pickled = any((folder / part).glob(f"{stem}*.bin"))
            found.append(
                f"{folder / part}: has no {stem}.safetensors"
                + (", only a pickle (.bin), which is never opened" if pickled else "")
            )
        for file in files:
            found += _header_problems(file)
    return found


def _json_problems(path: Path) -> list[str]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        return [f"{path}: is not JSON ({first_line(error)})"]
    return [] if isinstance(value, dict) else [f"{path}: is not a JSON object"]


def _header_problems(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt"):
            return []
    except (OSError, SafetensorError) as error:
        return [f"{path}: is damaged or not safetensors ({first_line(error)})"]


def _check_shapes(base: str, parts: Components) -> None:
    width, wanted = parts.text_encoder.config.hidden_size, parts.unet.config.cross_attention_dim
    if width != wanted:
        raise InputError(
            f"model.base {base}: its text encoder gives {width} numbers a token, its UNet wants {wanted}",
            hint=_MODEL_HINT,
        )
    words, known = len(parts.tokenizer), parts.text_encoder.config.vocab_size
    if words > known:
        raise InputError(
            f"model.base {base}: its tokenizer has {words} tokens, its text encoder knows {known}", hint=_MODEL_HINT
        )
    kind = parts.noise_scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise InputError(
            f"model.base {base}: its scheduler predicts {kind!r}; sdclr trains epsilon and v_prediction models",
            hint=_MODEL_HINT,
        )
    channels, wanted = parts.vae.config.latent_channels, parts.unet.config.in_channels
    if channels != wanted:
        raise InputError(
            f"model.base {base}: its VAE has {channels} latent channels, its UNet takes {wanted} (inpainting and depth models are not supported)",
            hint=_MODEL_HINT,
        )


def first_line(error: BaseException) -> str:
    """What an error says first, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


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


_MODEL_HINT = "model.base takes a diffusers folder, one .safetensors file (with model.config), or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
