"""Every config that is shipped is a right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdclr.config import source

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def test_there_are_configs_and_the_demos_is_one():
    assert ROOT / "configs" / "demo.yaml" in CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_and_reads_back_as_itself(path: Path, tmp_path: Path):
    config = source.load(path).config
    (tmp_path / "again.yaml").write_text(source.dump(config))
    assert source.load(tmp_path / "again.yaml").config == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_what_a_config_names_inside_the_repository_is_there(path: Path):
    config = source.load(path).config
    for name in (str(config.data.images), config.model.base):
        if name.startswith("data/"):
            assert (ROOT / name).parent.is_dir()
