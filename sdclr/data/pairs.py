"""Find the image-caption pairs of a folder, and split them; every problem of the folder is reported at once, by name."""

from __future__ import annotations

import dataclasses
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from PIL import ExifTags, Image

from sdclr.errors import DataError
from sdclr.seeding import derive

CAPTION_SUFFIXES = (".txt", ".caption")
MAX_PIXELS = 16_384 * 16_384 // 2
"""Larger pictures are refused before they are decoded: about 400 MB of memory (a decompression bomb, or a mistake)."""
MIN_SIDE = 16
MAX_ASPECT = 16
"""Longer strips are refused: their shorter side is scaled to the resolution, so their longer one would not fit into memory."""
FOREIGN_SUFFIXES = frozenset(
    f".{kind}"
    for kind in ("heic", "heif", "jxl", "svg", "psd", "xcf", "raw", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2")
)
"""Pictures that may be meant, but that Pillow may not read; the ones it does read here are taken."""
MAX_FILES, MAX_DEPTH, MAX_CAPTION_BYTES = 100_000, 50, 100_000
"""What a folder of pictures can hold; beyond it, the folder is surely another one than was meant."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """One picture and its caption; `key` is the path relative to the folder, with forward slashes, its accents as they are typed (on disk
    one may be a character of its own). `by_name`: the caption is the file's name.
    `size` is its width and height as its header has them, in the orientation that it is looked at. `mask` is the file that says which parts
    of it count: by its brightness or, if it is the picture itself, by its transparency."""

    path: Path
    key: str
    caption: str
    by_name: bool = False
    size: tuple[int, int] = (0, 0)
    mask: Path | None = None


@dataclasses.dataclass(frozen=True)
class Split:
    """Pairs to train on, and pairs held out; both in the order of their keys."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]


def find(folder: Path, default_caption: str | None = None) -> list[Pair]:
    """All pairs under `folder`, sorted by key.

    A caption is the .txt or .caption file beside the picture, else `default_caption`, else the file's name with `_` and `-` as
    spaces. Raises DataError naming every picture that cannot be used; pixels are decoded later, when they are first needed.
    """
    if not folder.is_dir():
        raise DataError(
            [f"{folder}: there is no such image folder"], hint="set data.images to the folder that holds your pictures"
        )
    found: list[str] = []
    images, captions = files_in(folder, found)
    pairs = []
    for stem, paths in sorted(images.items()):
        if len(paths) > 1:
            names = ", ".join(_shown(folder, p) for p in paths)
            found.append(
                f"{names}: {len(paths)} pictures of one name share one caption file: rename or remove all but one"
            )
            continue
        key = _key(folder, paths[0])
        size, problem = header(paths[0], key)
        if problem:
            found.append(f"{_shown(folder, paths[0])}: {problem}")
        caption = _caption(folder, paths[0], captions.get(stem, []), default_caption, found)
        by_name = default_caption is None and stem not in captions
        pairs.append(Pair(paths[0], key, caption, by_name, size))
    if not images and not found:
        found.append(f"{folder}: holds no pictures (looked for .png, .jpg, .webp, .tif and all else that Pillow reads)")
    if found:
        raise DataError(found, hint=f"{len(found)} problem(s) in {folder}; nothing was trained")
    return sorted(pairs, key=lambda pair: pair.key)


def split(pairs: Sequence[Pair], fraction: float, seed: int, fold: int = 0) -> Split:
    """Hold out exactly round(fraction·N) pairs: those whose seeded hash ranks lowest.

    Each pair's rank depends on its own key alone, so adding pictures moves an old one across the split only when the number held
    out changes or a new one ranks below it. `fold` 1, 2, ... take the next lowest instead (rotating folds).
    """
    count = round(fraction * len(pairs))
    ranked = sorted(pairs, key=lambda pair: (derive(seed, "split", pair.key), pair.key))
    shift = (fold * count) % max(1, len(pairs))
    ranked = ranked[shift:] + ranked[:shift]
    held = {pair.key for pair in ranked[:count]}
    return Split(
        train=tuple(pair for pair in pairs if pair.key not in held),
        validation=tuple(pair for pair in pairs if pair.key in held),
    )


def times(pairs: Sequence[Pair], repeats: Mapping[str, int]) -> tuple[int, ...]:
    """How often an epoch takes each picture: as often as the deepest folder above it that `repeats` names, else once."""
    return tuple(next((repeats[name] for name in folders_of(pair) if name in repeats), 1) for pair in pairs)


def folders_of(pair: Pair) -> list[str]:
    """The subfolders that a picture lies in, the deepest first."""
    return [folder.as_posix() for folder in PurePosixPath(pair.key).parents if folder.name]


def files_in(folder: Path, found: list[str]) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Pictures and caption files by their path in the folder without its suffix; hidden files and folders are left alone, and what else cannot
    be taken is added to `found`."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images: dict[str, list[Path]] = defaultdict(list)
    captions: dict[str, list[Path]] = defaultdict(list)
    root = folder.resolve()
    for path in _walk(folder, found):
        suffix = path.suffix.lower()
        kind = captions if suffix in CAPTION_SUFFIXES else images if suffix in known else None
        if kind is None:
            if suffix in FOREIGN_SUFFIXES:
                found.append(
                    f"{_shown(folder, path)}: {suffix} pictures cannot be read here: convert it to PNG or JPEG"
                )
            continue
        problem = _not_our_file(path, root)
        if problem:
            found.append(f"{_shown(folder, path)}: {problem}")
            continue
        kind[_key(folder, path.with_suffix(""))].append(path)
    return images, captions


def _walk(folder: Path, found: list[str]) -> Iterator[Path]:
    """Every file below a folder, in order; what cannot be entered or never ends is a problem, not a silence."""

    def refused(error: OSError) -> None:
        found.append(f"{_shown(folder, Path(error.filename))}: cannot be read ({error.strerror})")

    seen = 0
    for directory, subfolders, names in os.walk(folder, onerror=refused):
        here = Path(directory)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in subfolders:
            if (here / name).is_symlink():
                found.append(f"{_shown(folder, here / name)}: is a link to a folder; copy the folder instead")
        seen += len(names) + len(subfolders)
        if seen > MAX_FILES or len(here.relative_to(folder).parts) > MAX_DEPTH:
            limits = f"more than {MAX_FILES:,} files, or folders more than {MAX_DEPTH} deep"
            found.append(f"{folder}: holds {limits}: is it the folder that you mean?")
            return
        yield from (here / name for name in sorted(names) if not name.startswith("."))


def _not_our_file(path: Path, root: Path) -> str | None:
    """Why a path is no file that lies in the folder: a link that leads out of it or nowhere, a pipe that would be waited for."""
    try:
        if path.is_symlink() and not path.resolve(strict=True).is_relative_to(root):
            return "is a link to a file outside the folder; copy the file instead"
    except (OSError, RuntimeError):  # Python before 3.13 raises RuntimeError for a link to itself
        return "is a link that leads nowhere"
    return None if path.is_file() else "is not a file"


def header(path: Path, key: str) -> tuple[tuple[int, int], str | None]:
    """Width and height of a picture, and what the header already shows to be wrong with it."""
    nothing = (0, 0)
    if any("\ud800" <= c <= "\udfff" for c in key):
        return nothing, "has a name that is not UTF-8; rename it"
    try:
        if path.stat().st_size == 0:
            return nothing, "is empty (0 bytes)"
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # our own, clearer limit follows
        try:
            with Image.open(path) as image:
                width, height = _upright_size(image)
                if image.format == "EPS":
                    return nothing, "is a PostScript program, which is never run; save it as PNG"
                # MPO is a photo with a preview or a second eye beside it, as many phones write under .jpg: its first frame is the photo.
                frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    except Exception as error:  # Pillow's decoders raise many kinds: each means that this file cannot be read
        return nothing, f"cannot be read as a picture ({_reason(error)})"
    return (width, height), _unusable(width, height, frames)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """As the picture will be looked at. A PNG is not searched for an orientation behind its pixels, which would decode them, and a TIFF has
    the one that Pillow's release gives it. EXIF that cannot be read turns nothing here: whoever decodes the picture says so."""
    if image.format == "TIFF" or (image.format == "PNG" and not {"exif", "XML:com.adobe.xmp"} & image.info.keys()):
        return image.size
    try:
        on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # damaged EXIF raises many kinds
        on_its_side = False
    return image.size[::-1] if on_its_side else image.size


def _unusable(width: int, height: int, frames: int) -> str | None:
    if width * height > MAX_PIXELS:
        return f"is {width}×{height} pixels, more than {MAX_PIXELS:,}; make it smaller"
    if min(width, height) < MIN_SIDE:
        return f"is only {width}×{height} pixels; a picture needs at least {MIN_SIDE} on its shorter side"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"is {width}×{height} pixels, a strip more than {MAX_ASPECT} times as long as wide; cut it"
    if frames > 1:
        return f"is animated ({frames} frames); save the frame you mean as a picture"
    return None


def _caption(folder: Path, image: Path, files: list[Path], default: str | None, found: list[str]) -> str:
    if len(files) > 1:
        found.append(f"{', '.join(_shown(folder, f) for f in files)}: two caption files for one picture: remove one")
        return ""
    if not files:
        caption = default if default is not None else _one_line(image.stem.replace("_", " ").replace("-", " "))
        if not caption and default is None:
            found.append(f"{_shown(folder, image)}: has no caption file, and a name that says nothing")
        return caption
    caption, problem = _read_caption(files[0])
    if problem:
        found.append(f"{_shown(folder, files[0])}: {problem}")
    return caption


def _read_caption(file: Path) -> tuple[str, str | None]:
    """A caption file's text in one line, and what is wrong with it."""
    try:
        size = file.stat().st_size
        if size > MAX_CAPTION_BYTES:
            return "", f"is {size:,} bytes long, and a caption is a few sentences"
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return "", f"is not UTF-8 text (byte {error.start}); save it as UTF-8"
    except OSError as error:
        return "", f"cannot be read ({_reason(error)})"
    if "\0" in text:
        return "", "holds NUL characters; is it a text file saved as UTF-8?"
    caption = _one_line(text)
    return caption, None if caption else "is an empty caption; write one, or remove the file to use the picture's name"


def _one_line(text: str) -> str:
    """Text with control characters and runs of space as single spaces."""
    if not text.isprintable():
        text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    return " ".join(text.split())


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0] if "cannot identify" not in text else "not a picture, or damaged"


def _key(folder: Path, path: Path) -> str:
    return unicodedata.normalize("NFC", path.relative_to(folder).as_posix())


def _shown(folder: Path, path: Path) -> str:
    return printable(folder / _key(folder, path))


def printable(name: Path | str) -> str:
    """A name safe to print in one line, whatever characters it holds."""
    text = name.as_posix() if isinstance(name, Path) else name
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
