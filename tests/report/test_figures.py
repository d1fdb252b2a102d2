"""Figures: real PNGs of the expected size, for the fullest and for the poorest of numbers; labels whole."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops

from sdclr.report import figures


def decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    image.load()
    return image


def records(steps: int, checks: bool = True, shift: float = 0.0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        found.append({"kind": "step", "step": step, "lr": 1e-4, "loss": 1 / step, "exposure": step * 1e-4})
        if checks:
            loss = 1 / step + shift
            found.append(
                {"kind": "validation", "step": step, "exposure": step * 1e-4, "loss": loss, "train_loss": loss - 0.1}
            )
    return found


def result(arms: list[dict[str, Any]], whole: bool = True) -> dict[str, Any]:
    return {
        "arms": arms,
        "reference": {"lr": 1e-5, "steps": 20} if whole else None,
        "ceiling": {"lr": 2e-4, "bracket": [1e-4, 3e-4]} if whole else None,
        "best_exposure": {"value": 0.012, "interval": [0.01, 0.02]} if whole else None,
    }


def arm(lr: float, excess: float | None, verdict: str) -> dict[str, Any]:
    ends = (excess - 0.05, excess + 0.05) if excess is not None else (None, None)
    return {"lr": lr, "excess": excess, "low": ends[0], "high": ends[1], "verdict": verdict}


def curve(lr: float, points: int, images: int = 3) -> tuple[float, np.ndarray, np.ndarray]:
    exposure = lr * np.arange(1, points + 1)
    return lr, exposure, 1 - 0.1 * np.linspace(0.1, 1, points)[:, None] * np.ones(images)


FULL_ARMS = [
    arm(1e-5, 0.0, "admissible"), arm(1e-4, 0.08, "undetermined"), arm(3e-4, 3.0, "inadmissible"), arm(1e-3, None, "inadmissible"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("curves", "arms", "whole"),
    [
        ([curve(1e-5, 12), curve(1e-4, 5), curve(3e-4, 5)], FULL_ARMS, True),
        ([curve(1e-5, 1)], [], False),
        ([curve(1e-5, 1)], [arm(1e-5, 0.0, "admissible")], True),
        ([curve(1e-5, 3, images=1)], [], False),
        ([(1e-5, np.array([1e-5, 2e-5]), np.full((2, 3), 1.5))], [], False),
    ],
    ids=["full", "one point", "one arm", "one image", "only worse"],
)
def test_the_range_tests_figure_is_a_png_of_1364_by_550_pixels(curves, arms, whole):
    image = decoded(figures.range_test(1.0, curves, result(arms, whole), 0.1))
    assert image.size == (1364, 550)


def test_the_range_tests_figure_bears_an_arm_whose_last_losses_are_not_finite():
    broken = (1e-2, np.array([1e-2, 2e-2]), np.array([[0.9, 0.9], [np.nan, np.inf]]))
    lost = (1e-1, np.array([1e-1]), np.full((1, 2), np.nan))
    for curves in ([curve(1e-5, 12, 2), broken, lost], [lost], [lost, curve(1.0, 3, 2)]):
        image = decoded(figures.range_test(1.0, curves, result(FULL_ARMS), 0.1))
        assert image.size == (1364, 550)


def test_an_arm_whose_interval_is_unknown_at_one_end_is_drawn():
    arms = [{"lr": 1e-4, "excess": 0.1, "low": None, "high": None, "verdict": "undetermined"}]
    assert decoded(figures.range_test(1.0, [curve(1e-5, 12)], result(arms), 0.1)).size == (1364, 550)


@pytest.mark.parametrize(
    ("steps", "checks", "marks"),
    [(50, True, [25, 50]), (1, True, [1]), (50, False, []), (1, False, [1]), (0, False, [])],
)
def test_a_runs_curves_are_a_png_of_1210_by_704_pixels(steps, checks, marks):
    assert decoded(figures.training(records(steps, checks), "a run: triangular", marks)).size == (1210, 704)


@pytest.mark.parametrize(
    "runs",
    [
        [("one", records(20)), ("two", records(40, shift=0.1))],
        [("one", records(1))],
        [("blind", records(5, checks=False))],
        [("seen", records(5)), ("blind", records(5, checks=False))],
        [(f"run {i}", records(3, shift=i)) for i in range(12)],
        [("_underscored", records(3)), ("_another", records(3))],
        [("$dollar$ a_b^c", records(3))],
    ],
    ids=["two", "one point", "blind", "mixed", "twelve", "underscores", "mathtext"],
)
def test_a_comparison_is_a_png_1364_pixels_wide(runs):
    width, height = decoded(figures.comparison(runs)).size
    assert width == 1364
    assert height == 1280 if len(runs) < 12 else 1280 < height < 1400  # a legend of more lines makes it higher


def test_a_comparisons_legend_names_every_run_even_one_that_begins_with_an_underscore(monkeypatch):
    from matplotlib.figure import Figure

    seen: list[list[str]] = []
    original = Figure.legend

    def legend(self, handles, labels, **kwargs):
        drawn = original(self, handles, labels, **kwargs)
        seen.append([text.get_text() for text in drawn.get_texts()])
        return drawn

    monkeypatch.setattr(Figure, "legend", legend)
    figures.comparison([("_first", records(2)), ("second", records(2))])
    assert seen == [["_first", "second"]]


def test_a_name_with_dollars_is_no_formula(monkeypatch):
    from matplotlib.text import Text

    formulas: list[str] = []
    original = Text._preprocess_math

    def preprocess(self, text):
        found = original(self, text)
        formulas.extend([text] if found[1] and "name" in text else [])
        return found

    monkeypatch.setattr(Text, "_preprocess_math", preprocess)
    figures.comparison([("a $name$ of", records(2))])
    assert formulas == []


# The grid ---------------------------------------------------------------------------------------------------------------------------


def cell(colour: str, side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


@pytest.mark.parametrize(("side", "shown"), [(32, 128), (128, 128), (200, 200), (512, 320)])
def test_a_grid_is_as_wide_as_its_columns_and_holds_each_picture_where_it_belongs(side, shown):
    colours = [["red", "blue", "lime"], ["black", "yellow", "cyan"]]
    cells = [[cell(c, side) for c in row] for row in colours]
    image = figures.grid(cells, ["base", "step 4", "step 8"], ["a prompt\nseed 1", "another\nseed 1"])
    assert image.width == 190 + 3 * (shown + 8)
    pixels = np.asarray(image)
    for row in colours:
        for c, colour in enumerate(row):
            wanted = np.array(Image.new("RGB", (1, 1), colour))[0, 0]
            part = pixels[:, 190 + c * (shown + 8) : 190 + c * (shown + 8) + shown]
            assert ((part == wanted).all(axis=2).sum(axis=1) == shown).sum() == shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [((64, 32), (128, 64)), ((256, 512), (160, 320)), ((1024, 768), (320, 240)), ((32, 128), (32, 128))],
)
def test_pictures_that_are_not_square_keep_their_shape(size, shown):
    cells = [[Image.new("RGB", size, "red"), Image.new("RGB", size, "blue")]] * 2
    image = figures.grid(cells, ["base", "step 4"], ["a prompt", "another"])
    for wanted in ([255, 0, 0], [0, 0, 255]):
        found = (np.asarray(image) == wanted).all(axis=2)
        assert sorted(set(found.sum(axis=1).tolist())) == [0, shown[0]]
        assert sorted(set(found.sum(axis=0).tolist())) == [0, 2 * shown[1]]


LONG = (
    "a portrait of mochi, surprised, wearing a green shirt and a crown, on a yellow background",
    "antidisestablishmentarianism" * 3,
    "S 1.23e-03  κ 0.50\nheld out 0.1234",
    "",
    "x",
    "портрет кота в шляпе, смотрит вправо",
)


@pytest.mark.parametrize("text", LONG)
@pytest.mark.parametrize("width", [20, 60, 128, 320])
def test_wrapping_cuts_no_letter_and_no_line_is_wider_than_its_room(text, width):
    font = figures._font(15)
    lines = figures._wrapped(text, font, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(font.getlength(line) <= width for line in lines)


def test_words_are_broken_only_where_they_do_not_fit():
    font = figures._font(15)
    text = "one two three four"
    assert " ".join(figures._wrapped(text, font, 60)).split() == text.split()
    assert figures._wrapped("first\nsecond", font, 500) == ["first", "second"]


def test_labels_are_drawn_inside_the_canvas_and_off_the_pictures():
    label = "best, step 400 S 0.0123 κ 1.02 held out 0.1234 " * 3
    image = figures.grid([[cell("red"), cell("red")]] * 2, [label, label], [LONG[0] * 3, LONG[1]])
    ink = ImageChops.difference(image, Image.new("RGB", image.size, "white")).convert("L")
    left, top, right, bottom = ink.getbbox()
    assert left > 0
    assert top > 0
    assert right <= image.width
    assert bottom < image.height
    pixels = np.asarray(image)
    red = (pixels == [255, 0, 0]).all(axis=2)
    assert red.sum() == 4 * 128 * 128


@pytest.mark.parametrize("letter", ["κ", "Σ", "—", "é", "ж"])
def test_letters_that_labels_use_are_drawn_and_not_replaced_by_the_box_for_unknown_ones(letter):
    def drawn(text: str) -> bytes:
        return figures.grid([[cell("red")]], [text], ["x"]).tobytes()

    assert drawn(letter) != drawn("\U0010fffd")
