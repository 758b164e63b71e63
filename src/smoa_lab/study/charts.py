"""The chart of a study: each entry's difference to its reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from smoa_lab.pages.charts import forest
from smoa_lab.study.results import Row
from smoa_lab.study.trials import Trial


def final_run(row: Row, seed: int) -> str:
    """Where a page lists a final run of an entry."""
    return f"#{Trial('final', row.entry, row.learning_rate, seed).name}"


def differences(rows: Sequence[Row], names: Mapping[str, str]) -> Any | None:
    """A forest plot for each budget: test losses minus the reference's, with interval and verdict in words. Entries are
    called by their ``names``. None before there are any differences."""
    compared: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        known = row.loss_difference
        if known is not None and math.isfinite(known.mean):
            compared.setdefault(row.budget, []).append(
                {
                    "entry": names.get(row.entry, row.entry),
                    "reference": names.get(row.reference, row.reference),
                    "method": row.method,
                    **{key: getattr(known, key) for key in ("low", "mean", "high")},
                    "difference": known.signed(1, 4),
                    "verdict": known.label,
                    "clear": known.label in ("better", "worse"),
                    "run": final_run(row, row.seeds[0]),
                }
            )
    if not compared:
        return None
    titled = len({row.budget for row in rows}) > 1
    plots = [
        forest(own, f"test loss minus that of {own[0]['reference']} (nats per token); left is better").properties(
            title=f"Budget: {budget}" if titled else ""
        )
        for budget, own in compared.items()
    ]
    return alt.vconcat(*plots).resolve_scale(color="independent")
