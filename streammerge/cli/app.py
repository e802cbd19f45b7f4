"""The command line: parse, call the API, render. No logic lives here."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.main import get_command

from streammerge.errors import ConfigError, StreamMergeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from streammerge.config import ExportConfig

__all__ = ["app", "main", "run"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Merge LoRA adapters into a checkpoint as a stream, in a memory ceiling of your choice.",
    epilog="Exit codes: 0 done, 2 usage or configuration, 3 bad or mismatched input, 4 not "
    "enough memory or disk, 5 verification found a difference, 130 interrupted "
    "(run again to go on).",
)

_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_CONFIG_HELP = "YAML or JSON file, as `llamafactory-cli export` takes it."


@app.command(context_settings=_OVERRIDES)
def export(
    context: typer.Context,
    config: Annotated[str | None, typer.Argument(help=_CONFIG_HELP)] = None,
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Merge the adapters of CONFIG into its base.

    Any key can be overridden: `key=value` or `--key value`. For example:

    streammerge export llama3_lora_sft.yaml max_memory=4GB --export_dir merged
    """

    def run() -> None:
        from streammerge.cli.render import RichProgress, show_report
        from streammerge.engine.export import export as run_export

        settings = _load(config, context.args)
        report = run_export(settings, progress=RichProgress())
        _print_json(report.to_dict()) if as_json else show_report(report)

    _guard(run, as_json=as_json, debug=debug)


@app.command(context_settings=_OVERRIDES)
def plan(
    context: typer.Context,
    config: Annotated[str | None, typer.Argument(help=_CONFIG_HELP)] = None,
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Say what `export` would do, from headers alone, and write nothing."""

    def run() -> None:
        from streammerge.cli.render import show_plan
        from streammerge.engine.export import build_plan

        merge_plan = build_plan(_load(config, context.args))
        _print_json(merge_plan.describe()) if as_json else show_plan(merge_plan)

    _guard(run, as_json=as_json, debug=debug)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a checkpoint or of an adapter.")],
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Say what a checkpoint or an adapter holds, from its headers alone."""

    def run() -> None:
        from streammerge.cli.render import show_inspection
        from streammerge.engine.inspect import inspect_folder

        found = inspect_folder(path)
        _print_json(found) if as_json else show_inspection(found)

    _guard(run, as_json=as_json, debug=debug)


@app.command()
def tune(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER]...",
            help="Folders on the disks to measure; by default the current one.",
        ),
    ] = None,
    size: Annotated[str, typer.Option(help="Bytes read and written per measurement.")] = "1GB",
    quick: Annotated[bool, typer.Option("--quick", help="Measure less, and only once.")] = False,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Measure the GPUs instead: their link and kernels.")
    ] = False,
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Measure how this machine reads, writes and merges best, for the exports that follow.

    Each folder needs room for twice the size for a while. The result goes to
    ~/.cache/streammerge/machine.json, or to the file that STREAMMERGE_PROFILE names.
    """

    def run() -> None:
        from streammerge.cli.render import show_profile
        from streammerge.config.profile import load_profile, save_profile
        from streammerge.engine.tune import tune as run_tune

        if gpu:
            _tune_gpus(quick=quick, as_json=as_json)
            return
        measured = run_tune(
            folders or [Path()],
            sample_bytes=_parse_size("--size", size),
            quick=quick,
            progress=_print_progress,
        )
        path = save_profile(measured.over(load_profile()[0]))
        if as_json:
            _print_json({"written_to": None if path is None else str(path), **measured.to_dict()})
        else:
            show_profile(measured, path=path)

    _guard(run, as_json=as_json, debug=debug)


def _tune_gpus(*, quick: bool, as_json: bool) -> None:
    from streammerge.cli.render_gpus import show_gpus
    from streammerge.config.profile import load_profile, save_profile
    from streammerge.engine.tune_gpu import tune_gpus

    older = load_profile()[0]
    measured = tune_gpus(
        threads=len(os.sched_getaffinity(0)),
        compute=older.compute,
        quick=quick,
        progress=_print_progress,
    )
    path = save_profile(measured.over(older))
    if as_json:
        _print_json({"written_to": None if path is None else str(path), **measured.to_dict()})
    else:
        show_gpus(measured, path=path)


@app.command(context_settings=_OVERRIDES)
def bench(
    context: typer.Context,
    config: Annotated[str | None, typer.Argument(help=_CONFIG_HELP)] = None,
    runs: Annotated[int, typer.Option(min=1, max=100, help="How often to measure.")] = 3,
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Measure an export against a plain copy of the base's bytes, and publish nothing."""

    def run() -> None:
        from streammerge.cli.render import show_bench
        from streammerge.engine.bench import bench as run_bench

        settings = _load(config, context.args)
        report = run_bench(settings, runs=runs, progress=_print_progress)
        _print_json(report.to_dict()) if as_json else show_bench(report)

    _guard(run, as_json=as_json, debug=debug)


