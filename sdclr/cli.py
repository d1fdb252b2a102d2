"""The command line: what each command takes, and the one place where errors become messages and exit codes. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer
from typer.core import TyperGroup

from sdclr import __version__
from sdclr.engine import processes
from sdclr.errors import SdclrError, Terminated

TOGETHER = ("range-test", "train")
"""The commands that several processes can do together; every other one would write the same files twice."""


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The names under which torch looks for its allocator's settings; the first it knows since 2.9, and takes alone."""


UNREACHABLE = (errno.ENAMETOOLONG, errno.EACCES, errno.ENOTDIR, errno.ELOOP)
"""What the system says of a place that a user has named and that nobody can look at."""


class _Boundary(TyperGroup):
    """Where errors become messages and exit codes: around the command, because typer would swallow Ctrl-C and a closed pipe."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; whatever ends it before its time becomes a message and its exit code."""
        try:
            with _sigterm_told():
                result = super().invoke(ctx)
            processes.leave()
            return result
        except SdclrError as problem:
            _end(problem, problem.exit_code)
        except KeyboardInterrupt as stop:
            number = stop.signal_number if isinstance(stop, Terminated) else signal.SIGINT
            what = "stopped by SIGTERM" if number == signal.SIGTERM else "interrupted"
            _end(SdclrError(f"{what}; what was finished has been kept"), 128 + number)
        except BrokenPipeError:
            # Nobody reads on: give Python's last flush somewhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except Exception as problem:
            if isinstance(problem, OSError) and problem.errno in UNREACHABLE:
                _end(SdclrError(f"{problem.filename}: {problem.strerror}"), 2)
            from sdclr.engine import fit  # not at the top: --help has no use for it

            full = fit.out_of_memory(problem)
            if full:
                _end(full, full.exit_code)
            if processes.count() == 1 or isinstance(problem, (typer.Exit, typer.Abort)):
                raise
            _end_together(problem)


@contextlib.contextmanager
def _sigterm_told() -> Iterator[None]:
    """For the time of the block SIGTERM ends the program as Ctrl-C does, so that nothing half-written stays; several processes are
    ended by their launcher."""
    if processes.count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def heard(number: int, frame: Any) -> NoReturn:
        raise Terminated(number)

    before = signal.signal(signal.SIGTERM, heard)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(problem: SdclrError, code: int) -> NoReturn:
    from sdclr.report import console

    with processes.telling() as ours:
        if ours:
            console.error(problem)
    sys.exit(code)


def _end_together(problem: Exception) -> NoReturn:
    """A wrong command line, the loss of another process, or a bug: told once, though several processes meet it."""
    if hasattr(problem, "format_message"):
        _end(SdclrError(problem.format_message()), 2)
    lost = processes.loss_of_another(problem)
    if lost:
        _end(lost, lost.exit_code)
    with processes.telling() as ours:
        if ours:
            traceback.print_exception(problem)
    sys.exit(1)


