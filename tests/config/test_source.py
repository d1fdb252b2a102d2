"""Reading a config: every kind of problem with its place, all at once; and what is written reads back the same."""

from __future__ import annotations

import math
import random
import shlex
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdclr.commands.init import commented
from sdclr.config.kinds import Span
from sdclr.config.schema import RunConfig
from sdclr.config.source import dump, dump_value, load, scalar
from sdclr.errors import ConfigError

GOLDEN = Path(__file__).parent.parent / "golden" / "errors"
ROOT = Path(__file__).parent.parent.parent
SOUND = "run: {name: a}\nmodel: {base: m}\ndata: {images: i}\n"


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """read(text or bytes, *overrides) -> LoadedConfig, of a file called c.yaml."""
    monkeypatch.chdir(tmp_path)

    def run(text: str | bytes, *overrides: str) -> Any:
        Path("c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load("c.yaml", overrides)

    return run


@pytest.fixture
def problems(read: Any) -> Any:
    """problems(text, *overrides) -> the whole list of messages."""

    def run(text: str | bytes, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            read(text, *overrides)
        return caught.value.problems

    return run


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.yaml")))
def test_the_whole_list_of_problems_is_the_golden_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    with pytest.raises(ConfigError) as caught:
        load(f"{name}.yaml")
    assert str(caught.value).splitlines() == (GOLDEN / f"{name}.txt").read_text().splitlines()
    assert caught.value.exit_code == 2
    assert caught.value.hint or name in (
        "alias",
        "anchors",
        "indented",
        "list",
        "nested",
        "tabs",
        "two-documents",
        "unclosed",
    )


def test_every_golden_message_belongs_to_a_golden_config() -> None:
    assert {p.stem for p in GOLDEN.glob("*.txt")} == {p.stem for p in GOLDEN.glob("*.yaml")}
    assert len(list(GOLDEN.glob("*.yaml"))) > 25


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("1E+3", 1000.0), ("-2.5e-3", -2.5e-3), (".5", 0.5), ("3.", 3.0), ("012", 12), ("-7", -7), ("+7", 7),
        ("off", "off"), ("on", "on"), ("yes", "yes"), ("no", "no"), ("y", "y"), ("true", True), ("False", False),
        ("null", None), ("~", None), ("", None), ("1_000", "1_000"), ("0x1f", "0x1f"), ("12:30", "12:30"), ("2024-01-02", "2024-01-02"),
        (".inf", math.inf), ("-.INF", -math.inf), ("inf", "inf"), ("nan", "nan"), ("1e", "1e"), ("e5", "e5"), ("1.2.3", "1.2.3"),
    ],
)  # fmt: skip
def test_a_plain_scalar_means_what_yaml_1_2_says(text: str, value: Any) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_a_plain_nan_is_not_a_number() -> None:
    assert math.isnan(scalar(".nan"))


def test_an_integer_too_long_for_python_to_read_is_still_a_number() -> None:
    assert scalar("9" * 5000) == math.inf


def test_rates_in_the_files_notation_are_numbers_and_off_is_a_name(read: Any) -> None:
    config = read(
        "run: {name: off}\nmodel: {base: m}\ndata: {images: i}\nschedule: {base_lr: 1e-7, max_lr: 1e-6, cycles: 2}\n"
    ).config
    assert (config.schedule.base_lr, config.schedule.max_lr) == (1e-7, 1e-6)
    assert config.run.name == "off"


def test_quotes_make_a_number_text(read: Any) -> None:
    assert read("run: {name: \"2024\"}\nmodel: {base: '1e-6'}\ndata: {images: i}\n").config.run.name == "2024"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_a_byte_order_mark_and_any_line_ends_change_no_value_and_no_place(
    read: Any, problems: Any, mark: bytes, end: str
) -> None:
    sound = SOUND.replace("\n", end).encode()
    assert read(mark + sound).config == read(SOUND).config
    assert problems(mark + sound + f"batch: {{size: 0}}{end}".encode()) == [
        "c.yaml:4:9: batch.size must be at least 1 or auto; got 0"
    ]
    assert problems(mark + b"runs: 3" + end.encode() + sound)[0].startswith(
        "c.yaml:1:1: runs is not a known key; did you mean run?"
    )