@app.command(name="eval")
def evaluate(  # noqa: PLR0913, PLR0917 (the options of the command)
    checkpoints: Annotated[
        list[str], typer.Argument(help="Folders or hub ids of checkpoints, to be compared.")
    ],
    text: Annotated[Path, typer.Option(help="UTF-8 file with the text.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Adapter to merge onto the first on the way; may be repeated."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG file for a plot of them.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the text that count; all by default.")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    max_memory: Annotated[
        str, typer.Option(help="Ceiling on the resident memory of the whole process.")
    ] = "2GB",
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Measure the perplexity of CHECKPOINTS on a text, layer by layer, and write no model.

    They are in 16 or 32 bit or quantized, so that base, merged and quantized model can be compared.
    """

    def run() -> None:
        from streammerge.cli.render import show_evaluation, show_evaluations
        from streammerge.engine.evaluate import EvaluateOptions
        from streammerge.engine.evaluate import evaluate as run_evaluate
        from streammerge.report.plot import plot_bars, require_matplotlib

        if plot is not None:
            require_matplotlib()
        options = EvaluateOptions(max_tokens, length, _parse_size("--max-memory", max_memory))
        reports = [
            run_evaluate(
                checkpoint,
                text,
                adapters=(adapter or ()) if number == 0 else (),
                options=options,
                progress=_print_progress,
            )
            for number, checkpoint in enumerate(checkpoints)
        ]
        if plot is not None:
            values = [(report.label, report.perplexity) for report in reports]
            plot_bars(plot, values, title=f"Perplexity on {text.name}", unit="perplexity")
        if len(reports) == 1:
            _print_json(reports[0].to_dict()) if as_json else show_evaluation(reports[0])
        elif as_json:
            _print_json([report.to_dict() for report in reports])
        else:
            show_evaluations(reports)

    _guard(run, as_json=as_json, debug=debug)


@app.command(name="compare-bases", context_settings=_OVERRIDES)
def compare_bases(  # noqa: PLR0913, PLR0917 (the options of the command)
    context: typer.Context,
    config: Annotated[str | None, typer.Argument(help=_CONFIG_HELP)] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 file: measure the perplexity of both merges on it.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the text that count; all by default.")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Compare merges of CONFIG onto the base as it is and onto its NF4 codes, as QLoRA trained.

    Nothing is written. It says how far the two bases are apart, in units of what the adapter adds,
    and what of that is there after rounding.
    """

    def run() -> None:
        from streammerge.cli.render_bases import show_bases
        from streammerge.engine.compare import compare_bases as run_compare
        from streammerge.engine.evaluate import EvaluateOptions

        report = run_compare(
            _load(config, context.args),
            text=text,
            options=EvaluateOptions(max_tokens, length),
            progress=_print_progress,
        )
        _print_json(report.to_dict()) if as_json else show_bases(report)

    _guard(run, as_json=as_json, debug=debug)


@app.command()
def version() -> None:
    """Print the version."""
    from streammerge import __version__

    typer.echo(__version__)


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = get_command(app)(standalone_mode=False)
    except typer.Abort:
        _end(130)
    except StreamMergeError as error:
        typer.echo(f"error: {error}", err=True)
        _end(error.exit_code)
    except Exception as error:
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        _end(int(getattr(error, "exit_code", 2)))
    _end(code if isinstance(code, int) else 0)


def run() -> NoReturn:
    """Run the command line as the whole of a process."""
    code = 1
    try:
        main()
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except Exception:  # noqa: BLE001 (a fault of ours: shown as the interpreter would)
        traceback.print_exc()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # whoever read it is gone
        code = code or 1
    # taking the interpreter and torch apart takes 0.25 s, for memory that ends with the process
    os._exit(code)


def _end(code: int) -> NoReturn:
    sys.exit(code)


def _load(config: str | None, overrides: list[str]) -> ExportConfig:
    from streammerge.config import load_config

    if (
        config is not None
        and (config.startswith("--") or "=" in config)
        and not Path(config).exists()
    ):
        # everything on the command line: `streammerge export --model_name_or_path ...`
        return load_config(None, [config, *overrides])
    return load_config(config, overrides)


def _guard(run: Callable[[], None], *, as_json: bool, debug: bool) -> None:
    """Turn an error into one line and the exit code of its family."""
    try:
        run()
    except StreamMergeError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"error: {error}", err=True)
        if as_json:
            _print_json(
                {"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
            )
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt:
        typer.echo("error: interrupted", err=True)
        raise typer.Exit(130) from None
    except OSError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"error: {error.strerror or error}, in {error.filename}", err=True)
        raise typer.Exit(3) from error


def _parse_size(option: str, text: str) -> int:
    from streammerge.config.sizes import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"{option} is no size", expected=error, got=repr(text)) from error


def _print_progress(line: str) -> None:
    typer.echo(line, err=True)


def _print_json(value: dict[str, Any] | list[dict[str, Any]]) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
