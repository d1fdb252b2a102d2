"""LoRA: beside each chosen matrix W of a model two small ones are trained, and W + α/r·BA computes in its place (Hu 2021, arXiv
2106.09685, section 4.1). B begins as zero, so a run begins at the untouched model.

The rest of the program asks here for what is trained of a module, and does not know whether that is all of it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.loaders.lora_pipeline import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, LoraModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sdclr.config.schema import LoraSection
from sdclr.errors import InputError, first_line
from sdclr.seeding import generator

Weights = dict[str, torch.Tensor]
FILE = LORA_WEIGHT_NAME_SAFE
"""The file's name that diffusers' load_lora_weights looks for in a folder."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "fc1", "fc2")
LAYERS = {"attention": ATTENTION, "transformer": (*ATTENTION, *FEED_FORWARD)}
"""Of UNets and of CLIPs; of their transformer blocks nothing else is a matrix."""
TRAINABLE = ("unet", "text_encoder")
TEXT_MODEL = "text_model."
"""What CLIP's weights are called by in such files, and no longer in recent releases of transformers."""


def attach(module: Any, lora: LoraSection, seed: int) -> None:
    """Freeze a module's weights and put fp32 matrices beside them, whose A is drawn from the seed (as peft draws it)."""
    module.requires_grad_(False)
    # Made without numbers, or peft would give them the weights' precision. It looks for torch's meta device, which fake tensors
    # (engine.memory counts on them) do not admit to be on.
    with unset_fake_temporarily():
        inject_adapter_in_model(_config(lora), module, low_cpu_mem_usage=True)
    own = generator(seed, "lora", type(module).__name__)
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False  # autocast does that, and needs no copy in fp32 for it
            place, a, b = layer.get_base_layer().weight.device, layer.lora_A["default"], layer.lora_B["default"]
            for matrix in (a, b):
                matrix.weight = torch.nn.Parameter(torch.zeros(matrix.weight.shape, device=place))
            torch.nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5), generator=own)


def trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that are trained: all of them, or those that are attached."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def weights_of(module: Any) -> Weights:
    """What is trained of a module, by name; shares memory with it."""
    if not is_attached(module):
        weights: Weights = module.state_dict()
        return weights
    return {name.removeprefix(TEXT_MODEL): tensor for name, tensor in _matrices(module).items()}


def put(module: Any, weights: Weights) -> None:
    """The inverse of `weights_of`. Raises RuntimeError where a tensor is missing or does not fit."""
    if not is_attached(module):
        module.load_state_dict(weights)
        return
    names = {name.removeprefix(TEXT_MODEL): name for name in _matrices(module)}
    if weights.keys() != names.keys():
        raise RuntimeError("they are of other layers")
    set_peft_model_state_dict(module, {names[key]: tensor for key, tensor in weights.items()})


def is_attached(module: Any) -> bool:
    return hasattr(module, "peft_config")


def attached(module: Any) -> int:
    """How many weights are attached to a module."""
    return sum(tensor.numel() for tensor in weights_of(module).values()) if is_attached(module) else 0


def save(models: dict[str, Any], weights: dict[str, Weights], folder: Path) -> None:
    """Write what is attached to some models, by name, into the one file that diffusers' load_lora_weights reads."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {f"{part}.{key}": value for part, model in models.items() for key, value in _settings(model).items()}
    tensors = {
        f"{part}.{name_in_files(part, key)}": tensor.detach().cpu().contiguous()
        for part in models
        for key, tensor in weights[part].items()
    }
    # Of several keys of metadata safetensors writes now this one first, now that: the same run would leave other bytes.
    save_file(tensors, folder / FILE, metadata={LORA_ADAPTER_METADATA_KEY: json.dumps(about)})


def read(folder: Path) -> tuple[dict[str, Weights], dict[str, LoraSection]]:
    """What `save` has written: the weights by part, and their settings. Raises InputError when it is damaged, or another's."""
    path = folder / FILE
    found: dict[str, Weights] = {}
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                part, _, name = key.partition(".")
                found.setdefault(part, {})[name.removeprefix(TEXT_MODEL)] = file.get_tensor(key)
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from error
    return found, {part: _section(path, about, part) for part in found}


def merge(module: Any, weights: Weights, lora: LoraSection) -> None:
    """Add to a module's weights what was trained beside them. Raises RuntimeError, and adds nothing, where that does not fit."""
    over = LoraModel(module, _config(lora), "default")
    fits = False
    try:
        put(module, weights)
        fits = True
    finally:
        if fits:
            over.merge_and_unload()
        else:
            over.unload()
        vars(module).pop("peft_config", None)  # which some releases of peft leave there


def _matrices(module: Any) -> Weights:
    return get_peft_model_state_dict(module, save_embedding_layers=False)


def _config(lora: LoraSection) -> LoraConfig:
    assert lora.rank is not None
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(LAYERS[lora.layers]))


def _settings(model: Any) -> dict[str, Any]:
    """peft's settings of what is attached, as diffusers keeps them beside the weights; older releases ask for the last two."""
    config = model.peft_config["default"]
    own = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
    return own | {"rank_pattern": {}, "alpha_pattern": {}}


def _section(path: Path, about: dict[str, Any], part: str) -> LoraSection:
    rank, alpha, beside = (about.get(f"{part}.{key}") for key in ("r", "lora_alpha", "target_modules"))
    layers = next((name for name, suffixes in LAYERS.items() if sorted(suffixes) == beside), None)
    if part not in TRAINABLE or layers is None:
        what = f"it holds matrices for {part} beside {beside}" if beside else "it does not say rank, alpha and layers"
        raise InputError(f"{path}: is not a LoRA that sdclr has written: {what}")
    return LoraSection(rank=rank, alpha=alpha, layers=layers)


def name_in_files(part: str, key: str) -> str:
    """What a weight is called by in files, whatever transformers calls it."""
    return TEXT_MODEL + key if part == "text_encoder" else key
