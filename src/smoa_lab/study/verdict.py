"""Which entry of a study to take, and why: a function of its file and of its finished runs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import floor

import numpy as np

from smoa_lab.pages.tables import counted
from smoa_lab.study.bounds import Family, Floats, looks
from smoa_lab.study.finished import SCORED, Finished, Metric, Run, chosen, done, finals, metrics_of, searched
from smoa_lab.study.search import Chosen, rate_text
from smoa_lab.study.study import Study

NEAR, EQUAL = 0.1, 0.02
"""Shares of a step's time, and of parameters, that make no difference in cost."""
CHEAPEST = "lora"
"""The method that is taken where costs are equal: every tool and server has it."""


@dataclass(frozen=True)
class Verdict:
    """What the runs of a ``budget`` say, of the ``entries`` in it that did not fail: of ``done`` final runs those of
    ``round`` whole rounds, at the ``level`` of that look; without a look all that there are, and round 0.

    ``steps`` are seconds of one. ``families`` have the bounds in each metric, first in the one that decides.
    """

    study: Study
    budget: Sequence[str]
    entries: Sequence[str]
    chosen: Mapping[str, Chosen]
    runs: Mapping[str, Mapping[int, Run]]
    done: int
    steps: Mapping[str, float]
    families: Mapping[Metric, Family]
    round: int = 0
    level: float = 0.0

    @property
    def added(self) -> int:
        """How many unplanned looks were taken by the time the latest of its entries came."""
        return max(self.study.entries[name].added for name in self.budget)

    def looks(self, rounds: int) -> list[tuple[int, float]]:
        """The looks at it in so many rounds, and their levels; entries that failed are counted, lest a level rises."""
        return looks(len(self.budget), self.study.planned, rounds, self.added)

    @property
    def is_last(self) -> bool:
        """Whether the file asks for no further look."""
        return self.round == self.looks(len(self.study.seeds))[-1][0]

    @property
    def decides(self) -> tuple[Metric, Family] | None:
        """The metric that decides, with its bounds; None before the first look, or where nothing can be compared."""
        return next(iter(self.families.items()), None)

    @property
    def family(self) -> Family | None:
        return self.decides and self.decides[1]

    @property
    def at_edge(self) -> list[str]:
        """The entries whose best rate is at the edge of its search, over which nobody is taken."""
        return [name for name, one in self.chosen.items() if one.place == "edge"]

    @cached_property
    def hurt(self) -> bool:
        """Whether every entry is worse than the base model."""
        family = self.family
        return family is not None and all(family.lower(name, None) > 0 for name in self.entries)

    @cached_property
    def take(self) -> str | None:
        """The first in order of cost that keeps enough of what each other gained, and gained."""
        family = self.family
        if family is None or self.hurt:
            return None
        free = [name for name in self.order if not {*self.at_edge} - {name}]
        return next((name for name in free if family.suffices(name, self.study.tolerance)), None)

    @cached_property
    def is_answered(self) -> bool:
        """Whether no run that the file asks for can change it: an entry is taken, training hurt, or after the last
        look gained nothing."""
        if self.family is None:
            return False
        gained = any(self.family.upper(name, None) < 0 for name in self.entries)
        return self.take is not None or self.hurt or (self.is_last and not gained)

    @cached_property
    def order(self) -> list[str]:
        """The entries in order of cost. Of those within a tenth of the quickest step that are left, the one with the
        fewest parameters comes next, of equally many LoRA, and then the quickest; never the file's first."""
        left, order = dict(self.steps), list[str]()
        while left:
            near = [name for name, step in left.items() if step <= (1 + NEAR) * min(left.values())]
            fewest = min(map(self.parameters, near))
            equal = [name for name in near if self.parameters(name) <= (1 + EQUAL) * fewest]
            order.append(min(equal, key=lambda name: (self.study.entries[name].method != CHEAPEST, left[name], name)))
            del left[order[-1]]
        return order

    @property
    def against(self) -> str:
        """The entry to which all are shown: the one to take, or the first in order of cost."""
        return self.take or self.order[0]

    def parameters(self, name: str) -> int:
        """How many an entry trains."""
        return int(next(iter(self.runs[name].values())).metrics["parameters"]["trainable"])

    @property
    def rows(self) -> int:
        """How many held-out rows there are."""
        return len(next(iter(self.runs[self.entries[0]].values())).rows)


def verdict(study: Study, finished: Finished, failed: Collection[str] = ()) -> dict[str, Verdict]:
    """That of each budget after its last look, or the one that answered; without the entries that ``failed``."""
    return {budget: _of_budget(study, finished, own, failed) for budget, own in study.budgets().items()}


