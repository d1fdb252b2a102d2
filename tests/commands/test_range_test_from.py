"""`sdclr range-test --from`: the verdict on curves that another program logged, and what is wrong with a malformed file, by line."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sdclr.commands.range_test_from import as_result
from sdclr.config.schema import RangeTestSection
from sdclr.data import curves
from sdclr.errors import DataError

BEST, CEILING = 2e-4, 2e-5
"""Of the made-up curves: the exposure at which they are lowest, and the rate that loses a tenth of the gain."""
RATES = [1e-6 * 10 ** (i / 4) for i in range(9)]
IMAGES = [f"cat-{i}" for i in range(8)]
Program = Callable[..., "subprocess.CompletedProcess[str]"]


def loss(lr: float, step: int, image: str) -> float:
    """20 % below the untouched model at S*; above the slowest rate an excess of the gain that grows with the rate's square."""
    factor = 0.8 + 0.05 * IMAGES.index(image)
    if step == 0:
        return factor
    slow = 0.8 + 0.02 * math.log(lr * step / BEST) ** 2
    wobble = 1 + 0.02 * math.cos(IMAGES.index(image) + math.log(lr))
    return factor * (slow + 0.1 * (lr / CEILING) ** 2 * max(1 - slow, 0.02) * wobble * (lr > RATES[0]))


def rows(rates: list[float] = RATES, images: list[str] = IMAGES, until: float = 8 * BEST) -> list[str]:
    lines = ["lr,step,val_loss,image"]
    lines += [f"{rates[0]!r},0,{loss(rates[0], 0, image)!r},{image}" for image in images]
    for lr in rates:
        steps = sorted({max(1, round(s / lr)) for s in np.geomspace(BEST / 16, until, 40)})
        lines += [f"{lr!r},{step},{loss(lr, step, image)!r},{image}" for step in steps for image in images]
    return lines


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_known_curves_give_their_ceiling_and_best_exposure(tmp_path: Path) -> None:
    found = as_result(curves.read(write(tmp_path / "c.csv", rows())), RangeTestSection())
    assert found["verdict"] == "conclusive", found["reasons"]
    assert found["reference"]["lr"] == RATES[0]
    low, high = found["ceiling"]["bracket"]
    assert low <= CEILING <= high
    assert found["ceiling"]["lr"] == pytest.approx(CEILING, rel=0.3)
    within_2_percent = BEST * math.exp(-math.sqrt(0.2))  # 0.02 · ln² = 0.02 · 0.2
    assert found["best_exposure"]["value"] == pytest.approx(within_2_percent, rel=0.1)


def test_the_order_of_rows_and_columns_other_columns_and_a_byte_order_mark_do_not_matter(tmp_path: Path) -> None:
    lines = rows()
    swapped = ["\ufeffimage, val_loss ,epoch,step,lr"]
    for line in reversed(lines[1:]):
        lr, step, value, image = line.split(",")
        swapped.append(f"{image},{value},7,{step},{lr}")
    a, b = (
        curves.read(write(tmp_path / name, text)) for name, text in (("a.csv", lines), ("b.csv", ["", *swapped][1:]))
    )
    assert a.images == b.images
    assert all(np.array_equal(x.losses, y.losses) for x, y in zip(a.arms, b.arms, strict=True))


def test_a_slow_rate_that_never_reached_its_minimum_is_not_the_reference(tmp_path: Path) -> None:
    lines = rows()
    lines += [f"1e-8,{step},{loss(1e-8, step, image)!r},{image}" for step in (100, 200) for image in IMAGES]
    found = as_result(curves.read(write(tmp_path / "c.csv", lines)), RangeTestSection())
    assert found["reference"]["lr"] == RATES[0]


def test_a_loss_that_is_not_finite_makes_its_rate_inadmissible(tmp_path: Path) -> None:
    lines = rows()
    lines += [
        f"3e-3,{step},{'nan' if step > 1 else loss(3e-3, 0, image)},{image}" for step in (1, 2) for image in IMAGES
    ]
    lines += [f"9e-3,1,inf,{image}" for image in IMAGES]
    found = as_result(curves.read(write(tmp_path / "c.csv", lines)), RangeTestSection())
    verdicts = {arm["lr"]: arm["verdict"] for arm in found["arms"]}
    assert verdicts[9e-3] == "inadmissible"
    assert found["ceiling"]["bracket"][1] < 3e-3


def test_one_averaged_curve_is_inconclusive(tmp_path: Path, sdclr: Program) -> None:
    lines = [line.rsplit(",", 1)[0] for line in rows(images=IMAGES[:1])]
    found = sdclr("range-test", "--from", write(tmp_path / "c.csv", lines))
    assert found.returncode == 3, found.stderr
    assert "shows one image" in found.stderr


