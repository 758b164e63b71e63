"""What commands write into a study's file: a new study (``smoa compare --model --data``, ``smoa tune``), and for an old
one more entries, seeds and looks."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import count, islice, product
from pathlib import Path
from typing import Any

from smoa.errors import ConfigError
from smoa_lab.base_models import empty_model, with_rate
from smoa_lab.basics.files import read_stored, write_whole
from smoa_lab.basics.values import flat
from smoa_lab.budget import ALL_LINEAR, FIRST_BLOCKS, LORA, budget_parameters, lora_on, size_method
from smoa_lab.config.methods import OTHER_LAYERS, check_adapter, find_method, trains_own_dtype
from smoa_lab.config.run import ModelSection, RunConfig, check_config, native_dtype
from smoa_lab.config.yaml_text import apply_overrides, read_yaml, to_yaml
from smoa_lab.init import file_for, first_values
from smoa_lab.study.finished import check_inputs, read_finished
from smoa_lab.study.report import SUMMARY, metric_name
from smoa_lab.study.study import STUDY, Study, check_study, edit, load_study
from smoa_lab.training.loaded_run import inputs

logger = logging.getLogger(__name__)
METHODS, PARAMETERS = ("lora", "smoa"), "lora:8"
STEPS, PASSES, BATCH = 300, 3, 8
"""At most so many steps, of so many rows, and passes over the rows."""
MOST_SEEDS = {1: 5, 2: 5, 3: 4, 4: 4}
"""Seeds by the number of methods, 3 of more: so many tell about as small differences apart."""
WHOLE_MODEL = 2e-5
"""Where the search begins for a whole model whose config has no learning rate."""
ALPHAS = ("lora_alpha", "alpha", "psoft_alpha", "randlora_alpha")
"""Keys of a method's strength, which gets twice its r."""
OURS = "ours: "
PEFTS = "PEFT's method_comparison/MetaMathQA at 5d602fdbf, where LoRA has 1e-4: "
TIMES_LORA = {
    "smoa": (1, OURS + "studies/rates.md"),
    "melora": (1, OURS + "studies/biographies-64, both 1e-2"),
    "dora": (1, OURS + "studies/commonsense, both 3e-3"),
    **dict.fromkeys(("rslora", "pissa"), (1, OURS + "studies/headlines, both 3e-3")),
    "miss": (1, OURS + "studies/phonebook-256, both 6e-3"),
    "hira": (10, OURS + "studies/commonsense, 3e-2 to 3e-3"),
    "shira": (10, OURS + "studies/phonebook-256, 1e-1 to 6e-3"),
    **dict.fromkeys(("gralora", "loha"), (3, OURS + "studies/headlines, 1e-2 to 3e-3")),
    "full": (0.1, OURS + "studies/headlines, 3e-4 to 3e-3"),
    **dict.fromkeys(("adaption_prompt", "glora", "vblora"), (5, PEFTS + "5e-4")),
    **dict.fromkeys(("delora", "frod", "ia3", "road", "tinylora", "vera"), (10, PEFTS + "1e-3")),
    **dict.fromkeys(("lokr", "pvera"), (30, PEFTS + "3e-3")),
    "c3a": (3000, PEFTS + "3e-1"),
    "osf": (0.5, PEFTS + "5e-5"),
    "trainable_tokens": (2000, PEFTS + "2e-1"),
}
"""How many times LoRA's learning rate each method's search starts from, and the row's source. Others start from
LoRA's."""
OWN = (
    *("output_dir", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "logging_steps", "seed"),
)
"""Keys of a run's training that a study sets otherwise."""


