"""Is this a model that can be trained? Asked of its files before any weight is read, and of its parts once they are there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from sdclr.config.schema import ModelSection
from sdclr.errors import InputError, first_line
from sdclr.model import adapters

if TYPE_CHECKING:
    from sdclr.model.components import Components

INDEX = "model_index.json"
PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
XL_PARTS = ("tokenizer_2", "text_encoder_2")
"""What SDXL has besides: a second text encoder, which also sums a caption up in one vector (Podell 2023, arXiv 2307.01952, section 2.1)."""
WEIGHTS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
}
"""The stem of each part's weights file in a diffusers folder."""
CONFIGS = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0")
"""Where a single file may take its configs from: Stable Diffusion 1.x, SDXL."""
A_LORA = "is a LoRA, small matrices beside a model's weights; name the model itself"
MODEL_HINT = f"model.base takes a diffusers folder, one .safetensors file (with model.config), or a hub id such as {' or '.join(CONFIGS)}"


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
            raise InputError(f"model.base {base}: there is no such file", hint=MODEL_HINT)
        return
    if path.is_dir():
        found = problems_of(path)
        if found:
            raise InputError("\n".join(found), hint=MODEL_HINT)
    else:
        is_local(base, "model.base")


def is_local(name: str, option: str, hint: str = MODEL_HINT) -> bool:
    """Whether a name is that of a folder, else of a model on the hub. Raises InputError, naming the option, where it can be neither."""
    path = Path(name)
    if path.is_dir():
        return True
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None  # exactly owner/name
    if path.exists() or not is_hub_id:
        raise InputError(f"{option} {name}: there is no such folder, and it is not a hub id (owner/name)", hint=hint)
    return False


def is_xl(index: dict[str, Any]) -> bool:
    """Whether a model_index.json is of SDXL."""
    return _has(index, "text_encoder_2")


def parts_of(index: dict[str, Any]) -> tuple[str, ...]:
    """The folders that a model with this model_index.json has."""
    return (*PARTS, *XL_PARTS) if is_xl(index) else PARTS


def refuse_untrainable(config: ModelSection, source: str, index: Any) -> None:
    """Raise InputError where the model_index.json in `source` is of a model that is not trained here, or not in what the config names."""
    problem = _not_trained(index)
    if problem:
        raise InputError(f"model {source}: {problem}", hint=MODEL_HINT)
    if is_xl(index) and "text_encoder" in config.train:
        raise InputError(
            f"model.train {list(config.train)}: {config.base} is an SDXL, and sdclr trains the UNet of those alone",
            hint="set model.train: [unet]",
        )


def _not_trained(index: Any) -> str | None:
    """Why a model with this model_index.json is not trained here."""
    if not isinstance(index, dict):
        return f"its {INDEX} is not a JSON object"
    named = "sdclr trains Stable Diffusion 1.x, 2.x and SDXL's base model"
    if not _has(index, "unet"):
        return f"its {INDEX} ({index.get('_class_name', 'of no class')}) names no unet; {named}"
    if is_xl(index) and not _has(index, "text_encoder"):
        return f"is SDXL's refiner (its {INDEX} names no text_encoder); {named}"
    second = index.get("text_encoder_2")
    if is_xl(index) and second != ["transformers", "CLIPTextModelWithProjection"]:
        return f"its second text encoder is {second}, and SDXL's is a CLIPTextModelWithProjection; {named}"
    return None


def refuse_other_kind(config: ModelSection, index: dict[str, Any]) -> None:
    """Raise InputError where a single file is SDXL and its model.config is not, or the other way round."""
    with safe_open(config.base, framework="pt") as file:
        names = list(file.keys())
    if any(".lora_" in name or name.startswith("lora_") for name in names):
        raise InputError(f"model.base {config.base}: {A_LORA}", hint=MODEL_HINT)
    second = any(name.startswith("conditioner.embedders.1.") for name in names)
    if second != is_xl(index) and any(name.startswith("model.diffusion_model.") for name in names):
        older = "Stable Diffusion 1.x or 2.x"
        kind, other, such = ("SDXL", older, CONFIGS[1]) if second else (older, "SDXL", CONFIGS[0])
        raise InputError(
            f"model.base {config.base}: is of {kind}, and model.config {config.config} of {other}",
            hint=f"name a model.config of the same kind, such as {such}",
        )


def _has(index: dict[str, Any], part: str) -> bool:
    """Whether a model_index.json names a part; [null, null] says that there is none."""
    named = index.get(part)
    return named is not None and named != [None, None]


def refuse_missing(where: str, names: Iterable[str]) -> None:
    """Raise InputError for weights that a file lacks. The libraries fill what is missing with random numbers, and only warn."""
    missing = sorted(names)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"model.base {where} lack {', '.join(missing[:3])}{more}", hint=MODEL_HINT)


def refuse_misfits(base: str, parts: Components) -> None:
    """Raise InputError where two networks do not fit together by their configs, or the VAE's latents are scaled in a way not done here."""
    _refuse(base, _misfits(parts))


