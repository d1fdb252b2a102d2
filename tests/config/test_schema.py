"""What the schema promises of values by themselves; impossible combinations are in tests/golden/errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sdclr.config.kinds import Section, Span, parse_span, show_span
from sdclr.config.rates import CYCLIC, ScheduleSection
from sdclr.config.schema import RunConfig

REQUIRED = {"run": {"name": "a"}, "model": {"base": "m"}, "data": {"images": "i"}}


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(REQUIRED | sections)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        (40, 40, "steps"), ("40", 40, "steps"), ("40 steps", 40, "steps"), ("1 step", 1, "steps"), ("1e3", 1000, "steps"), (1e3, 1000, "steps"),
        ("10 epochs", 10, "epochs"), ("1 epoch", 1, "epochs"), ("0.5 epochs", 0.5, "epochs"), (".5epoch", 0.5, "epochs"), (" 2  EPOCHS ", 2, "epochs"),
    ],
)  # fmt: skip
def test_a_span_is_a_number_of_steps_or_of_epochs(text: Any, value: float, unit: str) -> None:
    assert parse_span(text) == Span(value=value, unit=unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [0, -1, 1.5, "1.5 steps", "0 epochs", "", "epochs", "4 weeks", "1 2", True, None, [4], {"value": 3, "unit": "steps"}, float("nan"), float("inf"), 2e9, "9" * 400],
)  # fmt: skip
def test_what_is_no_positive_whole_number_of_steps_nor_epochs_is_no_span(text: Any) -> None:
    with pytest.raises(ValidationError, match="must be a"):
        config(validation={"every": text})


@given(
    st.one_of(
        st.builds(Span, value=st.integers(1, 10**7), unit=st.just("steps")),
        st.builds(Span, value=st.floats(1e-6, 1e7), unit=st.just("epochs")),
    )
)
def test_a_span_as_it_is_shown_in_a_config_is_the_same_span(span: Span) -> None:
    assert parse_span(show_span(span)) == span


@pytest.mark.parametrize(
    ("text", "per_epoch", "steps"),
    [("10 epochs", 4.0, 40), ("1 epoch", 2.5, 2), ("3 epochs", 2.5, 8), (7, 100.0, 7), ("0.01 epochs", 4.0, 1)],
)
def test_a_span_in_steps_is_rounded_and_at_least_one(text: Any, per_epoch: float, steps: int) -> None:
    assert parse_span(text).in_steps(per_epoch) == steps


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    read = config(run={"name": "a", "output_dir": "~/runs"}, model={"base": "~/sd"}, data={"images": "~/cats"})
    assert read.run.output_dir == Path("/home/someone/runs")
    assert read.model.base == "/home/someone/sd"
    assert read.data.images == Path("/home/someone/cats")


def sections() -> list[type[BaseModel]]:
    return [field.annotation for field in RunConfig.model_fields.values() if isinstance(field.annotation, type)]


def test_every_section_is_frozen_and_forbids_unknown_keys() -> None:
    assert len(sections()) == len(RunConfig.model_fields) == 15
    for section in sections():
        assert issubclass(section, Section)
        assert section.model_config["frozen"]
        assert section.model_config["extra"] == "forbid"
    with pytest.raises(ValidationError, match="frozen"):
        config().run.seed = 3


@pytest.mark.parametrize("policy", CYCLIC)
@pytest.mark.parametrize("length", [{"cycles": 4}, {"step_size": 40}, {"step_size": "10 epochs"}])
def test_every_cyclic_policy_takes_its_length_in_either_way(policy: str, length: dict[str, Any]) -> None:
    gamma = {"gamma": 0.99} if policy == "exp_range" else {}
    assert config(schedule={"policy": policy, **length, **gamma}).schedule.policy == policy


@pytest.mark.parametrize("policy", ["constant", "linear"])
def test_a_policy_without_cycles_takes_no_length(policy: str) -> None:
    assert config(schedule={"policy": policy, "max_lr": 1e-6}).schedule.cycles is None
    with pytest.raises(ValidationError, match=f"has no effect with policy: {policy}"):
        config(schedule={"policy": policy, "max_lr": 1e-6, "cycles": 3})


def test_everydream_starts_at_its_peak_without_being_told() -> None:
    assert ScheduleSection(policy="everydream", cycles=3).start == "peak"
    assert ScheduleSection(policy="triangular", cycles=3).start == "low"


def test_a_run_without_validation_keeps_no_best_state() -> None:
    assert config().checkpoint.best is True
    assert config(validation={"fraction": 0}).checkpoint.best is False


def test_exp_range_needs_its_gamma() -> None:
    with pytest.raises(ValidationError, match="needs gamma"):
        config(schedule={"policy": "exp_range", "cycles": 3})


@pytest.mark.parametrize("name", ["mochi", "mochi-2_b.v1@home+x", "2024", "été", "猫"])
def test_a_plain_folder_name_names_a_run(name: str) -> None:
    assert config(run={"name": name}).folder.name == name


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "-a", ".a", "a b", "a\n", "a\\b", "x" * 101])
def test_a_name_that_would_leave_or_hide_the_folder_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        config(run={"name": name})


@pytest.mark.parametrize("value", [8 * 13, 512, 32])
def test_a_resolution_is_a_multiple_of_eight(value: int) -> None:
    assert config(data={"images": "i", "resolution": value}).data.resolution == value
    with pytest.raises(ValidationError, match="must be a multiple of 8"):
        config(data={"images": "i", "resolution": value + 4})


@pytest.mark.parametrize("key", ["betas", "eps", "momentum"])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_a_setting_of_another_optimizer_is_refused(key: str, name: str) -> None:
    value = {"betas": [0.8, 0.9], "eps": 1e-6, "momentum": 0.5}[key]
    if {"betas": "adamw", "eps": "adamw", "momentum": "sgd"}[key] == name:
        assert getattr(config(optimizer={"name": name, key: value}).optimizer, key) == (
            tuple(value) if isinstance(value, list) else value
        )
    else:
        with pytest.raises(ValidationError, match="has no effect"):
            config(optimizer={"name": name, key: value})


def leaves(model: type[BaseModel], at: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from leaves(inner, f"{at}{name}.")
        else:
            yield f"{at}{name}", field


def words_of(annotation: Any) -> set[str]:
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return {word for part in get_args(annotation) for word in words_of(part)}


@pytest.mark.parametrize(("key", "field"), leaves(RunConfig), ids=lambda value: value if isinstance(value, str) else "")
def test_what_may_stand_at_a_key_is_told_beside_it(key: str, field: FieldInfo) -> None:
    assert field.description, f"{key} does not say what it is"
    said = set(re.findall(r"\w+", field.description))
    assert not words_of(field.annotation) - said, f"{key} does not say what else it may be"
