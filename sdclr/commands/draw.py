"""`sdclr draw`: captioned pictures by the untouched base, to train on beside the subject's (`prior.images`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdclr.config import source
from sdclr.data.dataset import readable
from sdclr.data.pairs import printable
from sdclr.engine.fingerprint import changed, drawing_fingerprint, in_words
from sdclr.engine.folder import read_json, storage_errors, write_bytes, write_json, write_text
from sdclr.engine.plan import overlap
from sdclr.errors import InputError
from sdclr.report import console, figures
from sdclr.seeding import derive

RECORD = "drawn.json"


def draw(
    config_path: Path, prompts: Sequence[str], output: Path, count: int = 100, overrides: Sequence[str] = ()
) -> None:
    """Draw `count` pictures into a folder, the prompts in turn, each with its prompt beside it as a caption; prints the folder.

    Size, sampler and guidance are the config's `sample`. What has been drawn already is left alone, so that a command that was cut short
    goes on where it was. Raises InputError where the folder holds pictures of other prompts or settings, or lies among the subject's.
    """
    config = source.load(config_path, overrides).config
    prompts = [" ".join(prompt.split()) for prompt in prompts]  # as a caption is read
    for prompt in prompts:
        if not prompt or not prompt.isprintable():
            raise InputError(f"a prompt must be text, for it becomes a caption; got {printable(prompt) or 'nothing'}")
    for key, folder, taken in (("data.images", config.data.images, "trained on as the subject"), ("mask.images", config.mask.folder, "taken for masks")):  # fmt: skip
        if folder and overlap(folder, output):
            raise InputError(
                f"--output {output}: lies in {key} ({folder}) or holds it, and would be {taken}",
                hint="name a folder beside it",
            )
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; name a folder")
    with storage_errors(output, again="then run the same command again", place="--output"):
        output.mkdir(parents=True, exist_ok=True)
    settings = drawing_fingerprint(config) | {"run.seed": config.run.seed}
    _refuse_other_settings(output / RECORD, settings)
    wanted = [(output / f"drawn-{number:05d}.png", prompts[number % len(prompts)]) for number in range(count)]
    missing = [(number, *each) for number, each in enumerate(wanted) if not _drawn(*each)]
    if missing:
        from sdclr.engine.painter import Painter, untouched

        write_json(output / RECORD, {"settings": settings})
        with console.progress("drawing", len(missing)) as bar:
            painter = Painter(config, *untouched(config))
            for number, path, prompt in missing:
                write_text(path.with_suffix(".txt"), prompt + "\n")
                write_bytes(path, figures.png(painter.draw(prompt, derive(config.run.seed, "draw", number))))
                bar.advance(prompt)
    console.result(str(output))
    more = len(list(output.glob("*.png"))) - count
    if more > 0:
        others = "1 other picture lies" if more == 1 else f"{more} other pictures lie"
        console.say(f"{others} there too, and would be trained on")
    console.say(f"next, in {config_path}: prior: {{images: {source.dump_value(str(output))}}}")


def _refuse_other_settings(record: Path, now: dict[str, Any]) -> None:
    if not record.is_file():
        return
    before = read_json(record).get("settings") or {}
    unlike = [in_words(*each) for each in changed(before, now)]
    if unlike:
        raise InputError(
            f"{record.parent}: holds pictures that were drawn otherwise; different: {', '.join(unlike)}",
            hint="name another folder with --output, or remove that one",
        )


def _drawn(path: Path, prompt: str) -> bool:
    """Whether this picture is there, whole and with this prompt."""
    caption = path.with_suffix(".txt")
    if not readable(path) or not caption.is_file():
        return False
    before = " ".join(caption.read_text(encoding="utf-8", errors="replace").split())
    if before != prompt:
        raise InputError(
            f"{printable(path)}: was drawn for another prompt ({printable(before)}); asked for is now: {prompt}",
            hint="name another folder with --output, or remove that one",
        )
    return True
