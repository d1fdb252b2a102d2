"""The same run once more: resumed, or by two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from together import command, launch

from sdclr.commands.train import train
from sdclr.engine.checkpoint import available
from sdclr.report import metrics

WEIGHTS = "final/unet/diffusion_pytorch_model.safetensors"


def resumes_to_the_same_bits(config: Path) -> None:
    """A run of `config` and the same from its third step on write the same bytes."""
    settings = ["checkpoint.every=3"]
    train(config, settings)
    run = config.parent / "runs" / "tiny"
    before = {name: (run / name).read_bytes() for name in ("metrics.jsonl", WEIGHTS)}
    (run / "final").rename(run / "gone")
    train(config, settings, resume=True, checkpoint=available(run / "checkpoints", ("step",))[0].path)
    assert {name: (run / name).read_bytes() for name in before} == before


def two_processes_come_to_the_same_weights(write: Callable[[str], Path], place: Path) -> None:
    """Runs of the configs that `write(folder)` writes, by one process and by two, agree up to rounding."""
    runs = []
    for count in (1, 2):
        config = write(f"by-{count}")
        ended = launch(count, command("train", config), place / f"said-{count}")
        assert ended.codes == (0,) * count, ended.err
        runs.append(config.parent / "runs" / "tiny")
    ours, theirs = (load_file(run / WEIGHTS) for run in runs)
    assert max(float((t - theirs[k]).norm() / t.norm()) for k, t in ours.items()) < 1e-5
    for kind, tolerance in (("validation", 1e-5), ("step", 1e-4)):
        losses = [[r["loss"] for r in metrics.read(run / "metrics.jsonl") if r["kind"] == kind] for run in runs]
        assert losses[0]
        assert losses[1] == pytest.approx(losses[0], rel=tolerance)
