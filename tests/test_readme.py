"""What the README says a reader can type or open is there, and its fault table is what the harness wrote last."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from sdclr.cli import app
from sdclr.config.schema import RunConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def mentioned(pattern: str) -> list[str]:
    found = sorted(set(re.findall(pattern, README)))
    assert found, f"the README has nothing like {pattern}"
    return found


@pytest.mark.parametrize("target", mentioned(r"make ([a-z-]+)"))
def test_a_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", mentioned(r"(?:^|`)sdclr ([a-z-]+[^`\n#]*)"))
def test_a_command_exists_with_its_options(line):
    name, *words = shlex.split(line)
    options = {option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("-"):
            assert word in options


@pytest.mark.parametrize("path", mentioned(r"(?:!\[[^\]]*\]\(|`)((?:data|configs|tests)/[\w./-]+)"))
def test_a_file_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("key", mentioned(rf"`((?:{'|'.join(RunConfig.model_fields)})\.[a-z_]+)`"))
def test_a_key_is_one_of_the_config(key):
    section, name = key.split(".")
    annotation = RunConfig.model_fields[section].annotation
    assert name in annotation.model_fields  # type: ignore[union-attr]


def test_the_fault_table_is_the_last_run_of_the_harness():
    results = json.loads((ROOT / "tests" / "faults" / "results.json").read_text())
    table = dict(
        re.findall(
            r"^\| ((?:damage|disk|input|kills|pickles|signals): .+?) +\| ([\d,]+ of [\d,]+) \|", README, re.MULTILINE
        )
    )
    assert table == {name: f"{r['held']:,} of {r['tried']:,}" for name, r in results.items()}
