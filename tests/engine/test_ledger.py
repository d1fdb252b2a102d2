"""What is counted on shapes is what torch's own autocast does: on its fake tensors here, and on a GPU where the bench has counted."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_config
from torch._subclasses.fake_tensor import FakeTensorMode

from sdclr.config import source
from sdclr.engine import ledger, memory

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

import contestants  # noqa: E402
from shapes import SHAPES, configs_alone  # noqa: E402

CPU = torch.device("cpu")
SETTINGS = [
    ("model", "model.train=[unet, text_encoder]", "model.gradient_checkpointing=true"),
    ("model", "lora.rank=2"),
    ("xl", "model.precision=full_bf16", "optimizer.fused_backward=true", "optimizer.max_grad_norm=null"),
]


@pytest.mark.parametrize(("kind", "settings"), [(kind, more) for kind, *more in SETTINGS], ids=str)
def test_on_the_cpu_every_moment_is_that_of_torchs_autocast_on_fake_tensors(
    request, tmp_path, pictures, kind, settings, monkeypatch
):
    base = request.getfixturevalue(kind)
    path = write_config(tmp_path / "run.yaml", base, pictures, tmp_path / "runs")
    config = source.load(path, ("model.precision=bf16", "sample.at_troughs=true", *settings)).config
    ours = memory.count(config, 8, 2, CPU)
    monkeypatch.setattr(memory, "SHAPES_ONLY", CPU)
    monkeypatch.setattr(memory, "autocast", lambda device, dtype: torch.autocast(device, dtype, cache_enabled=False))
    with FakeTensorMode():
        torchs = memory.count(config, 8, 2, CPU)
    for name in ("training", "validation"):
        mine, other = getattr(ours, name), getattr(torchs, name)
        assert len(mine.fixed) == len(other.fixed)
        worst = np.abs(1 - (mine.fixed + 2 * mine.each) / (other.fixed + 2 * other.each)).max()
        # On the CPU's fake tensors a layer norm's statistics are in bf16, and a row here has 16 numbers.
        assert worst < 0.04
    assert ours.parts == torchs.parts
    assert (ours.encoding, ours.drawing) == pytest.approx((torchs.encoding, torchs.drawing), rel=0.01)


CASES = json.loads((ROOT / "tests" / "benchmarks" / "results" / "memory-cuda.json").read_text())["cases"]


@pytest.mark.parametrize("number", [0, 4, 5])
def test_of_a_card_is_counted_here_what_the_bench_counted_there(tmp_path, number):
    """There by the autocast of CUDA, on fake tensors."""
    case = CASES[number]
    configs_alone(SHAPES["sd15"], tmp_path / "sd15")
    (tmp_path / "weights.safetensors").touch()
    asked = argparse.Namespace(model=tmp_path / "weights.safetensors", images=ROOT / "data" / "mochi", device="cuda", work=tmp_path, draws=2,
                               batch=case["batch"], resolution=case["resolution"])  # fmt: skip
    more = (f"model.config={tmp_path / 'sd15'}", "model.precision=bf16", *case["overrides"])
    config = source.load(contestants.write_config(asked), more).config
    assert memory.count(config, 16, 4, torch.device("cuda"), only=case["batch"]).at(case["batch"]) == case["foretold"]


def test_functions_are_themselves_again_after_counting():
    before = [getattr(place, name) for place, name in ledger.NARROWED]
    with pytest.raises(ZeroDivisionError), ledger.autocast("cuda", torch.bfloat16), ledger.fused_attention():
        assert torch.nn.functional.linear(torch.ones(2, 3), torch.ones(2, 3)).dtype is torch.bfloat16
        raise ZeroDivisionError
    assert before == [getattr(place, name) for place, name in ledger.NARROWED]
