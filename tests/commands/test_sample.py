"""`sdclr sample`: cells are what diffusers' own pipeline draws, and nothing is drawn twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from sdclr.commands import sample as command
from sdclr.commands.sample import sample
from sdclr.config import source
from sdclr.data.dataset import readable
from sdclr.engine.painter import KeptStates
from sdclr.errors import InputError


@pytest.fixture
def path(config, trained) -> Path:
    """The config of a finished run of one's own, a copy of the shared one."""
    found = config("sample: {prompts: [disc, another disc], seeds: [1, 2], steps: 2, guidance: 3}")
    shutil.copytree(trained, found.parent / "runs" / "tiny")
    return found


def samples(path: Path) -> Path:
    return path.parent / "runs" / "tiny" / "samples"


def grid(path: Path, folder: Path | None = None) -> dict:
    return json.loads(((folder or samples(path)) / "grid.json").read_text())


def drawn(path: Path) -> dict[tuple[int, str, int], Image.Image]:
    """Every cell of the run's grid."""
    config = source.load(path).config
    columns = [command.Column("base", None, command.model_fingerprint(config.model.base), {})]
    columns += command._columns_of_run(config.folder, None)
    return command.draw_missing(config, columns, samples(path) / "cells")


def by_hand(folder: Path, prompt: str, seed: int, **more: object) -> np.ndarray:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": 3, "height": 32, "width": 32} | more
    return np.asarray(pipeline(prompt, generator=torch.Generator().manual_seed(seed), **settings).images[0])


def test_the_final_folder_opened_in_diffusers_draws_the_last_troughs_cell_pixel_for_pixel(path, capsys):
    sample(path)
    assert capsys.readouterr().out == f"{samples(path) / 'grid.png'}\n"
    columns = grid(path)["columns"]
    last = next(i for i, c in enumerate(columns) if "best-000008" in c["weights"])
    cells = drawn(path)
    for prompt, seed in (("disc", 1), ("another disc", 2)):
        ours = np.asarray(cells[last, prompt, seed])
        assert (ours == by_hand(path.parent / "runs" / "tiny" / "final", prompt, seed)).all()
    assert (np.asarray(cells[last, "disc", 1]) != np.asarray(cells[0, "disc", 1])).any()


def test_the_base_column_is_what_the_untouched_model_draws(path, model):
    sample(path)
    assert (np.asarray(drawn(path)[0, "disc", 2]) == by_hand(model, "disc", 2)).all()


def test_the_negative_prompt_enters_the_picture_as_in_diffusers(path, model):
    sample(path, ["sample.negative_prompt=ugly", "sample.prompts=[disc]", "sample.seeds=[1]"])
    config = source.load(path, ["sample.negative_prompt=ugly", "sample.prompts=[disc]", "sample.seeds=[1]"]).config
    columns = [command.Column("base", None, command.model_fingerprint(config.model.base), {})]
    cells = command.draw_missing(config, columns, samples(path) / "cells")
    assert (np.asarray(cells[0, "disc", 1]) == by_hand(model, "disc", 1, negative_prompt="ugly")).all()


def test_columns_are_the_base_the_troughs_in_order_and_the_best_and_rows_every_prompt_with_every_seed(path):
    sample(path)
    found = grid(path)
    assert found["schema"] == 1
    weights = [Path(c["weights"]).name.partition("_")[0] for c in found["columns"]]
    assert weights[1:] == ["trough-000004", "best-000008"]  # which is the last trough
    assert [c.get("step") for c in found["columns"]] == [None, 4, 8]
    assert found["columns"][1]["exposure"] == pytest.approx(2e-3)
    assert found["columns"][0]["label"] == "base"
    assert found["rows"] == [{"prompt": p, "seed": s} for p in ("disc", "another disc") for s in (1, 2)]
    assert found["settings"] == {"negative_prompt": "", "steps": 2, "guidance": 3.0, "resolution": 32, "size": [32, 32]}
    with Image.open(samples(path) / "grid.png") as image:
        assert image.width == 190 + 3 * (128 + 8)
    assert (samples(path) / "index.html").read_text().count("<img") == 1


