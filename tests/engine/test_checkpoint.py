"""Checkpoints: what comes back is bit for bit what went in, damage is seen, nothing needed is ever deleted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdclr.engine import checkpoint as checkpoints
from sdclr.engine.checkpoint import BEST, FULL, TROUGH, available, newest_sound, prune, restore, save, snapshot, verify
from sdclr.engine.loop import TrainState
from sdclr.errors import CheckpointError, StorageError

SETTINGS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "sgd without momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
}


def trained_state(run, name: str, steps: int = 3) -> TrainState:
    """The tiny UNet after some updates along random gradients."""
    run.fresh_state()
    state = TrainState(run.modules, SETTINGS[name](list(run.modules["unet"].parameters())))
    return updated(state, steps)


def updated(state: TrainState, steps: int) -> TrainState:
    for _ in range(steps):
        g = torch.Generator().manual_seed(state.step)
        for p in state.parameters:
            p.grad = torch.randn(p.shape, generator=g)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        state.exposure += 0.01
    return state


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.modules["unet"].state_dict().items()}


def flat(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], object]:
    return {(i, k): v for i, values in optimizer.state_dict()["state"].items() for k, v in values.items()}


def same(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def test_weights_that_lie_channels_last_are_saved_and_taken_up_as_any_others(run, tmp_path):
    unet = run.modules["unet"]
    try:
        unet.to(memory_format=torch.channels_last)
        state = trained_state(run, "adamw")
        assert not unet.conv_in.weight.is_contiguous()
        kept = save(tmp_path, FULL, snapshot(state, run.modules), run.modules, {"kappa": None})
        run.parts.with_weights({"unet": unet.state_dict()}).save_pipeline(tmp_path / "final")
        assert torch.equal(StableDiffusionPipeline.from_pretrained(tmp_path / "final").unet.conv_in.weight, unet.conv_in.weight)  # fmt: skip
        once, other = weights(updated(state, 2)), trained_state(run, "adamw", steps=1)
        restore(kept, other, run.modules)
        assert all(other.optimizer.state[p]["exp_avg"].stride() == p.stride() for p in other.parameters)
        assert all(map(torch.equal, weights(updated(other, 2)).values(), once.values()))
    finally:
        unet.to(memory_format=torch.contiguous_format)


def test_the_loss_scale_of_fp16_comes_back(run, tmp_path):
    def scaled(first: float) -> TrainState:
        state = trained_state(run, "adamw")
        state.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=first)  # as accelerate's optimizer carries it
        state.optimizer.scaler.scale(torch.ones(()))
        return state

    kept = save(tmp_path, FULL, snapshot(scaled(8.0), run.modules), run.modules, {"kappa": None})
    other = scaled(65536.0)
    restore(kept, other, run.modules)
    assert other.optimizer.scaler.get_scale() == 8.0
    assert flat(other.optimizer).keys() == flat(trained_state(run, "adamw").optimizer).keys()


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> checkpoints.Checkpoint:
    """One full checkpoint; not to be written to."""
    return save(
        tmp_path_factory.mktemp("whole"),
        FULL,
        snapshot(trained_state(run, "adamw"), run.modules),
        run.modules,
        {"kappa": None},
    )


@pytest.fixture
def copied(whole, tmp_path) -> checkpoints.Checkpoint:
    shutil.copytree(whole.path, tmp_path / "copy" / whole.path.name)
    return checkpoints.Checkpoint(tmp_path / "copy" / whole.path.name, whole.kind, whole.step)


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_and_optimizer_state_come_back_bit_for_bit_and_train_on_alike(run, tmp_path, name):
    state = trained_state(run, name)
    stored = save(tmp_path, FULL, snapshot(state, run.modules), run.modules, {"note": "x"})
    before, moments = (
        weights(state),
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in flat(state.optimizer).items()},
    )
    exposure = state.exposure
    updated(state, 2)
    expected = weights(state)

    run.fresh_state()
    resumed = TrainState(run.modules, SETTINGS[name](list(run.modules["unet"].parameters())))
    info = restore(stored, resumed, run.modules)
    assert (resumed.step, resumed.exposure, info["note"]) == (3, exposure, "x")
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(resumed).items())
    again = flat(resumed.optimizer)
    kept = {key: value for key, value in moments.items() if value is not None}
    assert again.keys() >= kept.keys()
    assert all(same(again[key], value) for key, value in kept.items())
    updated(resumed, 2)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(resumed).items())


def test_the_groups_settings_after_a_restore_are_the_new_optimizers(run, whole):
    run.fresh_state()
    optimizer = torch.optim.AdamW(
        [{"params": list(run.modules["unet"].parameters()), "lr_scale": 0.5}], lr=7.0, betas=(0.5, 0.6)
    )
    restore(whole, TrainState(run.modules, optimizer), run.modules)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["lr_scale"]) == (7.0, (0.5, 0.6), 0.5)


def test_a_checkpoints_unet_opens_in_diffusers(run, whole):
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    unet = UNet2DConditionModel.from_pretrained(whole.path, subfolder="unet")
    stored = load_file(whole.path / "unet" / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == unet.state_dict().keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in unet.state_dict().items())


def test_a_whole_checkpoint_verifies_and_holds_no_pickle(whole):
    assert verify(whole) == []
    files = {p.relative_to(whole.path).as_posix() for p in whole.path.rglob("*") if p.is_file()}
    assert files == {
        "manifest.json", "state.json", "optimizer.safetensors", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    }  # fmt: skip


def test_state_json_tells_schema_kind_step_and_exposure(whole):
    info = whole.info()
    assert (info["schema"], info["kind"], info["step"], info["exposure"]) == (1, "step", 3, pytest.approx(0.03))


@pytest.mark.parametrize(
    "name", ["state.json", "optimizer.safetensors", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_one_flipped_bit_in_a_file_is_found_and_the_file_named(copied, name, place):
    data = bytearray((copied.path / name).read_bytes())
    data[{"first": 0, "middle": len(data) // 2, "last": -1}[place]] ^= 1
    (copied.path / name).write_bytes(data)
    assert verify(copied) == [f"{name} has been altered or cut"]


def test_any_flipped_bit_of_the_manifest_is_found(copied):
    path = copied.path / "manifest.json"
    data = path.read_bytes()
    unseen = []
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        if not verify(copied):
            unseen.append((place, data[max(0, place - 10) : place + 10]))
    assert unseen == []
    path.write_bytes(data)
    assert verify(copied) == []


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "state.json", "optimizer.safetensors", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("keep", [0, 0.5, -1])
def test_a_cut_file_is_found(copied, name, keep):
    data = (copied.path / name).read_bytes()
    (copied.path / name).write_bytes(data[: keep if keep == -1 else int(len(data) * keep)])
    (problem,) = verify(copied)
    assert problem.startswith(name)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "unet/diffusion_pytorch_model.safetensors"])
def test_a_missing_file_is_found(copied, name):
    (copied.path / name).unlink()
    (problem,) = verify(copied)
    assert problem.startswith(name)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"files": 3}', '{"files": {}, "seal": "x"}', "\x80"])
def test_a_manifest_of_nonsense_is_a_problem_and_no_crash(copied, text):
    (copied.path / "manifest.json").write_bytes(text.encode("latin-1"))
    (problem,) = verify(copied)
    assert problem.startswith("manifest.json")


def test_info_of_a_damaged_state_is_a_checkpoint_error(copied):
    (copied.path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json"):
        copied.info()


# Several checkpoints of one run ----------------------------------------------------------------------------------------------------


def at(run, folder: Path, kind: str, step: int) -> checkpoints.Checkpoint:
    state = TrainState(run.modules, SETTINGS["sgd"](list(run.modules["unet"].parameters())), step, step * 1e-3)
    return save(folder, kind, snapshot(state, run.modules), run.modules, {})


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_the_newest_sound_one_is_found_and_each_broken_newer_one_told(run, tmp_path):
    for step in (2, 4, 6, 8):
        at(run, tmp_path, FULL, step)
    at(run, tmp_path, TROUGH, 10)
    (tmp_path / "step-000008" / "manifest.json").unlink()
    (tmp_path / "step-000006" / "state.json").write_text("{}")
    found, skipped = newest_sound(tmp_path)
    assert found is not None
    assert found.step == 4
    assert [line.split(": ")[0] for line in skipped] == [str(tmp_path / f"step-00000{s}") for s in (8, 6)]
    assert "manifest.json is missing" in skipped[0]
    assert "state.json has been altered" in skipped[1]


def test_without_a_sound_one_there_is_none_and_every_reason_is_told(run, tmp_path):
    assert newest_sound(tmp_path / "nowhere") == (None, [])
    at(run, tmp_path, FULL, 2)
    (tmp_path / "step-000002" / "state.json").unlink()
    found, skipped = newest_sound(tmp_path)
    assert found is None
    assert len(skipped) == 1


def test_partial_and_foreign_folders_are_no_checkpoints(run, tmp_path):
    at(run, tmp_path, FULL, 2)
    for name in (".step-000004.partial", ".step-000001.pruned", "step-abc", "step-", "other-000009", "step"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000007").write_text("a file")
    assert [c.path.name for c in available(tmp_path)] == ["step-000002"]
    assert newest_sound(tmp_path)[0] == available(tmp_path)[0]


def test_they_are_listed_by_step_beyond_six_digits_too(run, tmp_path):
    for step in (1_000_000, 999_999, 2):
        at(run, tmp_path, FULL, step)
    at(run, tmp_path, TROUGH, 3), at(run, tmp_path, BEST, 4)
    assert [(c.kind, c.step) for c in available(tmp_path)] == [
        ("step", 2), ("trough", 3), ("best", 4), ("step", 999_999), ("step", 1_000_000),
    ]  # fmt: skip
    found = newest_sound(tmp_path)[0]
    assert found is not None
    assert found.step == 1_000_000


@pytest.mark.parametrize("keep_last", [1, 2, 5])
def test_pruning_keeps_the_newest_every_trough_and_the_newest_best(run, tmp_path, keep_last):
    for step in (1, 2, 3, 4):
        at(run, tmp_path, FULL, step), at(run, tmp_path, TROUGH, step)
    at(run, tmp_path, BEST, 1), at(run, tmp_path, BEST, 3)
    prune(tmp_path, keep_last)
    left = available(tmp_path)
    assert [c.step for c in left if c.kind == FULL] == [1, 2, 3, 4][-keep_last:]
    assert [c.step for c in left if c.kind == TROUGH] == [1, 2, 3, 4]
    assert [c.step for c in left if c.kind == BEST] == [3]
    assert all(verify(c) == [] for c in left)
    assert names(tmp_path) == {c.path.name for c in left}


def test_pruning_never_takes_the_only_one_of_a_kind(run, tmp_path):
    kept = [at(run, tmp_path, kind, 2) for kind in (FULL, TROUGH, BEST)]
    prune(tmp_path, 1)
    assert {c.path for c in available(tmp_path)} == {c.path for c in kept}
    prune(tmp_path / "nowhere", 1)


def test_discarding_after_a_step_takes_what_is_beyond_it_and_leftovers_alone(run, tmp_path):
    for kind in (FULL, TROUGH, BEST):
        for step in (2, 4):
            at(run, tmp_path, kind, step)
    for name in (".step-000004.partial", ".step-000001.pruned"):
        (tmp_path / name).mkdir()
    checkpoints.discard_after(tmp_path, 2)
    assert names(tmp_path) == {c.path.name for c in available(tmp_path)}
    assert [(c.kind, c.step) for c in available(tmp_path)] == [("best", 2), ("step", 2), ("trough", 2)]
    checkpoints.discard_after(tmp_path / "nowhere", 2)


def test_a_step_saved_again_replaces_the_first_one(run, tmp_path):
    at(run, tmp_path, FULL, 2)
    (tmp_path / "step-000002" / "state.json").write_text("damaged")
    at(run, tmp_path, FULL, 2)
    assert names(tmp_path) == {"step-000002"}
    assert verify(available(tmp_path)[0]) == []


def test_a_save_that_fails_leaves_every_earlier_checkpoint_and_no_partial_one(run, tmp_path, monkeypatch):
    at(run, tmp_path, FULL, 2)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_seal", full)
    with pytest.raises(StorageError, match="step-000004: cannot be written: No space left"):
        at(run, tmp_path, FULL, 4)
    assert names(tmp_path) == {"step-000002"}


def test_a_disk_too_small_is_refused_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(StorageError, match=r"needs .* MiB and the disk has 0 MiB left"):
        at(run, tmp_path, FULL, 4)
    assert names(tmp_path) == set()


def test_names_tell_kind_step_exposure_and_kappa(run, tmp_path):
    state = TrainState(run.modules, SETTINGS["sgd"](list(run.modules["unet"].parameters())), 400, 0.00123)
    assert save(tmp_path, FULL, snapshot(state, run.modules), run.modules, {"kappa": 0.5}).path.name == "step-000400"
    assert (
        save(tmp_path, TROUGH, snapshot(state, run.modules), run.modules, {"kappa": 0.5}).path.name
        == "trough-000400_S1.23e-03_k0.50"
    )
    assert (
        save(tmp_path, BEST, snapshot(state, run.modules), run.modules, {"kappa": None}).path.name
        == "best-000400_S1.23e-03"
    )


def test_the_manifest_lists_every_other_file_with_its_sha256(whole):
    import hashlib

    listed = json.loads((whole.path / "manifest.json").read_text())["files"]
    files = [p for p in whole.path.rglob("*") if p.is_file() and p.name != "manifest.json"]
    assert listed == {p.relative_to(whole.path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
