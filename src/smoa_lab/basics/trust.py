"""What the command lets run: the code of models' repositories (``--trust-remote-code``), and a function of the user's
(``--metric``).

The command sets it, and hands it to the workers of a study. No config does: a file can come from a stranger.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Trust:
    """Whether repositories may run their own code; and FILE:NAME of a metric."""

    trust_remote_code: bool = False
    metric: str | None = None


TRUSTED = Trust()
"""What this process lets run."""
