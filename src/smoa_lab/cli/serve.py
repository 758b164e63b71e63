"""``smoa serve``: a server of OpenAI's protocol for the adapters in a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from smoa_lab.cli.console import BaseDtype, TrustRemoteCode, reporting


def serve(
    base: Annotated[str, typer.Argument(help="The base model: a Hub id, a folder, or smollm2-135m, gemma3-270m.")],
    adapters: Annotated[Path, typer.Option(help="Folder in which each adapter, or run, has a folder of its name.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="SMOA_API_KEY", show_envvar=True, help="Key that requests must send; none by default."),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Most adapters to hold at once.")] = 64,
    cache_tokens: Annotated[
        int | None,
        typer.Option(min=64, help="Tokens of all requests to hold; 8192 on a CPU, on a GPU what fits."),
    ] = None,
    max_request_bytes: Annotated[int, typer.Option(min=1, help="Largest request, in bytes.")] = 4 << 20,
    dtype: BaseDtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a base model and the adapters in a folder, many in one batch, by OpenAI's protocol."""
    with reporting():
        from smoa_lab.config.run import ModelSection
        from smoa_lab.serving.server import Settings
        from smoa_lab.serving.server import serve as run

        if api_key is None and "SMOA_API_KEY" in os.environ:
            api_key = ""  # typer takes an empty variable for none; it is refused
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        section = ModelSection(name=base, **options)
        run(section, adapters, host, port, Settings(slots, api_key, max_request_bytes, cache_tokens))
