"""Does cycling pay? The published experiments replayed on the embedded model, and the controls that make them decidable.

    make study                                   # all of it, at most three hours on two cores; stopped, it goes on where it was
    python tests/benchmarks/study.py --quick     # a smaller one in about ten minutes, into build/study-quick/results

Seven parts, each of jobs that need nothing of one another:

    replays    every file of configs/cycling, measured along the way
    schedules  each schedule against constant at equal exposure and equal steps; pairs share seed, split, batches, noise
    sizes      the same with more training pictures
    planned    the same at the rate that a range test recommends, half the ceiling: how many cycles `train` should take by itself
    averages   the last weights against averages of weights: of the last steps (EMA), and of the troughs
    ladder     pictures drawn at the troughs: likeness, obedience and variety against κ at several rates
    prior      the same with and without prior pictures (people that the base has drawn): what they keep, and what they cost

What is measured is measured on pictures of the subject that no run has seen, drawn by code. Finished runs lie in build/study/
(`engine.arms.Bench` keeps them) and are never run twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(Path(__file__).parent)]

import study_report  # noqa: E402
from portraits import Portrait  # noqa: E402
from study_pictures import (  # noqa: E402
    DEMO,
    MOCHI,
    Painter,
    captions_of,
    draw_prior,
    draw_subject,
    draw_truth,
    sampled_prompts,
)

from sdclr.config import source  # noqa: E402
from sdclr.data import pairs as pairs_  # noqa: E402
from sdclr.data.batches import Inputs  # noqa: E402
from sdclr.data.cache import key_of  # noqa: E402
from sdclr.data.pairs import Split  # noqa: E402
from sdclr.engine.fingerprint import find_range_test  # noqa: E402
from sdclr.engine.folder import read_json, write_json  # noqa: E402
from sdclr.engine.plan import make_plan, peak_below, read_inputs  # noqa: E402
from sdclr.errors import DivergenceError, InputError  # noqa: E402
from sdclr.lr.measured import at_steps  # noqa: E402
from sdclr.lr.schedule import Group, Schedule  # noqa: E402
from sdclr.report import console  # noqa: E402

REPLAYS = ROOT / "configs" / "cycling"
GROUPS = (Group(3, 1.0), Group(2, 0.5), Group(1.5, 0.25))
LOOK_EVERY = 20
CYCLE_KAPPA = 0.5
"""Exposure of one cycle of the ladder, in units of the best one: its troughs are at κ = 0.5, 1, 1.5, ..."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is run. `factors` are the tops of a plain triangle as multiples of the ceiling; constant runs at half of that."""

    seeds: tuple[int, ...] = (1, 2, 3)
    folds: tuple[int, ...] = (0, 1, 2)
    decays: tuple[float, ...] = (0.9, 0.97, 0.9999)
    factors: tuple[float, ...] = (1.0, 2.0, 0.5)
    cycles: tuple[int, ...] = (1, 2, 4, 8, 25)
    sizes: tuple[int, ...] = (64,)
    size_sets: tuple[int, ...] = (0, 1, 2)
    replays: tuple[str, ...] = tuple(sorted(p.stem for p in REPLAYS.glob("*.yaml")))
    rates: tuple[float, ...] = (0.5, 2.0)
    rungs: tuple[int, ...] = (1, 2, 3, 4, 6, 12)
    prior: int = 64
    prior_rungs: tuple[int, ...] = (2, 6)
    truth: int = 48
    draws: int = 8
    prompts: int = 12
    pictures: int = 4
    sampler_steps: int = 20


