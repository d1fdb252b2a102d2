"""Hostile configs, pictures, folders and captions: a message and exit code 2 each time; no traceback, no hang, nothing ignored in silence."""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
import shutil
import signal
import struct
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from inject import Lab, Tally, in_child, thinned
from PIL import Image


class Hang(BaseException):
    """No `except Exception` may swallow it."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    def late(number: int, frame: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Configs ---------------------------------------------------------------------------------------------------------------------

BASE = """\
run: {name: mochi, output_dir: runs, seed: 42}
model: {base: data/tiny-sd, train: [unet], precision: auto}
data: {images: data/mochi, resolution: 64, flip: true, crop: center, caption_dropout: 0.1}
validation: {fraction: 0.2, every: 1 epoch, timesteps_per_image: 8}
optimizer: {name: adamw, betas: [0.9, 0.999], weight_decay: 0.01, max_grad_norm: 1.0}
batch:
  size: 4
  accumulate: 1
schedule: {policy: triangular, base_lr: 0, max_lr: 1e-4, cycles: 4}
train: {steps: 800}
checkpoint: {at_troughs: true, best: true, keep_last: 2}
sample: {prompts: [a cat, "a dog, smiling"], seeds: [1, 2, 3], steps: 30, guidance: 7.5}
"""
VALUES = (
    "0", "1", "-1", "4", "1e-4", "1e400", "-1e400", ".inf", "-.inf", ".nan", "1e-400", "999999999999999999999999", "1" * 320, "0x10", "0o7", "1_000",
    "1.0", "3.5", "true", "false", "yes", "off", "null", "~", "''", "auto", "[]", "{}", "[1, 2]", "[[1]]", "{a: 1}", "unet", "[unet, unet]", "'4'",
    "'1e-4'", "10 epochs", "0 epochs", "1e9 epochs", "2.5 steps", "-3 steps", "epochs", "triangular", "hann", "constant", "everydream", "low", "peak",
    "!!int '3'", "!!python/object/apply:os.system ['touch /tmp/sprung']", "!!binary aGk=", "!!set {a}", "&x 4", "*x", "2020-01-01", '"\\0"', '"\\ud800"',
    '"\\e[31m"', "../../etc", "/", "/dev/zero", "CON", "a/b", ".", "..", "~/runs", "é", "日本", "'%s%n'", "$HOME", "{{x}}", "<<", "=", "|\n    text",
    ">\n    folded", "'" + "x" * 3000 + "'", "[" * 30 + "]" * 30, "{" * 30 + "}" * 30, "#", "[1, 2", "{a: 1", "'open", '"open', "\t1", "@x", "`x`", "%x", "0.1.2",
    "1e", "--", "+", "[true]", "[null]", "[.nan]", "[1, a]", "[0.9]", "[1e-3, 1e-5]", "1 2", "01", "1,5", "10 Epochs", "٣", "１", "9007199254740993",
)  # fmt: skip


def words() -> list[str]:
    from sdclr.config.schema import RunConfig

    keys = [key for field in RunConfig.model_fields.values() for key in field.annotation.model_fields]  # type: ignore[union-attr]
    return [*RunConfig.model_fields, *keys]


def mutated(draw: random.Random, names: list[str]) -> tuple[bytes, list[str]]:
    """A config spoilt in one to three ways, and what is given with --set beside it."""
    text, overrides = BASE, []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        lines = text.splitlines() or [""]
        at = draw.randrange(len(lines))
        way = draw.randrange(15)
        if way <= 3:  # a value
            text = _another_value(draw, text)
        elif way == 4:  # a misspelt key
            word = draw.choice(names)
            text = text.replace(
                f"{word}:", f"{draw.choice((word[:-1], word + 's', word.upper(), word[::-1], f' {word}'))}:", 1
            )
        elif way == 5:  # a key of another section, a doubled key
            lines[at] = lines[at].replace("{", f"{{{draw.choice(names)}: {draw.choice(VALUES)}, ", 1)
            text = "\n".join(lines)
        elif way == 6:
            text = "\n".join([*lines[:at], draw.choice(lines), *lines[at:]])
        elif way == 7:
            text = "\n".join(lines[:at] + lines[at + 1 :])
        elif way == 8:  # bytes
            data = bytearray(text.encode())
            for _ in range(draw.randint(1, 4)):
                data[draw.randrange(len(data))] = draw.randrange(256)
            return bytes(data), overrides
        elif way == 9:
            text = text[: draw.randrange(len(text) + 1)]
        elif way == 10:
            place = draw.randrange(len(text) + 1)
            text = text[:place] + draw.choice((":", "{", "}", "[", "]", ",", "\t", "\n", " ", "'", '"', "- ", "? ", "#", "&a ", "*a", "|", "!!x ", "\r", "\u2028", "\ufeff", "---\n", "...\n")) + text[place:]  # fmt: skip
        elif way == 11:
            key = draw.choice(names)
            overrides.append(f"{draw.choice(names[:12])}.{key}={draw.choice(VALUES)}")
        elif way == 12:
            overrides.append(draw.choice(("", "=", "a", "a=", ".=1", "run=1", "run.name", "run.name.x=1", "train.steps=5\nbatch.size: 9", "x.y.z=1", "batch={size: 2}", "run.seed==3")))  # fmt: skip
        elif way == 13:
            lines[at] = draw.choice((" ", "  ", "\t", "- ")) + lines[at]
            text = "\n".join(lines)
        else:
            text = text + f"{draw.choice(names)}: {draw.choice(VALUES)}\n"
    return text.encode(errors="surrogatepass"), overrides


def _another_value(draw: random.Random, text: str) -> str:
    parts = text.split(": ")
    if len(parts) == 1:
        return text + draw.choice(VALUES)
    at = draw.randrange(1, len(parts))
    for end in (",", "}", "\n"):
        if end in parts[at]:
            _, rest = parts[at].split(end, 1)
            parts[at] = draw.choice(VALUES) + end + rest
            break
    return ": ".join(parts)


def ignored(data: bytes, overrides: list[str], config: Any) -> list[str]:
    """Settings that an independent reader finds in an accepted file and that the config does not hold."""
    given = yaml.load(data.decode("utf-8-sig"), Loader=yaml.BaseLoader) or {}
    for override in overrides:
        target, _, text = override.partition("=")
        *sections, key = (part.strip() for part in target.split("."))
        place = given
        for section in sections:
            place[section] = place.get(section) or {}
            place = place[section]
        place[key] = yaml.load(text, Loader=yaml.BaseLoader)
    return _ignored(given, config.model_dump(mode="json"), "")


def _ignored(given: Any, held: Any, where: str) -> list[str]:
    if isinstance(given, dict) and isinstance(held, dict):
        return [
            p
            for key, value in given.items()
            for p in (_ignored(value, held[key], f"{where}.{key}") if key in held else [f"{where}.{key} is gone"])
        ]
    if isinstance(given, list) and isinstance(held, list):
        if len(given) != len(held):
            return [f"{where}: {given} became {held}"]
        return [p for g, h in zip(given, held, strict=True) for p in _ignored(g, h, where)]
    return [] if _same(given, held) else [f"{where}: {given!r} became {held!r}"]


def _same(text: Any, held: Any) -> bool:
    if text is None or text == "" or (isinstance(text, str) and text in ("~", "null", "Null", "NULL")):
        return held is None or held == "" or isinstance(held, dict)
    if not isinstance(text, str) or held is None:
        return False
    if isinstance(held, bool):
        return text.lower() in (
            ("true", "1", "yes", "on", "y", "t", "1.0") if held else ("false", "0", "no", "off", "n", "f", "0.0")
        )
    if isinstance(held, (int, float)):
        if isinstance(held, float) and not math.isfinite(held):
            return False
        number = text.lower().removesuffix("steps").removesuffix("step").strip()
        try:
            return float(number) == held
        except ValueError:
            return False
    if text.strip() == held or str(Path(text)) == held:
        return True
    from sdclr.config.kinds import parse_span

    with contextlib.suppress(Exception):
        return bool(parse_span(text) == parse_span(held))
    return False


@thinned(20)
def test_mutated_configs(tmp_path: Path, share: int) -> None:
    from sdclr.config.source import load
    from sdclr.errors import ConfigError

    tally, names, path = Tally("input: mutated configs", share), words(), tmp_path / "run.yaml"
    for seed in range(0, 6000, share):
        data, overrides = mutated(random.Random(seed), names)
        path.write_bytes(data)
        problem, kind = "", "refused"
        try:
            with within(10):
                loaded = load(path, overrides)
            kind = "accepted, all of it"
            problem = "; ".join(ignored(data, overrides, loaded.config))
        except ConfigError as error:
            message = error.message.strip()
            problem = "" if error.exit_code == 2 and message and error.hint is not False else f"no word: {error}"
            if "Traceback" in message or "pydantic" in message or "yaml.scanner" in message:
                problem = f"not in the user's words: {message}"
        except Hang:
            problem = "hung"
        except Exception:
            problem = traceback.format_exc(limit=-2)
        tally.add(f"seed {seed} {overrides or ''}", problem, kind=kind)
    tally.report()


@pytest.mark.faults
@pytest.mark.parametrize(
    "data",
    [b"a: " * 300_000, b"[" * 900_000, b"- " * 400_000, b"'" + b"x " * 450_000, b"a" * 999_999, b"? " * 300_000, b"\t" * 900_000, b"{a: " * 200_000,
     b"&a [*a,*a]", b"\xff\xfe" * 1000, bytes(900_000), b"# c\n" * 200_000, b"k: v\n" * 100_000, b"x" * 2_000_000, b"", b"\n" * 900_000],
    ids=lambda data: f"{data[:6]!r}x{len(data)}",
)  # fmt: skip
def test_endless_configs_end_soon(tmp_path: Path, data: bytes) -> None:
    from sdclr.config.source import load
    from sdclr.errors import ConfigError

    (tmp_path / "run.yaml").write_bytes(data)
    with within(60), pytest.raises(ConfigError):
        load(tmp_path / "run.yaml")


# Pictures --------------------------------------------------------------------------------------------------------------------

Make = Callable[[Path], None]
REFUSED, EITHER, USED = "refused", "either", "used"
"""What must become of a folder: a message, no matter which of the two, pictures."""


def encoded(kind: str, size: tuple[int, int] = (40, 36), mode: str = "RGB", **options: Any) -> bytes:
    rng, buffer = np.random.default_rng(7), io.BytesIO()
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def a_file(name: str, data: bytes) -> Make:
    return lambda folder: _write(folder / name, data)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def pictures() -> Iterator[tuple[str, str, Make]]:
    """(what, what must become of it, how to make it) of single hostile pictures."""
    draw = random.Random(11)
    for kind, suffix in (
        ("PNG", "png"),
        ("JPEG", "jpg"),
        ("WEBP", "webp"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TIFF", "tiff"),
    ):
        data = encoded(kind)
        for share in (0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.8, 0.95):
            yield f"{kind} cut to {share:.1%}", REFUSED, a_file(f"a.{suffix}", data[: int(len(data) * share)])
        for number in range(14):
            spoilt = bytearray(data)
            for _ in range(draw.choice((1, 1, 3, 20))):
                spoilt[draw.randrange(len(spoilt) if number % 2 else 60)] = draw.randrange(256)
            yield f"{kind} with bytes changed, {number}", EITHER, a_file(f"a.{suffix}", bytes(spoilt))
        for other in ("png", "jpg", "webp", "tif", "PNG", "jpeg"):
            yield f"{kind} named .{other}", USED, a_file(f"a.{other}", data)
    yield from _liars()
    yield from _shapes()
    yield from _modes()


def _liars() -> Iterator[tuple[str, str, Make]]:
    contents = {
        "text": b"hello", "zeros": bytes(5000), "noise": random.Random(1).randbytes(5000), "zip": b"PK\x03\x04" + bytes(100), "html": b"<html>", "svg": b"<svg xmlns='x'/>",
        "elf": b"\x7fELF" + bytes(200), "pickle": b"\x80\x04\x95", "pdf": b"%PDF-1.7", "gzip": b"\x1f\x8b" + bytes(50), "png's signature": b"\x89PNG\r\n\x1a\n",
        "jpeg's": b"\xff\xd8\xff\xe0", "gif's": b"GIF89a", "bmp's": b"BM", "tiff's": b"II*\0\x08\0\0\0", "riff's": b"RIFF\0\0\0\0WEBP", "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n",
    }  # fmt: skip
    for what, data in contents.items():
        for suffix in ("png", "jpg", "tiff") if what != "eps" else ("png", "eps", "ps"):
            yield f"{what} named .{suffix}", REFUSED, a_file(f"a.{suffix}", data)


def _png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"", more: bytes = b"") -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _shapes() -> Iterator[tuple[str, str, Make]]:
    for size in ((0, 0), (0, 64), (1, 1), (15, 15), (15, 4000), (1, 100_000), (20_000, 16), (16, 20_000), (300, 4900)):
        if min(size):
            yield f"{size} pixels", REFUSED, a_file("a.png", encoded("PNG", size))
        yield f"a header of {size} pixels", REFUSED, a_file("a.png", _png(*size))
    for size in ((60_000, 60_000), (2**31 - 1, 2**31 - 1), (100_000, 2000), (2**31, 16)):
        yield f"a header of {size} pixels", REFUSED, a_file("a.png", _png(*size))
    bomb = zlib.compress(bytes(200_000_000), 9)
    yield "a PNG that unpacks to 200 MB for 64 pixels", EITHER, a_file("a.png", _png(64, 64, data=bomb))
    text = b"zTXt" + b"c\0\0" + bomb
    yield "a PNG whose text unpacks to 200 MB", EITHER, a_file("a.png", _png(64, 64, data=zlib.compress(bytes(64 * 193)), more=struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))))  # fmt: skip
    for kind, suffix in (("GIF", "gif"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")):
        frames = [Image.new("RGB", (40, 40), (i * 9 % 256, 0, 0)) for i in range(4)]
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        yield f"an animated {kind}", REFUSED, a_file(f"a.{suffix}", buffer.getvalue())
    many = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), (i % 256, i // 256, 0)) for i in range(3000)]
    frames[0].save(many, "GIF", save_all=True, append_images=frames[1:])
    yield "a GIF of thousands of frames", REFUSED, a_file("a.gif", many.getvalue())
    loop = (
        struct.pack("<2sHI", b"II", 42, 8)
        + struct.pack("<H", 1)
        + struct.pack("<HHII", 256, 3, 1, 64)
        + struct.pack("<I", 8)
    )
    yield "a TIFF whose directories go round in a ring", REFUSED, a_file("a.tif", loop)


def _modes() -> Iterator[tuple[str, str, Make]]:
    for mode in ("L", "LA", "P", "RGBA", "1", "CMYK", "I;16", "I", "F"):
        kind = {"CMYK": "JPEG", "F": "TIFF", "I": "TIFF"}.get(mode, "PNG")
        picture = Image.fromarray(np.arange(1600, dtype=np.uint8).reshape(40, 40)).convert("L")
        picture = (
            Image.fromarray(np.asarray(picture, dtype=np.uint16) * 257) if mode == "I;16" else picture.convert(mode)
        )
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        yield f"mode {mode}", USED, a_file(f"a.{kind.lower()}", buffer.getvalue())
    for orientation in (0, 1, 6, 8, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"EXIF orientation {orientation}", USED, a_file("a.jpg", encoded("JPEG", exif=exif))
    yield "EXIF of noise", EITHER, a_file("a.jpg", encoded("JPEG", exif=b"Exif\0\0" + random.Random(3).randbytes(3000)))
    yield (
        "a colour profile of noise",
        USED,
        a_file("a.png", encoded("PNG", icc_profile=random.Random(4).randbytes(3000))),
    )
    values = np.full((40, 40), np.nan, dtype=np.float32)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF")
    yield "a TIFF of not-a-numbers", EITHER, a_file("a.tif", buffer.getvalue())


def folders() -> Iterator[tuple[str, str, Make]]:
    """Hostile folders and captions, each with one good picture g.png."""
    good = encoded("PNG")

    def links(name: str, target: str) -> Make:
        return lambda folder: (folder / name).symlink_to(target)

    yield "only one good picture", USED, lambda folder: None
    yield "a link to a file outside", REFUSED, links("l.png", "/etc/passwd")
    yield "a link to a device", REFUSED, links("l.png", "/dev/zero")
    yield "a link to the terminal", REFUSED, links("l.txt", "/dev/tty")
    yield "a link to nowhere", REFUSED, links("l.png", "nowhere.png")
    yield "a link to itself", REFUSED, links("l.png", "l.png")
    yield "a link to a picture within", USED, links("l.png", "g.png")
    yield "a link to its own folder", REFUSED, links("again", ".")
    yield "a link to all there is", REFUSED, links("all", "/")
    yield "a pipe named as a picture", REFUSED, lambda folder: os.mkfifo(folder / "p.png")
    yield "a pipe named as a caption", REFUSED, lambda folder: os.mkfifo(folder / "g.txt")
    yield "a folder named as a picture", USED, lambda folder: (folder / "d.png").mkdir()
    yield "a folder named as a caption", USED, lambda folder: (folder / "g.txt").mkdir()
    yield "a socket named as a picture", REFUSED, _socket
    yield "folders without end", REFUSED, lambda folder: (folder / "/".join("d" * 400)).mkdir(parents=True)
    yield "two pictures of one name", REFUSED, a_file("g.jpg", encoded("JPEG"))
    yield (
        "two captions of one picture",
        REFUSED,
        lambda folder: (_write(folder / "g.txt", b"a"), _write(folder / "g.caption", b"b")),
    )
    yield "hidden files", USED, lambda folder: (_write(folder / ".h.png", b"x"), _write(folder / ".d/x.png", b"x"))
    yield (
        "files of other programs",
        USED,
        lambda folder: [_write(folder / n, b"x") for n in ("Thumbs.db", "desktop.ini", "x.json", "metadata.jsonl")],
    )
    yield "half a download", REFUSED, a_file("h.png", good[: len(good) // 2])
    names = {
        "a\nb": USED, "a\tb": USED, "a\x1b[31mb": USED, "é": USED, "e\u0301": USED, "日本": USED, "😀": USED, "a" * 240: USED, " ": REFUSED, "-rf": USED, "$(id)": USED, "a'b\"c": USED,
        "..a": EITHER, "a.b.c": USED, "\u202eabc": USED, "%s%n": USED, "con": USED, "a\\b": USED, "[bold]x[/]": USED, "\udcff\udcfe": REFUSED,
    }  # fmt: skip
    for name, fate in names.items():
        yield f"a picture named {name!r}", fate, lambda folder, n=name: _write(folder / f"{n}.png", good)
        yield (
            f"a broken picture named {name!r}",
            REFUSED if not name.startswith(".") else EITHER,
            lambda folder, n=name: _write(folder / f"{n}.png", good[:50]),
        )
    captions: dict[str, tuple[str, bytes]] = {
        "nothing": (REFUSED, b""), "spaces": (REFUSED, b" \n\t \r\n"), "only a byte order mark": (REFUSED, b"\xef\xbb\xbf"), "a byte order mark": (USED, b"\xef\xbb\xbfa cat"),
        "UTF-16": (REFUSED, "a cat".encode("utf-16")), "Latin-1": (REFUSED, "é".encode("latin-1")), "NUL": (REFUSED, b"a\0cat"), "a surrogate": (REFUSED, b"\xed\xa0\x80"),
        "noise": (REFUSED, random.Random(5).randbytes(500)), "ten megabytes": (REFUSED, b"cat " * 2_500_000), "ninety kilobytes": (USED, b"cat " * 22_000), "escapes": (USED, b"\x1b[2J\x07cat"),
        "right to left": (USED, "\u202ecat".encode()), "emoji": (USED, "🐱👩‍👩‍👧".encode()), "combining marks": (USED, ("a" + "\u0301" * 5000).encode()), "markup": (USED, b"[bold red]cat[/] <script>alert(1)</script>"),
        "special tokens": (USED, b"<|endoftext|> <|startoftext|> cat"), "one word of 50,000 letters": (USED, b"a" * 50_000), "carriage returns": (USED, b"a\rcat\r"), "a format": (USED, b"{0} %s {cat.__class__}"),
    }  # fmt: skip
    for what, (fate, data) in captions.items():
        yield f"a caption of {what}", fate, a_file("g.txt", data)
        yield f"a caption of {what}, .caption", fate, a_file("g.caption", data)


def _socket(folder: Path) -> None:
    import socket

    before = Path.cwd()
    os.chdir(folder)  # a socket's path is short
    try:
        socket.socket(socket.AF_UNIX).bind("s.png")
    finally:
        os.chdir(before)


def become_of(folder: Path) -> tuple[str, str]:
    """What the program makes of a folder, as far as the VAE: refused or used, and its words."""
    from sdclr.data.dataset import View, look
    from sdclr.data.pairs import find, printable
    from sdclr.errors import DataError

    try:
        pairs = find(folder)
    except DataError as error:
        return REFUSED, error.message
    for pair in pairs:
        try:
            array = look(pair, 64, View()).pixels
        except Exception as error:  # as the encoder does
            return REFUSED, f"{printable(pair.path)}: cannot be decoded: {error}"
        assert array.shape == (3, 64, 64) and np.isfinite(array).all() and abs(array).max() <= 1.0001, (
            "pixels that are none"
        )
        assert pair.caption.strip(), "no caption"
    return USED, ""


@thinned(8)
def test_hostile_pictures_and_folders(tmp_path: Path, share: int) -> None:
    """Each is refused with its name or used, as it must be, within seconds, and without the memory that its header asks for."""
    tally = Tally("input: hostile pictures, folders, captions", share)
    good = encoded("PNG")
    trials = [(w, f, m, False) for w, f, m in pictures()] + [(w, f, m, True) for w, f, m in folders()]
    for what, fate, make, beside in trials[share // 2 :: share]:
        folder = tmp_path / "pictures"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if beside:
            _write(folder / "g.png", good)
        make(folder)
        problem, ended = "", ""
        try:
            with within(20):
                ended, words = become_of(folder)
            if fate != EITHER and ended != fate:
                problem = f"was {ended}, must be {fate}: {words}"
            elif ended == REFUSED and (
                str(folder) not in words or "\n\n" in words or (not words.isprintable() and words.count("\n") == 0)
            ):
                problem = f"does not name its file in one line: {words!r}"
        except Hang:
            problem = "hung"
        except Exception:
            problem = traceback.format_exc(limit=-3)
        tally.add(what, problem, kind=ended)
    tally.report()


@thinned(20)
def test_hostile_folders_through_the_program(lab: Lab, tmp_path: Path, share: int) -> None:
    """A sample of them through the whole of `sdclr check`: exit code 2 with a message, or 0."""
    from sdclr.commands.check import check

    tally = Tally("input: hostile folders through check", share)
    trials = [*pictures(), *folders()][::9]
    for what, fate, make in trials[::share]:
        lab.reset()
        folder = tmp_path / "pictures"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(lab.pictures, folder)
        _write(folder / "g.png", encoded("PNG"))
        make(folder)
        outcome = in_child(lambda: check(lab.config, [f"data.images={folder}"]), log=lab.root / "child.log")  # noqa: B023
        right = {REFUSED: (2,), USED: (0,), EITHER: (0, 2)}[fate]
        tally.add(
            what,
            ""
            if outcome.code in right and outcome.kind != "traceback"
            else f"{outcome.kind} {outcome.code} {outcome.text}",
            kind=f"exit {outcome.code}",
        )
    tally.report()


@pytest.mark.parametrize("images", ["/proc", "/dev", "/nowhere", "/etc/passwd", ""])
def test_a_folder_that_is_none(images: str, tmp_path: Path) -> None:
    from sdclr.data.pairs import find
    from sdclr.errors import DataError

    with within(60), pytest.raises(DataError):
        find(Path(images) if images else tmp_path)