def test_latin_1_bytes_are_refused_with_their_place_in_the_file(problems: Any) -> None:
    assert problems(b"run: {name: caf\xe9}\n") == ["c.yaml: is not UTF-8 text (byte 15)"]


@pytest.mark.parametrize("text", ["run: {name: a}\nx: \x07\n", "run: {name: a}\nx: \x00\n"], ids=["bell", "NUL"])
def test_a_control_character_is_refused_at_its_place(problems: Any, text: str) -> None:
    assert problems(text) == [f"c.yaml:2:4: not YAML: a character that text cannot hold ({text[-2]!r})"]


@pytest.mark.parametrize("escape", ["\\0", "\\ud800"])
def test_an_escaped_character_that_no_file_can_hold_is_refused(problems: Any, escape: str) -> None:
    assert problems(SOUND + f'sample: {{negative_prompt: "x{escape}"}}\n') == [
        "c.yaml:4:10: sample.negative_prompt holds a character that no file can hold"
    ]


def test_a_missing_file_a_folder_and_a_huge_file_are_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("huge.yaml").write_text("# " + 1_000_000 * "x")
    for name, message in (
        ("no.yaml", "there is no such config file"),
        ("folder", "is not a file"),
        ("huge.yaml", "is 1,000,002 bytes long, a config has at most 1,000,000"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(name)
        assert caught.value.problems == [f"{name}: {message}"]
        command = "folder --output folder.yaml" if name == "folder" else f"path/to/images --output {name}"
        assert f"sdclr init {command}" in str(caught.value.hint)


def test_a_config_of_too_many_nodes_is_refused(problems: Any) -> None:
    assert "too long for a config" in problems("a: [" + "1, " * 20_001 + "]")[0]


def test_aliases_that_would_expand_to_billions_are_refused_unexpanded(problems: Any) -> None:
    text = "a: &a [x, x]\n" + "".join(
        f"{c}: &{c} [*{chr(ord(c) - 1)}, *{chr(ord(c) - 1)}]\n" for c in "bcdefghijklmnopqrstuvwxyz"
    )
    assert problems(text) == ["c.yaml:1:4: anchors and aliases (& and *) are not used in configs: write the value out"]


def test_an_empty_optional_section_means_its_defaults(read: Any) -> None:
    assert read(SOUND + "loss:\nschedule:\nsample: ~\n").config == read(SOUND).config


@pytest.mark.parametrize("text", [SOUND + "batch: {sise: 4}\n", "batch: {size: 4, sise: 4}\n" + SOUND])
def test_the_place_is_the_problems_wherever_its_section_stands(problems: Any, text: str) -> None:
    line = text.splitlines().index(next(row for row in text.splitlines() if "sise" in row))
    column = text.splitlines()[line].index("sise")
    assert problems(text) == [f"c.yaml:{line + 1}:{column + 1}: batch.sise is not a known key; did you mean size?"]


def test_problems_come_in_the_order_of_the_file(problems: Any) -> None:
    places = [
        tuple(map(int, line.split(":")[1:3]))
        for line in problems("zz: 1\nrun: {nam: x}\nbatch: {size: 0}\nmodel: 3\ndata: {images: 3}\n")
    ]
    assert places == sorted(places)
    assert len(places) == 6


def test_set_writes_one_key_over_the_file_and_makes_missing_sections(read: Any) -> None:
    config = read(
        SOUND, "run.name=b", "train.steps=10 epochs", "sample.prompts=[x, y]", "model.config=", "data.flip = true"
    ).config
    assert config.run.name == "b"
    assert config.train.steps == Span(value=10, unit="epochs")
    assert config.sample.prompts == ("x", "y")
    assert config.data.flip
    assert config.data.images == Path("i")


def test_a_command_in_a_hint_says_every_set_as_it_was_typed(read: Any) -> None:
    typed = read(SOUND, "run.name=b", "sample.prompts=[x, it's y]").typed
    assert typed == """c.yaml --set run.name=b --set 'sample.prompts=[x, it'"'"'s y]'"""
    assert shlex.split(typed) == ["c.yaml", "--set", "run.name=b", "--set", "sample.prompts=[x, it's y]"]


def test_the_last_set_of_a_key_wins_and_cures_the_file(read: Any) -> None:
    assert (
        read("run: {name: [1]}\nmodel: {base: m}\ndata: {images: i}\n", "run.name=b", "run.name=c").config.run.name
        == "c"
    )


def test_every_problem_of_a_set_is_shown_as_the_set_and_before_the_files(problems: Any) -> None:
    found = problems(
        SOUND + "batch: {size: 0}\n",
        "run.nam=4", "validation.fraction=2", "run.name.first=3", "foo", "=3", "train.steps=[", "optimizer={name: adamw, etas: 3}",
        "optimiser.name=sgd",
        "loss.noise_offset=1\nloss.min_snr_gamma: 5",
    )  # fmt: skip
    assert found[-1] == "c.yaml:4:9: batch.size must be at least 1 or auto; got 0"
    assert set(found[:-1]) == {
        "--set run.nam=4: run.nam is not a known key; did you mean name?",
        "--set validation.fraction=2: validation.fraction must be less than 1; got 2",
        "--set run.name.first=3: run.name.first goes into name, which is a value and not a section",
        "--set foo: must look like section.key=value, for example --set train.steps=800",
        "--set =3: must look like section.key=value, for example --set train.steps=800",
        "--set train.steps=[: not YAML: expected the node content, but found '<stream end>' (while parsing a flow node)",
        "--set optimizer={name: adamw, etas: 3}: optimizer.etas is not a known key; did you mean betas?",
        "--set loss.noise_offset=1\nloss.min_snr_gamma: 5: sets one key; give --set once for each",
        "--set optimiser.name=sgd: optimiser is not a known key; did you mean optimizer?",
    }


def test_a_combination_made_impossible_by_a_set_is_shown_at_the_set(problems: Any) -> None:
    text = SOUND + "schedule: {max_lr: 1e-6, cycles: 4}\n"
    assert problems(text, "schedule.step_size=40") == [
        "c.yaml:4:26: schedule.cycles gives the schedule a second length beside step_size: keep one"
    ]
    assert problems(text, "schedule.max_lr=0") == [
        "--set schedule.max_lr=0: schedule.max_lr must be greater than 0 (at 0 nothing is learnt)"
    ]


def test_a_problem_that_only_the_data_show_is_placed_at_its_key_or_section_or_file(read: Any) -> None:
    loaded = read(SOUND + "batch: {size: 3}\nschedule: {cycles: 3}\n", "train.steps=4")
    assert loaded.problem("batch.size", "is too much") == "c.yaml:4:9: batch.size is too much"
    assert loaded.problem("schedule.max_lr", "is odd") == "c.yaml:5:1: schedule.max_lr is odd"
    assert loaded.problem("train.steps", "are few") == "--set train.steps=4: train.steps are few"
    assert loaded.problem("loss.noise_offset", "x") == "c.yaml:1:1: loss.noise_offset x"


def test_the_template_of_init_loads_and_is_all_defaults(read: Any) -> None:
    given = {"run.name": "a", "model.base": "m", "data.images": "i", "schedule.cycles": 4}
    assert read(commented(given)).config == read(SOUND).config


def test_the_demos_config_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert load("configs/demo.yaml").config.folder == Path("runs/mochi")


# Random valid configs.

ODD = [
    "off",
    "1e-6",
    "null",
    "~",
    "",
    "a: b",
    "# x",
    "- x",
    "'",
    '"',
    "\t",
    "\x85",
    "\u2028",
    "\ufeff",
    "x\ny",
    "&a",
    "*a",
    "!x",
    "2024-01-01",
    "012",
    ".nan",
    "=",
]
TEXT = st.one_of(
    st.sampled_from(ODD), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
)
SPAN = st.one_of(
    st.integers(1, 10**6).map(lambda n: Span(value=n, unit="steps")),
    st.floats(1e-3, 1e6).map(lambda x: Span(value=x, unit="epochs")),
)
RATE = st.floats(1e-9, 1)


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    policy = draw(
        st.sampled_from(["constant", "linear", "triangular", "triangular2", "exp_range", "welch", "hann", "everydream"])
    )
    values: dict[str, Any] = {
        "policy": policy,
        "max_lr": draw(st.one_of(st.just("auto"), RATE)),
        "allow_peak_end": draw(st.booleans()),
    }
    cyclic = policy not in ("constant", "linear")
    if policy not in ("constant", "everydream") and draw(st.booleans()) and values["max_lr"] != "auto":
        values["base_lr"] = values["max_lr"] * draw(st.floats(0, 0.9))
    if cyclic:
        length = draw(
            st.sampled_from(["step_size", "cycles", "groups"] if policy != "everydream" else ["step_size", "cycles"])
        )
        made = {"step_size": SPAN, "cycles": st.floats(0.1, 1000), "groups": st.lists(st.builds(lambda c, s: {"cycles": c, "scale": s}, st.floats(0.1, 100), st.floats(0.01, 1)), min_size=1, max_size=3)}  # fmt: skip
        values[length] = draw(made[length])  # type: ignore[attr-defined]
        if policy != "everydream":
            values["start"] = draw(st.sampled_from(["low", "peak"]))
    if policy == "exp_range":
        values["gamma"] = draw(st.floats(0.1, 1))
    if not cyclic or policy == "everydream":
        values["warmup"] = draw(
            st.one_of(st.none(), st.integers(0, 1000), *([st.just("auto")] if policy == "everydream" else []))
        )
    return values


PLACE = TEXT.filter(lambda text: not text.startswith("~"))
"""A path that is no user's home."""


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    def some(**strategies: st.SearchStrategy[Any]) -> dict[str, Any]:
        return {key: draw(value) for key, value in strategies.items() if draw(st.booleans())}

    blind = draw(st.booleans())
    steps = draw(st.one_of(st.just("auto"), SPAN))
    return RunConfig.model_validate(
        {
            "run": {"name": draw(st.text(string.ascii_letters + string.digits + "_é", min_size=1, max_size=12)), **some(seed=st.integers(0, 2**53), tensorboard=st.booleans(), output_dir=PLACE.map(Path))},
            "model": {"base": draw(PLACE.filter(lambda t: t and not t.endswith(".safetensors"))), **some(train=st.sampled_from([["unet"], ["unet", "text_encoder"]]))},
            "data": {"images": Path(draw(PLACE)), **some(resolution=st.integers(4, 512).map(lambda n: 8 * n), flip=st.booleans(), caption=st.one_of(st.none(), TEXT), caption_dropout=st.floats(0, 1))},
            "prior": {"images": Path(draw(PLACE)), **some(weight=st.floats(0.01, 10), caption=TEXT)} if draw(st.booleans()) else {},
            "validation": {"fraction": 0 if blind else draw(st.floats(0, 0.99)), **some(every=SPAN)},
            "optimizer": some(weight_decay=st.floats(0, 1), eps=st.floats(1e-12, 1), max_grad_norm=st.one_of(st.none(), st.floats(0.1, 10))),
            "loss": some(min_snr_gamma=st.one_of(st.none(), st.floats(1, 10)), noise_offset=st.floats(0, 1)),
            "batch": some(size=st.integers(1, 64), accumulate=st.integers(1, 64)),
            "range_test": some(lr=st.one_of(st.none(), st.tuples(st.floats(1e-9, 1e-5), st.floats(1e-4, 1))), tolerance=st.floats(0.01, 0.9)),
            "schedule": draw(schedules()),
            "train": {"steps": steps, **(some(kappa=st.floats(0.1, 10)) if steps == "auto" else {})},
            "checkpoint": some(at_troughs=st.booleans(), every=st.one_of(st.none(), SPAN), keep_last=st.integers(1, 9)),
            "sample": some(prompts=st.lists(TEXT, min_size=1, max_size=3), negative_prompt=TEXT, guidance=st.floats(1, 20)),
        }
    )  # fmt: skip


def test_the_home_of_a_user_that_is_not_there_is_refused_at_its_place(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for line, model, images in ((3, tmp_path, "~no-such-user-0/pictures"), (2, "~no-such-user-0/model", tmp_path)):
        path.write_text(f"run: {{name: a}}\nmodel: {{base: '{model}'}}\ndata: {{images: '{images}'}}\n")
        with pytest.raises(ConfigError, match=rf"run\.yaml:{line}.*no-such-user-0"):
            load(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs())
def test_what_dump_writes_load_reads_back_the_same(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(dump(config), encoding="utf-8", newline="")
    assert load(path).config == config
    assert dump(load(path).config) == dump(config)


@settings(max_examples=100, deadline=None)
@given(text=TEXT.filter(lambda t: "\n" not in t))
def test_a_dumped_value_stands_in_a_config_as_the_same_value(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "value.yaml"
    path.write_text(f"{SOUND}sample: {{negative_prompt: {dump_value(text)}}}\n", encoding="utf-8", newline="")
    assert load(path).config.sample.negative_prompt == text


def mutated(text: str, rng: random.Random) -> str:
    """The text after one to four small accidents."""
    bits = ["{", "}", "[", "]", ":", ": ", "\t", "'", '"', "&a ", "*a", "!!int ", "- ", "? ", "| ", "> ", "%", "@", "#", "\x00", "\u2028", "é", "🙂", "---\n", "...\n", "1e999", "-1", ".nan", "null", "<<: ", "9" * 400, "\\", "auto", "\r"]  # fmt: skip
    for _ in range(rng.randint(1, 4)):
        at, end = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:at] + rng.choice(bits) + text[at:]
        elif kind == 1:
            text = text[:at] + text[min(end, at + 5) :]
        elif kind == 2:
            text = text[:at] + text[at : at + 40] + text[at:]
        elif kind == 3:
            lines = text.splitlines(keepends=True)
            rng.shuffle(lines)
            text = "".join(lines)
        else:
            words = text.split(" ")
            words[rng.randrange(len(words))] = rng.choice(bits)
            text = " ".join(words)
    return text


def test_of_300_damaged_configs_each_loads_or_is_a_config_error_with_a_place(read: Any) -> None:
    rng = random.Random(1)
    demo = (ROOT / "configs" / "demo.yaml").read_text()
    whole = commented({"run.name": "a", "model.base": "m", "data.images": "i", "schedule.cycles": 4})
    refused = 0
    for i in range(300):
        text = mutated(demo if i % 2 else whole, rng)
        try:
            assert isinstance(read(text).config, RunConfig)
        except ConfigError as error:
            refused += 1
            assert error.problems, text
            assert all(problem.startswith("c.yaml:") for problem in error.problems), text
            assert all("\n" not in problem for problem in error.problems), text
    assert 150 < refused < 300


def test_other_trainers_words_lead_to_keys_that_there_are():
    from sdclr.config.elsewhere import KEYS

    for theirs, ours in KEYS.items():
        section, _, key = ours.partition(":")[0].partition(".")
        assert key in RunConfig.model_fields[section].annotation.model_fields, (theirs, ours)
        assert theirs not in RunConfig.model_fields


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("learning_rate: 1e-4", "learning_rate is not a known key; did you mean schedule.max_lr?"),
        (
            "train: {max_train_epochs: 5}",
            "train.max_train_epochs is not a known key; did you mean train.steps: 10 epochs?",
        ),
        ("network_dim: 8", "did you mean lora.rank?"),
        ("lr: 1e-4", "lr is not a known key; did you mean schedule.max_lr or range_test.lr?"),
        ("caption_dropout: 0.1", "caption_dropout is not a known key; did you mean data.caption_dropout?"),
        ("train: {max_lr: 1}", "did you mean schedule.max_lr?"),
        ("model: {base: m, resolution: 512}", "model.resolution is not a known key; did you mean data.resolution?"),
        ("run: {name: a, steps: 3}", "run.steps is not a known key; did you mean train.steps or sample.steps?"),
    ],
)
def test_a_key_of_another_place_or_program_is_known_there(tmp_path, given, said):
    sections = {"run": "run: {name: a}", "model": "model: {base: m}", "data": "data: {images: i}"}
    sections[given.partition(":")[0]] = given
    (tmp_path / "c.yaml").write_text("\n".join(sections.values()))
    with pytest.raises(ConfigError) as problem:
        load(tmp_path / "c.yaml")
    assert said in str(problem.value)
