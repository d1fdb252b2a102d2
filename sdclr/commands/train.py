"""`sdclr train`: fine-tune along the plan, watch the held-out images, keep every trough and the best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdclr.config import source
from sdclr.config.kinds import Span
from sdclr.config.schema import RunConfig
from sdclr.engine import processes
from sdclr.engine.fit import settle_batch, settle_memory
from sdclr.engine.folder import RunFolder, write_text
from sdclr.engine.plan import Plan, make_plan, read_inputs
from sdclr.engine.telling import cautions, describe
from sdclr.errors import InputError
from sdclr.report import console

if TYPE_CHECKING:
    from sdclr.engine.checkpoint import Checkpoint


def train(
    config_path: Path, overrides: Sequence[str] = (), resume: bool = False, checkpoint: Path | None = None
) -> None:
    """Run the command. Raises Interrupted (130, 143) after saving, DivergenceError (1) with the last good checkpoint named."""
    if checkpoint and not resume:
        raise InputError(
            "--checkpoint says where to go on from; it needs --resume",
            hint=f"sdclr train {config_path} --resume --checkpoint {checkpoint}",
        )
    loaded = settle_batch(source.load(config_path, overrides), resume)
    together = processes.join()
    inputs = read_inputs(loaded, together.rank, together.count)
    folder = RunFolder(loaded.config.folder)

    def planned() -> tuple[RunConfig, Plan, Checkpoint | None]:
        """The config as it is planned by, the plan, and where the run goes on from, once everything that speaks against starting it has been
        looked for."""
        from sdclr.engine import resuming

        if not resume:
            config, plan, start = loaded.config, make_plan(loaded, inputs), None
            resuming.refuse_to_overwrite(folder, loaded.typed)
        else:
            start = resuming.resume_point(folder, checkpoint and folder.state(checkpoint), loaded.typed)
            config, plan = resuming.plan_again(loaded, inputs, start)
            resuming.refuse_other_mathematics(folder, resolved(config, plan), plan, start, overrides)
            resuming.refuse_other_inputs(start, config, inputs)
        write_text(folder.config, in_full(config, plan))
        return config, plan, start

    with together.held_by_main(folder.locked("train")):
        planned_by, plan, start = together.on_main(planned)
        config = resolved(planned_by, plan)
        rows = describe(config, inputs, plan)
        console.table(rows, title=f"{'resuming' if start else 'training'} {config.run.name}")
        for caution in cautions(planned_by, plan):
            console.warn(caution)
        config = settle_memory(config, inputs)
        from sdclr.commands.sample import draw_at_work
        from sdclr.engine.session import Session

        session = Session(config, plan, folder, inputs, rows, draw_at_work)
        session.train(start, loaded.typed)
        session.finish()
    console.result(str(folder.final))
    if config.sample.at_troughs:
        console.say(f"pictures: {folder.samples / 'at-work' / 'index.html'}")
    console.say(f"curves: {folder.report}; compare the kept states: sdclr sample {loaded.typed}")


def in_full(config: RunConfig, plan: Plan) -> str:
    """The resolved config as YAML, with a line on where what was `auto` comes from."""
    whence = f"max_lr and steps: {plan.source}" if "auto" in (config.schedule.max_lr, config.train.steps) else ""
    kappa = f"steps: train.kappa {config.train.kappa:g}" if config.train.steps == "auto" else ""
    said = "; ".join(filter(None, (whence, kappa)))
    return (f"# {said}\n" if said else "") + source.dump(resolved(config, plan))


def resolved(config: RunConfig, plan: Plan) -> RunConfig:
    """The config with every `auto` that the plan has decided written out."""
    schedule = config.schedule.model_copy(update={"max_lr": plan.schedule.max_lr})
    return config.model_copy(
        update={
            "schedule": schedule,
            "train": config.train.model_copy(update={"steps": Span(value=plan.steps, unit="steps"), "kappa": 1.0}),
        }
    )
