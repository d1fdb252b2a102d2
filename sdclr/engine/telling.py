"""A plan in words: as rows of a table, and as cautions where it goes beyond what was measured or what the user may have meant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sdclr.config.pictures import number_before
from sdclr.config.schema import RunConfig
from sdclr.data.batches import Inputs
from sdclr.data.dataset import shape_for
from sdclr.data.pairs import Pair, printable
from sdclr.engine.plan import Plan

MUCH_IS_SEEN = 0.9
"""Squares that show more than this of the pictures are not worth a word."""
ENLARGED = 1.25
"""Pictures that are resized by less than this are as good as large enough."""


def describe(config: RunConfig, inputs: Inputs, plan: Plan | None) -> list[tuple[str, str]]:
    """The plan as (name, words) rows."""
    split, b = inputs.split, inputs.batches
    rows = [
        ("images", f"{len(split.train)} to train on, {len(split.validation)} held out" + ("" if split.validation else " (validation is off: validation.fraction is 0)")),
        ("batch", f"{b.samples_per_step} samples a step; {b.steps_per_epoch:.4g} steps an epoch"),
    ]  # fmt: skip
    subject = (*split.train, *split.validation)
    rows[1:1] = [*_captions(subject), *_tags(config), *_repeats(config, inputs), *_cuts(config, subject), *_masks(config, subject)]  # fmt: skip
    if inputs.prior:
        rows.append(("prior", f"{len(inputs.prior)} pictures of {config.prior.images}: a step takes {b.samples_per_step} of them too, weighted {config.prior.weight:g}"))  # fmt: skip
        rows += [(f"prior {name}", words) for name, words in (*_captions(inputs.prior), *_cuts(config, inputs.prior))]
    if config.lora.rank:
        rows.append(("trained", f"a LoRA of rank {config.lora.rank}, alpha {config.lora.alpha:g}, beside the {config.lora.layers} matrices"))  # fmt: skip
    if plan is None:
        return rows
    s = plan.schedule
    shape = s.policy
    if s.half_cycle:
        shape += f", {s.cycles:.4g} cycles of {2 * s.half_cycle:.4g} steps, starting {s.start}"
    rates = s.rates()
    lowest = f"{rates.min():.3g} to " if rates.min() < rates.max() else ""
    kappa = f" (κ = {plan.kappa:.2f}, best {plan.best_exposure:.3g})" if plan.kappa else ""
    return [
        *rows,
        ("steps", f"{plan.steps} ({plan.steps / b.steps_per_epoch:.4g} epochs)"),
        ("schedule", shape),
        ("learning rate", f"{lowest}{rates.max():.3g}; the last step is at {s(plan.steps - 1):.3g}"),
        ("exposure", f"{plan.exposure:.3g}{kappa}"),
        ("validation", f"every {plan.validate_every} steps" if split.validation else "off"),
        *_drawn(config, plan),
        ("from", str(plan.source) if plan.source else "the config alone (no range test is needed)"),
    ]


def _drawn(config: RunConfig, plan: Plan) -> list[tuple[str, str]]:
    """How many pictures are drawn while training, if any are."""
    if not config.sample.at_troughs:
        return []
    troughs, each = len(plan.schedule.troughs()), len(config.sample.prompts) * len(config.sample.seeds)
    return [("pictures", f"{(1 + troughs) * each} are drawn while it trains: of the base and {troughs} troughs, {each} each")]  # fmt: skip


def cautions(config: RunConfig, plan: Plan) -> list[str]:
    """What the user may not have meant, though it can be done."""
    found, s = [], plan.schedule
    if plan.ceiling and s.max_lr > plan.ceiling:
        times = s.max_lr / plan.ceiling
        found.append(
            f"schedule.max_lr {s.max_lr:.3g} is {times:.{1 if times < 10 else 0}f} times the ceiling of {plan.ceiling:.3g} that {plan.source} has measured"
        )
    if config.train.steps == "auto" and plan.kappa and not 0.8 < plan.kappa / config.train.kappa < 1.25:
        found.append(
            f"the plan comes to κ = {plan.kappa:.2f}, and train.kappa is {config.train.kappa:g}: at peaks of {s.max_lr:.3g} whole cycles of these few steps come no nearer"
        )
    if s.policy in ("constant", "linear") and s.warmup >= plan.steps:
        found.append(
            f"schedule.warmup of {s.warmup} steps does not end within the run of {plan.steps}: max_lr is never reached"
        )
    return found


def _captions(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """Where captions come from, if some are names."""
    named = [pair for pair in pairs if pair.by_name]
    if not named:
        return []
    example = printable(f'{named[0].path.name}: "{named[0].caption}"')
    return [("captions", f"{len(pairs) - len(named)} from files, {len(named)} from the pictures' names ({example})")]


def _repeats(config: RunConfig, inputs: Inputs) -> list[tuple[str, str]]:
    """How often pictures come in an epoch, where it is not once; and that the folders' names do not say it here."""
    repeats, train = config.data.repeats, inputs.split.train
    if repeats:
        listed = ", ".join(f"{name} {times} times" for name, times in repeats.items())
        return [("repeats", f"{listed}: an epoch takes {inputs.batches.samples_per_epoch} samples of {len(train)} pictures")]  # fmt: skip
    folders = {pair.key.partition("/")[0] for pair in (*train, *inputs.split.validation) if "/" in pair.key}
    numbered = sorted(filter(number_before, folders))
    if not numbered:
        return []
    example = f"{{{numbered[0]}: {number_before(numbered[0])}}}"
    return [("repeats", f"none: numbers in names of folders ({', '.join(numbered[:3])}) are not read; data.repeats: {example} is how to say it")]  # fmt: skip


