"""How fast does `sdclr train` train, and in how much memory? Beside the bare floor and beside diffusers' own script.

    python tests/benchmarks/throughput.py --quick                 # two minutes: does it run?
    python tests/benchmarks/throughput.py                         # the demo model at batch 1, 4 and 16
    python tests/benchmarks/throughput.py --full-size             # steps of the true SD 1.5 shape at 256 pixels (16 GiB)
    python tests/benchmarks/throughput.py --device cuda           # SD 1.5 at 512 pixels in bf16, with the card's measured ceilings
    python tests/benchmarks/throughput.py --device cuda --variants compiled    # the same, compiled: two minutes more for each batch
    python tests/benchmarks/throughput.py --device cuda --variants xformers,lora    # with another attention kernel; a LoRA
    python tests/benchmarks/throughput.py --xl                    # an SDXL of middle size at 128 pixels; with --device cuda SDXL itself at 1024
    python tests/benchmarks/throughput.py --startup               # help, a config error, the first step
    python tests/benchmarks/throughput.py --caches                # 10,000 pictures: the first reading and the next
    python tests/benchmarks/throughput.py --memory                # what sdclr check says a run needs, and what it took (4 GiB; or --device cuda, of SDXL with --xl)
    python tests/benchmarks/throughput.py --memory --full-size    # the same of the smallest runs of the true shapes, on the CPU (16 GiB)
    make bench

Contestants take turns in short rounds, each in a process of its own, so that whatever else the machine does falls on all of them;
ratios are taken round by round. Results: JSON in the work folder, Markdown on stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from contestants import VARIANTS

ROOT = Path(__file__).parent.parent.parent
BARS = {"floor": 1.05, "script": 1.5, "memory": 1.0, "validation": 0.5, "matmul": 0.3}
"""sdclr's step ≤ 1.05 × the floor's; ≥ 1.5 × the script's images/s at batch 4; ≤ its peak memory; a batched forward ≤ half an unbatched; on a GPU
≥ 30 % of the rate of its bf16 matrix product."""
FLOP_AN_IMAGE = {"model-sd15": 2.41e12, "model-sdxl": 20.2e12}
"""Forward and backward of the UNet on one picture of 512 or 1024 pixels, as torch's FlopCounterMode counts them (tests/test_shapes.py)."""
TRAINERS = ("floor", "sdclr", "script")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured on, and how long: rounds of about `seconds` each."""

    model: Path
    images: Path
    resolution: int
    vae_factor: int
    batches: tuple[int, ...]
    device: str
    rounds: int
    seconds: float
    kinds: tuple[str, ...] = TRAINERS
    together: bool = True  # contestants alive at the same time; else one after the other (not enough memory for three)


class Contestant:
    """A contestant's process; `warm` leaves it what an earlier one has cached."""

    def __init__(self, kind: str, setting: Setting, batch: int, work: Path, *more: str, warm: bool = False):
        folder = work / f"{kind}-{batch}"
        shutil.rmtree(folder / "runs" / f"bench-{batch}" if warm else folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(Path(__file__).with_name("contestants.py")), kind]
        for name in ("model", "images", "resolution", "vae_factor", "device"):
            command += [f"--{name.replace('_', '-')}", str(getattr(setting, name))]
        self.kind, self.noise = kind, folder / "stderr"
        self.process = subprocess.Popen(
            [*command, "--batch", str(batch), "--work", str(folder), *more],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.noise.open("w"), text=True,
            cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
        )  # fmt: skip
        self.imported = self._hear("imported")["imported"]
        self.ready = self._hear("ready")

    def round(self, steps: int) -> dict[str, float]:
        """Let it train; what it says of it."""
        self._tell(str(steps))
        return self._hear()

    def end(self) -> dict[str, Any]:
        """Its peak memory in bytes: whole, above its imports, and on the device; and how it was allocated there."""
        self._tell("end")
        said = self._hear("peak")
        self.process.wait()
        above = said["peak"] - self.imported
        return {
            "peak": said["peak"],
            "above_imports": above,
            "device": said["device_peak"],
            "allocator": said["allocator"],
        }

    def _tell(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _hear(self, key: str | None = None) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                said = json.loads(line)
                if key is None or key in said:
                    return said
        raise SystemExit(f"{self.kind} ended early:\n{self.noise.read_text()[-3000:]}")


def train(setting: Setting, batch: int, work: Path) -> dict[str, Any]:
    """Rounds of the three trainers at one batch size: seconds a step in each round, and peak memory."""
    times: dict[str, list[float]] = {kind: [] for kind in setting.kinds}
    memory: dict[str, Any] = {}
    if not setting.together:
        for kind in setting.kinds:
            contestant = Contestant(kind, setting, batch, work)
            if setting.device == "cuda":
                contestant.round(5)  # recording, choosing of kernels
            first = contestant.round(1)["seconds"]
            steps = max(1, round(setting.seconds / first))
            times[kind] = [contestant.round(steps)["seconds"] / steps for _ in range(setting.rounds)]
            memory[kind] = contestant.end()
        return {"seconds": times, "memory": memory}
    contestants = [Contestant(kind, setting, batch, work) for kind in setting.kinds]
    for contestant in contestants:
        contestant.round(3)  # warm-up
    once = {c.kind: c.round(3)["seconds"] / 3 for c in contestants}
    steps = max(1, round(setting.seconds / min(once.values())))
    for number in range(setting.rounds):
        turn = number % len(contestants)
        for contestant in contestants[turn:] + contestants[:turn]:
            times[contestant.kind].append(contestant.round(steps)["seconds"] / steps)
    memory = {c.kind: c.end() for c in contestants}
    return {"seconds": times, "memory": memory, "steps_a_round": steps}


def validate(setting: Setting, work: Path) -> dict[str, Any]:
    """Seconds a validation forward, batched and one by one."""
    contestant = Contestant("validation", setting, 4, work)
    contestant.round(1)
    said = [contestant.round(1) for _ in range(setting.rounds)]
    contestant.end()
    return {"batch": contestant.ready["batch"], "draws": contestant.ready["draws"],
            **{kind: [s[kind] for s in said] for kind in ("batched", "unbatched")}}  # fmt: skip


# Telling ------------------------------------------------------------------------------------------------------------------------


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of the ratio, round by round."""
    return quartiles([a / b for a, b in zip(above, below, strict=True)])


def shown(values: tuple[float, float, float], form: str = ".3f") -> str:
    """Median, with the quartiles."""
    return f"{values[1]:{form}} ({values[0]:{form}} to {values[2]:{form}})"


def verdict(holds: bool) -> str:
    return "holds" if holds else "MISSED"


def told(result: dict[str, Any]) -> list[str]:
    """The machine's facts in words."""
    return [f"- {name}: {value}" for name, value in result["machine"].items() if isinstance(value, str)]


def markdown(result: dict[str, Any]) -> str:
    """The result as tables; every median with its quartiles."""
    lines = ["## Throughput", "", *told(result), ""]
    lines += ["| batch | contestant | ms a step | images/s | × floor | peak MiB | above imports MiB |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    bars = []
    for batch, found in result["batches"].items():
        times, memory = found["seconds"], found["memory"]
        for kind in times:
            own, m = times[kind], memory[kind]
            peak = m["device"] or m["peak"]
            lines.append(
                f"| {batch} | {kind} | {shown(quartiles([1000 * t for t in own]), '.1f')} | {int(batch) / quartiles(own)[1]:.1f} "
                f"| {shown(ratio(own, times['floor']))} | {peak / 2**20:.0f} | {m['above_imports'] / 2**20:.0f} |"
            )
        ours = [kind for kind in times if kind in VARIANTS]
        for own in ours:
            slower = ratio(times[own], times["floor"])
            bars.append(f"- batch {batch}: {own} / floor {shown(slower)}, bar {BARS['floor']}: {verdict(slower[1] <= BARS['floor'])}")  # fmt: skip
        if "script" in times:
            faster = ratio(times["script"], times["sdclr"])
            bar = f", bar {BARS['script']}: {verdict(faster[1] >= BARS['script'])}" if batch == "4" else ""
            bars.append(f"- batch {batch}: images/s of sdclr / script {shown(faster)}{bar}")
        for kind in times if "matmul" in result["machine"] else ():
            share = (
                FLOP_AN_IMAGE[result["model"]] * int(batch) / quartiles(times[kind])[1] / result["machine"]["matmul"]
            )
            verdict_ = f", bar {BARS['matmul']:.0%}: {verdict(share >= BARS['matmul'])}" if kind in ours else ""
            bars.append(f"- batch {batch}: {kind} at {share:.1%} of the rate of a bf16 matrix product{verdict_}")
        rival = "script" if "script" in times else "floor"
        for own in ours:
            for name in ("device",) if memory[own]["device"] else ("peak", "above_imports"):
                share = memory[own][name] / memory[rival][name]
                bars.append(f"- batch {batch}: memory ({name}) of {own} / {rival} {share:.3f}, bar {BARS['memory']}: {verdict(share <= BARS['memory'])}")  # fmt: skip
    if "validation" in result:
        v = result["validation"]
        share = ratio(v["batched"], v["unbatched"])
        bars.append(
            f"- validation: {1000 * quartiles(v['batched'])[1]:.1f} ms a forward in batches of {v['batch']}, {1000 * quartiles(v['unbatched'])[1]:.1f} one by one: "
            f"{shown(share)}, bar {BARS['validation']}: {verdict(share[1] <= BARS['validation'])}"
        )
    return "\n".join([*lines, "", *bars, ""])


def machine(device: str) -> dict[str, Any]:
    """What it was measured on."""
    import accelerate
    import diffusers
    import torch

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())  # fmt: skip
    facts = {
        "CPU": f"{cpu}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)",
        "load": " ".join(f"{value:.2f}" for value in os.getloadavg()),
        "the script's imports": "all" if find_spec("datasets") else "without datasets (pip install '.[bench]')",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}, accelerate {accelerate.__version__}",
    }
    if device == "cuda":
        flops, rate = ceilings()
        facts |= {
            "GPU": torch.cuda.get_device_name(),
            "ceilings": f"{flops / 1e12:.0f} TFLOP/s (bf16 matrix product), {rate / 1e9:.0f} GB/s (copy)",
            "matmul": flops,
        }
    return facts