QUICK = Scale(
    seeds=(1, 2), folds=(0, 1), factors=(1.0, 2.0), cycles=(1, 4), sizes=(), replays=("constant", "ten-epochs"),
    rates=(0.25, 1.0), rungs=(1, 2, 4), prior_rungs=(2,), truth=40, draws=4, prompts=6, pictures=3,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Study:
    """What every job needs to know."""

    scale: Scale
    base: str
    build: Path
    ceiling: float
    best_exposure: float
    overrides: tuple[str, ...] = ()

    def settings(self, seed: int, *more: str) -> list[str]:
        """--set lines that turn a shipped config into one of this study's runs."""
        return [
            f"run.seed={seed}", f"run.output_dir={self.build / 'runs'}", f"model.base={self.base}", f"data.images={MOCHI}",
            f"validation.timesteps_per_image={self.scale.draws}", "range_test.max_steps=1000000", *self.overrides, *more,
        ]  # fmt: skip


Job = tuple[str, tuple[Any, ...]]
"""The name of a part and what tells its job from the part's others."""


def main(arguments: Sequence[str] | None = None, scale: Scale | None = None) -> Path:
    """Run what is missing, then write tables, figures and JSON; returns their folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller study in about ten minutes")
    parser.add_argument("--ceiling", type=float, help="of the learning rate [default: from the newest range test]")
    parser.add_argument("--best-exposure", type=float, help="S* [default: from the newest range test]")
    parser.add_argument("--base", default=str(ROOT / "data" / "tiny-sd"), help="model")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--factors", type=float, nargs="+", help="only these multiples of the ceiling (part schedules)")
    parser.add_argument("--cycles", type=int, nargs="+", help="only these numbers of cycles (part schedules)")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--build", type=Path, help="where finished runs are kept [default: build/study]")
    parser.add_argument("--results", type=Path, help="where tables and figures go [default: tests/benchmarks/results]")
    parser.add_argument("--set", action="append", default=[], help="as in sdclr, for every run")
    args = parser.parse_args(arguments)
    build = (args.build or ROOT / "build" / ("study-quick" if args.quick else "study")).resolve()
    results = args.results or (build / "results" if args.quick else ROOT / "tests" / "benchmarks" / "results")
    ceiling, best = measured_scale(args.base, args.ceiling, args.best_exposure)
    scale = scale or (QUICK if args.quick else Scale())
    narrowed = {name: tuple(given) for name in ("factors", "cycles") if (given := getattr(args, name))}
    study = Study(dataclasses.replace(scale, **narrowed), args.base, build, ceiling, best, tuple(args.set))
    draw_truth(study)
    if "prior" in args.only:
        draw_prior(study)
    rows = run_jobs(study, [job for part in args.only for job in PARTS[part].jobs(study)], args.workers)
    record = {
        "base": Path(args.base).name, "scale": dataclasses.asdict(study.scale), **{part: rows.get(part, []) for part in PARTS},
        "measured": {part: {"ceiling": ceiling, "best_exposure": best} for part in PARTS},
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    path = results / "study.json"
    record = json.loads(json.dumps(record))
    write_json(path, with_earlier(record, json.loads(path.read_text()) if path.exists() else {}))
    study_report.write(results, json.loads(path.read_text()), build)
    console.result(str(results / "study.md"))
    return results


def with_earlier(record: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """The record, and what an earlier call has found on the same model and this one was not asked for: whole parts, and of the same part
    what was run at the same ceiling and S*."""
    if earlier.get("base") != record["base"]:
        return record
    told = ("factor", "size", "seed", "fold", "schedule", "config", "rate", "kappa", "prior")
    merged = record | {"measured": dict(record["measured"])}
    for part in PARTS:
        before = earlier["measured"].get(part)
        if not record[part] and before:
            merged[part], merged["measured"][part] = earlier[part], before
        elif before == record["measured"][part]:
            here = {tuple(row.get(key) for key in told) for row in record[part]}
            merged[part] = record[part] + [r for r in earlier[part] if tuple(r.get(key) for key in told) not in here]
    return merged


def measured_scale(base: str, ceiling: float | None, best: float | None) -> tuple[float, float]:
    """Ceiling and S*: as given, or of the newest range test of the demo, which is run when there is none."""
    if ceiling and best:
        return ceiling, best
    loaded = source.load(DEMO, [f"model.base={base}", f"data.images={MOCHI}"])
    inputs = read_inputs(loaded)
    if find_range_test(loaded.config, inputs) is None:
        from sdclr.commands.range_test import range_test

        range_test(DEMO, [f"model.base={base}"])
    found = find_range_test(loaded.config, inputs)
    if found is None or not found[1]["ceiling"] or not found[1]["best_exposure"]:
        raise InputError(
            "the range test names no ceiling or no best exposure", hint="give --ceiling and --best-exposure"
        )
    return ceiling or found[1]["ceiling"]["lr"], best or found[1]["best_exposure"]["value"]


# The jobs, in processes of one thread each ----------------------------------------------------------------------------------


def run_jobs(study: Study, jobs: Sequence[Job], workers: int) -> dict[str, list[dict[str, Any]]]:
    """Every job's rows by part, in the order of the jobs."""
    rows: dict[str, list[dict[str, Any]]] = {}
    with console.progress("study", len(jobs)) as bar:
        for (part, about), found in zip(jobs, _results(study, jobs, workers), strict=True):
            rows.setdefault(part, []).extend(found)
            bar.advance(f"{part} {' '.join(map(str, about))}")
    return rows


def _results(study: Study, jobs: Sequence[Job], workers: int) -> Iterator[list[dict[str, Any]]]:
    if workers < 2:
        yield from (run_job(study, job) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_one_thread) as pool:
        yield from pool.map(run_job, itertools.repeat(study), jobs)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    console.quiet = True


def run_job(study: Study, job: Job) -> list[dict[str, Any]]:
    """One job of one part."""
    part, about = job
    return PARTS[part].run(study, *about)


def make_bench(study: Study, loaded: source.LoadedConfig, inputs: Inputs, name: str) -> Any:
    """A Bench on one Run that is kept alive over many arms; it holds out the split's own pictures and those of the truth."""
    from sdclr.engine.arms import Bench
    from sdclr.engine.run import Run

    truth = pairs_.find(study.build / "truth")
    inputs = dataclasses.replace(inputs, split=Split(inputs.split.train, (*inputs.split.validation, *truth)))
    run = Run(loaded.config, inputs)
    assert run.held_out is not None
    return Bench(run, run.held_out, loaded.config, study.build / "arms" / name)


def losses_of(bench: Any, losses: np.ndarray) -> dict[str, float]:
    """(images, draws) as the mean over the truth, and over the few pictures that the split holds out (when it does)."""
    each = losses.mean(axis=1)
    is_truth = np.array([key.startswith("truth-") for key in bench.draws.keys])
    return {"truth": float(each[is_truth].mean())} | (
        {"held_out": float(each[~is_truth].mean())} if (~is_truth).any() else {}
    )


def run_schedule(bench: Any, name: str, schedule: Schedule, points: set[int]) -> Any:
    """One run from the untouched weights, measured after the steps in `points` and at its end; read from disk if it is there."""
    last = schedule.steps
    text = f"{name}-{key_of(repr(schedule))[:10]}"
    return bench.arm(text, schedule.max_lr, schedule, at_steps({*points, last}))


# Schedules, and sizes -------------------------------------------------------------------------------------------------------


def schedules(exposure: float, mean_rate: float, cycles: Sequence[int]) -> dict[str, Schedule]:
    """The schedules to compare: all of the same number of steps, all of exactly the same exposure."""
    steps = max(2, round(exposure / mean_rate))
    shapes = {"constant": Schedule("constant", 1.0, steps), "linear to zero": Schedule("linear", 1.0, steps)}
    for count in cycles:
        name = f"{count} cycle{'s' if count > 1 else ''}"
        shapes[name] = Schedule("triangular", 1.0, steps, step_size=steps / (2 * count))
    shapes["groups 3 + 2 + 1.5"] = Schedule("triangular", 1.0, steps, step_size=steps / 13, start="peak", groups=GROUPS)
    return {
        name: dataclasses.replace(shape, max_lr=exposure / float(shape.rates().sum())) for name, shape in shapes.items()
    }


def schedule_jobs(study: Study) -> list[Job]:
    return [("schedules", job) for job in itertools.product(study.scale.factors, study.scale.seeds, study.scale.folds)]


def schedule_job(study: Study, factor: float, seed: int, fold: int) -> list[dict[str, Any]]:
    """All schedules at one rate for one seed and split."""
    loaded = source.load(DEMO, study.settings(seed))
    bench = make_bench(study, loaded, read_inputs(loaded, fold=fold), f"schedules-{seed}-{fold}")
    shapes = schedules(study.best_exposure, factor * study.ceiling / 2, study.scale.cycles)
    return _compare(bench, factor, shapes, {"seed": seed, "fold": fold})


def size_jobs(study: Study) -> list[Job]:
    return [("sizes", job) for job in itertools.product(study.scale.sizes, study.scale.seeds, study.scale.size_sets)]


def size_job(study: Study, size: int, seed: int, number: int) -> list[dict[str, Any]]:
    """Some schedules on `size` training pictures; exposure grows with the root of their number (research: prior of S*)."""
    folder = study.build / f"pictures-{size}-{number}"
    draw_subject(
        folder, f"mochi-{number}", size, seed=9_000 + 100 * number + size, avoid=captions_of(study.build / "truth")
    )
    settings = study.settings(seed, f"data.images={folder}", "validation.fraction=0")
    loaded = source.load(DEMO, settings)
    bench = make_bench(study, loaded, read_inputs(loaded), f"sizes-{size}-{seed}-{number}")
    exposure = study.best_exposure * (size / 16) ** 0.5
    about = {"size": size, "seed": seed, "fold": number}
    return _compare(bench, 1.0, schedules(exposure, study.ceiling / 2, (4,)), about)


def planned_jobs(study: Study) -> list[Job]:
    return [("planned", job) for job in itertools.product(study.scale.seeds, study.scale.folds)]


def planned_job(study: Study, seed: int, fold: int) -> list[dict[str, Any]]:
    """The schedules among which a run's default is to be chosen, at the length and the rate of a recommended run."""
    loaded = source.load(DEMO, study.settings(seed))
    bench = make_bench(study, loaded, read_inputs(loaded, fold=fold), f"schedules-{seed}-{fold}")
    shapes = schedules(study.best_exposure, peak_below(study.ceiling) / 2, (1, 2, 4))
    plain = {name: shape for name, shape in shapes.items() if not shape.groups}
    return _compare(bench, peak_below(1.0), plain, {"seed": seed, "fold": fold})


def _compare(bench: Any, factor: float, shapes: dict[str, Schedule], about: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    untouched = losses_of(bench, bench.base())
    for name, schedule in shapes.items():
        arm = run_schedule(bench, f"{name.replace(' ', '-')}-{factor}", schedule, set())
        whole = not arm.diverged and len(arm.steps) and arm.steps[-1] == schedule.steps
        rows.append({
            **about, "factor": factor, "schedule": name, "peak": schedule.max_lr, "steps": schedule.steps,
            "exposure": float(schedule.rates().sum()), "base": untouched, "end": losses_of(bench, arm.losses[-1]) if whole else None,
        })  # fmt: skip
    return rows


# Averages -------------------------------------------------------------------------------------------------------------------


def average_jobs(study: Study) -> list[Job]:
    return [("averages", job) for job in itertools.product(study.scale.seeds, study.scale.folds)]


def average_job(study: Study, seed: int, fold: int) -> list[dict[str, Any]]:
    """Runs of equal exposure, each measured with its last weights and with averages of its weights; kept on disk when all have ended."""
    loaded = source.load(DEMO, study.settings(seed))
    bench = make_bench(study, loaded, read_inputs(loaded, fold=fold), f"averages-{seed}-{fold}")
    found = schedules(study.best_exposure, study.ceiling / 2, (4,))
    shapes = {name: found[name] for name in ("constant", "linear to zero", "4 cycles")}

    def make() -> Iterator[dict[str, Any]]:
        untouched = losses_of(bench, bench.base())
        for name, schedule in shapes.items():
            for average, end in averaged(bench, schedule, study.scale.decays):
                yield {
                    "seed": seed, "fold": fold, "factor": 1.0, "schedule": f"{name}{average}", "peak": schedule.max_lr, "steps": schedule.steps,
                    "exposure": float(schedule.rates().sum()), "base": untouched, "end": end,
                }  # fmt: skip

    return kept(bench, repr((shapes, study.scale.decays)), make)


def averaged(bench: Any, schedule: Schedule, decays: Sequence[float]) -> Iterator[tuple[str, dict[str, float] | None]]:
    """A run's losses with its last weights, with diffusers' exponential averages over the steps (whose decay begins at 2/11 and rises as
    (1 + n)/(10 + n) up to the one given, as train_text_to_image.py has it), and with the mean of its troughs."""
    import torch
    from diffusers.training_utils import EMAModel

    run = bench.run
    state, parameters = run.fresh_state(), list(run.modules["unet"].parameters())
    averages = {f", EMA {decay:g}": EMAModel(parameters, decay=decay) for decay in decays}
    troughs: list[list[torch.Tensor]] = []
    whole = True
    try:
        for result in run.steps(state, schedule, schedule.steps):
            for average in averages.values():
                average.step(parameters)
            if result.step in schedule.troughs():
                troughs.append([parameter.detach().clone() for parameter in parameters])
    except DivergenceError:
        whole = False
    weights = {"": parameters} | {name: average.shadow_params for name, average in averages.items()}
    if len(schedule.troughs()) > 1:
        weights[", mean of the troughs"] = [torch.stack(each).mean(dim=0) for each in zip(*troughs, strict=True)]
    for name, values in weights.items():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data.copy_(value)
        yield name, losses_of(bench, run.losses(bench.held_out, bench.draws)) if whole else None


# Replays --------------------------------------------------------------------------------------------------------------------


def replay_jobs(study: Study) -> list[Job]:
    return [("replays", (name,)) for name in study.scale.replays]


def replay_job(study: Study, name: str) -> list[dict[str, Any]]:
    """One shipped config, its own split and rates, measured every 20 steps."""
    settings = [s for s in study.settings(0) if not s.startswith("run.seed")]
    loaded = source.load(REPLAYS / f"{name}.yaml", settings)
    inputs = read_inputs(loaded)
    schedule = make_plan(loaded, inputs).schedule
    bench = make_bench(study, loaded, inputs, f"replays-{name}")
    arm = run_schedule(bench, name, schedule, set(range(LOOK_EVERY, schedule.steps, LOOK_EVERY)))
    looks = [losses_of(bench, losses) for losses in (bench.base(), *arm.losses)]
    return [{
        "config": name, "peak": schedule.max_lr, "steps": [0, *map(int, arm.steps)], "exposure": [0.0, *arm.exposure.tolist()],
        "losses": looks, "rates": schedule.rates().tolist(), "diverged": arm.diverged,
    }]  # fmt: skip


# The ladder -----------------------------------------------------------------------------------------------------------------


def ladder_jobs(study: Study) -> list[Job]:
    return [("ladder", pair) for pair in itertools.product(study.scale.seeds, study.scale.rates)]


def ladder_job(study: Study, seed: int, rate: float) -> list[dict[str, Any]]:
    """One cyclical run whose troughs are drawn from; kept on disk when it is whole."""
    loaded = source.load(DEMO, study.settings(seed))
    bench = make_bench(study, loaded, read_inputs(loaded), f"ladder-{seed}-{rate}")
    schedule, cycle = ladder_schedule(study, rate, study.scale.rungs)
    due = {rung * cycle: rung for rung in study.scale.rungs}
    return climbed(study, bench, schedule, due, {"seed": seed, "rate": rate})


def prior_jobs(study: Study) -> list[Job]:
    return [("prior", job) for job in itertools.product(study.scale.seeds, study.scale.folds, (False, True))]


def prior_job(study: Study, seed: int, fold: int, prior: bool) -> list[dict[str, Any]]:
    """One run with its top at the ceiling, with or without prior pictures, drawn from at some troughs."""
    loaded = source.load(DEMO, study.settings(seed, *[f"prior.images={study.build / 'prior'}"] * prior))
    bench = make_bench(study, loaded, read_inputs(loaded, fold=fold), f"prior-{seed}-{fold}-{prior}")
    schedule, cycle = ladder_schedule(study, 1.0, study.scale.prior_rungs)
    due = {rung * cycle: rung for rung in study.scale.prior_rungs}
    return climbed(study, bench, schedule, due, {"seed": seed, "fold": fold, "prior": prior})


def climbed(
    study: Study, bench: Any, schedule: Schedule, due: dict[int, int], about: dict[str, Any]
) -> list[dict[str, Any]]:
    """One cyclical run's rows, of the steps that are due; read from disk if it is there."""
    scale, prompts = study.scale, sampled_prompts(study.scale.prompts)
    what = repr((schedule, prompts, due, scale.pictures, scale.sampler_steps))
    return kept(bench, what, lambda: climb(study, bench, schedule, due, prompts, about))


def kept(bench: Any, what: str, make: Callable[[], Iterator[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows that `make` makes of a bench, read from disk if those of the same bench and `what` are there."""
    key, path = key_of(bench.key, what), bench.folder / "rows.json"
    try:
        if (stored := read_json(path))["key"] == key:
            return stored["rows"]
    except (InputError, KeyError):
        pass
    rows = list(make())
    write_json(path, {"key": key, "rows": rows})
    return rows


def ladder_schedule(study: Study, rate: float, rungs: Sequence[int]) -> tuple[Schedule, int]:
    """Triangles of κ = 0.5 each, with their tops as near to the rate as whole steps allow; and the steps of one cycle."""
    exposure = CYCLE_KAPPA * study.best_exposure
    cycle = max(2, round(exposure / (rate * study.ceiling / 2)))
    shape = Schedule("triangular", 1.0, cycle * max(rungs), step_size=cycle / 2)
    return dataclasses.replace(shape, max_lr=exposure * max(rungs) / float(shape.rates().sum())), cycle


def climb(
    study: Study,
    bench: Any,
    schedule: Schedule,
    due: dict[int, int],
    prompts: Sequence[Portrait],
    about: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """The untouched base, then each trough that is a rung: its losses and what its pictures show."""
    run = bench.run
    painter = Painter(study, run, prompts, bench.folder)
    untouched = run.fresh_state()
    yield {
        **about,
        "kappa": 0.0,
        "step": 0,
        **losses_of(bench, run.losses(bench.held_out, bench.draws)),
        **painter.look(0),
    }
    try:
        for result in run.steps(untouched, schedule, schedule.steps):
            if result.step in due:
                losses = losses_of(bench, run.losses(bench.held_out, bench.draws))
                kappa = result.exposure / study.best_exposure
                yield {**about, "kappa": kappa, "step": result.step, **losses, **painter.look(due[result.step])}
    except DivergenceError:
        return


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the study: its jobs, and how one is run."""

    jobs: Callable[[Study], list[Job]]
    run: Callable[..., list[dict[str, Any]]]


PARTS = {
    "schedules": Part(schedule_jobs, schedule_job),
    "ladder": Part(ladder_jobs, ladder_job),
    "prior": Part(prior_jobs, prior_job),
    "replays": Part(replay_jobs, replay_job),
    "sizes": Part(size_jobs, size_job),
    "planned": Part(planned_jobs, planned_job),
    "averages": Part(average_jobs, average_job),
}

if __name__ == "__main__":
    main()
