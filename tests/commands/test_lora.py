"""A LoRA through every command: trained, resumed, range-tested, drawn and exported; diffusers reads what is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sdclr.commands.check import check
from sdclr.commands.export import export
from sdclr.commands.range_test import range_test
from sdclr.commands.sample import _columns_of_run, draw_missing, sample
from sdclr.commands.train import train
from sdclr.config import source
from sdclr.config.schema import LoraSection
from sdclr.engine.checkpoint import available, verify
from sdclr.engine.fingerprint import find_range_test, fingerprint
from sdclr.engine.folder import write_json
from sdclr.engine.plan import read_inputs
from sdclr.engine.run import Run
from sdclr.errors import CheckpointError, ConfigError, Inconclusive, InputError
from sdclr.model import adapters, components

LORA = "lora: {rank: 4, alpha: 6}\nschedule: {policy: triangular, max_lr: 0.05, cycles: 2}"
KINDS = {"unet": StableDiffusionPipeline, "with text encoder": StableDiffusionPipeline, "XL": StableDiffusionXLPipeline}
HOW = {"num_inference_steps": 2, "height": 32, "width": 32, "guidance_scale": 7.5}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory, model, xl, pictures) -> tuple[str, Path, Path]:
    """Kind, base, and the config of a finished run."""
    from tiny import write_config

    base, folder = xl if request.param == "XL" else model, tmp_path_factory.mktemp("trained")
    path = write_config(folder / "run.yaml", base, pictures, folder / "runs", LORA)
    if request.param == "with text encoder":
        path.write_text(path.read_text().replace("model: {", "model: {train: [unet, text_encoder], ", 1))
    train(path)
    return request.param, base, path


def folder_of(path: Path) -> Path:
    return path.parent / "runs" / "tiny"


def drawn(kind: str, base: Path, lora: Path | None, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """What diffusers draws with it."""
    pipeline = KINDS[kind].from_pretrained(base, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora)
    picture = pipeline("disc", generator=torch.Generator().manual_seed(1), **HOW).images[0]
    return np.asarray(picture, dtype=int)


def test_diffusers_draws_with_the_final_folder_what_sample_draws(trained):
    kind, base, path = trained
    sample(path)
    record = json.loads((folder_of(path) / "samples" / "grid.json").read_text())
    assert [column["step"] for column in record["columns"][1:]][:2] == [4, 8]
    columns = [c for c in _columns_of_run(folder_of(path), None) if c.about["step"] == 8]
    cells = draw_missing(source.load(path).config, columns, folder_of(path) / "samples" / "cells")
    ours, theirs = np.asarray(cells[0, "disc", 1], dtype=int), drawn(kind, base, folder_of(path) / "final")
    assert abs(ours - theirs).max() <= 1  # W + BA added up beforehand
    assert abs(theirs - drawn(kind, base, None)).max() > 10


def test_every_kept_state_is_a_lora_that_diffusers_loads_and_holds_no_weight_of_the_base(trained):
    kind, base, path = trained
    kept = [c.path for c in available(folder_of(path) / "checkpoints")]
    assert len(kept) >= 4
    assert not [problem for c in available(folder_of(path) / "checkpoints") for problem in verify(c)]
    parts = {"unet", "text_encoder"} if kind == "with text encoder" else {"unet"}
    for folder in (*kept, folder_of(path) / "final", folder_of(path) / "best"):
        names = load_file(folder / adapters.FILE)
        assert all(".lora_A." in name or ".lora_B." in name for name in names)
        assert {name.partition(".")[0] for name in names} == parts
    last = next(p for p in kept if p.name.startswith("trough-000008"))
    assert (drawn(kind, base, last) == drawn(kind, base, folder_of(path) / "final")).all()
    assert {p.name for p in (folder_of(path) / "final").iterdir()} == {adapters.FILE}


def test_the_exported_file_has_the_names_of_kohyas_trainer_and_draws_the_same(trained, tmp_path, capsys):
    kind, base, path = trained
    export(path, precision="fp32", output=tmp_path / "whole.safetensors")
    assert capsys.readouterr().out.strip() == str(tmp_path / "whole.safetensors")
    weights = load_file(tmp_path / "whole.safetensors")
    assert {float(tensor) for name, tensor in weights.items() if name.endswith(".alpha")} == {6.0}
    place = f"lora_unet_{'input_blocks_1_1' if kind == 'XL' else 'down_blocks_0_attentions_0'}_transformer_blocks_0_attn1_to_q"
    assert {f"{place}.lora_down.weight", f"{place}.lora_up.weight", f"{place}.alpha"} <= weights.keys()
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"
    assert (text in weights) == (kind == "with text encoder")
    theirs = drawn(kind, base, folder_of(path) / "final")
    assert (drawn(kind, base, tmp_path / "whole.safetensors") == theirs).all()
    with safe_open(tmp_path / "whole.safetensors", "pt") as file:
        about = file.metadata()
    family, kohyas = ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0") if kind == "XL" else ("stable-diffusion-v1", "sd_v1")  # fmt: skip
    assert about["modelspec.architecture"] == f"{family}/lora"
    assert [about[f"ss_{key}"] for key in ("base_model_version", "v2", "network_dim", "network_alpha")] == [kohyas, "False", "4", "6.0"]  # fmt: skip
    for name in ("half", "again"):
        export(path, output=tmp_path / f"{name}.safetensors")
    assert (tmp_path / "half.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    halves = load_file(tmp_path / "half.safetensors").items()
    assert {tensor.dtype for name, tensor in halves if not name.endswith(".alpha")} == {torch.float16}


def test_a_lora_that_does_not_fit_the_model_is_named_and_columns_of_both_kinds_lie_side_by_side(
    trained, config, xl, model, pictures, tmp_path
):
    """The base's weights are whole again for the column after a LoRA's."""
    kind, _, path = trained
    if kind == "XL":
        other = config()
        train(other)
        with pytest.raises(InputError, match=r"does not fit the unet of model\.base") as problem:
            sample(other, checkpoints=[folder_of(path) / "final"])
        assert "name that one as model.base" in str(problem.value.hint)
        return
    full = config("run: {name: full, output_dir: '" + str(tmp_path / "runs") + "'}")
    train(full)
    lora, final = folder_of(path) / "final", tmp_path / "runs" / "full" / "final"
    sample(full, checkpoints=[lora, final], output=tmp_path / "one")
    sample(full, checkpoints=[final], output=tmp_path / "other")
    cells = [{p.name: p.read_bytes() for p in (tmp_path / n / "cells").iterdir()} for n in ("one", "other")]
    assert len(cells[0]) == len(cells[1]) + 1
    assert all(cells[0][name] == content for name, content in cells[1].items())


def test_the_average_of_the_troughs_is_that_of_the_small_matrices(config):
    path = config(LORA)
    train(path, ["checkpoint.average=true"])
    kept = available(folder_of(path) / "checkpoints", ("trough", "average"))
    one, other, average = (
        components.read_trained(next(c.path for c in kept if (c.kind, c.step) == name), ("unet",))["unet"]
        for name in (("trough", 4), ("trough", 8), ("average", 8))
    )
    for key, tensor in average.items():
        torch.testing.assert_close(tensor, (one[key] + other[key]) / 2)


def test_another_rank_is_another_run(config):
    path = config(LORA)
    train(path)
    shutil.rmtree(folder_of(path) / "final")
    with pytest.raises(CheckpointError, match=r"lora.rank is 8 in the config, and the run was started with 4"):
        train(path, ["lora.rank=8"], resume=True)
    with pytest.raises(CheckpointError, match=r"lora.rank is null in the config"):
        train(path, ["lora.rank=null", "lora.alpha=null"], resume=True)


def test_gradient_checkpointing_trains_the_same_bits(config):
    path = config(LORA)
    for name, way in (("one", "true"), ("other", "false")):
        train(path, [f"run.name={name}", f"model.gradient_checkpointing={way}", "model.train=[unet, text_encoder]"])
    one, other = (load_file(path.parent / "runs" / name / "final" / adapters.FILE) for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.fixture
def afresh():
    """accelerate keeps the first precision that a process asks for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_in_bf16_the_frozen_matrices_are_kept_in_bf16_and_compute_what_those_in_fp32_do(config, afresh, monkeypatch):
    """As autocast casts them; norms, embeddings and what is trained stay in fp32."""
    path = config(LORA)
    train(path, ["model.precision=bf16"])
    with monkeypatch.context() as patch:
        patch.setattr(components, "narrow", lambda module, dtype: None)
        train(path, ["model.precision=bf16", "run.name=wide"])
    one, other = ((path.parent / "runs" / name / "final" / adapters.FILE).read_bytes() for name in ("tiny", "wide"))
    assert one == other
    assert {tensor.dtype for tensor in load_file(folder_of(path) / "final" / adapters.FILE).values()} == {torch.float32}
    loaded = source.load(path, ["model.precision=bf16"])
    run = Run(loaded.config, read_inputs(loaded))
    matrices = (torch.nn.Linear, torch.nn.Conv2d)
    kinds = {(isinstance(layer, matrices), p.requires_grad, p.dtype) for layer in run.modules["unet"].modules() for p in layer.parameters(recurse=False)}  # fmt: skip
    assert kinds == {(True, False, torch.bfloat16), (True, True, torch.float32), (False, False, torch.float32)}


