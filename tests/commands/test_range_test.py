"""`sdclr range-test` from outside: what it writes, what it leaves alone, and that it says when it cannot tell."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdclr.commands.range_test import range_test
from sdclr.commands.train import train
from sdclr.config import source
from sdclr.engine.fingerprint import find_range_test, fingerprint
from sdclr.engine.folder import read_json
from sdclr.engine.plan import read_inputs
from sdclr.errors import ConfigError, Inconclusive, InputError

SHORT = "range_test: {max_steps: 40, arms_per_decade: 2, lr: [1.0e-3, 0.03]}\nvalidation: {fraction: 0.3, timesteps_per_image: 2}"
"""So few steps that the loss is still falling at their end: always inconclusive."""


def files(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def run(path: Path, *overrides: str, **options: Any) -> Inconclusive:
    with pytest.raises(Inconclusive) as problem:
        range_test(path, overrides, **options)
    return problem.value


def result_of(path: Path, name: str = "tiny") -> dict[str, Any]:
    return read_json(path.parent / "runs" / name / "range-test" / "result.json")


def without_time(result: dict[str, Any]) -> dict[str, Any]:
    return result | {"cost": {key: value for key, value in result["cost"].items() if key != "seconds"}}


@pytest.fixture(scope="module")
def tested(tmp_path_factory, model, pictures) -> Path:
    """The config of a finished range test, and beside it what the model's folder was before."""
    from tiny import write_config

    folder = tmp_path_factory.mktemp("tested")
    path = write_config(folder / "run.yaml", model, pictures, folder / "runs", SHORT)
    (folder / "before.json").write_text(json.dumps(files(model)))
    run(path)
    return path


@dataclasses.dataclass
class Again:
    """The same range test in another folder, first stopped before it began."""

    path: Path
    stopped: Inconclusive
    stopped_result: dict[str, Any]
    trained: int


@pytest.fixture(scope="module")
def again(tmp_path_factory, model, pictures) -> Again:
    from tiny import write_config

    folder = tmp_path_factory.mktemp("again")
    path = write_config(folder / "run.yaml", model, pictures, folder / "runs", SHORT)
    with pytest.MonkeyPatch.context() as patch:
        seen = counted(patch)
        stopped = run(path, max_minutes=1e-9)
        result = result_of(path)
        run(path)
    return Again(path, stopped, result, len(seen))


@pytest.fixture
def copied(tested, config) -> Path:
    """A config of one's own with a copy of that range test."""
    path = config(SHORT)
    shutil.copytree(tested.parent / "runs", path.parent / "runs")
    return path


@pytest.fixture
def losses(monkeypatch) -> list[int]:
    return counted(monkeypatch)


