"""Unlike adapters that one pool serves together."""

from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    "anna": {"r": 4, "num_blocks": 2},
    "ben": {"r": 4, "num_blocks": 2},
    "cleo": {"r": 6, "num_blocks": 4, "target_modules": ["q_proj", "down_proj"]},
    "dora": {"r": 4, "num_blocks": 2, "partition": "contiguous", "scale": "paper", "alpha": 9},
    "emil": {"r": 4, "num_blocks": 2, "modulation": "none"},
}
"""The settings of each, by its name."""
