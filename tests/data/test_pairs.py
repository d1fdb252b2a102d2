"""Finding pairs: which caption belongs to which picture, every problem at once by name, and the split."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sdclr.data.pairs import MAX_PIXELS, Pair, find, split
from sdclr.errors import DataError


def picture(path: Path, size: tuple[int, int] = (20, 20), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 128 if mode in ("L", "P") else None).save(path)
    return path


def header_only_png(path: Path, width: int, height: int) -> Path:
    """A PNG that says it is huge and holds no pixels: a decompression bomb's header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
        + chunk(b"IEND", b"")
    )
    return path


def captions(folder: Path, default: str | None = None) -> dict[str, str]:
    return {pair.key: pair.caption for pair in find(folder, default)}


def problems(folder: Path, default: str | None = None) -> list[str]:
    with pytest.raises(DataError) as caught:
        find(folder, default)
    assert caught.value.exit_code == 2
    return [problem.replace(f"{folder.as_posix()}/", "") for problem in caught.value.problems]


def test_a_text_file_beside_a_picture_is_its_caption(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.jpg")
    (tmp_path / "a.txt").write_text("one cat")
    (tmp_path / "b.caption").write_bytes(b"\xef\xbb\xbftwo\r\n  cats \xf0\x9f\x90\x88\n")
    assert captions(tmp_path) == {"a.png": "one cat", "b.jpg": "two cats 🐈"}


def test_without_a_text_file_the_name_is_the_caption(tmp_path: Path) -> None:
    picture(tmp_path / "a_red-car__at night.png")
    assert captions(tmp_path) == {"a_red-car__at night.png": "a red car at night"}


def test_a_default_caption_stands_in_for_missing_files_only(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("own")
    assert captions(tmp_path, "sks dog") == {"a.png": "own", "b.png": "sks dog"}
    assert captions(tmp_path, "") == {"a.png": "own", "b.png": ""}


def test_a_caption_ending_decides_in_any_case_and_other_files_do_not(tmp_path: Path) -> None:
    picture(tmp_path / "a.PNG")
    (tmp_path / "a.TXT").write_text("loud")
    (tmp_path / "readme.md").write_text("not a picture")
    (tmp_path / "notes.txt").write_text("a caption of nothing")
    assert captions(tmp_path) == {"a.PNG": "loud"}


def test_pictures_are_found_in_subfolders_but_not_in_hidden_ones(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "y" / "a.png")
    picture(tmp_path / "a.png")
    picture(tmp_path / ".cache" / "b.png")
    picture(tmp_path / "._c.png")
    (tmp_path / "x" / "y" / "a.txt").write_text("deep")
    assert captions(tmp_path) == {"a.png": "a", "x/y/a.png": "deep"}


def test_pairs_come_in_the_order_of_their_keys(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "B.png", "a/c.png", "a.b.png", "10.png", "9.png"):
        picture(tmp_path / name)
    keys = [pair.key for pair in find(tmp_path)]
    assert keys == sorted(keys)
    assert len(keys) == 7


def test_composed_and_decomposed_names_are_one_name(tmp_path: Path) -> None:
    picture(tmp_path / "cafe\u0301.png")
    (tmp_path / "caf\u00e9.txt").write_text("coffee")
    assert list(captions(tmp_path).values()) == ["coffee"]


def test_an_empty_caption_file_is_a_problem_and_not_a_caption(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(" \n\t\n")
    assert problems(tmp_path) == ["a.txt: is an empty caption; write one, or remove the file to use the picture's name"]


def test_a_caption_that_is_not_utf_8_is_a_problem(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes("cat".encode("utf-16-le"))
    assert problems(tmp_path) == [
        "a.txt: is not UTF-8 text (byte 3); save it as UTF-8",
        "b.txt: holds NUL characters; is it a text file saved as UTF-8?",
    ]


def test_two_pictures_of_one_name_are_a_problem(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "a.jpg")
    assert problems(tmp_path) == [
        "a.jpg, a.png: 2 pictures of one name share one caption file: rename or remove all but one"
    ]


def test_two_captions_of_one_picture_are_a_problem(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.caption").write_text("y")
    assert problems(tmp_path) == ["a.caption, a.txt: two caption files for one picture: remove one"]


def test_every_broken_picture_is_named_at_once(tmp_path: Path) -> None:
    good = picture(tmp_path / "good.png", (400, 300))
    (tmp_path / "cut-header.png").write_bytes(good.read_bytes()[:5])
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "folder.png").mkdir()
    picture(tmp_path / "dot.png", (1, 1))
    picture(tmp_path / "sliver.png", (500, 15))
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "moving2.png", save_all=True, append_images=frames[1:])
    header_only_png(tmp_path / "huge.png", 20_000, 20_000)
    header_only_png(tmp_path / "bomb.png", 2**31 - 1, 2**31 - 1)
    assert problems(tmp_path) == [
        f"bomb.png: is 2147483647×2147483647 pixels, more than {MAX_PIXELS:,}; make it smaller",
        "cut-header.png: cannot be read as a picture (not a picture, or damaged)",
        "dot.png: is only 1×1 pixels; a picture needs at least 16 on its shorter side",
        "empty.png: is empty (0 bytes)",
        f"huge.png: is 20000×20000 pixels, more than {MAX_PIXELS:,}; make it smaller",
        "moving.gif: is animated (3 frames); save the frame you mean as a picture",
        "moving2.png: is animated (3 frames); save the frame you mean as a picture",
        "page.jpg: cannot be read as a picture (not a picture, or damaged)",
        "sliver.png: is only 500×15 pixels; a picture needs at least 16 on its shorter side",
    ]


def test_a_phones_photo_with_a_preview_inside_is_one_picture(tmp_path: Path) -> None:
    photo, preview = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (20, 15), "blue")
    photo.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    with Image.open(tmp_path / "a.jpg") as opened:
        assert opened.format == "MPO"
    assert list(captions(tmp_path)) == ["a.jpg"]


def test_a_document_that_is_no_picture_is_left_alone(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "licence.pdf").write_bytes(b"%PDF-1.4")
    assert list(captions(tmp_path)) == ["a.png"]


def test_pillows_own_limit_is_as_it_was_after_a_search(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    header_only_png(tmp_path / "bomb.png", 2**31 - 1, 2**31 - 1)
    assert len(problems(tmp_path)) == 1
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_picture_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    picture(tmp_path / "a.png")
    monkeypatch.setattr("sdclr.data.pairs.Image.open", forbidden)
    assert problems(tmp_path) == ["a.png: cannot be read as a picture (Permission denied)"]


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_followed(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    picture(folder / "real.png")
    picture(tmp_path / "out.png")
    (folder / "inner.png").symlink_to(folder / "real.png")
    assert list(captions(folder)) == ["inner.png", "real.png"]
    (folder / "outer.png").symlink_to(tmp_path / "out.png")
    (folder / "inner.txt").symlink_to("/etc/hostname")
    assert problems(folder) == [
        "inner.txt: is a link to a file outside the folder; copy the file instead",
        "outer.png: is a link to a file outside the folder; copy the file instead",
    ]


def test_a_kind_of_picture_that_cannot_be_read_is_named_and_other_files_are_left_alone(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "notes.md").write_text("notes")
    assert len(find(tmp_path)) == 1
    (tmp_path / "b.HEIC").write_bytes(b"heic")
    with pytest.raises(DataError, match=r"b\.HEIC.*convert it to PNG or JPEG"):
        find(tmp_path)


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    assert problems(tmp_path) == ["a.png: is a link that leads nowhere"]


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    picture(tmp_path / "real" / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert captions(tmp_path / "link") == {"a.png": "a"}


@pytest.mark.parametrize("name", ["two\nlines.png", "bell\x07.png", "\x1b[31mred.png"])
def test_a_name_with_control_characters_is_a_caption_without_and_prints_in_one_line(tmp_path: Path, name: str) -> None:
    picture(tmp_path / name)
    assert all(c.isprintable() for c in find(tmp_path)[0].caption)
    (tmp_path / name).write_bytes(b"x")
    (found,) = problems(tmp_path)
    assert found.isprintable()
    assert found.startswith(repr(name)[1:-1])


def test_a_name_that_is_not_utf_8_is_refused_by_name(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    picture(path)
    (found,) = problems(tmp_path)
    assert found == "caf\\udce9.png: has a name that is not UTF-8; rename it"


def test_a_folder_without_pictures_or_no_folder_at_all_is_said_so(tmp_path: Path) -> None:
    assert problems(tmp_path)[0].startswith(f"{tmp_path}: holds no pictures (looked for .")
    assert problems(tmp_path / "none") == [
        f"{tmp_path / 'none'}: there is no such image folder".replace(f"{tmp_path / 'none'}/", "")
    ]
    picture(tmp_path / "a.png")
    assert "there is no such image folder" in problems(tmp_path / "a.png")[0]


# The split.


def pairs(*keys: str) -> list[Pair]:
    return [Pair(Path(key), key, "") for key in sorted(keys)]


def numbered(count: int) -> list[Pair]:
    return pairs(*(f"{i:04d}.png" for i in range(count)))


def held(found: list[Pair], fraction: float = 0.2, seed: int = 1, fold: int = 0) -> set[str]:
    return {pair.key for pair in split(found, fraction, seed, fold).validation}


@pytest.mark.parametrize("count", [1, 2, 5, 10, 20, 101])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.2, 0.5, 0.99])
def test_exactly_the_rounded_share_is_held_out_and_every_pair_is_on_one_side(count: int, fraction: float) -> None:
    found = numbered(count)
    both = split(found, fraction, 7)
    assert len(both.validation) == round(fraction * count)
    assert sorted((*both.train, *both.validation), key=lambda p: p.key) == found
    assert [p.key for p in both.train] == sorted(p.key for p in both.train)
    assert [p.key for p in both.validation] == sorted(p.key for p in both.validation)


def test_fraction_zero_trains_on_all() -> None:
    both = split(numbered(5), 0.0, 1)
    assert both.validation == ()
    assert list(both.train) == numbered(5)


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_pairs() -> None:
    found = numbered(40)
    assert held(found) == held(found[::-1])
    assert held(found, seed=1) != held(found, seed=2)


def test_the_split_is_this_one_in_every_version_of_the_program() -> None:
    # The ranks are BLAKE2b of "seed, split, key"; worked out once with Python's hashlib, so that a resumed run finds its split again.
    assert held(numbered(10), 0.3, 42) == {"0000.png", "0001.png", "0008.png"}


@pytest.mark.parametrize("added", [1, 10])
def test_adding_pictures_moves_few_of_the_old_ones(added: int) -> None:
    before, after = held(numbered(100)), held(numbered(100 + added))
    moved = {key for key in before ^ after if int(key[:4]) < 100}
    # At most one old picture leaves for each new one that ranks low, and one enters for each held out more.
    assert len(moved) <= added


def test_changing_a_caption_or_the_folder_moves_nothing() -> None:
    elsewhere = [Pair(Path("/other") / p.key, p.key, "words") for p in numbered(30)]
    assert held(elsewhere) == held(numbered(30))


def test_folds_are_disjoint_and_cover_every_pair() -> None:
    folds = [held(numbered(20), 0.2, 1, fold) for fold in range(5)]
    assert [len(fold) for fold in folds] == [4] * 5
    assert set().union(*folds) == {p.key for p in numbered(20)}


@pytest.mark.parametrize("build", [lambda: numbered(0), lambda: numbered(1)], ids=["none", "one"])
def test_no_or_one_pair_can_be_split(build: Callable[[], list[Pair]]) -> None:
    assert len(split(build(), 0.2, 1).train) == len(build())