def default_study(
    model: str,
    data: str,
    methods: Sequence[str] = METHODS,
    parameters: str | None = None,
    changes: Sequence[str] = (),
    settings: Mapping[str, dict[str, Any]] | None = None,
    sizes: Sequence[int] = (),
) -> dict[str, Any]:
    """The values of a study's file: ``methods`` at ``parameters``, by default :data:`PARAMETERS`, or at each of
    ``sizes``, ranks of LoRA with a budget of their own, on a model and data, as `smoa train` would take these, with
    further ``settings`` of theirs."""
    if sizes and parameters:
        raise ConfigError("--sizes and --parameters both say how many each trains; leave one out")
    if other := [name for name in settings or {} if name not in methods]:
        raise ConfigError(f"--set {other[0]}: is not one of --methods {','.join(methods)}; name it there too")
    amounts = {f"-r{size}": f"{LORA}{size}" for size in sorted({*sizes})} or {"": parameters or PARAMETERS}
    of_data = [change.removeprefix("shared.") for change in changes if change.startswith("shared.data.")]
    run = first_values(model, data, next(iter(amounts.values())), changes=of_data)
    empty, lora_rate = empty_model(ModelSection(name=model)), float(run["training"]["learning_rate"])
    kept = {key: value for key, value in run["training"].items() if key not in OWN and value}
    apply_overrides(run, of_data)
    looked = check_config({**run, "training": {**kept, "output_dir": "runs"}}, "smoa compare")
    steps = min(STEPS, math.ceil(PASSES * inputs(looked)["rows"]["train"] / BATCH))
    training = {"max_steps": steps, "per_device_train_batch_size": BATCH, "logging_steps": max(1, steps // 30)}
    entries = dict[str, dict[str, Any]]()
    for (suffix, amount), name in product(amounts.items(), dict.fromkeys(methods)):
        found = find_method(name).config_class
        fields = set() if found is None else {each.name for each in dataclasses.fields(found)}
        block: dict[str, Any] = {} if name in OTHER_LAYERS else {"target_modules": ALL_LINEAR}
        block |= {"num_blocks": FIRST_BLOCKS} if "num_blocks" in fields else {}
        block |= {"total_step": steps} if "total_step" in fields else {}
        block |= (settings or {}).get(name, {})
        budget = budget_parameters(amount, empty.num_parameters(), lora_on(empty, {}))
        sized = size_method(empty, name, block, budget)
        if reason := sized.misses(budget, amount):
            if not sizes:
                raise ConfigError(f"--methods: {reason}; leave it out, or write it into a study's file")
            logger.warning("%s: is left out: %s", f"{name}{suffix}", reason)
            continue
        alphas = [key for key in ALPHAS if key in fields and "r" in sized.adapter][:1]
        entries[f"{name}{suffix}"] = {
            "method": name,
            "adapter": {**dict.fromkeys(alphas, 2 * sized.adapter.get("r", 0)), **block, **sized.adapter},
            "learning_rate": float(f"{TIMES_LORA.get(name, (1, ''))[0] * lora_rate:.1e}"),
            **({"budget": f"r = {suffix.removeprefix('-r')}"} if sizes else {}),
            **({"model": {"dtype": "float32"}} if trains_own_dtype({"method": name, "adapter": block}) else {}),
        }
    if not entries:
        raise ConfigError("--sizes: no method can have one of them")
    values = {
        "shared": {
            "model": {"dtype": native_dtype(), **run["model"]},  # which other entries than whole copies have
            **{key: run[key] for key in ("trainer", "data")},
            "training": {**kept, **training},
        },
        "entries": entries,
        "seeds": list(range(MOST_SEEDS.get(len({*methods}), 3))),
    }
    apply_overrides(values, [change for change in changes if not change.startswith("shared.data.")])
    return values


def tuning_study(config: RunConfig, max_runs: int) -> dict[str, Any]:
    """The values of the study of a run's learning rate: one entry, and no final runs."""
    config = with_rate(config)
    shared = config.model_dump(mode="json", exclude={"method", "adapter", "scoring"})
    own = ("learning_rate", "seed", "output_dir")
    shared["data"]["metric"] = None  # the loss decides
    shared["training"] = {key: value for key, value in config.training.items() if key not in own}
    rate = config.training.get("learning_rate", WHOLE_MODEL)
    return {
        "shared": shared,
        "entries": {config.method: {"method": config.method, "adapter": config.adapter, "learning_rate": rate}},
        "tuning": {"seed": config.training.get("seed", 42), "max_runs": max_runs},
        "seeds": [],
    }


def write_study(values: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Write a study's file into its ``folder``, by default that of its data. A file that is there goes on, as it may
    have been edited, with the entries that it lacks. Raises ConfigError where it has another model, other rows, or an
    entry's adapter otherwise; one that only searches must be the same."""
    folder = folder or Path("studies", file_for(str(values["shared"]["data"].get("train", "study"))).stem)
    file = folder / STUDY
    if not file.is_file():
        if folder.is_dir() and any(folder.glob("[!.]*")):
            raise ConfigError(f"{folder}: has files and no study; choose another folder")
        check_study(values, file)
        write_whole(file, to_yaml(dict(values)))
        return file
    stored = read_yaml(file)
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
