"""From a YAML file to a RunConfig, or to every problem of the file at once, each as `file:line:column: what`.

Nodes are composed (safely: no tags, no anchors) and turned into values here, so that every value keeps the place it was written
at, `1e-6` is a number, `off` is a word, and a key given twice is seen. `--set section.key=value` is written into the same values
before the schema judges them.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sdclr.config import elsewhere
from sdclr.config.kinds import Span, show_span
from sdclr.config.schema import RunConfig
from sdclr.errors import ConfigError

MAX_BYTES, MAX_DEPTH, MAX_NODES = 1_000_000, 20, 20_000

# YAML 1.2's core schema: what a plain (unquoted) scalar means. YAML 1.1, PyYAML's default, reads 1e-6 as text, `off` as false and 012 as ten.
_PLAIN: list[tuple[re.Pattern[str], Callable[[str], Any]]] = [
    (re.compile(r"null|Null|NULL|~|"), lambda text: None),
    (re.compile(r"true|True|TRUE"), lambda text: True),
    (re.compile(r"false|False|FALSE"), lambda text: False),
    (re.compile(r"[-+]?[0-9]{1,300}"), int),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), lambda text: float(text.replace(".", ""))),
]

Path_ = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class LoadedConfig:
    """A judged config, and where each of its values was written."""

    config: RunConfig
    source: str
    marks: dict[Path_, str]
    overrides: tuple[str, ...] = ()

    @property
    def typed(self) -> str:
        """The file and every --set as the user typed them, for the commands that hints name."""
        return shlex.join([self.source, *(word for override in self.overrides for word in ("--set", override))])

    def problem(self, location: str, message: str) -> str:
        """`file:line:column: section.key message`, for problems that only the data can show."""
        return f"{_place(self.marks, tuple(location.split('.')), self.source)}: {location} {message}"


def load(path: Path | str, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read, override and judge one config file.

    Raises ConfigError with every problem found: syntax, doubled and unknown keys, wrong types, impossible combinations.
    """
    source = str(path)
    found: list[str] = []
    marks: dict[Path_, str] = {}
    values = _Reader(source, marks, found).read(_text_of(Path(path)))
    for override in overrides:
        _apply(override, values, marks, found)
    for name in [name for name, value in values.items() if value is None and name in RunConfig.model_fields]:
        if RunConfig.model_fields[name].is_required():
            values[name] = {}
        else:
            del values[name]  # a section whose keys were all deleted means its defaults
    config, schema_problems = _judge(values, marks, source)
    found += schema_problems
    if found or config is None:
        raise ConfigError(
            sorted(dict.fromkeys(found), key=_reading_order),
            hint=f"see every key with its meaning: sdclr init --stdout; then: sdclr check {source}",
        )
    return LoadedConfig(config, source, marks, tuple(overrides))


def dump(config: RunConfig) -> str:
    """The whole config as YAML that `load` reads back to the same RunConfig."""
    return yaml.dump(
        config.model_dump(mode="json"),
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=120,
    )


def dump_value(value: Any) -> str:
    """One value as it would stand in a config."""
    if isinstance(value, Span):
        value = show_span(value)
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple):
        value = list(value)
    return yaml.dump(
        [value], Dumper=_Dumper, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10_000
    ).strip()[1:-1]


