"""The switch of ``--trust-remote-code``: whether the repositories of models may run their own code.

The command sets it, and hands it to the workers of a study. No config does: a file can come from a stranger.
"""

from __future__ import annotations

_switch = {"on": False}


def trust_remote_code(on: bool) -> None:
    """Turn the switch of this process."""
    _switch["on"] = on


def is_trusted() -> bool:
    """Whether repositories may run their own code."""
    return _switch["on"]
