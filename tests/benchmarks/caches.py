"""How long many pictures take: the first reading, the next, and the one after a single picture has changed.

Each in a process of its own, on the demo's model. `throughput.py --caches` runs it.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SIDE = 32
BARS = {"first": 60.0, "again": 3.0}
"""Seconds for 10,000 pictures: to encode them, and to have the tensors again."""


def measure(work: Path, count: int) -> dict[str, Any]:
    """Seconds of every part of every reading, and how many entries each has written."""
    folder = work / "caches"
    shutil.rmtree(folder, ignore_errors=True)
    pictures = make_pictures(folder / "pictures", count)
    config = folder / "run.yaml"
    config.write_text(
        f"run: {{name: caches, output_dir: '{folder / 'runs'}'}}\nmodel: {{base: '{ROOT / 'data/tiny-sd'}'}}\n"
        f"data: {{images: '{pictures}', resolution: {SIDE}}}\n"
        "schedule: {policy: constant, max_lr: 1e-5}\ntrain: {steps: 10}\n"
    )
    readings = {"first": _read(config), "again": _read(config)}
    make_pictures(pictures, 1, seed=1)
    readings["one changed"] = _read(config)
    return {"pictures": count, "side": SIDE, "readings": readings}


def make_pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """Different captioned pictures of smooth colours."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        patch = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        patch.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"picture-{number:05d}.png")
        (folder / f"picture-{number:05d}.txt").write_text(f"picture number {number}")
    return folder


def _read(config: Path) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__)), str(config)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def read(config: Path) -> dict[str, float]:
    """Seconds of each part of one reading: the folder and its split, the plan, the model, the tensors."""
    from sdclr.config import source
    from sdclr.engine import run
    from sdclr.engine.fingerprint import fingerprint
    from sdclr.engine.plan import make_plan, read_inputs
    from sdclr.model import components

    written, inside = [], {"model": 0.0}
    load, put = components.load, run.TensorCache.put

    def timed_load(*args: Any) -> Any:
        started = time.perf_counter()
        parts = load(*args)
        inside["model"] += time.perf_counter() - started
        return parts

    components.load = timed_load
    run.TensorCache.put = lambda self, entries: (written.extend(entries), put(self, entries))[1]
    marks = [time.perf_counter()]
    loaded = source.load(config)
    inputs = read_inputs(loaded)
    marks.append(time.perf_counter())
    make_plan(loaded, inputs)
    fingerprint(loaded.config, inputs)
    marks.append(time.perf_counter())
    run.Run(loaded.config, inputs)
    marks.append(time.perf_counter())
    folder, plan, tensors = (b - a for a, b in itertools.pairwise(marks))
    return {"folder": folder, "plan": plan, "model": inside["model"], "tensors": tensors - inside["model"], "written": len(written)}  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """The readings as a table, and the bars."""
    lines = [f"## {result['pictures']:,} pictures of {result['side']} pixels", ""]
    lines += [*(f"- {name}: {value}" for name, value in result["machine"].items()), ""]
    lines += ["| reading | folder s | plan s | model s | tensors s | entries written |", "|---|---|---|---|---|---|"]
    for name, r in result["readings"].items():
        lines.append(f"| {name} | {r['folder']:.2f} | {r['plan']:.2f} | {r['model']:.2f} | {r['tensors']:.2f} | {r['written']} |")  # fmt: skip
    lines.append("")
    for name, bar in BARS.items():
        seconds = result["readings"][name]["tensors"] * 10_000 / result["pictures"]
        lines.append(
            f"- tensors of 10,000, {name}: {seconds:.2f} s, bar {bar:g} s: {'holds' if seconds <= bar else 'MISSED'}"
        )
    alone = result["readings"]["one changed"]["written"]
    lines.append(f"- one changed picture: {alone} entry written anew, bar 1: {'holds' if alone == 1 else 'MISSED'}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(json.dumps(read(Path(sys.argv[1]))))
