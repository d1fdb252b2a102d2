"""LoRA: what is attached begins as nothing, computes what the paper says, and is written as diffusers reads it."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdclr.config.schema import LoraSection, ModelSection
from sdclr.errors import InputError
from sdclr.model import adapters, components

LORA = LoraSection(rank=3, alpha=1.5)
PLACE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def parts(model):
    return components.load(ModelSection(base=str(model)))


def attached(module, lora=LORA, seed=5, moved=False):
    adapters.attach(module, lora, seed)
    if moved:
        own = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapters.trained(module):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=own))
    return module


def seen(unet) -> torch.Tensor:
    own = torch.Generator().manual_seed(1)
    noisy, hidden = torch.randn(2, 4, 8, 8, generator=own), torch.randn(2, 16, 16, generator=own)
    with torch.no_grad():
        return unet(noisy, torch.tensor([3, 700]), encoder_hidden_states=hidden).sample


def test_a_run_begins_at_the_untouched_model_and_trains_the_small_matrices_alone(parts):
    before, weights = seen(parts.unet), {k: v.clone() for k, v in parts.unet.state_dict().items()}
    unet = attached(parts.unet)
    assert torch.equal(seen(unet), before)
    trained = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert trained and all(".lora_A." in name or ".lora_B." in name for name in trained)
    frozen = {k.replace(".base_layer", ""): v for k, v in unet.state_dict().items() if ".lora_" not in k}
    assert frozen.keys() == weights.keys()
    assert all(torch.equal(frozen[key], tensor) for key, tensor in weights.items())


@pytest.mark.parametrize(("layers", "wanted"), [("attention", r"attn\d"), ("transformer", "transformer_blocks|proj_")])
def test_the_layers_are_those_that_kohyas_trainer_and_diffusers_scripts_take(parts, layers, wanted):
    """Every matrix of a transformer block; of `attention` those of attentions."""
    matrices = {
        name
        for name, module in parts.unet.named_modules()
        if re.search(wanted, name) and isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    unet = attached(parts.unet, LoraSection(rank=3, layers=layers))
    assert {key.rpartition(".lora_")[0] for key in adapters.weights_of(unet)} == matrices
    text = attached(parts.text_encoder, LoraSection(rank=3, layers=layers))
    each = {"q_proj", "k_proj", "v_proj", "out_proj"} | ({"fc1", "fc2"} if layers == "transformer" else set())
    assert {key.rpartition(".lora_")[0].rpartition(".")[2] for key in adapters.weights_of(text)} == each


def test_the_seed_alone_says_how_it_begins(model):
    def begun(seed):
        unet = attached(components.load(ModelSection(base=str(model))).unet, seed=seed)
        return adapters.weights_of(unet)

    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one = begun(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    same, other = begun(5), begun(6)
    assert all(torch.equal(tensor, same[key]) for key, tensor in one.items())
    assert any(not torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert all((tensor == 0).all() == (".lora_B." in key) for key, tensor in one.items())


def test_it_computes_w_plus_alpha_by_r_times_b_a(parts):
    unet = attached(parts.unet, moved=True)
    layer, x = unet.get_submodule(PLACE), torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    weights = adapters.weights_of(unet)
    a, b = weights[f"{PLACE}.lora_A.weight"], weights[f"{PLACE}.lora_B.weight"]
    by_hand = x @ layer.base_layer.weight.T + 1.5 / 3 * (x @ a.T @ b.T)
    torch.testing.assert_close(layer(x), by_hand)


def test_what_is_trained_can_be_had_and_put_back_and_nothing_else(parts):
    unet = attached(parts.unet, moved=True)
    kept, before = {k: v.clone() for k, v in adapters.weights_of(unet).items()}, seen(unet)
    with torch.no_grad():
        for parameter in adapters.trained(unet):
            parameter.mul_(3)
    assert not torch.equal(seen(unet), before)
    adapters.put(unet, kept)
    assert torch.equal(seen(unet), before)
    with pytest.raises(RuntimeError, match="other layers"):
        adapters.put(unet, {key: kept[key] for key in list(kept)[1:]})
    with pytest.raises(RuntimeError, match="size mismatch"):
        adapters.put(unet, {key: tensor[:1] for key, tensor in kept.items()})


@pytest.mark.parametrize("alpha", [1.5, None])
def test_a_file_gives_back_weights_and_settings_and_merged_they_compute_the_same(parts, model, tmp_path, alpha):
    lora = LoraSection(rank=3, alpha=alpha, layers="attention")
    models = {name: attached(getattr(parts, name), lora, moved=True) for name in ("unet", "text_encoder")}
    weights = {name: adapters.weights_of(module) for name, module in models.items()}
    adapters.save(models, weights, tmp_path)
    read, settings = adapters.read(tmp_path)
    assert settings == dict.fromkeys(weights, lora)
    assert lora.alpha == (alpha or 3.0)
    with safe_open(tmp_path / adapters.FILE, "pt") as file:
        (about,) = file.metadata().values()  # older releases of diffusers make peft's whole config of it
    for part in weights:
        LoraConfig(**{k.partition(".")[2]: v for k, v in json.loads(about).items() if k.startswith(f"{part}.")})
        assert {f"{part}.rank_pattern", f"{part}.alpha_pattern"} <= json.loads(about).keys()
    for part, own in weights.items():
        assert own.keys() == read[part].keys()
        assert all(torch.equal(tensor, read[part][key]) for key, tensor in own.items())

    fresh = components.load(ModelSection(base=str(model)))
    before, names = seen(fresh.unet), fresh.unet.state_dict().keys()
    components.load_trained(fresh, tmp_path)
    assert fresh.unet.state_dict().keys() == names
    assert not adapters.is_attached(fresh.unet)
    assert not torch.allclose(seen(fresh.unet), before, atol=1e-4)
    torch.testing.assert_close(seen(fresh.unet), seen(parts.unet), rtol=1e-4, atol=1e-5)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        ours, theirs = fresh.text_encoder(tokens)[0], parts.text_encoder(tokens)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_files_of_others_and_damaged_ones_are_refused_by_name(parts, xl, tmp_path):
    unet = attached(parts.unet)
    adapters.save({"unet": unet}, {"unet": adapters.weights_of(unet)}, tmp_path)
    file = tmp_path / adapters.FILE
    with pytest.raises(InputError, match=r"does not fit the unet of model\.base"):
        components.load_trained(components.load(ModelSection(base=str(xl))), tmp_path)
    with pytest.raises(InputError, match="has nothing for the text_encoder"):
        components.read_trained(tmp_path, ("unet", "text_encoder"))
    whole = file.read_bytes()
    save_file(load_file(file), file)  # as other trainers write it: with no word of ours
    with pytest.raises(
        InputError, match=f"{adapters.FILE}: is not a LoRA that sdclr has written: it does not say rank"
    ):
        adapters.read(tmp_path)
    file.write_bytes(whole.replace(b"to_out.0", b"to_out.1", 1))
    with pytest.raises(InputError, match=r"sdclr has written: it holds matrices for unet beside \[.*to_out\.1"):
        adapters.read(tmp_path)
    adapters.save({"text_encoder_2": unet}, {"text_encoder_2": adapters.weights_of(unet)}, tmp_path)
    with pytest.raises(InputError, match="it holds matrices for text_encoder_2"):
        adapters.read(tmp_path)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"{adapters.FILE}: cannot be read"):
        adapters.read(tmp_path)


def test_what_does_not_fit_leaves_a_module_as_it_was(parts):
    unet = attached(copy.deepcopy(parts.unet), moved=True)
    weights, before = adapters.weights_of(unet), {k: v.clone() for k, v in parts.unet.state_dict().items()}
    last = list(weights)[-1]
    with pytest.raises(RuntimeError):
        adapters.merge(parts.unet, weights | {last: torch.zeros(1, 1)}, LORA)
    after = parts.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
