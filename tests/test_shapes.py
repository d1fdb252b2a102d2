"""What is said of models at their true size, counted on shapes alone: nothing of size is allocated."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from sdclr.config import source
from sdclr.engine import memory

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

import throughput  # noqa: E402
from shapes import SHAPES, configs_alone  # noqa: E402

PARAMETERS = {"sd15": 859_520_964, "sdxl": 2_567_463_684}
"""As diffusers counts those of the published models."""
SIDES = {"sd15": 64, "sdxl": 128}
CHECKPOINTED = "model.gradient_checkpointing=true"
FULL = "model.precision=full_bf16"
SMALLEST = "{name: adamw8bit, fused_backward: true, max_grad_norm: null}"


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_benchs_unets_have_the_published_size_and_cost_what_is_said(name: str) -> None:
    shape = SHAPES[name]["unet"]
    side, width = SIDES[name], shape["cross_attention_dim"]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet = UNet2DConditionModel(**shape)
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)} if name == "sdxl" else None
        noisy, timestep, context = torch.empty(1, 4, side, side), torch.empty(1, dtype=torch.long), torch.empty(1, 77, width)  # fmt: skip
        unet(noisy, timestep, context, added_cond_kwargs=added).sample.sum().backward()
    assert sum(p.numel() for p in unet.parameters()) == PARAMETERS[name]
    assert throughput.FLOP_AN_IMAGE[f"model-{name}"] == pytest.approx(counter.get_total_flops(), rel=0.01)


def needed(folder: Path, name: str, config: Path, *overrides: str) -> float:
    """GiB of a GPU that a config needs with the named model."""
    configs_alone(SHAPES[name], folder / name)
    (folder / "weights.safetensors").touch()
    base = (f"model.base={folder / 'weights.safetensors'}", f"model.config={folder / name}", "model.precision=bf16")
    loaded = source.load(config, (*base, *overrides)).config
    size = loaded.batch.size
    return memory.count(loaded, 16, 4, torch.device("cuda"), only=size).at(size) / 2**30


@pytest.mark.parametrize(
    ("file", "name", "overrides", "words"),
    [
        ("sd15", "sd15", (), r"counted: ([\d.]+) GiB"),
        ("sd15", "sd15", ("batch.size=1", CHECKPOINTED, "optimizer={name: adamw8bit}"), r"; ([\d.]+) with gradient_checkpointing"),
        ("sd15", "sd15", ("batch.size=1", CHECKPOINTED, f"optimizer={SMALLEST}"), r"; ([\d.]+) with fused_backward"),
        ("sd15", "sd15", ("batch.size=1", CHECKPOINTED, f"optimizer={SMALLEST}", FULL), r"([\d.]+) with precision: full_bf16"),
        ("sd15", "sd15", ("lora={rank: 16}",), r"a LoRA is trained instead \(([\d.]+) GiB\)"),
        ("sdxl", "sdxl", (CHECKPOINTED, "lora={rank: 16}"), r"a LoRA is trained instead \(([\d.]+) GiB\)"),
        ("sdxl", "sdxl", (CHECKPOINTED,), r"counted: ([\d.]+) GiB"),
        ("sdxl", "sdxl", (CHECKPOINTED, FULL), r"([\d.]+) GiB with precision: full_bf16"),
        ("sdxl", "sdxl", (CHECKPOINTED, "optimizer={name: adamw8bit}"), r"; ([\d.]+) without fused_backward"),
        ("sdxl", "sdxl", (CHECKPOINTED, "optimizer={name: adamw}"), r"([\d.]+) with plain adamw"),
    ],
)  # fmt: skip
def test_the_shipped_configs_need_what_they_say(tmp_path: Path, file: str, name: str, overrides: tuple[str, ...], words: str) -> None:  # fmt: skip
    config = ROOT / "configs" / f"{file}.yaml"
    said = re.search(words, config.read_text().replace("\n# ", " "))
    assert said, f"{config.name} does not say {words}"
    digits = len(said[1].partition(".")[2])
    assert round(needed(tmp_path, name, config, *overrides), digits) == float(said[1])
