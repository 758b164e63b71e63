"""What studies compare on held-out rows, and what a search goes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smoa_lab.data.answers import OWN, RULES, MetricName

Metrics = dict[str, Any]
"""What ``metrics.json`` has of a run."""


@dataclass(frozen=True)
class Metric:
    """What is compared: a field of each held-out row, ``before`` training as the base model has it and ``after``, per
    token or per row; ``sign`` is 1 where higher is better. It is shown ``scale`` times as large, in ``unit`` with so
    many digits."""

    title: str
    before: str
    after: str
    per_token: bool
    sign: int
    scale: float
    digits: int
    unit: str


LOSS = Metric("loss", "before", "after", True, -1, 1, 4, "nats per token")
OF_CHOICES = Metric("accuracy %", "right_before", "right_after", False, 1, 100, 1, "points")
SCORED = ("scored_before", "scored_after")
BY_NAME = {
    name: Metric(f"{title} %", *SCORED, False, 1, 100, 1, "points")
    for name, title in {"choice": "accuracy", **{name: name for name in RULES}}.items()
} | {OWN: Metric(OWN, *SCORED, False, 1, 1, 3, "points of score")}


def metrics_of(row: Mapping[str, Any], name: MetricName | None) -> Sequence[Metric]:
    """What is compared on rows like this one, where a config names this metric; first what decides."""
    if name is not None:
        return BY_NAME[name], LOSS
    return (LOSS, OF_CHOICES) if OF_CHOICES.after in row else (LOSS,)


def scores_of(metrics: Metrics) -> dict[str, Any]:
    """Those of a run on held-out rows after its training; of the base model as it is."""
    scores: dict[str, Any] = metrics["evaluation"].get("after") or metrics["evaluation"]["before"]
    return scores


def loss_of(metrics: Metrics) -> float | None:
    """What a search goes by; None for a run that diverged."""
    loss: float | None = scores_of(metrics)["loss"]
    return loss
