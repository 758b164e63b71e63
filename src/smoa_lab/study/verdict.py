"""The verdict of a study in sentences: what differs, what could have been seen, what it costs, and which adapter to
take."""

from __future__ import annotations

import math
from collections.abc import Sequence

from smoa_lab.pages.tables import counted
from smoa_lab.study.plan import FEW_ROWS, few_rows
from smoa_lab.study.results import Result
from smoa_lab.study.search import rate_text
from smoa_lab.study.statistics import Difference

EQUAL = 0.02
"""Shares of the reference's parameters that are so near to it need no word."""


def verdict(results: Sequence[Result], untouched_loss: float | None = None) -> list[str]:
    """What the results of one budget say, best first; ``untouched_loss`` is that of the model without an adapter."""
    reference = next((one for one in results if one.entry == one.reference), None)
    if reference is None:
        return [f"{results[0].reference}, with which the others are compared, has not run yet."]
    others = {one.entry: one for one in results if one is not reference}
    decisive = {name: next(iter(one.differences.values())) for name, one in others.items() if one.differences}
    judged = {
        kind: [others[name] for name, each in decisive.items() if each.final == kind]
        for kind in ("better", "worse", "same", "one seed", "open")
    }
    diverged = [one for one in judged["same"] if not math.isfinite(decisive[one.entry].mean)]
    doubted = [one for one in judged["same"] if decisive[one.entry].verdict != "same"]
    same = [one for one in judged["same"] if one not in (*diverged, *doubted)]
    told = [*judged["better"], *judged["worse"], *judged["open"], *judged["one seed"], *doubted, *diverged]
    sentences = [difference_sentence(one, reference) for one in told]
    if same:
        sentences.append(_same_sentence(same, reference, len(results)))
    missing = [name for name in others if name not in decisive]
    sentences += [f"Not compared with {reference.entry} yet: {', '.join(missing)}."] if missing else []
    sentences += [_edge_sentence(one) for one in results if one.chosen.place == "edge"]
    if judged["open"] and not judged["better"]:
        sentences.append("Search further before you take one: name a rate beyond, or raise tuning.max_runs.")
    elif decisive and not judged["one seed"]:
        not_worse = [one for one in (*same, *doubted) if decisive[one.entry].verdict != "worse"]
        sentences.append(_advice(judged["better"][:1] or [reference, *not_worse], untouched_loss))
    sentences += [few_rows(reference.rows)] if reference.rows < FEW_ROWS else []
    return sentences


def difference_sentence(one: Result, reference: Result) -> str:
    """How an entry differs from the reference by what decides."""
    title, difference = next(iter(one.differences.items()))
    if not math.isfinite(difference.mean):
        both = (f"{each.entry} diverged in {each.diverged} of {len(each.seeds)} runs" for each in (one, reference))
        return f"{'; '.join(both)}."
    whose = f"{one.entry}'s {title}" if _named(one) == one.entry else f"the {title} of {_named(one)}"
    way = "lower" if difference.mean < 0 else "higher"
    ends = [number(value).replace("-", "−") for value in (difference.low, difference.high)]
    interval = f" [{', '.join(ends)}]" if math.isfinite(difference.low) else ""
    seeds = "one seed, which gives no verdict" if difference.verdict == "one seed" else f"{len(one.paired)} seeds"
    holm = "" if difference.holm_p is None else f", Holm {difference.holm_p:.1g}"
    holm += "" if difference.final == difference.verdict else ": it may be chance"
    cost = ""
    if one.step_seconds and reference.step_seconds:
        cost = f"; its step takes {one.step_seconds / reference.step_seconds:.2f} of {reference.entry}'s time"
    rows, by = counted(one.rows, "held-out row"), number(abs(difference.mean))
    return f"On {rows} {whose} is {by} {way} than {reference.entry}'s{interval} ({seeds}{holm}){cost}."


def _same_sentence(same: Sequence[Result], reference: Result, entries: int) -> str:
    differences: list[Difference] = [next(iter(one.differences.values())) for one in same]
    width = max((each.high - each.low) / 2 for each in differences)
    names = ", ".join(map(_named, same))
    between = f" between {names} and {reference.entry}" if entries > 2 or names != same[0].entry else ""
    seen = f" ({number(width)} would have been seen)" if width else ""
    seeds = " to ".join(map(str, sorted({min(pairs := [len(one.paired) for one in same]), max(pairs)})))
    return f"No difference{between} that {seeds} seeds and {counted(reference.rows, 'row')} could show{seen}."


def _edge_sentence(one: Result) -> str:
    side = "lowest" if one.chosen.learning_rate == min(one.chosen.losses) else "highest"
    return (
        f"{one.entry}'s best rate, {rate_text(one.chosen.learning_rate)}, is the {side} that was tried: it may do "
        "better beyond, and isn't called worse."
    )


def _advice(alike: Sequence[Result], untouched_loss: float | None) -> str:
    """Which to take of those that are alike: the cheapest of those whose step time is known."""
    taken = min(alike, key=lambda one: (one.step_seconds is None, one.step_seconds or 0.0, one.parameters))
    title, (loss, _) = next(iter(taken.values.items()))
    untouched = math.log(2) if title == "DPO loss" else untouched_loss if title == "loss" else None
    if untouched is not None and not loss < untouched:
        return f"Take none: the untouched model's {title}, {number(untouched)}, is not higher."
    others = [one for one in alike if one is not taken]
    untimed = " and ".join(one.entry for one in others if one.step_seconds is None)
    if untimed and taken.step_seconds is None:
        return f"Which of {taken.entry} and {untimed} is cheaper isn't known: all of their runs were resumed."
    cheaper = any(one.step_seconds is not None for one in others)
    place = "" if taken.kept is None else f"{', ' if cheaper else ': '}{taken.kept}"
    doubt = f" What a step of {untimed} takes on the same machine isn't known." if untimed else ""
    return f"Take {'the cheaper: ' if cheaper else ''}{taken.entry}{place}.{doubt}"


def _named(one: Result) -> str:
    """The entry, with its share of the reference's parameters where that is not all."""
    if abs(one.share - 1) <= EQUAL:
        return one.entry
    return f"{one.entry} with {one.share:.0%} of {one.reference}'s parameters".replace("%", " %")


def number(value: float) -> str:
    """Three digits behind the point, or of a small number its first two."""
    return f"{value:.3f}" if abs(value) >= 0.01 or not value else f"{value:.2g}"
