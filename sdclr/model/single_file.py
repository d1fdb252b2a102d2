"""A model as one .safetensors file, under the names that its first authors gave its weights: CompVis those of Stable Diffusion 1 (2022),
Stability those of SDXL (2023), OpenCLIP those of the text encoders of 2.x and of SDXL's second. It is what A1111, Forge and ComfyUI open.

diffusers reads such files and does not write them; the tests hold every name to its reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sdclr.config.schema import LoraSection
from sdclr.errors import InputError
from sdclr.model import adapters
from sdclr.model.components import DTYPES, Components

State = dict[str, torch.Tensor]

UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.attentions.0": "mid.attn_1", "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", ".resnets.": ".block.", "downsamplers.0": "downsample",
    "upsamplers.0": "upsample", "down_blocks": "down", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight", "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks", "final_layer_norm": "ln_final", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
"""diffusers' and transformers' names, and those of the single file."""
LORA_PARTS = {"unet": "lora_unet", "text_encoder": "lora_te"}
LORA_MATRICES = {"A.weight": "down.weight", "B.weight": "up.weight"}
LAYERS_OF_SD2 = 24
"""Of 2.x's text encoder the last layer is never computed, and diffusers' folders do not have it; the published files do."""
ARCHITECTURES = {
    "Stable Diffusion 1.x": "stable-diffusion-v1", "Stable Diffusion 2.x": "stable-diffusion-v2", "SDXL": "stable-diffusion-xl-v1-base",
}  # fmt: skip
KOHYAS = {"Stable Diffusion 1.x": "sd_v1", "Stable Diffusion 2.x": "sd_v2", "SDXL": "sdxl_base_v1-0"}
"""What ModelSpec and kohya's trainer call the families."""


def original_layout(parts: Components, precision: str) -> State:
    """All weights by their names in a single file, as `precision` (fp16, bf16, fp32).

    Raises InputError where a weight is too large for the precision.
    """
    found = {f"model.diffusion_model.{name}": tensor for name, tensor in _unet(parts.unet.state_dict())}
    found |= {f"first_stage_model.{name}": tensor for name, tensor in _vae(parts.vae.state_dict())}
    first = _bare(parts.text_encoder)
    if parts.is_xl:
        found |= {f"conditioner.embedders.0.transformer.text_model.{name}": tensor for name, tensor in first.items()}
        second = _open_clip(_bare(parts.text_encoder_2))
        found |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    elif parts.kind == "Stable Diffusion 2.x":
        found |= {f"cond_stage_model.model.{name}": tensor for name, tensor in _of_sd2(_open_clip(first)).items()}
    else:
        found |= {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in first.items()}
    return {name: _as(precision, name, tensor) for name, tensor in found.items()} | _marks(parts)


def lora_layout(
    parts: Components, weights: dict[str, State], settings: dict[str, LoraSection], precision: str
) -> State:
    """A LoRA of a model (whose own weights are not looked at), by part, under the names that kohya's trainer gives such files, which
    A1111, Forge, ComfyUI and diffusers read: diffusers' names, but those of SDXL's UNet, which are Stability's.

    Raises InputError where a weight is too large for the precision.
    """
    unet = parts.unet.state_dict()
    theirs = dict(zip(unet, (name for name, _ in _unet(unet)), strict=True)) if parts.is_xl else {}
    found: State = {}
    for part, own in weights.items():
        for key, tensor in own.items():
            layer, _, matrix = adapters.name_in_files(part, key).rpartition(".lora_")
            layer = theirs.get(f"{layer}.weight", layer).removesuffix(".weight")
            name = f"{LORA_PARTS[part]}_{layer.replace('.', '_')}"
            found[f"{name}.lora_{LORA_MATRICES[matrix]}"] = _as(precision, key, tensor)
            found[f"{name}.alpha"] = torch.tensor(settings[part].alpha)
    return found


def about(parts: Components, title: str, resolution: int) -> dict[str, str]:
    """What a reader may want to know of a model, as the file's metadata (Stability's ModelSpec 1.0)."""
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}[parts.noise_scheduler.config.prediction_type]
    return _spec(parts, title, resolution, prediction_type=prediction)


def about_lora(parts: Components, title: str, resolution: int, lora: LoraSection) -> dict[str, str]:
    """The same of a LoRA of a model, and by kohya's keys, by which A1111 knows what model it is for."""
    kohyas = {"base_model_version": KOHYAS[parts.kind], "v2": parts.kind == "Stable Diffusion 2.x", "network_module": "networks.lora",
              "network_dim": lora.rank, "network_alpha": lora.alpha}  # fmt: skip
    spec = _spec(parts, title, resolution, architecture=f"{ARCHITECTURES[parts.kind]}/lora")
    return spec | {f"ss_{key}": str(value) for key, value in kohyas.items()}


