"""`sdclr sample`: checkpoints and whole runs side by side; same prompts, same seeds, same starting noise, the base always beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sdclr.config import source
from sdclr.config.schema import ModelSection, RunConfig
from sdclr.data.cache import key_of
from sdclr.data.dataset import readable, upright
from sdclr.data.pairs import printable
from sdclr.engine.fingerprint import another_base, drawing_fingerprint, model_fingerprint
from sdclr.engine.folder import RunFolder, write_bytes, write_json, write_text
from sdclr.errors import DataError, InputError, first_line
from sdclr.report import console, figures, page

if TYPE_CHECKING:
    from sdclr.engine.checkpoint import Checkpoint
    from sdclr.engine.painter import Painter

MAX_COLUMNS = 8
"""Columns taken from one run's checkpoints when none are named: more are thinned evenly, the best always stays."""


@dataclasses.dataclass(frozen=True)
class Column:
    """One state of the model: where its weights lie (None: the base), and how it is labelled."""

    label: str
    weights: Path | None
    identity: str
    about: dict[str, Any]


def sample(
    config_path: Path,
    overrides: Sequence[str] = (),
    runs: Sequence[Path] = (),
    checkpoints: Sequence[Path] = (),
    output: Path | None = None,
    score: str | None = None,
) -> None:
    """Draw every missing cell, then the grid, its JSON and its page; prints the grid's path. `score` names a CLIP model."""
    loaded = source.load(config_path, overrides)
    config = loaded.config
    run = RunFolder(config.folder)
    columns = [_base(config)]
    folders = [config.folder, *runs]
    if checkpoints:
        columns += [_column(run.state(path), None, run) for path in checkpoints]
    else:
        for folder in runs:
            if not folder.is_dir():
                raise InputError(f"{folder}: there is no such run")
        for folder in folders:
            columns += _columns_of_run(folder, folder.name if len(folders) > 1 else None)
    if len(columns) == 1:
        raise InputError(
            f"{config.folder}: holds no checkpoint to draw", hint=f"train first: sdclr train {loaded.typed}"
        )
    _say_who_has_another_base(columns, config.model)
    target = output or run.samples
    pictures = draw_missing(config, columns, target / "cells")
    scores = _scored(loaded, columns, pictures, score) if score else None
    if scores:
        console.table(_score_rows(columns, scores), SCORE_HEADER, title=f"scores by {score}: mean ± spread")
    grid_path = _write(config, columns, pictures, target, score, scores)
    console.result(str(grid_path))


def draw_missing(config: RunConfig, columns: Sequence[Column], cells: Path) -> dict[tuple[int, str, int], Image.Image]:
    """Every cell (column, prompt, seed) as a picture; those already on disk are not drawn again."""
    paths = _paths(config, columns, cells)
    # By path, because two columns may hold the same weights.
    missing = list({path: cell for cell, path in reversed(paths.items()) if not readable(path)}.values())
    if missing:
        from sdclr.engine.painter import KeptStates

        with console.progress("drawing", len(missing)) as bar:
            painter = KeptStates(config)
            for c in sorted({cell[0] for cell in missing}):
                painter.load(columns[c].weights)
                for cell in (cell for cell in missing if cell[0] == c):
                    write_bytes(paths[cell], figures.png(painter.draw(cell[1], cell[2])))
                    bar.advance(columns[c].label.replace("\n", " "))
    return _opened(paths)


def draw_at_work(config: RunConfig, step: int, painter: Painter, goes_on: Callable[[str], bool]) -> None:
    """For a run at work, at a step whose trough it has just kept (0: the base): draw that with the weights as they are, and lay it beside what
    has been drawn before, in a grid of its own. Its cells are those that `sample` would draw. `goes_on` is told how far it has come, and
    answers whether it may go on."""
    from sdclr.engine.checkpoint import TROUGH, available

    run = RunFolder(config.folder)
    troughs = _thinned(available(run.checkpoints, (TROUGH,)), MAX_COLUMNS - 1)
    columns = [_base(config), *(_kept(trough) for trough in troughs)]
    paths = _paths(config, columns, run.samples / "cells")
    missing = [cell for cell, path in paths.items() if not readable(path)]
    due = [cell for cell in missing if columns[cell[0]].about.get("step", 0) == step]
    for number, cell in enumerate(due):
        if not goes_on(f"drawing {number + 1} of {len(due)}"):
            return
        write_bytes(paths[cell], figures.png(painter.draw(cell[1], cell[2])))
        missing.remove(cell)
    drawn = [c for c in range(len(columns)) if c not in {cell[0] for cell in missing}]
    if drawn:
        pictures = {
            (place, *cell[1:]): path for place, c in enumerate(drawn) for cell, path in paths.items() if cell[0] == c
        }
        _write(config, [columns[c] for c in drawn], _opened(pictures), run.samples / "at-work", None, None)


