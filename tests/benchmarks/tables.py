"""The bench's results as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Found = dict[str, Any]


def everything(found: Sequence[Found]) -> str:
    """All tables, each with a sentence that says how to read it."""
    parts = [
        ("Truth, by brute force", truth(found)),
        (
            "Range tests against it (errors in decades, of conclusive tests; regret as a share of the gain)",
            tests(found),
        ),
        ("Rivals (regret of a cyclical run up to their rate, of the ideal length)", rivals(found)),
        ("The same arms, read through other averages over timesteps (the truth is of the plain one)", averages(found)),
        ("One setting changed, the same seeds and splits (moves, errors and brackets in decades)", variants(found)),
        ("Nulls (the right answer is inconclusive)", nulls(found)),
    ]
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in parts if table)


def truth(found: Sequence[Found]) -> str:
    rows = []
    for f in found:
        t = f["truth"]
        low, high = t["bracket"]
        rows.append(
            [
                f["case"],
                _number(t["ceiling"]),
                f"{_number(low)} … {_number(high)}",
                _number(t["best_exposure"]),
                f"{_number(t['flat'][0])} … {_number(t['flat'][1])}",
                _percent(t["gain_share"]),
                f"{len(t['rates'])} × {t['effort']['seeds']}" if "effort" in t else len(t["rates"]),
                t["capped"],
            ]
        )
    header = [
        "case",
        "ceiling",
        "between rates",
        "S*",
        "within 2 % of the gain",
        "gain",
        "rates × seeds",
        "capped rates",
    ]
    return _table(header, rows)


def tests(found: Sequence[Found]) -> str:
    rows = []
    for f in found:
        s = f.get("summary")
        if not s:
            continue
        rows.append(
            [
                f["case"],
                f"{s['conclusive']}/{s['tests']}" + (f" ({', '.join(s['reasons'])})" if s["reasons"] else ""),
                _signed(s["ceiling_bias"]),
                _number(s["ceiling_error"], ".2f"),
                _number(s["ceiling_spread"], ".2f"),
                _percent(s["bracket_holds"], 0),
                _number(s["bracket_decades"], ".2f"),
                f"{_signed(s['exposure_bias'])} / {_number(s['exposure_error'], '.2f')}",
                _percent(s["exposure_holds"], 0),
                _number(s["cost_steps"], ".0f"),
                _number(s["cost_share"], ".1f"),
                f"{_percent(s['final_regret'])} / {_percent(s['best_regret'])}",
            ]
        )
    header = [
        "case", "conclusive", "ceiling bias", "median error", "sd", "bracket holds it", "bracket, decades", "S* bias / error",
        "interval holds it", "cost, steps", "cost, runs", "regret final / best",
    ]  # fmt: skip
    return _table(header, rows)


def rivals(found: Sequence[Found]) -> str:
    rows = []
    for f in found:
        records = f.get("rivals", [])
        for name in dict.fromkeys(record["rival"] for record in records):
            own = [record for record in records if record["rival"] == name]
            rows.append(
                [
                    f["case"],
                    name,
                    _number(_median(own, "lr")),
                    _signed(_median(own, "decades_from_ceiling")),
                    _percent(_median(own, "excess_at_best")),
                    f"{_percent(_median(own, 'final_regret'))} / {_percent(_median(own, 'best_regret'))}",
                ]
            )
    header = [
        "case",
        "rival",
        "rate",
        "decades from the ceiling",
        "constant run's loss at its best",
        "regret final / best",
    ]
    return _table(header, rows)


def variants(found: Sequence[Found]) -> str:
    rows = []
    for f in found:
        for name, s in f.get("variant_summaries", {}).items():
            rows.append(
                [
                    f["case"],
                    name,
                    f"{s['conclusive']}/{s['tests']}",
                    _number(s["moved"], ".2f"),
                    _number(s["ceiling_error"], ".2f"),
                    _percent(s["bracket_holds"], 0),
                    _number(s["bracket_decades"], ".2f"),
                    _number(s["exposure_error"], ".2f"),
                    _percent(s["exposure_holds"], 0),
                    _number(s["times_the_cost"], ".1f"),
                ]
            )
    header = [
        "case", "changed", "conclusive", "ceiling moved by", "its error", "bracket holds it", "bracket", "S* error",
        "interval holds it", "× the cost",
    ]  # fmt: skip
    return _table(header, rows)


def averages(found: Sequence[Found]) -> str:
    rows = []
    for f in found:
        for name, s in f.get("averages", {}).items():
            rows.append(
                [
                    f["case"],
                    name,
                    f"{s['conclusive']}/{s['tests']}",
                    _signed(s["ceiling_bias"]),
                    _number(s["ceiling_error"], ".2f"),
                    _number(s["ceiling_spread"], ".2f"),
                    _percent(s["bracket_holds"], 0),
                    f"{_signed(s['exposure_bias'])} / {_number(s['exposure_error'], '.2f')}",
                ]
            )
    header = [
        "case", "average", "conclusive", "ceiling bias", "median error", "sd", "bracket holds it", "S* bias / error",
    ]  # fmt: skip
    return _table(header, rows)


def nulls(found: Sequence[Found]) -> str:
    rows = []
    for f in found:
        records = f.get("nulls", [])
        for name in dict.fromkeys(record["null"] for record in records):
            own = [record for record in records if record["null"] == name]
            codes = sorted({code for record in own for code in record["reasons"]})
            inconclusive, right = (sum(record[key] for record in own) for key in ("inconclusive", "right_reason"))
            rows.append([f["case"], name, f"{inconclusive}/{len(own)}", f"{right}/{len(own)}", ", ".join(codes)])
    return _table(["case", "null", "inconclusive", "for the right reason", "reasons"], rows)


def _median(records: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return statistics.median(values) if values else None


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _number(value: float | None, spec: str = ".2e") -> str:
    return "—" if value is None else format(value, spec)


def _signed(value: float | None) -> str:
    return _number(value, "+.2f")


def _percent(value: float | None, digits: int = 1) -> str:
    return "—" if value is None else f"{value:.{digits}%}"
