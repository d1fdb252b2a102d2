"""Several processes on one run: the same mathematics as one, the files written once, one message when something goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_config
from together import Ended, command, launch

from sdclr.engine import processes
from sdclr.engine.checkpoint import available, verify
from sdclr.engine.processes import Processes
from sdclr.errors import InputError, Interrupted, StorageError
from sdclr.report import figures, metrics

pytestmark = pytest.mark.usefixtures("no_figure")
ROOT = Path(__file__).parent.parent.parent
WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
SETTINGS = """data: {{images: '{pictures}', resolution: 32, flip: true, caption_dropout: 0.3}}
model: {{base: '{model}', train: [unet, text_encoder]}}
batch: {{size: 4, accumulate: 2}}
train: {{steps: 8}}
validation: {{fraction: 0.3, every: 2, timesteps_per_image: 7}}
checkpoint: {{every: 4, keep_last: 9, average: true}}"""
"""Seven images in steps of eight, so that every step straddles two epochs; three held-out images in 21 draws, three batches of validation."""


COUNTS = {"alone": 1, "side by side": 2, "in shares": 2}
"""Ways of training the same run, and their numbers of processes; the last is FSDP, as accelerate's config asks for it."""


LAUNCHER = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_ACTIVATION_CHECKPOINTING": "false", "ACCELERATE_DYNAMO_BACKEND": "NO",
}  # fmt: skip
"""What `accelerate launch --use_fsdp --fsdp_version 2` puts into the environment, of what anyone here reads."""


def launch_as(way: str, work: Callable[[], None], folder: Path) -> Ended:
    """Do some work in one of these ways."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LAUNCHER.items() if way == "in shares" else ():
            patch.setenv(name, os.environ.get(name, value))
        return launch(COUNTS[way], work, folder)


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Ended]:
    """Trains a config in some processes: train(2, path, "--resume")."""
    return lambda count, path, *options: launch(count, command("train", path, *options), tmp_path / "said")


@pytest.fixture(scope="module")
def write(model: Path, pictures: Path) -> Callable[..., Path]:
    """Writes a config of the settings above into a folder: write(folder, "train: {steps: 3}")."""
    settings = SETTINGS.format(model=model, pictures=pictures)
    return lambda folder, extra="": write_config(
        folder / "run.yaml", model, pictures, folder / "runs", f"{settings}\n{extra}"
    )


@pytest.fixture(scope="module")
def finished(write, tmp_path_factory) -> dict[str, tuple[Path, Ended]]:
    """The run of the settings above, trained to its end in each way: its folder and how the processes ended."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "training", lambda records, title, marks: b"a figure")
        for way, count in COUNTS.items():
            folder = tmp_path_factory.mktemp(way.replace(" ", "-"))
            ended = launch_as(way, command("train", write(folder)), folder / "said")
            assert ended.codes == (0,) * count, ended.err
            found[way] = (folder / "runs" / "tiny", ended)
    return found


def difference(one: Path, other: Path, part: str = "final") -> float:
    """Largest difference of a tensor between two runs, as a share of its norm.

    Not of an attention's key bias: the softmax does not see it, so its gradient is rounding alone, and Adam makes steps of that.
    """
    found = []
    for module, name in WEIGHTS.items():
        ours, theirs = (load_file(run / part / module / name) for run in (one, other))
        assert ours.keys() == theirs.keys()
        found += [
            float((tensor - theirs[key]).norm() / tensor.norm())
            for key, tensor in ours.items()
            if not key.endswith("k_proj.bias")
        ]
    return max(found)


def looks(run: Path) -> list[dict]:
    return [r for r in metrics.read(run / "metrics.jsonl") if r["kind"] == "validation"]


def files(run: Path) -> list[str]:
    """Every file of a run, without the numbers that checkpoints have in their names."""
    return sorted(p.relative_to(run).as_posix().partition("_S")[0] for p in run.rglob("*") if p.is_file())


def said_once(ended: Ended, message: str) -> bool:
    return ended.err.count(message) == 1 and ended.err.count("error:") == 1 and "Traceback" not in ended.err