def _opened(paths: dict[tuple[int, str, int], Path]) -> dict[tuple[int, str, int], Image.Image]:
    return {cell: Image.open(path).convert("RGB") for cell, path in paths.items()}


def _paths(config: RunConfig, columns: Sequence[Column], cells: Path) -> dict[tuple[int, str, int], Path]:
    """Where the picture of each cell (column, prompt, seed) lies: named by all that it depends on."""
    s = config.sample
    *settings, size = drawing_fingerprint(config).values()
    return {
        (c, prompt, seed): cells / f"{key_of(column.identity, prompt, seed, *settings, *size)}.png"
        for c, column in enumerate(columns)
        for prompt in s.prompts
        for seed in s.seeds
    }


def _base(config: RunConfig) -> Column:
    return Column("base", None, model_fingerprint(config.model.base), {})


def _columns_of_run(folder: Path, run_name: str | None) -> list[Column]:
    """A run's troughs in order, thinned evenly, then the average of them all, and its best; where that is one of these troughs, in its place."""
    from sdclr.engine.checkpoint import AVERAGE, BEST, FULL, TROUGH, available

    run = RunFolder(folder)
    found = available(run.checkpoints)
    troughs = [c for c in found if c.kind == TROUGH] or [c for c in found if c.kind == FULL][-1:]
    average, best = ([c for c in found if c.kind == kind][-1:] for kind in (AVERAGE, BEST))
    room = MAX_COLUMNS - 1 - len(average) - len(best)
    if len(troughs) > room:
        console.say(
            f"{folder}: {len(troughs)} kept states, drawing {room} spread evenly; name others with --checkpoint"
        )
    columns = [_column(c.path, run_name, run) for c in (*_thinned(troughs, room), *average)]
    for column in (_column(c.path, run_name, run) for c in best):
        twin = next((n for n, c in enumerate(columns) if c.identity == column.identity), len(columns))
        columns[twin : twin + 1] = [column]
    return columns


def _thinned(states: Sequence[Checkpoint], room: int) -> Sequence[Checkpoint]:
    """As many as there is room for, spread evenly from the first to the last."""
    if len(states) <= room:
        return states
    return [states[round(i * (len(states) - 1) / (room - 1))] for i in range(room)]


def _column(path: Path, run_name: str | None, run: RunFolder) -> Column:
    """A column for a checkpoint (verified) or any folder with a unet/ or a LoRA inside. Raises InputError when it is neither."""
    from sdclr.engine.checkpoint import kept_in

    checkpoint = kept_in(path, run.checkpoints)
    if checkpoint is None:
        return Column("\n".join(filter(None, [run_name, path.name])), path, model_fingerprint(str(path)), {})
    return _kept(checkpoint, run_name)


def _kept(checkpoint: Checkpoint, run_name: str | None = None) -> Column:
    """A column for a checkpoint that is known to be whole."""
    info = checkpoint.info()
    words = [
        run_name,
        _name_of_state(checkpoint.kind, info),
        f"S {info['exposure']:.2g}" + (f"  κ {info['kappa']:.2f}" if info.get("kappa") else ""),
    ]
    if info.get("validation_loss") is not None:
        words.append(f"held out {info['validation_loss']:.4f}")
    keys: tuple[str, ...] = ("step", "exposure", "kappa", "validation_loss", "averaged")
    about = {key: info[key] for key in keys if key in info}
    label = "\n".join(w for w in words if w)
    return Column(label, checkpoint.path, model_fingerprint(str(checkpoint.path)), about)


def _say_who_has_another_base(columns: Sequence[Column], model: ModelSection) -> None:
    """What a checkpoint does not hold is drawn with this config's base, whichever it was trained from."""
    from sdclr.engine.checkpoint import STATE, Checkpoint

    for path in (column.weights for column in columns if column.weights and (column.weights / STATE).is_file()):
        named = another_base(Checkpoint(path, "", 0).info(), model)
        if named:
            console.warn(f"{path}: was trained from {named} as it was then, and is drawn over model.base {model.base}")


def _name_of_state(kind: str, info: dict[str, Any]) -> str:
    from sdclr.engine.checkpoint import AVERAGE, BEST

    if kind == AVERAGE:
        return f"average of {len(info['averaged'])} troughs"
    return ("best, " if kind == BEST else "") + f"step {info['step']}"


