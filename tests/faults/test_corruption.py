"""Every byte of a checkpoint counts: whatever is flipped, cut or lost is detected, and the checkpoint before is used."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from inject import Lab, Tally, differences, thinned

KEEP_MORE = ("checkpoint.keep_last=4",)
Damage = tuple[str, Callable[[Path], None]]


@pytest.fixture(scope="module")
def finished(lab: Lab) -> Path:
    """A finished run with all of its four checkpoints, and two bests: that of step 1, and that of 2 which the later ones count on."""
    lab.reset()
    assert lab.train(*KEEP_MORE).kind == "done"
    return lab.keep("finished")


def damages(path: Path, seed: int, flips: int) -> Iterator[Damage]:
    """Every class of damage to one file: each bit, other bytes, cuts, additions, losses."""
    data, draw = path.read_bytes(), random.Random(f"{seed}{path.name}")
    size = len(data)
    places = sorted({0, 1, 7, 8, 9, size // 2, size - 2, size - 1, *(draw.randrange(size) for _ in range(flips))})
    for turn, at in enumerate(places):
        yield f"bit {turn % 8} of byte {at}", _put(at, bytes([data[at] ^ 1 << turn % 8]))
    for at in draw.sample(range(size), min(size, 6)):
        for value in (0, 255, (data[at] + 1) % 256):
            if value != data[at]:
                yield f"byte {at} set to {value}", _put(at, bytes([value]))
    for length in sorted({0, 1, size // 3, size // 2, size - 4096, size - 8, size - 1} & set(range(size))):
        yield f"cut to {length} of {size}", lambda p, n=length: p.write_bytes(data[:n])
    yield "a zero added", lambda p: p.write_bytes(data + b"\0")
    yield "a line break added", lambda p: p.write_bytes(data + b"\n")
    yield "written twice", lambda p: p.write_bytes(data + data)
    yield "all zeros", lambda p: p.write_bytes(bytes(size))
    yield "removed", lambda p: p.unlink()
    yield "a folder instead", lambda p: (p.unlink(), p.mkdir())
    yield "a dangling link instead", lambda p: (p.unlink(), p.symlink_to("nowhere"))
    yield "another run's file", lambda p: p.write_bytes(bytes(reversed(data)))


def _put(at: int, value: bytes) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(value)

    return put


@thinned(12)
def test_every_damage_to_a_checkpoint_is_detected(lab: Lab, finished: Path, share: int) -> None:
    """In each file of the newest checkpoint; the one before is used, and the damaged file is named."""
    from sdclr.engine.checkpoint import newest_sound

    tally = Tally("damage: every file of a checkpoint", share)
    folder = lab.root / "damaged"
    for source in sorted(p for p in (finished / "checkpoints/step-000004").rglob("*") if p.is_file()):
        name = source.relative_to(finished / "checkpoints/step-000004")
        for what, damage in list(damages(source, 1, 500 if source.name == "manifest.json" else 150))[::share]:
            shutil.rmtree(folder, ignore_errors=True)
            for kept in ("step-000003", "step-000004", "best-000002_S1.10e-01"):
                shutil.copytree(finished / "checkpoints" / kept, folder / kept)
            damage(folder / "step-000004" / name)
            found, skipped = newest_sound(folder)
            tally.add(
                f"{name}: {what}",
                "" if found and found.step == 3 else f"took {found}",
                "" if len(skipped) == 1 and name.name in skipped[0] else f"said {skipped}",
                kind=name.name,
            )
    tally.report()


@thinned(40)
def test_a_run_resumed_over_damage_ends_the_same(lab: Lab, finished: Path, share: int) -> None:
    """Damage in the newest checkpoint, in the best that the later ones count on, in the cache, or in a whole folder."""
    reference = _print_of(lab, finished)
    tally = Tally("damage: resumed, bit for bit", share)
    best = next((finished / "checkpoints").glob("best-000002*"))
    cached = sorted((lab.runs / ".cache").rglob("*.safetensors"))[:4]
    trials: list[tuple[Path, Damage]] = []
    for source in sorted(
        p for folder in (finished / "checkpoints/step-000004", best) for p in folder.rglob("*") if p.is_file()
    ):
        trials += [
            (source.relative_to(finished), d)
            for d in random.Random(source.name).sample(list(damages(source, 2, 20)), 8)
        ]
    for source in cached:
        trials += [(Path("..") / source.relative_to(lab.runs), d) for d in list(damages(source, 3, 20))[::6]]
    for path, (what, damage) in trials[::share]:
        lab.reset(finished)
        shutil.rmtree(lab.folder / "final")
        damage(lab.folder / path)
        outcome = lab.train(*KEEP_MORE, resume=True)
        other = differences(lab.print_of(), reference)
        said = "skipped a damaged checkpoint" in outcome.said or ".cache" in path.parts
        tally.add(
            f"{path}: {what}",
            "" if outcome.kind == "done" else f"{outcome.kind}: {outcome.text}",
            "" if said else f"said only {outcome.said!r}",
            f"differs: {other}" if other else "",
            kind=path.parts[1] if path.parts[0] == "checkpoints" else "cache",
        )
    tally.report()


def _print_of(lab: Lab, kept: Path) -> dict[str, str]:
    lab.reset(kept)
    return lab.print_of()


def test_without_its_best_a_run_still_goes_on(lab: Lab, finished: Path) -> None:
    """When no checkpoint is left whose best is whole, the newest is resumed all the same, and that is said."""
    lab.reset(finished)
    for best in (lab.folder / "checkpoints").glob("best-*"):
        (best / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"lost")
    outcome = lab.train(*KEEP_MORE, resume=True)
    assert outcome.kind == "done", outcome
    assert "the best state is looked for anew from step 4 on" in outcome.said


def test_when_nothing_is_whole_nothing_is_overwritten(lab: Lab, finished: Path) -> None:
    lab.reset(finished)
    shutil.rmtree(lab.folder / "final")
    for step in (lab.folder / "checkpoints").glob("step-*"):
        (step / "state.json").unlink()
    before = lab.print_of()
    for outcome in (lab.train(resume=True), lab.train()):
        assert outcome.code == 2, outcome
    assert not differences(lab.print_of(), before)


def test_a_kept_state_without_its_manifest_is_not_drawn(lab: Lab, finished: Path) -> None:
    """A folder that someone else wrote needs no manifest; a checkpoint that has lost it is damaged."""
    from sdclr.commands.sample import _column
    from sdclr.engine.folder import RunFolder
    from sdclr.errors import InputError

    lab.reset(finished)
    best = next((lab.folder / "checkpoints").glob("best-000002*"))
    (best / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"damaged: manifest\.json is missing"):
        _column(best, None, RunFolder(lab.folder))
    assert _column(lab.folder / "final", None, RunFolder(lab.folder)).weights == lab.folder / "final"


@thinned(50)
def test_damaged_metrics_are_said_and_stop_nothing(lab: Lab, finished: Path, share: int) -> None:
    from sdclr.report import metrics

    tally = Tally("damage: metrics.jsonl", share)
    for what, damage in list(damages(finished / "metrics.jsonl", 4, 100))[::share]:
        lab.reset(finished)
        shutil.rmtree(lab.folder / "final")
        if "folder" in what:
            continue
        damage(lab.folder / "metrics.jsonl")
        outcome = lab.train(*KEEP_MORE, resume=True)
        lab.true_curves(metrics.complete(metrics.read(lab.folder / "metrics.jsonl")), "damaged", [2, 4])
        same = metrics.read(lab.folder / "metrics.jsonl") == metrics.read(finished / "metrics.jsonl")
        tally.add(
            what,
            "" if outcome.kind == "done" else f"{outcome.kind}: {outcome.text}",
            "" if same or "missing or altered" in outcome.said else f"said only {outcome.said!r}",
            kind="whole" if same else "said",
        )
    tally.report()


@thinned(12)
def test_a_damaged_arm_or_result_is_measured_again(lab: Lab, tmp_path: Path, share: int) -> None:
    """An arm that is not exactly what was written counts as not run; so does a result, unless only its seal's name is gone."""
    from sdclr.engine.folder import read_json, write_json
    from sdclr.errors import InputError

    tally = Tally("damage: arms and results", share)
    content = {"key": "k" * 40, "lr": 1e-4, "diverged": False, "losses": [[[0.5, 0.25]] * 4] * 20, "rates": [1e-4] * 50}
    whole = tmp_path / "whole.json"
    write_json(whole, content)
    wanted = read_json(whole, sealed=True)
    for what, damage in list(damages(whole, 5, 400))[::share]:
        path = tmp_path / "damaged.json"
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        shutil.copy(whole, path)
        damage(path)
        try:
            problem = "" if read_json(path, sealed=True) == wanted else "was read as something else"
            kind = "harmless"
        except InputError:
            problem, kind = "", "refused"
        tally.add(what, problem, kind=kind)
    tally.report()
