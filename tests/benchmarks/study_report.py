"""The study's tables (Markdown) and figures (PNG), from its JSON alone. No difference is shown without its interval."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from sdclr.lr.paired import half_width
from sdclr.report.figures import MUTED, PALETTE, STYLE, grid, png

Rows = Sequence[dict[str, Any]]


def write(folder: Path, record: dict[str, Any], build: Path) -> None:
    """study.md and every figure that the record has numbers for."""
    text = [
        "# The cycling study",
        (
            f"Base `{record['base']}`. Losses are of "
            f"{record['scale']['truth']} pictures of the subject, drawn by code, that no run has seen. Intervals are 95 %, Student's t "
            "over the pairs."
        ),
    ]
    for part, tell in (
        ("schedules", tell_schedules), ("planned", tell_planned), ("averages", tell_averages), ("sizes", tell_sizes), ("ladder", tell_ladder), ("prior", tell_prior), ("replays", tell_replays),
    ):  # fmt: skip
        if record[part]:
            title, *rest = tell(folder, record, build)
            text += [
                title,
                "Ceiling {ceiling:.3g}, best exposure S\\* {best_exposure:.3g}.".format(**record["measured"][part]),
                *rest,
            ]
    (folder / "study.md").write_text("\n\n".join(text) + "\n")


# Schedules against constant -------------------------------------------------------------------------------------------------


def paired(rows: Rows, where: str = "truth") -> list[dict[str, Any]]:
    """Each schedule against constant within its seed, split, rate and size: mean difference as a share of constant's gain.

    A pair counts when both runs ended finite; `diverged` says how many did not.
    """
    unit: Callable[[dict[str, Any]], tuple[Any, ...]] = lambda r: (r["seed"], r["fold"], r.get("size"))  # noqa: E731
    constants = {(r["factor"], *unit(r)): r for r in rows if r["schedule"] == "constant"}
    found = []
    for (factor, size, name), group in _grouped(rows, lambda r: (r["factor"], r.get("size") or 0, r["schedule"])):
        pairs = [(r, constants[factor, *unit(r)]) for r in group]
        whole = [(r["end"][where], c["end"][where], c["base"][where]) for r, c in pairs if r["end"] and c["end"]]
        line = {"factor": factor, "size": size, "schedule": name, "peak": group[0]["peak"], "steps": group[0]["steps"],
                "pairs": len(whole), "diverged": sum(not r["end"] for r in group)}  # fmt: skip
        if whole:
            ours, constant, base = np.array(whole).T
            gain = float((base - constant).mean())
            shares = (ours - constant) / gain
            line |= {"loss": float(ours.mean()), "gain": gain, "difference": float(shares.mean()), "half": half_width(shares),
                     "better": int((shares < 0).sum())}  # fmt: skip
        found.append(line)
    return found


def tell_schedules(folder: Path, record: dict[str, Any], build: Path) -> list[str]:
    lines = paired(record["schedules"])
    (folder / "schedules.png").write_bytes(draw_schedules(lines))
    ours = [line for line in lines if line["schedule"] != "constant" and "difference" in line]
    excluding = sum(abs(line["difference"]) > line["half"] for line in ours)
    return [
        "## Each schedule against constant, at equal exposure and equal steps",
        (
            "Difference to constant in the same seed, split, batches and noise, as a share of what constant training gains; below zero "
            "is better than constant. A triangle's top is the multiple of the ceiling in the first column; constant runs at half of that; "
            f"all collect κ = 1. Splits share most of their training pictures, and the unseen ones are the same throughout, so the "
            f"intervals speak of this subject and are somewhat narrow. {len(ours)} intervals are shown; {excluding} exclude zero, and {0.05 * len(ours):.1f} would by chance alone."
        ),
        _schedule_table(lines, ("top / ceiling", lambda line: f"{line['factor']:g}")),
        "![Each schedule against constant](schedules.png)",
    ]


def tell_planned(folder: Path, record: dict[str, Any], build: Path) -> list[str]:
    return [
        "## At the rate and the length of a recommended run",
        "The same with a triangle's top at half the ceiling, as a range test recommends it.",
        _schedule_table(paired(record["planned"]), ("top / ceiling", lambda line: f"{line['factor']:g}")),
    ]


def tell_averages(folder: Path, record: dict[str, Any], build: Path) -> list[str]:
    return [
        "## The last weights against averages of weights",
        (
            "The same with exponential averages of a run's weights over its steps (EMA; diffusers' own, whose decay rises to the one named) and "
            "with the mean of its troughs, in place of its last weights; all against constant training's last weights."
        ),
        _schedule_table(paired(record["averages"]), ("top / ceiling", lambda line: f"{line['factor']:g}")),
    ]


def tell_sizes(folder: Path, record: dict[str, Any], build: Path) -> list[str]:
    return [
        "## More training pictures",
        (
            "The same with more pictures of the subject to train on, a plain triangle's top at the ceiling, exposure growing with the root "
            "of their number."
        ),
        _schedule_table(paired(record["sizes"]), ("pictures", lambda line: str(line["size"]))),
    ]


def _schedule_table(lines: Rows, first: tuple[str, Callable[[dict[str, Any]], str]]) -> str:
    head = (
        first[0],
        "schedule",
        "peak rate",
        "steps",
        "loss",
        "difference, share of the gain",
        "better in",
        "diverged",
    )
    rows = []
    for line in lines:
        plain = line["schedule"] == "constant" or "difference" not in line
        difference = "—" if plain else f"{line['difference']:+.2%} ± {line['half']:.2%}"
        rows.append((
            first[1](line), line["schedule"], f"{line['peak']:.2e}", line["steps"], f"{line['loss']:.5f}" if "loss" in line else "—",
            difference, "—" if plain else f"{line['better']} of {line['pairs']}", line["diverged"] or "",
        ))  # fmt: skip
    return table(head, rows)


def draw_schedules(lines: Rows) -> bytes:
    """One panel a rate: every schedule's difference to constant with its interval."""
    factors = sorted({line["factor"] for line in lines})
    most = max(factors, key=lambda factor: sum(line["factor"] == factor for line in lines))
    # The rate that most schedules were run at comes first, and gives them their order.
    ordered = sorted(lines, key=lambda line: line["factor"] != most)
    names = [n for n in dict.fromkeys(line["schedule"] for line in ordered) if n != "constant"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.4, 1.6 + 0.5 * len(names)), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(factors), sharey=True))
        for axes, factor in zip(panels, factors, strict=True):
            for line in lines:
                if line["factor"] != factor or line["schedule"] == "constant" or "difference" not in line:
                    continue
                place, half = names.index(line["schedule"]), line["half"]
                clear = abs(line["difference"]) > half
                colour = MUTED if not clear else PALETTE[2] if line["difference"] < 0 else PALETTE[1]
                half = half if np.isfinite(half) else 0.0
                axes.errorbar(line["difference"], place, xerr=half, fmt="o", color=colour, capsize=4, lw=2, ms=7)
            axes.axvline(0, color=MUTED, lw=1)
            axes.set_title(f"top at {factor:g} × the ceiling")
            axes.xaxis.set_major_formatter(lambda v, _: f"{v:+.0%}" if abs(v) > 1e-9 else "0")
            axes.tick_params(axis="x", labelsize=9.5)
            axes.locator_params(axis="x", nbins=4)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()
        figure.supxlabel(
            "difference to constant at equal exposure, share of the gain (left is better; grey: the interval holds zero)",
            fontsize=11,
        )
        return png(figure)


