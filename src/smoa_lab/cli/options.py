"""Options that several subcommands share."""

from __future__ import annotations

from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(help="Values to change, e.g. training.learning_rate=1e-3.")]
Base = Annotated[str | None, typer.Option(help="Base model to use instead of the one recorded in the adapter.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Allow the model's repository to run its own code.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