def _scored(
    loaded: source.LoadedConfig,
    columns: Sequence[Column],
    pictures: dict[tuple[int, str, int], Image.Image],
    name: str,
) -> list[dict[str, Any]]:
    """For each column likeness to the training images, obedience to the prompts and variety between the seeds."""
    from sdclr.engine.plan import read_inputs
    from sdclr.engine.run import make_accelerator
    from sdclr.model.scores import Judge, scores

    config = loaded.config
    judge = Judge(name, make_accelerator(config).device)
    prompts = list(config.sample.prompts)
    with console.progress("scoring", len(columns)) as bar:
        paths = [pair.path for pair in read_inputs(loaded).split.train]
        training = judge.pictures(map(_decoded, paths))
        texts = judge.texts(prompts)
        found = []
        for c in range(len(columns)):
            cells = [(p, pictures[c, prompt, seed]) for p, prompt in enumerate(prompts) for seed in config.sample.seeds]
            drawn = judge.pictures([picture for _, picture in cells])
            values = scores(drawn, [p for p, _ in cells], texts, training)
            found.append({measure: dataclasses.asdict(value) for measure, value in values.items()})
            bar.advance()
    return found


def _decoded(path: Path) -> Image.Image:
    try:
        return upright(path)
    except Exception as error:  # Pillow's decoders raise many kinds: each means a broken file
        raise DataError([f"{printable(path)}: cannot be decoded: {first_line(error)}"]) from None


SCORE_HEADER = ("state", "likeness to the training images", "obedience to the prompt", "variety between seeds")


def _score_rows(columns: Sequence[Column], scores: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (column.label.replace("\n", ", "), *(_score_in_words(found[m]) for m in ("likeness", "obedience", "variety")))
        for column, found in zip(columns, scores, strict=True)
    ]


def _score_in_words(score: dict[str, Any]) -> str:
    if score["mean"] is None:
        return "— (needs two seeds)"
    return f"{score['mean']:.3f}" + (f" ± {score['sd']:.3f}" if score["sd"] is not None else "")


def _write(
    config: RunConfig,
    columns: Sequence[Column],
    pictures: dict[tuple[int, str, int], Image.Image],
    target: Path,
    score: str | None,
    scores: Sequence[dict[str, Any]] | None,
) -> Path:
    """grid.png, grid.json and index.html; returns the first."""
    rows = [(prompt, seed) for prompt in config.sample.prompts for seed in config.sample.seeds]
    cells = [[pictures[c, prompt, seed] for c in range(len(columns))] for prompt, seed in rows]
    names = [f"{prompt or '(no prompt)'}\nseed {seed}" for prompt, seed in rows]
    grid = figures.png(figures.grid(cells, [c.label for c in columns], names))
    write_bytes(target / "grid.png", grid)
    record = _record(config, columns, rows, score, scores)
    write_json(target / "grid.json", record)
    sections: list[dict[str, Any]] = [{"title": "Grid", "picture": grid}]
    if scores:
        text = f"By {score}: mean ± spread over the pictures of a column; likeness and obedience are cosines, variety is 1 − cosine."
        sections.append({"title": "Scores", "text": text, "header": SCORE_HEADER, "rows": _score_rows(columns, scores)})
    settings = {
        name: "×".join(map(str, value)) if name == "size" else value for name, value in record["settings"].items()
    }
    sections.append({"title": "Settings", "rows": [(name, value) for name, value in settings.items() if value != ""]})
    lead = "Same prompt, same seed, same starting noise in each row."
    write_text(target / "index.html", page.render(f"Samples of {config.run.name}", lead, sections))
    return target / "grid.png"


def _record(
    config: RunConfig,
    columns: Sequence[Column],
    rows: Sequence[tuple[str, int]],
    score: str | None,
    scores: Sequence[dict[str, Any]] | None,
) -> dict[str, Any]:
    """What grid.json holds."""
    s = config.sample
    shown = [
        {"label": c.label, "weights": str(c.weights) if c.weights else config.model.base, **c.about} for c in columns
    ]
    for column, found in zip(shown, scores or [], strict=False):
        column["scores"] = found
    settings = {
        "negative_prompt": s.negative_prompt,
        "steps": s.steps,
        "guidance": s.guidance,
        "resolution": config.data.resolution,
        "size": list(config.sample_size),
    }
    return {
        "columns": shown,
        "rows": [{"prompt": prompt, "seed": seed} for prompt, seed in rows],
        "settings": settings | ({"score": score} if score else {}),
    }
