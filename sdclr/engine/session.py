"""One training run in progress: what it trains, what it watches, what it writes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdclr.config import source
from sdclr.config.schema import RunConfig
from sdclr.data.batches import Inputs
from sdclr.engine import average, sharding
from sdclr.engine.checkpoint import (
    AVERAGE,
    BEST,
    FULL,
    TROUGH,
    Checkpoint,
    Snapshot,
    available,
    best_beside,
    discard_after,
    newest_sound,
    prune,
    restore,
    save,
    save_model,
    snapshot,
    verify,
)
from sdclr.engine.fingerprint import fingerprint
from sdclr.engine.folder import RunFolder, as_umask_says, publish, storage_errors, sync_tree, write_bytes, write_text
from sdclr.engine.painter import Painter, of_run
from sdclr.engine.plan import Plan
from sdclr.engine.run import Run
from sdclr.engine.signals import StopRequest
from sdclr.engine.watch import Watch
from sdclr.errors import DivergenceError, SdclrError, StorageError, first_line
from sdclr.model import adapters
from sdclr.model.components import read_trained
from sdclr.report import console, metrics


class Session:
    """One training run in progress: what it trains, what it watches, what it writes."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        folder: RunFolder,
        inputs: Inputs,
        about: Sequence[tuple[str, str]] = (),
        draw: Callable[[RunConfig, int, Painter, Callable[[str], bool]], None] | None = None,
    ):
        """`about` are rows on the plan, for the report; `draw` shows what a step has come to (commands.sample.draw_at_work)."""
        self.about, self.draw = about, draw
        self.config, self.plan, self.folder = config, plan, folder
        self.run = Run(config, inputs, keep_base=False)
        self.processes = self.run.processes
        self.run.compile_for(plan.steps - plan.done)  # tries a step out, which must not train what comes next
        self.state = self.run.fresh_state()
        self.troughs = set(plan.schedule.troughs())
        self.fingerprint = fingerprint(config, inputs)
        self.save_every = plan.save_every or max(1, -(-plan.steps // 10))
        held_out, stabilised = self.run.held_out, self.run.stabilised
        best = config.checkpoint.best
        self.watch = Watch(self.run, held_out, stabilised, keep_best=best) if held_out and stabilised else None
        self.log: metrics.MetricsLog = metrics.Unwritten()

    # The story ----------------------------------------------------------------------------------------------------------------

    def train(self, start: Checkpoint | None, typed: str) -> None:
        """Step by step to the plan's end; what is due is looked at and kept.

        A save that fails midway is only said, for the run can go on from the checkpoint before; the last one must succeed.
        """
        plan, config = self.plan, self.config
        if start:
            self._restore(start)
        else:
            self._begin()
        stopped_early = self._should_stop_early()  # by the run that is being resumed
        until = self.state.step if stopped_early else plan.steps
        with StopRequest() as stop, console.progress("training", plan.steps, self.state.step) as bar:
            try:
                if not start or self._at_a_trough:
                    self._show(bar, stop)
                for result in self.run.steps(self.state, plan.schedule, until):
                    self.log.add("step", **dataclasses.asdict(result))
                    trough, last = result.step in self.troughs, result.step == plan.steps
                    if result.step % plan.validate_every == 0 or trough or last:
                        self._look()
                    early, asked = self._should_stop_early(), stop.heard_by_any(self.processes)
                    if last or early or asked or trough or result.step % self.save_every == 0:
                        self._keep(must=last or early or asked)
                    if trough and not asked:
                        asked = self._show(bar, stop)
                    bar.advance(self._numbers(result.lr, result.loss))
                    if asked and not last:
                        raise stop.interrupted(
                            f"stopped after step {result.step} of {plan.steps}, which is saved",
                            f"sdclr train {typed} --resume",
                        )
                    if early:
                        console.say(
                            f"stopped early at step {result.step}: {config.train.early_stop} validations without a new best"
                        )
                        break
            except (DivergenceError, StorageError) as problem:
                self._say_what_is_kept(problem)
                raise
            finally:
                self.log.close()

    def finish(self) -> None:
        """Keep the average of the troughs, write the CSV and the report, export the best and the final model as diffusers folders."""
        averages, main = self.config.checkpoint.average, self.processes.main
        # The average is measured in the model that was trained, and leaves its weights there.
        keep = sharding.copy_of if averages else sharding.weights_of
        trained = {name: keep(module, main) for name, module in self.run.modules.items()}
        averaged = self._save_average() if averages else ""
        self.processes.on_main(lambda: self._write_up(trained, averaged))

    def _write_up(self, trained: dict[str, dict[str, Any]], averaged: str) -> None:
        from sdclr.report import figures, page  # now, not earlier: 30 MB that training has no use for

        records = metrics.complete(metrics.read(self.folder.metrics))
        kept = [trough.step for trough in available(self.folder.checkpoints, (TROUGH,))]
        write_text(self.folder.path / "metrics.csv", metrics.as_csv(records))
        picture = figures.training(records, f"{self.config.run.name}: {self.plan.schedule.policy}", kept)
        write_bytes(self.folder.path / "training.png", picture)
        sections: list[dict[str, Any]] = [
            {"title": "Curves", "picture": picture},
            {"title": "The plan", "rows": self.about},
            {"title": "The config, resolved", "code": source.dump(self.config)},
        ]
        lead = f"{self._in_words()} {averaged}".strip()
        write_text(self.folder.report, page.render(f"Run {self.config.run.name}", lead, sections))
        best = self.watch.best_weights if self.watch else None
        if best:
            self._export(best, self.folder.best)
        self._export(trained, self.folder.final)  # last: its presence says that the run is finished

    # Beginning, going on ----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.processes.on_main(self._clear)
        self._look()

    def _clear(self) -> None:
        shutil.rmtree(self.folder.checkpoints, ignore_errors=True)
        self.log = self._open_log(None)

    def _restore(self, checkpoint: Checkpoint) -> None:
        best, problems = self.processes.on_main(lambda: best_beside(checkpoint))
        info = restore(checkpoint, self.state, self.run.modules)
        if self.watch:
            wanted = best and not problems and self.watch.keep_best and self.processes.main
            kept = read_trained(best.path, self.config.model.train) if best and wanted else None
            self.watch.restore(info["watch"], kept)
            if problems:
                self.watch.forget_best()
                console.warn(f"{'; '.join(problems)}: the best state is looked for anew from step {self.state.step} on")
        now = snapshot(self.state, self.run.modules, self.processes.main) if self._at_a_trough else None
        self.processes.on_main(lambda: self._take_up(info.get("metrics"), now))
        console.say(f"resumed from {checkpoint.path} at step {self.state.step}")

    def _take_up(self, digest: str | None, kept: Snapshot | None) -> None:
        """Leave of the folder what the resumed state counts on; `digest` is of the curves up to it."""
        discard_after(self.folder.checkpoints, self.state.step)
        self.log = self._open_log(self.state.step)
        if self.log.digest != digest:
            console.warn(
                f"{self.folder.metrics}: lines before step {self.state.step} are missing or altered; curves and report are of the rest"
            )
        self._try_to(lambda: self._settle(kept))

    def _open_log(self, upto_step: int | None) -> metrics.MetricsLog:
        board = self.folder.path / "tensorboard" if self.config.run.tensorboard else None
        with storage_errors(self.folder.metrics):
            return metrics.MetricsLog(self.folder.metrics, upto_step, board)

    # Looking, keeping -------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        if self.watch:
            self.log.add("validation", self.state.step, **self.watch.look(self.state.step, self.state.exposure))

    def _should_stop_early(self) -> bool:
        patience = self.config.train.early_stop
        return bool(patience and self.watch and self.watch.since_best >= patience)

    def _keep(self, must: bool) -> None:
        """Save where the run is; a save that `must` succeed ends the run if it does not."""
        kept = snapshot(self.state, self.run.modules, self.processes.main)

        def save_now() -> None:
            self._save_all(kept)

        self.processes.on_main(save_now if must else lambda: self._try_to(save_now))

    def _try_to(self, write: Callable[[], None]) -> None:
        try:
            write()
        except StorageError as problem:
            hint = f"\n  {problem.hint.partition('; then:')[0]}" if problem.hint else ""
            console.warn(
                f"{problem.message}{hint}\n  step {self.state.step} is not kept; training goes on to the next save"
            )

    def _save_all(self, kept: Snapshot) -> None:
        """What a resumed run counts on first (the best, the curves), then the state to resume from, then what follows from it."""
        self._save_best()
        with storage_errors(self.folder.metrics):
            self.log.sync()
        self._save(FULL, kept)
        self._settle(kept)

    def _settle(self, kept: Snapshot | None) -> None:
        """What follows from a saved step: its trough, and room made for later ones. A resumed run makes up for what was cut short here."""
        if kept and self._at_a_trough:
            self._save_trough(kept)
        prune(self.folder.checkpoints, self.config.checkpoint.keep_last)

    @property
    def _at_a_trough(self) -> bool:
        """Whether the run is where a cycle ends, and keeps that."""
        return self.state.step in self.troughs and self.config.checkpoint.at_troughs

    def _save_trough(self, kept: Snapshot) -> None:
        """The weights alone, if they are not yet kept."""
        there = [c for c in available(self.folder.checkpoints, (TROUGH,)) if c.step == kept.step]
        if not there or verify(there[0]):
            self._save(TROUGH, kept)

    def _save_best(self) -> None:
        if not self.watch or not self.watch.best or not self.watch.best_weights:
            return
        best, kept = self.watch.best, available(self.folder.checkpoints, (BEST,))
        if not kept or kept[-1].step != best.step:
            save_model(
                self.folder.checkpoints,
                BEST,
                best.step,
                best.exposure,
                self.run.models,
                self.watch.best_weights,
                self._info(best.exposure, best.loss),
            )

    def _save_average(self) -> str:
        """One more kept state, with its own held-out loss; says what came of it. Leaves the average's weights in the model."""
        mean, problems = average.of_troughs(self.folder.checkpoints, self.config.model.train)
        if mean is None:
            console.warn("no average of the troughs was kept: " + "; ".join(problems))
            return ""
        for name, weights in mean.weights.items():
            sharding.load_weights(self.run.modules[name], weights)
        loss = self.watch.measure() if self.watch else None
        info = {**self._info(mean.exposure, loss), "averaged": list(mean.steps)}
        at, models = (mean.steps[-1], mean.exposure), self.run.models
        self.processes.on_main(lambda: save_model(self.folder.checkpoints, AVERAGE, *at, models, mean.weights, info))
        words = f"The average of {len(mean.steps)} troughs is kept" + (f": held-out loss {loss:.4f}." if loss else ".")
        console.say(words)
        return words

    def _save(self, kind: str, kept: Snapshot) -> None:
        last = self.watch.last if self.watch else None
        info = self._info(kept.exposure, last.loss if last else None)
        if kind == FULL:
            info |= self._to_go_on_with()
        save(self.folder.checkpoints, kind, kept, self.run.models, info)

    def _info(self, exposure: float, loss: float | None) -> dict[str, Any]:
        plan, best = self.plan, self.plan.best_exposure
        return {
            "kappa": exposure / best if best else None,
            "planned_by": {
                "best_exposure": best,
                "ceiling": plan.ceiling,
                "source": str(plan.source) if plan.source else None,
            },
            "validation_loss": loss,
            "fingerprint": self.fingerprint,
            "config": self.config.model_dump(mode="json"),
        }

    def _to_go_on_with(self) -> dict[str, Any]:
        """What only a resumed run asks for: the best that must lie beside, the curves that must have come before, the watch."""
        watch = self.watch
        return {
            "best_step": watch.best.step if watch and watch.best and watch.best_weights else None,
            "metrics": self.log.digest,
            "watch": watch.state() if watch else None,
        }

    def _export(self, weights: dict[str, dict[str, Any]], target: Path) -> None:
        """The model with these weights as a diffusers folder, or a LoRA as one that its load_lora_weights takes, written whole; a text
        encoder in fp32 as all that the pipeline opens beside it."""
        weights = {
            name: {key: t.float() for key, t in w.items()} if name != "unet" else w for name, w in weights.items()
        }
        partial = target.with_name(f".{target.name}.partial")
        with storage_errors(target):
            shutil.rmtree(partial, ignore_errors=True)
            if self.config.lora.rank:
                adapters.save(self.run.models, weights, partial)
            else:
                self.run.parts.with_weights(weights).save_pipeline(partial)
            as_umask_says(partial)
            sync_tree(partial)
            publish(partial, target)

    # Showing ------------------------------------------------------------------------------------------------------------------

    def _show(self, bar: console.Bar, stop: StopRequest) -> bool:
        """Let the state be drawn, if the config says so. What goes wrong is only said: no picture is worth a run. A stop that is asked for
        meanwhile ends it; returns whether the run can then end here, for this state has been kept."""
        if not self.draw or not self.config.sample.at_troughs:
            return False
        self.processes.on_main(lambda: self._try_to_draw(bar, stop))
        return stop.heard_by_any(self.processes) and self.processes.on_main(self._is_kept)

    def _is_kept(self) -> bool:
        return any(c.step == self.state.step for c in available(self.folder.checkpoints, (FULL,)))

    def _try_to_draw(self, bar: console.Bar, stop: StopRequest) -> None:
        assert self.draw

        def goes_on(words: str) -> bool:
            bar.advance(words, steps=0)
            return not stop.requested

        try:
            with of_run(self.run) as painter:
                self.draw(self.config, self.state.step, painter, goes_on)
        except Exception as problem:  # a full disk or card, a damaged state that is shown beside
            console.warn(
                f"step {self.state.step} could not be drawn: {first_line(problem)}\n  training goes on; sdclr sample draws it later"
            )

    # Telling ------------------------------------------------------------------------------------------------------------------

    def _numbers(self, lr: float, loss: float) -> str:
        seen = f"  held out {self.watch.last.loss:.4f}" if self.watch and self.watch.last else ""
        return f"lr {lr:.2e}  loss {loss:.4f}{seen}"

    def _say_what_is_kept(self, problem: SdclrError) -> None:
        kept, _ = newest_sound(self.folder.checkpoints)
        problem.message += (
            f"\n  the last good checkpoint is {kept.path}" if kept else "\n  no checkpoint has been kept yet"
        )

    def _in_words(self) -> str:
        if not self.watch or not self.watch.last or self.watch.base is None:
            return f"{self.state.step} steps, exposure {self.state.exposure:.3g}, trained on every image without validation."
        base, best, last = float(self.watch.base.mean()), self.watch.best or self.watch.last, self.watch.last
        return (
            f"Held-out loss {base:.4f} before, {best.loss:.4f} at its lowest ({best.loss / base - 1:+.1%}, step {best.step}, "
            f"exposure {best.exposure:.3g}), {last.loss:.4f} at the end (step {last.step}, exposure {last.exposure:.3g})."
        )
