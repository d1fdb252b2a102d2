"""Masks (mask.images), repeats (data.repeats) and orders of tags (data.tag_orders): what they change of a step, and that they change nothing else."""

from __future__ import annotations

import json
import shlex
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import again
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SIDE, built, write_config

from sdclr.commands.draw import draw
from sdclr.commands.range_test import range_test
from sdclr.commands.train import train
from sdclr.config import source
from sdclr.data import dataset
from sdclr.data.captions import tag_orders
from sdclr.data.pairs import Pair
from sdclr.engine import encoding, masking, memory
from sdclr.engine.plan import make_plan, read_inputs
from sdclr.engine.run import Run
from sdclr.engine.telling import describe
from sdclr.errors import CheckpointError, ConfigError, DataError, Inconclusive, InputError

pytestmark = pytest.mark.usefixtures("no_figure")
CELL = 4
"""Pixels of a picture in one cell of its latents, each way."""


@pytest.fixture
def subject(tmp_path: Path, pictures: Path) -> Path:
    """The ten pictures, four of them in a subfolder, their captions as tags."""
    folder = tmp_path / "subject"
    shutil.copytree(pictures, folder)
    (folder / "near").mkdir()
    for path in sorted(folder.glob("*.png"))[:4]:
        for file in (path, path.with_suffix(".txt")):
            file.rename(folder / "near" / file.name)
    for number, file in enumerate(sorted(folder.rglob("*.txt"))):
        file.write_text(f"d{number}, a, b, c")
    return folder


@pytest.fixture
def masks(tmp_path: Path, subject: Path) -> Path:
    """A mask for each: of picture n the n + 1 leftmost columns of its latents' cells count (eight at most)."""
    folder = tmp_path / "masks"
    for number, path in enumerate(sorted(subject.rglob("*.png"))):
        (place := folder / path.relative_to(subject)).parent.mkdir(parents=True, exist_ok=True)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[:, : CELL * (number + 1)] = 255
        Image.fromarray(mask).save(place)
    return folder


@pytest.fixture
def write(tmp_path: Path, model: Path, subject: Path) -> Callable[..., Path]:
    """Writes a config on these pictures: write("mask: {images: alpha}", folder="other", data="flip: true")."""

    def write(extra: str = "", folder: str = ".", data: str = "flip: true", base: Path = model) -> Path:
        (place := tmp_path / folder).mkdir(exist_ok=True)
        settings = f"data: {{images: '{subject}', resolution: {SIDE}, {data}}}\n{extra}"
        return write_config(place / "run.yaml", base, subject, place / "runs", settings)

    return write


def number_of(run: Run, index: int) -> int:
    """Which of the ten pictures a training picture is."""
    everyone = sorted([*run.inputs.split.train, *run.inputs.split.validation], key=lambda pair: pair.key)
    return everyone.index(run.inputs.split.train[index])


# Masks ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [0, 0.25])
def test_the_loss_is_the_mean_over_the_cells_that_count_and_over_the_pictures(write, masks, outside):
    run = built(write(f"mask: {{images: '{masks}', outside: {outside}}}"))
    run.fresh_state()
    for step in range(3):
        (batch,), (planned,) = run.batches(step), run.inputs.batches(step)
        noisy = run.parts.noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        predicted = run.modules["unet"](noisy, batch.timesteps, batch.told["encoder_hidden_states"]).sample
        expected = []
        for row, sample in enumerate(planned):
            columns = [float(column <= number_of(run, sample.index)) for column in range(8)]
            if run.config.data.flip and sample.view == 1:
                columns.reverse()
            counts = [outside + (1 - outside) * column for column in columns]
            squares = (predicted[row] - batch.noise[row]).square().mean(dim=(0, 1))
            expected.append(sum(w * s for w, s in zip(counts, squares, strict=True)) / sum(counts))
        loss = run.loss(batch)
        assert loss.item() == pytest.approx((sum(expected) / len(expected)).item(), rel=1e-5)
        parameters = list(run.modules["unet"].parameters())
        ours, theirs = (torch.autograd.grad(each, parameters) for each in (loss, sum(expected) / len(expected)))
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(ours, theirs, strict=True))