# The same mathematics --------------------------------------------------------------------------------------------------------------

several = pytest.mark.parametrize("way", ["side by side", "in shares"])


@several
def test_two_processes_train_the_weights_of_one(finished, model, way):
    one, two = finished["alone"][0], finished[way][0]
    assert difference(one, two) < 1e-5
    assert difference(one, two, "best") < 1e-5
    moved = load_file(one / "final" / "unet" / WEIGHTS["unet"])
    base = load_file(model / "unet" / WEIGHTS["unet"])
    assert max(float((moved[key] - base[key]).norm() / base[key].norm()) for key in base if base[key].norm()) > 1e-2


@several
def test_two_processes_log_what_one_logs(finished, way):
    ours, theirs = (metrics.read(finished[n][0] / "metrics.jsonl") for n in ("alone", way))
    assert len(ours) == len(theirs) == 8 + 5
    for one, two in zip(ours, theirs, strict=True):
        assert (one["kind"], one["step"], one.get("lr"), one["exposure"]) == (
            two["kind"], two["step"], two.get("lr"), two["exposure"],
        )  # fmt: skip
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
        assert one.get("grad_norm", 0) == pytest.approx(two.get("grad_norm", 0), rel=1e-5)


@several
def test_the_untouched_model_has_the_same_held_out_loss_to_the_last_bit(finished, way):
    first = [looks(finished[n][0])[0] for n in ("alone", way)]
    assert first[0]["images"] == first[1]["images"]
    assert first[0] == first[1]


@several
def test_two_processes_write_each_file_once_and_whole(finished, way):
    one, two = finished["alone"][0], finished[way][0]
    assert files(one) == files(two)
    assert all(not verify(checkpoint) for checkpoint in available(two / "checkpoints"))
    ours, theirs = ((run / "config.yaml").read_text().split("output_dir")[0] for run in (one, two))
    assert ours == theirs
    for kept in ("final", "checkpoints/step-000008"):
        configs = [json.loads((run / kept / "unet" / "config.json").read_text()) for run in (one, two)]
        assert configs[0] == configs[1]


@several
def test_two_processes_talk_as_one(finished, way):
    (one, alone), (two, together) = finished["alone"], finished[way]
    assert together.out == f"{two / 'final'}\n"
    assert alone.out == f"{one / 'final'}\n"
    for word in ("8 samples a step", "the average of 2 troughs is kept"):
        assert alone.err.lower().count(word) == together.err.lower().count(word) == 1


def test_each_process_measures_its_share_of_the_draws(tmp_path):
    def work() -> None:
        from accelerate import Accelerator

        from sdclr.engine.validation import evaluate, fixed_draws

        processes.join()
        accelerator, asked = Accelerator(), []

        def losses_of(images, timesteps, noise):
            asked.append(len(images))
            return timesteps.float() / 3

        draws = fixed_draws(("a", "b", "c"), 4, [(1, 2, 2)] * 3, 1000, 7)
        found = evaluate([], losses_of, draws, 4, accelerator)
        assert found.tolist() == (draws.timesteps.float() / 3).double().reshape(3, 4).tolist()
        print(asked)

    ended = launch(2, work, tmp_path)
    assert ended.codes == (0, 0), ended.err
    assert sorted(ended.out.split("\n")[:2]) == ["[4, 4]", "[4]"]


@pytest.mark.parametrize(
    ("before", "after"),
    [("alone", "side by side"), ("side by side", "alone"), ("alone", "in shares"), ("in shares", "alone")],
)
def test_a_run_goes_on_with_another_number_of_processes(finished, write, tmp_path, before, after):
    path = write(tmp_path)
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(finished[before][0], run)
    shutil.rmtree(run / "final")
    for checkpoint in available(run / "checkpoints"):
        if checkpoint.step > 4:
            shutil.rmtree(checkpoint.path)
    ended = launch_as(after, command("train", path, "--resume"), tmp_path / "said")
    assert ended.codes == (0,) * COUNTS[after], ended.err
    assert "at step 4" in ended.err
    assert "warning" not in ended.err
    one = finished["alone"][0]
    assert difference(one, run) < 1e-5
    assert [r["loss"] for r in looks(run)] == pytest.approx([r["loss"] for r in looks(one)], rel=1e-6)


