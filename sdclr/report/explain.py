"""A range test's answer at length, in plain words and with its own numbers: for a reader who knows neither Smith's paper nor this program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Paragraph = tuple[str, str]
"""Title and text."""


def range_test(result: dict[str, Any]) -> list[Paragraph]:
    """All that can be said of result.json alone: the answer, or why there is none and what would help."""
    return [*answer(result), *_no_answer(result)]


def answer(result: dict[str, Any]) -> list[Paragraph]:
    """What was measured, what exposure is, why the bracket is where it is, and what follows."""
    return [*_measured(result), *_exposure(result), *_ceiling(result), *_follows(result)]


def _measured(result: dict[str, Any]) -> Iterator[Paragraph]:
    gain = result["gain"]
    if gain is None:
        return
    share = gain["mean"] / gain["base_loss"]
    spread = (
        f"the spread between the pictures leaves {gain['low'] / gain['base_loss']:.1%} to {gain['high'] / gain['base_loss']:.1%} possible (95 %)"
        if gain["low"] is not None and gain["high"] is not None
        else "how much pictures differ, one alone cannot tell"
    )
    yield (
        "What was measured",
        (
            f"{gain['images']} held-out pictures, which no step is trained on, give the untouched model a loss of {gain['base_loss']:.4g}. Every state "
            "of the model is measured on the same noise at the same timesteps, so that two states differ by their training and not by luck. At its best, "
            f"slow training lowers that loss by {share:.1%}; {spread}."
        ),
    )


def _exposure(result: dict[str, Any]) -> Iterator[Paragraph]:
    best = result["best_exposure"]
    if best is None:
        return
    lr = best["lr"]
    yield (
        "Exposure, and how much of it is best",
        (
            f"Exposure is the sum of the learning rates of all steps. Training at {lr:.2g} had all but 2 % of its "
            f"gain at an exposure of {best['value']:.3g}: about {best['value'] / lr:,.0f} steps at that rate, or {best['value'] / (2 * lr):,.0f} at twice the "
            "rate, because below the ceiling it is the sum that counts. Had other pictures been held out, it would lie between "
            f"{best['interval'][0]:.3g} and {best['interval'][1]:.3g} (95 %, by resampling them). More exposure than this buys little, and soon learns the "
            "training pictures by heart. A single ramp of rising rates finds this number too, and calls the rate it happens to have there a bound."
        ),
    )


def _ceiling(result: dict[str, Any]) -> Iterator[Paragraph]:
    arms, ceiling, best = result["arms"], result["ceiling"], result["best_exposure"]
    if not arms:
        return
    arm = arms[0]
    text = (
        f"{len(arms)} arms at constant rates from {arm['lr']:.2g} to {arms[-1]['lr']:.2g} started from the untouched model, each with a fresh optimizer and the "
        "same pictures, noise and timesteps by step, and went to the same exposure (or for one step, where that is more). An arm's excess is what it lost there against slow training, "
        "as a share of what slow training had gained by then. "
    )
    text += "; ".join(_arm(arm) for arm in arms) + "."
    if ceiling and best:
        low, high = ceiling["bracket"]
        text += (
            f" Admissible is an arm that surely loses less than the tolerance (range_test.tolerance), or where that cannot be told at most half of it; "
            f"inadmissible one that surely loses more, is ragged, or no better than the untouched model. So the ceiling lies above {low:.2g}, the largest "
            f"admissible rate, and below {high:.2g}, the smallest inadmissible one; {ceiling['lr']:.2g} is where the excess, as a rising line through the arms, passes the tolerance."
        )
    yield "The ceiling", text


def _arm(arm: dict[str, Any]) -> str:
    if arm["excess"] is None:
        return f"{arm['lr']:.2g} broke the model"
    if arm["low"] is None or arm["high"] is None:
        return f"{arm['lr']:.2g}: {arm['excess']:+.0%}, {arm['verdict']}"
    return f"{arm['lr']:.2g}: {arm['excess']:+.0%} ({arm['low']:+.0%} to {arm['high']:+.0%}), {arm['verdict']}"


def _follows(result: dict[str, Any]) -> Iterator[Paragraph]:
    plan, best = result["recommended"], result["best_exposure"]
    if plan:
        cycles = (
            f"A run of {plan['cycles']:.3g} cycles between {plan['base_lr']:.2g} and"
            if plan["cycles"]
            else f"A run that is {plan['policy']}, its highest rate"
        )
        yield (
            "What follows",
            (f"{cycles} {plan['max_lr']:.2g}, half the ceiling, because a whole run meets the ceiling at every peak and should not live there; {plan['steps']} steps, because "
            f"so many collect κ times the best exposure of {best['value']:.3g} at this schedule's mean rate. Troughs are kept as states to choose from: earlier ones are more "
            "faithful to the base, later ones to the pictures."),
        )  # fmt: skip


def _no_answer(result: dict[str, Any]) -> Iterator[Paragraph]:
    for reason in result["reasons"]:
        yield "Why there is no answer", f"{reason['text']}. What would help: {reason['remedy']}."
