"""Memory counted on shapes: it sees what a step keeps, is linear in the batch, and follows the settings that save some."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sdclr.config import source
from sdclr.engine import memory
from sdclr.engine.plan import read_inputs
from sdclr.engine.run import Run
from sdclr.model import adapters

CPU = torch.device("cpu")


def needs_of(path, *overrides: str, held_out: int = 2, only: int | None = None) -> memory.Needs:
    return memory.count(source.load(path, overrides).config, 8, held_out, CPU, only=only)


def test_one_batch_counted_alone_is_what_the_line_through_two_others_says(config):
    assert needs_of(config(), only=16).at(16) == needs_of(config()).at(16)


def test_weights_optimizer_and_encoders_are_counted_to_the_byte(config, run):
    needs = needs_of(config())
    weights = sum(p.numel() * 4 for p in run.modules["unet"].parameters())
    assert needs.parts["weights"] == needs.parts["copy"] == weights
    assert needs.parts["optimizer"] == 2 * weights
    frozen = [*run.parts.vae.parameters(), *run.parts.text_encoder.parameters()]
    assert needs.parts["encoders"] == pytest.approx(4 * sum(p.numel() for p in frozen), rel=0.01)  # position ids
    held = [run.train, run.held_out, run.stabilised]
    tensors = [tensor for e in held for tensor in (*e.mean, *e.std, e.captions["encoder_hidden_states"])]
    assert needs.parts["data"] == 4 * sum(tensor.numel() for tensor in tensors)


def test_of_a_lora_what_is_trained_is_small_and_the_rest_in_the_forwards_precision(config):
    path = config("lora: {rank: 2}")
    loaded = source.load(path)
    unet = Run(loaded.config, read_inputs(loaded)).modules["unet"]
    small = 4 * sum(p.numel() for p in adapters.trained(unet))
    whole = 4 * sum(p.numel() for p in unet.parameters()) - small
    needs = needs_of(path)
    assert needs.parts["weights"] == small + whole
    assert (needs.trained_bytes, needs.parts["copy"], needs.parts["optimizer"]) == (small, small, 2 * small)
    assert needs.side_by_side().parts["exchange"] == small
    layers = [layer for layer in unet.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    saved = 2 * sum(p.numel() for layer in layers for p in layer.parameters() if not p.requires_grad)
    assert needs_of(path, "model.precision=bf16").parts["weights"] == small + whole - saved < 0.6 * whole
    left = [n.training.fixed[-1] + n.training.each[-1] for n in (needs, needs_of(config(name="other.yaml")))]
    assert left[0] < small + whole / 10 < whole <= left[1]  # the gradients that a step ends with


def test_a_step_ends_with_all_gradients_and_grows_with_the_batch_by_what_the_forward_saves(config, run):
    needs = needs_of(config())
    gradients = sum(p.numel() * 4 for p in run.modules["unet"].parameters())
    assert needs.training.peak(1) >= gradients
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def kept(batch: int) -> int:
        saved.clear()
        index = torch.arange(batch) % 8
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = run.modules["unet"](
                torch.stack([run.train.mean[i][0] for i in index]),
                index,
                run.train.captions["encoder_hidden_states"][index],
                return_dict=False,
            )
        own = {p.data_ptr() for p in run.modules["unet"].parameters()}
        del output
        return sum(size for place, size in saved.items() if place not in own)

    slope = (needs.training.peak(2000) - needs.training.peak(1000)) / 1000
    assert slope == pytest.approx((kept(8) - kept(4)) / 4, rel=0.25)


def test_gradient_checkpointing_bf16_and_less_to_train_need_less(config):
    plain = needs_of(config())
    assert needs_of(config(), "model.gradient_checkpointing=true", only=64).training.peak(
        64
    ) < 0.8 * plain.training.peak(64)
    assert needs_of(config(), "model.precision=bf16", only=64).training.peak(64) < 0.9 * plain.training.peak(64)
    assert needs_of(config(), "model.train=[unet, text_encoder]", only=64).at(64) > plain.at(64)
    assert needs_of(config(), "optimizer.name=sgd", only=1).parts["optimizer"] * 2 == plain.parts["optimizer"]
    assert needs_of(config(), held_out=0, only=1).parts["copy"] == 0
    half = needs_of(config(), "model.precision=full_bf16", only=1)
    assert half.parts["weights"] * 2 == plain.parts["weights"]
    assert half.parts["optimizer"] == plain.parts["optimizer"]


def test_an_update_in_the_backward_needs_no_gradients_and_eight_bits_a_quarter_of_adamws(config, run):
    plain, small = needs_of(config(), only=1), needs_of(config(), "optimizer.name=adamw8bit", only=1)
    assert plain.parts["optimizer"] / 4 < small.parts["optimizer"] < plain.parts["optimizer"]
    settings = ("optimizer.max_grad_norm=null", "optimizer.fused_backward=true")
    fused = needs_of(config(), *settings, only=1)
    gradients = sum(p.numel() * 4 for p in run.modules["unet"].parameters())
    assert plain.training.fixed[-1] >= gradients > 10 * fused.training.fixed[-1]  # what the backward leaves behind
    for more in ((), ("optimizer.name=adamw8bit",), ("model.precision=full_bf16",)):
        every, one = needs_of(config(), *settings, *more), needs_of(config(), *settings, *more, only=1)
        assert every.at(1) == pytest.approx(one.at(1), rel=0.05)


def test_what_is_recorded_keeps_its_memory_beside_that_of_validation(config):
    needs = needs_of(config(), only=4)
    recorded = dataclasses.replace(needs, kept=0.0, kept_training=0.0, recorded=True)
    assert needs.validation
    assert recorded.working(4) == needs.training.peak(4) + needs.validation.peak(8)


def test_several_processes_exchange_gradients_through_a_copy(config):
    needs = needs_of(config(), only=4)
    assert needs.side_by_side().at(4) == needs.at(4) + needs.parts["weights"]


def test_the_largest_batch_is_the_last_that_fits(config):
    needs = needs_of(config())
    for batch in (1, 7, 100):
        assert needs.largest(needs.at(batch), 1000) >= batch
        assert needs.at(needs.largest(needs.at(batch), 1000)) <= needs.at(batch)
    assert needs.largest(needs.at(1) - 1, 1000) == 0
    assert needs.largest(2**50, 12) == 12


def test_attention_is_itself_again_after_counting(config):
    before = torch.nn.functional.scaled_dot_product_attention
    needs_of(config())
    assert torch.nn.functional.scaled_dot_product_attention is before


def test_free_memory_is_less_than_there_is():
    assert 0 < memory.available(CPU) < 2**50