def test_half_precision_trains_in_shares_what_it_trains_alone(write, tmp_path):
    """To its own rounding: in shares weights are rounded before normalisations too."""
    settings = "precision: bf16"
    runs = {}
    for way in ("alone", "in shares"):
        (folder := tmp_path / way).mkdir()
        path = write(folder, "train: {steps: 4}")
        path.write_text(
            path.read_text().replace("train: [unet, text_encoder]", f"train: [unet, text_encoder], {settings}")
        )
        ended = launch_as(way, command("train", path), folder / "said")
        assert ended.codes == (0,) * COUNTS[way], ended.err
        runs[way] = folder / "runs" / "tiny"
    one, two = (looks(run) for run in runs.values())
    assert [look["loss"] for look in one] == pytest.approx([look["loss"] for look in two], rel=5e-3)
    tensors = [load_file(run / "final" / "unet" / WEIGHTS["unet"]) for run in runs.values()]
    assert all(tensor.dtype == torch.float32 for tensor in tensors[1].values())
    base = load_file(tmp_path / "alone" / "runs" / "tiny" / "best" / "unet" / WEIGHTS["unet"])
    assert base.keys() == tensors[0].keys() == tensors[1].keys()


def test_bf16_weights_are_trained_together_and_refused_in_shares(write, tmp_path):
    """To the rounding of bf16. Processes that stopped exchanging gradients would soon tell of other norms."""
    norms = {}
    for way in COUNTS:
        (folder := tmp_path / way).mkdir()
        path = write(folder, "train: {steps: 6}")
        path.write_text(path.read_text().replace("train: [unet, text_encoder]", "train: [unet], precision: full_bf16"))
        ended = launch_as(way, command("train", path), folder / "said")
        if way == "in shares":
            assert ended.codes == (2, 2), ended.err
            assert said_once(ended, "full_bf16 cannot be trained in shares (FSDP)")
            continue
        assert ended.codes == (0,) * COUNTS[way], ended.err
        records = metrics.read(folder / "runs" / "tiny" / "metrics.jsonl")
        norms[way] = [record["grad_norm"] for record in records if record["kind"] == "step"]
    assert len(norms["alone"]) == 6
    assert norms["side by side"] == pytest.approx(norms["alone"], rel=0.02)


def test_a_lora_is_trained_together_and_refused_in_shares(write, tmp_path):
    final = {}
    for way in COUNTS:
        (folder := tmp_path / way).mkdir()
        ended = launch_as(way, command("train", write(folder, "lora: {rank: 2}\ntrain: {steps: 6}")), folder / "said")
        if way == "in shares":
            assert ended.codes == (2, 2), ended.err
            assert said_once(ended, "a LoRA cannot be trained in shares (FSDP)")
            continue
        assert ended.codes == (0,) * COUNTS[way], ended.err
        final[way] = load_file(folder / "runs" / "tiny" / "final" / "pytorch_lora_weights.safetensors")
    one, two = final["alone"], final["side by side"]
    assert {key.partition(".")[0] for key in one} == {"unet", "text_encoder"}
    assert all(float((tensor - two[key]).norm()) <= 1e-5 * float(tensor.norm()) for key, tensor in one.items())
    assert min(float(tensor.norm()) for tensor in one.values()) > 0


