"""The house's rules, read off the source: who imports whom, what is never imported early, what never occurs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sdclr"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

LAYERS = [{"cli"}, {"commands"}, {"engine"}, {"data", "model", "report"}, {"lr"}, {"config"}, {"seeding", "errors"}]
"""Top to bottom; a module may import its own package and those of lower layers, never a neighbour in its layer."""
KNOWS_NOTHING_OF = {
    "sdclr.engine.loop": {"model", "report", "lr", "config"},
    "sdclr.engine.validation": {"model", "report", "lr", "config"},
}


def imports(path: Path, module: str) -> set[str]:
    """Every module of ours named by an import anywhere in a file, also within functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide where an arrow points"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in MODULES}
    return {name for name in found if name == "sdclr" or name.startswith("sdclr.")}


def part(module: str) -> str:
    """The part of the house that a module belongs to: sdclr.engine.loop -> engine."""
    return module.split(".")[1] if "." in module else ""


def height(name: str) -> int:
    return next(len(LAYERS) - i for i, layer in enumerate(LAYERS) if name in layer)


def test_the_modules_of_the_house_are_found() -> None:
    assert len(MODULES) > 30
    assert {part(module) for module in MODULES} == set().union(*LAYERS) | {"", "__main__"}


def test_imports_are_seen_inside_functions_and_in_both_spellings() -> None:
    assert "sdclr.commands.train" in imports(MODULES["sdclr.cli"], "sdclr.cli")
    assert "sdclr.report.console" in imports(MODULES["sdclr.cli"], "sdclr.cli")


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) not in ("", "__main__")])
def test_imports_point_down_only(module: str) -> None:
    own = part(module)
    for other in imports(MODULES[module], module):
        theirs = part(other)
        assert theirs in ("", own) or height(theirs) < height(own), f"{module} imports {other}"


@pytest.mark.parametrize("module", KNOWS_NOTHING_OF)
def test_the_loop_and_the_validation_know_no_model_no_report_and_no_schedule(module: str) -> None:
    assert not {part(other) for other in imports(MODULES[module], module)} & KNOWS_NOTHING_OF[module]


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) == "lr"])
def test_the_learning_rates_are_pure_numbers(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"sdclr"}
    assert outside <= {"numpy", "scipy"}


def test_only_the_loop_goes_backward() -> None:
    found = [m for m, path in MODULES.items() if ".backward(" in path.read_text()]
    assert sorted(found) == ["sdclr.engine.loop", "sdclr.engine.memory"]  # the latter on shapes alone


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that are loaded after a statement, in a process of its own."""
    code = f"{statement}\nimport sys\nprint(*sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return {name.split(".")[0] for name in found.stdout.split()}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import sdclr.cli", {"torch", "numpy", "pydantic", "yaml", "PIL", "matplotlib"}),
        ("import sdclr.config.source", {"torch", "numpy", "PIL"}),
        ("import sdclr.report.console", {"torch", "numpy"}),
        ("import sdclr.lr.bounds, sdclr.lr.exposure", {"torch", "pydantic"}),
        ("import sdclr.engine.plan", {"torch", "diffusers", "scipy", "matplotlib"}),
        (
            "import sdclr.commands.check, sdclr.commands.train, sdclr.commands.range_test",
            {"torch", "diffusers", "transformers"},
        ),
        ("import sdclr.commands.init, sdclr.commands.compare, sdclr.commands.sample", {"diffusers", "transformers"}),
    ],
)
def test_a_module_does_not_load_what_it_has_no_use_for_yet(statement: str, absent: set[str]) -> None:
    loaded = loaded_by(statement)
    assert "sdclr" in loaded
    assert not loaded & absent


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_longer_than_500_lines(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= 500


UNPICKLING = {"torch.load", "yaml.load", "yaml.unsafe_load", "eval", "exec", "pickle", "allow_pickle", "np.load"}


def code_words(path: Path) -> set[str]:
    """Names, dotted names, keywords and imports of a file's code; not what its messages and comments say."""
    words = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Name, ast.Attribute)):
            words.add(ast.unparse(node))
        elif isinstance(node, ast.keyword):
            words.add(node.arg or "")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            words |= {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
    return words


@pytest.mark.parametrize("module", MODULES)
def test_nothing_unpickles_and_nothing_runs_text(module: str) -> None:
    assert not code_words(MODULES[module]) & UNPICKLING


@pytest.mark.parametrize(
    "word", ["torch.load(p)", "import pickle", "from pickle import loads", "f(x, allow_pickle=True)", "eval('1')"]
)
def test_unpickling_would_be_seen(word: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(word)
    assert code_words(tmp_path / "bad.py") & UNPICKLING


@pytest.mark.parametrize("module", [m for m in MODULES if part(m)])
def test_every_module_says_what_it_is(module: str) -> None:
    if MODULES[module].name != "__init__.py":
        assert ast.get_docstring(ast.parse(MODULES[module].read_text()))
