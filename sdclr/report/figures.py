"""Pictures: every figure is a function from numbers to PNG bytes. Colours are safe for the colour-blind; no figure needs a screen."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageDraw, ImageFont

INK, MUTED, GRID = "#1b1f24", "#667085", "#e4e7ec"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito's colours, told apart by every kind of colour vision."""
STYLE = {
    "font.size": 11, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "axes.titlesize": 12,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "figure.dpi": 110, "legend.frameon": False, "axes.axisbelow": True,
}  # fmt: skip


def range_test(
    base: float, curves: Sequence[tuple[float, np.ndarray, np.ndarray]], result: dict[str, Any], tolerance: float
) -> bytes:
    """The signature figure: loss against exposure, one line a rate (lr, exposure (points,), losses (points, images)); excess against rate."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.4, 5.0), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _exposure_panel(left, base, curves, result)
        _excess_panel(right, result, tolerance)
        return png(figure)


def _exposure_panel(
    axes: Any, base: float, curves: Sequence[tuple[float, np.ndarray, np.ndarray]], result: dict[str, Any]
) -> None:
    relative = [
        (lr, exposure, losses.mean(axis=1) / base)
        for lr, exposure, losses in sorted(curves, key=lambda c: (c[0], -len(c[1])))
    ]
    seen = np.concatenate([means for _, _, means in relative])
    low = float(np.min(seen, where=np.isfinite(seen), initial=1.0))
    bottom, top = low - 0.06 * (1 - low), 1 + max(0.05, 0.35 * (1 - low))
    axes.set_ylim(bottom, top)
    rates = sorted({lr for lr, _, _ in relative})
    shades = dict(zip(rates, matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, len(rates))), strict=True))
    reference = (result.get("reference") or {}).get("lr")
    named: set[float] = set()
    for lr, exposure, means in relative:
        is_reference = lr == reference and len(means) > 5
        # Several arms of one rate have one entry, and those that lie above the frame none.
        label = (
            "_" if lr in named or not (means <= top).any() else f"{lr:.1e}" + (" (reference)" if is_reference else "")
        )
        named |= {lr} if label != "_" else set()
        axes.plot(
            exposure,
            means,
            color=shades[lr],
            lw=2.6 if is_reference else 1.6,
            marker="o",
            ms=3.2,
            zorder=3,
            label=label,
        )
    axes.axhline(1, color=MUTED, lw=1, ls=":")
    axes.text(
        0.01,
        1,
        " untouched base",
        transform=axes.get_yaxis_transform(),
        va="bottom",
        color=MUTED,
        fontsize=9.5,
        zorder=4,
        bbox={"color": "white", "alpha": 0.8, "pad": 0.5},
    )
    best = result.get("best_exposure")
    if best:
        axes.axvspan(*best["interval"], color=PALETTE[4], alpha=0.22, lw=0)
        axes.axvline(best["value"], color=PALETTE[4], lw=1.6)
        axes.annotate(
            f"S* = {best['value']:.2g}", (best["value"], 0.98), xycoords=("data", "axes fraction"), xytext=(-5, 0), ha="right",
            va="top", textcoords="offset points", color="#8a5a00", fontsize=10.5, fontweight="bold",
        )  # fmt: skip
    axes.set(
        xscale="log",
        xlabel="exposure S = Σ learning rate",
        ylabel="held-out loss / untouched base",
        title="Below the ceiling, every rate walks the same curve",
    )
    axes.legend(
        title="learning rate",
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        fontsize=9.5,
        title_fontsize=9.5,
        alignment="left",
    )


def _excess_panel(axes: Any, result: dict[str, Any], tolerance: float) -> None:
    arms = [a for a in result["arms"] if a["excess"] is not None]
    looks = {"admissible": (PALETTE[2], "o"), "undetermined": (PALETTE[4], "D"), "inadmissible": (PALETTE[1], "s")}
    clip = max(0.5, 4 * tolerance)
    for verdict, (colour, marker) in looks.items():
        some = [a for a in arms if a["verdict"] == verdict]
        if some:
            low = [-clip if a["low"] is None else max(-clip, a["low"]) for a in some]
            high = [clip if a["high"] is None else min(clip, a["high"]) for a in some]
            axes.vlines([a["lr"] for a in some], low, high, color=colour, lw=1.6, alpha=0.7)
            within, above = [a for a in some if a["excess"] <= clip], [a["lr"] for a in some if a["excess"] > clip]
            values = [max(-clip, a["excess"]) for a in within]
            axes.plot(
                [a["lr"] for a in within],
                values,
                marker,
                color=colour,
                ms=8,
                label=verdict if within else "_",
                zorder=3,
            )
            axes.plot(above, [clip] * len(above), "^", color=colour, ms=10, zorder=3, label="_" if within else verdict)
    axes.axhline(tolerance, color=MUTED, lw=1.2, ls="--", label=f"tolerance {tolerance:.0%}")
    axes.axhline(0, color=MUTED, lw=1)
    ceiling = result.get("ceiling")
    title = "What a rate costs at equal exposure"
    if ceiling:
        axes.axvspan(*ceiling["bracket"], color=PALETTE[0], alpha=0.14, lw=0, label="bracket")
        axes.axvline(ceiling["lr"], color=PALETTE[0], lw=1.6, label=f"ceiling {ceiling['lr']:.1e}")
    axes.set(
        xscale="log",
        ylim=(min([-clip * 0.55, *(1.15 * max(-clip, a["excess"]) for a in arms)]), clip * 1.06),
        xlabel="learning rate",
        ylabel="excess, share of the gain",
        title=title,
    )
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9.5)


def training(records: list[dict[str, Any]], title: str, marks: Sequence[int] = ()) -> bytes:
    """A run's curves: learning rate, losses, gap; `marks` are steps whose state was kept."""
    steps = [r for r in records if r["kind"] == "step"]
    checks = [r for r in records if r["kind"] == "validation"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.4), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.2))
        top.plot([r["step"] for r in steps], [r["lr"] for r in steps], color=PALETTE[0], lw=1.8)
        top.set(ylabel="learning rate", title=title)
        top.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        x = [r["step"] for r in checks]
        if checks:
            bottom.plot(x, [r["loss"] for r in checks], color=PALETTE[1], lw=2.2, label="held-out images")
            bottom.plot(
                x,
                [r["train_loss"] for r in checks],
                color=PALETTE[2],
                lw=1.8,
                ls="--",
                label="training images, same draws",
            )
            low = min(checks, key=lambda r: r["loss"])
            bottom.plot(low["step"], low["loss"], "v", color=PALETTE[1], ms=10, label=f"lowest: step {low['step']}")
        elif steps:
            losses = np.array([r["loss"] for r in steps])
            width = max(1, len(losses) // 20)
            smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
            bottom.plot(
                [r["step"] for r in steps][width - 1 :],
                smooth,
                color=PALETTE[2],
                lw=1.8,
                label=f"training loss, mean of {width} steps",
            )
        for mark in marks:
            bottom.axvline(mark, color=MUTED, lw=0.8, ls=":", label="kept state" if mark == marks[0] else None)
        bottom.set(xlabel="optimizer step", ylabel="loss")
        if steps or checks:
            bottom.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=10)
        return png(figure)


