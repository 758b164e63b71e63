"""The commands that take a saved adapter or its run, or a model alone: ``smoa merge``, ``convert``, ``verify``,
``inspect``, ``report``, ``chat`` and ``budget``; and ``smoa exec``, other tools on adapters."""

from __future__ import annotations

import importlib
import logging
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
"""The choices of smoa_lab.merge, whose import would make ``--help`` wait for torch."""


def merge(
    adapter: Adapter,
    output: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    dtype: Annotated[MergedDtype, typer.Option(help="Dtype to load and save the base in; auto: its own.")] = "auto",
    base: Base = None,
    verify: Annotated[bool, typer.Option(help="Compare the saved model with the adapter on ten prompts.")] = True,
    trust_remote_code: Trusted = False,
    json: AsJson = False,
) -> None:
    """Merge an adapter into its base model and save the result as a model that needs no adapter."""
    with reporting():
        from smoa_lab.merge import merge_run
        from smoa_lab.verify import verify_merged

        merged = merge_run(adapter, output, dtype, base)
        if not json:
            typer.echo(f"{merged.folder}: {merged.summary()}")
        found = verify_merged(adapter, output, base) if verify else "--no-verify"
        verdict = None if isinstance(found, str) else found
        if json:
            print_json(merged.to_dict() | {"verified": verdict and verdict.to_dict()})
        else:
            typer.echo(verdict.line() if verdict else f"Not compared with the adapter: {found}.")
        if verdict and verdict.outcome == "can't tell":
            logging.getLogger("smoa_lab").warning("Little of the adapter is in the merged model; merge into float32")
        if verdict and verdict.outcome == "differs":
            raise typer.Exit(1)


def convert(
    adapter: Annotated[Path, typer.Argument(help="Folder of a run, or of an adapter (then no loss is measured).")],
    output: Annotated[Path, typer.Argument(help="New folder for the LoRA.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every layer; give this or --energy.")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of ‖ΔW‖² to keep in every layer, e.g. 0.9.")] = None,
    score: Annotated[bool, typer.Option(help="Measure the loss on the run's held-out rows.")] = True,
    base: Base = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer.")] = False,
    trust_remote_code: Trusted = False,
    json: AsJson = False,
) -> None:
    """Approximate a SMoA adapter by a LoRA, and measure what that loses of the update and of the task."""
    with reporting():
        from smoa_lab.convert import convert_run
        from smoa_lab.pages.tables import Table, spread

        if (rank is not None and energy is not None) or (kept := energy if rank is None else rank) is None:
            raise failed("give --rank or --energy")
        result = convert_run(adapter, output, kept, base, score)
        if json:
            print_json(result)
            return
        if layers:
            rows = [[layer["module"], layer["rank"], f"{layer['error']:.3f}"] for layer in result["layers"]]
            Table(["layer", "rank", "‖ΔW − BA‖/‖ΔW‖"], rows).print()
        typer.echo(
            f"{result['folder']}: LoRA of rank {result['rank']}, {result['parameters']:,} parameters (the adapter has "
            f"{result['adapter_parameters']:,}); ‖ΔW − BA‖/‖ΔW‖ = {result['error']:.3f} over all layers."
        )
        if result["options"]:
            typer.echo(f"The adapter's base was loaded with {result['options']}; load the LoRA's base with them too.")
        if (loss := result["loss"]) is not None:
            gain = loss["gain_kept"]
            share = "" if gain is None else f"; {100 * gain:.0f} % of the adapter's gain is kept"
            typer.echo(
                f"Held-out loss: base {loss['base']:.3f}, adapter {loss['adapter']:.3f}, LoRA {loss['lora']:.3f} "
                f"(change {loss['lora_change']:+.3f}{spread(loss['lora_change_stderr'])}){share}."
            )


def verify(
    adapter: Adapter,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="A model's or LoRA's folder, a server's address, or merged: in memory, if no folder is so called."
        ),
    ] = None,
    served_name: Annotated[str | None, typer.Option(help="Adapter's name at the server; else its folder's.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that a server is asked for, for each prompt.")] = 16,
    base: Base = None,
    trust_remote_code: Trusted = False,
    json: AsJson = False,
) -> None:
    """Check on ten prompts that a merged model, a LoRA or a server answers as the adapter does.

    Exit code 0: all agree. 1: one differs. 3: none differs, and of one it can't be told.
    """
    with reporting():
        from smoa_lab.verify import exit_code
        from smoa_lab.verify import verify as compared

        targets = ["./merged" if each == "merged" and Path(each).is_dir() else each for each in against or []]
        verdicts = compared(adapter, targets or ["merged"], served_name, tokens, base)
        show("\n".join(verdict.line() for verdict in verdicts), [verdict.to_dict() for verdict in verdicts], json)
        if code := exit_code(verdicts):
            raise typer.Exit(code)