def refuse_odd_tokens_and_noise(base: str, parts: Components) -> None:
    """Raise InputError where tokenizers do not fit the text encoders or one another, or noise is not that of Stable Diffusion."""
    _refuse(base, [*_odd_tokens(parts), *_odd_noise(parts)])


def _refuse(base: str, problems: Iterable[str]) -> None:
    lines = [f"model.base {base}: {problem}" for problem in problems]
    if lines:
        raise InputError("\n".join(lines), hint=MODEL_HINT)


def _misfits(parts: Components) -> Iterator[str]:
    unet, vae, second = parts.unet.config, parts.vae.config, parts.text_encoder_2
    told, wanted = unet.addition_embed_type, "text_time" if parts.is_xl else None
    if told != wanted:
        yield f"its UNet is told {told or 'nothing'} besides the caption, and sdclr would tell it {wanted or 'nothing'}"
    elif second is not None:
        size = second.config.projection_dim + 6 * unet.addition_time_embed_dim
        if size != unet.projection_class_embeddings_input_dim:
            yield f"its second text encoder and six sizes give {size} numbers a caption, its UNet wants {unet.projection_class_embeddings_input_dim}"
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if unet.get(key) is not None:
            yield f"its UNet wants to be told more than Stable Diffusion's ({key}: {unet[key]})"
    width = sum(encoder.config.hidden_size for encoder in parts.text_encoders)
    if width != unet.cross_attention_dim:
        its = "its text encoders give" if parts.is_xl else "its text encoder gives"
        yield f"{its} {width} numbers a token, its UNet wants {unet.cross_attention_dim}"
    channels = vae.latent_channels
    if channels != unet.in_channels:
        yield f"its VAE has {channels} latent channels, its UNet takes {unet.in_channels} (inpainting and depth models are not supported)"
    if vae.get("latents_mean") or vae.get("latents_std"):
        yield "its VAE shifts each channel of the latents (latents_mean, latents_std), which sdclr does not do"


def _odd_tokens(parts: Components) -> Iterator[str]:
    for which, tokenizer, encoder in zip(("", "second "), parts.tokenizers, parts.text_encoders, strict=False):
        words, known = len(tokenizer), encoder.config.vocab_size
        if words > known:
            yield f"its {which}tokenizer has {words} tokens, its {which}text encoder knows {known}"
        length, most = tokenizer.model_max_length, encoder.config.max_position_embeddings
        if length > most:
            cut = (
                f"cuts captions at {length} tokens"
                if length < 10**6
                else "cuts captions nowhere (tokenizer_config.json has no model_max_length)"
            )
            yield f"its {which}tokenizer {cut}, its {which}text encoder holds {most}"
    lengths = [str(tokenizer.model_max_length) for tokenizer in parts.tokenizers]
    if len(set(lengths)) > 1:
        yield f"its tokenizers cut captions at {' and '.join(lengths)} tokens, and its UNet wants both alike"


def _odd_noise(parts: Components) -> Iterator[str]:
    kind = parts.noise_scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        yield f"its scheduler predicts {kind!r}; sdclr trains epsilon and v_prediction models"
    if not hasattr(parts.sampler.config, "beta_schedule"):
        yield f"its scheduler {type(parts.sampler).__name__} has no beta_schedule; sdclr trains models with one"


def problems_of(folder: Path) -> list[str]:
    """What is missing or damaged in a diffusers folder, a line each."""
    if not (folder / INDEX).is_file() and (folder / adapters.FILE).is_file():
        return [f"model.base {folder}: {A_LORA}"]
    if not (folder / INDEX).is_file():
        return [f"model.base {folder}: is not a diffusers folder ({INDEX} is missing)"]
    found = _json_problems(folder / INDEX)
    if found:
        return found
    index = json.loads((folder / INDEX).read_bytes())
    problem = _not_trained(index)
    if problem:
        return [f"model.base {folder}: {problem}"]
    parts = parts_of(index)
    found = [f"model.base {folder}: its part {part}/ is missing" for part in parts if not (folder / part).is_dir()]
    for part in (part for part in parts if (folder / part).is_dir()):
        if part.startswith("tokenizer"):
            if not any((folder / part / name).is_file() for name in ("tokenizer.json", "vocab.json")):
                found.append(f"{folder / part}: has neither tokenizer.json nor vocab.json")
        elif part in WEIGHTS:
            found += _weights_problems(folder / part, WEIGHTS[part])
    return found


def _weights_problems(folder: Path, stem: str) -> list[str]:
    config = folder / "config.json"
    found = _json_problems(config) if config.is_file() else [f"{folder}: config.json is missing"]
    files = list(folder.glob(f"{stem}*.safetensors"))
    if not files:
        pickled = any(folder.glob("*.bin"))
        only = ", only a pickle (.bin), which is never opened" if pickled else ""
        found.append(f"{folder}: has no {stem}.safetensors{only}")
    return [*found, *(problem for file in files for problem in _header_problems(file))]


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