def test_the_command_prints_the_verdict_and_writes_nothing(tmp_path: Path, sdclr: Program) -> None:
    path = write(tmp_path / "c.csv", rows())
    found = sdclr("range-test", "--from", path)
    assert found.returncode == 0, found.stderr
    assert "Learning rates up to about" in found.stdout
    parsed = json.loads(sdclr("range-test", "--from", path, "--json", "--quiet").stdout)
    assert parsed["schema"] == 1 and parsed["verdict"] == "conclusive"
    assert [p.name for p in tmp_path.iterdir()] == ["c.csv"]


def test_a_config_plans_the_run_that_follows(tmp_path: Path, sdclr: Program, config: Callable[..., Path]) -> None:
    path = config("schedule: {policy: triangular, max_lr: auto, cycles: 2}\ntrain: {steps: auto}")
    found = sdclr("range-test", path, "--from", write(tmp_path / "c.csv", rows()), "--json")
    assert found.returncode == 0, found.stderr
    plan = json.loads(found.stdout)["recommended"]
    assert plan["max_lr"] == pytest.approx(json.loads(found.stdout)["ceiling"]["lr"] / 2)
    assert plan["cycles"] == 2


def test_grid_too_slow_says_so(tmp_path: Path) -> None:
    found = as_result(curves.read(write(tmp_path / "c.csv", rows(RATES[:3]))), RangeTestSection())
    assert found["verdict"] == "inconclusive"
    assert [reason["code"] for reason in found["reasons"]] == ["grid_top"]


HEAD = ["lr,step,val_loss,image", "1e-6,0,0.2,a", "1e-6,0,0.3,b", "1e-6,9,0.1,a", "1e-6,9,0.2,b"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], ":1: has no column lr, step, val_loss (its columns are: none)"),
        (["lr,step,loss", "1,0,2"], ":1: has no column val_loss (its columns are: lr, step, loss)"),
        (["lr,lr,step,val_loss", "1,1,0,2"], ":1: has column lr twice"),
        ([*HEAD, "1e-6,12,0.1"], ":6: has 3 values, the header has 4 columns"),
        ([*HEAD, "fast,12,0.1,a"], ":6: lr is not a number: 'fast'"),
        ([*HEAD, "1e-6,1.5,0.1,a"], ":6: step must be a whole number"),
        ([*HEAD, "1e-6,-3,0.1,a"], ":6: step must be a whole number"),
        ([*HEAD, "-1e-6,12,0.1,a"], ":6: lr must be above 0"),
        ([*HEAD, "0,12,0.1,a"], ":6: lr must be above 0"),
        ([*HEAD, "1e-6,12,,a"], ":6: val_loss is not a number: ''"),
        ([*HEAD, "1e-6,12,0.1,"], ":6: image is empty"),
        ([*HEAD, "1e-6,9,0.1,a"], ":6: repeats line 4"),
        ([*HEAD, "1e-6,12,0.1,a"], ":6: lr 1e-06, step 12 lacks image b"),
        ([*HEAD, "1e-6,12,0.1,a", "1e-6,12,0.1,b", "1e-6,12,0.1,c"], ":6: lr 1e-06, step 12 has image c"),
        (["lr,step,val_loss", "1e-6,5,0.1"], "has no row with step 0"),
        (["lr,step,val_loss", "1e-6,0,0.1"], "has no row with a step above 0"),
        (["lr,step,val_loss", "1e-6,0,nan", "1e-6,5,0.1"], ":2: the untouched model's loss is nan"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_refused_with_its_line(tmp_path: Path, lines: list[str], said: str) -> None:
    with pytest.raises(DataError) as caught:
        curves.read(write(tmp_path / "c.csv", lines))
    assert said in caught.value.message
    assert str(tmp_path / "c.csv") in caught.value.message


def test_every_problem_is_told_at_once_and_many_are_counted(tmp_path: Path, sdclr: Program) -> None:
    path = write(tmp_path / "c.csv", [*HEAD, *(f"1e-6,{i},bad,a" for i in range(30, 60))])
    found = sdclr("range-test", "--from", path)
    assert found.returncode == 2
    assert found.stderr.count("val_loss is not a number") == 20
    assert "and 10 more" in found.stderr


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        curves.read(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"lr,step\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8"):
        curves.read(tmp_path / "b.csv")


@pytest.mark.parametrize(
    "arguments",
    [["range-test"], ["range-test", "--from", "c.csv", "--legacy", "linear"], ["range-test", "--from", "c.csv", "--set", "run.seed=1"]],
)  # fmt: skip
def test_arguments_that_do_not_go_together_are_refused(sdclr: Program, arguments: list[str]) -> None:
    assert sdclr(*arguments).returncode == 2


def test_a_first_line_that_is_no_csv_is_named(tmp_path: Path, sdclr: Program) -> None:
    (tmp_path / "c.csv").write_text("x" * 200_000 + "\n1,2,3\n")
    found = sdclr("range-test", "--from", tmp_path / "c.csv")
    assert found.returncode == 2
    assert "c.csv:1: is not CSV: field larger than field limit" in found.stderr
