"""Lets a function of the user's score stored answers that another one scored."""

from __future__ import annotations

from typing import Any

from smoa.errors import DataError
from smoa_lab.basics.trust import TRUSTED
from smoa_lab.data.answers import OWN
from smoa_lab.data.own_metric import own_metric
from smoa_lab.study.plan import Plan, changed_plan, is_looked_at
from smoa_lab.study.results import stored_rows
from smoa_lab.study.study import Study
from smoa_lab.training.run_folder import RunFolder


def score_again(study: Study, plan: Plan, is_counted: bool) -> Plan:
    """Let the user's metric, if the command names one, score stored answers that another function scored, and note it:
    another look, unless this command ``is_counted`` as one already. Where it fails on one, all stay as they are. Raises
    DataError where that was interrupted before, and the command names none."""
    if study.shared["data"].get("metric") != OWN:
        return plan
    rows = {run: stored_rows(run) for run in (RunFolder(file.parent) for file in study.folder.rglob("metrics.json"))}
    known = plan.digests.get("metric")
    if TRUSTED.metric is None:
        others = {row["scored_by"] for own in rows.values() for row in own if "scored_by" in row} - {known}
        if others or known is None:
            name = min(others, default="FILE.py:NAME ").rpartition(" ")[0]
            found = "another metric began to score its answers again, and was interrupted"
            raise DataError(f"{study.folder}: {found}; give --metric {name}, and it goes on")
        return plan
    own, scored = own_metric(), list[RunFolder]()
    for run in sorted(rows, key=lambda run: run.path):
        by_metric = [row for row in rows[run] if "own" in row]
        answered = [(row, stage) for row in by_metric for stage in ("before", "after") if f"answer_{stage}" in row]
        if any(row.get("scored_by") != own.name for row, _ in answered):
            for row, stage in answered:
                row[f"scored_{stage}"] = own.score(row[f"answer_{stage}"], row["own"], row["where"])
            scored.append(run)
    for run in scored:
        run.write_rows({**row, "scored_by": own.name} for row in rows[run])

    def noted(plan: Plan) -> dict[str, Any]:
        before = plan.digests.get("metric")
        if before == own.name:
            return {}
        looks = plan.scored_again() if before is not None and not is_counted and is_looked_at(plan, study) else {}
        return {**looks, "digests": {**plan.digests, "metric": own.name}}

    return changed_plan(study, noted)
