"""The program as its user starts it: help, exit codes, and the one place where errors become messages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdclr import __version__, cli
from sdclr.cli import app, main

ROOT = Path(__file__).parent.parent
COMMANDS = ["range-test", "train", "sample", "init", "check", "compare"]
Program = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def sdclr() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The program as a user starts it."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sdclr", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)

    return run


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A config with two problems."""
    path = tmp_path / "bad.yaml"
    path.write_text("run: {name: a, sead: 3}\nmodel: {base: m}\ndata: {images: i}\nbatch: {size: 0}\n")
    return path


def test_help_names_every_command_and_every_exit_code(sdclr: Program) -> None:
    found = sdclr("--help")
    assert found.returncode == 0
    assert not found.stderr
    assert all(command in found.stdout for command in COMMANDS)
    for code in ("0 done", "1 the run failed", "2 the config", "3 inconclusive", "130/143"):
        assert code in " ".join(found.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(sdclr: Program, command: str) -> None:
    found = sdclr(command, "-h")
    assert found.returncode == 0
    assert command in found.stdout


def test_without_arguments_the_help_is_shown_and_the_exit_code_is_2(sdclr: Program) -> None:
    found = sdclr()
    assert found.returncode == 2
    assert "range-test" in found.stdout + found.stderr


def test_the_version_is_the_packages(sdclr: Program) -> None:
    assert sdclr("--version").stdout == f"sdclr {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["trian"], ["train"], ["train", "a.yaml", "--stpes", "3"], ["range-test", "a.yaml", "--max-minutes", "soon"]],
)
def test_a_wrong_command_line_exits_with_2_and_no_traceback(sdclr: Program, arguments: list[str]) -> None:
    found = sdclr(*arguments)
    assert found.returncode == 2
    assert found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("line", "at"),
    [
        ("range-test a.yaml --max-minutes 0", "--max-minutes"), ("range-test a.yaml --max-minutes nan", "--max-minutes"),
        ("range-test a.yaml --legacy linear --json", "--json"), ("train a.yaml --dry-run --resume", "--dry-run"),
        ("sample a.yaml --run b --checkpoint c", "--checkpoint"),
    ],
)  # fmt: skip
def test_an_option_that_would_be_ignored_is_refused(line: str, at: str) -> None:
    found = CliRunner().invoke(app, line.split())
    assert found.exit_code == 2
    assert f"Invalid value for {at}" in found.output


@pytest.mark.parametrize("command", ["range-test", "train", "sample", "check"])
def test_a_bad_config_exits_with_2_and_names_every_place_on_stderr_alone(
    sdclr: Program, bad: Path, command: str
) -> None:
    found = sdclr(command, bad)
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.splitlines() == [
        f"error: {bad}:1:16: run.sead is not a known key; did you mean seed?",
        f"error: {bad}:4:9: batch.size must be at least 1 or auto; got 0",
        "",
        f"hint: see every key with its meaning: sdclr init --stdout; then: sdclr check {bad}",
    ]


@pytest.mark.parametrize("command", ["range-test", "train", "sample", "check"])
def test_a_bad_config_is_refused_before_anything_heavy_is_imported(bad: Path, command: str) -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(sorted({m.split('.')[0] for m in sys.modules})))\n"
        f"sys.argv = ['sdclr', {command!r}, {str(bad)!r}]\n"
        "from sdclr.cli import main\n"
        "main()\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 2
    loaded = set(json.loads(found.stdout.replace("'", '"')))
    assert "pydantic" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "numpy", "scipy", "matplotlib", "PIL"}


def test_a_set_overrides_the_file_and_its_problem_is_shown_as_the_set(sdclr: Program, bad: Path) -> None:
    found = sdclr("check", bad, "--set", "batch.size=2", "--set", "train.stpes=3")
    assert "batch.size" not in found.stderr
    assert "error: --set train.stpes=3: train.stpes is not a known key; did you mean steps?" in found.stderr