def test_momentum_goes_on_in_shares(write, tmp_path):
    """SGD's one number a weight comes back as it was, from shares to shares."""
    settings = (
        "optimizer: {name: sgd}\nschedule: {policy: constant, max_lr: 0.1}\ntrain: {steps: 4}\ncheckpoint: {every: 2}"
    )
    runs = {}
    for way in ("alone", "in shares"):
        (folder := tmp_path / way).mkdir()
        ended = launch_as(way, command("train", write(folder, settings)), folder / "said")
        assert ended.codes == (0,) * COUNTS[way], ended.err
        runs[way] = folder / "runs" / "tiny"
    one, two = runs.values()
    assert difference(one, two) < 1e-5
    ours, theirs = (load_file(run / "checkpoints" / "step-000004" / "optimizer.safetensors") for run in (one, two))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-6) for key in ours)
    shutil.rmtree(two / "final")
    shutil.rmtree(two / "checkpoints" / "step-000004")
    ended = launch_as("in shares", command("train", tmp_path / "in shares" / "run.yaml", "--resume"), tmp_path / "said")
    assert ended.codes == (0, 0), ended.err
    assert difference(one, two) < 1e-5


def test_each_process_holds_its_share_of_weights_gradients_and_optimizer(write, tmp_path):
    path = write(tmp_path)

    def work() -> None:
        from sdclr.config import source
        from sdclr.engine.loop import optimizer_steps
        from sdclr.engine.plan import read_inputs
        from sdclr.engine.run import Run

        together = processes.join()
        loaded = source.load(path)
        run = Run(loaded.config, read_inputs(loaded, together.rank, together.count))
        state = run.fresh_state()
        next(optimizer_steps(state, run.batches, run.add_gradients, lambda step: 1e-3, 2, run.accelerator))
        run.loss(run.batches(1)[0]).backward()
        held = [p.to_local().numel() for p in state.parameters]
        assert [p.grad.to_local().numel() for p in state.parameters] == held
        assert [s["exp_avg"].to_local().numel() for s in state.optimizer.state.values()] == held
        print(sum(held) / sum(p.numel() for p in state.parameters))

    ended = launch_as("in shares", work, tmp_path / "said")
    assert ended.codes == (0, 0), ended.err
    shares = [float(line) for line in ended.out.split()]
    assert sum(shares) == pytest.approx(1)
    assert max(shares) < 0.6, "small parameters do not halve evenly"


@several
def test_the_range_test_in_two_processes_measures_what_one_measures(model, pictures, tmp_path, way):
    short = """range_test: {max_steps: 16, arms_per_decade: 2, lr: [1.0e-3, 0.03]}
validation: {fraction: 0.3, timesteps_per_image: 4}"""
    found = {}
    for name in ("alone", way):
        folder = tmp_path / name
        folder.mkdir()
        path = write_config(folder / "run.yaml", model, pictures, folder / "runs", short)
        ended = launch_as(name, command("range-test", path, "--json"), folder / "said")
        assert ended.codes in ((0,) * COUNTS[name], (3,) * COUNTS[name]), ended.err
        kept = folder / "runs" / "tiny" / "range-test"
        result = json.loads((kept / "result.json").read_text())
        assert json.loads(ended.out)["arms"] == result["arms"]
        arms = {p.name: json.loads(p.read_text()) for p in kept.glob("arms/*.json")}
        found[name] = (result, arms)
    (one, ours), (two, theirs) = found["alone"], found[way]
    assert len(ours) > 3
    assert ours.keys() == theirs.keys()
    assert (one["verdict"], one["reasons"], one["fingerprint"]) == (two["verdict"], two["reasons"], two["fingerprint"])
    assert {k: v for k, v in one["cost"].items() if k != "seconds"} == {
        k: v for k, v in two["cost"].items() if k != "seconds"
    }
    for name, arm in ours.items():
        assert (arm["key"], arm["rates"], arm["diverged"]) == (
            theirs[name]["key"], theirs[name]["rates"], theirs[name]["diverged"],
        )  # fmt: skip
        assert torch.tensor(arm["losses"]).flatten().tolist() == pytest.approx(
            torch.tensor(theirs[name]["losses"]).flatten().tolist(), rel=1e-5
        )


# When something goes wrong ---------------------------------------------------------------------------------------------------------