# The ladder -----------------------------------------------------------------------------------------------------------------

MEASURES = (
    ("likeness", "mochi", "likeness to the subject", "mochi's share of the face"),
    ("obedience", "mochi", "obedience, subject's prompts", "share of colours as asked"),
    ("variety", "mochi", "variety between seeds", "r.m.s. pixel difference"),
    ("obedience", "person", "obedience, other prompts", "share of colours as asked"),
    ("likeness", "person", "leak into other prompts", "mochi's share of the face"),
)


def rungs(rows: Rows) -> list[dict[str, Any]]:
    """Mean over training seeds of every measure for each rate and rung, with an interval over prompts."""
    found = []
    for (rate, rung), group in _grouped(rows, lambda r: (r["rate"], round(r["kappa"], 1))):
        line: dict[str, Any] = {"rate": rate, "kappa": rung, "step": group[0]["step"], "seeds": len(group),
                                "loss": float(np.mean([r["truth"] for r in group]))}  # fmt: skip
        for measure, subject, name, _ in MEASURES:
            each = _by_prompt(group, measure, subject)
            line[name] = (float(each.mean()), half_width(each))
        found.append(line)
    return found


def contrasts(rows: Rows) -> list[tuple[str, str, str]]:
    """For every measure, what more exposure changes (the last rung against κ = 1, the rates averaged) and what the rate does (the
    fastest against the slowest, the rungs averaged): mean over training seeds, paired by prompt, with an interval over prompts."""
    rates, kappas = sorted({r["rate"] for r in rows}), sorted({round(r["kappa"], 1) for r in rows})

    def mean(measure: str, subject: str, wanted: Callable[[dict[str, Any]], bool]) -> np.ndarray:
        return _by_prompt([r for r in rows if wanted(r)], measure, subject)

    def told(each: np.ndarray) -> str:
        return f"{each.mean():+.3f} ± {half_width(each):.3f}"

    return [
        (
            name,
            told(
                mean(measure, subject, lambda r: round(r["kappa"], 1) == kappas[-1])
                - mean(measure, subject, lambda r: round(r["kappa"], 1) == 1.0)
            ),
            told(
                mean(measure, subject, lambda r: r["rate"] == rates[-1] and r["kappa"] > 0)
                - mean(measure, subject, lambda r: r["rate"] == rates[0] and r["kappa"] > 0)
            ),
        )
        for measure, subject, name, _ in MEASURES
    ]