def test_the_held_out_loss_is_over_what_counts(write, masks):
    run = built(write(f"mask: {{images: '{masks}'}}"))
    held, unet = run.held_out, run.modules["unet"]
    draws = run.draws(held)
    found = run.losses(held, draws)
    everyone = sorted([*run.inputs.split.train, *run.inputs.split.validation], key=lambda pair: pair.key)
    with torch.inference_mode():
        for draw in range(len(draws)):
            image, t, noise = draws.image_of(draw), draws.timesteps[draw : draw + 1], draws.noise[draw][None]
            noisy = run.parts.noise_scheduler.add_noise(held.mean[image], noise, t)
            context = held.captions["encoder_hidden_states"][image : image + 1]
            squares = (unet(noisy, t, context).sample - noise).square()
            seen = squares[..., : everyone.index(held.pairs[image]) + 1]
            assert found.flat[draw] == pytest.approx(seen.mean().item(), rel=1e-5)


def test_white_masks_change_nothing_but_the_last_bit(write, masks):
    for file in masks.rglob("*.png"):
        Image.new("L", (SIDE, SIDE), 255).save(file)
    path = write(f"mask: {{images: '{masks}'}}")
    masked, plain = built(path), built(path, "mask.images=null")
    for run in (masked, plain):
        run.fresh_state()
    assert masked.loss(masked.batches(0)[0]).item() == pytest.approx(plain.loss(plain.batches(0)[0]).item(), rel=1e-6)
    losses = [run.losses(run.held_out, run.draws(run.held_out)) for run in (masked, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_transparency_is_the_mask_and_pictures_without_any_count_whole(write, subject):
    seen = sorted(subject.rglob("*.png"))
    for path in seen[:6]:
        picture = Image.open(path).convert("RGBA")
        picture.putalpha(Image.fromarray(np.pad(np.full((SIDE, SIDE // 2), 255, np.uint8), ((0, 0), (0, SIDE // 2)))))
        picture.save(path)
    loaded = source.load(write("mask: {images: alpha}"))
    inputs = read_inputs(loaded)
    run = Run(loaded.config, inputs)
    for pair, mask in zip(run.train.pairs, run.train.masks, strict=True):
        halves = mask[0, 0, :, :4].mean().item(), mask[0, 0, :, 4:].mean().item()
        assert halves == ((1, 0) if pair.path in seen[:6] else (1, 1)), pair.key
        assert torch.equal(mask[1], mask[0].flip(-1))
    rows = dict(describe(loaded.config, inputs, make_plan(loaded, inputs)))
    assert rows["masks"] == "6 of 10 pictures count by their transparency; the rest of each weighs 0"


def test_a_mask_is_cut_turned_and_mirrored_as_its_picture(tmp_path):
    """A picture that is its own mask, in colours that survive: what is seen of both is the same, pixel by pixel."""
    noise = np.random.default_rng(1).integers(0, 2, (9, 15), dtype=np.uint8) * 255
    large = np.kron(noise, np.ones((8, 8), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.fromarray(large).save(tmp_path / "picture.png", exif=exif)
    shutil.copy(tmp_path / "picture.png", tmp_path / "mask.png")
    pair = Pair(tmp_path / "picture.png", "picture.png", "", mask=tmp_path / "mask.png")
    for aspect in ("square", "buckets"):
        for view in dataset.views("random", 3, flip=True):
            pixels = dataset.look(pair, 64, view, seed=3, aspect=aspect).pixels
            mask = dataset.look_at_mask(pair, large.shape, 64, view, seed=3, aspect=aspect)
            assert mask.shape == pixels.shape[1:]
            assert np.corrcoef(mask.ravel(), pixels[0].ravel())[0, 1] > 0.99


def test_a_mask_that_changed_is_read_again_and_no_picture_is_encoded_for_it(write, masks, monkeypatch):
    encoded, read = [], []
    encode, look = encoding.Encoder._encode_together, masking.look_at_mask
    monkeypatch.setattr(encoding.Encoder, "_encode_together", lambda self, some: encoded.extend(some) or encode(self, some))  # fmt: skip
    monkeypatch.setattr(masking, "look_at_mask", lambda pair, *more: read.append(pair.key) or look(pair, *more))
    path = write(f"mask: {{images: '{masks}'}}", data="flip: false")
    built(path, "mask.images=null")
    assert (len(encoded), len(read)) == (10, 0)
    built(path)
    built(path, "mask.outside=0.5")
    assert (len(encoded), len(read)) == (10, len({path.read_bytes() for path in masks.rglob("*.png")}))
    first = sorted(masks.rglob("*.png"))[0]
    read.clear()
    Image.new("L", (SIDE, SIDE), 200).save(first)
    built(path)
    assert len(encoded) == 10
    assert read == [first.relative_to(masks).as_posix()]


def test_a_range_test_measures_what_counts_and_answers_for_no_other_masks(write, masks):
    path = write(f"mask: {{images: '{masks}', outside: 0.5}}\nrange_test: {{max_steps: 12, lr: [1e-5, 1e-2]}}")
    with pytest.raises(Inconclusive):
        range_test(path)
    result = json.loads((path.parent / "runs" / "tiny" / "range-test" / "result.json").read_text())
    assert result["fingerprint"]["mask"]["outside"] == 0.5
    for overrides, words in (
        ([], r"the range test was inconclusive"),
        (["mask.outside=0.25"], r"differs in mask\.outside \(0\.5 there, 0\.25 here\)"),
        (["mask.images=null", "mask.outside=0"], r"differs in masks \(some there, none here\)"),
        (["data.tag_orders=3"], r"differs in tag_orders \(none there, 3 here\)"),
        (["data.repeats={near: 2}"], r"differs in repeats \(none there, near: 2 here\)"),
    ):
        with pytest.raises(InputError, match=words):
            train(path, ["schedule.max_lr=auto", *overrides])
    Image.new("L", (SIDE, SIDE), 128).save(sorted(masks.rglob("*.png"))[0])
    with pytest.raises(InputError, match=r"differs in the pictures' masks$"):
        train(path, ["schedule.max_lr=auto"])


def test_a_resumed_run_must_have_them_as_they_were(write, masks):
    path = write(f"mask: {{images: '{masks}'}}")
    train(path, ["checkpoint.every=3"])
    run = path.parent / "runs" / "tiny"
    (run / "final").rename(run / "gone")
    with pytest.raises(CheckpointError, match=r"mask\.outside is 0\.5 in the config.* with 0"):
        train(path, ["checkpoint.every=3", "mask.outside=0.5"], resume=True)
    Image.new("L", (SIDE, SIDE), 128).save(sorted(masks.rglob("*.png"))[0])
    with pytest.raises(CheckpointError, match=r"masks: the pictures' masks are not those"):
        train(path, ["checkpoint.every=3"], resume=True)


def test_what_is_wrong_with_masks_is_named(write, masks, subject):
    path = write(f"mask: {{images: '{masks}'}}")
    first, second = sorted(masks.rglob("*.png"))[:2]
    first.unlink()
    Image.new("L", (SIDE, SIDE // 2), 255).save(second)
    with pytest.raises(DataError) as caught:
        read_inputs(source.load(path))
    named = [subject / first.relative_to(masks), second]
    assert len(caught.value.problems) == 2
    assert f"{named[0]}: has no mask in {masks} (looked for near/{first.stem}.*)" in caught.value.problems
    assert f"{named[1]}: is {SIDE}×{SIDE // 2} pixels, and its picture" in caught.value.problems[1]
    second.write_bytes(second.read_bytes()[:40])
    with pytest.raises(DataError, match=rf"{second}: cannot be read"):
        read_inputs(source.load(path))
    second.with_suffix(".txt").write_text("")  # no mask has a caption
    Image.new("L", (SIDE, SIDE), 255).save(second)
    shutil.copy(second, second.with_suffix(".webp"))
    with pytest.raises(DataError, match=r"2 masks of one picture: keep one"):
        read_inputs(source.load(path))
    second.with_suffix(".webp").unlink()
    second.unlink()
    Image.fromarray(np.full((SIDE, SIDE, 4), 255, np.uint8)).save(second)
    with pytest.raises(DataError, match=rf"{second}: has transparency, and its brightness is read"):
        read_inputs(source.load(path))


def test_a_mask_whose_pixels_are_damaged_or_dark_is_named_and_not_its_picture(write, masks):
    dark, broken = sorted(masks.rglob("*.png"))[:2]
    Image.new("L", (SIDE, SIDE), 1).save(dark)
    noise = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE), dtype=np.uint8)
    Image.fromarray(noise).save(broken)
    broken.write_bytes(broken.read_bytes()[:-300])
    with pytest.raises(DataError) as caught:
        built(write(f"mask: {{images: '{masks}'}}"))
    assert sorted(line.partition(": can be no mask: ")[0] for line in caught.value.problems) == [str(dark), str(broken)]
    assert (
        f"{dark}: can be no mask: its brightest pixel is 1 of 255, and white (opaque) is what counts"
        in caught.value.problems
    )


def test_masks_that_mask_nothing_are_said_to(write, subject, capsys):
    for path in subject.rglob("*.png"):
        Image.open(path).convert("RGBA").save(path)
    built(write("mask: {images: alpha}"))
    assert "mask.images masks nothing of these" in capsys.readouterr().err


def test_a_picture_of_whose_part_nothing_counts_is_refused_unless_its_outside_does(write, subject, masks):
    path = write(f"mask: {{images: '{masks}'}}", data="crop: center")
    wide = sorted(masks.rglob("*.png"))[3]
    Image.new("RGB", (4 * SIDE, SIDE), "red").save(subject / wide.relative_to(masks))
    mask = Image.new("L", (4 * SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE, SIDE))
    mask.save(wide)
    with pytest.raises(DataError, match=rf"{wide.stem}\.png: nothing counts of the part of it that is seen, by its mask {wide}$"):  # fmt: skip
        built(path)
    built(path, "mask.outside=0.1")
    built(path, "data.aspect=buckets")


def test_a_mask_that_is_upright_only_once_decoded_is_refused(write, subject, masks, monkeypatch):
    turned = sorted(masks.rglob("*.png"))[0]
    upright = dataset.upright
    monkeypatch.setattr(dataset, "upright", lambda path: upright(path).resize((SIDE, 2 * SIDE)) if path == turned else upright(path))  # fmt: skip
    with pytest.raises(DataError, match=rf"{turned}: can be no mask: it is {SIDE}×{2 * SIDE} pixels, and its picture"):
        built(write(f"mask: {{images: '{masks}'}}"))


@pytest.mark.parametrize(
    ("overrides", "kind", "words"),
    [
        (["mask.images=alpha"], DataError, "none of them has an alpha channel"),
        (["mask.images=nowhere"], DataError, "nowhere: there is no such folder (mask.images)"),
        (["mask.images=''"], ConfigError, "mask.images must name a folder; got an empty name"),
        ([f"mask.images={__file__}"], DataError, "test_masks.py: is a file (mask.images)"),
        (["mask.images=alpha", "mask.outside=1e-4"], ConfigError, "must be 0, or 0.001 to 1; got 0.0001"),
        (["mask.outside=0.5"], ConfigError, "mask.outside has no effect: mask.images is null"),
        (["mask.images=alpha", "mask.outside=1"], ConfigError, "mask.outside"),
        (["data.keep_tags=1"], ConfigError, "data.keep_tags has no effect with tag_orders: 1"),
        (["data.tag_orders=2", "data.keep_tags=3"], ConfigError, "no caption has two tags beyond the 3 that are kept"),
        (["data.repeats={far: 2}"], ConfigError, "names far, and no picture of"),
        (["data.repeats={../near: 2}"], ConfigError, "must name subfolders of data.images"),
        (["data.repeats={near: 2, near/: 3}"], ConfigError, "data.repeats names near twice"),
        (
            ["data.repeats={near: true}"],
            ConfigError,
            "data.repeats must be whole numbers from 1 to 1000; got {'near': True}",
        ),
        (["data.repeats=3"], ConfigError, "data.repeats must be subfolders and numbers, such as {portraits: 3}; got 3"),
        (["data.repeats={near: 2.5, far: 1001}"], ConfigError, "got {'near': 2.5, 'far': 1001}"),
        (["data.repeats={near: 0}"], ConfigError, "got {'near': 0}"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_what_says_nothing_is_refused(write, overrides, kind, words):
    with pytest.raises(kind) as caught:
        read_inputs(source.load(write(), overrides))
    assert words in str(caught.value)


def test_neither_prior_pictures_nor_drawn_ones_lie_among_masks(write, masks):
    path = write(f"mask: {{images: '{masks}'}}")
    with pytest.raises(ConfigError, match=r"mask\.images and prior\.images .*lie in one another"):
        read_inputs(source.load(path, [f"prior.images={masks.parent}"]))
    with pytest.raises(InputError, match=r"lies in mask\.images .* and would be taken for masks"):
        draw(path, ["a disc"], masks / "drawn", 1)


@pytest.mark.parametrize("inner", [True, False])
def test_masks_among_the_pictures_are_refused(write, subject, masks, inner):
    place = subject / "masks" if inner else subject
    if inner:
        shutil.move(masks, place)
    with pytest.raises(ConfigError, match=r"mask\.images and data\.images .*lie in one another"):
        read_inputs(source.load(write(f"mask: {{images: '{place}'}}")))


# Repeats and orders ---------------------------------------------------------------------------------------------------------


def test_an_epoch_takes_pictures_as_often_as_their_deepest_folder_says(write, subject):
    (subject / "near" / "er").mkdir()
    moved = sorted((subject / "near").glob("*.png"))[0]
    for file in (moved, moved.with_suffix(".txt")):
        file.rename(subject / "near" / "er" / file.name)
    loaded = source.load(write("validation: {fraction: 0}", data="repeats: {near: 3, near/er: 5}"))
    inputs = read_inputs(loaded)
    assert inputs.batches.samples_per_epoch == 6 + 3 * 3 + 5
    assert inputs.steps_per_epoch == 10
    drawn = Counter(
        inputs.split.train[s.index].key for step in range(20) for micro in inputs.batches(step) for s in micro
    )
    assert drawn == {
        pair.key: 2 * (5 if pair.key.startswith("near/er/") else 3 if pair.key.startswith("near/") else 1)
        for pair in inputs.split.train
    }
    rows = dict(describe(loaded.config, inputs, make_plan(loaded, inputs)))
    assert rows["repeats"] == "near 3 times, near/er 5 times: an epoch takes 20 samples of 10 pictures"


def test_names_with_accents_are_the_same_however_the_disk_writes_them(write, subject, masks):
    for folder in (subject, masks):
        (folder / "near").rename(folder / unicodedata.normalize("NFD" if folder is subject else "NFC", "près"))
    loaded = source.load(write(f"mask: {{images: '{masks}'}}", data=f"repeats: {{{unicodedata.normalize('NFC', 'près')}: 2}}"))  # fmt: skip
    inputs = read_inputs(loaded)
    assert Counter(inputs.batches.times) == Counter(2 if "/" in pair.key else 1 for pair in inputs.split.train)
    assert 2 in inputs.batches.times


def test_repeats_leave_the_split_and_the_held_out_draws_alone(write):
    path = write()
    plain, repeated = (read_inputs(source.load(path, some)) for some in ([], ["data.repeats={near: 4}"]))
    assert repeated.split == plain.split
    losses = [run.losses(run.held_out, run.draws(run.held_out)) for run in (built(path), built(path, "data.repeats={near: 4}"))]  # fmt: skip
    assert losses[0].tolist() == losses[1].tolist()


def test_what_a_changed_run_is_told_to_put_back_is_taken(write):
    path = write(data="repeats: {near: 2}")
    train(path, ["checkpoint.every=3"])
    run = path.parent / "runs" / "tiny"
    (run / "final").rename(run / "gone")
    with pytest.raises(CheckpointError, match=r"data\.repeats is \{\} in the config") as caught:
        train(path, ["checkpoint.every=3", "data.repeats={}"], resume=True)
    back = shlex.split(caught.value.hint.splitlines()[0].partition(": ")[2])
    train(path, ["checkpoint.every=3", *back[1::2]], resume=True)


@pytest.mark.parametrize("trained", ["[unet]", "[unet, text_encoder]"])
def test_a_sample_is_told_its_caption_in_one_of_its_orders(write, trained):
    run = built(write(data="flip: false, caption_dropout: 0"), f"model.train={trained}", "data.tag_orders=3", "data.keep_tags=1")  # fmt: skip
    said: Counter[str] = Counter()
    for step in range(12):
        (batch,), (planned,) = run.batches(step), run.inputs.batches(step)
        for row, sample in enumerate(planned):
            orders = tag_orders(run.inputs.split.train[sample.index], 3, 1, run.config.run.seed)
            assert len(set(orders)) == 3
            assert orders[0] == run.inputs.split.train[sample.index].caption
            assert all(order.startswith(orders[0][:2]) and sorted(order) == sorted(orders[0]) for order in orders)
            expected = run._encoder._captions([orders[sample.order % 3]])
            for name, told in batch.told.items():
                assert torch.allclose(told[row], expected[name][0], atol=1e-6)
            said[orders[sample.order % 3]] += 1
    assert len(said) > 8


def test_no_order_comes_twice_and_few_tags_have_few(tmp_path):
    pair = Pair(tmp_path / "a.png", "a.png", "cat,  grey , old,,small")
    every = tag_orders(pair, 64, 1, seed=2)
    assert every[0] == pair.caption
    assert len(every) == len(set(every)) == 6
    assert every[1:] == tag_orders(pair, 64, 1, seed=2)[1:]
    assert all(order.startswith("cat, ") and sorted(order.split(", ")) == ["cat", "grey", "old", "small"] for order in every[1:])  # fmt: skip
    assert tag_orders(pair, 3, 1, seed=2) == every[:3]
    assert tag_orders(pair, 64, 3, seed=2) == tag_orders(pair, 1, 0, seed=2) == [pair.caption]


def test_held_out_captions_are_as_they_are_written(write):
    path = write()
    shuffled, plain = built(path, "data.tag_orders=4"), built(path)
    losses = [run.losses(run.held_out, run.draws(run.held_out)) for run in (shuffled, plain)]
    assert losses[0].tolist() == losses[1].tolist()


# All of them ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def write_all(write, masks) -> Callable[[str], Path]:
    """Writes a config with masks, repeats and orders of tags."""
    data = "repeats: {near: 2}, tag_orders: 3, keep_tags: 1, caption_dropout: 0.2"
    mask = f"mask: {{images: '{masks}', outside: 0.1}}\nbatch: {{size: 4, accumulate: 2}}"
    return lambda folder: write(mask, folder=folder, data=data)


def test_a_resumed_run_has_the_same_bits(write_all):
    again.resumes_to_the_same_bits(write_all("."))


def test_two_processes_come_to_the_same_weights(write_all, tmp_path):
    again.two_processes_come_to_the_same_weights(write_all, tmp_path)


def test_their_memory_is_counted(write_all):
    run = built(write_all("."))
    held = [each for each in (run.train, run.held_out, run.stabilised) if each]
    tensors = [t for e in held for t in (*e.mean, *e.std, *e.masks, e.captions["encoder_hidden_states"])]
    split = run.inputs.split
    counted = memory.count(run.config, len(split.train), len(split.validation), torch.device("cpu"), only=2)
    assert counted.parts["data"] == sum(tensor.nbytes for tensor in tensors)


def test_of_prior_pictures_all_counts(write, masks, pictures):
    run = built(write(f"mask: {{images: '{masks}'}}\nprior: {{images: '{pictures}'}}\nvalidation: {{fraction: 0}}"))
    subject, prior = run.batches(0)
    assert (prior.weights[0] == 1).all()
    assert (subject.weights[0] == 0).any()


def test_sdxl_takes_them_too(write, masks, xl):
    run = built(write(f"mask: {{images: '{masks}'}}", base=xl), "data.tag_orders=2", "data.repeats={near: 2}")
    run.fresh_state()
    (batch,) = run.batches(0)
    assert set(batch.told) == {"encoder_hidden_states", "text_embeds", "time_ids"}
    assert batch.weights[0].shape == (len(batch.latents), 1, 8, 8)
    assert torch.isfinite(run.loss(batch))
