"""What tests share: a tiny model and pictures (made once), a config for them, and the program as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parent.parent
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


LONGEST = ("test_range_test_bench", "test_processes", "test_shapes", "test_study")
"""Files with tests of a minute and more: they begin, so that no process of several is left alone with one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def counted_once() -> Iterator[None]:
    """What the same settings need in memory is counted once: a second of work that every command begins with."""
    from sdclr.engine import fit

    known: dict[str, Any] = {}
    count = fit._needs

    def needs(config: Any, *more: Any, **named: Any) -> Any:
        key = repr(
            (
                config.model,
                config.lora,
                config.data,
                config.mask,
                config.prior,
                config.optimizer,
                config.validation,
                config.checkpoint,
                config.sample,
                config.batch.accumulate,
                more,
                named,
            )
        )
        if key not in known:
            known[key] = count(config, *more, **named)
        from sdclr.engine import memory

        counted, _, where = known[key]
        return counted, memory.available(memory.torch.device("cpu")), where

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "_needs", needs)
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a few thousand random weights."""
    from tiny import make_model

    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a folder in the shape of SDXL."""
    from tiny import make_xl

    return make_xl(tmp_path_factory.mktemp("xl") / "tiny-xl")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten captioned pictures."""
    from tiny import make_pictures

    return make_pictures(tmp_path_factory.mktemp("pictures") / "discs")


@pytest.fixture
def config(tmp_path: Path, model: Path, pictures: Path) -> Callable[..., Path]:
    """Writes a config into the test's folder: config("train: {steps: 4}", name="other.yaml")."""
    from tiny import write_config

    def write(extra: str = "", name: str = "run.yaml") -> Path:
        return write_config(tmp_path / name, model, pictures, tmp_path / "runs", extra)

    return write


@pytest.fixture
def sdclr(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the program in a process of its own: sdclr("check", path) -> completed process with its output. It is a fork of this one, without
    the seconds of imports; tests/test_cli.py starts it as a user does."""
    from together import command, launch

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        ended = launch(1, command(*arguments), tmp_path_factory.mktemp("said"))
        return subprocess.CompletedProcess(arguments, ended.codes[0], ended.out, ended.err)

    return run


@pytest.fixture
def no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures take a good part of a tiny run's time and have tests of their own."""
    from sdclr.report import figures

    monkeypatch.setattr(figures, "training", lambda records, title, marks: b"a figure")
    monkeypatch.setattr(figures, "range_test", lambda *given: b"a figure")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every prompt and seed that is drawn."""
    from sdclr.engine.painter import Painter

    seen: list[tuple[str, int]] = []
    original = Painter.draw

    def draw(self: Painter, prompt: str, seed: int) -> Any:
        seen.append((prompt, seed))
        return original(self, prompt, seed)

    monkeypatch.setattr(Painter, "draw", draw)
    return seen


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path, pictures: Path) -> Any:
    """The engine's Run of the tiny config, built once; a test that needs weights asks it for a fresh state."""
    from tiny import write_config

    from sdclr.config import source
    from sdclr.engine.plan import read_inputs
    from sdclr.engine.run import Run

    folder = tmp_path_factory.mktemp("run")
    loaded = source.load(write_config(folder / "run.yaml", model, pictures, folder / "runs"))
    return Run(loaded.config, read_inputs(loaded))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path, pictures: Path) -> Path:
    """The folder of a finished run of the tiny config (8 steps, two cycles), its config beside it as run.yaml. Not to be written to."""
    from tiny import write_config

    from sdclr.commands.train import train

    folder = tmp_path_factory.mktemp("trained")
    train(write_config(folder / "run.yaml", model, pictures, folder / "runs"))
    return folder / "runs" / "tiny"