def test_a_range_test_of_a_lora_answers_for_that_lora_alone(config):
    path = config(
        "lora: {rank: 2}\nrange_test: {max_steps: 40, arms_per_decade: 2, lr: [1.0e-2, 0.3]}\nvalidation: {fraction: 0.3, timesteps_per_image: 2}"
    )
    with pytest.raises(Inconclusive):
        range_test(path)
    for override, fits in (("lora.rank=2", True), ("lora.rank=3", False), ("lora.rank=null", False), ("lora.alpha=1", False), ("lora.alpha=2", True)):  # fmt: skip
        loaded = source.load(path, [override])
        assert bool(find_range_test(loaded.config, read_inputs(loaded))) == fits, override


def test_runs_and_range_tests_from_before_there_were_loras_are_still_known(config, monkeypatch):
    path = config("checkpoint: {every: 3}")
    train(path)
    folder = folder_of(path)
    shutil.rmtree(folder / "final")
    before = sorted(folder.glob("checkpoints/step-*"))[-1]
    state = json.loads((before / "state.json").read_text())
    del state["config"]["lora"]
    del state["fingerprint"]["lora"]
    monkeypatch.setattr("sdclr.engine.checkpoint.Checkpoint.info", lambda self: state)
    monkeypatch.setattr("sdclr.engine.checkpoint.verify", lambda checkpoint: [])
    train(path, resume=True)
    assert (folder / "final" / "unet").is_dir()
    loaded = source.load(path)
    inputs = read_inputs(loaded)
    result = folder / "range-test" / "result.json"
    result.parent.mkdir()
    write_json(result, {"fingerprint": {k: v for k, v in fingerprint(loaded.config, inputs).items() if k != "lora"}})
    assert find_range_test(loaded.config, inputs)
    assert not find_range_test(source.load(path, ["lora.rank=4"]).config, inputs)