def tell_ladder(folder: Path, record: dict[str, Any], build: Path) -> list[str]:
    lines = rungs(record["ladder"])
    (folder / "ladder.png").write_bytes(draw_ladder(lines))
    pictures = ladder_grid(record, build)
    if pictures:
        (folder / "ladder-grid.png").write_bytes(pictures)
    head = ("top / ceiling", "κ", "step", "loss", *(name for _, _, name, _ in MEASURES))
    rows = [
        (f"{x['rate']:g}", f"{x['kappa']:.1f}", x["step"], f"{x['loss']:.4f}", *(f"{x[n][0]:.3f} ± {x[n][1]:.3f}" for _, _, n, _ in MEASURES))
        for x in lines
    ]  # fmt: skip
    return [
        "## The ladder: what the pictures show at each trough",
        "Means over training seeds, prompts and sampling seeds; the interval is over prompts. κ = 0 is the untouched base.",
        table(head, rows),
        "![Likeness, obedience and variety against κ](ladder.png)",
        *_exposure_or_rate(record["ladder"]),
        *(["![The same prompt and seed at every rung](ladder-grid.png)"] if pictures else []),
    ]


def against_none(rows: Rows) -> list[dict[str, Any]]:
    """What prior pictures change at each rung: the held-out loss as a share of what is gained without them, paired by seed and split, with
    an interval over these; every measure of the pictures in the mean of these, paired by prompt, with an interval over prompts."""
    found = []
    untouched = float(np.mean([r["truth"] for r in rows if r["kappa"] == 0]))
    for kappa, group in _grouped([r for r in rows if r["kappa"] > 0], lambda r: round(r["kappa"], 1)):
        without, with_prior = (
            sorted((r for r in group if r["prior"] is kind), key=lambda r: (r["seed"], r["fold"]))
            for kind in (False, True)
        )
        plain = np.array([r["truth"] for r in without])
        shares = (np.array([r["truth"] for r in with_prior]) - plain) / (untouched - plain.mean())
        line: dict[str, Any] = {
            "kappa": kappa,
            "pairs": len(shares),
            "loss": (float(shares.mean()), half_width(shares)),
        }
        for measure, subject, name, _ in MEASURES:
            each = [_by_prompt(own, measure, subject) for own in (without, with_prior)]
            change = each[1] - each[0]
            line[name] = (float(each[0].mean()), float(each[1].mean()), float(change.mean()), half_width(change))
        found.append(line)
    return found


def _by_prompt(rows: Rows, measure: str, subject: str) -> np.ndarray:
    """A measure of each prompt of a subject, the mean over some runs."""
    return np.array([[p[measure] for p in r["prompts"] if p["subject"] == subject] for r in rows]).mean(axis=0)


