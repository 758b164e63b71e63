"""Reads the YAML file of a study, checks it as a whole, and picks the runner of its kind."""

from __future__ import annotations

from pathlib import Path

from smoa.errors import ConfigError, DataError
from smoa_lab.config.run import ConfigText
from smoa_lab.config.validation import block_problems
from smoa_lab.study.classification import ClassificationRunner
from smoa_lab.study.runner import Runner
from smoa_lab.study.sequence import SequenceRunner
from smoa_lab.study.study import Study


def runner_of(study: Study) -> Runner:
    """What trains and scores one entry of the study."""
    if study.kind == "sequence":
        return SequenceRunner(study)
    kind = ClassificationRunner if study.kind == "classification" else Runner
    return kind(study.shared, study.elsewhere)


def load_study(path: str | Path, overrides: list[str] | None = None, trust_remote_code: bool = False) -> Study:
    """Read a study, lay ``key.key=value`` overrides over it and check every entry's run.

    Raises:
        ConfigError: lists the problems of the study, and of each entry's run, before any work starts.
    """
    text = ConfigText.read(path, overrides, trust_remote_code)
    file = Path(path)
    values = {"folder": f"studies/{file.stem}", **text.values}
    text.refuse(block_problems(Study, values))
    study = Study.model_validate(values)
    problem = _problem_of(study)
    if problem:
        raise ConfigError(f"{file}: {problem}")
    runner = runner_of(study)
    for name, entry in study.entries.items():
        place = f"{file}: entries.{name}"
        config = runner.config(entry, entry.learning_rate, seed=0, place=place)
        if isinstance(runner, SequenceRunner):
            runner.between_configs(config, place)
    if isinstance(runner, SequenceRunner):
        runner.first_config(place=f"{file}: first")
    return study


def _problem_of(study: Study) -> str | None:
    """What is wrong with the study as a whole, of what no block knows by itself: names, and what its kind needs."""
    entries = study.entries
    bad = [name for name in entries if name in ("", ".", "..") or "/" in name or "\\" in name]
    if bad:
        return f"entries: {bad[0]!r} can't name a folder; leave out slashes"
    unknown = [name for name in study.references if name not in entries]
    if unknown:
        return f"references: {', '.join(unknown)} is not an entry; entries: {', '.join(entries)}"
    both = sorted({entry.budget for entry in entries.values()} & entries.keys())
    if both:
        return f"entries: {both[0]} is both an entry and a budget, so --only is ambiguous; rename one"
    is_sequence = study.kind == "sequence"
    if is_sequence and study.first is None:
        return "first: is missing; a study of kind sequence trains its first task by it"
    given = [key for key in ("first", "between", "replay") if getattr(study, key)]
    if given and not is_sequence:
        return f"{given[0]}: only studies of kind sequence have it, got kind {study.kind}; leave it out"
    sweeping = [name for name, entry in entries.items() if entry.sweep is not None]
    if study.tuning.sweep is None and (is_sequence or sweeping):
        reason = "a study of kind sequence runs every rate of it" if is_sequence else f"entries.{sweeping[0]} has one"
        return f"tuning.sweep: is missing; {reason}; give [lowest, highest]"
    if not isinstance(study.shared.get("model"), dict):
        return "shared.model: is missing; an entry's own model block only changes parts of it"
    if study.elsewhere is not None:
        try:
            study.elsewhere.chosen()
        except DataError as error:
            return f"elsewhere: {error}"
    return None
