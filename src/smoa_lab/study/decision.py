"""Which entry to take, by the bounds of those that are compared with each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any

from smoa_lab.basics.plain import finite
from smoa_lab.study.bounds import Family
from smoa_lab.study.metrics import Metric
from smoa_lab.study.plan import Take, Timing
from smoa_lab.study.search import Chosen

NEAR, EQUAL = 0.1, 0.02
"""Shares of a step's time, and of parameters, that make no difference in cost."""


@dataclass(frozen=True)
class Result:
    """One entry: what it trained and reached over its seeds.

    ``values`` are mean and standard deviation over seeds by metric, ``worst`` by how much it is at most worse than the
    best of the others; ``share`` is its number of parameters as a part of those of the entry that it is shown against;
    ``rows`` and ``groups`` count the held-out ones; ``memory`` and ``size`` are bytes, of a run at its peak and of the
    adapter; ``forgotten`` is how the loss on general text changed. None is what wasn't measured or is no number.
    """

    entry: str
    method: str
    budget: str
    parameters: int
    share: float
    chosen: Chosen
    seeds: list[int]
    diverged: int
    rows: int
    groups: int
    values: dict[str, tuple[float, float]]
    worst: dict[str, float]
    step_seconds: float
    memory: int | None
    size: int | None
    forgotten: float | None
    kept: str | None

    def as_json(self) -> Any:
        """Plain values, with null for what a diverged run left without a number."""
        return finite(asdict(self) | {"chosen": asdict(self.chosen) | {"losses": list(self.chosen.losses.items())}})


@dataclass(frozen=True)
class Decision:
    """What a look says for good: the ``entry`` to take, or none of them, since training ``hurt`` or gained nothing that
    could be shown."""

    entry: str | None
    hurt: bool = False


@dataclass(frozen=True)
class Budget:
    """The entries of a budget, or of all sizes, best first, after ``round`` whole rounds of the ``planned`` ones, 0
    before the second one is in. ``families`` have the bounds in each metric, first in the one that decides; ``order``
    is that of cost, of all sizes that of parameters.
    ``done`` final runs of ``wanted`` are in. It ``was_planned`` where a look before any extension decided for good.
    Nobody is taken over those ``at_edge``, which may do better beyond."""

    results: list[Result]
    families: dict[str, Family]
    metric: Metric | None
    order: list[str]
    at_edge: list[str]
    round: int
    planned: int
    done: int
    wanted: int
    level: float
    tolerance: float
    is_last: bool
    of_sizes: bool = False
    was_planned: bool = False

    @property
    def has_table(self) -> bool:
        return self.round > 1 and not self.of_sizes

    @property
    def family(self) -> Family | None:
        """That of what decides, once there are bounds."""
        return self.families[self.metric.title] if self.metric and self.round > 1 else None

    def decision(self) -> Decision | None:
        """None where it is open; after the last round that nothing was gained."""
        family = self.family
        if family is None or family.untouched is None:
            return None
        if family.hurt():
            return Decision(None, hurt=True)
        for name in self.order:
            if not set(self.at_edge) - {name} and family.suffices(name, self.tolerance):
                return Decision(name)
        gained = any(family.upper(name, None) < 0 for name in family.names)
        return Decision(None) if self.is_last and not gained else None

    def take(self) -> Take | None:
        """What a plan keeps of the decision."""
        decided = self.decision()
        if decided is None:
            return None
        rates = {one.entry: one.chosen.learning_rate for one in self.results}
        return Take(entry=decided.entry, round=self.round, level=self.level, tolerance=self.tolerance, entries=rates)

    @property
    def against(self) -> str:
        """The entry to which all are shown: the one to take, or the first in order of cost."""
        decided = self.decision()
        return (decided and decided.entry) or self.order[0]

    def as_json(self) -> Any:
        """What decides, in plain values."""
        family, decided, pairs, gains = self.family, self.decision(), list[Any](), dict[str, Any]()
        if family is not None:
            means = {name: family.mean(name) for name in family.names}
            pairs = [[*two, means[two[0]] - means[two[1]], family.upper(*two)] for two in permutations(family.names, 2)]
            gains = {name: [-family.upper(name, None), -family.lower(name, None)] for name in family.names}
        return finite(
            {
                "measure": self.metric and self.metric.title,
                "round": self.round,
                "level": self.level,
                "take": decided and decided.entry,
                "pairs": pairs,
                "gains": gains,
            }
        )


def by_size(entries: Mapping[str, Timing]) -> list[str]:
    """The entries' names by parameters, of those within 2 % the cheaper one first."""
    left, order = by_cost(entries), list[str]()
    while left:
        least = min(entries[name].parameters for name in left)
        order.append(next(name for name in left if entries[name].parameters <= (1 + EQUAL) * least))
        left.remove(order[-1])
    return order


def by_cost(entries: Mapping[str, Timing]) -> list[str]:
    """The entries' names in order of cost: of those within a tenth of the quickest step that are left, the one with the
    fewest parameters comes next, the file's first of those within 2 %. Steps that were timed on several machines
    can't be compared, and parameters decide."""
    left, order = dict(entries), list[str]()
    is_one = len({one.machine for one in entries.values()}) == 1
    while left:
        quickest = min(one.step for one in left.values())
        near = {n: one.parameters for n, one in left.items() if not is_one or one.step <= (1 + NEAR) * quickest}
        order.append(next(n for n, number in near.items() if number <= (1 + EQUAL) * min(near.values())))
        del left[order[-1]]
    return order