class _Dumper(yaml.SafeDumper):
    """Writes text that YAML 1.2 would read as a number in quotes, which PyYAML's own resolver does not."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    number = any(pattern.fullmatch(text) for pattern, _ in _PLAIN)
    style = '"' if not text.isprintable() else "'" if number else None  # only in double quotes do odd line ends survive
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _text_of(path: Path) -> str:
    config = f"{path}.yaml" if path.is_dir() else path
    hint = f"write a commented one for your images: sdclr init {path if path.is_dir() else 'path/to/images'} --output {config}"
    if not path.is_file():
        raise ConfigError(
            [f"{path}: there is no such config file" if not path.exists() else f"{path}: is not a file"], hint
        )
    try:
        data = path.read_bytes()
        if len(data) > MAX_BYTES:
            raise ConfigError([f"{path}: is {len(data):,} bytes long, a config has at most {MAX_BYTES:,}"], hint)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8 text (byte {error.start})"], "save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None


class _Reader:
    """One walk over the composed nodes: values out, marks and problems noted on the way. `places` off: all of it stands in one place."""

    def __init__(self, source: str, marks: dict[Path_, str], found: list[str], places: bool = True):
        self.source, self.marks, self.found, self.places, self.nodes = source, marks, found, places, 0

    def read(self, text: str) -> dict[str, Any]:
        """The file's sections as plain values. Raises ConfigError where it is no YAML, with the place; every other problem is noted."""
        try:
            self._check_events(text)
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = " ".join(part for part in (error.problem, f"({error.context})" if error.context else "") if part)
            what = what.replace("\\t", "tab") + (
                ": indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
            )
            raise ConfigError([f"{self._at(mark)}: not YAML: {what}"]) from None
        except yaml.reader.ReaderError as error:
            before = text[: error.position]
            mark = yaml.Mark("", 0, before.count("\n"), len(before) - before.rfind("\n") - 1, None, 0)
            raise ConfigError(
                [f"{self._at(mark)}: not YAML: a character that text cannot hold ({text[error.position]!r})"]
            ) from None
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError([f"{self.source}: not YAML: {error}"]) from None
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError([f"{self._at(node.start_mark)}: the file must hold sections (run:, model:, data:, ...)"])
        return self._value(node, ())

    def _check_events(self, text: str) -> None:
        """Refuse what must not be composed (anchors, endless nesting), and note tags, which composing would hide."""
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            self.nodes += 1
            if getattr(event, "anchor", None) is not None:
                raise ConfigError(
                    [
                        f"{self._at(event.start_mark)}: anchors and aliases (& and *) are not used in configs: write the value out"
                    ]
                )
            if tag := getattr(event, "tag", None):
                self.found.append(f"{self._at(event.start_mark)}: tags such as {tag} are not used in configs")
            if isinstance(event, (yaml.CollectionStartEvent, yaml.CollectionEndEvent)):
                depth += 1 if isinstance(event, yaml.CollectionStartEvent) else -1
            if depth > MAX_DEPTH or self.nodes > MAX_NODES:
                raise ConfigError([f"{self._at(event.start_mark)}: nested too deeply or too long for a config"])

    def _value(self, node: Any, path: Path_) -> Any:
        self.marks.setdefault(path, self._at(node.start_mark))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, (*path, i)) for i, child in enumerate(node.value)]
        text = re.sub("[\0\ud800-\udfff]", "", node.value)
        if text != node.value:
            self.found.append(f"{self.marks[path]}: {_dotted(path)} holds a character that no file can hold")
        return scalar(text) if node.style is None else text

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, place = str(key_node.value), self._at(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                self.found.append(f"{place}: a key must be a word")
                continue
            if key in values:
                first = _line_of(self.marks[(*path, key)])
                self.found.append(f"{place}: {_dotted((*path, key))} is given twice (first in line {first})")
                continue
            self.marks[(*path, key)] = place
            values[key] = self._value(value_node, (*path, key))
        return values

    def _at(self, mark: Any) -> str:
        return f"{self.source}:{mark.line + 1}:{mark.column + 1}" if mark and self.places else self.source


def scalar(text: str) -> Any:
    """What a plain scalar means in YAML 1.2's core schema."""
    for pattern, convert in _PLAIN:
        if pattern.fullmatch(text):
            return convert(text)
    return text


def _apply(override: str, values: dict[str, Any], marks: dict[Path_, str], found: list[str]) -> None:
    """Write one `section.key=value` into the values; the value is YAML."""
    place = f"--set {override}"
    target, separator, text = override.partition("=")
    keys = tuple(part.strip() for part in target.split("."))
    if not separator or not all(keys):
        found.append(f"{place}: must look like section.key=value, for example --set train.steps=800")
        return
    try:
        read = _Reader(place, {}, found, places=False).read(f"value: {text.strip()}")
    except ConfigError as error:
        found.extend(error.problems)
        return
    if list(read) != ["value"]:
        found.append(f"{place}: sets one key; give --set once for each")
        return
    section = values
    for depth, key in enumerate(keys[:-1], 1):
        if section.get(key) is None:
            section[key] = {}
            marks.setdefault(keys[:depth], place)
        section = section[key]
        if not isinstance(section, dict):
            found.append(f"{place}: {target} goes into {key}, which is a value and not a section")
            return
    section[keys[-1]] = read["value"]
    for known in [path for path in marks if path[: len(keys)] == keys]:
        del marks[known]
    marks[keys] = place


def _judge(values: dict[str, Any], marks: dict[Path_, str], source: str) -> tuple[RunConfig | None, list[str]]:
    """Validate; after a failure take the refused values out and judge the rest, so that one problem does not hide another."""
    found: list[str] = []
    refused: set[str] = set()
    for round_ in range(8):
        try:
            return RunConfig.model_validate(values), found
        except ValidationError as error:
            details = [
                d for d in error.errors(include_url=False) if not (round_ and d["type"] in ("missing", "sdclr_needed"))
            ]
            words = {tuple(_paths(d)): _choices(d) for d in details if d["type"] == "literal_error"}
            others = {tuple(_paths(d)) for d in details if d["type"] != "literal_error"}
            for detail in details:
                if detail["type"] == "literal_error" and tuple(_paths(detail)) in others:
                    continue  # a number or a word is wanted: said at the number
                told = _tell(detail, marks, source, words.get(tuple(_paths(detail)), []))
                # What is said of a key that was taken out would be said of its default.
                found += [line for line in told if not refused & set(re.findall(r"\w+(?=: )", line))]
            if not details:
                break
            for detail in details:
                for path in _paths(detail):
                    _remove(values, path)
                    refused.update(part for part in path[-1:] if isinstance(part, str))
    return None, found


def _paths(detail: ErrorDetails) -> list[Path_]:
    """The places a problem speaks of: its location, or the keys it names itself."""
    location = detail["loc"]
    # All parts are the schema's own, save what pydantic calls a union's members.
    if detail["type"] != "extra_forbidden":
        location = tuple(
            p for p in location if not isinstance(p, str) or (p.replace("_", "").isalnum() and p != "bool")
        )
    found = detail.get("ctx", {}).get("found")
    return [(*location, at) if at else location for at, _ in found] if found else [location]


def _tell(detail: ErrorDetails, marks: dict[Path_, str], source: str, words: Sequence[str]) -> list[str]:
    """One problem of the schema as lines in the user's words; `words` would have been right too."""
    paths = [_known_part(path, marks) if detail["type"] != "missing" else path for path in _paths(detail)]
    found = detail.get("ctx", {}).get("found")
    messages = [message for _, message in found] if found else [_in_words(detail, words)]
    lines = []
    for path, message in zip(paths, messages, strict=True):
        name = "" if message.startswith(("policy:", "model.")) else _dotted(path) + " "
        lines.append(f"{_place(marks, path, source)}: {name}{message}")
    return lines


def _choices(detail: ErrorDetails) -> list[str]:
    return re.findall(r"'([^']*)'", detail["ctx"]["expected"])


def _in_words(detail: ErrorDetails, words: Sequence[str]) -> str:
    kind, ctx, value = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "extra_forbidden":
        *section, key = detail["loc"]
        near = _elsewhere(section, str(key)) or difflib.get_close_matches(str(key), _keys(section), n=1, cutoff=0.6)
        instead = f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(_keys(section))}"
        return f"is not a known key; {instead}"
    if kind == "missing":
        return "is missing"
    if kind == "too_short":
        return f"needs at least {ctx['min_length']} entry"
    shown = "nothing" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    got = f"; got {shown if len(shown) <= 60 else shown[:57] + '...'}"
    if kind == "literal_error":
        near = difflib.get_close_matches(str(value), _choices(detail), n=1)
        return f"must be one of {', '.join(_choices(detail))}{got}" + (f"; did you mean {near[0]}?" if near else "")
    if kind == "string_type" and not isinstance(value, (dict, list)) and value is not None:
        got += " (put it in quotes)"
    wanted = _wanted(kind, ctx)
    return (
        f"must be {' or '.join([wanted, *words])}{got}"
        if wanted
        else detail["msg"][0].lower() + detail["msg"][1:] + got
    )


