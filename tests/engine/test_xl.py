"""SDXL, in miniature: two text encoders, a summary of the caption, the picture's sizes; from the folder to the drawn grid."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import SIDE, built, make_pictures, make_xl, write_config
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from sdclr.commands.range_test import range_test
from sdclr.commands.sample import sample
from sdclr.commands.train import train
from sdclr.config import source
from sdclr.config.schema import ModelSection
from sdclr.data.batches import Sample
from sdclr.data.dataset import View, look
from sdclr.data.pairs import Pair
from sdclr.engine import memory
from sdclr.engine.folder import read_json
from sdclr.engine.painter import KeptStates
from sdclr.errors import Inconclusive, InputError, Interrupted
from sdclr.model import checks, components, encoders
from sdclr.model.single_file import original_layout
from sdclr.report import metrics
from sdclr.seeding import generator

SAMPLES = [Sample(position=i, index=i, view=i % 2, drop_caption=i == 2) for i in range(4)]


@pytest.fixture(scope="session")
def oblong(tmp_path_factory) -> Path:
    """Captioned pictures that are wider than they are high."""
    folder = make_pictures(tmp_path_factory.mktemp("pictures") / "oblong", side=40)
    for i, path in enumerate(sorted(folder.glob("*.png"))):
        Image.open(path).resize((60 + 2 * i, 40)).save(path)
    return folder


@pytest.fixture
def path(tmp_path, xl, oblong) -> Callable[..., Path]:
    def write(extra: str = "", model: Path = xl, name: str = "run.yaml") -> Path:
        return write_config(tmp_path / name, model, oblong, tmp_path / "runs", extra)

    return write


def section(base: object, **more: object) -> ModelSection:
    return ModelSection(base=str(base), **more)  # type: ignore[arg-type]


# What is told to the UNet -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_captions_are_encoded_as_diffusers_own_pipeline_encodes_them(xl):
    parts = components.load(section(xl))
    captions = ["disc", "a longer caption than fits into sixteen tokens"]
    told = encoders.encode_tokens(parts, encoders.tokenize(parts, captions), torch.device("cpu"))
    hidden, _, pooled, _ = parts.pipeline().encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)  # type: ignore[union-attr]
    assert torch.allclose(told["encoder_hidden_states"], hidden, atol=1e-6)
    assert torch.allclose(told["text_embeds"], pooled, atol=1e-6)
    assert hidden.shape == (2, 16, 40)
    assert pooled.shape == (2, 20)


@torch.no_grad()
@pytest.mark.parametrize("zeros", [True, False])
def test_the_loss_is_the_mean_of_diffusers_own_calls_and_a_dropped_caption_is_what_the_sampler_will_take(
    tmp_path, path, zeros
):
    run = built(path(model=make_xl(tmp_path / "xl", zeros)))
    run.fresh_state()
    pipeline, expected = run.parts.pipeline(), []
    for each in SAMPLES:
        g = generator(run.config.run.seed, "sample", each.position)
        t = torch.randint(1000, (1,), generator=g)
        noise, spread = (torch.randn(1, 4, SIDE // 4, SIDE // 4, generator=g) for _ in range(2))
        latents = run.train.mean[each.index][each.view] + run.train.std[each.index][each.view] * spread
        caption = run.train.pairs[each.index].caption
        hidden, no_hidden, summary, no_summary = pipeline.encode_prompt(caption, device="cpu")  # type: ignore[union-attr]
        if each.drop_caption:
            hidden, summary = no_hidden, no_summary
            assert bool(hidden.any()) is not zeros
        added = {"text_embeds": summary, "time_ids": run.train.sizes[each.index, each.view][None]}
        noisy = run.parts.noise_scheduler.add_noise(latents, noise, t)
        prediction = run.parts.unet(noisy, t, encoder_hidden_states=hidden, added_cond_kwargs=added).sample
        expected.append(torch.nn.functional.mse_loss(prediction, noise).item())
    assert run.loss(run.prepare(SAMPLES)).item() == pytest.approx(sum(expected) / 4, rel=1e-5)


def saved(folder: Path, width: int, height: int, **options: object) -> Pair:
    Image.new("RGB", (width, height)).save(folder / "a.jpg", **options)
    return Pair(folder / "a.jpg", "a.jpg", "disc")


def test_sizes_are_those_of_the_picture_its_square_and_the_squares_place(tmp_path):
    # 60 × 40 becomes 48 × 32, with 16 to spare at the sides; 40 × 60 has them above and below.
    assert look(saved(tmp_path, 60, 40), 32, View()).sizes == (40, 60, 0, 8, 32, 32)
    assert look(saved(tmp_path, 40, 60), 32, View()).sizes == (60, 40, 8, 0, 32, 32)
    assert look(saved(tmp_path, 16, 16), 32, View()).sizes == (16, 16, 0, 0, 32, 32)


def test_of_a_turned_picture_they_are_those_that_it_is_seen_in(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    assert look(saved(tmp_path, 60, 40, exif=turned), 32, View()).sizes == (60, 40, 8, 0, 32, 32)


@pytest.mark.parametrize("crop", [1, 2, 3])
def test_a_mirrored_square_lies_at_the_mirrored_place(tmp_path, crop):
    pair = saved(tmp_path, 100, 40)
    plain, mirrored = (look(pair, 32, View(crop, flipped)) for flipped in (False, True))
    assert plain.sizes[3] + mirrored.sizes[3] == 80 - 32
    assert plain.sizes[:3] == mirrored.sizes[:3]
    step = np.linspace(0, 255, 100).astype(np.uint8)[None, :, None].repeat(40, 0).repeat(3, 2)
    Image.fromarray(step).save(pair.path, quality=100)
    left, right = look(pair, 32, View(crop)).pixels[0, 16, [0, -1]]
    assert look(pair, 32, View(crop, True)).pixels[0, 16, [0, -1]].tolist() == [right, left]


def test_each_view_has_its_own_sizes_and_the_held_out_pictures_have_theirs(path):
    run = built(path())
    for pair, sizes in zip(run.train.pairs, run.train.sizes, strict=True):
        expected = [list(look(pair, SIDE, view).sizes) for view in (View(), View(flipped=True))]
        assert sizes.tolist() == expected
    assert run.held_out.sizes[:, 0].tolist() == [list(look(pair, SIDE, View()).sizes) for pair in run.held_out.pairs]


def test_sizes_are_told_to_sdxl_alone(path, run):
    assert set(built(path()).prepare(SAMPLES).told) == {"encoder_hidden_states", "text_embeds", "time_ids"}
    assert set(run.prepare(SAMPLES).told) == {"encoder_hidden_states"}


def test_a_second_run_encodes_neither_pictures_nor_captions_again(path, monkeypatch):
    first = built(path())

    def refuse(*args: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(encoders, "encode_tokens", refuse)
    monkeypatch.setattr(encoders, "encode_pixels", refuse)
    second = built(path())
    assert torch.equal(first.train.sizes, second.train.sizes)
    assert list(first.train.captions) == list(second.train.captions) == ["encoder_hidden_states", "text_embeds"]
    for name, tensor in first.train.captions.items():
        assert torch.equal(tensor, second.train.captions[name])


def test_models_that_share_a_cache_get_their_own_captions(path, xl, model, tmp_path):
    """Another second encoder, another setting or padding of the same, and Stable Diffusion 1 with the same first encoder."""
    copies = {"other": xl, "padded": xl, "heads": xl, "plain": model}
    other, padded, heads, plain = (shutil.copytree(folder, tmp_path / name) for name, folder in copies.items())
    edit(heads / "text_encoder_2" / "config.json", num_attention_heads=4)
    file = other / "text_encoder_2" / "model.safetensors"
    save_file({name: tensor + 0.1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    tokenizer = CLIPTokenizer.from_pretrained(padded / "tokenizer_2")
    tokenizer.pad_token = "a"
    tokenizer.save_pretrained(padded / "tokenizer_2")
    shutil.copytree(xl / "text_encoder", plain / "text_encoder", dirs_exist_ok=True)
    for folder in (xl, other, padded, heads, plain):
        run = built(path(model=folder))
        tokens = encoders.tokenize(run.parts, [pair.caption for pair in run.train.pairs])
        for name, tensor in encoders.encode_tokens(run.parts, tokens, torch.device("cpu")).items():
            assert torch.allclose(run.train.captions[name], tensor, atol=1e-5), (folder, name)


def test_what_is_not_trained_is_put_away(path, monkeypatch):
    places: dict[str, object] = {}
    real = components.load

    def watched(config: ModelSection, to_train: bool) -> components.Components:
        parts = real(config, to_train)
        for name, module in parts.networks.items():
            monkeypatch.setattr(
                module, "to", lambda where, *, name=name, module=module: (places.update({name: where}), module)[1]
            )
        return parts

    monkeypatch.setattr(components, "load", watched)
    run = built(path())
    assert places["text_encoder"] == places["text_encoder_2"] == places["vae"] == "cpu"
    places.clear()
    moved = dataclasses.replace(
        run.inputs.split, train=run.inputs.split.validation, validation=run.inputs.split.train[:2]
    )
    run.on(dataclasses.replace(run.inputs, split=moved))
    assert places["text_encoder"] == places["text_encoder_2"] == places["vae"] == "cpu"


# The whole --------------------------------------------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_run_trains_the_unet_and_leaves_a_pipeline_that_draws_what_sample_draws(path, xl):
    config = path("sample: {prompts: [disc], seeds: [1], steps: 2, guidance: 3}")
    train(config)
    sample(config)
    folder = config.parent / "runs" / "tiny"
    base, final = weights(xl), weights(folder / "final")
    assert all(tensor.isfinite().all() for tensor in final.values())
    assert sum(not torch.equal(base[name], tensor) for name, tensor in final.items()) > 0.9 * len(base)
    for part in ("text_encoder", "text_encoder_2"):
        before, after = (load_file(place / part / "model.safetensors") for place in (xl, folder / "final"))
        assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "best", add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.force_zeros_for_empty_prompt is True
    draw = {"num_inference_steps": 2, "guidance_scale": 3, "height": SIDE, "width": SIDE}
    expected = pipeline("disc", generator=torch.Generator().manual_seed(1), **draw).images[0]
    cells = [np.asarray(Image.open(cell)) for cell in (folder / "samples" / "cells").glob("*.png")]
    assert any(np.array_equal(np.asarray(expected), cell) for cell in cells)


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(path, monkeypatch):
    whole, stopped = (
        path(f"run: {{name: {name}, output_dir: '{path().parent / 'runs'}', seed: 3}}", name=f"{name}.yaml")
        for name in ("whole", "stopped")
    )
    train(whole)
    add = metrics.MetricsLog.add

    def interrupt(self, kind, step, **values):
        add(self, kind, step, **values)
        if (kind, step) == ("step", 3):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(metrics.MetricsLog, "add", interrupt)
        train(stopped)
    train(stopped, resume=True)
    runs = whole.parent / "runs"
    assert (runs / "whole" / "metrics.jsonl").read_bytes() == (runs / "stopped" / "metrics.jsonl").read_bytes()
    ours, theirs = (weights(runs / name / "final") for name in ("whole", "stopped"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_range_test_on_two_splits_runs(path):
    extra = "range_test: {max_steps: 20, arms_per_decade: 2, lr: [1.0e-3, 0.03], folds: 2}\nvalidation: {fraction: 0.3, timesteps_per_image: 2}"
    config = path(extra)
    with pytest.raises(Inconclusive):
        range_test(config)
    result = read_json(config.parent / "runs" / "tiny" / "range-test" / "result.json")
    assert result["arms"] and result["cost"]["train_steps"] > 0


def test_memory_counts_every_part(path, xl):
    run = built(path())
    needs = memory.count(run.config, 8, 2, torch.device("cpu"), only=2)
    frozen = [p for part in ("vae", "text_encoder", "text_encoder_2") for p in getattr(run.parts, part).parameters()]
    assert needs.parts["encoders"] == pytest.approx(4 * sum(p.numel() for p in frozen), rel=0.01)
    held = [run.train, run.held_out, run.stabilised]
    told = [tensor for encoded in held for tensor in (*encoded.mean, *encoded.std, *encoded.captions.values())]
    assert needs.parts["data"] == 4 * sum(tensor.numel() for tensor in told)
    assert needs.training.peak(2) > sum(4 * p.numel() for p in run.modules["unet"].parameters())


def test_drawing_in_low_precision_decodes_in_fp32(path):
    painter, seen = KeptStates(source.load(path()).config), []
    for layer in (painter.parts.unet.conv_in, painter.parts.vae.decoder.conv_in):
        layer.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        picture = painter.pipeline("disc", num_inference_steps=1, height=SIDE, width=SIDE).images[0]
    assert picture.size == (SIDE, SIDE)
    assert seen == [torch.bfloat16, torch.float32]


def test_it_is_drawn_while_it_trains_and_sample_draws_the_same(path):
    config = path()
    train(config, ["sample.at_troughs=true", "checkpoint.best=false"])
    samples = config.parent / "runs" / "tiny" / "samples"
    drawn = {cell.name: np.asarray(Image.open(cell), dtype=int) for cell in (samples / "cells").iterdir()}
    steps = [column.get("step", 0) for column in json.loads((samples / "at-work" / "grid.json").read_text())["columns"]]
    assert steps == [0, 4, 8]
    shutil.rmtree(samples)
    sample(config)
    for cell in (samples / "cells").iterdir():
        assert abs(np.asarray(Image.open(cell), dtype=int) - drawn[cell.name]).max() <= 1  # a sum rounded otherwise


def test_another_model_is_drawn_with_both_its_text_encoders_and_the_next_one_with_its_own(path, xl, tmp_path):
    other, painter = make_xl(tmp_path / "other"), KeptStates(source.load(path()).config)
    for part in ("text_encoder", "text_encoder_2"):
        file = other / part / "model.safetensors"
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    for folder, expected in ((other, other), (None, xl)):
        painter.load(folder)
        for part in ("text_encoder", "text_encoder_2"):
            stored = load_file(expected / part / "model.safetensors")
            own = getattr(painter.parts, part).state_dict()
            assert all(torch.equal(own[name], tensor) for name, tensor in stored.items() if name in own)


# What cannot be trained -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(xl, tmp_path) -> Path:
    return shutil.copytree(xl, tmp_path / "copy")


def refused(base: Path, match: str, *, read: bool = False, **more: object) -> InputError:
    """The same message whether weights are read or not; with `read` it takes the weights to know."""
    for look_at in (components.load,) if read else (components.load, components.skeleton):
        with pytest.raises(InputError, match=match) as problem:
            look_at(section(base, **more))
        assert problem.value.exit_code == 2
    return problem.value


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_unet(copy: Path, **changed: object) -> None:
    config = dict(UNet2DConditionModel.load_config(copy / "unet")) | changed
    UNet2DConditionModel.from_config(config).save_pretrained(copy / "unet")


@pytest.mark.parametrize("part", checks.XL_PARTS)
def test_a_missing_second_part_is_named(copy, part):
    shutil.rmtree(copy / part)
    refused(copy, f"its part {part}/ is missing")


def test_training_a_text_encoder_is_refused(xl):
    problem = refused(xl, "is an SDXL, and sdclr trains the UNet of those alone", train=("unet", "text_encoder"))
    assert problem.hint == "set model.train: [unet]"


def test_text_encoders_that_do_not_fit_the_unet_are_refused_with_both_widths(copy):
    shutil.rmtree(copy / "text_encoder_2")
    config = CLIPTextConfig.from_pretrained(copy / "text_encoder", projection_dim=20)
    CLIPTextModelWithProjection(config).save_pretrained(copy / "text_encoder_2")
    refused(copy, "its text encoders give 32 numbers a token, its UNet wants 40")


def test_unets_that_are_told_something_else_are_refused(copy, model):
    plain = dict(UNet2DConditionModel.load_config(model / "unet")) | {"cross_attention_dim": 40}
    UNet2DConditionModel.from_config(plain).save_pretrained(copy / "unet")
    refused(copy, "its UNet is told nothing besides the caption, and sdclr would tell it text_time")


def test_a_unet_that_wants_other_sizes_is_refused(copy):
    with_unet(copy, projection_class_embeddings_input_dim=60)
    refused(copy, "give 68 numbers a caption, its UNet wants 60")


def test_an_inpainting_unet_is_refused(copy):
    with_unet(copy, in_channels=9)
    refused(copy, "its VAE has 4 latent channels, its UNet takes 9")


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({"text_encoder": [None, None], "tokenizer": [None, None]}, "is SDXL's refiner"),
        ({"text_encoder_2": [None, None], "tokenizer_2": [None, None]}, "its text encoder gives 16 numbers a token, its UNet wants 40"),
    ],
    ids=["the refiner", "no second encoder"],
)  # fmt: skip
def test_an_index_that_names_no_encoder_is_understood(copy, index, match):
    edit(copy / "model_index.json", **index)
    refused(copy, match)


def test_a_model_without_a_unet_is_refused_by_its_name(copy):
    index = json.loads((copy / "model_index.json").read_text())
    del index["unet"]
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    refused(copy, r"model_index.json \(FluxPipeline\) names no unet; sdclr trains")


def test_another_kind_of_second_text_encoder_is_refused(copy):
    edit(copy / "model_index.json", text_encoder_2=["transformers", "T5EncoderModel"])
    refused(copy, "its second text encoder is .*T5EncoderModel.*, and SDXL's is a CLIPTextModelWithProjection")


def test_the_refiner_as_it_is_published_is_named(copy):
    edit(copy / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    shutil.rmtree(copy / "text_encoder"), shutil.rmtree(copy / "tokenizer")
    refused(copy, "is SDXL's refiner")


@pytest.mark.parametrize("key", ["class_embed_type", "num_class_embeds"])
def test_a_unet_that_wants_classes_is_refused(copy, key):
    edit(copy / "unet" / "config.json", **{key: {"class_embed_type": "timestep", "num_class_embeds": 5}[key]})
    refused(copy, f"more than Stable Diffusion's \\({key}|lack class_embedding")


def test_a_tokenizer_that_cuts_nowhere_or_too_late_is_refused(copy):
    for part in ("tokenizer", "tokenizer_2"):
        edit(copy / part / "tokenizer_config.json", model_max_length=77)
    refused(copy, "its second tokenizer cuts captions at 77 tokens, its second text encoder holds 16", read=True)
    for part in ("tokenizer", "tokenizer_2"):
        config = json.loads((copy / part / "tokenizer_config.json").read_text())
        del config["model_max_length"]
        (copy / part / "tokenizer_config.json").write_text(json.dumps(config))
    refused(copy, "its tokenizer cuts captions nowhere", read=True)


def test_weights_that_are_there_in_fp16_alone_are_read(copy, xl):
    for part, stem in checks.WEIGHTS.items():
        file = copy / part / f"{stem}.safetensors"
        save_file(
            {name: tensor.half() for name, tensor in load_file(file).items()},
            file.with_suffix(".fp16.safetensors"),
            metadata={"format": "pt"},
        )
        file.unlink()
    ours, theirs = (components.load(section(folder)).networks for folder in (copy, xl))
    for name, module in ours.items():
        weights_ = theirs[name].state_dict()
        assert all(
            torch.equal(tensor, weights_[key].half().to(tensor.dtype)) for key, tensor in module.state_dict().items()
        )


def test_captions_that_are_cut_are_said(path, oblong, tmp_path, capsys):
    folder = shutil.copytree(oblong, tmp_path / "long")
    (folder / "picture-03.txt").write_text("a caption that is much longer than sixteen tokens of one letter each")
    built(path(f"data: {{images: '{folder}', resolution: {SIDE}}}"))
    said = "".join(capsys.readouterr().err.split())
    assert "captionsarecutatthe16tokensthatthismodelreads:of" in said
    assert "picture-03.png" in said and "picture-02" not in said


@pytest.mark.parametrize("name", ["a LoRA", "a bare UNet", "a cut one"])
def test_a_single_file_that_is_no_whole_model_is_refused(xl, tmp_path, name):
    tensors = {
        "a LoRA": {"lora_unet_down_blocks_0.alpha": torch.zeros(1)},
        "a bare UNet": load_file(xl / "unet" / "diffusion_pytorch_model.safetensors"),
        "a cut one": {name: tensor for name, tensor in layout(xl).items() if "embedders.1" not in name},
    }
    save_file(tensors[name], tmp_path / "model.safetensors")
    refused(
        tmp_path / "model.safetensors",
        "cannot be loaded|lack|is of Stable Diffusion 1|is a LoRA",
        read=True,
        config=str(xl),
    )


def test_models_of_another_kind_of_noise_or_latents_are_refused(copy):
    edit(copy / "vae" / "config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    refused(copy, "its VAE shifts each channel of the latents")
    edit(copy / "vae" / "config.json", latents_mean=None, latents_std=None)
    EDMDPMSolverMultistepScheduler().save_pretrained(copy / "scheduler")
    refused(copy, "its scheduler EDMDPMSolverMultistepScheduler has no beta_schedule", read=True)


def test_tokenizers_of_different_length_are_refused(copy):
    tokenizer = CLIPTokenizer.from_pretrained(copy / "tokenizer_2", model_max_length=12)
    tokenizer.save_pretrained(copy / "tokenizer_2")
    refused(copy, "its tokenizers cut captions at 16 and 12 tokens", read=True)


def test_check_says_it_too_and_exits_with_two(path, copy, sdclr):
    with_unet(copy, projection_class_embeddings_input_dim=60)
    done = sdclr("check", path(model=copy))
    assert done.returncode == 2
    assert "its UNet wants 60" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_weight_that_the_second_text_encoder_lacks_is_named(copy):
    file = copy / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    del tensors["text_projection.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    refused(copy, "text_encoder_2/ lack text_projection.weight", read=True)


# One file ---------------------------------------------------------------------------------------------------------------------------


def layout(folder: Path) -> dict[str, torch.Tensor]:
    return original_layout(components.load(section(folder)), "fp32")


def test_a_single_file_loads_offline_to_the_folders_weights(xl, tmp_path):
    save_file(layout(xl), tmp_path / "model.safetensors")
    folder = components.load(section(xl))
    single = components.load(section(tmp_path / "model.safetensors", config=str(xl)))
    assert single.zeros_for_no_caption
    assert list(single.networks) == list(folder.networks)
    for name, module in folder.networks.items():
        ours, theirs = module.state_dict(), single.networks[name].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_a_single_file_of_one_kind_with_the_configs_of_the_other_is_refused(xl, model, tmp_path):
    for own, other, name in ((layout(xl), model, "SDXL, and"), (layout(model), xl, "1.x or 2.x, and")):
        save_file(own, tmp_path / "model.safetensors")
        problem = refused(tmp_path / "model.safetensors", f"is of .*{name} model.config", read=True, config=str(other))
        assert "such as" in str(problem.hint)
