"""Where the bench's runs are trained and judged, through the program's own engine; every finished piece is kept as a line of JSON."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case

from sdclr.config import source
from sdclr.config.source import LoadedConfig
from sdclr.data import pairs
from sdclr.data.batches import Inputs
from sdclr.data.pairs import Split
from sdclr.engine.fingerprint import model_fingerprint
from sdclr.engine.folder import write_text
from sdclr.engine.plan import read_inputs
from sdclr.engine.run import Run
from sdclr.engine.validation import fixed_draws
from sdclr.errors import DivergenceError
from sdclr.report import console

VERSION = 1
"""Raise it when the engine or the bench changes what a stored piece would hold."""
JUDGE_SEED, JUDGE_DRAWS = 555, 4


@dataclasses.dataclass(frozen=True)
class Place:
    """A case, the folder that its pictures and arms lie in, and the file of its finished pieces."""

    case: Case
    folder: Path
    pieces: Path

    def load(self, seed: int, extra: Iterable[str] = ()) -> tuple[LoadedConfig, Inputs]:
        """The case's config with a seed (which also decides the split) and further overrides."""
        loaded = source.load(self.folder / "run.yaml", [f"run.seed={seed}", *self.case.overrides, *extra])
        return loaded, read_inputs(loaded)

    def piece(self, name: str, make: Callable[[], dict[str, Any]], depends: Any = None) -> dict[str, Any]:
        """What `make` returns, or returned before from the same things."""
        key = json.loads(
            json.dumps([VERSION, list(self.case.overrides), model_fingerprint(str(self.case.base)), depends])
        )
        kept = self._kept().get(name)
        if kept is None or kept["key"] != key:
            started = time.monotonic()
            value = make()
            seconds = round(time.monotonic() - started, 1)
            kept = json.loads(json.dumps({"name": name, "key": key, "seconds": seconds, "value": value}))
            lines = self._kept() | {name: kept}
            write_text(self.pieces, "".join(json.dumps(lines[name]) + "\n" for name in sorted(lines)))
            console.say(f"{self.case.name}: {name} took {seconds:.0f} s")
        return kept["value"]

    def _kept(self) -> dict[str, dict[str, Any]]:
        if not self.pieces.exists():
            return {}
        lines = [json.loads(line) for line in self.pieces.read_text().splitlines()]
        return {line["name"]: line for line in lines}


class Judge:
    """Trains on a user's training split, and measures on the held-out pictures of the subject, with draws that no seed changes."""

    def __init__(self, place: Place, seed: int, extra: Iterable[str] = ()):
        self.loaded, self.inputs = place.load(seed, extra)
        self.config = self.loaded.config
        held = tuple(pairs.find(place.folder / "held-out"))
        self.run = Run(self.config, dataclasses.replace(self.inputs, split=Split(self.inputs.split.train, held)))
        assert self.run.held_out is not None
        self.held_out = self.run.held_out
        keys = [f"held-out/{pair.key}" for pair in held]
        total = self.run.parts.noise_scheduler.config.num_train_timesteps
        self.draws = fixed_draws(keys, JUDGE_DRAWS, [mean.shape[1:] for mean in self.held_out.mean], total, JUDGE_SEED)

    def loss(self) -> float:
        """Mean loss of the current weights over the held-out pictures."""
        return float(self.run.losses(self.held_out, self.draws).mean())

    def base(self) -> float:
        """The untouched model's."""
        self.run.fresh_state()
        return self.loss()

    def curve(
        self,
        name: str,
        lr_at: Callable[[int], float],
        last: int,
        points: Iterable[int],
        enough: Callable[[list[float], list[float]], bool] = lambda exposure, losses: False,
        measure: Callable[[], float] | None = None,
    ) -> dict[str, Any]:
        """Train from the untouched weights to step `last`, measuring after the steps in `points` and at the end.

        `enough(exposures, losses)` so far may end it sooner. Losses are the held-out ones unless `measure` says otherwise;
        `train_losses` and `rates` are of every step.
        """
        return curve(self.run, name, lr_at, last, points, enough, measure or self.loss)

    def short_curve(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """As `curve`, without what is of every step."""
        found = self.curve(*arguments, **options)
        return {key: found[key] for key in ("steps", "exposure", "losses", "diverged")}


def curve(
    run: Run,
    name: str,
    lr_at: Callable[[int], float],
    last: int,
    points: Iterable[int],
    enough: Callable[[list[float], list[float]], bool],
    measure: Callable[[], float],
) -> dict[str, Any]:
    """See Judge.curve."""
    due = {*points, last}
    steps: list[int] = []
    exposure: list[float] = []
    losses: list[float] = []
    train_losses: list[float] = []
    rates: list[float] = []
    diverged = False
    with console.progress(name, total=last) as bar:
        try:
            for done in run.steps(run.fresh_state(), lr_at, last):
                train_losses.append(done.loss)
                rates.append(done.lr)
                bar.advance(f"lr {done.lr:.2g}")
                if done.step not in due:
                    continue
                loss = measure()
                if not np.isfinite(loss):
                    diverged = True
                    break
                steps.append(done.step)
                exposure.append(done.exposure)
                losses.append(loss)
                if enough(exposure, losses):
                    break
        except DivergenceError:
            diverged = True
    return {
        "steps": steps, "exposure": exposure, "losses": losses, "train_losses": train_losses, "rates": rates, "diverged": diverged,
    }  # fmt: skip


def log_points(last: int, first: int = 1, factor: float = 1.3) -> list[int]:
    """Steps from `first` to `last`, each about `factor` times the one before."""
    count = max(2, round(np.log(max(last, 2) / first) / np.log(factor)) + 1)
    return sorted({max(1, round(step)) for step in np.geomspace(first, last, count)})