def ceilings() -> tuple[float, float]:
    """The card's own speed: FLOP/s of a large bf16 matrix product, and bytes/s read and written by a copy."""
    import torch

    def best_of(work: Any, repeats: int = 10) -> float:
        found = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) / 1000)
        return min(found)

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    big, other = (torch.empty(2**30, device="cuda", dtype=torch.uint8) for _ in range(2))
    return 2 * 8192**3 / best_of(lambda: a @ a), 2 * 2**30 / best_of(lambda: big.copy_(other))


def setting_of(args: argparse.Namespace) -> Setting:
    """What the command line asks to be measured."""
    rounds, seconds = (3, 0.5) if args.quick else (15, 4.0)
    rounds = args.rounds or rounds
    if args.device == "cpu" and not args.full_size and not args.xl:
        batches = args.batches or ((1, 4) if args.quick else (1, 4, 16))
        return Setting(ROOT / "data/tiny-sd", ROOT / "data/mochi", 64, 4, batches, "cpu", rounds, seconds)
    from shapes import folder_of

    if args.device == "cpu" and args.xl:
        model = folder_of("middle-xl", args.work)
        return Setting(model, ROOT / "data/mochi", 128, 8, args.batches or (1, 4), "cpu", rounds, seconds)
    model = folder_of("sdxl" if args.xl else "sd15", args.work)
    if args.device == "cuda":
        rounds, seconds = (3, 0.5) if args.quick else (args.rounds or 9, 1.0)
        kinds = ("floor", *args.variants) if args.variants else TRAINERS
        resolution, batches = (1024, (1, 4)) if args.xl else (512, (1, 4, 16))
        return Setting(model, ROOT / "data/mochi", resolution, 8, args.batches or batches, "cuda", rounds, seconds, kinds, together=False)  # fmt: skip
    return Setting(
        model, ROOT / "data/mochi", 256, 8, args.batches or (1,), "cpu", args.rounds or 7, 0.0, together=False
    )


