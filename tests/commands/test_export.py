"""`sdclr export`: diffusers' own reader finds every weight of the state in the one file, and draws the same picture from it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdclr.commands.export import export
from sdclr.commands.train import train
from sdclr.config.schema import ModelSection
from sdclr.errors import InputError, StorageError
from sdclr.model import components, single_file

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from shapes import SHAPES, vae_of

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
KINDS = {"epsilon": StableDiffusionPipeline, "XL": StableDiffusionXLPipeline, "second": StableDiffusionPipeline}


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> Path:
    """A model like Stable Diffusion 2: OpenCLIP's activation, the velocity, and a text encoder without its last layer."""
    from tiny import make_model, make_tokenizer, text_config

    folder = make_model(tmp_path_factory.mktemp("models") / "second", "v_prediction")
    shutil.rmtree(folder / "text_encoder")
    torch.manual_seed(2)
    CLIPTextModel(text_config(make_tokenizer(), hidden_act="gelu", num_hidden_layers=23)).save_pretrained(
        folder / "text_encoder"
    )
    return folder


@pytest.fixture(scope="module")
def xl(tmp_path_factory) -> Path:
    from tiny import make_xl

    return make_xl(tmp_path_factory.mktemp("models") / "xl")


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory, model, xl, second, pictures) -> tuple[str, Path, Path]:
    """Kind, base, and the config of a finished run; the text encoder is trained too, but SDXL's."""
    from tiny import write_config

    base = {"epsilon": model, "XL": xl, "second": second}[request.param]
    folder = tmp_path_factory.mktemp("trained")
    path = write_config(folder / "run.yaml", base, pictures, folder / "runs")
    if request.param != "XL":
        path.write_text(path.read_text().replace("model: {", "model: {train: [unet, text_encoder], ", 1))
    train(path, ["checkpoint.at_troughs=true"])
    return request.param, base, path


def opened(file: Path, kind: str, base: Path):
    return KINDS[kind].from_single_file(file, config=str(base), local_files_only=True, torch_dtype=torch.float32)


def said(capsys) -> Path:
    return Path(capsys.readouterr().out.strip())


