"""Loading: a sound model in every layout, and one clear sentence for each kind of unsound one."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdclr.config.schema import ModelSection
from sdclr.errors import InputError
from sdclr.model import checks, components, encoders
from sdclr.model.single_file import original_layout

UNET = "unet/diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")
PARTS, WEIGHTS = checks.PARTS, {part: checks.WEIGHTS[part] for part in ("text_encoder", "vae", "unet")}
"""Of Stable Diffusion 1 and 2; for SDXL see test_xl.py."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing here may reach out: a look-up on the hub would fail the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return shutil.copytree(model, tmp_path / "copy")


def section(base: object, **more: object) -> ModelSection:
    return ModelSection(base=str(base), **more)  # type: ignore[arg-type]


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(base: Path | str, match: str, **more: object) -> InputError:
    with pytest.raises(InputError, match=match) as problem:
        components.load(section(base, **more))
    assert problem.value.exit_code == 2
    assert "\n" not in problem.value.message or len(problem.value.message.splitlines()) < 8
    return problem.value


# Folders ----------------------------------------------------------------------------------------------------------------------------


def test_every_part_is_loaded_as_stored_in_fp32_frozen_and_in_evaluation_mode(model):
    parts = components.load(section(model))
    for name, stem in WEIGHTS.items():
        module, stored = getattr(parts, name), load_file(model / name / f"{stem}.safetensors")
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
        assert all(p.dtype == torch.float32 for p in module.parameters())
        assert len(stored) == len(module.state_dict())
        values = sorted(float(t.double().sum()) for t in module.state_dict().values())
        assert values == pytest.approx(sorted(float(t.double().sum()) for t in stored.values()))
    assert type(parts.sampler).__name__ == "DDIMScheduler"
    assert parts.noise_scheduler.config.num_train_timesteps == 1000
    assert parts.noise_scheduler.config.prediction_type == "epsilon"