def test_a_batch_that_cannot_be_shared_evenly_is_refused_once_with_its_place(write, train, tmp_path):
    ended = train(2, write(tmp_path, "batch: {size: 3}"))
    assert ended.codes == (2, 2)
    assert said_once(ended, "batch.size is 3, which 2 processes cannot share evenly; take 2 or 4")
    assert "run.yaml:" in ended.err
    assert not (tmp_path / "runs").exists()


def test_a_folder_in_use_is_refused_once(write, train, tmp_path):
    from sdclr.engine.folder import RunFolder

    path = write(tmp_path)
    with RunFolder(tmp_path / "runs" / "tiny").locked("train"):
        ended = train(2, path)
    assert ended.codes == (2, 2)
    assert said_once(ended, "is in use by sdclr train")


def test_a_wrong_command_line_is_refused_once(tmp_path):
    ended = launch(2, command("train", "--resum"), tmp_path)
    assert ended.codes == (2, 2)
    assert said_once(ended, "No such option: --resum")


def test_a_disk_that_refuses_the_last_save_ends_both_with_one_message(write, train, tmp_path, monkeypatch):
    from sdclr.engine import session

    save = session.save

    def refuse_the_last(folder, kind, state, modules, info):
        if state.step == 3:
            raise StorageError("no room for step 3")
        return save(folder, kind, state, modules, info)

    monkeypatch.setattr(session, "save", refuse_the_last)
    ended = train(2, write(tmp_path, "train: {steps: 3}\nschedule: {policy: constant, max_lr: 1e-3}\ncheckpoint: {}"))
    assert ended.codes == (1, 1)
    assert ended.err.count("error: no room for step 3") == 1
    assert ended.err.count("step-000002") == 1
    assert "Traceback" not in ended.err