def _of_budget(study: Study, finished: Finished, own: Sequence[str], failed: Collection[str]) -> Verdict:
    alive = [name for name in own if name not in failed]
    runs = {name: finals(study, finished, name) for name in alive}
    rates = {name: rate for name in alive if (rate := chosen(study, finished, name)) is not None}
    known = {name: of_entry for name, of_entry in runs.items() if of_entry}
    found = Verdict(study, own, alive, rates, known, sum(map(len, runs.values())), {}, {})
    untouched = done(study, finished, study.untouched("untouched")) if alive else None
    whole = next((n for n, seed in enumerate(study.seeds) if any(seed not in runs[e] for e in alive)), len(study.seeds))
    for number, level in found.looks(len(study.seeds)):
        if untouched is None or number > whole or found.is_answered:
            break
        # of this round alone: what runs later must not change who was taken
        now = {name: {seed: runs[name][seed] for seed in study.seeds[:number]} for name in alive}
        steps = step_seconds({name: [*searched(study, finished, name), *now[name].values()] for name in alive})
        families = families_of(now, untouched, level / max(1, len(own) - 1))
        found = replace(found, runs=now, steps=steps, families=families, round=number, level=level)
    return found


def step_seconds(runs: Mapping[str, Sequence[Run]]) -> dict[str, float]:
    """Of each entry's quickest run; of a resumed one only the time of its last part is known. 0 for all where several
    machines ran them, whose times can't be compared, or an entry has no whole run."""
    devices = {run.metrics["provenance"].get("device") for own in runs.values() for run in own}
    whole = {
        name: [run.metrics["training"] for run in own if not run.metrics["training"].get("resumed")]
        for name, own in runs.items()
    }
    if len(devices) != 1 or not all(whole.values()):
        return dict.fromkeys(runs, 0.0)
    return {name: min(one["seconds"] / max(1, one["steps"]) for one in own) for name, own in whole.items()}


def families_of(runs: Mapping[str, Mapping[int, Run]], untouched: Run, level: float) -> dict[Metric, Family]:
    """The bounds in each metric, at a pair's ``level``, of entries with the same seeds. A metric that is the same
    everywhere compares nothing, but for what scores answers."""
    first = next(iter(next(iter(runs.values())).values()))
    group_of = {key: row.get("group") or key[0] for key, row in first.rows.items()}
    keys = sorted(first.rows, key=group_of.__getitem__)
    starts = [place for place, key in enumerate(keys) if not place or group_of[key] != group_of[keys[place - 1]]]
    diverged = np.array([[run.loss is None for run in own.values()] for own in runs.values()])
    found = dict[Metric, Family]()

    def read(run: Run, field: str) -> Floats:
        return np.array([run.rows[key].get(field) for key in keys], np.float64)  # NaN where it is None

    for metric in metrics_of(first.rows[keys[0]], first.metric):
        is_scored = metric.after in SCORED
        base, weights = (
            read(untouched, metric.before),
            read(first, "tokens") if metric.per_token else np.ones(len(keys)),
        )
        every = np.array([[read(run, metric.after) for run in own.values()] for own in runs.values()])
        if not np.isfinite(base).all() or (not is_scored and (every == every.flat[0]).all()):
            continue
        is_share = metric.scale == 100 or (is_scored and bool(np.isin(every[~diverged], (0, 1)).all()))
        lost = np.where(np.isfinite(every) & ~diverged[..., None], -metric.sign * every, math.inf)
        values, of_base, weights = (
            np.add.reduceat(each, starts, axis=-1) for each in (lost, -metric.sign * base, weights)
        )
        found[metric] = Family([*runs], values, of_base[None], weights, is_share, level)
    return found


FEW_GROUPS = 50
"""Held-out rows, or groups of rows, below which a comparison shows large differences only."""
MOST_ROUNDS = 12
"""More rounds than these are not proposed."""


def sentences(of: Verdict, command: str) -> list[str]:
    """What the results of one budget say; ``command`` goes on with the study."""
    told = [_answer(of, command)]
    for name in of.at_edge:
        one = of.chosen[name]
        where = "lowest" if one.learning_rate == min(one.losses) else "highest"
        told.append(f"{name}'s best rate, {rate_text(one.learning_rate)}, is the {where} tried; go beyond it.")
    if of.family is None:
        return told
    shares = {name: of.parameters(name) / of.parameters(of.against) for name in of.entries}
    for name, share in shares.items():
        if abs(share - 1) > EQUAL:
            told.append(f"{name} has {100 * share:.0f} % of {of.against}'s parameters.")
    for name, runs in of.runs.items():
        if diverged := sum(run.loss is None for run in runs.values()):
            told.append(f"{name} diverged in {diverged} of {counted(len(runs), 'run')}.")
    if of.added or of.round > of.study.planned:
        errs = f"it errs in {100 * of.level:.2g} %, and all looks in at most 5 %"
        told.append(f"This look was not planned at first: {errs}.")
    if len(of.family.weights) < FEW_GROUPS:
        told.append(f"Only {_held_out(of)} held out, which show large differences only; have {FEW_GROUPS} or more.")
    return told


