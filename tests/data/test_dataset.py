"""From file to pixels: every mode of picture, its orientation, and which square of it is seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from sdclr.data.dataset import Shape, View, look, shape_for, shapes, to_rgb, views
from sdclr.data.pairs import Pair, find


def pair(path: Path) -> Pair:
    return Pair(path, path.name, "")


def as_bytes(array: np.ndarray) -> np.ndarray:
    """−1 … 1, (3, height, width) back to 0 … 255, (height, width, 3)."""
    return np.rint((array.transpose(1, 2, 0) + 1) * 127.5).astype(int)


def seen(
    image: Image.Image, path: Path, resolution: int, view: View | None = None, seed: int = 0, **options: object
) -> np.ndarray:
    image.save(path, **options)
    return as_bytes(look(pair(path), resolution, view or View(), seed).pixels)


def blocks(*rows: list[tuple[int, int, int]], side: int = 16) -> Image.Image:
    """A picture of blocks of one colour each."""
    small = Image.fromarray(np.array(rows, dtype=np.uint8))
    return small.resize((small.width * side, small.height * side), Image.Resampling.NEAREST)


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def test_pixels_are_float32_channels_first_from_minus_one_to_one(tmp_path: Path) -> None:
    blocks([RED, WHITE], [(0, 0, 0), BLUE]).save(tmp_path / "a.png")
    found = look(pair(tmp_path / "a.png"), 32, View()).pixels
    assert found.dtype == np.float32
    assert found.shape == (3, 32, 32)
    assert found.flags["C_CONTIGUOUS"]
    assert found[:, 0, 0].tolist() == [1, -1, -1]
    assert found[:, 0, 31].tolist() == [1, 1, 1]
    assert found[:, 31, 0].tolist() == [-1, -1, -1]


def test_a_square_picture_at_its_own_size_is_left_as_it_is(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(seen(Image.fromarray(noise), tmp_path / "a.png", 32), noise)


def test_a_wide_picture_keeps_its_middle_and_a_tall_one_too(tmp_path: Path) -> None:
    wide = blocks([RED, RED, GREEN, GREEN, BLUE, BLUE], [RED, RED, GREEN, GREEN, BLUE, BLUE])
    assert np.array_equal(seen(wide, tmp_path / "a.png", 32), np.full((32, 32, 3), GREEN))
    assert np.array_equal(
        seen(wide.transpose(Image.Transpose.ROTATE_90), tmp_path / "b.png", 32), np.full((32, 32, 3), GREEN)
    )


@pytest.mark.parametrize(
    ("size", "resolution"),
    [((64, 64), 32), ((48, 48), 96), ((1000, 33), 32), ((33, 1000), 64), ((333, 777), 64), ((17, 16), 512)],
)
def test_any_size_becomes_exactly_the_square_asked_for(tmp_path: Path, size: tuple[int, int], resolution: int) -> None:
    assert seen(Image.new("RGB", size, "red"), tmp_path / "a.png", resolution).shape == (resolution, resolution, 3)
    assert look(pair(tmp_path / "a.png"), resolution, View(3)).pixels.shape == (3, resolution, resolution)


def test_a_picture_twice_as_large_is_what_pillows_lanczos_makes_of_it(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert np.array_equal(
        seen(noise, tmp_path / "a.png", 32), np.asarray(noise.resize((32, 32), Image.Resampling.LANCZOS))
    )


def test_a_flipped_view_is_the_mirror_of_the_plain_one(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8))
    for crop in (0, 1, 2):
        plain, flipped = (seen(image, tmp_path / "a.png", 32, View(crop, mirrored)) for mirrored in (False, True))
        assert np.array_equal(flipped, plain[:, ::-1])
        assert not np.array_equal(flipped, plain)


def test_random_squares_differ_by_number_seed_and_picture_and_by_nothing_else(tmp_path: Path) -> None:
    gradient = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (32, 1, 3)))
    first = [seen(gradient, tmp_path / "a.png", 32, View(crop), seed=1)[0, 0, 0] for crop in range(1, 9)]
    again = [seen(gradient, tmp_path / "a.png", 32, View(crop), seed=1)[0, 0, 0] for crop in range(1, 9)]
    seed = [seen(gradient, tmp_path / "a.png", 32, View(crop), seed=2)[0, 0, 0] for crop in range(1, 9)]
    other = [seen(gradient, tmp_path / "b.png", 32, View(crop), seed=1)[0, 0, 0] for crop in range(1, 9)]
    assert first == again
    assert len({tuple(first), tuple(seed), tuple(other)}) == 3
    assert len(set(first)) > 4
    assert all(0 <= left <= 256 - 32 for left in first)


# Where the corner colours must come from, for each EXIF orientation: what is stored top left, top right, bottom left, bottom right
# is shown at these places of (top left, top right, bottom left, bottom right). From the EXIF 2.3 standard's table of row 0 and column 0.
CORNERS = {
    1: (0, 1, 2, 3), 2: (1, 0, 3, 2), 3: (3, 2, 1, 0), 4: (2, 3, 0, 1),
    5: (0, 2, 1, 3), 6: (2, 0, 3, 1), 7: (3, 1, 2, 0), 8: (1, 3, 0, 2),
}  # fmt: skip


@pytest.mark.parametrize("orientation", CORNERS)
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff"])
def test_the_exif_orientation_is_applied(tmp_path: Path, orientation: int, ending: str) -> None:
    colours = [RED, GREEN, BLUE, WHITE]
    image = blocks(colours[:2], colours[2:])
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {"quality": 100} if ending in ("jpg", "webp") else {}
    found = seen(image, tmp_path / f"a.{ending}", 32, exif=exif, **quality)
    corners = [found[4, 4], found[4, 27], found[27, 4], found[27, 27]]
    expected = [colours[place] for place in CORNERS[orientation]]
    assert np.abs(np.array(corners) - np.array(expected)).max() < 12
    with Image.open(tmp_path / f"a.{ending}") as opened:
        assert np.array_equal(found, np.asarray(ImageOps.exif_transpose(opened).convert("RGB")))


def test_grayscale_has_three_equal_channels(tmp_path: Path) -> None:
    ramp = np.arange(0, 256, 8, dtype=np.uint8)
    found = seen(Image.fromarray(np.tile(ramp, (32, 1))), tmp_path / "a.png", 32)
    assert np.array_equal(found, np.tile(ramp[None, :, None], (32, 1, 3)))


def test_cmyk_is_seen_in_its_colours(tmp_path: Path) -> None:
    image = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    assert np.abs(seen(image, tmp_path / "a.jpg", 32, quality=100) - np.array(RED)).max() <= 3


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bits_of_gray_are_scaled_to_eight(tmp_path: Path, ending: str) -> None:
    values = np.array([0, 128, 257, 32768, 65535], dtype=np.uint16)
    image = Image.fromarray(np.tile(np.repeat(values, 8), (40, 1)).astype(np.uint16))
    found = seen(image, tmp_path / f"a.{ending}", 40)
    assert found[3, 4::8, 0].tolist() == [0, 0, 1, 128, 255]


def test_floats_are_read_as_zero_to_one_or_as_zero_to_255(tmp_path: Path) -> None:
    small = Image.fromarray(np.full((32, 32), 0.5, dtype=np.float32))
    large = Image.fromarray(np.full((32, 32), 127.5, dtype=np.float32))
    assert seen(small, tmp_path / "a.tiff", 32)[0, 0].tolist() == [128] * 3
    assert seen(large, tmp_path / "b.tiff", 32)[0, 0].tolist() == [128] * 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (32, 32), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        found = seen(image, tmp_path / "a.png", 32, transparency=0)
        assert np.array_equal(found, np.full((32, 32, 3), 255))
        return
    clear = (0, 0, 0, 0) if mode == "RGBA" else (0, 0)
    half = (0, 0, 0, 128) if mode == "RGBA" else (0, 128)
    image = Image.new(mode, (32, 32), clear)
    image.paste(half, (16, 0, 32, 32))
    found = seen(image, tmp_path / "a.png", 32)
    assert found[0, 0].tolist() == [255] * 3
    assert np.abs(found[0, 31] - 127).max() <= 1


def test_an_opaque_palette_and_a_bitmap_keep_their_colours(tmp_path: Path) -> None:
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert seen(palette, tmp_path / "a.png", 32)[0, 0].tolist() == list(RED)
    assert seen(Image.new("1", (32, 32), 1), tmp_path / "b.png", 32)[0, 0].tolist() == list(WHITE)


def test_to_rgb_leaves_rgb_as_it_is() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(to_rgb(noise)), np.asarray(noise))


def test_a_file_cut_in_the_middle_is_an_os_error(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-2000])
    with pytest.raises(OSError, match="truncated"):
        look(pair(tmp_path / "a.jpg"), 32, View())


@pytest.mark.parametrize(
    ("crop", "crops", "flip", "names"),
    [
        ("center", 1, False, ["0"]),
        ("center", 1, True, ["0", "0f"]),
        ("random", 2, False, ["1", "2"]),
        ("random", 2, True, ["1", "1f", "2", "2f"]),
    ],
)
def test_the_views_are_the_centre_or_the_random_squares_each_with_its_mirror(
    crop: str, crops: int, flip: bool, names: list[str]
) -> None:
    assert [view.name for view in views(crop, crops, flip)] == names


PODELL = """512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344 768x1344 768x1280
832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024"""
"""SDXL's own shapes, shorter side first (Podell 2023, arXiv 2307.01952, appendix I)."""