def test_the_unets_weights_come_first_in_the_optimizer_whatever_the_config_names_first(config):
    """A checkpoint numbers them."""
    loaded = source.load(config("lora: {rank: 2}"), ["model.train=[text_encoder, unet]", "optimizer.text_encoder_scale=0.5"])  # fmt: skip
    run = Run(loaded.config, read_inputs(loaded))
    first, second = run.fresh_state().optimizer.param_groups
    assert (first["lr_scale"], second["lr_scale"]) == (1.0, 0.5)
    assert all(p is q for p, q in zip(first["params"], adapters.trained(run.modules["unet"]), strict=True))


def test_check_says_what_is_trained(config, capsys):
    path = config(LORA)
    check(path)
    said = " ".join(capsys.readouterr().err.split())
    loaded = source.load(path)
    modules = Run(loaded.config, read_inputs(loaded)).modules
    count = sum(p.numel() for p in adapters.trained(modules["unet"]))
    whole = sum(p.numel() for p in modules["unet"].parameters()) - count
    assert f"UNet of {whole:,} weights that predicts the noise; {count:,} weights are trained" in said
    assert "a LoRA of rank 4, alpha 6, beside the transformer matrices" in said


@pytest.mark.parametrize("said", ["{rank: 4}", "{rank: '4'}", "{rank: 4, alpha: null}", "{rank: 4, alpha: 4}"])
def test_alpha_is_the_rank_where_nothing_is_said_of_it(config, said):
    assert source.load(config(f"lora: {said}")).config.lora == LoraSection(rank=4, alpha=4.0)


@pytest.mark.parametrize(
    ("lora", "model", "said"),
    [
        ("{alpha: 4}", "", "lora.alpha has no effect: lora.rank is null"),
        ("{layers: attention}", "", "lora.layers has no effect: lora.rank is null"),
        ("{rank: 0}", "", "lora.rank must be at least 1"),
        ("{rank: 4}", "precision: full_bf16, ", "lora.rank trains matrices too small to need model.precision: full_bf16"),
    ],
)  # fmt: skip
def test_a_setting_that_would_do_nothing_is_refused(config, lora, model, said):
    path = config(f"lora: {lora}")
    path.write_text(path.read_text().replace("model: {", "model: {" + model, 1))
    with pytest.raises(ConfigError) as problem:
        source.load(path)
    assert said in str(problem.value)


def test_the_picture_of_a_run_is_there(trained):
    with Image.open(folder_of(trained[2]) / "training.png") as picture:
        assert picture.size[0] > 300