def _answer(of: Verdict, command: str) -> str:
    """The adapter to take, the first in order of cost that keeps enough of what each other gained; or why none."""
    family, when = of.family, f"after round {of.round} of {max(of.study.planned, of.round)}"
    if family is None and of.round:
        return "No verdict: every run has the same values."
    if family is None and len(of.study.seeds) < 2:
        return f"No verdict: one seed of each says nothing of how seeds differ; `{command} --seeds 3` goes on."
    if family is None:
        wanted = len(of.study.seeds) * len(of.entries)
        return f"{of.done} of {wanted} final runs are done; `{command}` goes on, and bounds are shown from round 2 on."
    if all(map(family.diverged, family.names)):
        return "Every entry diverged: take none."
    if len(family.weights) < 2:
        return "No verdict: all held-out rows belong together, and one group can't tell how others differ."
    if of.hurt:
        least = _amount(of, min(family.lower(name, None) for name in family.names))
        return f"Training hurt: every entry is worse than the base model, by {least}: take none."
    if of.take is not None:
        kept = [str(folder) for folder in sorted(of.study.folder.glob(f"{of.take}/*/adapter"))]
        first = ", the first in order of cost" if of.take == of.order[0] and len(of.order) > 1 else ""
        return f"{_reason(of, family, of.take)}, {when}: take {of.take}{first}{': ' + kept[0] if kept else ''}."
    if of.is_answered:
        return f"Training gained nothing that could be shown, {when}: take none."
    if of.at_edge:
        return f"Undecided {when}: raise tuning.max_runs in the study's file, so that searches at their edge go on."
    if (more := _needed(of, family)) is None:
        least = f"{MOST_ROUNDS} more rounds would not tell"
        return f"Undecided {when}: {least}; compare fewer methods, train longer, or raise tolerance."
    if not more:
        return f"Undecided {when}: more held-out rows are needed. {_held_out(of)} leave too much open, whatever runs."
    return f"Undecided {when}: about {counted(more, 'more round')} would tell: `{command} --seeds {of.round + more}`."


def _reason(of: Verdict, family: Family, name: str) -> str:
    """What is known of the one to take."""
    others, gained = [other for other in family.names if other != name], _amount(of, -family.upper(name, None))
    if not others:
        return f"{name} gained {gained} or more; there is nothing to compare it with"
    alive = [other for other in others if not family.diverged(other)]
    if not alive:
        return f"{name} is better than {' and '.join(others)}, which diverged"
    if all(family.upper(other, None) >= 0 for other in alive):
        return f"{name} gained {gained} or more, and {' and '.join(alive)} nothing that the rows and seeds show"
    share, each = family.kept(name, of.study.tolerance), "each other" if len(alive) > 1 else alive[0]
    if share > 1:
        more = floor(100 * share - 100)
        return f"{name} gained at least {f'{more} % more than' if more else 'as much as'} {each}"
    return f"{name} keeps at least {floor(100 * share)} % of what {each} gained"


def _needed(of: Verdict, family: Family) -> int | None:
    """How many more rounds should tell; 0 where the rows leave too much open, however many run; None for too many."""

    def tells(rounds: float, level: float) -> bool:
        then = replace(family, level=family.level * level / of.level)
        return any(then.suffices(name, of.study.tolerance, rounds) for name in family.names if name not in diverged)

    diverged = [name for name in family.names if family.diverged(name)]
    further = [look for look in of.looks(of.round + MOST_ROUNDS) if look[0] > of.round]
    if not tells(1e6, further[0][1]):
        return 0
    return next((number - of.round for number, level in further if tells(number, level)), None)


def _held_out(of: Verdict) -> str:
    """How many rows, or groups of them, there are."""
    groups = len(of.family.weights) if of.family else 0
    return counted(groups, "row" if groups == of.rows else "group")


def _amount(of: Verdict, value: float) -> str:
    """A difference in the unit of what decides: three digits behind the point, or of a small number its first two."""
    metric = next(iter(of.families))
    shown = metric.scale * value
    if metric.scale != 1 or not math.isfinite(shown):
        return f"{shown:.{metric.digits}f} {metric.unit}"
    return f"{f'{shown:.3f}' if abs(shown) >= 0.01 or not shown else f'{shown:.2g}'} {metric.unit}"
