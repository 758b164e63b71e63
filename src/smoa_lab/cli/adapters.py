"""The commands that take a saved adapter or its run, or a model alone: ``smoa merge``, ``convert``, ``verify``,
``inspect``, ``chat`` and ``budget``; and ``smoa exec``, other tools on adapters."""

from __future__ import annotations

import importlib
import runpy
import sys
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Literal

import typer

from smoa_lab.cli.console import (
    Adapter,
    AsJson,
    Base,
    BaseDtype,
    Settings,
    Trusted,
    failed,
    print_json,
    reporting,
    show,
)

MergedDtype = Literal["auto", "float32", "bfloat16", "float16"]
"""The choices of smoa_lab.export, whose import would make ``--help`` wait for torch."""


def merge(
    adapter: Adapter,
    output: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    dtype: Annotated[MergedDtype, typer.Option(help="Dtype to load and save the base in; auto: its own.")] = "auto",
    base: Base = None,
    verify: Annotated[bool, typer.Option(help="Compare the saved model with the adapter on ten prompts.")] = True,
    trust_remote_code: Trusted = False,
    json: AsJson = False,
) -> None:
    """Merge an adapter into its base model and save the result as a model that needs no adapter.

    Exit code 1: the saved model does not say what the adapter says.
    """
    with reporting():
        from smoa_lab.export import merge_run
        from smoa_lab.export import verify as compared

        merged = merge_run(adapter, output, dtype, base)
        if not json:
            typer.echo(f"{merged.folder}: {merged.summary()}")
        verdict = compared(adapter, [str(output)], base)[0] if verify else None
        if json:
            print_json(merged.to_dict() | {"verified": verdict and verdict.to_dict()})
        elif verdict:
            typer.echo(verdict.line())
        if verdict and not verdict.agrees:
            raise typer.Exit(1)