def in_rank_1_at(step: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the second process alone do something as it begins a step (0-based)."""
    from sdclr.data.batches import Batches

    call = Batches.__call__

    def batches(self, at):
        if self.rank == 1 and at == step:
            act()
        return call(self, at)

    monkeypatch.setattr(Batches, "__call__", batches)


def test_a_bug_in_one_process_shows_one_traceback_and_ends_both(write, train, tmp_path, monkeypatch):
    def fail() -> None:
        raise ZeroDivisionError("in the second process alone")

    in_rank_1_at(2, fail, monkeypatch)
    ended = train(2, write(tmp_path))
    assert all(ended.codes)
    assert ended.err.count("Traceback") == 1
    assert ended.err.count("ZeroDivisionError: in the second process alone") == 1
    assert "error:" not in ended.err


def test_the_death_of_one_process_ends_the_other_with_one_message(write, train, tmp_path, monkeypatch):
    in_rank_1_at(2, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
    ended = train(2, write(tmp_path))
    assert ended.codes == (1, -signal.SIGKILL)
    assert said_once(ended, "another process of this run has ended without a word")


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_is_saved(
    write, train, tmp_path, monkeypatch, finished
):
    path = write(tmp_path)
    with monkeypatch.context() as patch:
        in_rank_1_at(2, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        ended = train(2, path)
    assert ended.codes == (143, 143)
    assert said_once(ended, "stopped after step 2 of 8, which is saved")
    run = tmp_path / "runs" / "tiny"
    assert [c.step for c in available(run / "checkpoints", ("step",))] == [2]
    assert train(1, path, "--resume").codes == (0,)
    assert difference(finished["alone"][0], run) < 1e-5


def test_ctrl_c_at_a_true_launcher_reaches_all_and_saves(write, tmp_path):
    path = write(tmp_path, "train: {steps: 100000}\nvalidation: {fraction: 0.3, every: 100000, timesteps_per_image: 1}")
    log = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    launcher = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0",
         "-m", "sdclr", "train", str(path), "--quiet"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}, cwd=ROOT, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        for _ in range(6000):
            if launcher.poll() is not None or (log.exists() and '"kind": "step"' in log.read_text()):
                break
            time.sleep(0.1)
        launcher.send_signal(signal.SIGINT)
        out, err = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    assert launcher.returncode != 0
    assert out == ""
    assert err.count("which is saved") == 1, err
    (kept,) = available(tmp_path / "runs" / "tiny" / "checkpoints", ("step",))
    assert f"stopped after step {kept.step} of 100000" in err
    assert verify(kept) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample",),
        ("compare",),
        ("check",),
        ("init", "--stdout"),
        ("train", "--dry-run"),
        ("range-test", "--from=x.csv"),
    ],
)
def test_what_one_process_does_is_refused_once_in_several(write, tmp_path, arguments):
    name, *options = arguments
    path = tmp_path if name in ("init", "compare") else write(tmp_path)
    ended = launch(2, command(name, path, *options), tmp_path / "said")
    assert ended.codes == (2, 2)
    assert said_once(ended, "runs in one process, and 2 were started")
    assert ended.out == ""
    assert not (tmp_path / "runs").exists()


def test_processes_that_do_not_find_one_another_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # a device that accelerate cannot share

    def work() -> None:
        with pytest.raises(InputError, match=r"2 processes were started, and accelerate joins 1"):
            processes.join()

    assert launch(2, work, tmp_path).codes == (0, 0)


@pytest.mark.parametrize(
    ("environment", "settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, "", "set up for FSDP 1"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "", "fsdp_offload_params, which sdclr does not do"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "", "fsdp_activation_checkpointing, which sdclr does not do"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "", "accelerate_dynamo_backend, which sdclr does not do"),
        ({}, "optimizer: {name: adafactor}", "adafactor cannot be trained in shares"),
        ({}, "data.aspect=buckets", "pictures of many shapes cannot be trained in shares"),
    ],
)
def test_what_cannot_be_had_in_shares_is_refused_once(write, tmp_path, monkeypatch, environment, settings, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = write(tmp_path, "" if "=" in settings else settings)
    options = ("--set", settings) if "=" in settings else ()
    ended = launch_as("in shares", command("train", path, *options), tmp_path / "said")
    assert ended.codes == (2, 2), ended.err
    assert said_once(ended, message)
    assert not (tmp_path / "runs" / "tiny" / "checkpoints").exists()


def test_sharing_among_one_is_refused(write, tmp_path, monkeypatch):
    from accelerate.utils import DistributedType

    from sdclr.config import source
    from sdclr.engine import run

    monkeypatch.setattr(run.Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(InputError, match="set up for FSDP"):
        run.make_accelerator(source.load(write(tmp_path)).config)


# The parts ------------------------------------------------------------------------------------------------------------------------


def test_the_main_process_works_alone_and_all_hear_its_result_and_its_error(tmp_path):
    def work() -> None:
        group = processes.join()

        def refuse() -> None:
            raise Interrupted("on the main process", signal.SIGTERM, hint="a hint")

        assert group.on_main(os.getpid) == group.on_main(os.getpid)
        print("worked", flush=True) if group.on_main(lambda: group.rank) == group.rank else None
        with pytest.raises(Interrupted, match="on the main process") as heard:
            group.on_main(refuse)
        assert (heard.value.exit_code, heard.value.hint) == (143, "a hint")
        assert group.agree(10 + group.rank) == 11

    ended = launch(2, work, tmp_path)
    assert ended.codes == (0, 0), ended.err
    assert ended.out == "worked\n"


def test_alone_each_method_only_does_the_work():
    alone = Processes()
    assert alone.main
    assert alone.on_main(lambda: 7) == 7
    assert alone.agree(3) == 3
    with processes.telling() as ours:
        assert ours


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, 1), ({"WORLD_SIZE": "3"}, 3), ({"WORLD_SIZE": "1", "PMI_SIZE": "4"}, 4), ({"WORLD_SIZE": ""}, 1)],
)
def test_the_number_of_processes_is_read_from_the_launchers_environment(monkeypatch, given, expected):
    for name in processes.COUNTS:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert processes.count() == expected


def test_a_launcher_that_started_one_process_where_several_were_asked_for_is_warned_of(monkeypatch, capsys):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert processes.join() == Processes()
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err
