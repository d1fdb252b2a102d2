"""How good is the range test? Measured against brute force, on cases whose held-out pictures can be drawn without end.

    python tests/benchmarks/range_test_accuracy.py --quick              # one case, two tests: minutes on one core
    python tests/benchmarks/range_test_accuracy.py --cases mochi,style --tests 10
    make bench-range-test                                               # every case: hours; goes on where it was stopped

Finished pieces are lines of tests/benchmarks/results/range-test/<case>.jsonl and are not made again (with another --results they
are); the tables, as Markdown, come on stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import averages
import nulls
import pictures
import rivals
import tables
import trials
import truth as truth_
import variants
from cases import CASES, Case, prepare
from narrow import narrow_base
from stage import Place

from sdclr.engine.fingerprint import model_fingerprint
from sdclr.engine.folder import write_bytes, write_json
from sdclr.report import console

PARTS = ["tests", "rivals", "averages", "nulls", "variants"]
RESULTS = Path(__file__).parent / "results" / "range-test"


@dataclasses.dataclass(frozen=True)
class Depth:
    """How much of everything is run."""

    tests: int
    effort: truth_.Effort
    ramps: tuple[int, ...]
    sweeps: tuple[int, ...]
    rival_seeds: int
    rival_runs: bool
    null_tests: int
    variant_tests: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help=f"some of: {','.join(case.name for case in CASES)} [all; with --quick: mochi]")
    parser.add_argument(
        "--tests", type=int, help="range tests a case, each with its own seed and split [10; --quick: 2]"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few rates, one training seed, no sweep, no rivals' runs, no nulls, no variants: minutes",
    )
    parser.add_argument(
        "--only",
        help="some of: tests,rivals,averages,nulls,variants (truth is always needed) [all, with --quick tests,rivals; nulls are of narrow alone]",
    )
    parser.add_argument("--base", type=Path, help="another base model (a diffusers folder) for every case")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "sdclr-bench", help="pictures, bases and arms"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    chosen = _chosen(args.cases or ("mochi" if args.quick else None), parser)
    if args.quick:
        depth = Depth(args.tests or 2, truth_.QUICK, (100,), (), 1, False, 1, 1)
    else:
        tests = args.tests or 10
        depth = Depth(tests, truth_.Effort(), (100, 400), (100, 400), min(3, tests), True, tests, min(5, tests))
    parts = args.only.split(",") if args.only else PARTS[:2] if args.quick else PARTS
    found = []
    for case in chosen:
        if args.base or case.narrow:
            base = args.base or narrow_base(args.work / "narrow-sd")
            case = dataclasses.replace(case, base=base.resolve())
        base = model_fingerprint(str(case.base))[:8]
        name = f"{case.name}{f'-{base}' if args.base else ''}{'-quick' if args.quick else ''}"
        found.append(
            run_case(case, args.work.resolve() / f"{case.name}-{base}", depth, parts, args.results / f"{name}.json")
        )
    print(tables.everything(found))
    if not (args.base or args.quick):
        known = [_known(args.results / f"{case.name}.json") for case in CASES]
        write_bytes(args.results / "accuracy.png", pictures.accuracy([case for case in known if case.get("tests")]))


def run_case(case: Case, work: Path, depth: Depth, parts: Sequence[str], path: Path) -> dict[str, Any]:
    """Truth, tests, rivals, nulls, variants; what is known is written after every step, so a run cut short leaves its results."""
    prepare(case, work)
    place = Place(case, work, path.with_suffix(".jsonl"))
    found = _known(path)
    found |= {"case": case.name, "overrides": list(case.overrides), "subject": case.subject, "pictures": case.pictures}
    found |= {"base": model_fingerprint(str(case.base)), "method": trials.method()}
    found.setdefault("tests", [])

    def note(key: str, value: Any) -> None:
        found[key] = value
        write_json(path, found)

    note("truth", truth_.find(place, depth.effort))
    truth = found["truth"]
    console.say(tables.truth([found]))
    if "tests" in parts:
        records: list[dict[str, Any]] = []
        for seed in range(trials.FIRST_SEED, trials.FIRST_SEED + depth.tests):
            records.append(trials.trial(place, seed, truth))
            note("tests", records)
            note("summary", trials.summary(records))
        console.say(tables.tests([found]))
    if "rivals" in parts:
        records = []
        for seed in range(trials.FIRST_SEED, trials.FIRST_SEED + depth.rival_seeds):
            rates = rivals.rates(place, seed, truth, depth.ramps, depth.sweeps)
            records += rivals.compare(place, seed, truth, rates, depth.effort.cap, depth.rival_runs)
            if depth.rival_runs:
                records.append(rivals.prodigy(place, seed, truth, depth.effort.cap))
            note("rivals", records)
    if "nulls" in parts and case.in_depth:
        records = []
        for null in nulls.NULLS:
            for seed in range(trials.FIRST_SEED, trials.FIRST_SEED + depth.null_tests):
                records.append(nulls.run(null, place, seed, truth))
                note("nulls", records)
    if "averages" in parts:
        records = []
        for seed in range(trials.FIRST_SEED, trials.FIRST_SEED + depth.tests):
            records += averages.run(place, seed, truth)
            note("averages", averages.summaries(records))
    if "variants" in parts:
        changed: dict[str, list[dict[str, Any]]] = {}
        for name in variants.VARIANTS if case.in_depth else case.variants:
            seeds = range(trials.FIRST_SEED, trials.FIRST_SEED + depth.variant_tests)
            changed[name] = [variants.run(name, place, seed, truth) for seed in seeds]
            note("variants", [record for records in changed.values() for record in records])
            note("variant_summaries", {name: variants.summary(records) for name, records in changed.items()})
    return found


def _known(path: Path) -> dict[str, Any]:
    """An earlier result's file, whose other parts stay."""
    read: Callable[[str], dict[str, Any]] = json.loads
    return read(path.read_text()) if path.exists() else {}


def _chosen(names: str | None, parser: argparse.ArgumentParser) -> list[Case]:
    if names is None:
        return CASES
    known = {case.name: case for case in CASES}
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names.split(",")]


if __name__ == "__main__":
    main()
