"""What commands write into a study's file: a new study, further entries and seeds, and with them unplanned looks."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

from smoa.errors import ConfigError
from smoa_lab.base_models import empty_model
from smoa_lab.basics.atomic import write_whole
from smoa_lab.basics.folders import flat, read_stored
from smoa_lab.config.methods import check_adapter
from smoa_lab.config.yaml_text import parse_yaml, to_yaml
from smoa_lab.init import file_for
from smoa_lab.study.finished import check_inputs, read_finished
from smoa_lab.study.report import SUMMARY, metric_name
from smoa_lab.study.study import STUDY, Study, edit, load_study
from smoa_lab.training.loaded_run import inputs

logger = logging.getLogger(__name__)


def write_study(values: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Write a study's file into its ``folder``, by default that of its data. A file that is there goes on, as it may
    have been edited, with the entries that it lacks. Raises ConfigError where it has another model, other rows, or an
    entry's adapter otherwise; one that only searches must be the same."""
    folder = folder or Path("studies", file_for(str(values["shared"]["data"].get("train", "study"))).stem)
    file = folder / STUDY
    if not file.is_file():
        if folder.is_dir() and any(folder.glob("[!.]*")):
            raise ConfigError(f"{folder}: has files and no study; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, to_yaml(dict(values)))
        try:
            load_study(file)
        except ConfigError:
            file.unlink()
            raise
        return file
    stored = parse_yaml(file.read_text(encoding="utf-8"), file)
    if other := _other_values(stored, values):
        raise ConfigError(f"{file}: has another {', another '.join(other)} than this command; edit it, or move it away")
    new = {name: entry for name, entry in values["entries"].items() if name not in stored["entries"]}
    logger.info("%s: goes on%s; to change it, edit it", file, f", with {', '.join(new)} too" if new else "")
    if new:
        edit(file, [f"entries.{name}={json.dumps(entry)}" for name, entry in new.items()])
    return file


def _other_values(stored: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """The keys that a command decides, and of which the stored study has other values."""

    def decided(study: Mapping[str, Any]) -> dict[str, Any]:
        shared, entries = study["shared"], study["entries"]
        known = {f"shared.{place}": value for place, value in flat(shared).items()}
        known |= {f"entries.{name}.adapter": entry.get("adapter") for name, entry in entries.items()}
        if values["seeds"]:
            of_all = {"shared.model.name", "shared.data.train", "shared.data.hub"}
            return {place: value for place, value in known.items() if place in of_all or place.startswith("entries.")}
        known |= {f"entries.{name}.learning_rate": entry["learning_rate"] for name, entry in entries.items()}
        return known | {"tuning.seed": study["tuning"]["seed"]}

    before, now = decided(stored), decided(values)
    return sorted(place for place in now if place in before and before[place] != now[place])


def ask(file: Path, changes: Sequence[str], number: int | None = None) -> Study:
    """Write what a command asks for into a study's file: ``changes``, and ``number`` seeds in all.

    Entries that came after a look was reported, and all of them where it was by another metric, take an unplanned one:
    what the last report says, in summary.json, is the memory of that. Raises ConfigError for a change that the study
    can't have."""
    if changes:
        edit(file, changes)
    study, said, written = load_study(file), file.with_name(SUMMARY), list[str]()
    known = read_stored(said)["budgets"] if said.is_file() else {}
    looked = {budget: one for budget, one in known.items() if one["round"] > 1}
    for budget, own in study.budgets().items():
        if (one := looked.get(budget)) is not None:
            new = [name for name in own if name not in one["entries"] or one["metric"] != metric_name(study)]
            look = 1 + one["added"] + max(0, one["round"] - study.planned)
            written += [f"entries.{name}.added={look}" for name in new]
    if number is not None and number != len(study.seeds):
        free = (seed for seed in count() if seed not in (*study.seeds, study.tuning.seed))
        seeds = [*study.seeds, *islice(free, max(0, number - len(study.seeds)))]
        written += [f"seeds={seeds}", f"rounds={study.planned}"] if looked else [f"seeds={seeds[:number]}"]
    if written:
        edit(file, written)
    return load_study(file)


def check(study: Study, only: Sequence[str] = ()) -> None:
    """Raise ConfigError or DataError where the study can't be run, before anything is: an entry that does not fit the
    model, a part without rows, finished runs that started from something else, or ``only`` names nothing."""
    study.chosen(only)
    for config in study.configs.values():
        if (wanted := config.peft_config()) is not None:
            check_adapter(empty_model(config.model), wanted)
    found = inputs(study.any_config)
    if missing := [part for part in ("validation", "test") if not found["rows"][part]]:
        raise ConfigError(f"shared.data: leaves no {missing[0]} rows; give more rows, or groups")
    check_inputs(read_finished(study), found["digests"])