def inspect(
    adapters: Annotated[list[Path], typer.Argument(help="Folder of a run, or of an adapter; several side by side.")],
    base: Base = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts to this file.")] = None,
    trust_remote_code: Trusted = False,
    json: AsJson = False,
) -> None:
    """Show size, norm, ranks and spectral coverage of the update of every adapted layer."""
    with reporting():
        from smoa.atomic import write_whole
        from smoa_lab.basics.folders import check_place
        from smoa_lab.inspect import LayerReport, inspect_layers, layer_table

        if html is not None:
            check_place(html, is_new=True)
        reports = {place: inspect_layers(place, base) for place in adapters}
        if html is not None:
            from smoa_lab.basics.folders import free_name
            from smoa_lab.inspect_page import inspection_page
            from smoa_lab.open_run import run_name

            by_name: dict[str, list[LayerReport]] = {}
            for place, layers in reports.items():
                by_name[free_name(run_name(place), by_name.__contains__)] = layers
            write_whole(html, inspection_page(f"Inside {', '.join(by_name)}", by_name))
            typer.echo(f"Page: {html}", err=True)
        if json:
            plain = {str(place): [report.to_dict() for report in layers] for place, layers in reports.items()}
            print_json(plain if len(plain) > 1 else next(iter(plain.values())))
            return
        for place, layers in reports.items():
            if len(reports) > 1:
                typer.echo(f"\n{place}")
            layer_table(layers).without("effective rank").print()
            far = sum(report.moved_too_far for report in layers)
            if far:
                typer.echo(f"\n! {far} of {len(layers)} layers were moved far: the model may have forgotten much.")


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    output: Annotated[Path | None, typer.Option(help="The page's file; RUN/report.html by default.")] = None,
    json: AsJson = False,
) -> None:
    """Write a run's page: scores, loss, answers before and after, what was forgotten, config, how to load it."""
    with reporting():
        from smoa_lab.run_page import report_run

        page = report_run(run, output)
        show(f"Page: {page}", {"page": str(page)}, json)


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
    given = {"name": base, "dtype": dtype}
    changes = {key: value for key, value in given.items() if value is not None}
    with reporting():
        from smoa.errors import SmoaError
        from smoa_lab.chat import Chat

        try:
            chat = Chat(place, changes, template, max_new_tokens, temperature, _is_terminal())
            if system:
                chat.system(system)
            if chat.is_terminal:
                with suppress(ImportError):  # Windows has none
                    importlib.import_module("readline")  # input() then keeps a history
                chat.say("/help lists the commands.")
            while True:
                try:
                    line = input(f"{chat.name}> " if chat.is_terminal else "")
                    chat.respond(line)
                except SmoaError as error:
                    chat.refuse(line, error)
                except KeyboardInterrupt:
                    if not chat.is_terminal:
                        raise
                    chat.say("\nInterrupted. /quit or Ctrl-D ends the chat.")
        except EOFError:
            raise typer.Exit(int(chat.refused and not chat.is_terminal)) from None
        except KeyboardInterrupt:  # while the model is loaded, and in a pipe: there is nothing to resume
            raise typer.Exit(130) from None


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def budget(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or gemma3-270m, smollm2-135m; no weights are loaded.")],
    amount: Annotated[str, typer.Argument(help="Share of the model, such as 0.1%, number of parameters, or lora:8.")],
    target_modules: Annotated[str, typer.Option(help="Layers to adapt, by commas, or all-linear.")] = "all-linear",
    method: Annotated[list[str] | None, typer.Option(help="Size this method instead, or all; may be repeated.")] = None,
    settings: Settings = None,
    trust_remote_code: Trusted = False,
    json: AsJson = False,
) -> None:
    """List the r and num_blocks that fit a parameter budget, with their rank bound and what their tensors take."""
    with reporting():
        from rich.filesize import decimal

        from smoa.errors import ConfigError
        from smoa_lab.budget import budget_choices, method_settings, size_methods
        from smoa_lab.config.methods import method_names
        from smoa_lab.pages.tables import Table

        names = tuple(name.strip() for name in target_modules.split(","))
        wanted = method_names() if method == ["all"] else method or []
        own = method_settings(settings or [])
        if other := [name for name in own if name not in map(str.lower, wanted)]:
            raise ConfigError(f"--set {other[0]}: name the method too, --method {other[0]}")
        if method:
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
            return
        choices = budget_choices(model, amount, names)
        if json:
            print_json([asdict(choice) for choice in choices])
            return
        columns = {
            "num_blocks": [choice.num_blocks for choice in choices],
            "r": [choice.r for choice in choices],
            "parameters": [f"{choice.parameters:,}" for choice in choices],
            "of model": [f"{choice.percent} %" for choice in choices],
            "tensors": [decimal(choice.bytes_on_disk) for choice in choices],
            "rank bound": [choice.rank_bound for choice in choices],
            "LoRA's r": [choice.lora_r for choice in choices],
        }
        Table(list(columns), list(zip(*columns.values(), strict=True))).print()


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