def test_buckets_of_sdxls_resolution_are_among_its_own_and_none_of_these_is_far_from_one():
    table = {tuple(map(int, shape.split("x"))) for shape in PODELL.split()}
    found = shapes(1024, "buckets")
    assert {tuple(sorted(shape)) for shape in found} < table
    assert {Shape(height, width) for width, height in found} == set(found)
    for short, long in table:
        assert max(shape.keeps(short, long) for shape in found) > 0.92


@pytest.mark.parametrize("resolution", [32, 64, 256, 512, 520, 768, 1024])
def test_buckets_have_no_more_pixels_than_the_square_and_come_close_to_any_picture(resolution):
    found = shapes(resolution, "buckets")
    assert found[0] == (resolution, resolution)
    step = {32: 8, 64: 8, 256: 32}.get(resolution, 64)
    assert all(side % step == 0 for shape in found[1:] for side in shape)
    assert all(resolution**2 / 2 <= shape.width * shape.height <= resolution**2 for shape in found)
    assert shapes(resolution, "square") == ((resolution, resolution),)
    worst = min(shape_for(width, 1000, resolution, "buckets").keeps(width, 1000) for width in range(500, 2001))
    assert worst > (0.77 if resolution == 32 else 0.85)


def test_the_shape_of_a_picture_is_the_one_that_leaves_most_of_it_by_brute_force():
    rng = np.random.default_rng(3)
    for width, height in rng.integers(100, 2000, (200, 2)).tolist():
        if max(width, height) > 4 * min(width, height):
            continue

        def left_over(shape: Shape, width: int = width, height: int = height) -> float:
            scale = max(shape.width / width, shape.height / height)
            return shape.width * shape.height / (scale * width * scale * height)

        chosen = shape_for(width, height, 512, "buckets")
        assert left_over(chosen) == pytest.approx(max(map(left_over, shapes(512, "buckets"))))
        assert chosen.keeps(width, height) == pytest.approx(left_over(chosen))