def test_cells_stand_in_the_grid_in_the_order_of_rows_and_columns(path):
    sample(path)
    cells, pixels = drawn(path), np.asarray(Image.open(samples(path) / "grid.png").convert("RGB"))
    for column in range(3):
        strip = pixels[:, 190 + column * 136 : 190 + column * 136 + 128]
        place = 0
        for prompt in ("disc", "another disc"):
            for seed in (1, 2):
                wanted = np.asarray(cells[column, prompt, seed].resize((128, 128), Image.Resampling.NEAREST))
                tops = [y for y in range(place, len(strip) - 127) if (strip[y] == wanted[0]).all()]
                found = [y for y in tops if (strip[y : y + 128] == wanted).all()]
                assert found
                place = found[0] + 128


def test_a_second_call_draws_nothing_and_only_missing_cells_are_drawn_again(path, calls):
    sample(path)
    assert len(calls) == len(list((samples(path) / "cells").glob("*.png"))) == 3 * 4
    before = (samples(path) / "grid.png").read_bytes()
    calls.clear()
    sample(path)
    assert calls == []
    assert (samples(path) / "grid.png").read_bytes() == before
    cells = sorted((samples(path) / "cells").glob("*.png"))
    cells[0].unlink()
    cells[1].write_bytes(cells[1].read_bytes()[:200])
    cells[2].write_bytes(b"")
    sample(path)
    assert len(calls) == 3
    assert (samples(path) / "grid.png").read_bytes() == before


