"""`sdclr check` and `sdclr init`: everything is read and nothing trained; a config that is always right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import make_pictures

from sdclr.commands.check import check
from sdclr.commands.init import init
from sdclr.config import source
from sdclr.config.schema import RunConfig
from sdclr.data import pairs
from sdclr.errors import ConfigError, DataError, InputError

AUTO = "schedule: {policy: triangular, max_lr: auto, cycles: 2}\ntrain: {steps: auto}"


def said(capsys) -> tuple[str, str]:
    out, err = capsys.readouterr()
    return out, " ".join(err.split())


def test_check_prints_the_plan_and_trains_nothing(config, capsys):
    path = config()
    check(path)
    out, err = said(capsys)
    assert out == f"{path}: config, images, captions and model can be used\n"
    for words in (
        "8 to train on, 2 held out", "2 samples a step; 4 steps an epoch", "8 (2 epochs)", "triangular, 2 cycles of 4 steps",
        "0 to 0.001; the last step is at 0.0005", "exposure 0.004", "every 2 steps", "model: Stable Diffusion 1.x, with a UNet of ", " weights that predicts the noise",
    ):  # fmt: skip
        assert words in err
    assert not (path.parent / "runs" / "tiny").exists()


def test_check_without_a_range_test_says_what_auto_needs_and_that_the_rest_is_fine(config, capsys):
    path = config(AUTO)
    check(path)
    out, err = said(capsys)
    assert "can be used" in out
    assert "schedule.max_lr and train.steps: auto needs a range test" in err
    assert f"sdclr range-test {path}" in err.replace(" \n", "")


def test_a_plan_that_is_needed_and_cannot_be_made_is_an_error(config):
    with pytest.raises(InputError, match="auto needs a range test"):
        check(config(AUTO), need_plan=True)


def range_test_of(path: Path, verdict: str = "conclusive") -> None:
    """A range test's result that fits the config."""
    from sdclr.engine.fingerprint import fingerprint
    from sdclr.engine.plan import read_inputs

    loaded = source.load(path)
    folder = loaded.config.folder / "range-test"
    folder.mkdir(parents=True)
    result = {
        "schema": 1, "verdict": verdict, "best_exposure": {"value": 0.008, "interval": [0.006, 0.01]},
        "ceiling": {"lr": 1e-3, "bracket": [9e-4, 2e-3]}, "recommended": {"base_lr": 0.0, "max_lr": 5e-4, "steps": 32, "cycles": 2}, "fingerprint": fingerprint(loaded.config, read_inputs(loaded)),
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))


def test_check_plans_auto_from_the_range_test_that_fits(config, capsys):
    path = config(AUTO)
    range_test_of(path)
    check(path, need_plan=True)
    _, err = said(capsys)
    assert "0 to 0.0005" in err
    assert "(κ = 1.00, best 0.008)" in err
    assert "32 (8 epochs)" in err


def test_check_says_when_the_range_test_was_inconclusive(config, capsys):
    path = config(AUTO)
    range_test_of(path, "inconclusive")
    check(path)
    assert "was inconclusive" in said(capsys)[1]


def test_a_plan_refused_for_another_reason_than_a_missing_range_test_is_an_error_of_check(config):
    path = config("schedule: {policy: triangular, max_lr: auto, cycles: 1.5}\ntrain: {steps: 8}")
    range_test_of(path)
    with pytest.raises(ConfigError, match="ends near its peak"):
        check(path)


def test_check_decodes_every_picture_and_names_the_broken_ones(tmp_path, config):
    folder = make_pictures(tmp_path / "own", count=6)
    for number in (0, 5):
        path = folder / f"picture-{number:02d}.png"
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError) as problem:
        check(config(f"data: {{images: '{folder}', resolution: 32}}"))
    assert "picture-00.png" in problem.value.message
    assert "picture-05.png" in problem.value.message


def test_check_reads_the_models_weights(tmp_path, config, model):
    broken = shutil.copytree(model, tmp_path / "broken")
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="diffusion_pytorch_model"):
        check(config(f"model: {{base: '{broken}'}}"))


# init -------------------------------------------------------------------------------------------------------------------------------


