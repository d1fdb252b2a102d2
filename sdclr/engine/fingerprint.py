"""What a range test's answer and a kept state depend on, as short hashes: the base model, the pictures, the settings; and which of the
answers that there are fits a config."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdclr.config.schema import ModelSection, RunConfig
from sdclr.data.batches import Inputs
from sdclr.data.pairs import Pair
from sdclr.engine.folder import RunFolder, read_json, storage_errors
from sdclr.errors import InputError


def fingerprint(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """What a range test's answer depends on; a later run must agree in all of it to use the answer.

    What is off and younger than the first answers has no key, so that what was measured before is still known by its fingerprint.
    """
    split, data = inputs.split, config.data
    every = (*split.train, *split.validation)
    younger = {
        "mask": {"images": _masks(every), "outside": config.mask.outside} if config.mask.images else None,
        "repeats": ", ".join(f"{name}: {times}" for name, times in sorted(data.repeats.items())),
        "tag_orders": data.tag_orders if data.tag_orders > 1 else None,
        "keep_tags": data.keep_tags,
    }
    return {
        **base_fingerprint(config.model),
        "train": list(config.model.train),
        "precision": config.model.precision,
        "lora": config.lora.model_dump(mode="json") if config.lora.rank else None,
        "images": _pictures(every),
        "prior": {"images": _pictures(inputs.prior), "weight": config.prior.weight} if inputs.prior else None,
        "data": {k: getattr(data, k) for k in ("resolution", "crop", "crops", "flip", "caption_dropout")},
        "aspect": data.aspect if data.aspect != "square" else None,
        "optimizer": config.optimizer.model_dump(mode="json", exclude={"fused_backward"}),
        "loss": config.loss.model_dump(mode="json"),
        "batch": inputs.batches.samples_per_step,
        **{key: value for key, value in younger.items() if value},
    }


def _pictures(pairs: Iterable[Pair]) -> str:
    """A hash of pictures and captions."""
    digest = hashlib.blake2b(digest_size=16)
    for pair in sorted(pairs, key=lambda p: p.key):
        digest.update(f"{pair.key}\x1f{pair.caption}\x1f{pair.path.stat().st_size}\x1f".encode() + sampled(pair.path))
    return digest.hexdigest()


def _masks(pairs: Iterable[Pair]) -> str:
    """A hash of the pictures' masks; a picture's own transparency is hashed with the picture."""
    digest = hashlib.blake2b(digest_size=16)
    for pair in sorted(pairs, key=lambda p: p.key):
        own = b"none" if pair.mask is None else b"alpha" if pair.mask == pair.path else sampled(pair.mask)
        digest.update(f"{pair.key}\x1f".encode() + own)
    return digest.hexdigest()


def base_fingerprint(model: ModelSection) -> dict[str, str]:
    """What of a fingerprint is the base model's."""
    return {"model": model_fingerprint(model.base), "model_settings": model_settings(model)}


def drawing_fingerprint(config: RunConfig) -> dict[str, Any]:
    """What pictures depend on beside the weights, the prompt and the seed; of a checkpoint, which holds only what was trained, the other
    parts are the base's. `auto` is one precision on one machine."""
    s = config.sample
    return {
        **base_fingerprint(config.model), "model.precision": config.model.precision, "sample.negative_prompt": s.negative_prompt,
        "sample.steps": s.steps, "sample.guidance": s.guidance, "size": list(config.sample_size),
    }  # fmt: skip


def another_base(stored: dict[str, Any], model: ModelSection) -> str | None:
    """The base that a kept state was trained from, as its state.json names it, if it is not the one that `model` names, as that is now."""
    known = stored.get("fingerprint") or {}
    if all(known.get(key, value) == value for key, value in base_fingerprint(model).items()):
        return None
    return str(stored.get("config", {}).get("model", {}).get("base"))


