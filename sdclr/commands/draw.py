"""`sdclr draw`: captioned pictures by the untouched base, to train on beside the subject's (`prior.images`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdclr.config import source
from sdclr.data.pairs import printable
from sdclr.engine.folder import write_bytes, write_text
from sdclr.errors import InputError
from sdclr.report import console, figures
from sdclr.seeding import derive


def draw(
    config_path: Path, prompts: Sequence[str], output: Path, count: int = 100, overrides: Sequence[str] = ()
) -> None:
    """Draw `count` pictures into a folder, the prompts in turn, each with its prompt beside it as a caption; prints the folder.

    Size, sampler and guidance are the config's `sample`. What has been drawn already is left alone, so that a command that was cut short
    goes on where it was. Raises InputError where the folder holds drawn pictures of other prompts.
    """
    config = source.load(config_path, overrides).config
    if not all(prompt.strip() for prompt in prompts):
        raise InputError("a prompt is empty; a picture without a caption has nothing to be kept by")
    wanted = [(output / f"drawn-{number:05d}.png", prompts[number % len(prompts)]) for number in range(count)]
    missing = [(number, *each) for number, each in enumerate(wanted) if not _drawn(*each)]
    if missing:
        from sdclr.engine.painter import Painter, untouched

        with console.progress("drawing", len(missing)) as bar:
            painter = Painter(config, *untouched(config))
            for number, path, prompt in missing:
                write_text(path.with_suffix(".txt"), prompt + "\n")
                write_bytes(path, figures.png(painter.draw(prompt, derive(config.run.seed, "draw", number))))
                bar.advance(prompt)
    console.result(str(output))
    console.say(f"next, in {config_path}: prior: {{images: {output}}}")


def _drawn(path: Path, prompt: str) -> bool:
    """Whether this picture is there, with this prompt."""
    if not path.is_file():
        return False
    try:
        caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        caption = ""
    if caption != prompt.strip():
        raise InputError(
            f"{printable(path)}: was drawn for another prompt ({caption or 'none'}); asked for is now: {prompt}",
            hint="name another folder with --output, or remove that one",
        )
    return True