def _spec(parts: Components, title: str, resolution: int, **more: str) -> dict[str, str]:
    spec = {"sai_model_spec": "1.0.0", "architecture": ARCHITECTURES[parts.kind], "implementation": "sgm" if parts.is_xl else "ldm",
            "title": title, "resolution": f"{resolution}x{resolution}", **more}  # fmt: skip
    return {"format": "pt", **{f"modelspec.{key}": value for key, value in spec.items()}}


def _marks(parts: Components) -> State:
    """Tensors without content, by whose names ComfyUI and Forge know what an SDXL that is not the first one predicts, from what noise."""
    scheduler = parts.noise_scheduler.config
    marks = {"v_pred": scheduler.prediction_type == "v_prediction", "ztsnr": scheduler.get("rescale_betas_zero_snr")}
    return {name: torch.empty(0) for name, wanted in marks.items() if wanted and parts.is_xl}


def _as(precision: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    found = tensor.detach().cpu().to(DTYPES[precision]).contiguous()
    if torch.isfinite(found).all():
        return found
    if torch.isfinite(tensor).all():
        raise InputError(
            f"{name}: holds numbers too large for {precision}", hint="export it with --precision bf16 or fp32"
        )
    raise InputError(f"{name}: holds numbers that are not finite", hint="export another state of the run")


def _unet(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """A block's layers are numbered through: each ResNet begins a new one, an attention follows in the same, and what changes the size is
    one of its own on the way down and the last part of the last one on the way up."""
    resnets = [name.split(".")[1:4:2] for name in state if name.startswith("down_blocks") and ".resnets." in name]
    layers = 1 + 1 + max(int(number) for _, number in resnets)
    with_attention = {name.split(".")[1] for name in state if name.startswith("up_blocks") and ".attentions." in name}
    for name, tensor in state.items():
        side, block, kind, number, *rest = [*name.split("."), "", "", ""]
        rest_ = ".".join(filter(None, rest))
        if side == "down_blocks" and kind == "downsamplers":
            place = f"input_blocks.{(int(block) + 1) * layers}.0.op.{rest_.removeprefix('conv.')}"
        elif side == "up_blocks" and kind == "upsamplers":
            place = f"output_blocks.{(int(block) + 1) * layers - 1}.{2 if block in with_attention else 1}.{rest_}"
        elif side in ("down_blocks", "up_blocks"):
            first = int(block) * layers + (side == "down_blocks")
            stem = "input" if side == "down_blocks" else "output"
            place = f"{stem}_blocks.{first + int(number)}.{int(kind == 'attentions')}.{rest_}"
        else:
            place = name
        yield _renamed(_renamed(place, UNET), RESNET if ".resnets." in name else {}), tensor


def _vae(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """Blocks of the decoder are counted from the other end; what attention multiplies with is a convolution of one pixel."""
    last = max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up_blocks."))
    for name, tensor in state.items():
        if name.startswith("decoder.up_blocks."):
            block = name.split(".")[2]
            name = name.replace(f"up_blocks.{block}.", f"up.{last - int(block)}.")
        is_matrix = ".attentions." in name and tensor.ndim == 2
        yield _renamed(name, VAE), tensor[:, :, None, None] if is_matrix else tensor


def _bare(text_encoder: Any) -> State:
    return {name.removeprefix("text_model."): tensor for name, tensor in text_encoder.state_dict().items()}


def _open_clip(state: State) -> State:
    """Its queries, keys and values are one matrix, and its projection lies on its side."""
    found: State = {}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif ".q_proj." in name:
            three = torch.cat([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            place, _, kind = _renamed(name, OPEN_CLIP).partition(".self_attn.q_proj.")
            found[f"{place}.attn.in_proj_{kind}"] = three
        elif ".k_proj." not in name and ".v_proj." not in name:
            found[_renamed(name, OPEN_CLIP)] = tensor
    return found


def _of_sd2(state: State) -> State:
    """With a last layer that stands there for its name alone."""
    missing, given = (f"transformer.resblocks.{LAYERS_OF_SD2 - i}." for i in (1, 2))
    if any(name.startswith(missing) for name in state):
        return state
    return state | {name.replace(given, missing): t.clone() for name, t in state.items() if name.startswith(given)}


def _renamed(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name