def counted(patch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each micro-batch that is trained on from now on."""
    from sdclr.engine.run import Run

    seen: list[int] = []
    original = Run.loss

    def loss(self, samples):
        seen.append(len(samples))
        return original(self, samples)

    patch.setattr(Run, "loss", loss)
    return seen


def test_the_result_has_every_documented_field(tested):
    result = result_of(tested)
    assert result["schema"] == 1
    assert result.keys() >= {
        "verdict", "reasons", "ceiling", "best_exposure", "recommended", "arms", "cost", "fingerprint",
    }  # fmt: skip
    assert result["verdict"] == "inconclusive"
    assert result["reasons"]
    for reason in result["reasons"]:
        assert reason["text"]
        assert reason["remedy"]
    for key, fields in (("ceiling", {"lr", "bracket"}), ("best_exposure", {"value", "interval"}),
                        ("recommended", {"base_lr", "max_lr", "steps", "cycles"})):  # fmt: skip
        assert result[key] is None or result[key].keys() >= fields
    for arm in result["arms"]:
        assert arm.keys() >= {"lr", "steps", "ragged", "verdict", "per_image"}
        assert arm["verdict"] in ("admissible", "inadmissible", "undetermined")
        assert len(arm["per_image"]) in (0, 4)  # two fifths of ten
    assert result["cost"].keys() == {"train_steps", "validation_forwards", "seconds"}


def test_the_result_carries_the_fingerprint_that_a_later_run_of_this_config_looks_for(tested):
    loaded = source.load(tested)
    assert result_of(tested)["fingerprint"] == json.loads(json.dumps(fingerprint(loaded.config, read_inputs(loaded))))


def test_two_runs_are_equal(tested, again):
    assert without_time(result_of(again.path)) == without_time(result_of(tested))


def test_the_cost_counts_every_train_step(again):
    cost = result_of(again.path)["cost"]
    assert cost["train_steps"] == again.trained
    assert cost["validation_forwards"] > 0


def test_stopped_by_time_it_says_so_and_that_it_can_go_on(again):
    assert again.stopped.exit_code == 3
    assert "stopped" in again.stopped.message
    assert again.stopped_result["reasons"][0]["code"] == "stopped"
    assert again.stopped_result["verdict"] == "inconclusive"
    assert "run it again" in str(again.stopped.hint)


def test_the_folder_holds_result_report_and_figure_and_nothing_else_is_written(tested):
    folder = tested.parent / "runs" / "tiny"
    assert {p.name for p in folder.iterdir()} == {"range-test", ".lock"}
    assert {"result.json", "report.html", "range_test.png"} <= {p.name for p in (folder / "range-test").iterdir()}
    with Image.open(folder / "range-test" / "range_test.png") as image:
        assert image.width == 1364
    page = (folder / "range-test" / "report.html").read_text()
    assert all(reason["remedy"] in page.replace("&#39;", "'") for reason in result_of(tested)["reasons"])


def test_inconclusive_exits_with_3_and_gives_the_reason_and_its_remedy(copied):
    problem = run(copied)
    assert problem.exit_code == 3
    reason = result_of(copied)["reasons"][0]
    assert reason["text"] in problem.message
    assert problem.hint == reason["remedy"]


def test_finished_arms_are_not_run_twice_and_the_result_stays_the_same(copied, losses):
    before = result_of(copied)
    run(copied)
    assert losses == []
    assert without_time(result_of(copied)) == without_time(before)


def test_an_arm_that_was_lost_is_run_again_alone_to_the_same_result(copied, losses):
    before = result_of(copied)
    arms = copied.parent / "runs" / "tiny" / "range-test" / "arms"
    lost = max(arms.glob("arm-*.json"))
    steps = len(json.loads(lost.read_text())["rates"])
    lost.write_text("damaged")
    run(copied)
    assert len(losses) == steps
    assert without_time(result_of(copied)) == without_time(before)


def test_a_longer_reference_is_longer_though_a_shorter_one_is_kept(copied):
    assert "edge" in [reason["code"] for reason in result_of(copied)["reasons"]]
    arms = copied.parent / "runs" / "tiny" / "range-test" / "arms"

    def longest() -> dict:
        return max((read_json(path) for path in arms.glob("reference-*.json")), key=lambda arm: len(arm["rates"]))

    assert len(longest()["rates"]) == 40
    run(copied, "range_test.max_steps=60")
    assert len(longest()["rates"]) == 60
    assert longest()["steps"][0] == 8  # measured from its beginning, as if the shorter one had not been there


def test_a_grid_set_by_hand_is_screened_though_another_screen_is_kept(copied):
    run(copied, "range_test.lr=[1e-3, 4e-3]")
    assert max(arm["lr"] for arm in result_of(copied)["arms"]) <= 4e-3 * (1 + 1e-9)


def test_json_on_stdout_is_strict_and_is_the_result(copied, capsys):
    run(copied, as_json=True)
    out = capsys.readouterr().out
    printed = json.loads(out, parse_constant=pytest.fail)
    assert printed == result_of(copied)


def test_the_base_models_files_are_untouched(tested, model):
    assert files(model) == json.loads((tested.parent / "before.json").read_text())


def test_a_later_train_in_the_same_folder_gives_the_weights_it_would_have_given_without_the_test(
    tested, config, trained
):
    path = config()
    shutil.copytree(tested.parent / "runs", path.parent / "runs")
    train(path)
    ours, theirs = files(path.parent / "runs" / "tiny"), files(trained)
    for name in ("final/unet/diffusion_pytorch_model.safetensors", "metrics.jsonl"):
        assert ours[name] == theirs[name]
    assert "range-test/result.json" in ours


def test_an_inconclusive_result_does_not_serve_auto(copied):
    with pytest.raises(InputError, match="inconclusive") as problem:
        train(copied, ["schedule.max_lr=auto"])
    assert "set schedule.max_lr" in str(problem.value.hint)


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_a_legacy_ramp_prints_the_exposure_that_its_minimum_stands_for(config, capsys, kind):
    path = config(SHORT.replace("max_steps: 40", "max_steps: 200") + "\nbatch: {size: 1}")
    range_test(path, legacy=kind)
    out = capsys.readouterr().out
    found = re.search(r"ramp to (\S+) in (\d+) steps: lowest held-out loss at lr (\S+), step (\d+)", out)
    assert found is not None
    top, steps, lr, step = float(found[1]), int(found[2]), float(found[3]), int(found[4])
    if kind == "linear":
        rates = [top * i / (steps - 1) for i in range(step)]
    else:
        rates = [top / 1000 * 1000 ** (i / (steps - 1)) for i in range(step)]
    assert lr == pytest.approx(rates[-1], rel=0.01)
    (implied,) = re.findall(r"^implied_best_exposure: (\S+)$", out, re.MULTILINE)
    assert float(implied) == pytest.approx(sum(rates), rel=0.02 + 1 / step)
    assert math.isfinite(float(implied))
    assert "no bound" in out
    assert not (path.parent / "runs" / "tiny" / "range-test" / "result.json").exists()


@pytest.mark.parametrize(
    ("grid", "code"),
    [("max_steps: 3", None), ("max_steps: 12, lr: [1.0e-9, 1.0e-8]", None), ("max_steps: 12, lr: [5.0, 10.0]", None)],
)  # fmt: skip
def test_a_grid_that_shows_nothing_ends_inconclusive_with_a_reason(config, grid, code):
    path = config(f"range_test: {{{grid}}}\nvalidation: {{fraction: 0.3, timesteps_per_image: 2}}")
    run(path)
    result = result_of(path)
    assert result["verdict"] == "inconclusive" and result["reasons"]
    assert code is None or code in [reason["code"] for reason in result["reasons"]]
    assert result["recommended"] is None


def test_a_legacy_ramp_that_is_out_of_time_says_so(config):
    problem = run(config(SHORT), legacy="linear", max_minutes=1e-9)
    assert "before the ramp was finished" in problem.message


def test_an_unknown_legacy_ramp_is_an_input_error(config):
    with pytest.raises(InputError, match="linear or exponential; got 'quadratic'"):
        range_test(config(), legacy="quadratic")


def test_what_is_held_out_is_the_range_tests_own_affair(config):
    path = config(SHORT.replace("fraction: 0.3", "fraction: 0"))
    run(path)
    assert result_of(path)["gain"]["images"] == 4
    run(path, "range_test.fraction=0.3")
    assert result_of(path)["gain"]["images"] == 3
    with pytest.raises(ConfigError, match=r"range_test\.fraction of 10 images is none; raise it"):
        range_test(path, ["range_test.fraction=0.01"])


def test_splits_with_several_held_out_images_each_are_measured_as_one(config):
    path = config(SHORT)
    run(path, "range_test.folds=2")
    found = result_of(path)
    assert found["gain"]["images"] == 8
    assert all(len(arm["per_image"]) == 8 for arm in found["arms"] if arm["excess"] is not None)


def test_one_held_out_picture_alone_has_no_interval_and_json_says_null(tmp_path, model, pictures, sdclr):
    from tiny import write_config

    few = tmp_path / "two"
    few.mkdir()
    for name in ("picture-00", "picture-01"):
        for ending in ("png", "txt"):
            shutil.copy(pictures / f"{name}.{ending}", few)
    path = write_config(tmp_path / "run.yaml", model, few, tmp_path / "runs", f"{SHORT}\nbatch: {{size: 1}}")
    done = sdclr("range-test", path, "--json", "--explain")
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    assert found["gain"]["low"] is found["gain"]["high"] is None
    assert "inf" not in done.stderr
    assert "one alone cannot tell" in " ".join(done.stderr.split())


def test_steps_that_fp16_skips_give_no_point_and_no_traceback(config, monkeypatch):
    """Stands for a loss scale that is still too high: the first steps, and some later ones, move nothing."""
    from sdclr.engine import run as runs
    from sdclr.engine.loop import optimizer_steps

    def skipping(state, batches, add_gradients, lr_at, until, accelerator, norm=None):
        exposure = 0.0
        for done in optimizer_steps(state, batches, add_gradients, lr_at, until, accelerator, norm):
            if done.step > 2 and done.step % 4:
                exposure += done.lr
            yield dataclasses.replace(done, exposure=exposure)

    monkeypatch.setattr(runs, "optimizer_steps", skipping)
    path = config(SHORT)
    run(path)
    for stored in (path.parent / "runs" / "tiny" / "range-test" / "arms").glob("*.json"):
        exposure = read_json(stored)["exposure"] if stored.stem != "base" else [1.0]
        assert all(b > a for a, b in zip([0.0, *exposure], exposure, strict=False))


def test_an_answer_to_another_question_is_put_aside_and_still_serves(config):
    path = config(SHORT + "\ntrain: {steps: auto}\nschedule: {policy: triangular, cycles: 2}")
    run(path)
    folder = path.parent / "runs" / "tiny" / "range-test"
    first = (folder / "result.json").read_bytes()
    run(path, "optimizer.weight_decay=0.5")
    (aside,) = (folder / "earlier").iterdir()
    assert (aside / "result.json").read_bytes() == first
    assert {p.name for p in aside.iterdir()} == {"config.yaml", "range_test.png", "report.html", "result.json"}
    loaded = source.load(path)
    assert find_range_test(loaded.config, read_inputs(loaded))[0] == aside / "result.json"
    run(path, "optimizer.weight_decay=0.5")  # the same question again
    assert len(list((folder / "earlier").iterdir())) == 1


def test_a_first_step_that_is_not_finite_is_said_so(config, monkeypatch):
    from sdclr.engine.run import Run
    from sdclr.errors import DivergenceError

    real = Run.loss
    monkeypatch.setattr(Run, "loss", lambda self, batch: real(self, batch) * float("inf"))
    path = config(SHORT)
    with pytest.raises(DivergenceError, match="the very first step, at the lowest rate"):
        range_test(path)


def test_a_legacy_ramp_leaves_the_answer_where_it_is(config):
    path = config(SHORT)
    run(path)
    result = path.parent / "runs" / "tiny" / "range-test" / "result.json"
    before = result.read_bytes()
    range_test(path, ["optimizer.weight_decay=0.5"], legacy="linear")
    assert result.read_bytes() == before
