"""What studies compare, and what a search goes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smoa_lab.basics.folders import read_stored
from smoa_lab.data.answers import OWN, RULES, MetricName
from smoa_lab.study.plan import Metrics
from smoa_lab.training.run_folder import RunFolder


@dataclass(frozen=True)
class Metric:
    """What is compared: a ``field`` of each held-out row, per token or per row; ``sign`` is 1 where higher is better.
    It is shown ``scale`` times as large, in ``unit`` with so many digits. ``untouched`` is the field of a row that the
    base model has, or its value for all rows."""

    title: str
    field: str
    per_token: bool
    sign: int
    scale: float
    digits: int
    unit: str
    untouched: str | float

    @property
    def is_share(self) -> bool:
        """Whether it counts right answers."""
        return self.scale == 100


LOSS = Metric("loss", "after", True, -1, 1, 4, "nats per token", "before")
OF_CHOICES = Metric("accuracy %", "right_after", False, 1, 100, 1, "points", "right_before")
SCORED = "scored_after"
BY_NAME = {
    name: Metric(f"{title} %", SCORED, False, 1, 100, 1, "points", "scored_before")
    for name, title in {"choice": "accuracy", **{name: name for name in RULES}}.items()
} | {OWN: Metric(OWN, SCORED, False, 1, 1, 3, "points of score", "scored_before")}
METRICS = {each.title: each for each in (LOSS, OF_CHOICES, *BY_NAME.values())}
"""All metrics by their titles."""


RUN_AGAIN = "put back a copy, or remove this run's folder, and it is run again"
"""What to do where a file of a run is damaged."""


def metrics_of(row: Mapping[str, Any], name: MetricName | None, training: Mapping[str, Any]) -> Sequence[Metric]:
    """What is compared on rows like this one of a run with this ``training`` block, first what decides."""
    if name is not None:
        return BY_NAME[name], LOSS
    return (LOSS, OF_CHOICES) if "right_after" in row else (LOSS,)


def read_metrics(folder: RunFolder) -> Metrics:
    """The metrics of a finished run."""
    return read_stored(folder.metrics, {"config", "evaluation"}, RUN_AGAIN)


def loss_of(metrics: Metrics) -> float | None:
    """What a search goes by: the loss; None for a run that diverged."""
    scores = scores_of(metrics)
    loss: float | None = scores["loss"]
    return loss


def scores_of(metrics: Metrics) -> dict[str, Any]:
    """Those of a run on held-out rows after its training; of the base model as it is."""
    scores: dict[str, Any] = metrics["evaluation"].get("after") or metrics["evaluation"]["before"]
    return scores
