"""The laboratory, built once for all fault tests."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="package")
def lab():
    """Four steps, a look and a save after each, a trough at 2 and 4; the best is the state after step 2."""
    import torch
    from inject import Lab

    from sdclr.model import components
    from sdclr.report import figures

    extra = """
schedule: {policy: triangular, base_lr: 1e-2, max_lr: 1e-1, cycles: 2}
train: {steps: 4}
validation: {fraction: 0.2, every: 1, timesteps_per_image: 2}
checkpoint: {every: 1, keep_last: 1}
range_test: {max_steps: 40, arms_per_decade: 2}
"""
    before = components.load, figures.training, figures.range_test, torch.get_num_threads()
    memory = Path("/dev/shm")  # thousands of small synced files: in memory where there is some
    root = Path(tempfile.mkdtemp(prefix="faults-", dir=memory if memory.is_dir() else None))
    yield Lab(root, extra)
    shutil.rmtree(root, ignore_errors=True)
    components.load, figures.training, figures.range_test = before[:3]
    torch.set_num_threads(before[3])
