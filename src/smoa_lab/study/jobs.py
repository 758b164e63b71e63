"""What a study needs next: a function of its file and of its finished runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import itemgetter

from smoa_lab.study.finished import Finished, Run, chosen, done, finals, search, searched
from smoa_lab.study.study import Job, Study
from smoa_lab.study.verdict import verdict


def next_jobs(study: Study, finished: Finished, only: Sequence[str] = (), failed: Collection[str] = ()) -> list[Job]:
    """What can be run now: the base model and searches, one rate of all entries at a time; then final runs of entries
    whose rates are chosen, one seed of all at a time, but of budgets that have their answer. Results choose jobs, and
    the order in which they come does not. What ``failed`` is left out."""
    names, searches = [name for name in study.chosen(only) if name not in failed], bool(study.tuning.max_runs)
    bases = [study.untouched("untouched")] * bool(study.seeds) + [study.untouched("untouched-validation")] * searches
    jobs = [job for job in bases if done(study, finished, job) is None]
    turns = list[tuple[int, Job]]()
    for name in names if searches else ():
        losses, missing = search(study, finished, name)
        turns += enumerate(missing, start=len(losses))
    jobs += [job for _, job in sorted(turns, key=itemgetter(0))]
    answered = {name for one in verdict(study, finished, failed).values() if one.is_answered for name in one.entries}
    runs = {name: finals(study, finished, name) for name in names if name not in answered}
    rates = {name: rate for name in runs if (rate := chosen(study, finished, name)) is not None}
    for seed in study.seeds:
        jobs += [Job("final", name, rates[name].learning_rate, seed) for name in rates if seed not in runs[name]]
    return list(dict.fromkeys(jobs))


def at_most_left(study: Study, finished: Finished, only: Sequence[str], failed: Collection[str]) -> int:
    """How many jobs are left at most, each search at its longest."""
    jobs = next_jobs(study, finished, only, failed)
    searching = {job.entry for job in jobs if job.stage == "search"}
    tried = sum(len(search(study, finished, name)[0]) for name in searching)
    whole = len(searching) * (study.tuning.max_runs + len(study.seeds))
    return whole - tried + sum(job.stage != "search" for job in jobs)


def needless(study: Study, finished: Finished) -> list[Run]:
    """The runs whose adapters the study does not keep: those of searches, where final runs follow, and by ``keep`` all
    but the best of what an entry is known by."""
    found = list[Run]()
    for name in study.entries:
        searches = searched(study, finished, name)
        found += searches if study.seeds else []
        runs = [*finals(study, finished, name).values()] if study.seeds else searches
        if runs and study.keep != "all":
            best = min(runs, key=lambda run: run.lost)
            found += [run for run in runs if study.keep == "none" or run is not best]
    return found
