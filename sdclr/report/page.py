"""Self-contained HTML pages: everything in one file, pictures inside, no scripts, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment

from sdclr.config.source import dump_value
from sdclr.report import explain

_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
body { font: 16px/1.55 system-ui, sans-serif; color: #1b1f24; max-width: 74rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.lead { font-size: 1.1rem; color: #344054; margin: 0 0 1.4rem; } img { max-width: 100%; height: auto; border: 1px solid #e4e7ec; border-radius: 6px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid #e4e7ec; white-space: nowrap; } th { color: #667085; font-weight: 600; }
pre { background: #f5f7fa; padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; }
</style></head><body><h1>{{ title }}</h1>{% if lead %}<p class="lead">{{ lead }}</p>{% endif %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.picture %}<img alt="{{ section.title }}" src="data:image/png;base64,{{ section.picture }}">{% endif %}
{% if section.rows %}<div class="wide"><table>{% if section.header %}<tr>{% for cell in section.header %}<th>{{ cell }}</th>{% endfor %}</tr>{% endif %}
{% for row in section.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></div>{% endif %}
{% if section.code %}<pre>{{ section.code }}</pre>{% endif %}
{% endfor %}
</body></html>
""")


def render(title: str, lead: str, sections: Sequence[dict[str, Any]]) -> str:
    """One page; a section has a title and any of text, picture (PNG bytes), header and rows, code."""
    shown = [{**s, "picture": base64.b64encode(s["picture"]).decode() if s.get("picture") else None} for s in sections]
    return _PAGE.render(title=title, lead=lead, sections=shown)


ARM_HEADER = ("rate", "steps", "excess", "95 % interval", "ragged", "verdict")


def range_test(name: str, result: dict[str, Any], picture: bytes) -> str:
    """The range test's page: the answer in words, the figure, the arms, the cost."""
    cost = result["cost"]
    sections: list[dict[str, Any]] = [{"title": "Held-out loss against exposure", "picture": picture}]
    if result["reasons"]:
        rows = [(r["text"], r["remedy"]) for r in result["reasons"]]
        sections.insert(0, {"title": "Why it cannot say", "header": ("what", "what would help"), "rows": rows})
    if result["recommended"]:
        sections.append({"title": "What follows for a run", "code": snippet(result)})
    text = (
        "Excess: how much worse a rate is than the slow reference after the same exposure, as a share of the gain. Admissible: surely below the "
        "tolerance, or at most half of it; inadmissible: surely above it, ragged, or no better than the untouched model."
    )
    sections.append({"title": "Arms", "text": text, "header": ARM_HEADER, "rows": arm_rows(result)})
    sections += [{"title": title, "text": text} for title, text in explain.answer(result)]
    text = f"{cost['train_steps']} train steps, {cost['validation_forwards']} validation forwards, {cost['seconds']:.0f} seconds"
    sections.append({"title": "Cost", "text": text})
    return render(f"Range test of {name}", range_test_in_words(result), sections)


def arm_rows(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The arms as table rows under ARM_HEADER."""
    return [
        (
            f"{a['lr']:.2e}",
            a["steps"],
            _percent(a["excess"]),
            f"{_percent(a['low'])} … {_percent(a['high'])}",
            _percent(a["ragged"]),
            a["verdict"],
        )
        for a in result["arms"]
    ]


def snippet(result: dict[str, Any]) -> str:
    """What follows for a run, as YAML to paste: the config's sections of that name, whole."""
    sections = result["recommended"]["config"]
    return "\n".join(f"{name}: {dump_value(_plain(section))}" for name, section in sections.items())


def _plain(value: Any) -> Any:
    """Whole numbers without a point."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def answer(result: dict[str, Any]) -> str:
    """A conclusive answer for the terminal: a comment, and the YAML that follows from it, if any."""
    words = f"# {range_test_in_words(result)}"
    return f"{words}\n{snippet(result)}" if result["recommended"] else words


def range_test_in_words(result: dict[str, Any]) -> str:
    """The answer in a sentence or two."""
    if result["verdict"] != "conclusive":
        return "Inconclusive: " + "; ".join(r["text"] for r in result["reasons"]) + "."
    ceiling, best = result["ceiling"], result["best_exposure"]
    return (
        f"Learning rates up to about {ceiling['lr']:.2g} (between {ceiling['bracket'][0]:.2g} and {ceiling['bracket'][1]:.2g}) train these images "
        f"as well as slow ones do; the held-out images have gained all but 2 % of what they can after an exposure of "
        f"{best['value']:.2g} ({best['interval'][0]:.2g} to {best['interval'][1]:.2g})."
    )


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{value:+.1%}"