def test_square_brackets_in_a_message_are_not_markup(sdclr: Program, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run: {name: '[bold]x[/]'}\nmodel: {base: m}\ndata: {images: i}\n")
    assert "got '[bold]x[/]'" in sdclr("check", tmp_path / "c.yaml").stderr


def run_main(monkeypatch: pytest.MonkeyPatch, raised: BaseException, *arguments: str) -> int:
    """The exit code of `sdclr init` whose command raises something."""

    def command(*arguments: object) -> None:
        raise raised

    monkeypatch.setattr("sdclr.commands.init.init", command)
    monkeypatch.setattr(sys, "argv", ["sdclr", "init", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("SdclrError", 1),
        ("InputError", 2),
        ("CheckpointError", 2),
        ("DivergenceError", 1),
        ("StorageError", 1),
        ("Inconclusive", 3),
    ],
)
def test_each_kind_of_error_has_its_exit_code_its_message_and_its_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: str, code: int
) -> None:
    from sdclr import errors

    assert run_main(monkeypatch, getattr(errors, error)("it broke", hint="mend it")) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: it broke" in err
    assert "hint: mend it" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_after_saving_exits_with_128_and_the_signals_number(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    from sdclr.errors import Interrupted

    assert run_main(monkeypatch, Interrupted("stopped", int(number))) == 128 + number


def test_ctrl_c_exits_with_130_and_our_own_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.strip() == "error: interrupted; what was finished has been kept"


def test_a_true_ctrl_c_ends_the_process_with_130_and_no_traceback() -> None:
    code = (
        "import os, signal, sys\n"
        "import sdclr.commands.init\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job of a shell inherits it ignored
        "sdclr.commands.init.init = lambda *a: os.kill(os.getpid(), signal.SIGINT) or [None for _ in iter(int, 1)]\n"
        "sys.argv = ['sdclr', 'init']\n"
        "from sdclr.cli import main\n"
        "main()\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert found.returncode == 130
    assert found.stdout == ""
    assert found.stderr == "error: interrupted; what was finished has been kept\n"


def test_an_error_of_ours_is_a_bug_and_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        run_main(monkeypatch, ZeroDivisionError())


def test_a_reader_that_stops_reading_ends_the_program_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    found = subprocess.run(
        [sys.executable, "-m", "sdclr", "init", "--stdout"], stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(write)
    assert found.returncode == 141
    assert found.stderr == ""


def test_the_config_that_init_prints_loads_again(sdclr: Program, tmp_path: Path, pictures: Path, model: Path) -> None:
    from sdclr.config.source import load

    found = sdclr("init", pictures, "--base", model, "--stdout")
    assert found.returncode == 0
    (tmp_path / "run.yaml").write_text(found.stdout)
    config = load(tmp_path / "run.yaml").config
    assert config.run.name == pictures.name
    assert config.data.images == pictures
    assert config.model.base == str(model)


def test_init_writes_a_file_once_and_never_overwrites(sdclr: Program, tmp_path: Path, pictures: Path) -> None:
    first = sdclr("init", pictures, "-o", tmp_path / "run.yaml")
    assert (first.returncode, first.stdout) == (0, f"{tmp_path / 'run.yaml'}\n")
    before = (tmp_path / "run.yaml").read_text()
    second = sdclr("init", pictures, "-o", tmp_path / "run.yaml")
    assert second.returncode == 2
    assert "exists already" in second.stderr
    assert (tmp_path / "run.yaml").read_text() == before


@pytest.mark.parametrize("name", ["my pictures", "-odd", "été", "[x]", "a+b@c", "...", "x" * 150])
def test_init_makes_a_sound_config_for_a_folder_of_any_name(sdclr: Program, tmp_path: Path, name: str) -> None:
    from sdclr.config.source import load

    folder = tmp_path / name
    folder.mkdir()
    found = sdclr("init", folder, "--stdout")
    assert found.returncode == 0, found.stderr
    (tmp_path / "run.yaml").write_text(found.stdout)
    assert load(tmp_path / "run.yaml").config.data.images == folder


@pytest.mark.parametrize("moment", ["PIL.Image.open", "sdclr.engine.encoding.look"])
def test_a_sigterm_while_pictures_are_read_is_no_damaged_picture(config, moment: str) -> None:
    place, _, name = moment.rpartition(".")
    code = (
        "import os, signal, sys\n"
        f"import {place} as where\n"
        f"real = where.{name}\n"
        f"where.{name} = lambda *a, **m: [os.kill(os.getpid(), signal.SIGTERM), real(*a, **m)][1]\n"
        f"sys.argv = ['sdclr', 'train', {str(config())!r}]\n"
        "from sdclr.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 143
    assert "stopped by SIGTERM; what was finished has been kept" in done.stderr
    assert "damaged" not in done.stderr and "cannot" not in done.stderr


@pytest.mark.parametrize("given", [None, *cli.ALLOCATOR])
@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_a_cards_memory_grows_in_place_unless_the_user_has_said_how(
    monkeypatch, given: str | None, platform: str
) -> None:
    for name in cli.ALLOCATOR:
        monkeypatch.setenv(name, "")  # put back after the test, whatever is set in it
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", platform)
    if given:
        monkeypatch.setenv(given, "max_split_size_mb:128")
    cli.set_environment()
    found = {name: os.environ[name] for name in cli.ALLOCATOR if name in os.environ}
    ours = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if platform == "linux" else {}
    assert found == ({given: "max_split_size_mb:128"} if given else ours)