def test_in_a_bucket_a_picture_is_seen_from_edge_to_edge(tmp_path):
    wide = blocks([RED, RED, GREEN, GREEN, BLUE, BLUE], [RED, RED, GREEN, GREEN, BLUE, BLUE], side=8)  # 48 × 16
    wide.save(tmp_path / "a.png")
    seen_ = look(pair(tmp_path / "a.png"), 32, View(), aspect="buckets")
    assert np.array_equal(as_bytes(seen_.pixels), np.asarray(wide))
    assert seen_.sizes == (16, 48, 0, 0, 16, 48)


def header_size(folder: Path) -> tuple[int, int]:
    """Of the one picture in a folder, as whoever finds it reads it."""
    (found,) = find(folder, default_caption="words")
    return found.size


@pytest.mark.parametrize("orientation", CORNERS)
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff"])
def test_a_header_tells_the_size_that_a_turned_picture_has(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(tmp_path / f"a.{ending}", exif=exif)
    with Image.open(tmp_path / f"a.{ending}") as opened:
        assert header_size(tmp_path) == ImageOps.exif_transpose(opened).size


def test_a_header_is_read_though_the_pixels_are_broken(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    noise.save(tmp_path / "a.tiff", compression="tiff_lzw")
    data = (tmp_path / "a.tiff").read_bytes()
    (tmp_path / "a.tiff").write_bytes(data[:40] + bytes(200) + data[240:])
    assert header_size(tmp_path) == (30, 40)


def test_exif_that_cannot_be_read_turns_nothing_and_is_told_by_whoever_decodes_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "a.webp", exif=exif)
    data = (tmp_path / "a.webp").read_bytes()
    (tmp_path / "a.webp").write_bytes(data.replace(b"MM\x00*", b"MM\xda*").replace(b"II*\x00", b"II*\xda"))
    assert header_size(tmp_path) == (40, 30)
    with pytest.raises(SyntaxError):
        look(pair(tmp_path / "a.webp"), 32, View())