def test_inits_config_loads_and_is_the_schemas_defaults_but_for_what_was_given(tmp_path, pictures, capsys):
    path = tmp_path / "run.yaml"
    init(pictures, "owner/model", path)
    assert capsys.readouterr().out == f"{path}\n"
    config = source.load(path).config
    assert (config.run.name, config.model.base, config.data.images) == ("discs", "owner/model", pictures)
    plain = RunConfig.model_validate(
        {"run": {"name": "discs"}, "model": {"base": "owner/model"}, "data": {"images": pictures}}
    )
    assert config == plain


def test_inits_config_shows_every_key_of_the_schema(capsys):
    init(None, "owner/model", Path("unused.yaml"), stdout=True)
    text = capsys.readouterr().out
    for section, field in RunConfig.model_fields.items():
        for key in field.annotation.model_fields:  # type: ignore[union-attr]
            assert f"\n  {key}: " in text.split(f"\n{section}:")[1].split("\n\n")[0]


@pytest.mark.parametrize(
    "name", ["my cat", "Mochi (2024) & friends!", "-dash", ".hidden", "кот", "a#b: c", "'quoted'", "null", "1e5", "%"]
)
def test_inits_config_loads_whatever_the_folder_is_called(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    init(folder, "owner/model", tmp_path / "run.yaml")
    config = source.load(tmp_path / "run.yaml").config
    assert config.data.images == folder


def test_init_takes_the_resolution_of_the_model(tmp_path, pictures, model):
    for base, side in ((str(model), 32), ("stabilityai/stable-diffusion-xl-base-1.0", 1024), ("a/stable-diffusion-v1-5", 512)):  # fmt: skip
        init(pictures, base, tmp_path / f"{side}.yaml")
        assert source.load(tmp_path / f"{side}.yaml").config.data.resolution == side


def test_init_writes_down_the_numbers_of_folders_that_differ(tmp_path, pictures, model, capsys):
    found = sorted(pictures.glob("*.png"))
    for name, some in (("10_cat", found[:3]), ("2_dog", found[3:6]), ("1_cow", found[6:8]), ("", found[8:])):
        (tmp_path / "all" / name).mkdir(parents=True, exist_ok=True)
        for path in some:
            shutil.copy(path, tmp_path / "all" / name)
    init(tmp_path / "all", str(model), tmp_path / "run.yaml")
    loaded = source.load(tmp_path / "run.yaml")
    assert loaded.config.data.repeats == {"10_cat": 10, "2_dog": 2}
    assert "written down as data.repeats" in capsys.readouterr().err
    assert sum(pairs.times(pairs.find(tmp_path / "all"), loaded.config.data.repeats)) == 3 * 10 + 3 * 2 + 2 + 2
    init(tmp_path / "all" / "10_cat", str(model), tmp_path / "cat.yaml")
    shutil.rmtree(tmp_path / "all" / "2_dog")
    shutil.rmtree(tmp_path / "all" / "1_cow")
    for path in (tmp_path / "all").glob("*.png"):
        path.unlink()
    init(tmp_path / "all", str(model), tmp_path / "one.yaml")
    assert source.load(tmp_path / "cat.yaml").config.data.repeats == {}
    assert source.load(tmp_path / "one.yaml").config.data.repeats == {}


def test_init_never_overwrites(tmp_path, pictures):
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        init(pictures, "owner/model", path)
    assert path.read_text() == "mine"


def test_init_of_a_folder_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="there is no such folder"):
        init(tmp_path / "nowhere", "owner/model", tmp_path / "run.yaml")
    with pytest.raises(InputError, match="cannot be written"):
        init(None, "owner/model", tmp_path / "nowhere" / "run.yaml")


@pytest.mark.parametrize("folder", ["@anna", "+cats", "-.@x", "_mine"])
def test_init_names_the_run_so_that_check_takes_it(tmp_path, folder):
    (tmp_path / folder).mkdir()
    init(tmp_path / folder, "base", tmp_path / "run.yaml")
    assert source.load(tmp_path / "run.yaml").config.run.name == folder.lstrip("-.@+")


def test_what_train_would_refuse_is_no_missing_range_test(config):
    path = config("schedule: {policy: triangular, base_lr: 1.0e-3, cycles: 2}\ntrain: {steps: auto}")
    range_test_of(path)
    with pytest.raises(InputError, match="half of the ceiling"):
        check(path)