def test_the_file_holds_the_final_model_whole(trained, capsys):
    kind, base, path = trained
    export(path, precision="fp32")
    file = said(capsys)
    assert file == path.parent / "runs" / "tiny" / "export" / "tiny-final.safetensors"
    final = KINDS[kind].from_pretrained(path.parent / "runs" / "tiny" / "final")
    read = opened(file, kind, base)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2")[: 4 if kind == "XL" else 3]:
        ours, theirs = getattr(read, name).state_dict(), getattr(final, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    before = load_file(base / UNET)
    assert any(not torch.equal(before[key], tensor) for key, tensor in final.unet.state_dict().items())
    how = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    one, other = (p("disc", generator=torch.Generator().manual_seed(1), **how).images for p in (read, final))
    assert (one == other).all()
    file.unlink()


def test_a_checkpoint_goes_over_the_base_in_half_the_bytes(trained, capsys, tmp_path):
    kind, base, path = trained
    checkpoint = next((path.parent / "runs" / "tiny" / "checkpoints").glob("trough-*"))
    export(path, checkpoint=checkpoint, output=tmp_path / "small.safetensors")
    assert said(capsys) == tmp_path / "small.safetensors"
    with safe_open(tmp_path / "small.safetensors", "pt") as file:
        about = file.metadata()
    names = {"epsilon": ("stable-diffusion-v1", "epsilon"), "second": ("stable-diffusion-v2", "v"), "XL": ("stable-diffusion-xl-v1-base", "epsilon")}  # fmt: skip
    assert (about["modelspec.architecture"], about["modelspec.prediction_type"]) == names[kind]
    assert {tensor.dtype for tensor in load_file(tmp_path / "small.safetensors").values()} == {torch.float16}
    own, read = load_file(checkpoint / UNET), opened(tmp_path / "small.safetensors", kind, base).unet.state_dict()
    assert all(torch.equal(read[key], tensor.half().float()) for key, tensor in own.items())


@pytest.mark.parametrize(
    ("name", "counts", "known"),
    [
        ("sd15", {"model.diffusion_model.": 686, "first_stage_model.": 248, "cond_stage_model.transformer.": 196},
         ["model.diffusion_model.input_blocks.3.0.op.weight", "model.diffusion_model.output_blocks.5.2.conv.bias",
          "model.diffusion_model.output_blocks.2.1.conv.weight", "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
          "first_stage_model.decoder.up.3.upsample.conv.weight", "first_stage_model.encoder.mid.attn_1.proj_out.weight",
          "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight"]),
        ("sdxl", {"model.diffusion_model.": 1680, "first_stage_model.": 248, "conditioner.embedders.0.": 196, "conditioner.embedders.1.": 389},
         ["model.diffusion_model.label_emb.0.2.weight", "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight",
          "model.diffusion_model.output_blocks.2.2.conv.weight", "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight",
          "conditioner.embedders.1.model.positional_embedding", "conditioner.embedders.1.model.text_projection"]),
    ],
)  # fmt: skip
def test_at_true_size_the_names_are_those_of_the_published_files(name, counts, known, monkeypatch):
    """v1-5-pruned-emaonly and sd_xl_base_1.0 have these numbers of weights (beside position_ids and logit_scale, which are none)."""
    shape = SHAPES[name]
    nothing = None
    with torch.device("meta"):
        first = CLIPTextModel(CLIPTextConfig(max_position_embeddings=77, **shape["text"]))
        more = {"text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(max_position_embeddings=77, **shape["second"]))} if name == "sdxl" else {}  # fmt: skip
        parts = components.Components(
            tokenizer=nothing, vae=vae_of(shape), text_encoder=first, unet=UNet2DConditionModel(**shape["unet"]),
            noise_scheduler=DDPMScheduler(), sampler=nothing, **more,
        )  # fmt: skip
        monkeypatch.setattr(single_file, "_as", lambda precision, name, tensor: tensor)
        found = single_file.original_layout(parts, "fp16")
    assert {stem: sum(key.startswith(stem) for key in found) for stem in counts} == counts
    assert sum(counts.values()) == len(found)
    assert not set(known) - found.keys()
    if name == "sd15":
        assert found["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    else:
        assert found["conditioner.embedders.1.model.text_projection"].shape == (1280, 1280)


def test_a_model_in_several_files_is_exported_and_its_base_is_not_asked_for(trained, tmp_path, capsys):
    """As diffusers writes SDXL's UNet in fp32, which is larger than the ten gigabytes that it puts into one."""
    kind, _, path = trained
    export(path, precision="fp32", output=tmp_path / "whole.safetensors")
    split = tmp_path / "split"
    KINDS[kind].from_pretrained(path.parent / "runs" / "tiny" / "final").save_pretrained(split, max_shard_size="40KB")
    assert len(list((split / "unet").glob("*-of-*.safetensors"))) > 1
    gone = ["model.base=nowhere"]
    export(path, gone, checkpoint=split, precision="fp32", output=tmp_path / "again.safetensors")
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    read = components.read_trained(split, ("unet",))["unet"]
    assert all(torch.equal(read[key], t) for key, t in components.read_trained(path.parent / "runs" / "tiny" / "final", ("unet",))["unet"].items())  # fmt: skip


def test_an_xl_that_predicts_velocity_says_so(xl, tmp_path):
    shutil.copytree(xl, tmp_path / "xl")
    file = tmp_path / "xl" / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(file.read_text()) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    file.write_text(json.dumps(scheduler))
    found = single_file.original_layout(components.load(ModelSection(base=str(tmp_path / "xl"))), "fp16")
    assert found["v_pred"].numel() == found["ztsnr"].numel() == 0
    save_file(found, tmp_path / "v.safetensors")
    opened(tmp_path / "v.safetensors", "XL", tmp_path / "xl")
    plain = single_file.original_layout(components.load(ModelSection(base=str(xl))), "fp16")
    assert found.keys() - plain.keys() == {"v_pred", "ztsnr"}


def test_of_sd_2_a_last_layer_stands_there_for_its_name(second):
    found = single_file.original_layout(components.load(ModelSection(base=str(second))), "fp32")
    stem = "cond_stage_model.model.transformer.resblocks."
    assert torch.equal(found[f"{stem}23.attn.in_proj_weight"], found[f"{stem}22.attn.in_proj_weight"])
    assert sum(key.startswith(f"{stem}23.") for key in found) == 12


def refused(words: str, path: Path, **options) -> InputError:
    with pytest.raises(InputError, match=words) as problem:
        export(path, **options)
    assert problem.value.exit_code == 2
    return problem.value


@pytest.fixture
def copied(config) -> Path:
    path = config()
    train(path)
    return path


def test_what_cannot_be_exported_is_named_with_the_way_on(copied, tmp_path):
    run = copied.parent / "runs" / "tiny"
    refused("fp16, bf16 or fp32; got 'fp8'", copied, precision="fp8")
    refused(r"must end in \.safetensors", copied, output=tmp_path / "x.ckpt")
    problem = refused("final: there is no such folder", copied, overrides=["run.name=other"])
    assert "sdclr train" in str(problem.hint)
    problem = refused("has no unet/", copied, checkpoint=run)
    assert "trough-" in str(problem.hint)
    export(copied)
    refused("is there already", copied)
    trough = next((run / "checkpoints").glob("trough-*"))
    with (trough / UNET).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    refused("is damaged", copied, checkpoint=trough)
    (trough / "manifest.json").unlink()
    refused("is damaged: manifest.json is missing", copied, checkpoint=trough)
    assert [path.name for path in (run / "export").iterdir()] == ["tiny-final.safetensors"]


def test_a_weight_beyond_fp16_is_named(copied):
    file = copied.parent / "runs" / "tiny" / "final" / UNET
    tensors = load_file(file)
    tensors["conv_in.weight"] = tensors["conv_in.weight"] + 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    refused(r"input_blocks\.0\.0\.weight: holds numbers too large for fp16", copied)
    export(copied, precision="bf16")
    tensors["conv_in.weight"] = tensors["conv_in.weight"] * torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    refused(
        r"input_blocks\.0\.0\.weight: holds numbers that are not finite",
        copied,
        precision="fp32",
        output=file.with_name("x.safetensors"),
    )


def test_a_full_disk_leaves_nothing_and_names_another_place(copied, monkeypatch, tmp_path):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(StorageError, match=r"out\.safetensors: cannot be written: No space left"):
        export(copied, output=tmp_path / "there" / "out.safetensors")
    assert list((tmp_path / "there").iterdir()) == []


def test_the_command_prints_the_path(copied, sdclr):
    done = sdclr("export", copied, "--precision", "bf16")
    assert done.returncode == 0
    assert Path(done.stdout.strip()).is_file()
    header = json.loads(Path(done.stdout.strip()).read_bytes()[8:][: int.from_bytes(Path(done.stdout.strip()).read_bytes()[:8], "little")])  # fmt: skip
    assert header["__metadata__"]["format"] == "pt"
    wrong = sdclr("export", copied, "--precision", "fp8")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


def test_a_checkpoint_of_another_base_is_refused_though_it_would_fit(copied, model, tmp_path):
    shutil.copytree(model, tmp_path / "other")
    tensors = {name: tensor + 0.01 for name, tensor in load_file(tmp_path / "other" / UNET).items()}
    save_file(tensors, tmp_path / "other" / UNET, metadata={"format": "pt"})
    trough = next((copied.parent / "runs" / "tiny" / "checkpoints").glob("trough-*"))
    base = f"model.base={tmp_path / 'other'}"
    problem = refused(
        f"was trained from {model} .*and model.base is {tmp_path / 'other'}",
        copied,
        overrides=[base],
        checkpoint=trough,
    )
    assert "its own run" in str(problem.hint)


def test_a_torn_model_is_not_mended_with_the_bases_parts(copied):
    final = copied.parent / "runs" / "tiny" / "final"
    shutil.rmtree(final / "text_encoder")
    refused("final: text_encoder/ is missing|final.* lacks|text_encoder", copied)


def test_what_is_written_can_be_opened_by_those_whom_the_umask_lets(copied):
    export(copied)
    run = copied.parent / "runs" / "tiny"
    files = [
        run / "export" / "tiny-final.safetensors",
        run / "final" / UNET,
        *run.glob("checkpoints/*/unet/*.safetensors"),
    ]
    mask = os.umask(0)
    os.umask(mask)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~mask}


def test_a_name_that_is_too_long_and_a_sigterm_end_in_a_message(copied, sdclr, tmp_path):
    long = tmp_path / ("x" * 300 + ".safetensors")
    for option in ("--output", "--checkpoint"):
        done = sdclr("export", copied, option, long)
        assert done.returncode == 2
        assert "File name too long" in done.stderr
        assert "Traceback" not in done.stderr
    script = f"""
import os, signal, sys
import safetensors.torch
real = safetensors.torch.save_file
def save_file(*arguments, **more):
    real(*arguments, **more)
    os.kill(os.getpid(), signal.SIGTERM)
safetensors.torch.save_file = save_file
sys.argv = ["sdclr", "export", {str(copied)!r}]
from sdclr.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 143
    assert "stopped by SIGTERM" in done.stderr
    assert list((copied.parent / "runs" / "tiny" / "export").iterdir()) == []
