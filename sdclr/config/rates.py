"""The schema's sections on the learning rate and the length of training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sdclr.config.kinds import Count, Length, Rate, Section, Span, needed, parse_span, problem, problems

Policy = Literal["constant", "linear", "triangular", "triangular2", "exp_range", "welch", "hann", "everydream"]
CYCLIC = ("triangular", "triangular2", "exp_range", "welch", "hann", "everydream")


class Group(Section):
    """Some cycles whose height is scaled, for decayed phases."""

    cycles: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)]
    scale: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0


class ScheduleSection(Section):
    """The learning rate as a function of the optimizer step, in Smith's and torch's words (arXiv 1506.01186)."""

    policy: Policy = Field(
        "triangular",
        description="constant, linear (down to base_lr), triangular, triangular2 (half as high each cycle), exp_range (times gamma each step), welch, hann, or everydream (EveryDream2's unclamped cosine)",
    )
    base_lr: Rate = Field(0.0, description="rate at the troughs")
    max_lr: Rate | Literal["auto"] = Field(
        "auto", description="rate at the peaks; auto: from the newest range test that fits"
    )
    step_size: Length | None = Field(None, description="half a cycle, in steps or epochs (or give cycles)")
    cycles: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] | None = Field(
        None, description="number of cycles in the run (or give step_size)"
    )
    start: Literal["low", "peak"] = Field("low", description="where a cycle begins: low or peak")
    gamma: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="exp_range: factor a step on the height"
    )
    groups: tuple[Group, ...] | None = Field(
        None, description="decayed phases: [{cycles: 3, scale: 1}, {cycles: 2, scale: 0.5}]"
    )
    warmup: Annotated[int, Field(ge=0, le=1_000_000)] | Literal["auto"] | None = Field(
        None,
        description="linear warm-up in steps (constant, linear); everydream: steps, or auto for its own step_size/50",
    )
    allow_peak_end: bool = Field(
        False, description="accept a plan whose last step is nearer to the peak than to the trough"
    )

    @model_validator(mode="before")
    @classmethod
    def _everydream_starts_at_its_peak(cls, values: Any) -> Any:
        return (
            {"start": "peak", **values} if isinstance(values, dict) and values.get("policy") == "everydream" else values
        )

    @field_validator("max_lr")
    @classmethod
    def _max_is_above_base(cls, max_lr: float | str, info: ValidationInfo) -> float | str:
        base_lr = info.data.get("base_lr")
        if isinstance(max_lr, float) and max_lr == 0:
            raise problem("must be greater than 0 (at 0 nothing is learnt)")
        if (
            isinstance(max_lr, float)
            and base_lr is not None
            and max_lr <= base_lr
            and info.data.get("policy") != "constant"
        ):
            raise problem(f"must be greater than base_lr ({base_lr:g}); got {max_lr:g}")
        return max_lr

    @model_validator(mode="after")
    def _settings_belong_to_the_policy(self) -> ScheduleSection:
        p, cyclic = self.policy, self.policy in CYCLIC
        idle = f"has no effect with policy: {p}"
        lengths = [key for key in ("step_size", "cycles", "groups") if getattr(self, key) is not None]
        found: list[tuple[str | None, str]] = []
        if not cyclic:
            found += [(key, idle) for key in lengths]
            found += [("start", idle)] if self.start == "peak" else []
        if p in ("constant", "everydream") and self.base_lr > 0:
            found.append(
                ("base_lr", f"{idle} ({'the rate is max_lr' if p == 'constant' else 'its floor is always 0'})")
            )
        if p == "everydream" and self.start == "low":
            found.append(("start", "must be peak with policy: everydream (its cosine starts at the peak)"))
        if p == "everydream" and self.groups:
            found.append(("groups", idle))
        if cyclic and "cycles" in lengths and len(lengths) > 1:
            found.append(
                (
                    "cycles",
                    f"gives the schedule a second length beside {lengths[0] if lengths[0] != 'cycles' else lengths[1]}: keep one",
                )
            )
        if self.gamma is not None and p != "exp_range":
            found.append(("gamma", idle))
        if self.warmup is not None and cyclic and p != "everydream":
            found.append(("warmup", f"{idle} (a cycle that starts low warms up by itself)"))
        if self.warmup == "auto" and not cyclic:
            found.append(("warmup", f"'auto' is everydream's; give a number of steps with policy: {p}"))
        if found:
            raise problems(found)
        if cyclic and not lengths:
            raise needed(f"policy: {p} needs a length: cycles: 4, or step_size: '10 epochs', or groups", at="policy")
        if p == "exp_range" and self.gamma is None:
            raise needed("policy: exp_range needs gamma, for example 0.999", at="policy")
        return self


class TrainSection(Section):
    """How long to train."""

    steps: Length | Literal["auto"] = Field(
        "auto", description="800, or '200 epochs', or auto: from the range test and kappa"
    )
    kappa: Annotated[float, Field(gt=0, le=100)] = Field(
        1.0, description="exposure wished, in units of the best one: below 1 faithful, above 3 'fried'"
    )
    early_stop: Count | None = Field(None, description="stop after this many validations without a new best")

    @field_validator("steps", mode="before")
    @classmethod
    def _steps_or_auto(cls, steps: Any) -> Any:
        return steps if steps == "auto" else parse_span(steps)

    @field_validator("kappa")
    @classmethod
    def _kappa_is_used(cls, kappa: float, info: ValidationInfo) -> float:
        if kappa != 1.0 and isinstance(info.data.get("steps"), Span):
            raise problem(
                f"has no effect when train.steps is given ({info.data['steps']}); use steps: auto to plan by kappa"
            )
        return kappa
