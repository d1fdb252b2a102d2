"""`sdclr draw`: pictures and captions by the untouched base, as diffusers' own pipeline draws them, ready for prior.images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from sdclr.cli import main
from sdclr.commands.draw import draw
from sdclr.commands.train import train
from sdclr.data import pairs
from sdclr.errors import InputError, StorageError
from sdclr.seeding import derive

PROMPTS = ["a disc", "two discs"]


@pytest.fixture
def path(config) -> Path:
    return config("sample: {steps: 2, guidance: 3, negative_prompt: square}")


def test_pictures_are_those_of_diffusers_pipeline_and_bear_their_prompts_in_turn(path, model, tmp_path, capsys):
    folder = tmp_path / "prior"
    draw(path, PROMPTS, folder, 5)
    assert str(folder) in capsys.readouterr().out
    found = pairs.find(folder)
    assert [pair.caption for pair in found] == [PROMPTS[number % 2] for number in range(5)]
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    for number, pair in enumerate(found):
        expected = pipeline(
            pair.caption, negative_prompt="square", num_inference_steps=2, guidance_scale=3, height=32, width=32,
            generator=torch.Generator().manual_seed(derive(3, "draw", number)),
        ).images[0]  # fmt: skip
        assert np.array_equal(np.asarray(Image.open(pair.path)), np.asarray(expected))


def test_what_is_there_is_not_drawn_again_and_more_can_be_asked_for(path, tmp_path, calls):
    folder = tmp_path / "prior"
    draw(path, PROMPTS, folder, 3)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "drawn-00001.png").unlink()
    (folder / "mine.png").write_bytes(before["drawn-00000.png"])
    calls.clear()
    draw(path, PROMPTS, folder, 4)
    assert [prompt for prompt, _ in calls] == [PROMPTS[1], PROMPTS[1]]
    assert {name: (folder / name).read_bytes() for name in before} == before
    calls.clear()
    draw(path, PROMPTS, folder, 4)
    assert calls == []


@pytest.mark.parametrize("altered", [b"\xff\xfe", b"another\n"])
def test_pictures_of_other_prompts_are_not_taken_for_these(path, tmp_path, calls, altered):
    folder = tmp_path / "prior"
    draw(path, PROMPTS, folder, 2)
    caption = folder / "drawn-00001.txt"
    caption.write_bytes(altered)
    calls.clear()
    with pytest.raises(InputError, match=r"drawn-00001\.png: was drawn for another prompt"):
        draw(path, PROMPTS, folder, 3)
    assert calls == []


def test_damaged_pictures_and_missing_captions_are_drawn_again_and_others_are_said(path, tmp_path, calls, capsys):
    folder = tmp_path / "prior"
    draw(path, PROMPTS, folder, 3)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "drawn-00000.png").write_bytes(b"")
    (folder / "drawn-00001.txt").unlink()
    calls.clear()
    draw(path, PROMPTS, folder, 2)
    assert [prompt for prompt, _ in calls] == PROMPTS
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert "1 other picture lies there too" in capsys.readouterr().err


def test_a_prompt_in_brackets_is_shown_as_it_is(path, tmp_path, capsys):
    draw(path, ["[bold] a disc [/x]"], tmp_path / "prior", 1)
    assert pairs.find(tmp_path / "prior")[0].caption == "[bold] a disc [/x]"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sample.size=[64, 64]", r"size \(\[32, 32\] there, \[64, 64\] here\)"),
        ("run.seed=9", r"run\.seed \(3 there, 9 here\)"),
        ("sample.negative_prompt=round", "sample.negative_prompt"),
        ("model.base={other}", "the model's weights"),
    ],
)
def test_pictures_of_other_settings_are_not_taken_for_these(path, tmp_path, xl, calls, override, words):
    folder = tmp_path / "prior"
    draw(path, PROMPTS, folder, 1)
    calls.clear()
    with pytest.raises(InputError, match=words):
        draw(path, PROMPTS, folder, 2, [override.format(other=xl)])
    assert calls == []


@pytest.mark.parametrize("prompt", ["", " \n ", "caf\udce9", "a\0b"], ids=ascii)
def test_a_prompt_that_can_be_no_caption_is_refused_before_anything_is_written(path, tmp_path, prompt):
    with pytest.raises(InputError, match="a prompt must be text"):
        draw(path, ["a disc", prompt], tmp_path / "prior", 2)
    assert not (tmp_path / "prior").exists()


def test_a_prompt_of_several_lines_is_the_caption_that_is_read(path, tmp_path):
    draw(path, ["a disc,\n  round "], tmp_path / "prior", 1)
    draw(path, ["a disc,\n  round "], tmp_path / "prior", 2)
    assert {pair.caption for pair in pairs.find(tmp_path / "prior")} == {"a disc, round"}


def test_among_the_subjects_pictures_nothing_is_drawn(path, pictures):
    for folder in (pictures, pictures / "prior", pictures.parent):
        with pytest.raises(InputError, match=r"data\.images"):
            draw(path, PROMPTS, folder, 2)
    assert not (pictures / "prior").exists()


def test_a_folder_that_cannot_be_made_is_named(path, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file: is a file; name a folder"):
        draw(path, PROMPTS, tmp_path / "file", 2)
    with pytest.raises(StorageError, match=r"file/prior: cannot be written") as caught:
        draw(path, PROMPTS, tmp_path / "file" / "prior", 2)
    assert "--resume" not in (caught.value.hint or "")


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--count", "many"], []], ids=str)
def test_a_wrong_command_line_ends_with_its_code(path, tmp_path, arguments, monkeypatch, capsys):
    prompt = ["a disc"] if arguments else ["  "]
    monkeypatch.setattr(
        "sys.argv", ["sdclr", "draw", str(path), *prompt, "--output", str(tmp_path / "prior"), *arguments]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert not (tmp_path / "prior").exists()


def test_what_is_drawn_can_be_trained_on_beside_the_subject(path, tmp_path):
    folder = tmp_path / "prior"
    draw(path, PROMPTS, folder, 3)
    train(path, [f"prior.images={folder}", "train.steps=4", "schedule.cycles=1"])
    assert (path.parent / "runs" / "tiny" / "final").is_dir()
