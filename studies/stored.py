"""Reads what is stored of finished studies. The code that ran them, at commit 1eaf65e9 and before, is not needed."""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

STUDIES = Path(__file__).parent
PACK = "runs.jsonl.gz"
Run = dict[str, Any]


def folders(studies: Path = STUDIES) -> list[Path]:
    """Those with results."""
    return sorted(file.parent for file in studies.glob("*/summary.json"))


def summary_of(folder: Path) -> Any:
    """A row for each entry; of two tasks, one after the other, an object with several tables."""
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def runs_of(folder: Path) -> dict[str, Run]:
    """All runs by name: ``untouched``, ``tuning/ENTRY/lr-RATE-seed-SEED`` and ``final/…``, sorted."""
    with gzip.open(folder / PACK, "rt", encoding="utf-8") as lines:
        return {run["name"]: run for run in map(json.loads, lines)}


def final_name(entry: str, learning_rate: float, seed: int) -> str:
    """The name of a final run."""
    return f"final/{entry}/lr-{learning_rate:g}-seed-{seed}"