def test_a_damaged_cell_is_told_from_a_whole_one_wherever_the_damage_is(tmp_path):
    file = tmp_path / "cell.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    data = file.read_bytes()
    assert readable(file)
    start = data.index(b"IDAT") + 4
    for place in range(start, len(data) - 16, 7):
        file.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
        assert not readable(file)
    for length in (0, 7, 30, start, len(data) // 2):
        file.write_bytes(data[:length])
        assert not readable(file)


def test_a_new_seed_draws_its_own_cells_alone_and_another_guidance_all(path, calls):
    sample(path)
    calls.clear()
    sample(path, ["sample.seeds=[1, 2, 3]"])
    assert sorted(set(calls)) == [("another disc", 3), ("disc", 3)]
    assert len(calls) == 2 * 3
    calls.clear()
    sample(path, ["sample.guidance=5"])
    assert len(calls) == 3 * 4


def test_another_precision_or_noise_schedule_draws_every_column_again(path, calls, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    sample(path)
    for changed in ("model.precision=fp32", f"model.base={other}"):
        calls.clear()
        sample(path, [changed])
        assert len(calls) == 3 * 4


def test_another_base_draws_every_column_again_for_vae_and_text_encoder_are_its_own(
    path, calls, model, tmp_path, capsys
):
    from safetensors.torch import load_file, save_file

    sample(path)
    calls.clear()
    other = shutil.copytree(model, tmp_path / "other")
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: v * 1.5 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    capsys.readouterr()
    sample(path, [f"model.base={other}"])
    assert len(calls) == 3 * 4
    said = "".join(capsys.readouterr().err.split())
    words = f"was trained from {model} as it was then, and is drawn over model.base {other}"
    assert said.count(words.replace(" ", "")) == 2


def test_checkpoints_named_by_hand_are_the_columns_beside_the_base(path, tmp_path):
    folder = path.parent / "runs" / "tiny"
    sample(path, checkpoints=[folder / "checkpoints" / "step-000007", folder / "final"], output=tmp_path / "out")
    columns = grid(path, tmp_path / "out")["columns"]
    assert [c["label"].partition("\n")[0] for c in columns] == ["base", "step 7", "final"]
    assert not samples(path).exists()


def test_a_text_encoder_that_one_column_brings_is_not_left_for_the_next(path, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    weights = other / "text_encoder" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    painter = KeptStates(source.load(path).config)
    bias = next(painter.parts.text_encoder.parameters())
    before = bias.clone()
    painter.load(other)
    assert torch.equal(bias, before + 1)
    painter.load(None)
    assert torch.equal(bias, before)


def test_another_run_is_laid_beside_this_one_under_its_name(path, trained, tmp_path):
    other = shutil.copytree(trained, tmp_path / "elsewhere" / "other")
    sample(path, ["sample.prompts=[disc]", "sample.seeds=[1]"], runs=[other])
    labels = [c["label"].partition("\n")[0] for c in grid(path)["columns"]]
    assert labels == ["base"] + ["tiny"] * 2 + ["other"] * 2


def test_many_troughs_are_thinned_evenly_and_first_last_and_best_stay(path):
    folder = path.parent / "runs" / "tiny" / "checkpoints"
    trough = next(folder.glob("trough-000004*"))
    for step in range(10, 40):
        shutil.copytree(trough, folder / f"trough-{step:06d}_S{step * 1e-3:.2e}")
    columns = command._columns_of_run(path.parent / "runs" / "tiny", None)
    names = [Path(str(c.weights)).name.partition("_")[0] for c in columns]
    assert len(columns) == command.MAX_COLUMNS - 1
    assert (names[0], names[-2], names[-1]) == ("trough-000004", "trough-000039", "best-000008")
    assert names == [*sorted(names[:-1]), names[-1]]


def test_a_damaged_checkpoint_named_by_hand_is_an_error_and_nothing_is_drawn(path, calls):
    checkpoint = path.parent / "runs" / "tiny" / "checkpoints" / "step-000007"
    file = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(InputError, match=r"step-000007: is damaged: unet/diffusion_pytorch_model.safetensors"):
        sample(path, checkpoints=[checkpoint])
    assert calls == []


def test_a_checkpoint_of_a_model_of_another_shape_is_an_input_error(path, tmp_path):
    from diffusers import UNet2DConditionModel

    other = UNet2DConditionModel.from_config(
        dict(UNet2DConditionModel.load_config(path.parent / "runs" / "tiny" / "final" / "unet"))
        | {"block_out_channels": (8, 8)}
    )
    other.save_pretrained(tmp_path / "other" / "unet")
    with pytest.raises(InputError, match=r"does not fit the unet of model\.base"):
        sample(path, checkpoints=[tmp_path / "other"])


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("nowhere", "nowhere: there is no such folder"),
        ("checkpoints", "is neither a checkpoint nor a diffusers folder"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_an_error(path, name, what):
    with pytest.raises(InputError, match=what):
        sample(path, checkpoints=[path.parent / "runs" / "tiny" / name])


def test_a_checkpoint_that_is_not_there_is_an_error_that_names_those_that_are(path):
    kept = path.parent / "runs" / "tiny" / "checkpoints"
    with pytest.raises(InputError, match="there is no such folder") as problem:
        sample(path, checkpoints=[kept / "step-999999"])
    assert all(folder.name in str(problem.value.hint) for folder in kept.glob("*-*"))


def test_a_run_without_checkpoints_is_an_error_that_names_train(config):
    path = config()
    (path.parent / "runs" / "tiny").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no checkpoint to draw") as problem:
        sample(path)
    assert f"sdclr train {path}" in str(problem.value.hint)


def test_a_run_that_is_not_there_is_an_error(path):
    with pytest.raises(InputError, match="there is no such run"):
        sample(path, runs=[path.parent / "nowhere"])


def test_a_state_that_a_run_at_work_has_removed_meanwhile_is_never_drawn_as_the_base(path, monkeypatch):
    real = KeptStates.load

    def gone(painter, folder):
        if folder:
            shutil.rmtree(folder)
        real(painter, folder)

    monkeypatch.setattr(KeptStates, "load", gone)
    with pytest.raises(InputError, match="has gone, or holds no weights"):
        sample(path)
