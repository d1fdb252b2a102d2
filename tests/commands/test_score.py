"""`sdclr sample --score`: three numbers from a CLIP model, here one of a few thousand random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdclr.commands.sample import sample
from sdclr.errors import InputError
from sdclr.model.scores import Judge, Score, scores


@pytest.fixture(scope="module")
def clip(tmp_path_factory, model) -> Path:
    """A micro CLIP with the tokenizer of the micro Stable Diffusion."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    end = tokenizer.eos_token_id
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 16, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": end,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def unit(*rows: tuple[float, ...]) -> np.ndarray:
    vectors = np.array(rows, dtype=float)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_three_scores_of_known_embeddings():
    drawn = unit((1, 0), (0, 1), (1, 1), (1, 0))
    found = scores(drawn, [0, 0, 1, 1], prompts=unit((1, 0), (0, 1)), training=unit((1, 0), (1, 0)))
    half = 2**-0.5
    likeness, obedience = np.array([1, 0, half, 1]), np.array([1, 0, half, 0])
    assert found["likeness"].mean == pytest.approx(likeness.mean())
    assert found["likeness"].sd == pytest.approx(likeness.std(ddof=1))
    assert found["obedience"].mean == pytest.approx(obedience.mean())
    assert found["variety"].mean == pytest.approx(np.mean([1, 1 - half]))
    assert (found["likeness"].count, found["variety"].count) == (4, 2)


def test_one_seed_has_no_variety():
    found = scores(unit((1, 0), (0, 1)), [0, 1], unit((1, 0), (1, 0)), unit((1, 0)))
    assert found["variety"] == Score(None, None, 0)


def test_embeddings_are_the_models_own(clip):
    from transformers import CLIPModel, CLIPProcessor

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)) for _ in range(3)]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    inputs = processor(text=["disc", "a red disc"], images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**inputs)
    judge = Judge(str(clip))
    assert judge.pictures(pictures) == pytest.approx(expected.image_embeds.numpy(), abs=1e-5)
    assert judge.texts(["disc", "a red disc"]) == pytest.approx(expected.text_embeds.numpy(), abs=1e-5)
    assert judge.texts(["a text that is much longer than sixteen letters of one token each"]).shape == (1, 8)


def test_sample_writes_scores_of_every_column_and_prints_them(trained, clip, tmp_path, capsys):
    settings = ["sample.prompts=[disc, red disc]", "sample.seeds=[1, 2]"]
    sample(trained.parent.parent / "run.yaml", settings, output=tmp_path, score=str(clip))
    err = capsys.readouterr().err
    record = json.loads((tmp_path / "grid.json").read_text())
    assert record["settings"]["score"] == str(clip)
    for column in record["columns"]:
        assert set(column["scores"]) == {"likeness", "obedience", "variety"}
        assert column["scores"]["likeness"]["count"] == 4
        assert column["scores"]["variety"]["count"] == 2
        assert -1 <= column["scores"]["obedience"]["mean"] <= 1
        assert f"{column['scores']['likeness']['mean']:.3f}" in err
    assert "Scores" in (tmp_path / "index.html").read_text()


def test_without_score_the_grid_says_nothing_of_it(trained, tmp_path):
    sample(trained.parent.parent / "run.yaml", output=tmp_path)
    record = json.loads((tmp_path / "grid.json").read_text())
    assert "score" not in record["settings"]
    assert all("scores" not in column for column in record["columns"])


@pytest.mark.parametrize("name", ["no/such/folder", "plain"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(name):
    with pytest.raises(InputError, match="not a hub id"):
        Judge(name)


def test_a_folder_without_a_clip_is_refused_with_a_hint(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded") as problem:
        Judge(str(tmp_path))
    assert "safetensors" in problem.value.hint