app = typer.Typer(
    cls=_Boundary,
    name="sdclr",
    help="Which learning rate, for how long, on what schedule, for my images and my Stable Diffusion?\n\n"
    "Exit codes: 0 done, 1 the run failed, 2 the config or input is wrong, 3 inconclusive, 130/143 interrupted after saving.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich's panels need a Markdown parser, a quarter of the time that help takes
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[Path, typer.Argument(help="the run's YAML file", show_default=False)]
Sets = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="override one key, e.g. --set train.steps=800; repeatable"),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no talk and no progress bars, only results and errors")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"sdclr {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    if ctx.invoked_subcommand not in TOGETHER:
        processes.refuse_several(f"sdclr {ctx.invoked_subcommand}")


@app.command("range-test")
def range_test(
    config: Annotated[
        Optional[Path], typer.Argument(help="the run's YAML file; optional with --from", show_default=False)
    ] = None,
    set_: Sets = [],  # noqa: B006 (typer reads it)
    from_: Annotated[
        Optional[Path],
        typer.Option(
            "--from",
            metavar="CURVES.CSV",
            help="judge curves another program logged (columns lr, step, val_loss[, image]; step 0 is the untouched model); trains nothing",
        ),
    ] = None,
    legacy: Annotated[
        Optional[str],
        typer.Option(
            metavar="linear|exponential", help="run the field's single ramp instead; prints the S* it implies"
        ),
    ] = None,
    max_minutes: Annotated[
        Optional[float], typer.Option(help="stop after this long; finished arms are kept and never run again")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="say at length what was measured and why the answer is what it is")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how high the rate may go, and for how long. On the held-out images of the config."""
    if config is None and from_ is None:
        raise typer.BadParameter("name the run's YAML file, or curves with --from", param_hint="CONFIG")
    if config is None and set_:
        raise typer.BadParameter("overrides a config, and none is named", param_hint="--set")
    if max_minutes is not None and not 0 < max_minutes < math.inf:
        raise typer.BadParameter(
            f"must be a number of minutes above 0; got {max_minutes:g}", param_hint="--max-minutes"
        )
    if from_ and (legacy or max_minutes or explain):
        raise typer.BadParameter(
            "trains nothing, so it goes with none of --legacy, --max-minutes and --explain", param_hint="--from"
        )
    if legacy and explain:
        raise typer.BadParameter("explains a range test, and --legacy runs none", param_hint="--explain")
    if legacy and json_:
        raise typer.BadParameter("prints a range test's result, and --legacy has none", param_hint="--json")
    _begin(config, set_, quiet)
    if from_:
        processes.refuse_several("sdclr range-test --from")
        from sdclr.commands.range_test_from import range_test_from

        return range_test_from(from_, config, set_, as_json=json_)
    assert config is not None
    from sdclr.commands.range_test import range_test as command

    command(config, set_, legacy=legacy, max_minutes=max_minutes, as_json=json_, at_length=explain)


@app.command()
def train(
    config: Config,
    set_: Sets = [],  # noqa: B006
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint that is whole")] = False,
    checkpoint: Annotated[Optional[Path], typer.Option(help="with --resume: this checkpoint and no other")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune with a cyclical rate, watching held-out images."""
    if dry_run and (resume or checkpoint):
        raise typer.BadParameter("plans a run from its start; --resume goes on with one", param_hint="--dry-run")
    _begin(config, set_, quiet)
    if dry_run:
        processes.refuse_several("sdclr train --dry-run")
        from sdclr.commands.check import check as plan_only

        return plan_only(config, set_, need_plan=True)
    from sdclr.commands.train import train as command

    command(config, set_, resume=resume, checkpoint=checkpoint)


@app.command()
def sample(
    config: Config,
    set_: Sets = [],  # noqa: B006
    run: Annotated[list[Path], typer.Option(help="another run's folder to put beside this one; repeatable")] = [],  # noqa: B006
    checkpoint: Annotated[list[Path], typer.Option(help="only these checkpoints (folders); repeatable")] = [],  # noqa: B006
    output: Annotated[Optional[Path], typer.Option(help="folder for the grid [default: samples/ of the run]")] = None,
    score: Annotated[
        Optional[str],
        typer.Option(
            metavar="PATH_OR_ID", help="CLIP model that scores the pictures: likeness, obedience, variety, with spread"
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Draw checkpoints side by side. Same prompts, same seeds, same noise."""
    if run and checkpoint:
        raise typer.BadParameter("draws those checkpoints alone, so --run would be ignored", param_hint="--checkpoint")
    _begin(config, set_, quiet)
    from sdclr.commands.sample import sample as command

    command(config, set_, runs=run, checkpoints=checkpoint, output=output, score=score)


@app.command()
def draw(
    config: Config,
    prompt: Annotated[list[str], typer.Argument(help="what to draw; several take turns", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="the folder to draw into", show_default=False)],
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=10_000, help="how many pictures in all")] = 100,
    set_: Sets = [],  # noqa: B006
    quiet: Quiet = False,
) -> None:
    """Draw captioned pictures with the untouched base. For prior.images: what the model shall keep."""
    _begin(config, set_, quiet)
    from sdclr.commands.draw import draw as command

    command(config, prompt, output, count, set_)


@app.command()
def export(
    config: Config,
    set_: Sets = [],  # noqa: B006
    checkpoint: Annotated[
        Optional[Path], typer.Option(help="the state to export, a folder [default: final/ of the run]")
    ] = None,
    precision: Annotated[str, typer.Option(metavar="fp16|bf16|fp32", help="of the weights in the file")] = "fp16",
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="the file to write [default: export/ of the run]")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write a state as one .safetensors file. For A1111, Forge, ComfyUI and other programs that draw."""
    _begin(config, set_, quiet)
    from sdclr.commands.export import export as command

    command(config, set_, checkpoint, precision, output)


@app.command()
def init(
    images: Annotated[Optional[Path], typer.Argument(help="folder of your pictures", show_default=False)] = None,
    base: Annotated[
        str, typer.Option(help="model: diffusers folder, .safetensors file or hub id")
    ] = "stable-diffusion-v1-5/stable-diffusion-v1-5",
    output: Annotated[Path, typer.Option("--output", "-o", help="the file to write")] = Path("run.yaml"),
    stdout: Annotated[bool, typer.Option("--stdout", help="print it instead")] = False,
) -> None:
    """Write a commented config for a folder of images."""
    from sdclr.commands.init import init as command

    command(images, base, output, stdout)


@app.command()
def check(config: Config, set_: Sets = [], quiet: Quiet = False) -> None:  # noqa: B006
    """Read everything, train nothing. Config, images, captions, model, and the plan of the run."""
    _begin(config, set_, quiet)
    from sdclr.commands.check import check as command

    command(config, set_)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for compare.png and compare.html")] = Path(
        "runs"
    ),
    json_: Json = False,
) -> None:
    """Lay the curves of several runs over one another. Against step and against exposure, with a table."""
    from sdclr.commands.compare import compare as command

    command(runs, output, json_)


def set_environment() -> None:
    """What libraries read of the environment when they are imported, unless the user has set it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # They would warn of torchvision and of kernels for 4-bit weights, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # A GPU's memory has fewer gaps where its segments grow: 3.9 GiB of SD 1.5's smallest full fine-tune instead of 4.4 (memory-cuda.json).
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def _begin(config: Path | None, overrides: list[str], quiet: bool) -> None:
    """What commands on a config share: quiet or not, and a bad config refused before anything heavy is imported."""
    set_environment()
    from sdclr.config import source
    from sdclr.report import console

    console.quiet = quiet
    if config is not None:
        source.load(config, overrides)


def main() -> None:
    """Run the command line; every SdclrError becomes its message and exit code, every other exception stays a bug with its traceback."""
    app()
