"""The bench's one picture: every range test's ceiling and best exposure, with their intervals, against the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from sdclr.report.figures import MUTED, PALETTE, STYLE, png

PANELS = (
    ("ceiling", "ceiling", lambda c: (c["lr"], *c["bracket"])),
    ("best_exposure", "best exposure S*", lambda s: (s["value"], *s["interval"])),
)


def accuracy(found: Sequence[dict[str, Any]]) -> bytes:
    """A row a case, a line a test: estimate and interval over the truth; filled where the test was conclusive. PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.4, 1.6 + 1.1 * len(found)), layout="constrained")
        for axes, (key, name, read) in zip(figure.subplots(1, 2, sharey=True), PANELS, strict=True):
            for row, case in enumerate(found):
                _row(axes, row, case, key, read)
            axes.axvline(1, color=MUTED, lw=1.2)
            axes.set(xscale="log", title=f"{name}: range test ÷ truth", xlim=(0.035, 10))
            ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
            axes.set_yticks(range(len(found)), [case["case"] for case in found])
            axes.set_ylim(len(found) - 0.5, -0.5)
        figure.supxlabel(
            "a line is one range test with its own seed and split: blue where its interval holds the truth, hollow where it called "
            "itself inconclusive;\nyellow: what brute force leaves open (two neighbouring rates; exposures within 2 % of the gain)",
            fontsize=10.5,
        )
        return png(figure)


def _row(axes: Any, row: int, case: dict[str, Any], key: str, read: Any) -> None:
    true, tests = case["truth"][key], [test for test in case["tests"] if test[key]]
    if not true:
        return
    places = row + np.linspace(-0.36, 0.36, max(2, len(tests)))
    if key == "ceiling":
        between = [edge / true for edge in case["truth"]["bracket"] if edge]
    else:
        between = [edge / true for edge in case["truth"]["flat"]]
    axes.fill_betweenx([row - 0.44, row + 0.44], min(between), max(between), color=PALETTE[4], alpha=0.22, lw=0)
    for place, test in zip(places, tests, strict=False):
        value, low, high = (number / true for number in read(test[key]))
        sure = test["verdict"] == "conclusive"
        holds = low <= 1 <= high
        colour = PALETTE[0] if holds else PALETTE[1]
        axes.plot([low, high], [place, place], color=colour, lw=1.6, alpha=0.8 if sure else 0.35)
        axes.plot(value, place, "o", color=colour, ms=5.5, mfc=colour if sure else "white")