def _wanted(kind: str, ctx: dict[str, Any]) -> str | None:
    """What should have stood there; None for kinds of problem that have no words of ours."""
    bounds = {
        "greater_than": ("gt", "greater than"), "greater_than_equal": ("ge", "at least"),
        "less_than": ("lt", "less than"), "less_than_equal": ("le", "at most"),
    }  # fmt: skip
    if kind in bounds:
        key, words = bounds[kind]
        return f"{words} {ctx[key] if isinstance(ctx[key], int) else format(ctx[key], 'g')}"
    kinds = {
        "int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "path": "a path",
        "tuple": "a list", "model": "a section (key: value pairs)", "finite": "a finite number",
    }  # fmt: skip
    if kind in ("string_too_long", "string_too_short"):
        return None
    return next((words for prefix, words in kinds.items() if kind.startswith(prefix)), None)


def _elsewhere(section: Sequence[str | int], key: str) -> list[str]:
    """Where a key that is not known in its section belongs: by this name in other sections, or by the name that other trainers have for it."""
    if len(section) > 1:
        return []
    ours = [f"{name}.{key}" for name in RunConfig.model_fields if [name] != list(section) and key in _keys([name])]
    theirs = [elsewhere.KEYS[key.lower()]] if key.lower() in elsewhere.KEYS else []
    return [*theirs, *(each for each in ours if each not in theirs)]