def keep(work: Path, name: str, result: dict[str, Any]) -> None:
    """Write the result as JSON."""
    work.mkdir(parents=True, exist_ok=True)
    (work / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Measure what the command line asks for, write the JSON, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and short rounds: numbers of no worth")
    parser.add_argument(
        "--full-size",
        action="store_true",
        help="the true SD 1.5 shape, steps at 256 pixels, one contestant after another",
    )
    parser.add_argument(
        "--startup", action="store_true", help="instead: how long help, a config error and the first step take"
    )
    parser.add_argument("--xl", action="store_true", help="the shape of SDXL (on the CPU one of middle size)")
    parser.add_argument("--caches", action="store_true", help="instead: how long many pictures take to be read")
    parser.add_argument("--memory", action="store_true", help="instead: memory as foretold and as used")
    parser.add_argument(
        "--variants",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help=f"with --device cuda: sdclr set otherwise, beside the floor alone: of {', '.join(VARIANTS)}",
    )
    parser.add_argument("--pictures", type=int, default=10_000, help="with --caches")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batches", type=lambda text: tuple(map(int, text.split(","))), help="such as 1,4,16")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="for models, runs and results")
    parser.add_argument("--rounds", type=int, help="rounds of each contestant [15; --quick: 3; --full-size: 7]")
    args = parser.parse_args()
    if args.xl and args.full_size:
        parser.error("the true shape of SDXL takes more memory than such machines have: --xl --device cuda")
    if set(args.variants) - set(VARIANTS):
        parser.error(f"--variants are of {', '.join(VARIANTS)}")
    args.work = args.work.resolve()
    if args.startup:
        import startup

        setting = setting_of(args)

        def first_step() -> float:
            started = time.perf_counter()
            contestant = Contestant("sdclr", setting, 4, args.work, warm=True)
            contestant.round(1)
            seconds = time.perf_counter() - started
            contestant.end()
            return seconds

        found = startup.measure(setting.model, args.work / "startup", first_step, 3 if args.quick else 9)
        result = {"machine": machine(args.device), **found}
        text, name = startup.markdown(result), "startup"
    elif args.caches:
        import caches

        result = {"machine": machine(args.device), **caches.measure(args.work, 500 if args.quick else args.pictures)}
        text, name = caches.markdown(result), "caches"
    elif args.memory:
        import foretold

        name = f"memory{'-cuda' * (args.device == 'cuda')}{'-xl' * args.xl}{'-full-size' * args.full_size}"
        result = {"machine": machine(args.device), "cases": []}
        for case in foretold.cases(args.work, args.quick, args.device, args.full_size, args.xl):
            try:
                result["cases"].append(foretold.measure(args.work, case, args.device))
            except SystemExit as ended:  # the others are worth their time
                print(f"{case}: {ended}", file=sys.stderr, flush=True)
            keep(args.work, name, result)
        text = foretold.markdown(result)
    else:
        setting = setting_of(args)
        name = "-".join(["throughput", args.device, *["xl"] * args.xl, *["full-size"] * args.full_size, *args.variants])
        result = {"machine": machine(args.device), "model": setting.model.name, "batches": {}}
        for batch in setting.batches:
            result["batches"][str(batch)] = train(setting, batch, args.work)
            print(markdown(result), flush=True)  # a bench that is cut short has shown what it found
            keep(args.work, name, result)
        if not args.full_size and not args.variants:
            result["validation"] = validate(setting, args.work)
        text = markdown(result)
    keep(args.work, name, result)
    print(text)


if __name__ == "__main__":
    main()