def _tags(config: RunConfig) -> list[tuple[str, str]]:
    """In how many orders tags are read."""
    data = config.data
    if data.tag_orders == 1:
        return []
    kept = f"; the first {data.keep_tags} stay where they are" if data.keep_tags else ""
    return [("tags", f"in {data.tag_orders} orders, of which each sample draws one{kept}")]


def _masks(config: RunConfig, pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """How many pictures are masked, and what that means."""
    if not config.mask.images:
        return []
    by = "their transparency" if config.mask.of_transparency else f"their masks in {config.mask.images}"
    masked = sum(pair.mask is not None for pair in pairs)
    return [("masks", f"{masked} of {len(pairs)} pictures count by {by}; the rest of each weighs {config.mask.outside:g}")]  # fmt: skip


def _cuts(config: RunConfig, pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """What the pictures are cut to, of squares only where that takes much away; and which are too small."""
    data = config.data
    sizes = [pair.size for pair in pairs]
    shapes, buckets = (
        [shape_for(*size, data.resolution, aspect) for size in sizes] for aspect in (data.aspect, "buckets")
    )
    seen, in_buckets = (
        sum(shape.keeps(*size) for shape, size in zip(cut, sizes, strict=True)) / len(sizes)
        for cut in (shapes, buckets)
    )
    rows = []
    if data.aspect == "buckets":
        listed = ", ".join(f"{n} of {shape.width}×{shape.height}" for shape, n in Counter(shapes).most_common())
        rows.append(("shapes", f"{listed}: {seen:.0%} of the pictures is seen"))
    elif seen <= MUCH_IS_SEEN:
        rows.append(
            (
                "shapes",
                f"squares, which show {seen:.0%} of the pictures; data.aspect: buckets would show {in_buckets:.0%}",
            )
        )
    enlarged = [factor for shape, size in zip(shapes, sizes, strict=True) if (factor := shape.scale(*size)) > ENLARGED]
    if enlarged:
        rows.append(
            (
                "enlarged",
                f"{len(enlarged)} of {len(sizes)} pictures, up to {max(enlarged):.2g} times: they are smaller than what is trained on, and will look soft",
            )
        )
    return rows