def test_weights_stored_in_fp16_are_trained_in_fp32(copy):
    for name, stem in WEIGHTS.items():
        path = copy / name / f"{stem}.safetensors"
        save_file({k: v.half() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    parts = components.load(section(copy))
    for name in WEIGHTS:
        assert {p.dtype for p in getattr(parts, name).parameters()} == {torch.float32}


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(copy, part):
    shutil.rmtree(copy / part)
    problem = refused(copy, f"its part {part}/ is missing")
    assert "model.base takes a diffusers folder" in str(problem.hint)


def test_all_missing_parts_are_named_at_once(copy):
    shutil.rmtree(copy / "unet"), shutil.rmtree(copy / "vae")
    (copy / "text_encoder" / "config.json").unlink()
    message = refused(copy, "unet/ is missing").message
    assert "vae/ is missing" in message
    assert "text_encoder: config.json is missing" in message


def test_a_folder_that_is_no_diffusers_folder_is_refused(pictures):
    refused(pictures, r"model_index\.json is missing")


@pytest.mark.parametrize(
    ("name", "damage", "match"),
    [
        (UNET, lambda b: b[:-1000], "unet/diffusion_pytorch_model.safetensors: is damaged"),
        (UNET, lambda b: b"", "unet/diffusion_pytorch_model.safetensors: is damaged"),
        ("vae/config.json", lambda b: b[:-5], "vae/config.json: is not JSON"),
        ("scheduler/scheduler_config.json", lambda b: b[:-5], "cannot be loaded"),
        ("scheduler/scheduler_config.json", lambda b: b.replace(b"DDIMScheduler", b"FooScheduler"), "FooScheduler"),
        ("tokenizer/tokenizer.json", lambda b: b[:50], "cannot be loaded"),
        ("unet/config.json", lambda b: b"[]", "unet/config.json"),
    ],
    ids=["cut weights", "empty weights", "cut config", "cut scheduler", "unknown scheduler", "cut tokenizer", "list"],
)
def test_a_damaged_file_is_an_input_error(copy, name, damage, match):
    (copy / name).write_bytes(damage((copy / name).read_bytes()))
    refused(copy, match)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_a_tensor_are_refused_and_never_filled_with_chance(copy, part):
    path = copy / part / f"{WEIGHTS[part]}.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    problem = refused(copy, "lack")
    assert part in problem.message
    assert name.split(".")[-2] in problem.message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_tensor_of_another_shape_is_refused(copy, part):
    path = copy / part / f"{WEIGHTS[part]}.safetensors"
    tensors = load_file(path)
    name = next(k for k in sorted(tensors) if tensors[k].ndim == 1)
    tensors[name] = torch.zeros(len(tensors[name]) + 1)
    save_file(tensors, path, metadata={"format": "pt"})
    refused(copy, "cannot be loaded")


def test_a_text_encoder_that_does_not_fit_the_unet_is_refused_with_both_widths(copy):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig.from_pretrained(copy / "text_encoder")
    config.hidden_size = 24
    CLIPTextModel(config).save_pretrained(copy / "text_encoder")
    refused(copy, "its text encoder gives 24 numbers a token, its UNet wants 16")


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_knows_is_refused(copy):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(copy / "tokenizer")
    known = len(tokenizer)
    tokenizer.add_tokens(["<mochi>"])
    tokenizer.save_pretrained(copy / "tokenizer")
    refused(copy, f"its tokenizer has {known + 1} tokens, its text encoder knows {known}")


def test_an_inpainting_unet_is_refused_with_both_channel_counts(copy):
    from diffusers import UNet2DConditionModel

    config = dict(UNet2DConditionModel.load_config(copy / "unet"))
    UNet2DConditionModel.from_config(config | {"in_channels": 9}).save_pretrained(copy / "unet")
    refused(copy, "its VAE has 4 latent channels, its UNet takes 9")


def test_a_model_that_predicts_neither_noise_nor_velocity_is_refused_when_it_is_loaded(copy):
    edit(copy / "scheduler" / "scheduler_config.json", prediction_type="sample")
    refused(copy, "'sample'")


# Pickles and names ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_a_pickle_is_refused_unopened(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"never read")
    path.chmod(0)
    refused(path, "is a pickle, which can run any code")


def test_a_folder_whose_weights_are_pickled_is_refused_unopened(copy, monkeypatch):
    def opened(*args: object, **kwargs: object) -> None:
        raise AssertionError("a pickle was opened")

    torch.save(load_file(copy / UNET), copy / "unet" / "diffusion_pytorch_model.bin")
    (copy / UNET).unlink()
    monkeypatch.setattr(torch, "load", opened)
    refused(copy, r"has no diffusion_pytorch_model\.safetensors, only a pickle \(\.bin\)")


def test_pickles_beside_safetensors_are_never_opened(copy, monkeypatch):
    def opened(*args: object, **kwargs: object) -> None:
        raise AssertionError("a pickle was opened")

    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    (copy / "text_encoder" / "pytorch_model.bin").write_bytes(b"never read")
    monkeypatch.setattr(torch, "load", opened)
    components.load(section(copy))


def test_a_local_folder_that_looks_like_a_hub_id_is_read_from_the_disk(copy, monkeypatch):
    monkeypatch.chdir(copy.parent.parent)
    name = f"{copy.parent.name}/{copy.name}"
    assert checks.is_local(name, "model.base")
    assert components.load(section(name)).unet.config.cross_attention_dim == 16


def test_an_incomplete_local_folder_that_looks_like_a_hub_id_is_not_looked_up(copy, monkeypatch):
    (copy / "tokenizer" / "tokenizer.json").unlink()
    monkeypatch.chdir(copy.parent.parent)
    refused(Path(f"{copy.parent.name}/{copy.name}"), r"tokenizer: has neither tokenizer\.json nor vocab\.json")


@pytest.mark.parametrize("name", ["./a/b", "../a", "/a/b", "a/b/c", "a", ".a/b", "a/", "runs/x/final", "a b/c"])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(name):
    refused(name, "there is no such folder")


@pytest.mark.parametrize(
    "name", ["stable-diffusion-v1-5/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-4", "a/b.c_d"]
)
def test_owner_and_name_look_like_a_hub_id(name):
    assert not checks.is_local(name, "model.base")


# One file ---------------------------------------------------------------------------------------------------------------------------


def test_a_missing_or_damaged_single_file_is_refused(tmp_path, model):
    refused(tmp_path / "model.safetensors", "there is no such file", config=str(model))
    (tmp_path / "model.safetensors").write_bytes(b"no tensors at all")
    refused(tmp_path / "model.safetensors", "cannot be loaded", config=str(model))


def ldm_layout(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a diffusers folder as in v1-5-pruned.safetensors; whether the names are right, diffusers' reader says."""
    return original_layout(components.load(section(folder)), "fp32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_single_file_in_the_layout_of_sd_1_loads_offline_and_computes_what_the_folder_does(model, tmp_path, dtype):
    save_file({k: v.to(dtype) for k, v in ldm_layout(model).items()}, tmp_path / "model.safetensors")
    folder = components.load(section(model))
    single = components.load(section(tmp_path / "model.safetensors", config=str(model)))
    for name in WEIGHTS:
        ours, theirs = getattr(single, name).state_dict(), getattr(folder, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert {tensor.dtype for tensor in ours.values() if tensor.is_floating_point()} == {torch.float32}
        assert all(torch.equal(ours[key], tensor.to(dtype).to(tensor.dtype)) for key, tensor in theirs.items())
    if dtype == torch.float32:
        draw = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
        images = [
            p.pipeline()("disc", generator=torch.Generator().manual_seed(1), **draw).images for p in (single, folder)
        ]
        assert (images[0] == images[1]).all()
    assert single.noise_scheduler.config.prediction_type == "epsilon"
    assert encoders.tokenize(single, ["disc 1"]).tolist() == encoders.tokenize(folder, ["disc 1"]).tolist()


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."])
def test_a_single_file_that_lacks_a_tensor_is_refused(model, tmp_path, prefix):
    tensors = ldm_layout(model)
    del tensors[next(key for key in sorted(tensors, reverse=True) if key.startswith(prefix) and "weight" in key)]
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "lack|cannot be loaded", config=str(model))


def test_a_single_file_with_a_config_that_is_not_there_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "model.config nowhere: there is no such folder", config="nowhere")


# Precision and attention --------------------------------------------------------------------------------------------------------------


def test_precision_is_fp32_on_the_cpu_and_fp16_is_refused_there():
    assert components.mixed_precision("auto", CPU) == "no"
    assert components.mixed_precision("fp32", CPU) == "no"
    assert components.mixed_precision("bf16", CPU) == "bf16"
    with pytest.raises(InputError, match="fp16 needs a GPU, and this run computes on cpu") as problem:
        components.mixed_precision("fp16", CPU)
    assert "precision: auto" in str(problem.value.hint)


def test_xformers_asked_for_by_name_is_refused_on_the_cpu(model):
    unet = components.load(section(model)).unet
    with pytest.raises(InputError, match="xformers needs an NVIDIA GPU, and this run computes on cpu") as problem:
        components.set_attention(unet, "xformers", CPU)
    assert "model.attention: sdpa" in str(problem.value.hint)


@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_attention_is_torchs_scaled_dot_product(model, name):
    unet = components.load(section(model)).unet
    components.set_attention(unet, name, CPU)
    assert {type(p).__name__ for p in unet.attn_processors.values()} == {"AttnProcessor2_0"}


@pytest.mark.parametrize("train", [("unet",), ("unet", "text_encoder")])
def test_what_is_trained_is_unfrozen_and_nothing_else(model, train):
    config = section(model, train=train)
    parts = components.load(config)
    components.prepare_for_training(parts, config, CPU)
    for name in ("unet", "text_encoder", "vae"):
        assert {p.requires_grad for p in getattr(parts, name).parameters()} == {name in train}


# Text, pixels, weights ----------------------------------------------------------------------------------------------------------------


def test_captions_are_padded_and_cut_to_the_models_length(model):
    parts = components.load(section(model))
    tokens = encoders.tokenize(parts, ["", "disc", "a" * 100])[:, 0]
    start, end = parts.tokenizer.bos_token_id, parts.tokenizer.eos_token_id
    assert tokens.shape == (3, 16)
    assert tokens[:, 0].tolist() == [start] * 3
    assert tokens[0, 1:].tolist() == [end] * 15
    assert tokens[2, -1] == end
    assert end not in tokens[2, :-1].tolist()


def test_trained_weights_laid_over_the_parts_must_fit(model, copy):
    parts = components.load(section(model))
    tensors = {name: tensor + 1 for name, tensor in load_file(copy / UNET).items()}
    save_file(tensors, copy / UNET, metadata={"format": "pt"})
    components.load_trained(parts, copy)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in parts.unet.state_dict().items())
    save_file({k: v for k, v in tensors.items() if "conv_in" not in k}, copy / UNET, metadata={"format": "pt"})
    with pytest.raises(InputError, match="conv_in"):
        components.load_trained(parts, copy)


def test_a_part_that_the_model_does_not_have_is_no_traceback(model, xl, tmp_path):
    other = shutil.copytree(xl, tmp_path / "other")
    shutil.rmtree(other / "text_encoder")
    with pytest.raises(InputError, match=r"does not fit the unet of model\.base"):
        components.load_trained(components.load(section(model)), other, besides=("vae",))


def test_a_saved_pipeline_loads_again_with_the_same_weights_and_holds_safetensors_alone(model, tmp_path):
    parts = components.load(section(model))
    parts.save_pipeline(tmp_path / "saved")
    again = components.load(section(tmp_path / "saved"))
    for name in WEIGHTS:
        ours, theirs = getattr(parts, name).state_dict(), getattr(again, name).state_dict()
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    assert {p.suffix for p in (tmp_path / "saved").rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_a_lora_is_no_model(tmp_path, model):
    save_file({"unet.down.lora_A.weight": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    refused(tmp_path, "is a LoRA, small matrices beside a model's weights; name the model itself")
    save_file({"lora_unet_down.lora_down.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="is a LoRA"):
        components.load(ModelSection(base=str(tmp_path / "x.safetensors"), config=str(model)))


def test_weights_that_have_no_place_are_named_by_whoever_loads(copy):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"conv_extra.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    assert components.load(section(copy)).unused == ("unet/conv_extra.weight",)


def test_what_is_no_scheduler_is_refused(copy):
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("DDIMScheduler", "AutoencoderKL"))
    refused(copy, "diffusers knows no scheduler 'AutoencoderKL'")