def _keys(section: Sequence[str | int]) -> list[str]:
    """The keys that the schema knows at a place."""
    model: Any = RunConfig
    for part in section:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        annotation = field.annotation if field else model
        inner = [a for a in (annotation, *_arguments(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        model = inner[0] if inner else model
    return list(model.model_fields)


def _arguments(annotation: Any) -> list[Any]:
    direct = list(getattr(annotation, "__args__", ()))
    return direct + [a for d in direct for a in _arguments(d)]


def _known_part(path: Path_, marks: dict[Path_, str]) -> Path_:
    """The path without what pydantic adds to it (names of union members)."""
    while path and path not in marks and path[:-1] in marks and len(path) > 2:
        path = path[:-1]
    return path


def _place(marks: dict[Path_, str], path: Path_, source: str) -> str:
    while path and path not in marks:
        path = path[:-1]
    return marks.get(path, source)


def _dotted(path: Path_) -> str:
    text = ""
    for part in path:
        name = f"[{part}]" if isinstance(part, int) else part if re.fullmatch(r"[\w-]+", part) else repr(part)
        text += name if isinstance(part, int) or not text else f".{name}"
    return text


def _reading_order(line: str) -> tuple[int, int]:
    """Top to bottom, left to right; problems without a place (--set) first."""
    match = re.match(r".*?:(\d+):(\d+): ", line)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _line_of(place: str) -> str:
    return place.rsplit(":", 2)[-2]


def _remove(values: Any, path: Path_) -> None:
    """Take the value at the path (or the nearest that exists above it) out; lists lose the whole list."""
    parent, key = None, None
    for part in path:
        if isinstance(values, dict) and part in values:
            parent, key, values = values, part, values[part]
        else:
            break
    if parent is not None:
        del parent[key]
