"""A pickle can run any code when it is opened. None is ever opened, whatever it is called and wherever it lies."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from inject import Lab, Outcome, Tally, in_child, thinned


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def evil(lab: Lab) -> dict[str, bytes]:
    """The same trap as a plain pickle, as torch saves one, and as numpy does; each is seen to spring when it is opened."""
    import numpy as np
    import torch

    trap, zipped, array = Evil(_mark(lab)), io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": trap}, zipped)
    np.save(array, np.array([trap], dtype=object), allow_pickle=True)
    traps = {"pickle": pickle.dumps(trap), "torch": zipped.getvalue(), "numpy": array.getvalue()}
    openers: dict[str, Callable[[bytes], object]] = {
        "pickle": pickle.loads,
        "torch": lambda data: torch.load(io.BytesIO(data), weights_only=False),
        "numpy": lambda data: np.load(io.BytesIO(data), allow_pickle=True),
    }
    for kind, data in traps.items():
        openers[kind](data)
        assert _mark(lab).is_dir(), kind
        _mark(lab).rmdir()
    return traps


def _mark(lab: Lab) -> Path:
    return lab.root / "the-trap-has-sprung"


@pytest.fixture(scope="module")
def finished(lab: Lab) -> Path:
    """A run that is not quite done: everything but its exports, and what a range test leaves in name."""
    lab.reset()
    _write(lab.folder / "range-test/arms/base.json", b"{}")
    _write(lab.folder / "range-test/result.json", b"{}")
    assert lab.train("checkpoint.keep_last=2").kind == "done"
    shutil.rmtree(lab.folder / "final")
    return lab.keep("finished")


Plant = tuple[str, Callable[[Path, Path, Path, bytes], None]]


def plants() -> Iterator[Plant]:
    """Each puts the trap somewhere: into the model's folder, the run's, the pictures', under names that programs look for."""

    def beside(base: str, *names: str) -> Plant:
        return (
            f"{base} + {', '.join(names)}",
            lambda model, run, pictures, data: (
                [_write({"model": model, "run": run, "pictures": pictures}[base] / name, data) for name in names]
                and None
            ),
        )

    def instead(base: str, name: str, new: str | None = None) -> Plant:
        def put(model: Path, run: Path, pictures: Path, data: bytes) -> None:
            folder = {"model": model, "run": run, "pictures": pictures}[base]
            for path in sorted(folder.glob(name)):
                path.unlink()
                _write(path.with_name(new) if new else path, data)

        return f"{base}: {name} is {new or 'the trap'}", put

    unet, clip = "diffusion_pytorch_model", "model"
    yield beside(
        "model", f"unet/{unet}.bin", f"vae/{unet}.bin", "text_encoder/pytorch_model.bin", "model.ckpt", "unet/model.pt"
    )
    yield beside(
        "model",
        f"unet/{unet}.fp16.bin",
        f"unet/{unet}.fp16.safetensors",
        "pytorch_model.bin",
        "scheduler/scheduler.bin",
    )
    yield beside("model", "unet/modeling.py", "tokenizer/tokenizer.pkl", "pipeline.py", "custom_pipeline.pkl")
    yield instead("model", f"unet/{unet}.safetensors", f"{unet}.bin")
    yield instead("model", f"vae/{unet}.safetensors", f"{unet}.bin")
    yield instead("model", f"text_encoder/{clip}.safetensors", "pytorch_model.bin")
    for part in (f"unet/{unet}", f"vae/{unet}", f"text_encoder/{clip}"):
        yield instead("model", f"{part}.safetensors")
        yield f"model: {part} has an index of pickles", _index(part)
    yield beside(
        "run",
        "checkpoints/step-000004/optimizer.bin",
        "checkpoints/step-000004/optimizer.pt",
        "checkpoints/step-000004/random_states_0.pkl",
    )
    yield beside(
        "run",
        "checkpoints/step-000004/scheduler.bin",
        f"checkpoints/step-000004/unet/{unet}.bin",
        "checkpoints/latest.ckpt",
    )
    yield instead("run", "checkpoints/step-000004/optimizer.safetensors")
    yield instead("run", "checkpoints/step-000004/optimizer.safetensors", "optimizer.bin")
    yield instead("run", f"checkpoints/*/unet/{unet}.safetensors")
    yield instead("run", f"checkpoints/best-*/unet/{unet}.safetensors", f"{unet}.bin")
    yield instead("run", "checkpoints/step-*/state.json")
    yield instead("run", "checkpoints/step-000004/manifest.json")
    yield instead("run", "metrics.jsonl")
    yield instead("run", "config.yaml")
    yield instead("run", "range-test/arms/*.json")
    yield instead("run", "range-test/result.json")
    yield beside("run", "samples/cells/x.png", "checkpoints/step-000009.ckpt", ".lock")
    yield beside("pictures", "picture-90.npy", "picture-91.pkl", "picture-92.pt", "picture-93.npz")
    yield beside("pictures", "picture-94.png", "picture-94.txt")
    yield instead("pictures", "picture-03.png")
    yield instead("pictures", "picture-03.txt")
    yield (
        "the cache holds pickles",
        lambda model, run, pictures, data: (
            [path.write_bytes(data) for path in (run.parent / ".cache").rglob("*.safetensors")] and None
        ),
    )


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _index(part: str) -> Callable[[Path, Path, Path, bytes], None]:
    """The weights are said to lie in shards that are pickles, once honestly named and once not."""

    def put(model: Path, run: Path, pictures: Path, data: bytes) -> None:
        whole = model / f"{part}.safetensors"
        names = {"a": "shard-1.bin", "b": f"{whole.stem}-00001-of-00001.safetensors"}
        for name in names.values():
            _write(whole.with_name(name), data)
        whole.unlink()
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": names})
        whole.with_name(f"{whole.name}.index.json").write_text(text)

    return put