def comparison(runs: Sequence[tuple[str, list[dict[str, Any]]]]) -> bytes:
    """Several runs laid over one another: rate, losses and gap, against step (left) and against exposure (right)."""
    with matplotlib.rc_context(STYLE):
        names = [textwrap.fill(name.replace("$", r"\$"), 96) for name, _ in runs]  # a dollar would begin a formula
        columns = max(1, min(4, 110 // (max(len(line) for name in names for line in name.splitlines()) + 6)))
        figure = Figure(figsize=(12.4, 11.4 + 0.24 * -(-len(runs) // columns)), layout="constrained")
        panels = figure.subplots(4, 2, sharex="col", sharey="row", height_ratios=(1, 1.7, 1.2, 1.1))
        for number, (_, records) in enumerate(runs):
            _run_in_panels(panels, records, _look_of_line(number))
        for column, (axis, title) in enumerate(
            (("optimizer step", "against step"), ("exposure S = Σ learning rate", "against exposure"))
        ):
            panels[3, column].set_xlabel(axis)
            panels[0, column].set_title(title)
        for row, label in enumerate(
            ("learning rate", "held-out loss", "training loss,\nfixed draws", "gap: held-out\nminus training")
        ):
            panels[row, 0].set_ylabel(label)
        panels[0, 0].yaxis.set_major_formatter(lambda v, _: f"{v:.3g}")
        handles = [Line2D([], [], **_look_of_line(number)) for number in range(len(runs))]
        figure.align_ylabels(panels[:, 0])
        figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=3)
        return png(figure)


def _look_of_line(number: int) -> dict[str, Any]:
    """Seven colours, then the same colours in another stroke."""
    stroke = ("-", "--", ":", "-.")[number // len(PALETTE) % 4]
    return {"color": PALETTE[number % len(PALETTE)], "ls": stroke, "lw": 1.8}


def _run_in_panels(panels: Any, records: list[dict[str, Any]], look: dict[str, Any]) -> None:
    """One run's four curves; the lowest held-out loss is marked."""
    steps = [r for r in records if r["kind"] == "step"]
    checks = [r for r in records if r["kind"] == "validation"]
    low = min(checks, key=lambda r: r["loss"], default=None)
    for column, axis in enumerate(("step", "exposure")):
        x = [r[axis] for r in checks]
        panels[0, column].plot([r[axis] for r in steps], [r["lr"] for r in steps], **look)
        panels[1, column].plot(x, [r["loss"] for r in checks], **look)
        panels[2, column].plot(x, [r["train_loss"] for r in checks], **look)
        panels[3, column].plot(x, [r["loss"] - r["train_loss"] for r in checks], **look)
        if low:
            panels[1, column].plot(low[axis], low["loss"], "v", color=look["color"], ms=9, mec="white", zorder=4)


def grid(cells: Sequence[Sequence[Image.Image]], columns: Sequence[str], rows: Sequence[str]) -> Image.Image:
    """Pictures of one size in a labelled table: `cells[row][column]`, their longer side 128 to 320 pixels; labels are wrapped, never cut."""
    longest = max(cells[0][0].size)
    width, tall = (round(n * max(128, min(320, longest)) / longest) for n in cells[0][0].size)
    room = max(128, width)
    font, small = _font(15), _font(13)
    gap, left = 8, 190
    heads = [_wrapped(text, font, room) for text in columns]
    names = [_wrapped(text, small, left - 2 * gap) for text in rows]
    head_height = max(len(lines) for lines in heads) * 19 + 2 * gap
    height = [max(tall, len(lines) * 17 + gap) for lines in names]
    canvas = Image.new("RGB", (left + len(columns) * (room + gap), head_height + sum(h + gap for h in height)), "white")
    pen = ImageDraw.Draw(canvas)
    for c, lines in enumerate(heads):
        for i, line in enumerate(lines):
            pen.text((left + c * (room + gap), gap + 19 * i), line, INK, font)
    y = head_height
    for r, lines in enumerate(names):
        for i, line in enumerate(lines):
            pen.text((gap, y + 17 * i), line, INK, small)
        for c, picture in enumerate(cells[r]):
            resample = Image.Resampling.NEAREST if picture.width < width else Image.Resampling.LANCZOS
            canvas.paste(picture.resize((width, tall), resample), (left + c * (room + gap), y))
        y += height[r] + gap
    return canvas


def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's DejaVu Sans: Pillow's own font has no κ, and draws a box for it."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Lines no wider than `width` pixels, broken between words where that is possible."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in [piece for whole in paragraph.split() for piece in _pieces(whole, font, width)]:
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    return lines


def _pieces(word: str, font: Any, width: int) -> list[str]:
    pieces = [""]
    for letter in word:
        if font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def png(drawn: Figure | Image.Image) -> bytes:
    """A figure or a picture as a PNG file's bytes."""
    buffer = io.BytesIO()
    if isinstance(drawn, Figure):
        FigureCanvasAgg(drawn).print_png(buffer)
    else:
        drawn.save(buffer, "png")
    return buffer.getvalue()
