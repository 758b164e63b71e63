"""The studies of this folder: how each is run, and the reports of those that were."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import biographies
import phonebook
import random_pairs
import shared_partition
from last_layers import LastLayers, at_searched_rates, of_size
from transformers.utils import logging as transformers_logging

from smoa_lab.study.comparison import Comparison, load_study
from smoa_lab.study.report import Report, report, stored_report
from smoa_lab.study.runner import Runner
from smoa_lab.study.trials import pack

STUDIES = Path(__file__).parent
OTHERWISE = {
    "headlines-refined": ("headlines", "tuning.refine=true"),
    "commonsense-float32": ("commonsense", "shared.model.dtype=float32"),
    **{f"recall-{count}": ("recall", *random_pairs.sizes(count)) for count in (256, 512)},
    "recall-blocks-512": (
        "recall",
        *random_pairs.sizes(512),
        *("tuning.max_runs=5", "tuning.refine=true", "references=[smoa-k8, lora-r2, lora-r4]", "seeds=[10, 11, 12]"),
    ),
    **{f"phonebook-{count}": ("phonebook", *phonebook.sizes(count)) for count in (128, 256, 512, 1024, 2048)},
    **{f"biographies-{count}": ("biographies", *of_size(count)) for count in (64, 256)},
    "recall-gemma-256": ("recall-gemma", *random_pairs.sizes(256)),
}
"""Studies that are another one's file with changes: that file and the changes."""

LAST_LAYERS: dict[str, type[LastLayers]] = {"phonebook": phonebook.PhoneBook, "biographies": biographies.Biographies}

LARGER = ("headlines-ablation",)
"""Studies with an entry whose setting is gone: their summary is not computed anew."""


def folders() -> list[Path]:
    """Those of the studies that have a report."""
    return sorted(summary.parent for summary in STUDIES.glob("*/summary.json"))


def comparison(name: str) -> Comparison:
    """What runs the study of this name, in its folder, by its own runner if it has one."""
    config, *changes = OTHERWISE.get(name, (name,))
    (file,) = STUDIES.glob(f"*/{config}.yaml")
    if config == "partition-headlines":
        shared_partition.add_methods()
    study = load_study(file, [*changes, f"folder={STUDIES / name}"])
    runner: Runner | None = None
    if config.startswith("recall"):
        runner = random_pairs.runner_of(study)
    elif config in LAST_LAYERS:
        runner = LAST_LAYERS[config](study.shared)
        if name != runner.searched:
            study = at_searched_rates(study, comparison(runner.searched))
    elif config == "partition-headlines":
        runner = shared_partition.SharedPartitionRunner(study.shared, study.other_domain)
    return Comparison(study, runner)


def run(name: str, only: Sequence[str] = ()) -> None:
    """Run what is missing of the study, or of these entries or budgets, with a line a run; then pack and report it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    transformers_logging.set_verbosity_error()
    made = comparison(name)
    made.run(only)
    pack(made.study.folder)
    report(made.study, made.runner)


def report_of(folder: Path) -> Report:
    """The report of a study from what is stored of it, under the title of its README.md."""
    readme = folder / "README.md"
    title = (
        readme.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") if readme.is_file() else folder.name
    )
    return stored_report(folder, title)