def tell_prior(folder: Path, record: dict[str, Any], build: Path) -> list[str]:
    lines = against_none(record["prior"])
    pictures = prior_grid(record, build)
    if pictures:
        (folder / "prior-grid.png").write_bytes(pictures)
    rows = [
        (f"{line['kappa']:.1f}", f"{line['loss'][0]:+.1%} ± {line['loss'][1]:.1%}",
         *("{:.3f} → {:.3f} ({:+.3f} ± {:.3f})".format(*line[name]) for _, _, name, _ in MEASURES))
        for line in lines
    ]  # fmt: skip
    return [
        "## Prior pictures",
        (
            f"With {record['scale']['prior']} pictures of people that the base has drawn (`prior.images`, weight 1) against without, at the same steps, rates and "
            f"exposure, the top at the ceiling; {lines[0]['pairs']} pairs of the same seed and split. The loss is of unseen pictures of the subject, as a share of what is "
            "gained without prior pictures (above zero: less is gained); its interval is over the pairs, the others are over prompts."
        ),
        table(("κ", "loss", *(name for _, _, name, _ in MEASURES)), rows),
        *(["![The same prompt and seed without and with prior pictures](prior-grid.png)"] if pictures else []),
    ]


def _exposure_or_rate(rows: Rows) -> list[str]:
    rates, last = sorted({r["rate"] for r in rows}), max(r["kappa"] for r in rows)
    if len(rates) < 2 or not any(round(r["kappa"], 1) == 1.0 for r in rows) or last < 1.5:
        return []
    head = ("measure", f"κ {last:.1f} against κ 1", f"top at {rates[-1]:g} against {rates[0]:g} × the ceiling")
    return ["Exposure or rate? Differences paired by prompt:", table(head, contrasts(rows))]


def draw_ladder(lines: Rows) -> bytes:
    """A panel a measure and one of the loss, against κ; a line a rate."""
    rates = sorted({line["rate"] for line in lines})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.4, 7.4), layout="constrained")
        panels = figure.subplots(2, 3, sharex=True).ravel()
        for rate, colour, mark in zip(rates, PALETTE, itertools.cycle("os^D"), strict=False):
            own = [line for line in lines if line["rate"] == rate]
            x = [line["kappa"] for line in own]
            look = {"color": colour, "marker": mark, "lw": 1.8, "ms": 6}
            panels[0].plot(x, [line["loss"] for line in own], label=f"top at {rate:g} × the ceiling", **look)
            for axes, (_, _, name, _) in zip(panels[1:], MEASURES, strict=True):
                middle, half = np.array([line[name] for line in own]).T
                axes.plot(x, middle, **look)
                axes.fill_between(x, middle - half, middle + half, color=colour, alpha=0.12, lw=0)
        panels[0].set(title="held-out loss", ylabel="mean squared error")
        for axes, (_, _, name, unit) in zip(panels[1:], MEASURES, strict=True):
            axes.set(title=name, ylabel=unit)
            axes.set_ylim(bottom=0, top=None if name.startswith(("variety", "leak")) else 1.03)
        for axes in panels[3:]:
            axes.set_xlabel("κ = exposure / best exposure")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        return png(figure)


def ladder_grid(record: dict[str, Any], build: Path) -> bytes | None:
    """The pictures of the first training seed: a column a rung, two rows a rate."""
    seed = record["scale"]["seeds"][0]
    arms = {f"ladder-{seed}-{rate}": f"top at {rate:g} × ceiling" for rate in record["scale"]["rates"]}
    return _rungs_drawn(build, arms, record["scale"]["rungs"])


def prior_grid(record: dict[str, Any], build: Path) -> bytes | None:
    """The pictures of the first training seed and split: a column a rung, two rows with and two without prior pictures."""
    seed, fold = record["scale"]["seeds"][0], record["scale"]["folds"][0]
    arms = {f"prior-{seed}-{fold}-{kind}": f"with{'' if kind else 'out'} prior pictures" for kind in (False, True)}
    return _rungs_drawn(build, arms, record["scale"]["prior_rungs"])


