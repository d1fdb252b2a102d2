"""What the README says a reader can type or open is there, and its fault table is what the harness wrote last."""

from __future__ import annotations

import json
import re
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from sdclr.cli import app
from sdclr.config.schema import RunConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

import foretold  # noqa: E402
import precisions  # noqa: E402
import study_report  # noqa: E402
import throughput  # noqa: E402
import variants  # noqa: E402

README = (ROOT / "README.md").read_text()
WORDS = " ".join(README.split())
"""The same, wherever its lines end."""
RESULTS = ROOT / "tests" / "benchmarks" / "results"
CASES = [file.stem for file in sorted((RESULTS / "range-test").glob("*.json"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def stored(case: str) -> dict[str, Any]:
    """What the bench found out about a case."""
    return json.loads((RESULTS / "range-test" / f"{case}.json").read_text())


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


@pytest.mark.parametrize("case", CASES)
def test_the_accuracy_table_is_the_last_run_of_the_bench(case):
    summary, truth = stored(case)["summary"], stored(case)["truth"]
    row = next(line for line in README.splitlines() if line.startswith("|") and f"`{case}`" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    lr = f"{truth['ceiling']:.1e}".replace("e-0", "e-")
    assert cells[1] == f"{lr}, {truth['best_exposure']:.3f}, {100 * truth['gain_share']:.0f} %"
    assert cells[2].startswith(f"{summary['conclusive']} of {summary['tests']}")
    assert cells[3] == f"{summary['ceiling_error']:.2f}, {summary['ceiling_spread']:.2f}"
    held = round(summary["bracket_holds"] * summary["conclusive"])
    assert cells[4] == f"{held} of {summary['conclusive']}, {summary['bracket_decades']:.2f}"
    assert cells[5] == f"{summary['exposure_error']:.2f}"
    assert cells[6] == f"{round(summary['exposure_holds'] * summary['conclusive'])} of {summary['conclusive']}"
    assert cells[7] == f"{100 * summary['final_regret']:.1f} %".replace("-", "−")
    assert cells[8] == f"{summary['cost_share']:.1f}"


def test_what_is_said_of_all_bases_but_two_is_what_the_bench_found():
    found = [test for case in CASES if case not in ("style", "object") for test in stored(case)["tests"]]
    sure = [test for test in found if test["verdict"] == "conclusive"]
    held = sum(test["bracket_holds"] for test in sure)
    ceiling, exposure = (statistics.median(abs(t[f"{what}_error"]) for t in sure) for what in ("ceiling", "exposure"))
    regret, cost = (statistics.median(test[key] for test in sure) for key in ("final_regret", "cost_share"))
    assert (
        f"{len(sure)} of {len(found)} tests are conclusive, {held} of their {len(sure)} brackets hold the ceiling, and the medians are "
        f"{ceiling:.2f} for the ceiling's error, {exposure:.2f} for that of S\\*, {100 * regret:.1f} % of regret, and a cost of {cost:.1f} runs"
    ) in WORDS


def test_what_is_said_of_the_best_exposures_is_what_the_bench_found():
    found = [test for case in CASES for test in stored(case)["tests"]]
    sure = [test for test in found if test["verdict"] == "conclusive"]
    right = sum(test["exposure_flat"] for test in sure)
    assert f"Of the {len(sure)} answers for S\\*, {right} lie where brute force loses less than 2 %" in WORDS


def test_what_is_said_of_the_averages_is_what_the_bench_found():
    found = [stored(case)["averages"] for case in CASES]
    tests = sum(each["plain"]["tests"] for each in found)
    plain, alike, snr = (
        sum(each[name]["conclusive"] for each in found) for name in ("plain", "every bin alike", "min-SNR weights")
    )
    assert f"of {tests} tests {plain} are conclusive so, {alike} with every stratum counting alike, {snr} with" in WORDS


def test_the_table_of_changed_settings_is_the_last_run_of_the_bench():
    rows = [line for line in README.splitlines() if re.match(r"\| .+ \| \d of 5 \|", line)]
    found = stored("narrow")["variant_summaries"]
    assert len(rows) == len(found) == len(variants.VARIANTS)
    for row, (name, summary) in zip(rows, found.items(), strict=True):
        label, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert label.startswith(name)
        changed = [setting for setting in variants.VARIANTS[name] if setting != variants.ONE_FIFTH]
        assert [setting.replace("=", ": ") for setting in changed] == re.findall("`(.+)`", label)
        numbers = [summary[key] for key in ("moved", "ceiling_error", "bracket_decades", "exposure_error")]
        assert cells[0] == f"{summary['conclusive']} of {summary['tests']}"
        assert cells[1] == ("—" if name == "nothing" else f"{numbers[0]:.2f}")
        assert cells[2:5] == [f"{number:.2f}" for number in numbers[1:]]
        assert cells[5] == f"{summary['times_the_cost']:.1f}"


def test_no_null_was_conclusive_and_all_gave_the_right_reason():
    found = stored("narrow")["nulls"]
    assert len({record["null"] for record in found}) == 4 and len(found) == 40
    assert all(record["inconclusive"] and record["right_reason"] for record in found)


def test_the_table_of_rivals_is_the_last_run_of_the_bench():
    header, _, *lines = README[README.index("| rival |") :].splitlines()
    cases = re.findall("`([a-z0-9-]+)`", header)
    assert set(cases) == {case for case in CASES if stored(case).get("rivals")}
    names = list(dict.fromkeys(record["rival"] for record in stored("narrow")["rivals"]))

    def median(case: str, name: str, key: str) -> float | None:
        found = [r.get(key) for r in stored(case)["rivals"] if r["rival"] == name]
        assert len(found) == 3, (case, name)
        return None if None in found else statistics.median(found)

    def percent(regret: float | None) -> str:
        assert regret is not None
        return f"{100 * regret:.0f} %".replace("-", "−")

    for line, name in zip(lines, names, strict=False):
        _, ratio, *regrets = (cell.strip() for cell in line.strip("|").split("|"))
        away = [10**x for case in cases if (x := median(case, name, "decades_from_ceiling")) is not None]
        assert ratio == (f"{min(away):.2g} to {max(away):.2g}" if away else "−"), name
        assert regrets == [percent(median(case, name, "final_regret")) for case in cases], name
    assert f"on `object`, whose best run has {stored('object')['rivals'][0]['steps']} steps" in WORDS
    ours = [cell.strip() for cell in lines[len(names)].strip("|").split("|")]
    assert ours[2:] == [percent(stored(case)["summary"]["final_regret"]) for case in cases]


def test_what_is_said_of_eight_pictures_is_what_the_bench_found():
    found = stored("object")["variant_summaries"]
    more, plain = found["two fifths held out"], found["nothing"]
    assert (
        f"`object` is conclusive in {plain['conclusive']} of {plain['tests']} tests, with two fifths, on the same seeds, in {more['conclusive']} of {more['tests']}"
        in WORDS
    )
    assert f"on `style` it leaves {100 * stored('style')['summary']['final_regret']:.0f} % of the gain" in WORDS
    assert stored("object")["summary"]["final_regret"] < 0.01
    truth = stored("object")["truth"]
    best = [
        rate["exposure"][rate["losses"].index(min(rate["losses"]))] for rate in truth["rates"] if rate["excess"] <= 0.1
    ]
    assert f"with up to {max(best) / best[0]:.0f} times the exposure" in WORDS


@pytest.mark.parametrize(
    ("file", "batch", "row"),
    [
        ("throughput-cpu", "1", "1"),
        ("throughput-cpu", "4", "4"),
        ("throughput-cpu", "16", "16"),
        ("throughput-cpu-full-size", "1", "1, Stable Diffusion 1.5's shape"),
        ("throughput-cpu-xl", "1", "1, an SDXL of middle size"),
        ("throughput-cpu-xl", "4", "4, an SDXL of middle size"),
    ],
)
def test_the_speed_table_is_the_last_run_of_the_bench(file, batch, row):
    found = json.loads((RESULTS / f"{file}.json").read_text())["batches"][batch]
    seconds, peaks = found["seconds"], {kind: memory["peak"] for kind, memory in found["memory"].items()}
    cells = [
        "{1:.2f} ({0:.2f} to {2:.2f})".format(*throughput.ratio(seconds["sdclr"], seconds["floor"])),
        "{1:.2f} ({0:.2f} to {2:.2f})".format(*throughput.ratio(seconds["script"], seconds["sdclr"])),
        f"{peaks['sdclr'] / peaks['script']:.2f}",
    ]
    assert f"| {row} | {' | '.join(cells)} |" in README


def test_the_gpu_table_is_the_last_run_of_the_bench():
    table = README.partition("| model, batch |")[2].partition("\n\n")[0].splitlines()[2:]
    expected = [gpu_row(*of) for of in (("SD 1.5 at 512 pixels", "", batch) for batch in ("1", "4", "16"))]
    expected += [gpu_row("the same, compiled", "-compiled", "16")]
    expected += [gpu_row("SDXL at 1024 pixels", "-xl", batch) for batch in ("1", "4")]
    assert table == expected
    looks = [
        throughput.ratio(v["batched"], v["unbatched"])[1] for v in (gpu(name)["validation"] for name in ("", "-xl"))
    ]
    assert "forward takes {:.2f} of one that is not batched, {:.2f} of SDXL's.".format(*looks) in WORDS


def gpu(name: str) -> Any:
    return json.loads((RESULTS / f"throughput-cuda{name}.json").read_text())


def gpu_row(label: str, name: str, batch: str) -> str:
    """A line of the README's table, from a stored result."""
    stored_ = gpu(name)
    found = stored_["batches"][batch]
    seconds, memory = found["seconds"], found["memory"]
    own = "compiled" if "compiled" in seconds else "sdclr"
    rate = {kind: int(batch) / throughput.quartiles(seconds[kind])[1] for kind in seconds}
    slower, three = throughput.ratio(seconds[own], seconds["floor"]), "{1:.2f} ({0:.2f} to {2:.2f})"
    faster = three.format(*throughput.ratio(seconds["script"], seconds[own])) if "script" in seconds else ""
    share = throughput.FLOP_AN_IMAGE[stored_["model"]] * rate[own] / stored_["machine"]["matmul"]
    rates = ", ".join(f"{rate[kind]:.3g}" for kind in ("floor", own, "script") if kind in rate)
    gib = "; ".join(f"{memory[kind]['device'] / 2**30:.1f}" for kind in (own, "script") if kind in memory)
    return f"| {label}, {batch} | {rates} | {three.format(*slower)} | {faster} | {100 * share:.0f} % | {gib} |"


def on_cards() -> list[dict[str, Any]]:
    """Every case whose memory was measured on a GPU."""
    files = (RESULTS / f"memory-cuda{name}.json" for name in ("", "-xl"))
    return [case for file in files for case in json.loads(file.read_text())["cases"]]


def test_what_is_said_of_a_cards_memory_is_the_last_run_of_the_bench():
    cases = on_cards()
    off = [100 * (case["foretold"] / case["used"] - 1) for case in cases]
    within = sum(abs(each) <= 10 for each in off)
    said = f"in {len(off)} cases, of which {within} were foretold within 10 % ({min(each for each in off if each >= -10):+.1f} to {max(off):+.1f} %)"
    assert said.replace("-", "−") in WORDS
    ((least, grown), (lora, grown_too)) = ([c for c in cases if c["overrides"] == o and c["model"] == "model-sd15" and c["batch"] == 1] for o in ([*foretold.LEAST], [*foretold.SMALLER, foretold.LORA]))  # fmt: skip
    sizes = [case["used"] / 2**30 for case in (least, grown, lora, grown_too)]
    assert f"took {sizes[1]:.1f} GiB so instead of {sizes[0]:.1f}, a LoRA" in WORDS
    assert f"{sizes[3]:.1f} instead of {sizes[2]:.1f}" in WORDS


SMALL = (
    ("8-bit AdamW, gradient checkpointing", "model-sd15", ()),
    ("with `fused_backward`", "model-sd15", ("optimizer.fused_backward=true",)),
    ("and `full_bf16`", "model-sd15", ("optimizer.fused_backward=true", "model.precision=full_bf16")),
    ("SDXL at 1024 pixels, with all of these", "model-sdxl", ("optimizer.fused_backward=true", "model.precision=full_bf16")),
)  # fmt: skip


@pytest.mark.parametrize(("row", "model", "settings"), SMALL)
def test_the_table_of_the_smallest_runs_is_the_last_run_of_the_bench(row, model, settings):
    """What is counted for a card is held by tests/test_shapes.py to the configs, whose numbers these are."""
    cases = json.loads((RESULTS / "memory-full-size.json").read_text())["cases"]
    every = {"optimizer.fused_backward=true", "model.precision=full_bf16"}
    (case,) = [c for c in cases if c["model"] == model and every & {*c["overrides"]} == {*settings}]
    counted, used = ((size + case["imported"]) / 2**30 for size in (case["foretold"], case["used"]))
    *_, same = [c for c in on_cards() if c["model"] == model and c["batch"] == 1 and {*c["overrides"]} >= set(foretold.SMALLER_STILL) and every & {*c["overrides"]} == {*settings}]  # fmt: skip
    card = f"{same['foretold'] / 2**30:.1f} | {same['used'] / 2**30:.1f}"
    assert f"| {row} | {card} | {counted:.1f} | {used:.1f} |" in README


@pytest.mark.parametrize(("config", "words"), [("sd15", r"; ([\d.]+) with"), ("sdxl", r"([\d.]+)(?: GiB)? with")])
def test_what_is_counted_is_what_the_configs_say(config, words):
    for number in re.findall(words, (ROOT / "configs" / f"{config}.yaml").read_text().replace("\n# ", " ")):
        assert re.search(rf"(?<![\d.]){number}(?![\d.])", README), number


def test_what_is_said_of_precisions_is_what_was_measured():
    rows = {(row["lr"], row["kind"]): row for row in precisions.summary(precisions.stored(), 5)}
    for lr in precisions.RATES:
        row = rows[lr, "full_bf16"]
        assert f"{100 * row['share']:.1f} % ± {100 * row['sd']:.1f} %" in WORDS
    nearest = [round(100 * rows[lr, precisions.NEAREST]["share"]) for lr in precisions.RATES]
    assert "it learns {} % and {} %".format(*nearest) in WORDS


def test_what_is_said_of_the_schedules_is_what_the_study_found():
    lines = study_report.paired(json.loads((RESULTS / "study.json").read_text())["schedules"])
    told = {(line["factor"], line["schedule"]): line for line in lines if "half" in line}
    at_the_ceiling = [
        (1, name) for name in ("1 cycle", "linear to zero", "2 cycles", "4 cycles", "8 cycles", "25 cycles")
    ]
    for name in (*at_the_ceiling, (0.5, "1 cycle"), (2, "linear to zero"), (2, "25 cycles")):
        difference, half = abs(100 * told[name]["difference"]), 100 * told[name]["half"]
        assert f"{difference:.1f} % ± {half:.1f} %" in WORDS, name


def test_what_is_said_of_averages_is_what_the_study_found():
    told = {
        line["schedule"]: line
        for line in study_report.paired(json.loads((RESULTS / "study.json").read_text())["averages"])
    }
    sign = {"constant, EMA 0.9999": -1, "linear to zero": -1, "linear to zero, EMA 0.9999": -1, "4 cycles": 1, "4 cycles, mean of the troughs": 1}  # fmt: skip
    for name, way in sign.items():
        line = told[name]
        assert way * line["difference"] > line["half"], "as sure as it is said"
        assert f"{100 * abs(line['difference']):.1f} % ± {100 * line['half']:.1f} %" in WORDS, name
        assert line["pairs"] == 9 and f"({line['steps']} steps; those above have" in WORDS


def test_what_is_said_of_the_default_is_what_the_study_found():
    found = study_report.paired(json.loads((RESULTS / "study.json").read_text())["planned"])
    told = {line["schedule"]: f"{-100 * line['difference']:.1f} % ± {100 * line['half']:.1f} %" for line in found if "half" in line}  # fmt: skip
    one, two, four, line = (told[name] for name in ("1 cycle", "2 cycles", "4 cycles", "linear to zero"))
    assert f"(better by {four}), two are better by {two}, one by {one}, and a line to zero by {line}" in WORDS
    assert {line["pairs"] for line in found} == {9} and f"κ 1, {found[0]['steps']} steps; nine pairs" in WORDS
    assert RunConfig.model_fields["schedule"].default.cycles == 4


def test_what_is_said_of_prior_pictures_is_what_the_study_found():
    record = json.loads((RESULTS / "study.json").read_text())
    one, three = study_report.against_none(record["prior"])
    assert (one["kappa"], three["kappa"], one["pairs"], record["scale"]["prior"]) == (1.0, 3.0, 9, 64)
    leak, likeness = "leak into other prompts", "likeness to the subject"
    for line in (one, three):
        assert f"{line[leak][1]:.3f} instead of {line[leak][0]:.3f} at κ {line['kappa']:g}" in WORDS
        assert f"{100 * abs(line['loss'][0]):.1f} % ± {100 * line['loss'][1]:.1f} %" in WORDS
    assert one["loss"][0] > one["loss"][1]
    assert three["loss"][0] < -three["loss"][1]
    likes = [[f"{line[likeness][side]:.3f}" for line in (one, three)] for side in (1, 0)]
    assert "{} and {} instead of {} and {}".format(*likes[0], *likes[1]) in WORDS
    for name in (leak, likeness):
        changes = [f"{-line[name][2]:.3f} ± {line[name][3]:.3f}" for line in (one, three)]
        assert f"(less by {' and '.join(changes)})" in WORDS


def test_what_is_said_of_the_ladder_is_what_the_study_found():
    rows = json.loads((RESULTS / "study.json").read_text())["ladder"]
    of = {name: (more, faster) for name, more, faster in study_report.contrasts(rows)}
    variety, likeness, leak = (of[name] for name in ("variety between seeds", "likeness to the subject", "leak into other prompts"))  # fmt: skip
    assert f"falls by {variety[0].removeprefix('-')} (of" in WORDS
    assert f"likeness ({likeness[0]})" in WORDS and f"leak into other prompts ({leak[0]})" in WORDS
    for name, told in of.items():
        (more, sure), (faster, as_sure) = (map(float, each.split(" ± ")) for each in told)
        assert (abs(more) > sure) == (name == "variety between seeds")
        assert abs(faster) <= as_sure
    lines = study_report.rungs(rows)
    lost = []
    for rate in {line["rate"] for line in lines}:
        base, *losses = [line["loss"] for line in lines if line["rate"] == rate]
        lost.append((losses[-1] - min(losses)) / (base - min(losses)))
    assert f"{100 * min(lost):.0f} % to {100 * max(lost):.0f} % of the gain is lost again" in WORDS
    at_one = [line["variety between seeds"][0] for line in lines if line["kappa"] == 1]
    assert f"(of {sum(at_one) / len(at_one):.3f})" in WORDS


def test_what_is_said_of_more_pictures_is_what_the_study_found():
    lines = study_report.paired(json.loads((RESULTS / "study.json").read_text())["sizes"])
    told = [line for line in lines if "half" in line and line["schedule"] != "constant"]
    assert len(told) == 3 and all(line["pairs"] == 9 for line in told)
    for line in told:
        assert f"{-100 * line['difference']:.1f} % ± {100 * line['half']:.1f} %" in WORDS, line["schedule"]
