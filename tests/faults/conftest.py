"""The laboratory, built once for all fault tests."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def lab():
    """Four steps, a look and a save after each, a trough at 2 and 4; the best is the state after step 2."""
    from inject import Lab

    extra = """
schedule: {policy: triangular, base_lr: 1e-2, max_lr: 1e-1, cycles: 2, allow_peak_end: true}
train: {steps: 4}
validation: {fraction: 0.2, every: 1, timesteps_per_image: 2}
checkpoint: {every: 1, keep_last: 1}
range_test: {max_steps: 40, arms_per_decade: 2}
"""
    memory = Path("/dev/shm")  # thousands of small synced files: in memory where there is some
    root = Path(tempfile.mkdtemp(prefix="faults-", dir=memory if memory.is_dir() else None))
    yield Lab(root, extra)
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def warm(lab):
    """While a module of fault tests runs, and no longer: what children inherit stands in for what is slow."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for place in lab.stand_ins:
            patch.setattr(*place)
        yield
    torch.set_num_threads(threads)