def convert(
    adapter: Adapter,
    output: Annotated[Path, typer.Argument(help="New folder for the LoRA.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every layer; give this or --energy.")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of ‖ΔW‖² to keep in every layer, e.g. 0.9.")] = None,
    base: Base = None,
    trust_remote_code: Trusted = False,
    json: AsJson = False,
) -> None:
    """Approximate a SMoA adapter by a LoRA, and measure what that loses of the update.

    What it loses of the task: smoa eval RUN --adapter LORA.
    """
    with reporting():
        from smoa_lab.export import convert_run

        if (rank is not None and energy is not None) or (kept := energy if rank is None else rank) is None:
            raise failed("give --rank or --energy")
        result = convert_run(adapter, output, kept, base)
        if json:
            print_json(result)
            return
        typer.echo(
            f"{result['folder']}: LoRA of rank {result['rank']}, {result['parameters']:,} parameters (the adapter has "
            f"{result['adapter_parameters']:,}); ‖ΔW − BA‖/‖ΔW‖ = {result['error']:.3f} over all layers."
        )
        if result["options"]:
            typer.echo(f"The adapter's base was loaded with {result['options']}; load the LoRA's base with them too.")


def verify(
    adapter: Adapter,
    against: Annotated[
        list[str] | None, typer.Option(help="A model's or LoRA's folder, or merged: in memory. May be repeated.")
    ] = None,
    base: Base = None,
    trust_remote_code: Trusted = False,
    json: AsJson = False,
) -> None:
    """Check on ten prompts that a merged model or a LoRA says what the adapter says.

    Exit code 1: one does not.
    """
    with reporting():
        from smoa_lab.export import IN_MEMORY
        from smoa_lab.export import verify as compared

        verdicts = compared(adapter, against or [IN_MEMORY], base)
        show("\n".join(verdict.line() for verdict in verdicts), [verdict.to_dict() for verdict in verdicts], json)
        if not all(verdict.agrees for verdict in verdicts):
            raise typer.Exit(1)


def inspect(
    adapters: Annotated[list[Path], typer.Argument(help="Folder of a run, or of an adapter; several side by side.")],
    base: Base = None,
    picture: Annotated[Path | None, typer.Option(help="Draw how far each layer was moved into this PNG file.")] = None,
    trust_remote_code: Trusted = False,
    json: AsJson = False,
) -> None:
    """Show size, norm, ranks and spectral coverage of the update of every adapted layer."""
    with reporting():
        from smoa_lab.inspect import inspect_layers, layer_table, moved
        from smoa_lab.pages.charts import save_picture

        reports = {str(place): inspect_layers(place, base) for place in adapters}
        if picture is not None:
            save_picture(moved(reports), picture)
        if json:
            plain = {place: [report.to_dict() for report in layers] for place, layers in reports.items()}
            print_json(plain if len(plain) > 1 else next(iter(plain.values())))
            return
        for place, layers in reports.items():
            if len(reports) > 1:
                typer.echo(f"\n{place}")
            layer_table(layers).print()
            if far := sum(report.moved_too_far for report in layers):
                typer.echo(f"\n! {far} of {len(layers)} layers were moved far: the model may have forgotten much.")


def chat(
    place: Annotated[
        str, typer.Argument(metavar="RUN_OR_FOLDER", help="Folder of a run, of an adapter or of a model, or a Hub id.")
    ],
    base: Base = None,
    dtype: BaseDtype = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    template: Annotated[str | None, typer.Option(help="alpaca, a name that TRL has, or a .jinja file.")] = None,
    trust_remote_code: Trusted = False,
) -> None:
    """Chat with an adapted model and compare it with its base; /help lists the commands."""
    with reporting():
        from smoa import SmoaError
        from smoa_lab.chat import Chat
        from smoa_lab.open_run import open_place

        chat = Chat(open_place(place, base).with_changes(dtype, template), max_new_tokens, temperature, system)
        with suppress(ImportError):  # Windows has none
            importlib.import_module("readline")  # input() then keeps a history
        while True:
            try:
                chat.respond(input(f"{chat.name}> " if sys.stdin.isatty() else ""))
            except EOFError:
                return
            except SmoaError as error:
                typer.echo(f"error: {error}", err=True)


def budget(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or gemma3-270m, smollm2-135m; no weights are loaded.")],
    amount: Annotated[str, typer.Argument(help="Share of the model, such as 0.1%, number of parameters, or lora:8.")],
    target_modules: Annotated[str, typer.Option(help="Layers to adapt, by commas, or all-linear.")] = "all-linear",
    method: Annotated[list[str] | None, typer.Option(help="Size this method instead, or all; may be repeated.")] = None,
    settings: Settings = None,
    trust_remote_code: Trusted = False,
    json: AsJson = False,
) -> None:
    """List the r that fits a parameter budget with each num_blocks, or the size of other methods at it."""
    with reporting():
        from smoa.errors import ConfigError
        from smoa_lab.budget import method_settings, size_methods
        from smoa_lab.config.methods import method_names
        from smoa_lab.pages.tables import Table

        names = [name.strip() for name in target_modules.split(",")]
        wanted = method_names() if method == ["all"] else method or ["smoa"]
        own = method_settings(settings or [])
        if other := [name for name in own if name not in map(str.lower, wanted)]:
            raise ConfigError(f"--set {other[0]}: name the method too, --method {other[0]}")
        sized = size_methods(model, amount, names, wanted, own)
        if json:
            print_json([asdict(one) for one in sized])
            return
        rows = [
            (
                one.method,
                ", ".join(f"{key}: {value}" for key, value in one.adapter.items()),
                "" if one.parameters is None else f"{one.parameters:,}",
                one.note,
            )
            for one in sized
        ]
        Table(["method", "adapter", "parameters", ""], rows).print()


# All words after the tool's name are passed to the tool, `--help` too.
EXEC_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


def execute(
    context: typer.Context,
    tool: Annotated[str, typer.Argument(help="Command of a Python package, such as lm_eval, or a .py file.")],
) -> None:
    """Run another tool in a process that knows SMoA adapters; the tool's own options follow its name."""
    commands = list(entry_points(group="console_scripts", name=tool))
    is_script = tool.endswith(".py")
    if is_script and not Path(tool).is_file():
        raise failed(f"{tool}: no such file")
    if not is_script and not commands:
        raise failed(f"{tool!r} is not a command of the packages in {sys.prefix}; install it there, or name a .py file")
    importlib.import_module("smoa")  # registers the method with PEFT
    sys.argv = [tool, *context.args]
    if is_script:
        sys.path.insert(0, str(Path(tool).resolve().parent))  # as Python does for a script
        runpy.run_path(tool, run_name="__main__")
    else:
        sys.exit(commands[0].load()())