def commands(lab: Lab) -> dict[str, Callable[[], Outcome]]:
    """Every command, with the true loader of models."""
    from sdclr.commands import check, compare, init, range_test, sample, train
    from sdclr.model import components

    base = ("checkpoint.keep_last=2",)
    free = ("sample.prompts=[disc]", "sample.seeds=[1]", "sample.steps=1")

    def run(work: Callable[[], object]) -> Callable[[], Outcome]:
        def true() -> None:
            components.load = lab.true_load
            work()

        return lambda: in_child(true, log=lab.root / "child.log")

    return {
        "check": run(lambda: check.check(lab.config, base)),
        "resume": run(lambda: train.train(lab.config, base, resume=True)),
        "train": run(lambda: train.train(lab.config, (*base, "run.name=other"))),
        "range-test": run(lambda: range_test.range_test(lab.config, base)),
        "sample": run(lambda: sample.sample(lab.config, (*base, *free))),
        "compare": run(lambda: compare.compare([lab.folder], lab.root / "compared")),
        "init": run(lambda: init.init(lab.pictures, str(lab.model), lab.root / "written.yaml")),
    }


@thinned(24)
def test_no_command_opens_a_pickle(lab: Lab, evil: dict[str, bytes], finished: Path, share: int) -> None:
    tally = Tally("pickles: planted, by command", share)
    clean = {
        place: Path(shutil.copytree(place, lab.root / f"clean-{place.name}")) for place in (lab.model, lab.pictures)
    }

    def restore() -> None:
        for place, kept in clean.items():
            shutil.rmtree(place)
            shutil.copytree(kept, place)

    for turn, (place, put) in enumerate(list(plants())[share // 3 :: share]):
        kind = ("pickle", "torch", "numpy")[turn % 3]
        lab.reset(finished)
        restore()
        put(lab.model, lab.folder, lab.pictures, evil[kind])
        for command, start in commands(lab).items():
            outcome = start()
            sprung = _mark(lab).exists()
            shutil.rmtree(_mark(lab), ignore_errors=True)
            (lab.root / "written.yaml").unlink(missing_ok=True)
            tally.add(
                f"{place} ({kind}): {command}",
                "OPENED" if sprung else "",
                "" if outcome.kind in ("done", "error") else f"{outcome.kind}: {outcome.text}",
                kind=f"{command} {'refused' if outcome.kind == 'error' else 'unharmed'}",
            )
    restore()
    tally.report()


@pytest.mark.parametrize(
    "name", ["model.ckpt", "model.pt", "model.pth", "model.bin", "model.safetensors", "model.CKPT", "model.pkl"]
)
def test_no_single_file_is_opened_as_a_pickle(lab: Lab, evil: dict[str, bytes], name: str) -> None:
    lab.reset()
    file = lab.root / name
    file.write_bytes(evil["torch"])
    config = lab.root / "single.yaml"
    text = lab.config.read_text().replace(
        f"'{lab.model}'", f"'{file}', config: '{lab.model}'" if "safetensors" in name else f"'{file}'"
    )
    config.write_text(text)

    def work() -> None:
        from sdclr.commands.check import check
        from sdclr.model import components

        components.load = lab.true_load
        check(config)

    outcome = in_child(work, log=lab.root / "child.log")
    assert not _mark(lab).exists()
    assert outcome.kind == "error" and outcome.code == 2, outcome