def _rungs_drawn(build: Path, arms: dict[str, str], rungs: Sequence[int]) -> bytes | None:
    """One picture of the subject and one of another person at every rung of some arms, whose labels are given."""
    columns = [0, *rungs]
    rows, cells = [], []
    for arm, label in arms.items():
        for subject in ("mochi", "person"):
            paths = [build / "arms" / arm / f"rung-{rung}-{subject}.png" for rung in columns]
            if all(path.is_file() for path in paths):
                rows.append(f"{'subject' if subject == 'mochi' else 'another person'}\n{label}")
                cells.append([Image.open(path).convert("RGB") for path in paths])
    if not cells:
        return None
    return png(grid(cells, ["base", *(f"κ {0.5 * rung:g}" for rung in columns[1:])], rows))


# Replays --------------------------------------------------------------------------------------------------------------------


def tell_replays(folder: Path, record: dict[str, Any], build: Path) -> list[str]:
    rows = record["replays"]
    (folder / "published.png").write_bytes(draw_published(rows))
    (folder / "replays.png").write_bytes(draw_replays(rows))
    lines = []
    for row in rows:
        losses = [look["truth"] for look in row["losses"]]
        low = int(np.argmin(losses))
        lines.append((
            row["config"], f"{row['peak']:.3g}", row["steps"][-1], f"{row['exposure'][-1]:.3g}", f"{row['exposure'][-1] / record['measured']['replays']['best_exposure']:.2f}",
            f"{losses[low]:.5f}", row["steps"][low], f"{row['exposure'][low]:.3g}", f"{losses[-1]:.5f}", f"{row['rates'][-1] / row['peak']:.2f}",
        ))  # fmt: skip
    head = (
        "config",
        "peak",
        "steps",
        "exposure",
        "κ",
        "lowest loss",
        "at step",
        "at exposure",
        "last loss",
        "last rate / peak",
    )
    return [
        "## The published runs, replayed",
        "One run each, as shipped in `configs/cycling/`: a replay, not a comparison (exposures differ, there are no pairs).",
        table(head, lines),
        "![The learning rates](published.png)",
        "![Loss against step and exposure](replays.png)",
    ]


def draw_published(rows: Rows) -> bytes:
    """Every replayed schedule, the form that was run beside the form that starts low."""
    count = -(-len(rows) // 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.4, 1.9 * count + 0.6), layout="constrained")
        panels = figure.subplots(count, 2, sharey=True, squeeze=False)
        for axes in panels.ravel()[len(rows) :]:
            axes.set_visible(False)
        for axes, row in zip(panels.ravel(), sorted(rows, key=_beside), strict=False):
            rates = np.array(row["rates"])
            axes.plot(rates, color=PALETTE[1 if row["config"].endswith("everydream") else 0], lw=1.2)
            axes.plot(len(rates) - 1, rates[-1], "o", color="black", ms=5)
            end = "" if row["config"].endswith("constant") else f": ends at {rates[-1] / rates.max():.2g} of its peak"
            axes.set_title(f"{row['config']}{end}", fontsize=11)
            axes.yaxis.set_major_formatter(lambda v, _: f"{v:.2g}")
        figure.supxlabel("optimizer step", fontsize=11)
        figure.supylabel("learning rate", fontsize=11)
        return png(figure)


def _beside(row: dict[str, Any]) -> tuple[bool, str, str]:
    """Order that puts the form that was run beside its other form, and the constant ones last."""
    name = row["config"]
    return name.endswith("constant"), name.removesuffix("-everydream"), name


def draw_replays(rows: Rows) -> bytes:
    """Loss on the unseen pictures, against step and against exposure."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.4, 6.0), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for number, row in enumerate(rows):
            losses = [look["truth"] for look in row["losses"]]
            look = {"color": PALETTE[number % len(PALETTE)], "ls": ("-", "--")[number // len(PALETTE) % 2], "lw": 1.8}
            panels[0].plot(row["steps"], losses, label=row["config"], **look)
            panels[1].plot(row["exposure"], losses, **look)
        panels[0].set(xlabel="optimizer step", ylabel="loss on unseen pictures", title="against step")
        panels[1].set(xlabel="exposure S = Σ learning rate", title="against exposure")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return png(figure)


# Parts ----------------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _grouped(rows: Rows, key: Callable[[dict[str, Any]], Any]) -> list[tuple[Any, list[dict[str, Any]]]]:
    """Rows by key, keys in the order of their first row."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.items())