def changed(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Every dotted key whose value differs between two dumped configs or fingerprints, with both values."""
    found: list[tuple[str, Any, Any]] = []
    for key in dict.fromkeys((*before, *after)):
        a, b = before.get(key), after.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


BESIDE_WEIGHTS = ("model_index.json", "*/*config.json", "*/tokenizer.json", "*/vocab.json", "*/merges.txt")
"""The files of a diffusers folder that hold no weights, and that what it computes depends on."""


def model_fingerprint(base: str) -> str:
    """A local model by what its weight files hold (size and sampled blocks), a hub model by its id."""
    path = Path(base)
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        return f"hub:{base}"
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.name}{file.stat().st_size}".encode() + sampled(file))
    return digest.hexdigest()


def model_settings(model: ModelSection) -> str:
    """Of a local model, a hash of what lies beside its weights: configs, tokenizers, what is predicted from what noise; of a hub model, its id."""
    place = Path(model.config or model.base)
    files = sorted({file for pattern in BESIDE_WEIGHTS for file in place.glob(pattern)} if place.is_dir() else ())
    if not files:
        return "" if place.exists() else f"hub:{place}"
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(
            f"{file.relative_to(place).as_posix()}\x1f".encode() + hashlib.blake2b(file.read_bytes()).digest()
        )
    return digest.hexdigest()


def sampled(path: Path, blocks: int = 64, size: int = 4096) -> bytes:
    """Blocks spread evenly over a file; the whole of a small one. Fine-tuning changes every tensor, so a sample tells models apart."""
    now = path.stat()
    return _sampled(path, now.st_size, now.st_mtime_ns, blocks, size)


@functools.cache
def _sampled(path: Path, total: int, changed_ns: int, blocks: int, size: int) -> bytes:
    """Read once: a command's start asks for the pictures' three or four times, a second for a thousand of a megabyte each time."""
    with path.open("rb") as file:
        if total <= blocks * size * 4:
            return hashlib.blake2b(file.read()).digest()
        digest = hashlib.blake2b()
        for i in range(blocks):
            file.seek(i * (total - size) // (blocks - 1))
            digest.update(file.read(size))
    return digest.digest()


ANSWER = "result.json"


def find_range_test(config: RunConfig, inputs: Inputs) -> tuple[Path, dict[str, Any]] | None:
    """A range test whose fingerprint fits: a conclusive one if there is any, this run's own before the newest of the runs beside it."""
    ours = fingerprint(config, inputs)
    fitting = [
        (path, result) for path, result in range_tests(config) if not differing(result.get("fingerprint") or {}, ours)
    ]
    return next((f for f in fitting if f[1].get("verdict") == "conclusive"), next(iter(fitting), None))


def range_tests(config: RunConfig) -> list[tuple[Path, dict[str, Any]]]:
    """The answers of this run and of those beside it, the run's own first, then the newest."""
    own = RunFolder(config.folder).range_test / ANSWER
    found = []
    for folder in config.run.output_dir.glob("*/range-test"):
        for path in (place / ANSWER for place in answers_in(folder)):
            with contextlib.suppress(InputError, OSError):  # damaged, or put aside just now
                found.append((path != own, -path.stat().st_mtime, path, read_json(path)))
    return [(path, result) for *_, path, result in sorted(found, key=lambda each: each[:3])]


def answers_in(range_test: Path) -> list[Path]:
    """The folders of a run's newest answer, and of those that were put aside for it."""
    return [range_test, *sorted((range_test / "earlier").glob("*"))]


def put_aside(range_test: Path, asked: dict[str, Any]) -> Path | None:
    """Move what answers another question than the one of this fingerprint into a folder of its own, where it still serves; returns that."""
    try:
        answered = read_json(range_test / ANSWER).get("fingerprint") or {}
    except InputError:
        return None
    if not answered or not differing(answered, asked):
        return None
    name = hashlib.blake2b(json.dumps(answered, sort_keys=True).encode(), digest_size=4).hexdigest()
    aside = range_test / "earlier" / name
    with storage_errors(aside):
        aside.mkdir(parents=True, exist_ok=True)
        for file in ("config.yaml", "range_test.png", "report.html", ANSWER):
            if (range_test / file).is_file():
                (range_test / file).replace(aside / file)
    return aside


def differing(theirs: dict[str, Any], ours: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What two fingerprints do not agree in, with both values; one without a key, perhaps older than that, counts as having it off."""
    return changed(theirs, ours)


def in_words(key: str, theirs: Any, ours: Any) -> str:
    """A difference of fingerprints for its reader, to whom hashes say nothing."""
    hashes = {
        "images": "pictures or captions",
        "prior.images": "prior pictures or their captions",
        "mask.images": "the pictures' masks",
        "model": "the model's weights",
        "model_settings": "the model's configs",
    }
    both = [theirs, ours]
    if key in ("prior", "mask"):
        key, both = {"prior": "prior pictures", "mask": "masks"}[key], [value and "some" for value in both]
    there, here = ("none" if value is None else value for value in both)
    return hashes.get(key) or f"{key} ({there} there, {here} here)"
